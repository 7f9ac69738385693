// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent channels of 16 bits, on tensor cores. A block has a tile of
// 8 x 4 sources, and a warp four neighbouring columns of two rows. Their windows have K + 1 rows of at most eight
// pixels. It multiplies the gradients of a row's 16 outputs by each row of pixels, summed over channels. The features
// of the next slice of channels, with their halo, arrive meanwhile. A band of the products is the gradient of masks.
// The block carries it through the normaliser, and adjacent taps leave together by way of shared memory.
#include "cuda/grad_masks_up2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kColumnsOfWarp = 4, kRowsOfWarp = 2, kWarpsInRow = kColumns / kColumnsOfWarp;
static_assert(kWarps / kWarpsInRow * kRowsOfWarp == kRowsOfTile, "the warps have all sources");
static_assert(kColumnsOfWarp + 5 - 1 <= 8 && kWidth == kColumns - kColumnsOfWarp + 8, "a product has eight pixels");

template <int K, class T>
using Features = Halo<K, kRowsOfTile, kWidth, kBlock, kWide, T>;

// In the products of mma.m16n8k8 rows are outputs, the upper ones first, and columns are pixels. The sum is over
// channels, in any order: each lane has eight adjacent ones, for four products.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, 4) grad_masks_up2_nhwc_mma_kernel(Arguments arguments, TileUp2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    using F = Features<K, T>;
    T* const features = shared_memory<T>();                   // two slices of [row][column][channel]
    float* const lines = reinterpret_cast<float*>(features);  // then [source][channel of masks]
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), warp = thread / 32, lane = thread % 32;
        const int row = lane / 4, pair = lane % 4;
        const int own_row = warp / kWarpsInRow * kRowsOfWarp, own_column = warp % kWarpsInRow * kColumnsOfWarp;
        const TileOfBlock tile(p, plan, item, kRowsOfTile);
        float sums[kRowsOfWarp][K][4] = {};
        if (tile.channels > 0) {  // or there may be no arrays
            F halo(p, tile, [](int) { return 0; });
            halo.copy(p.features, tile.channels, features);
            const int out_i = (tile.top + own_row) * kUp, out_j = (tile.left + own_column) * kUp + row;
            const T* grads = element<const T>(p.grad_output, tile.n, tile.c + pair * kWide, out_i, out_j);
            Words next[kRowsOfWarp][kUp];  // of the outputs, a slice ahead
            const auto load_outputs = [&](int channels) {
                const bool exist = pair * kWide < channels && out_j < p.out_w;
#pragma unroll
                for (int r = 0; r < kRowsOfWarp * kUp; r++)
                    next[r / kUp][r % kUp] = load_words(grads + r * p.grad_output.stride_h,
                                                        exist && out_i + r < p.out_h);
                grads += kChannelsOfSlice;
            };
            load_outputs(tile.channels);
            bool second = false;  // of the slices in shared memory
#pragma unroll 1
            for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
                wait_for_copies();
                __syncthreads();
                const T* pixels = features + second * F::kElements +
                                  (own_row * kWidth + own_column + row) * kChannelsOfSlice + pair * kWide;
                second = !second;
                if (channels > kChannelsOfSlice)
                    halo.copy(p.features, channels - kChannelsOfSlice, features + second * F::kElements);
                Words outputs[kRowsOfWarp][kUp];
#pragma unroll
                for (int r = 0; r < kRowsOfWarp * kUp; r++) outputs[r / kUp][r % kUp] = next[r / kUp][r % kUp];
                load_outputs(channels - kChannelsOfSlice);
#pragma unroll
                for (int y = 0; y < K + kRowsOfWarp - 1; y++, pixels += kWidth * kChannelsOfSlice) {
                    const uint4 loaded = *reinterpret_cast<const uint4*>(pixels);
                    const uint32_t of_pixel[] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
                    for (int s = 0; s < kRowsOfWarp; s++) {
                        if (y - s < 0 || y - s >= K) continue;
#pragma unroll
                        for (int word = 0; word < 4; word++) {
                            const uint32_t of_outputs[] = {outputs[s][0].of[word], outputs[s][1].of[word]};
                            multiply_add<T>(sums[s][y - s], of_outputs, of_pixel[word]);
                        }
                    }
                }
            }
        }
        __syncthreads();
        const int source = row / kUp, first_b = 2 * pair - source, step = Lines<K>::index(p, 1, 0);
#pragma unroll
        for (int r = 0; r < kRowsOfWarp * kUp; r++) {
            float* const line = lines + ((own_row + r / kUp) * kColumns + own_column + source) * Lines<K>::kSize +
                                Lines<K>::index(p, first_b, r % kUp * kUp + row % kUp);
#pragma unroll
            for (int a = 0; a < K; a++) {
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const int b = first_b + q;
                    if (b >= 0 && b < K) line[(a * K + q) * step] = sums[r / kUp][a][r % kUp * 2 + q];
                }
            }
        }
        finish_lines<K, kColumns, T>(p, tile.n, tile.group, tile.top, tile.left, lines, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nhwc_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &p.grad_output})) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_up2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_masks_up2_nhwc_mma(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const TileUp2Plan plan(p, kRowsOfTile, 0);
        launch(grad_masks_up2_nhwc_mma_kernel<k, T>, plan.items, kBlock,
               bytes_of_stages_or_lines<k>(Features<k, T>::kElements * int64_t{sizeof(T)}), p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
