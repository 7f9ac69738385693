// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns of 16 bits, on tensor cores. A block has a tile of sources, and a warp
// half a row of it, with windows of K rows of twelve pixels. Once it builds band matrices from the staged masks: of the
// even sources, and of the odd ones. Then it multiplies each row of pixels by them, 16 channels at a time, while the
// features of the next slice of channels arrive. So a lane has the outputs of two neighbouring sources, and stores four
// columns. A zero of the band makes NaN of an infinite feature. Sums that are not finite are computed again, tap by
// tap.
#include "cuda/up2/mma_up2.h"
#include "cuda/up2/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kColumnsOfWarp = 8, kColumnsOfTile = 16, kWarpsInRow = kColumnsOfTile / kColumnsOfWarp;
constexpr int kRows = kThreads / 32 / kWarpsInRow;  // of a tile
constexpr int kSourcesOfLane = 2;                   // neighbours, of two products
constexpr int kChannelsOfMma = 16, kPixelsOfMma = 16;
constexpr int kBefore = 4, kWidth = kBefore + kColumnsOfTile + 4;  // columns of a halo
constexpr int kBlocks = 2;                                         // of a multiprocessor
constexpr int kSums = kSourcesOfLane * kUp * 4;                    // of a lane
static_assert(kColumnsOfWarp == 4 * kSourcesOfLane, "four lanes have the sources of a warp");
static_assert(kWidth == kColumnsOfTile - kColumnsOfWarp + kPixelsOfMma, "a halo has the pixels of all products");
static_assert(kBefore >= 5 / 2 && kBefore + kColumnsOfWarp + 5 / 2 <= kPixelsOfMma, "a product has all windows");

template <int K, class T>
struct Staged {
    // Neighbouring channels are an odd number of vectors apart, so that eight of them are in different banks.
    static constexpr int kHeight = kRows + K - 1, kChannel = (kHeight * kWidth / kWide | 1) * kWide;
    static constexpr int kMasks = kRows * kColumnsOfTile * K * K * kOutputs;
    using Features = HaloOfColumns<kHeight, kWidth, kBefore, kChannel, kThreads, T>;
};

struct ReassembleUp2NchwMmaPlan {
    SharedTiles tiles;
    bool fours;  // features are aligned fours of columns

    explicit ReassembleUp2NchwMmaPlan(const Problem& p)
        : tiles(tiles_of_up2(p, kRows, kColumnsOfTile, kBlocks)), fours(not_for_columns(p.features, 4) == nullptr) {}
};

