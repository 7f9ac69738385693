// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent channels of 16 bits, on tensor cores. A warp has four
// neighbouring sources of a row, with windows of K rows of at most eight pixels. It multiplies the gradients of the 16
// outputs by each row of pixels, summed over channels. A band of the products is the gradient of masks. The block
// carries it through the normaliser, and adjacent taps leave together by way of shared memory.
#include "cuda/grad_masks_up2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kSourcesOfWarp = 4;
static_assert(kSourcesOfWarp + 5 - 1 <= 8, "a product has eight pixels");
constexpr int kChannelsOfStep = 32;  // of a warp at a time
static_assert(kThreads / 32 * kSourcesOfWarp == kSourcesOfBlock, "a block has as many sources as there are lines");

// Blocks on a multiprocessor: before sm_80 a second one would cost registers that are needed. The emulation has none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
[[maybe_unused]] constexpr int kBlocks = 1;
#else
[[maybe_unused]] constexpr int kBlocks = 2;
#endif

// In the products of mma.m16n8k8 rows are outputs, the upper ones first, and columns are pixels. The sum is
// over channels, in any order: each lane has eight adjacent ones, for four products.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    grad_masks_up2_nhwc_mma_kernel(Arguments arguments, TilePlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;   // of the shape of masks or logits
    float* const lines = shared_memory<float>();  // [source][channel of masks]
    float* const logits = lines + kSourcesOfBlock * Lines<K>::kSize;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4;
    const int64_t channels_in_group = p.features.c / p.groups;
    // plan.items once more: read from the plan, it spills registers.
    const int64_t items = grad_masks.n * p.groups * p.features.h * plan.tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), source_row = divide(tile.quotient, p.features.h),
                       image = divide(source_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int i = static_cast<int>(source_row.remainder),
                  first = static_cast<int>(tile.remainder) * kSourcesOfBlock, j = first + warp * kSourcesOfWarp;
        if (j < p.features.w) {
            const int x = j + row - K / 2, out_j = j * kUp + row;
            const bool pixel_exists = row < kSourcesOfWarp + K - 1 && x >= 0 && x < p.features.w;
            float sums[K][4] = {};
            if (channels_in_group > 0) {  // or there may be no arrays
                const int64_t c = group * channels_in_group + pair * kWide;
                const T* features = element<const T>(p.features, n, c, i - K / 2, x);    // [H, W, C]
                const T* grads = element<const T>(p.grad_output, n, c, i * kUp, out_j);  // [H', W', C]
#pragma unroll 1
                for (int64_t left = channels_in_group; left > 0; left -= kChannelsOfStep) {
                    const bool exist = pair * kWide < left, upper = exist && out_j < p.out_w && i * kUp < p.out_h;
                    const bool lower = upper && i * kUp + 1 < p.out_h;
                    const Words of_rows[] = {load_words(grads, upper),
                                             load_words(grads + p.grad_output.stride_h, lower)};
                    const T* pixel = features;
#pragma unroll
                    for (int a = 0; a < K; a++, pixel += p.features.stride_h) {
                        const int y = i + a - K / 2;
                        if (y < 0 || y >= p.features.h) continue;
                        const Words of_pixel = load_words(pixel, exist && pixel_exists);
#pragma unroll
                        for (int word = 0; word < 4; word++) {
                            const uint32_t of_outputs[] = {of_rows[0].of[word], of_rows[1].of[word]};
                            multiply_add<T>(sums[a], of_outputs, of_pixel.of[word]);
                        }
                    }
                    features += kChannelsOfStep;
                    grads += kChannelsOfStep;
                }
            }
            const int source = row / kUp, first_b = 2 * pair - source, step = Lines<K>::index(p, 1, 0);
#pragma unroll
            for (int half = 0; half < kUp; half++) {  // rows of outputs
                float* const line = lines + (warp * kSourcesOfWarp + source) * Lines<K>::kSize +
                                    Lines<K>::index(p, first_b, half * kUp + row % kUp);
#pragma unroll
                for (int a = 0; a < K; a++) {
#pragma unroll
                    for (int q = 0; q < 2; q++) {
                        const int b = first_b + q;
                        if (b >= 0 && b < K) line[(a * K + q) * step] = sums[a][2 * half + q];
                    }
                }
            }
        }
        finish_lines<K, kSourcesOfBlock, kThreads, T>(p, n, group, i, first, lines, logits, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nhwc_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &p.grad_output})) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_up2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_masks_up2_nhwc_mma(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const int64_t tiles = ceil_div(p.features.w, kSourcesOfBlock);  // of a row
        const TilePlan plan{tiles, grad_masks.n * p.groups * p.features.h * tiles};
        launch(grad_masks_up2_nhwc_mma_kernel<k, decltype(feature)>, plan.items, kThreads,
               2 * kSourcesOfBlock * Lines<k>::kSize * int64_t{sizeof(float)}, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
