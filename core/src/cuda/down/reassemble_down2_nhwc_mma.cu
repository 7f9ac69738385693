// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent channels of 16 bits, on tensor cores. A block has a tile of 8 x 8 outputs, and
// a warp two neighbouring columns of it, with windows of at most eight pixels in a row. Once it builds band matrices
// from the staged masks. Then it multiplies them by two rows of pixels at once, a slice of channels at a time, while
// the features of the next slice arrive. A zero of the band makes NaN of an infinite feature. Sums that are not finite
// are computed again, tap by tap.
#include "cuda/down/tile_down2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = 8, kColumns = 8;  // outputs of a tile
constexpr int kColumnsOfWarp = 2, kOfWarp = kRows * kColumnsOfWarp;
constexpr int kBlock = 32 * kColumns / kColumnsOfWarp;  // threads
constexpr int kPixels = 8;                              // of a row in a product
static_assert(kDown * (kColumnsOfWarp - 1) + 5 <= kPixels, "a product has all pixels of a row of windows");

template <int K, class T>
struct Staged {
    static constexpr int kChannels = kChannelsOfPixel<T>, kProducts = kChannels / kWide;
    static constexpr int kHeight = kDown * (kRows - 1) + K, kSteps = (kHeight + 1) / 2;
    static constexpr int kWidth = kDown * (kColumns - kColumnsOfWarp) + kPixels;
    static constexpr int kCount = kHeight * kWidth, kFeatures = kCount * kChannels;
    using MasksOfTile = Masks<K, kRows, kColumns, kRows * kColumns + 4>;  // a lane's taps begin in other banks
    static constexpr int64_t kBytes = MasksOfTile::kElements * int64_t{sizeof(float)} +
                                      2 * kFeatures * int64_t{sizeof(T)} + kCount * int64_t{sizeof(int)};
    static_assert(kProducts == 4, "four lanes store a slice of an output");
};

// The place of an output's masks.
__device__ __forceinline__ int place(int row, int column) { return column * kRows + row; }

// In the products of mma.m16n8k16 rows are outputs, those of the left column first, and columns are channels. The sum
// is over the pixels of two rows.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, 4) reassemble_down2_nhwc_mma_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Staged<K, T>;
    using M = typename S::MasksOfTile;
    float* const masks = shared_memory<float>();                     // [tap][output]
    T* const features = reinterpret_cast<T*>(masks + M::kElements);  // two slices of [pixel][channel]
    int* const places = reinterpret_cast<int*>(features + 2 * S::kFeatures);
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        find_pixels<S::kCount, kBlock, T>(p.features, [&](int q) {
            return make_int2(tile.top * kDown - K / 2 + q / S::kWidth, tile.left * kDown - K / 2 + q % S::kWidth);
        }, places);
        __syncthreads();
        const T* from = element<const T>(p.features, tile.n, tile.c, 0, 0);
        copy_pixels<S::kCount, kBlock, T, true>(from, places, tile.channels, features);
        M::template stage<kBlock, T>(p, tile.n, tile.group, tile.top, tile.left, masks, place);
        M::template clear_outside<kBlock>(p, tile.top, tile.left, masks, place);

        const int thread = thread_computed_late(), lane = thread % 32, row = lane / 4, pair = lane % 4;
        const int own_column = thread / 32 * kColumnsOfWarp;
        uint32_t window[(K + 1) / 2][4] = {};  // the steps of the windows of this lane's outputs
#pragma unroll
        for (int k = 0; k < K * kColumnsOfWarp; k++) {
            const int a = k / kColumnsOfWarp, s = k % kColumnsOfWarp, b = 2 * pair - kDown * s;
            const float* const weights = masks + a * K * M::kApart + place(row, own_column + s);
            const auto weight = [&](int tap) { return tap >= 0 && tap < K ? scale * weights[tap * M::kApart] : 0.0f; };
            window[a / 2][a % 2 * 2 + s] = pair_of<T>(weight(b), weight(b + 1));
        }
        uint32_t band[S::kSteps][4];
