// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent channels. A block has neighbouring sources of a row, a thread four channels of
// two of them. The block stages the masks as [source][tap][output]. A thread sums its eight outputs in registers: a
// feature serves both sources, and a vector of masks four outputs.
#include "cuda/channels.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSourcesOfThread = 2;

struct ReassembleUp2NhwcPlan {
    int lanes, sources;      // of a block: threads along channels, sources along a row
    int64_t tiles;           // of a row
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    ReassembleUp2NhwcPlan(const Problem& p, const Array& output, int k) {
        const int64_t channels_in_group = p.features.c / p.groups;
        const Lanes block(channels_in_group, kSourcesOfThread, k * k * kBytesOfTap);
        lanes = block.lanes;
        sources = block.columns;
        tiles = ceil_div(p.features.w, sources);
        channel_blocks = ceil_div(channels_in_group, lanes * kVector);
        items = output.n * p.groups * p.features.h * tiles * channel_blocks;
        shared_bytes = block.shared_bytes;
    }
};

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    reassemble_up2_nhwc_kernel(Arguments arguments, ReassembleUp2NhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    constexpr int kTaps = K * K;
    float* const staged = shared_memory<float>();  // [source][tap][output]
    const int lane = static_cast<int>(threadIdx.x) % plan.lanes,
              own = static_cast<int>(threadIdx.x) / plan.lanes * kSourcesOfThread;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles), row = divide(tile.quotient, p.features.h),
                       image = divide(row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = row.remainder;
        const int64_t first = tile.remainder * plan.sources, j = first + own;
        const int64_t in_group = (channel_block.remainder * plan.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        stage_sources<K, T>(p, n, group, i, first, plan.sources, staged);
        clear_staged_outside<K>(p, first, plan.sources, staged);
        if (in_group < channels_in_group && j < p.features.w) {
            float4 sums[kSourcesOfThread][kOutputs] = {};
            const int64_t top = i - K / 2, left = j - K / 2;
            const int a_begin = static_cast<int>(max(-top, int64_t{0}));
            const int a_end = static_cast<int>(min(int64_t{K}, p.features.h - top));
            const T* features = element<const T>(p.features, n, c, top + a_begin, left);  // [H, W, C]
            const float4* weights = reinterpret_cast<const float4*>(staged) + own * kTaps + a_begin * K;
#pragma unroll 1
            for (int a = a_begin; a < a_end; a++, features += p.features.stride_h, weights += K) {
#pragma unroll
                for (int x = 0; x < K + kSourcesOfThread - 1; x++) {
                    const bool inside = left + x >= 0 && left + x < p.features.w;
                    const float4 feature = load_channels(features + x * p.features.stride_w, inside);
#pragma unroll
                    for (int s = 0; s < kSourcesOfThread; s++) {
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
            for (int s = 0; s < kSourcesOfThread; s++) {
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

}  // namespace

const char* cannot_run_reassemble_up2_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_up2(p, 7)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_up2_nhwc(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5, 7>(p, [&](auto k, auto feature) {
        const ReassembleUp2NhwcPlan plan(p, output, k);
        launch(reassemble_up2_nhwc_kernel<k, decltype(feature)>, plan.items, kThreads, plan.shared_bytes, p, output,
               plan);
    });
}

}  // namespace carafepp::cuda
