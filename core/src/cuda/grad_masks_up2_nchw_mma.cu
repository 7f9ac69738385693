// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent columns of 16 bits, on tensor cores. A warp has four
// neighbouring sources of two rows, with windows of K + 1 rows of at most eight pixels. It multiplies the gradients of
// the outputs by the pixels, summed over channels. A band of the products is the gradient of masks. The block carries
// it through the normaliser, and adjacent elements leave together by way of shared memory.
#include "cuda/grad_masks_up2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kColumnsOfWarp = 4, kRowsOfWarp = 2;  // sources
constexpr int kColumnsOfBlock = kWarps * kColumnsOfWarp;
constexpr int kChannelsOfStep = 8;  // of a warp at a time
static_assert(kBefore % 2 == 0 && kBefore >= 5 / 2, "loads are of pairs of columns and reach all taps");
static_assert(kBefore + kColumnsOfWarp + 5 / 2 <= 8, "a product has eight pixels");
static_assert(kColumnsOfBlock * kRowsOfWarp == kSourcesOfBlock, "a block has as many sources as there are lines");

struct GradMasksUp2NchwMmaPlan {
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t items;

    GradMasksUp2NchwMmaPlan(const Problem& p, const Array& grad_masks) {
        tile_rows = ceil_div(p.features.h, kRowsOfWarp);
        tiles = ceil_div(p.features.w, kColumnsOfBlock);
        items = grad_masks.n * p.groups * tile_rows * tiles;
    }
};

// The same column, left or right, of two channels that are loaded as words of two.
__device__ __forceinline__ uint32_t left_of(const uint32_t (&words)[2]) { return (words[0] & 0xffff) | words[1] << 16; }
__device__ __forceinline__ uint32_t right_of(const uint32_t (&words)[2]) {
    return words[0] >> 16 | (words[1] & 0xffff0000);
}

// In the products of mma.m16n8k8 rows are outputs, columns are pixels; the sum is over channels. A lane loads channels
// 2 * pair and the next, of outputs and of pixels. It has columns 2 * (row % 4) and the next, in row row / 4 of two.
// Rows of products below 8 are outputs of even columns, the others of odd ones. Pixels of odd columns have their own
// products.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3)
    grad_masks_up2_nchw_mma_kernel(Arguments arguments, GradMasksUp2NchwMmaPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;           // of the shape of masks or logits
    constexpr int kRowPairs = (K + kRowsOfWarp - 1) / 2;  // of pixels
    float* const lines = shared_memory<float>();          // [source][channel of masks]
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, upper = row / 4, column = row % 4;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), tile_row = divide(tile.quotient, plan.tile_rows),
                       image = divide(tile_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int i = static_cast<int>(tile_row.remainder) * kRowsOfWarp,
                  left = static_cast<int>(tile.remainder) * kColumnsOfBlock, j = left + warp * kColumnsOfWarp;
        if (j < p.features.w) {
            float sums[kRowsOfWarp][kRowPairs][2][4] = {};
            if (channels_in_group > 0) {  // or there may be no arrays
                const int x = j - kBefore + 2 * column, y = i - K / 2 + upper;
                const int out_j = (j + column) * kUp, out_i = i * kUp + upper;
                const int64_t c = group * channels_in_group + 2 * pair;
                const T* features = element<const T>(p.features, n, c, y, x);          // [C, H, W]
                const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);  // [C, H', W']
                const auto load = [&](const T* from, const Array& array, bool exists, int64_t channels_left,
                                      uint32_t (&words)[2]) {
                    words[0] = load_word(from, exists && 2 * pair < channels_left);
                    words[1] = load_word(from + array.stride_c, exists && 2 * pair + 1 < channels_left);
                };
#pragma unroll 1
                for (int64_t channels = channels_in_group; channels > 0; channels -= kChannelsOfStep) {
                    uint32_t of_outputs[kRowsOfWarp][2];
#pragma unroll
                    for (int s = 0; s < kRowsOfWarp; s++) {
                        uint32_t words[2];
                        load(grads + s * kUp * p.grad_output.stride_h, p.grad_output,
                             out_i + s * kUp < p.out_h && out_j < p.out_w, channels, words);
                        of_outputs[s][0] = left_of(words);
                        of_outputs[s][1] = right_of(words);
                    }
                    const T* pixels = features;
#pragma unroll
                    for (int q = 0; q < kRowPairs; q++, pixels += 2 * p.features.stride_h) {
                        uint32_t words[2];
                        load(pixels, p.features,
                             y + 2 * q >= 0 && y + 2 * q < p.features.h && x >= 0 && x < p.features.w, channels, words);
#pragma unroll
                        for (int s = 0; s < kRowsOfWarp; s++) {
                            multiply_add<T>(sums[s][q][0], of_outputs[s], left_of(words));
                            multiply_add<T>(sums[s][q][1], of_outputs[s], right_of(words));
                        }
                    }
                    features += kChannelsOfStep * p.features.stride_c;
                    grads += kChannelsOfStep * p.grad_output.stride_c;
                }
            }
            // A lane has products of outputs 2 * upper and the next of source `column`, with row pair / 2 of pixels.
            const int step = Lines<K>::index(p, 1, 0), first_b = pair % 2 * 4 - kBefore + K / 2 - column;
#pragma unroll
            for (int s = 0; s < kRowsOfWarp; s++) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    float* const line = lines +
                                        (s * kColumnsOfBlock + warp * kColumnsOfWarp + column) * Lines<K>::kSize +
                                        Lines<K>::index(p, 0, upper * kUp + k / 2);
#pragma unroll
                    for (int q = 0; q < kRowPairs; q++) {
#pragma unroll
                        for (int odd = 0; odd < 2; odd++) {
                            const int a = 2 * q + pair / 2 - s, b = first_b + 2 * (k % 2) + odd;
                            if (a >= 0 && a < K && b >= 0 && b < K) line[(a * K + b) * step] = sums[s][q][odd][k];
                        }
                    }
                }
            }
        }
        finish_lines<K, kColumnsOfBlock, T>(p, n, group, i, left, lines, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nchw_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &p.grad_output})) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_up2_nchw_mma_kernel<5, BFloat16>);
}

void grad_masks_up2_nchw_mma(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const GradMasksUp2NchwMmaPlan plan(p, grad_masks);
        launch(grad_masks_up2_nchw_mma_kernel<k, decltype(feature)>, plan.items, kBlock,
               kSourcesOfBlock * Lines<k>::kSize * int64_t{sizeof(float)}, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