#pragma unroll
        for (int k = 0; k < S::kSteps * 4; k++) {
            uint32_t taps = 0;
#pragma unroll
            for (int step = 0; step < (K + 1) / 2; step++) taps = k / 4 == row + step ? window[step][k % 4] : taps;
            band[k / 4][k % 4] = taps;
        }

        // This lane's row of the matrices of pixels: two rows of pixels, in each of two products along channels. Below
        // the halo it is above instead, where the band is 0 too.
        const int y = lane / kPixels % 2, pixel = y * S::kWidth + own_column * kDown + lane % kPixels;
        const int own_pixel = pixel * S::kChannels, above = S::kHeight % 2 * y * S::kWidth * S::kChannels;
        const int own_vector = swizzled(pixel, lane / (2 * kPixels)) * kWide;
        const int out_i = tile.top + row, out_j = tile.left + own_column;
        T* to = element<T>(output, tile.n, tile.c + pair * kWide, out_i, out_j);
        const int columns = out_i < p.out_h ? static_cast<int>(min(p.out_w - out_j, int64_t{kColumnsOfWarp})) : 0;
        bool second = false;  // of the slices in shared memory
        uint32_t zeros = 0;   // while all sums are finite
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= S::kChannels, to += S::kChannels) {
            wait_for_copies();
            __syncthreads();
            const T* const pixels = features + second * S::kFeatures + own_pixel;
            second = !second;
            from += S::kChannels;
            copy_pixels<S::kCount, kBlock, T, true>(from, places, channels - S::kChannels,
                                                    features + second * S::kFeatures);
            float sums[S::kProducts][4] = {};
#pragma unroll
            for (int step = 0; step < S::kSteps; step++) {
                const T* const rows = pixels + step * 2 * S::kWidth * S::kChannels -
                                      (step == S::kSteps - 1 ? above : 0);
#pragma unroll
                for (int q = 0; q < S::kProducts; q += 2) {
                    uint32_t words[4];  // of two rows in product q, and in the next one
                    load_matrices(rows + (own_vector ^ q * kWide), words);
                    multiply_add<T>(sums[q], band[step], {words[0], words[1]});
                    multiply_add<T>(sums[q + 1], band[step], {words[2], words[3]});
                }
            }
#pragma unroll
            for (int s = 0; s < kColumnsOfWarp; s++) {
                uint32_t words[S::kProducts];
#pragma unroll
                for (int q = 0; q < S::kProducts; q++) {
                    words[q] = pair_of<T>(sums[q][s * 2] * unscale, sums[q][s * 2 + 1] * unscale);
                    add_zeros<T>(words[q], zeros);
                }
                const uint4 vector = transpose_words(words, lane);
                if (s < columns && pair * kWide < channels)
                    __stcs(reinterpret_cast<uint4*>(to + s * output.stride_w), vector);
            }
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) zeros |= __shfl_xor_sync(0xffffffffu, zeros, distance);
        if (zeros != 0) {
            __syncwarp();  // a lane looks at what others have stored
#pragma unroll 1
            for (int number = lane; number < kOfWarp * tile.channels; number += 32) {
                const int column = own_column + number / kRows % kColumnsOfWarp, i = tile.top + number % kRows,
                          j = tile.left + column;
                if (i >= p.out_h || j >= p.out_w) continue;
                const int64_t c = tile.c + number / kOfWarp;
                T* const at = element<T>(output, tile.n, c, i, j);
                if (fabsf(widen(*at)) < INFINITY) continue;
                *at = narrow<T>(output_tap_by_tap<K, T>(p, tile.n, c, int64_t{i} * kDown, int64_t{j} * kDown,
                                                        masks + place(number % kRows, column), M::kApart));
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nhwc_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_of_16_bits(p)) return reason;
    if (const char* reason = not_for_pixels(p, p.features)) return reason;
    if (const char* reason = not_for_vectors(p, output, kWide)) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_down2_nhwc_mma_kernel<5, BFloat16>);
}

void reassemble_down2_nhwc_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using S = Staged<k, decltype(feature)>;
        const Tiles plan(p, p.out_h, p.out_w, kRows, kColumns, S::kChannels, kEnoughItems);
        launch(reassemble_down2_nhwc_mma_kernel<k, decltype(feature)>, plan.items, kBlock, S::kBytes, p, output, plan);
    });
}

}  // namespace carafepp::cuda
