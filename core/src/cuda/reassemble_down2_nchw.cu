// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent columns. A thread has two outputs, one below the other, in some channels. It
// keeps the masks of both in registers and normalises them there. It loads the rows that both windows reach once, two
// columns at a time. Blocks take pairs of outputs by number, so that small images fill them.
#include "cuda/down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kBlock = 128;  // threads
constexpr int kChannelsOfThread = 64;

struct ReassembleDown2NchwPlan {
    int64_t tiles;           // of pairs of outputs in an image
    int64_t channel_blocks;  // of a group
    int64_t items;

    ReassembleDown2NchwPlan(const Problem& p, const Array& output) {
        tiles = ceil_div(ceil_div(p.out_h, kPair) * p.out_w, kBlock);
        channel_blocks = ceil_div(p.features.c / p.groups, kChannelsOfThread);
        items = output.n * p.groups * tiles * channel_blocks;
    }
};

// Both windows in `channels` channels. Unless `Inside`, taps beyond a border have no feature, and no weight.
template <int K, bool Inside, class T>
__device__ __forceinline__ void reassemble_pair(const Problem& p, int64_t n, int64_t c, int channels, int out_i,
                                                int out_j, const float (&masks)[kPair][K * K], const Array& output) {
    const T* windows = windows_at<K, T>(p, n, c, out_i, out_j);
    T* outputs = element<T>(output, n, c, out_i, out_j);  // [C, H', W']
    const bool two_rows = out_i + 1 < p.out_h;
#pragma unroll 1
    for (; channels > 0; channels--, windows += p.features.stride_c, outputs += output.stride_c) {
        float sums[kPair] = {};
        for_each_tap_of_pair<K, Inside>(p, windows, out_i, out_j,
                                        [&](int o, int t, float feature) { sums[o] += masks[o][t] * feature; });
        outputs[0] = narrow<T>(sums[0]);
        if (two_rows) outputs[output.stride_h] = narrow<T>(sums[1]);
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 4)
    reassemble_down2_nchw_kernel(Arguments arguments, ReassembleDown2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int64_t channels_in_group = p.features.c / p.groups;
    // plan.items once more: read from the plan, it costs the inner loop two instructions.
    const int64_t items = output.n * p.groups * plan.tiles * plan.channel_blocks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Pixel pair = pixel_at(tile.remainder * kBlock + threadIdx.x, p.out_w);
        const int out_i = static_cast<int>(pair.i) * kPair, out_j = static_cast<int>(pair.j);
        if (pair.i * kPair >= p.out_h) continue;

        const bool inside = windows_inside<K>(p, out_i, out_j);
        float masks[kPair][K * K] = {};
#pragma unroll 1
        for (int o = 0; o < kPair; o++) {  // the first moves up: the normaliser's code stands once
            float own[K * K] = {};
            if (out_i + o < p.out_h) {
                load_taps<K>(mask_element<T>(array, n, group * p.taps(), out_i + o, out_j), array.stride_c,
                             p.from_logits, p.normalizer, own);
                // as 0 * Inf is NaN
                if (!inside) clear_taps_outside<K>(p, (out_i + o) * kDown, out_j * kDown, own);
            }
#pragma unroll
            for (int t = 0; t < K * K; t++) {
                masks[0][t] = masks[1][t];
                masks[1][t] = own[t];
            }
        }
        const int64_t first = channel_block.remainder * kChannelsOfThread, c = group * channels_in_group + first;
        const int channels = static_cast<int>(min(int64_t{kChannelsOfThread}, channels_in_group - first));
        if (inside) {
            reassemble_pair<K, true, T>(p, n, c, channels, out_i, out_j, masks, output);
        } else {
            reassemble_pair<K, false, T>(p, n, c, channels, out_i, out_j, masks, output);
        }
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nchw(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (!output.empty() && output.stride_w != 1) return "columns are not adjacent";
    return not_for_columns(p.features);
}

void reassemble_down2_nchw(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const ReassembleDown2NchwPlan plan(p, output);
        launch(reassemble_down2_nchw_kernel<k, decltype(feature)>, plan.items, kBlock, 0, p, output, plan);
    });
}

}  // namespace carafepp::cuda
