// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent columns of 16 bits, on tensor cores. A block has a tile of two halves of 8 x 16
// outputs, beside each other or, on narrow maps, one below the other. A warp has two rows of a half. It builds band
// matrices from the staged masks, which stay in registers through all channels. Then features take the place of masks,
// a slice of channels at a time. A zero of the band makes NaN of an infinite feature. Sums that are not finite are
// computed again, tap by tap.
#include "cuda/down/tile_down2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kBlock = 256;              // threads
constexpr int kRows = 8, kColumns = 16;  // outputs of a half
constexpr int kHalves = 2, kThreadsOfHalf = kBlock / kHalves;
constexpr int kRowsOfWarp = 2, kWarpsOfHalf = kRows / kRowsOfWarp;
constexpr int kOfProduct = 8, kProducts = kColumns / kOfProduct;  // outputs of a product, and products of a row
constexpr int kChannels = 16;                                     // of a product, and of a slice
constexpr int64_t kEnoughItemsOfTwo = 512;                        // where a multiprocessor has two blocks
constexpr int kPixels = 24;                                       // that a row of a product's windows begins with
static_assert(kRowsOfWarp == 2 && kThreadsOfHalf / 32 == kWarpsOfHalf, "the warps have all outputs");
static_assert(kBefore + kDown * (kOfProduct - 1) + 5 / 2 < kPixels, "a product has all pixels of a row of windows");

// A half has masks, and the features of a slice as [channel][row][column]. Neighbouring channels begin in other banks.
template <int K>
struct Half {
    using MasksOfHalf = Masks<K, kRows, kColumns, kRows * kColumns + 4>;  // taps begin in other banks, too
    static constexpr int kHeight = kDown * (kRows - 1) + K, kWidth = kBefore + kDown * kColumns + 4;
    static constexpr int kChannel = kHeight * kWidth, kFeatures = kChannels * kChannel;
    static_assert(kWidth % kWide == 0 && kChannel / kWide % 2 == 1, "vectors of eight channels are in different banks");
    // The last matrices end eight pixels behind a row.
    static constexpr int64_t kBytes = std::max(kHalves * MasksOfHalf::kElements * int64_t{sizeof(float)},
                                               (kHalves * kFeatures + kWide) * int64_t{sizeof(uint16_t)});
};

struct ReassembleDown2NchwMmaPlan {
    bool tall;  // the halves are below each other
    Tiles tiles;
    bool fours;  // columns of features are copied four at once, or else two
    int stored;  // columns of outputs at once: 4, 2 or 1

    ReassembleDown2NchwMmaPlan(const Problem& p, const Array& output)
        : tall(p.out_w <= kColumns),
          tiles(p, p.out_h, p.out_w, tall ? kHalves * kRows : kRows,
                even_columns(p.out_w, tall ? kColumns : kHalves * kColumns, 4), kChannels, kEnoughItemsOfTwo),
          fours(not_for_columns(p.features, 4) == nullptr),
          stored(columns_at_once(output)) {}
};

// The place of an output's masks.
__device__ __forceinline__ int place(int row, int column) { return row * kColumns + column; }

// A half of a tile, and a warp's rows of it.
struct Share {
    int half, top, left;  // in the tile
    int row;              // the warp's first one of the half

    __device__ __forceinline__ explicit Share(const ReassembleDown2NchwMmaPlan& plan) {
        const int thread = thread_computed_late();
        half = thread / kThreadsOfHalf;
        top = half * (plan.tall ? kRows : 0);
        left = half * (plan.tall ? 0 : kColumns);
        row = thread / 32 % kWarpsOfHalf * kRowsOfWarp;
    }
};

// A thread's copies of each slice of a half: some columns of some rows in all channels.
template <int K, class T>
struct CopyOfSlice {
    using H = Half<K>;
    template <int Count>
    static constexpr int kRowsAtOnce = kThreadsOfHalf / (H::kWidth / Count);

    const T* from;   // in the first row
    uint32_t exist;  // of each row whether it does, as bits, and a 1 behind them

    // Nobody needs columns from column `end` of the half on.
    __device__ __forceinline__ CopyOfSlice(const Problem& p, bool fours, const TileOfItem& tile, const Share& own,
                                           int end) {
        const int thread = thread_computed_late() % kThreadsOfHalf, count = fours ? 4 : 2;
        const int lanes = H::kWidth / count, at_once = fours ? kRowsAtOnce<4> : kRowsAtOnce<2>;
        const int first = thread / lanes, x = thread % lanes * count;
        const int i = (tile.top + own.top) * kDown - K / 2, j = (tile.left + own.left) * kDown - kBefore + x;
        from = element<const T>(p.features, tile.n, tile.c, i + first, j);
        const bool in_row = j >= 0 && j < p.features.w && x < end;
        exist = 1;
        if (first >= at_once) return;
        for (int y = first + (H::kHeight - 1 - first) / at_once * at_once; y >= first; y -= at_once)
            exist = exist << 1 | static_cast<uint32_t>(in_row && i + y >= 0 && i + y < p.features.h);
    }

