// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns of 16 bits, on tensor cores. A block has a tile of sources, and a warp a
// row of it, with windows of K rows of twelve pixels. Once it builds band matrices from the staged masks: of the even
// sources, and of the odd ones. Then it multiplies each row of pixels by them, 16 channels at a time, while the
// features of the next slice of channels arrive. So a lane has the outputs of two neighbouring sources, and stores four
// columns. A zero of the band makes NaN of an infinite feature. Sums that are not finite are computed again, tap by
// tap.
#include "cuda/mma.h"
#include "cuda/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = kThreads / 32;  // of a tile: of each warp one
constexpr int kSourcesOfLane = 2;     // neighbours, of two products
constexpr int kChannelsOfMma = 16;
constexpr int kSums = kSourcesOfLane * kUp * 4;  // of a lane
static_assert(kColumns == 4 * kSourcesOfLane, "four lanes have the sources of a row");
static_assert(kWidth <= 16 && kBefore >= 5 / 2, "a product has the windows of all sources of a row");

template <int K, class T>
struct Staged {
    // Words of a channel are 4 more than a multiple of 8, so that eight channels are in different banks.
    static constexpr int kPixels = (kRows + K - 1) * kWidth, kChannel = kPixels / 2 % 8 == 4 ? kPixels : kPixels + 8;
    static constexpr int kFeatures = kChannelsOfSlice * kChannel, kMasks = kRows * kColumns * K * K * kOutputs;
    static_assert(kChannel / 2 % 8 == 4);
    using Features = HaloOfColumns<K, kRows, kThreads, kChannel, 2, T>;
};

// In the products of mma.m16n8k16 rows are channels, columns are the outputs of every other source. The sum is over 16
// pixels of a row, of which the last ones are not in any window.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_up2_nchw_mma_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Staged<K, T>;
    constexpr int kOfSource = K * K * kOutputs;
    float* const staged = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(staged + S::kMasks);  // two slices of [channel][row][column]
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), warp = thread / 32, lane = thread % 32;
        const int row = lane / 4, pair = lane % 4;
        const TileOfItem tile(p, plan, item);
        const int i = tile.top + warp, j = tile.left + kSourcesOfLane * pair;  // this lane's first source
        typename S::Features halo(p, tile);
        halo.copy(p.features, tile.channels, features);
        stage_sources<K, T>(p, tile.n, tile.group, tile.top, tile.left, kColumns, staged, kRows);
        clear_staged_outside<K>(p, tile.left, kColumns, staged, kRows);
        const float* const masks = staged + warp * kColumns * kOfSource;  // of this warp's sources
        uint32_t band[kSourcesOfLane][kUp][K][2];                         // to this lane's output of each row
#pragma unroll
        for (int s = 0; s < kSourcesOfLane; s++) {
            const int source = row / kUp * kSourcesOfLane + s;  // of that output
#pragma unroll
            for (int r = 0; r < kUp; r++) {
#pragma unroll
                for (int k = 0; k < 2 * K; k++) {
                    band[s][r][k / 2][k % 2] = pair_of_band<K, T>(
                        masks + source * kOfSource + r * kUp + row % kUp, k / 2,
                        k % 2 * 8 + 2 * pair - source - (kBefore - K / 2), scale);
                }
            }
        }
        T* outputs = element<T>(output, tile.n, tile.c + row, int64_t{i} * kUp, int64_t{j} * kUp);  // [C, H', W']
        const int out_rows = j * kUp < p.out_w ? static_cast<int>(min(int64_t{kUp}, p.out_h - i * kUp)) : 0;
        bool second = false;  // of the slices in shared memory
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            wait_for_copies();
            __syncthreads();
            const T* pixels = features + second * S::kFeatures + row * S::kChannel + warp * kWidth + 2 * pair;
            second = !second;
            if (channels > kChannelsOfSlice)
                halo.copy(p.features, channels - kChannelsOfSlice, features + second * S::kFeatures);
            const int others = min(8, kWidth - 2 - 2 * pair);  // pixels on; any are right where the band is 0
#pragma unroll 1
            for (int first = 0; first < min(channels, kChannelsOfSlice);
                 first += kChannelsOfMma, pixels += kChannelsOfMma * S::kChannel) {
                float sums[kSourcesOfLane][kUp][4] = {};
#pragma unroll
                for (int a = 0; a < K; a++) {
                    uint32_t words[4];
#pragma unroll
                    for (int word = 0; word < 4; word++) {
                        words[word] = *reinterpret_cast<const uint32_t*>(pixels + word % 2 * 8 * S::kChannel +
                                                                         a * kWidth + (word < 2 ? 0 : others));
                    }
#pragma unroll
                    for (int s = 0; s < kSourcesOfLane; s++) {
#pragma unroll
                        for (int r = 0; r < kUp; r++) multiply_add<T>(sums[s][r], words, band[s][r][a]);
                    }
                }
                uint32_t zeros = 0;  // while all sums are finite
#pragma unroll
                for (int r = 0; r < kUp; r++) {
                    const int own_channels = r < out_rows ? channels - first - row : 0;  // that exist
                    T* to = outputs + r * output.stride_h;
#pragma unroll
                    for (int half = 0; half < 2; half++, to += 8 * output.stride_c) {
                        uint32_t words[kSourcesOfLane];
#pragma unroll
                        for (int s = 0; s < kSourcesOfLane; s++) {
                            const float* const of = sums[s][r] + half * 2;
                            words[s] = pair_of<T>(of[0] * unscale, of[1] * unscale);
                            add_zeros<T>(words[s], zeros);
                        }
                        if (half * 8 < own_channels)
                            __stcs(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
                    }
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
                        p, tile.n, c, i, j + s, masks + (kSourcesOfLane * pair + s) * kOfSource + r * kUp + q));
                }
                __syncwarp();  // all lanes take part in the next products
                outputs += kChannelsOfMma * output.stride_c;
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &output})) return reason;
    if (not_for_columns(output, 4) != nullptr) return "columns of the output are not aligned fours";
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up2_nchw_mma_kernel<5, BFloat16>);
}

void reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const Tiles plan = tiles_of_up2(p, kRows);
        launch(reassemble_up2_nchw_mma_kernel<k, T>, plan.items, kThreads,
               Staged<k, T>::kMasks * int64_t{sizeof(float)} + 2 * Staged<k, T>::kFeatures * int64_t{sizeof(T)}, p,
               output, plan);
    });
}

}  // namespace carafepp::cuda
