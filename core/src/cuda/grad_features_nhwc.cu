// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for up x2 with adjacent channels, in gather form. A block has some neighbouring columns of
// sources and some channels, and goes down their rows; a thread has four channels of two columns. Of a row of sources:
// stage the masks of its outputs as [source][tap][output]; contract them with grad_output, whose vectors, once loaded,
// serve all K rows of the result that the windows reach, with their sums in registers; the uppermost of these is then
// complete: write it out.
#include "cuda/channels.h"

namespace carafepp::cuda {
namespace {

constexpr int kColumns = 2;  // of a thread
constexpr int kRows = 16;    // that a block goes down, with a window more

struct Cut {
    int lanes, columns;            // of a block: threads along channels, columns of sources
    int64_t panels, runs, chunks;  // of columns in a row, of rows in an image, of channels in a group
};

// The masks of outputs that a crop leaves out become 0, as the gradient is read as 0 there.
template <int K>
__device__ void clear_cropped(const Problem& p, int i, int first, int sources, float* staged) {
    if ((i + 1) * kUp <= p.out_h && (first + sources) * kUp <= p.out_w) return;
    for (int k = static_cast<int>(threadIdx.x); k < sources * K * K * kOutputs; k += kThreads) {
        const int output = k % kOutputs, j = first + k / (K * K * kOutputs);
        if (i * kUp + output / kUp >= p.out_h || j * kUp + output % kUp >= p.out_w) staged[k] = 0;
    }
    __syncthreads();
}

// sums[a][column] += what the outputs of sources (i, left ..) give to the rows from i - K/2 on. `staged`: of the first
// of these sources.
template <int K, class T>
__device__ __forceinline__ void contract(const Problem& p, int64_t n, int64_t c, int i, int left, const float4* staged,
                                         float4 (&sums)[K][kColumns]) {
    const int out_i = i * kUp;
    const bool two_rows = out_i + 1 < p.out_h;
    const T* grads = element<const T>(p.grad_output, n, c, out_i, left * kUp);
    const float4* weights = staged + K - 1;  // of the taps that reach column 0
#pragma unroll 1
    for (int x = 0; x < K + kColumns - 1; x++, grads += kUp * p.grad_output.stride_w, weights += K * K - 1) {
        float4 grad[kOutputs];
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
            const int out_j = (left + x) * kUp + o % kUp;
            const bool exists = (o < kUp || two_rows) && out_j >= 0 && out_j < p.out_w;
            const T* const from = grads + o / kUp * p.grad_output.stride_h + o % kUp * p.grad_output.stride_w;
            grad[o] = exists ? load_channels(from) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int s = 0; s < kColumns; s++) {
            if (x < s || x >= s + K) continue;
#pragma unroll
            for (int a = 0; a < K; a++) {
                const float4 weight = weights[a * K + s];
                add_products(weight.x, grad[0], sums[a][s]);
                add_products(weight.y, grad[1], sums[a][s]);
                add_products(weight.z, grad[2], sums[a][s]);
                add_products(weight.w, grad[3], sums[a][s]);
            }
        }
    }
}

template <int K, class T, class M>
__global__ void __launch_bounds__(kThreads, 2) grad_features_nhwc_kernel(Problem p, Cut cut) {
    constexpr int kTaps = K * K, kRadius = K / 2;
    float* const staged = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x) % cut.lanes,
              own = static_cast<int>(threadIdx.x) / cut.lanes * kColumns;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = p.result.n * p.groups * cut.runs * cut.panels * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), panel = divide(chunk.quotient, cut.panels),
                       run = divide(panel.quotient, cut.runs), image = divide(run.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int first = static_cast<int>(panel.remainder) * cut.columns, j = first + own;
        const int64_t in_group = (chunk.remainder * cut.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        const bool exists = in_group < channels_in_group && j < p.features.w;
        const int height = static_cast<int>(p.features.h);
        const int top = static_cast<int>(run.remainder) * kRows, bottom = min(top + kRows, height);
        float4 sums[K][kColumns] = {};  // of rows i - kRadius and on
        for (int i = top - kRadius; i < bottom + kRadius; i++) {
            if (i >= 0 && i < height && i * kUp < p.out_h && p.out_w > 0) {
                stage_sources<K, M>(p, n, group, i, first - kRadius, cut.columns + K - 1, staged);
                clear_cropped<K>(p, i, first - kRadius, cut.columns + K - 1, staged);
                if (exists) {
                    contract<K, T>(p, n, c, i, j - kRadius, reinterpret_cast<const float4*>(staged) + own * kTaps,
                                   sums);
                }
                __syncthreads();
            }
            if (exists && i - kRadius >= top) {
#pragma unroll
                for (int s = 0; s < kColumns; s++) {
                    if (j + s < p.features.w)
                        store_channels(sums[0][s], element<T>(p.result, n, c, i - kRadius, j + s));
                }
            }
#pragma unroll
            for (int a = 0; a < K; a++) {
#pragma unroll
                for (int s = 0; s < kColumns; s++) sums[a][s] = a + 1 < K ? sums[a + 1][s] : make_float4(0, 0, 0, 0);
            }
        }
    }
}

template <int K>
void run(const Problem& p) {
    const int64_t channels_in_group = p.features.c / p.groups;
    const Lanes block(channels_in_group, K, kColumns, K - 1);
    Cut cut;
    cut.lanes = block.lanes;
    cut.columns = block.sources;
    cut.panels = ceil_div(p.features.w, cut.columns);
    cut.runs = ceil_div(p.features.h, kRows);
    cut.chunks = ceil_div(channels_in_group, cut.lanes * kVector);
    with_types(p, [&](auto features, auto masks) {
        using T = typename decltype(features)::type;
        using M = typename decltype(masks)::type;
        if constexpr (!std::is_same_v<T, double>) {
            launch(grad_features_nhwc_kernel<K, T, M>, p.result.n * p.groups * cut.runs * cut.panels * cut.chunks,
                   kThreads, block.shared_bytes(K, K - 1), p.stream, p, cut);
        }
    });
}

}  // namespace

const char* not_for_grad_features_nhwc(const Problem& p) {
    if (const char* reason = not_for_up2(p, 7)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, p.result);
}

void grad_features_nhwc(const Problem& p) {
    switch (p.kernel_size) {
        case 3: return run<3>(p);
        case 5: return run<5>(p);
        case 7: return run<7>(p);
    }
}

}  // namespace carafepp::cuda
