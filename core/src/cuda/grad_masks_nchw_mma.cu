// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits for up x2 with adjacent columns of 16 bits, on tensor cores. A warp has four
// neighbouring sources of two rows, whose windows together are K + 1 rows of at most eight pixels. It multiplies the
// gradients of the outputs with the features of the pixels, summed over channels: of the products, a band are the
// gradients of masks. Carry those through the normaliser, whose masks are computed anew, and write them out by way of
// shared memory, so that what is adjacent leaves together.
#include "cuda/grad_masks_up2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kStrip = 4, kRows = 2;       // sources of a warp
constexpr int kColumns = kWarps * kStrip;  // of a block
constexpr int kChannels = 8;               // of a warp at a time
constexpr int kBefore = 2;                 // pixels that a strip's patch begins before it: an even number
static_assert(kColumns * kRows == kSources, "a block has as many sources as there are lines");

struct Cut {
    int64_t rows, columns;  // of blocks in an image
};

// The same column, left or right, of two channels that are loaded as words of two.
__device__ __forceinline__ uint32_t left_of(const uint32_t (&words)[2]) { return (words[0] & 0xffff) | words[1] << 16; }
__device__ __forceinline__ uint32_t right_of(const uint32_t (&words)[2]) {
    return words[0] >> 16 | (words[1] & 0xffff0000);
}

// The fragments of PTX's mma.m16n8k8: of the products, rows are outputs, columns pixels, and what is summed over are
// channels. `row` here is lane / 4, `pair` lane % 4: a lane loads channels 2*pair and 2*pair + 1 of row row / 4 of two,
// of outputs as of pixels, and there columns 2*(row % 4) and the next. Outputs of even columns are the rows of products
// up to 8, those of odd columns the others; pixels of odd columns have products of their own.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3) grad_masks_nchw_mma_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;
    constexpr int kRowPairs = (K + kRows - 1) / 2;  // of pixels
    float* const lines = shared_memory<float>();
    float* const logits = lines + kSources * Lines<K>::kSize;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, upper = row / 4, column = row % 4;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = grad_masks.n * p.groups * cut.rows * cut.columns;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient block_column = divide(item, cut.columns), block_row = divide(block_column.quotient, cut.rows),
                       image = divide(block_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int i = static_cast<int>(block_row.remainder) * kRows,
                  left = static_cast<int>(block_column.remainder) * kColumns, j = left + warp * kStrip;
        if (j < p.features.w) {
            float sums[kRows][kRowPairs][2][4] = {};
            if (channels_in_group > 0) {  // or there may be no arrays
                const int x = j - kBefore + 2 * column, y = i - K / 2 + upper;
                const int out_j = (j + column) * kUp, out_i = i * kUp + upper;
                const int64_t c = group * channels_in_group + 2 * pair;
                const T* features = element<const T>(p.features, n, c, y, x);
                const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);
                const auto load = [&](const T* from, const Array& array, bool exists, int64_t channels_left,
                                      uint32_t (&words)[2]) {
                    words[0] = load_word(from, exists && 2 * pair < channels_left);
                    words[1] = load_word(from + array.stride_c, exists && 2 * pair + 1 < channels_left);
                };
#pragma unroll 1
                for (int64_t channels = channels_in_group; channels > 0; channels -= kChannels) {
                    uint32_t of_outputs[kRows][2];
#pragma unroll
                    for (int s = 0; s < kRows; s++) {
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
                        for (int s = 0; s < kRows; s++) {
                            multiply_add<T>(sums[s][q][0], of_outputs[s], left_of(words));
                            multiply_add<T>(sums[s][q][1], of_outputs[s], right_of(words));
                        }
                    }
                    features += kChannels * p.features.stride_c;
                    grads += kChannels * p.grad_output.stride_c;
                }
            }
            // A lane has products of outputs 2*upper and the next of source `column`, with pixels of row pair / 2 of
            // two.
            const int step = Lines<K>::place(p, 1, 0), first_b = pair % 2 * 4 - kBefore + K / 2 - column;
#pragma unroll
            for (int s = 0; s < kRows; s++) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    float* const line = lines + (s * kColumns + warp * kStrip + column) * Lines<K>::kSize +
                                        Lines<K>::place(p, 0, upper * kUp + k / 2);
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
        finish_lines<K, kColumns, kBlock, T>(p, n, group, i, left, lines, logits, grad_masks);
    }
}

template <int K>
void run(const Problem& p, const Array& grad_masks) {
    const Cut cut{ceil_div(p.features.h, kRows), ceil_div(p.features.w, kColumns)};
    with_halves(p, [&](auto feature) {
        launch(grad_masks_nchw_mma_kernel<K, decltype(feature)>, grad_masks.n * p.groups * cut.rows * cut.columns,
               kBlock, 2 * kSources * Lines<K>::kSize * int64_t{sizeof(float)}, p, grad_masks, cut);
    });
}

}  // namespace

const char* cannot_run_grad_masks_nchw_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &p.grad_output})) return reason;
    return p.features.dtype == CARAFEPP_BFLOAT16 ? not_compiled_for_bfloat16(grad_masks_nchw_mma_kernel<5, BFloat16>)
                                                 : nullptr;
}

void grad_masks_nchw_mma(const Problem& p, const Array& grad_masks) {
    p.kernel_size == 3 ? run<3>(p, grad_masks) : run<5>(p, grad_masks);
}

}  // namespace carafepp::cuda
