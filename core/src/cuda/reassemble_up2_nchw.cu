// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns. A thread has one source in some channels. It keeps the masks of the four
// outputs in registers and normalises them there, as no other thread needs them. A feature serves all four outputs.
// A block takes consecutive sources across rows, so that small images fill it.
#include "cuda/columns.h"
#include "cuda/up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSourcesOfBlock = 128;  // one a thread
constexpr int kChannelsOfThread = 64;

struct ReassembleUp2NchwPlan {
    int64_t channels;        // of a group
    int64_t tiles;           // of sources in an image
    int64_t channel_blocks;  // of a group
    int64_t items;
    bool pairs;  // store the two outputs of a row at once

    ReassembleUp2NchwPlan(const Problem& p, const Array& output) {
        channels = p.features.c / p.groups;
        tiles = ceil_div(p.features.h * p.features.w, kSourcesOfBlock);
        channel_blocks = ceil_div(channels, kChannelsOfThread);
        items = output.n * p.groups * tiles * channel_blocks;
        pairs = not_for_columns(output) == nullptr;
    }
};

// One window in `channels` channels. Unless `Inside`, taps beyond a border have no feature, and no weight. With `pairs`
// the two outputs of a row are stored at once, as neighbouring lanes then fill whole sectors.
template <int K, bool Inside, class T>
__device__ __forceinline__ void reassemble_source(const Problem& p, int64_t n, int64_t c, int channels, int i, int j,
                                                  const float (&masks)[kOutputs][K * K], bool pairs,
                                                  const Array& output) {
    const T* window = element<const T>(p.features, n, c, i - K / 2, j - K / 2);  // [C, H, W]
    T* outputs = element<T>(output, n, c, int64_t{i} * kUp, int64_t{j} * kUp);   // [C, H', W']
    const bool two_rows = i * kUp + 1 < p.out_h, two_columns = j * kUp + 1 < p.out_w;
#pragma unroll 1
    for (; channels > 0; channels--, window += p.features.stride_c, outputs += output.stride_c) {
        float sums[kOutputs] = {};
        for_each_tap<K, Inside>(p, window, i, j, [&](int t, float feature) {
#pragma unroll
            for (int o = 0; o < kOutputs; o++) sums[o] += masks[o][t] * feature;
        });
        if (pairs) {
            store_columns(make_float2(sums[0], sums[1]), outputs);
            if (two_rows) store_columns(make_float2(sums[2], sums[3]), outputs + output.stride_h);
        } else {
            outputs[0] = narrow<T>(sums[0]);
            if (two_columns) outputs[1] = narrow<T>(sums[1]);
            if (two_rows) outputs[output.stride_h] = narrow<T>(sums[2]);
            if (two_rows && two_columns) outputs[output.stride_h + 1] = narrow<T>(sums[3]);
        }
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kSourcesOfBlock, 3)
    reassemble_up2_nchw_kernel(Arguments arguments, ReassembleUp2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Pixel source = pixel_at(tile.remainder * kSourcesOfBlock + threadIdx.x, p.features.w);
        const int i = static_cast<int>(source.i), j = static_cast<int>(source.j);
        if (source.i * kUp >= p.out_h || source.j * kUp >= p.out_w) continue;

        float masks[kOutputs][K * K] = {};
        const Array& array = p.from_logits ? p.logits : p.masks;
        const int64_t step = array.stride_c * (p.from_logits ? kOutputs : 1);
        const bool inside = window_inside<K>(p, i, j);
#pragma unroll 1
        for (int o = 0; o < kOutputs; o++) {  // not unrolled, so the normaliser is compiled once
            const Pixel output{int64_t{i} * kUp + o / kUp, int64_t{j} * kUp + o % kUp};
            float own[K * K] = {};  // 0 where a crop leaves the output out
            if (p.from_logits || (output.i < p.out_h && output.j < p.out_w)) {
                load_taps<K>(mask_at<T>(p, array, n, group, 0, output), step, p.from_logits, p.normalizer, own);
                if (!inside) clear_taps_outside<K>(p, i, j, own);  // as 0 * Inf is NaN
            }
#pragma unroll
            for (int t = 0; t < K * K; t++) {
#pragma unroll
                for (int q = 0; q + 1 < kOutputs; q++) masks[q][t] = masks[q + 1][t];
                masks[kOutputs - 1][t] = own[t];
            }
        }
        const int64_t first = channel_block.remainder * kChannelsOfThread, c = group * plan.channels + first;
        const int channels = static_cast<int>(min(int64_t{kChannelsOfThread}, plan.channels - first));
        if (!inside) {  // one copy: with a fourth loop, two blocks fit instead of three
            reassemble_source<K, false, T>(p, n, c, channels, i, j, masks, plan.pairs, output);
        } else if (plan.pairs) {
            reassemble_source<K, true, T>(p, n, c, channels, i, j, masks, true, output);
        } else {
            reassemble_source<K, true, T>(p, n, c, channels, i, j, masks, false, output);
        }
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw(const Problem& p, const Array& output) {
    return not_for_columns_of_up2(p, p.features, output);
}

void reassemble_up2_nchw(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const ReassembleUp2NchwPlan plan(p, output);
        launch(reassemble_up2_nchw_kernel<k, decltype(feature)>, plan.items, kSourcesOfBlock, 0, p, output, plan);
    });
}

}  // namespace carafepp::cuda