// In the products of mma.m16n8k16 rows are channels, columns are the outputs of every other source. The sum is over 16
// pixels of a row, of which some are not in any window.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reassemble_up2_nchw_mma_kernel(Arguments arguments, ReassembleUp2NchwMmaPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Staged<K, T>;
    constexpr int kOfSource = K * K * kOutputs;
    float* const staged = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(staged + S::kMasks);  // two slices of [channel][row][column]
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (TilesOfBlock tiles; tiles.exist(plan.tiles);) {
        const int thread = thread_computed_late(), warp = thread / 32, lane = thread % 32;
        const int row = lane / 4, pair = lane % 4;
        const int own_row = warp / kWarpsInRow, own_column = warp % kWarpsInRow * kColumnsOfWarp;
        const TileOfItem tile = tiles.take(p, plan.tiles);
        const int rows = min(kRows, static_cast<int>(p.features.h) - tile.top);  // that exist
        const int i = tile.top + own_row,
                  j = tile.left + own_column + kSourcesOfLane * pair;  // this lane's first source
        typename S::Features halo;
        plan.fours ? halo.template begin<4>(p, tile, K / 2) : halo.template begin<2>(p, tile, K / 2);
        const auto copy = [&](int channels, T* slice) {
            plan.fours ? halo.template copy<4>(p.features, channels, slice)
                       : halo.template copy<2>(p.features, channels, slice);
        };
        copy(tile.channels, features);
        stage_sources<K, T>(p, tile.n, tile.group, tile.top, tile.left, kColumnsOfTile, staged, rows);
        const float* const masks = staged + (own_row * kColumnsOfTile + own_column) * kOfSource;  // of this warp
        uint32_t band[kSourcesOfLane][kUp][K][2];  // to this lane's output of each row
#pragma unroll
        for (int s = 0; s < kSourcesOfLane; s++) {
            const int source = row / kUp * kSourcesOfLane + s;  // of that output
            // The lane's pixels are pairs `first` and first + 8 on in a window, which has only one of them.
            const int first = 2 * pair - source - (kBefore - K / 2);
            const bool upper = first < -1;
#pragma unroll
            for (int r = 0; r < kUp; r++) {
#pragma unroll
                for (int a = 0; a < K; a++) {
                    const uint32_t taps = pair_of_band<K, T>(masks + source * kOfSource + r * kUp + row % kUp, a,
                                                             upper ? first + 8 : first, scale);
                    band[s][r][a][0] = upper ? 0 : taps;
                    band[s][r][a][1] = upper ? taps : 0;
                }
            }
        }
        T* outputs[kUp];  // rows of this lane: [C, H', W']
        outputs[0] = element<T>(output, tile.n, tile.c + row, int64_t{i} * kUp, int64_t{j} * kUp);
        outputs[1] = outputs[0] + output.stride_h;
        const int channels_apart = static_cast<int>(output.stride_c);
        const int out_rows = j * kUp < p.out_w ? static_cast<int>(min(int64_t{kUp}, p.out_h - i * kUp)) : 0;
        const bool has_sources = own_row < rows && tile.left + own_column < p.features.w;  // of this warp
        // This lane's row of the matrices of pixels: eight of a channel.
        const int of_lane = (lane % kPixelsOfMma) * S::kChannel + own_row * kWidth + own_column +
                            lane / kChannelsOfMma * 8;
        bool second = false;  // of the slices in shared memory
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            wait_for_copies();
            __syncthreads();
            const T* pixels = features + second * S::Features::kElements + of_lane;
            second = !second;
            if (channels > kChannelsOfSlice)
                copy(channels - kChannelsOfSlice, features + second * S::Features::kElements);
            __syncwarp();  // lanes diverge in copies
            if (!has_sources) continue;
#pragma unroll 1
            for (int first = 0; first < min(channels, kChannelsOfSlice);
                 first += kChannelsOfMma, pixels += kChannelsOfMma * S::kChannel) {
                float sums[kSourcesOfLane][kUp][4] = {};
#pragma unroll
                for (int a = 0; a < K; a++) {
                    uint32_t words[4];
                    load_matrices<false>(pixels + a * kWidth, words);
#pragma unroll
                    for (int s = 0; s < kSourcesOfLane; s++) {
#pragma unroll
                        for (int r = 0; r < kUp; r++) multiply_add<T>(sums[s][r], words, band[s][r][a]);
                    }
                }
                uint32_t zeros = 0;                        // while all sums are finite
                const int exist = channels - first - row;  // channels from this lane's on
#pragma unroll
                for (int r = 0; r < kUp; r++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t words[kSourcesOfLane];
#pragma unroll
                        for (int s = 0; s < kSourcesOfLane; s++) {
                            const float* const of = sums[s][r] + half * 2;
                            words[s] = pair_of<T>(of[0] * unscale, of[1] * unscale);
                            add_zeros<T>(words[s], zeros);
                        }
                        if (r < out_rows && half * 8 < exist) {
                            __stcs(reinterpret_cast<uint2*>(at_stride(outputs[r], channels_apart, half * 8)),
                                   make_uint2(words[0], words[1]));
                        }
                    }
                    outputs[r] = at_stride(outputs[r], channels_apart, kChannelsOfMma);
                }
#pragma unroll 1
                for (int number = zeros == 0 ? kSums : 0; number < kSums; number++) {
                    const int s = number / 8, r = number / 4 % 2, half = number / 2 % 2, q = number % 2;
                    const int channel = first + half * 8 + row;
                    if (channel >= channels || r >= out_rows) continue;
                    const int64_t c = tile.c + tile.channels - channels + channel;
                    T* const to = element<T>(output, tile.n, c, int64_t{i} * kUp + r, int64_t{j + s} * kUp + q);
                    if (fabsf(widen(*to)) < INFINITY) continue;
                    *to = narrow<T>(output_tap_by_tap<K, T>(
                        p, tile.n, c, i, j + s, masks + (kSourcesOfLane * pair + s) * kOfSource + r * kUp + q,
                        kOutputs));
                }
                __syncwarp();  // all lanes take part in the next products
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &output})) return reason;
    if (not_for_columns(output, 4) != nullptr) return "columns of the output are not aligned fours";
    for (const Array* array : {&p.features, &output}) {
        if (const char* reason = channels_too_far_apart(*array)) return reason;
    }
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    if (const char* reason = tiles_too_many(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up2_nchw_mma_kernel<5, BFloat16>);
}

void reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        using S = Staged<k, T>;
        const ReassembleUp2NchwMmaPlan plan(p);
        launch(reassemble_up2_nchw_mma_kernel<k, T>, plan.tiles.blocks, kThreads,
               S::kMasks * int64_t{sizeof(float)} + 2 * S::Features::kElements * int64_t{sizeof(T)}, p, output, plan);
    });
}

}  // namespace carafepp::cuda
