// SPDX-License-Identifier: Apache-2.0
//
// The forward for up x2 with adjacent channels. A block has some neighbouring sources of a row and some channels, a
// thread four channels of two sources, whose eight outputs it sums in registers: stage the masks of the sources'
// outputs as [source][tap][output], contract the taps (each feature that is loaded serves both sources, each vector of
// weights that is read from shared memory four outputs), write out.
#include "cuda/channels.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSources = 2;  // of a thread

struct Cut {
    int lanes, sources;     // of a block: threads along channels, sources along a row
    int64_t tiles, chunks;  // of sources in a row, of channels in a group
};

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_nhwc_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;
    constexpr int kTaps = K * K;
    float* const staged = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x) % cut.lanes,
              own = static_cast<int>(threadIdx.x) / cut.lanes * kSources;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = output.n * p.groups * p.features.h * cut.tiles * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), tile = divide(chunk.quotient, cut.tiles),
                       row = divide(tile.quotient, p.features.h), image = divide(row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = row.remainder;
        const int64_t first = tile.remainder * cut.sources, j = first + own;
        const int64_t in_group = (chunk.remainder * cut.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        stage_sources<K, T>(p, n, group, i, first, cut.sources, staged);
        clear_outside<K>(p, first, cut.sources, staged);
        if (in_group < channels_in_group && j < p.features.w) {
            float4 sums[kSources][kOutputs] = {};
            const int64_t top = i - K / 2, left = j - K / 2;
            const int a_begin = static_cast<int>(max(-top, int64_t{0}));
            const int a_end = static_cast<int>(min(int64_t{K}, p.features.h - top));
            const T* features = element<const T>(p.features, n, c, top + a_begin, left);
            const float4* weights = reinterpret_cast<const float4*>(staged) + own * kTaps + a_begin * K;
#pragma unroll 1
            for (int a = a_begin; a < a_end; a++, features += p.features.stride_h, weights += K) {
#pragma unroll
                for (int x = 0; x < K + kSources - 1; x++) {
                    const bool inside = left + x >= 0 && left + x < p.features.w;
                    const float4 feature = load_channels(features + x * p.features.stride_w, inside);
#pragma unroll
                    for (int s = 0; s < kSources; s++) {
                        if (x - s < 0 || x - s >= K) continue;
                        const float4 weight = weights[s * kTaps + x - s];
                        add_products(weight.x, feature, sums[s][0]);
                        add_products(weight.y, feature, sums[s][1]);
                        add_products(weight.z, feature, sums[s][2]);
                        add_products(weight.w, feature, sums[s][3]);
                    }
                }
            }
#pragma unroll
            for (int s = 0; s < kSources; s++) {
#pragma unroll
                for (int o = 0; o < kOutputs; o++) {
                    const int64_t out_i = i * kUp + o / kUp, out_j = (j + s) * kUp + o % kUp;
                    if (out_i >= p.out_h || out_j >= p.out_w) continue;
                    store_channels(sums[s][o], element<T>(output, n, c, out_i, out_j));
                }
            }
        }
        __syncthreads();
    }
}

template <int K>
void run(const Problem& p, const Array& output) {
    const int64_t channels_in_group = p.features.c / p.groups;
    const Lanes block(channels_in_group, kSources, K * K * kBytesOfTap);
    Cut cut;
    cut.lanes = block.lanes;
    cut.sources = block.columns;
    cut.tiles = ceil_div(p.features.w, cut.sources);
    cut.chunks = ceil_div(channels_in_group, cut.lanes * kVector);
    with_floats(p, [&](auto feature) {
        launch(reassemble_nhwc_kernel<K, decltype(feature)>,
               output.n * p.groups * p.features.h * cut.tiles * cut.chunks, kThreads, block.shared_bytes, p, output,
               cut);
    });
}

}  // namespace

const char* cannot_run_reassemble_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_up2(p, 7)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_nhwc(const Problem& p, const Array& output) {
    switch (p.kernel_size) {
        case 3: return run<3>(p, output);
        case 5: return run<5>(p, output);
        case 7: return run<7>(p, output);
    }
}

}  // namespace carafepp::cuda