    // Copies the next slice, of which `channels` channels exist; 0 beyond the borders.
    template <int Count>
    __device__ __forceinline__ void copy(const Array& array, int channels, T* staged) {
        const int thread = thread_computed_late(), lanes = H::kWidth / Count;
        staged += thread / kThreadsOfHalf * H::kFeatures + thread % kThreadsOfHalf / lanes * H::kWidth +
                  thread % kThreadsOfHalf % lanes * Count;
        const T* row = from;
        from += kChannels * array.stride_c;
#pragma unroll 1
        for (uint32_t rows = exist; rows > 1; rows >>= 1) {
            const bool exists = (rows & 1) != 0;
            const T* columns = row;
            if (channels >= kChannels) {
#pragma unroll
                for (int q = 0; q < kChannels; q++, columns += array.stride_c)
                    copy_columns<Count>(staged + q * H::kChannel, columns, exists);
            } else {
#pragma unroll 1
                for (int q = 0; q < channels; q++, columns += array.stride_c)
                    copy_columns<Count>(staged + q * H::kChannel, columns, exists);
            }
            row += kRowsAtOnce<Count> * array.stride_h;
            staged += kRowsAtOnce<Count> * H::kWidth;
        }
    }
};

// Four neighbouring outputs, of which `there` exist, one at least; `at_once` are stored in an access.
template <class T>
__device__ __forceinline__ void store_four(uint2 words, int there, int at_once, T* to) {
    if (at_once == 4) {
        __stcs(reinterpret_cast<uint2*>(to), words);
    } else if (at_once == 2) {
        store_word(words.x, to);
        if (there > 2) store_word(words.y, to + 2);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k < there) to[k] = T{static_cast<uint16_t>((k < 2 ? words.x : words.y) >> k % 2 * 16)};
        }
    }
}

// Computes the outputs of a warp that are not finite again, tap by tap.
template <int K, class T>
__device__ __forceinline__ void repair_outputs(const Problem& p, const Array& output,
                                               const ReassembleDown2NchwMmaPlan& plan, int64_t item) {
    const TileOfItem tile(p, plan.tiles, item);
    const Share own(plan);
#pragma unroll 1
    for (int number = thread_computed_late() % 32; number < kRowsOfWarp * kColumns * tile.channels; number += 32) {
        const int x = own.left + number % kColumns;
        const Pixel at{tile.top + own.top + own.row + number / kColumns % kRowsOfWarp, tile.left + x};
        if (x >= plan.tiles.columns || at.i >= p.out_h || at.j >= p.out_w) continue;
        const int64_t c = tile.c + number / (kRowsOfWarp * kColumns);
        T* const stored = element<T>(output, tile.n, c, at.i, at.j);
        if (fabsf(widen(*stored)) < INFINITY) continue;
        float sum = 0;
#pragma unroll 1
        for (int t = 0; t < K * K; t++) {
            const int64_t i = at.i * kDown + t / K - K / 2, j = at.j * kDown + t % K - K / 2;
            if (i < 0 || i >= p.features.h || j < 0 || j >= p.features.w) continue;
            sum += mask_of<T>(p, tile.n, tile.group, t, at) * widen(*element<const T>(p.features, tile.n, c, i, j));
        }
        *stored = narrow<T>(sum);
    }
}

