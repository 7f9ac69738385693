// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent channels of 16 bits, on tensor cores. A block has a tile of sources, and a warp
// four neighbouring columns of two rows, with windows of K + 1 rows of at most eight pixels. Once it builds band
// matrices from the staged masks of the outputs. Then it multiplies them by two rows of pixels at once, a slice of
// channels at a time, while the features of the next slice arrive. Rows of pixels serve both rows of sources. A zero of
// the band makes NaN of an infinite feature. Sums that are not finite are computed again, tap by tap.
#include "cuda/up2/mma_up2.h"
#include "cuda/up2/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kColumnsOfWarp = 4, kRowsOfWarp = 2, kWarpsInRow = kColumns / kColumnsOfWarp;
constexpr int kRows = kThreads / 32 / kWarpsInRow * kRowsOfWarp;  // of a tile
constexpr int kBlocks = 2;                                        // of a multiprocessor
constexpr int kPixels = 8;                                        // of a product
constexpr int kWidth = kColumns + 4;                              // columns of a halo
static_assert(kWidth == kColumns - kColumnsOfWarp + kPixels, "a halo has the pixels of all products");
static_assert(kColumnsOfWarp + 5 - 1 <= kPixels, "a product has all pixels of a row of windows");
constexpr int kProducts = kChannelsOfSlice / kWide;       // along channels
constexpr int kSums = kRowsOfWarp * kUp * kProducts * 2;  // of a lane

template <int K, class T>
using Features = Halo<K, kRows, kWidth, kThreads, kWide, T>;
template <int K>
constexpr int kMasks = kRows * kColumns * K * K * kOutputs;

// Eight neighbouring pixels have the same channels in different banks.
__device__ __forceinline__ int swizzle(int column) { return column / 2 % kProducts; }

