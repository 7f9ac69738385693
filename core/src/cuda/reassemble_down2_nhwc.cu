// SPDX-License-Identifier: Apache-2.0
//
// The forward for down x2 with adjacent channels. A block has some neighbouring outputs of a row and some channels, a
// thread four channels of four outputs: stage the masks of the outputs as [tap][output], contract the taps (each
// feature that is loaded serves all windows that hold it, each vector of weights four outputs), write out.
#include "cuda/channels.h"
#include "cuda/down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kOwn = 4;  // outputs of a thread

struct Cut {
    int lanes, outputs;     // of a block: threads along channels, outputs along a row
    int64_t tiles, chunks;  // of outputs in a row, of channels in a group
};

// The masks of outputs (out_i, first ..), 0 beyond the row and, as its features are, those of taps beyond its ends: 0 *
// 0 is 0 even where a mask is Inf. Ends with a barrier.
template <int K, class T>
__device__ void stage_outputs(const Problem& p, int64_t n, int64_t group, int64_t out_i, int64_t first, int outputs,
                              float* staged) {
    const int64_t there = min(int64_t{outputs}, p.out_w - first);
    stage_masks<T>(p, n, group, out_i * p.out_w + first, there, p.out_w, staged, outputs);
    const int64_t left = first * kDown - K / 2;
    if (there == outputs && left >= 0 && left + kDown * (outputs - 1) + K <= p.features.w) return;
    for (int k = static_cast<int>(threadIdx.x); k < K * K * outputs; k += kThreads) {
        const int64_t x = left + kDown * (k % outputs) + k / outputs % K;
        if (k % outputs >= there || x < 0 || x >= p.features.w) staged[k] = 0;
    }
    __syncthreads();
}

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_down2_nhwc_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;
    float* const staged = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x) % cut.lanes, own = static_cast<int>(threadIdx.x) / cut.lanes * kOwn;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = output.n * p.groups * p.out_h * cut.tiles * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), tile = divide(chunk.quotient, cut.tiles),
                       row = divide(tile.quotient, p.out_h), image = divide(row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, out_i = row.remainder;
        const int64_t first = tile.remainder * cut.outputs, out_j = first + own;
        const int64_t in_group = (chunk.remainder * cut.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        stage_outputs<K, T>(p, n, group, out_i, first, cut.outputs, staged);
        if (in_group < channels_in_group && out_j < p.out_w) {
            float4 sums[kOwn] = {};
            const int64_t top = out_i * kDown - K / 2, left = out_j * kDown - K / 2;
            const int a_begin = static_cast<int>(max(-top, int64_t{0}));
            const int a_end = static_cast<int>(min(int64_t{K}, p.features.h - top));
            const T* features = element<const T>(p.features, n, c, top + a_begin, left);
#pragma unroll 1
            for (int a = a_begin; a < a_end; a++, features += p.features.stride_h) {
                float weights[K][kOwn];
#pragma unroll
                for (int b = 0; b < K; b++) {
                    const float4 of = *reinterpret_cast<const float4*>(staged + (a * K + b) * cut.outputs + own);
                    weights[b][0] = of.x, weights[b][1] = of.y, weights[b][2] = of.z, weights[b][3] = of.w;
                }
#pragma unroll
                for (int x = 0; x < K + kDown * (kOwn - 1); x++) {
                    const bool inside = left + x >= 0 && left + x < p.features.w;
                    const float4 feature = load_channels(features + x * p.features.stride_w, inside);
#pragma unroll
                    for (int o = 0; o < kOwn; o++) {
                        const int b = x - kDown * o;
                        if (b >= 0 && b < K) add_products(weights[b][o], feature, sums[o]);
                    }
                }
            }
#pragma unroll
            for (int o = 0; o < kOwn; o++) {
                if (out_j + o < p.out_w) store_channels(sums[o], element<T>(output, n, c, out_i, out_j + o));
            }
        }
        __syncthreads();
    }
}

template <int K>
void run(const Problem& p, const Array& output) {
    const int64_t channels_in_group = p.features.c / p.groups;
    const Lanes block(channels_in_group, kOwn, K * K * int64_t{sizeof(float)});
    Cut cut;
    cut.lanes = block.lanes;
    cut.outputs = block.columns;
    cut.tiles = ceil_div(p.out_w, cut.outputs);
    cut.chunks = ceil_div(channels_in_group, cut.lanes * kVector);
    with_floats(p, [&](auto feature) {
        launch(reassemble_down2_nhwc_kernel<K, decltype(feature)>,
               output.n * p.groups * p.out_h * cut.tiles * cut.chunks, kThreads, block.shared_bytes, p, output, cut);
    });
}

}  // namespace

const char* cannot_run_reassemble_down2_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_down2_nhwc(const Problem& p, const Array& output) {
    p.kernel_size == 3 ? run<3>(p, output) : run<5>(p, output);
}

}  // namespace carafepp::cuda