// In the products of mma.m16n8k16 and mma.m16n8k8 rows are channels, and columns are outputs of a row. The sum is over
// 24 pixels of a row.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, 2)
    reassemble_down2_nchw_mma_kernel(Arguments arguments, ReassembleDown2NchwMmaPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using H = Half<K>;
    using M = typename H::MasksOfHalf;
    T* const features = shared_memory<T>();  // of each half, in the place of masks
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const Share own(plan);
        const int lane = thread_computed_late() % 32, row = lane / 4, pair = lane % 4;
        float* const masks = shared_memory<float>() + own.half * M::kElements;  // of this half: [tap][row][column]
        const int top = tile.top + own.top, left = tile.left + own.left;
        M::template stage<kThreadsOfHalf, T>(p, tile.n, tile.group, top, left, masks, place);
        M::template clear_outside<kThreadsOfHalf>(p, top, left, masks, place);
        // A column of the band is not 0 in three pairs of pixels at most. This lane has one of them, in word `word`.
        const int distance = pair - row - kBefore / 2 + 1,
                  word = distance >= 0    ? 0
                         : distance >= -4 ? 1
                                          : 2,
                  first_tap = (distance + 4 * word) * 2 - 2 + K / 2;
        uint32_t band[kRowsOfWarp][kProducts][K][3];
#pragma unroll
        for (int k = 0; k < kRowsOfWarp * kProducts * K; k++) {
            const int r = k / (kProducts * K), s = k / K % kProducts, a = k % K;
            const float* const weights = masks + a * K * M::kApart + place(own.row + r, s * kOfProduct + row);
            const auto weight = [&](int b) { return b >= 0 && b < K ? scale * weights[b * M::kApart] : 0.0f; };
            const uint32_t taps = pair_of<T>(weight(first_tap), weight(first_tap + 1));
#pragma unroll
            for (int w = 0; w < 3; w++) band[r][s][a][w] = w == word ? taps : 0;
        }

        const int columns_of_half = min(kColumns, plan.tiles.columns - own.left);
        CopyOfSlice<K, T> slice(p, plan.fours, tile, own, kBefore + kDown * columns_of_half + 4);
        // This lane's row of the matrices of pixels: 16 channels, in each of two times 8 pixels.
        const T* const own_features = features + own.half * H::kFeatures + lane % kChannels * H::kChannel +
                                      own.row * kDown * H::kWidth + lane / kChannels * 8;
        // A lane stores four columns: two of its own, two of its neighbour.
        const int column = pair % 2 * kOfProduct + pair / 2 * 4;
        const int out_i = top + own.row, out_j = left + column;
        const bool lower_exists = out_i + 1 < p.out_h;  // of the two rows
        const int columns = out_i < p.out_h ? static_cast<int>(min(p.out_w - out_j, int64_t{columns_of_half - column}))
                                            : 0;
        T* to = element<T>(output, tile.n, tile.c + row, out_i, out_j);  // [C, H', W']
        bool finite = true;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            __syncthreads();
            if (plan.fours) {
                slice.template copy<4>(p.features, channels, features);
            } else {
                slice.template copy<2>(p.features, channels, features);
            }
            wait_for_copies();
            __syncthreads();
            float sums[kRowsOfWarp][kProducts][4] = {};
#pragma unroll
            for (int y = 0; y < K + kDown * (kRowsOfWarp - 1); y++) {
                uint32_t words[2][4];  // of sixteen pixels, and of the next ones
                load_matrices<false>(own_features + y * H::kWidth, words[0]);
#pragma unroll
                for (int s = 0; s < kProducts; s++) {
                    load_matrices<false>(own_features + y * H::kWidth + (s + 1) * kOfProduct * kDown, words[1 - s % 2]);
#pragma unroll
                    for (int r = 0; r < kRowsOfWarp; r++) {
                        const int a = y - kDown * r;
                        if (a < 0 || a >= K) continue;
                        const uint32_t (&taps)[3] = band[r][s][a];
                        multiply_add<T>(sums[r][s], words[s % 2], {taps[0], taps[1]});
                        multiply_add<T>(sums[r][s], {words[1 - s % 2][0], words[1 - s % 2][1]}, taps[2]);
                    }
                }
            }
            uint32_t zeros = 0;  // while all sums are finite
            const int own_lane = thread_computed_late() % 32;
#pragma unroll
            for (int k = 0; k < kRowsOfWarp * 2; k++) {
                const int r = k / 2, lower = k % 2 * 8;  // channels
                const bool exist = columns > 0 && (r == 0 || lower_exists) && own_lane / 4 + lower < channels;
                uint32_t words[kProducts];
#pragma unroll
                for (int s = 0; s < kProducts; s++) {
                    const float* const of = sums[r][s] + k % 2 * 2;
                    words[s] = pair_of<T>(of[0] * unscale, of[1] * unscale);
                    if (exist) add_zeros<T>(words[s], zeros);
                }
                const uint32_t others = __shfl_xor_sync(0xffffffffu, own_lane % 2 ? words[0] : words[1], 1);
                if (exist) {
                    store_four(own_lane % 2 ? make_uint2(others, words[1]) : make_uint2(words[0], others), columns,
                               plan.stored, to + r * output.stride_h + lower * output.stride_c);
                }
            }
            to += kChannels * output.stride_c;
            finite = finite && zeros == 0;
        }
        if (__any_sync(0xffffffffu, !finite)) {
            __syncwarp();  // a lane looks at what others have stored
            repair_outputs<K, T>(p, output, plan, computed_late(item));
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_of_16_bits(p)) return reason;
    if (!output.empty() && output.stride_w != 1) return "columns are not adjacent";
    if (const char* reason = not_for_columns(p.features)) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_down2_nchw_mma_kernel<5, BFloat16>);
}

void reassemble_down2_nchw_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const ReassembleDown2NchwMmaPlan plan(p, output);
        launch(reassemble_down2_nchw_mma_kernel<k, decltype(feature)>, plan.tiles.items, kBlock, Half<k>::kBytes, p,
               output, plan);
    });
}

}  // namespace carafepp::cuda
