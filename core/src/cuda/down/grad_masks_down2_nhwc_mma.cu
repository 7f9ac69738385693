// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for down x2 with adjacent channels of 16 bits, on tensor cores. A block has a tile of
// 4 x 14 outputs, and a warp four neighbouring columns of it. It multiplies the pixels of a row of their windows by the
// gradients of the outputs of two rows, summed over channels. A band of the products is the gradient of masks.
#include "cuda/down/grad_masks_down2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

// In the products of mma.m16n8k16 rows are pixels, and columns are outputs. The sum is over channels, in any order:
// each lane has eight adjacent ones, for two products.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3) grad_masks_down2_nhwc_mma_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    using S = SliceOfPixels<K, T>;
    static_assert(kWarps * kColumnsOfWarp >= S::kColumns && S::kChannels == 4 * kWide, "the warps have all outputs");
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        const int thread = thread_computed_late(), row = thread % 32 / 4, channel = thread % 4 * kWide;
        const int first = thread / 32 * kColumnsOfWarp;
        // Nobody needs pixels beyond a row.
        const int output = row / kColumnsOfWarp * S::kColumns + min(first + row % kColumnsOfWarp, S::kColumns - 1);
        const int pixel = min(first * kDown + row, S::kWidth - 1), other = min(first * kDown + row + 8, S::kWidth - 1);
        Band<K> sums = {};
        uint4 outputs[kPairs];
        for_each_slice_of_pixels<K, T>(p, tile, [](int x) { return x; }, [&](const T* grads) {
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
                outputs[pair] = *reinterpret_cast<const uint4*>(
                    grads + (pair * kPair * S::kColumns + output) * S::kChannels + channel);
            }
        }, [&](const T* features) {
#pragma unroll
            for (int y = 0; y < S::kHeight; y++) {
                const T* const of_row = features + y * S::kWidth * S::kChannels + channel;
                const uint4 upper = *reinterpret_cast<const uint4*>(of_row + pixel * S::kChannels),
                            lower = *reinterpret_cast<const uint4*>(of_row + other * S::kChannels);
                add_row<K, T>(y, {upper.x, lower.x, upper.y, lower.y},
                              {{outputs[0].x, outputs[0].y}, {outputs[1].x, outputs[1].y}}, sums);
                add_row<K, T>(y, {upper.z, lower.z, upper.w, lower.w},
                              {{outputs[0].z, outputs[0].w}, {outputs[1].z, outputs[1].w}}, sums);
            }
        });
        float* const staged = shared_memory<float>();
        stage_band<K, S::kColumns, 0>(sums, thread_computed_late() / 32 * kColumnsOfWarp, staged);
        const TileOfItem again(p, plan, computed_late(item));
        finish_tile<K, S::kColumns, kBlock, T>(p, again, plan.columns, staged, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_down2_nhwc_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_grad_masks_down2(p)) return reason;
    if (const char* reason = not_of_16_bits(p)) return reason;
    if (const char* reason = not_for_pixels(p, p.features)) return reason;
    if (const char* reason = not_for_pixels(p, p.grad_output)) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_down2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_masks_down2_nhwc_mma(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using S = SliceOfPixels<k, decltype(feature)>;
        const Tiles plan = tiles_in_all_channels(p, grad_masks, S::kColumns, 1);
        launch(grad_masks_down2_nhwc_mma_kernel<k, decltype(feature)>, plan.items, kBlock, S::kBytes, p, grad_masks,
               plan);
    });
}

}  // namespace carafepp::cuda
