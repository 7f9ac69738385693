// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent channels. A block has neighbouring outputs of a row, a thread four channels of
// four of them. The block stages the masks as [tap][output]. A feature serves all windows that hold it, and a vector of
// masks four outputs.
#include "cuda/channels.h"
#include "cuda/down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kOutputsOfThread = 4;

struct ReassembleDown2NhwcPlan {
    int lanes, outputs;      // of a block: threads along channels, outputs along a row
    int64_t tiles;           // of a row
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    ReassembleDown2NhwcPlan(const Problem& p, const Array& output, int k) {
        const int64_t channels_in_group = p.features.c / p.groups;
        const Lanes block(channels_in_group, kOutputsOfThread, k * k * int64_t{sizeof(float)});
        lanes = block.lanes;
        outputs = block.columns;
        tiles = ceil_div(p.out_w, outputs);
        channel_blocks = ceil_div(channels_in_group, lanes * kVector);
        items = output.n * p.groups * p.out_h * tiles * channel_blocks;
        shared_bytes = block.shared_bytes;
    }
};

// Stages the masks of outputs from (out_i, first) on, with 0 beyond the end of the row. Taps beyond the ends of a row
// of features are 0 too, as 0 * Inf is NaN. Ends with a barrier.
template <int K, class T>
__device__ void stage_outputs(const Problem& p, int64_t n, int64_t group, int64_t out_i, int64_t first, int outputs,
                              float* staged) {
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int there = static_cast<int>(min(int64_t{outputs}, p.out_w - first));
    with_masks<T>(array, [&](auto mask) {
        copy_grid<kThreads>(element<const decltype(mask)>(array, n, group * K * K, out_i, first), K * K, outputs,
                            array.stride_w <= array.stride_c, [&](int t, int q) {
            return StagedElement{t * array.stride_c + q * array.stride_w, t * outputs + q, q < there};
        }, staged);
    });
    __syncthreads();
    if (p.from_logits) {
        normalize_staged<K>(p.normalizer, staged, there, outputs, [](int output) { return output; });
        __syncthreads();
    }
    const int64_t left = first * kDown - K / 2;
    if (there == outputs && left >= 0 && left + kDown * (outputs - 1) + K <= p.features.w) return;
    for (int k = static_cast<int>(threadIdx.x); k < K * K * outputs; k += kThreads) {
        const int64_t x = left + kDown * (k % outputs) + k / outputs % K;
        if (k % outputs >= there || x < 0 || x >= p.features.w) staged[k] = 0;
    }
    __syncthreads();
}

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    reassemble_down2_nhwc_kernel(Arguments arguments, ReassembleDown2NhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;        // [N, C, H', W']
    float* const staged = shared_memory<float>();  // [tap][output]
    const int lane = static_cast<int>(threadIdx.x) % plan.lanes,
              own = static_cast<int>(threadIdx.x) / plan.lanes * kOutputsOfThread;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles), row = divide(tile.quotient, p.out_h),
                       image = divide(row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, out_i = row.remainder;
        const int64_t first = tile.remainder * plan.outputs, out_j = first + own;
        const int64_t in_group = (channel_block.remainder * plan.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        stage_outputs<K, T>(p, n, group, out_i, first, plan.outputs, staged);
        if (in_group < channels_in_group && out_j < p.out_w) {
            float4 sums[kOutputsOfThread] = {};
            const int64_t top = out_i * kDown - K / 2, left = out_j * kDown - K / 2;
            const int a_begin = static_cast<int>(max(-top, int64_t{0}));
            const int a_end = static_cast<int>(min(int64_t{K}, p.features.h - top));
            const T* features = element<const T>(p.features, n, c, top + a_begin, left);  // [H, W, C]
#pragma unroll 1
            for (int a = a_begin; a < a_end; a++, features += p.features.stride_h) {
                float weights[K][kOutputsOfThread];
#pragma unroll
                for (int b = 0; b < K; b++) {
                    const float4 of = *reinterpret_cast<const float4*>(staged + (a * K + b) * plan.outputs + own);
                    weights[b][0] = of.x, weights[b][1] = of.y, weights[b][2] = of.z, weights[b][3] = of.w;
                }
#pragma unroll
                for (int x = 0; x < K + kDown * (kOutputsOfThread - 1); x++) {
                    const bool inside = left + x >= 0 && left + x < p.features.w;
                    const float4 feature = load_channels(features + x * p.features.stride_w, inside);
#pragma unroll
                    for (int o = 0; o < kOutputsOfThread; o++) {
                        const int b = x - kDown * o;
                        if (b >= 0 && b < K) add_products(weights[b][o], feature, sums[o]);
                    }
                }
            }
#pragma unroll
            for (int o = 0; o < kOutputsOfThread; o++) {
                if (out_j + o < p.out_w) store_channels(sums[o], element<T>(output, n, c, out_i, out_j + o));
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_down2_nhwc(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const ReassembleDown2NhwcPlan plan(p, output, k);
        launch(reassemble_down2_nhwc_kernel<k, decltype(feature)>, plan.items, kThreads, plan.shared_bytes, p, output,
               plan);
    });
}

}  // namespace carafepp::cuda