// In the products of mma.m16n8k16 rows are outputs, the upper ones first, and columns are channels. The sum is over the
// pixels of two rows.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reassemble_up2_nhwc_mma_kernel(Arguments arguments, SharedTiles plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    constexpr int kTaps = K * K;
    float* const masks = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(masks + kMasks<K>);  // two slices of [row][column][channel]
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (TilesOfBlock tiles; tiles.exist(plan);) {
        const int thread = thread_computed_late();
        const int warp = thread / 32, lane = thread % 32;
        const int row = lane / 4, pair = lane % 4, odd = pair % 2;
        const int own_row = warp / kWarpsInRow * kRowsOfWarp, own_column = warp % kWarpsInRow * kColumnsOfWarp;
        const int source = row / kUp;  // of this lane's outputs
        // This lane's row of the matrices of pixels: two rows of pixels, in each of two products along channels.
        const int x = own_column + lane % kPixels, y = own_row + lane / kPixels % 2;
        const int pixel = (y * kWidth + x) * kChannelsOfSlice;
        const int product = lane / (2 * kPixels);
        const TileOfItem tile = tiles.take(p, plan);
        const int i = tile.top + own_row, j = tile.left + own_column;
        Features<K, T> halo(p, tile, swizzle);
        halo.copy(p.features, tile.channels, features);
        stage_sources<K, T>(p, tile.n, tile.group, tile.top, tile.left, kColumns, masks, kRows);
        // The masks of this lane's upper output.
        const float* const weights = masks + (own_row * kColumns + own_column + source) * kTaps * kOutputs + row % kUp;
        uint32_t band[kRowsOfWarp][(K + 1) / 2][2 * kUp];  // of rows of pixels beyond the window 0
#pragma unroll
        for (int s = 0; s < kRowsOfWarp; s++) {
#pragma unroll
            for (int k = 0; k < (K + kRowsOfWarp - 1) * kUp; k++) {
                const int a = k / kUp - s, r = k % kUp;
                band[s][k / (2 * kUp)][k % (2 * kUp)] = a < 0 || a >= K
                                                            ? 0
                                                            : pair_of_band<K, T>(
                                                                  weights + s * kColumns * kTaps * kOutputs + r * kUp,
                                                                  a, 2 * pair - source, scale);
            }
        }
        // A lane stores four channels: two of its own, two of its neighbour. So four lanes fill a sector.
        const int out_j = j * kUp + row, stored = odd * kWide + pair / 2 * 4;
        T* to = element<T>(output, tile.n, tile.c + stored, int64_t{i} * kUp, out_j);
        const int out_rows =  // that exist, of this lane's column
            out_j < p.out_w ? static_cast<int>(min(int64_t{kRowsOfWarp * kUp}, p.out_h - i * kUp)) : 0;
        const bool has_sources = i < p.features.h && j < p.features.w;  // of this warp, if a tile ends behind the image
        bool second = false;                                            // of the slices in shared memory
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            wait_for_copies();
            __syncthreads();
            const T* const pixels = features + second * Features<K, T>::kElements + pixel;
            second = !second;
            if (channels > kChannelsOfSlice) {
                halo.copy(p.features, channels - kChannelsOfSlice, features + second * Features<K, T>::kElements);
            }
            __syncwarp();  // lanes diverge in copies
            if (!has_sources) continue;
            float sums[kRowsOfWarp][kProducts][4] = {};
#pragma unroll
            for (int k = 0; k < (K + 1) / 2; k++) {
#pragma unroll
                for (int q = 0; q < kProducts; q += 2) {
                    uint32_t words[4];  // of two rows in product q, and in the next one
                    load_matrices(pixels + 2 * k * kWidth * kChannelsOfSlice + ((q + product) ^ swizzle(x)) * kWide,
                                  words);
#pragma unroll
                    for (int s = 0; s < kRowsOfWarp; s++) {
                        multiply_add<T>(sums[s][q], band[s][k], {words[0], words[1]});
                        multiply_add<T>(sums[s][q + 1], band[s][k], {words[2], words[3]});
                    }
                }
            }
            uint32_t zeros = 0;  // while all sums are finite
            T* of_row = to;
#pragma unroll
            for (int r = 0; r < kRowsOfWarp * kUp; r++, of_row += output.stride_h) {
#pragma unroll
                for (int q = 0; q < kProducts; q += 2) {
                    uint32_t words[2];
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        const float* const of = sums[r / kUp][q + k] + r % kUp * 2;
                        words[k] = pair_of<T>(of[0] * unscale, of[1] * unscale);
                        add_zeros<T>(words[k], zeros);
                    }
                    const uint32_t others = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
                    if (r < out_rows && q * kWide + stored < channels) {
                        __stcs(reinterpret_cast<uint2*>(of_row + q * kWide),
                               odd ? make_uint2(others, words[1]) : make_uint2(words[0], others));
                    }
                }
            }
            __syncwarp();  // a lane looks at what others have stored
#pragma unroll 1
            for (int number = zeros == 0 ? kSums : 0; number < kSums; number++) {
                const int r = number / (2 * kProducts);
                const int channel = number / 2 % kProducts * kWide + 2 * pair + number % 2;
                if (r >= out_rows || channel >= channels) continue;
                const int64_t c = tile.c + tile.channels - channels + channel;
                T* const at = element<T>(output, tile.n, c, i * int64_t{kUp} + r, out_j);
                if (fabsf(widen(*at)) < INFINITY) continue;
                *at = narrow<T>(output_tap_by_tap<K, T>(p, tile.n, c, i + r / kUp, j + source,
                                                        weights + r / kUp * kColumns * kTaps * kOutputs + r % kUp * kUp,
                                                        kOutputs));
            }
            to += kChannelsOfSlice;
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nhwc_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &output})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    if (const char* reason = tiles_too_many(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up2_nhwc_mma_kernel<5, BFloat16>);
}

void reassemble_up2_nhwc_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const SharedTiles plan = tiles_of_up2(p, kRows, kColumns, kBlocks);
        launch(reassemble_up2_nhwc_mma_kernel<k, T>, plan.blocks, kThreads,
               kMasks<k> * int64_t{sizeof(float)} + 2 * Features<k, T>::kElements * int64_t{sizeof(T)}, p, output,
               plan);
    });
}

}  // namespace carafepp::cuda
