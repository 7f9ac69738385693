// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns of 16 bits, on tensor cores. A block has a tile of sources, and a warp a
// row of it: two fours, each with windows of K rows of at most eight pixels. Once it builds band matrices from the
// staged masks. Then it multiplies each row of pixels by them, 16 channels at a time, while the features of the next
// slice of channels arrive. Neighbouring channels exchange their sums, so that the warp stores whole sectors. A zero of
// the band makes NaN of an infinite feature. Sums that are not finite are computed again, tap by tap.
#include "cuda/mma.h"
#include "cuda/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = kThreads / 32;                 // of a tile: of each warp one
constexpr int kFour = 4, kFours = kColumns / kFour;  // sources of a product
constexpr int kChannelsOfMma = 16;
constexpr int kSums = kFours * kUp * 4;  // of a lane
static_assert(kBefore + kFour + 5 / 2 <= 8, "a product has eight pixels");

template <int K>
struct Staged {
    // Words of a channel are 4 more than a multiple of 8, so that eight channels are in different banks.
    static constexpr int kPixels = (kRows + K - 1) * kWidth, kChannel = kPixels / 2 % 8 == 4 ? kPixels : kPixels + 8;
    static constexpr int kFeatures = kChannelsOfSlice * kChannel, kMasks = kRows * kColumns * K * K * kOutputs;
    static_assert(kChannel / 2 % 8 == 4);
};

// In the products of mma.m16n8k8 rows are channels, columns are neighbouring outputs; the sum is over pixels.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_up2_nchw_mma_kernel(Arguments arguments, TileUp2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Staged<K>;
    constexpr int kOfSource = K * K * kOutputs;
    float* const staged = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(staged + S::kMasks);  // two slices of [channel][row][column]
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), warp = thread / 32, lane = thread % 32;
        const int row = lane / 4, pair = lane % 4, odd = row % 2;
        const TileOfBlock tile(p, plan, item, kRows);
        const int i = tile.top + warp, j = tile.left;
        const T* from = element<const T>(p.features, tile.n, tile.c, tile.top - K / 2, tile.left - kBefore);
        const auto copy = [&](int channels, T* to) {
            copy_rows<K, kRows, kThreads, 2>(p, from, tile, channels, S::kChannel, to);
            from += kChannelsOfSlice * p.features.stride_c;
        };
        copy(tile.channels, features);
        stage_sources<K, T>(p, tile.n, tile.group, tile.top, tile.left, kColumns, staged, kRows);
        clear_staged_outside<K>(p, tile.left, kColumns, staged, kRows);
        const float* const masks = staged + warp * kColumns * kOfSource;  // of this warp's sources
        uint32_t band[kFours][K][kUp];                                    // to this lane's output of each row
        const int source = row / kUp;                                     // of that output, of four
#pragma unroll
        for (int s = 0; s < kFours; s++) {
#pragma unroll
            for (int a = 0; a < K; a++) {
#pragma unroll
                for (int r = 0; r < kUp; r++) {
                    band[s][a][r] = pair_of_band<K, T>(masks + (s * kFour + source) * kOfSource + r * kUp + row % kUp,
                                                       a, 2 * pair - source - (kBefore - K / 2), scale);
                }
            }
        }
        // A lane stores the outputs of one of the fours in two channels: its own one and its neighbour's.
        const int out_j = (j + odd * kFour + pair) * kUp;
        T* outputs = element<T>(output, tile.n, tile.c + row - odd, int64_t{i} * kUp, out_j);  // [C, H', W']
        bool second = false;  // of the slices in shared memory
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            wait_for_copies();
            __syncthreads();
            const T* pixels = features + second * S::kFeatures + row * S::kChannel + warp * kWidth + 2 * pair;
            second = !second;
            if (channels > kChannelsOfSlice) copy(channels - kChannelsOfSlice, features + second * S::kFeatures);
#pragma unroll 1
            for (int first = 0; first < min(channels, kChannelsOfSlice);
                 first += kChannelsOfMma, pixels += kChannelsOfMma * S::kChannel) {
                float sums[kFours][kUp][4] = {};
#pragma unroll
                for (int a = 0; a < K; a++) {
#pragma unroll
                    for (int s = 0; s < kFours; s++) {
                        const T* const words_at = pixels + a * kWidth + s * kFour;
                        uint32_t words[2];
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            words[half] = *reinterpret_cast<const uint32_t*>(words_at + half * 8 * S::kChannel);
#pragma unroll
                        for (int r = 0; r < kUp; r++) multiply_add<T>(sums[s][r], words, band[s][a][r]);
                    }
                }
                float zero = 0;  // while all sums are finite
#pragma unroll
                for (int r = 0; r < kUp; r++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t words[kFours];
#pragma unroll
                        for (int s = 0; s < kFours; s++) {
                            const float* const of = sums[s][r] + half * 2;
                            words[s] = pair_of<T>(of[0] * unscale, of[1] * unscale);
                            zero += of[0] * 0;
                            zero += of[1] * 0;
                        }
                        const uint32_t others = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 4);
                        if (i * kUp + r >= p.out_h || out_j >= p.out_w) continue;
                        T* const to = outputs + half * 8 * output.stride_c + r * output.stride_h;
                        const int channel = first + half * 8 + row - odd;
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            if (channel + k < channels)
                                store_word(k == odd ? words[k] : others, to + k * output.stride_c);
                        }
                    }
                }
                __syncwarp();  // a lane looks at what others have stored
#pragma unroll 1
                for (int number = zero == 0 ? kSums : 0; number < kSums; number++) {
                    const int s = number / 8, r = number / 4 % 2, half = number / 2 % 2, q = number % 2;
                    const int channel = first + half * 8 + row, column = s * kFour + pair;
                    const int64_t out_row = int64_t{i} * kUp + r, out_column = int64_t{j + column} * kUp + q;
                    if (channel >= channels || out_row >= p.out_h || out_column >= p.out_w) continue;
                    const int64_t c = tile.c + tile.channels - channels + channel;
                    T* const to = element<T>(output, tile.n, c, out_row, out_column);
                    if (fabsf(widen(*to)) < INFINITY) continue;
                    *to = narrow<T>(
                        output_tap_by_tap<K, T>(p, tile.n, c, i, j + column, masks + column * kOfSource + r * kUp + q));
                }
                outputs += kChannelsOfMma * output.stride_c;
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &output})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up2_nchw_mma_kernel<5, BFloat16>);
}

void reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const TileUp2Plan plan(p, kRows);
        launch(reassemble_up2_nchw_mma_kernel<k, decltype(feature)>, plan.items, kThreads,
               Staged<k>::kMasks * int64_t{sizeof(float)} + 2 * Staged<k>::kFeatures * int64_t{sizeof(feature)}, p,
               output, plan);
    });
}

}  // namespace carafepp::cuda
