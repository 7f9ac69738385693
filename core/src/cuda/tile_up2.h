// SPDX-License-Identifier: Apache-2.0
// Tiles of sources for up x2. A block stages the masks of a tile once. It goes through the channels a slice at a time,
// and copies each slice's features with their halo into shared memory.
#pragma once

#include "cuda/stage_masks_up2.h"
#include "cuda/tiles.h"

namespace carafepp::cuda {

constexpr int kColumns = 8;  // of a tile
constexpr int kChannelsOfSlice = 32;
constexpr int kSlots = 16;             // threads along the columns of a halo
constexpr int64_t kEnoughItems = 384;  // that keep all multiprocessors busy

// The tiles of `rows` rows of a problem.
inline Tiles tiles_of_up2(const Problem& p, int rows) {
    return Tiles(p, p.features.h, p.features.w, rows, kColumns, kChannelsOfSlice, kEnoughItems);
}

// ---- with adjacent channels ----

// The features of a tile of `Rows` rows with their halo, `Width` columns of them, in shared
// memory: [row][column][channel] of a slice. A thread copies `Vector` channels of some pixels of a column. Their place
// among the channels of a pixel is xor `swizzle(column)` vectors.
template <int K, int Rows, int Width, int Threads, int Vector, class T>
struct Halo {
    static constexpr int kVectors = kChannelsOfSlice / Vector, kHeight = Rows + K - 1;
    static constexpr int kElements = kHeight * Width * kChannelsOfSlice;
    static constexpr int kRowsAtOnce = Threads / (kSlots * kVectors), kSteps = ceil_div(kHeight, kRowsAtOnce);
    static_assert(Width <= kSlots && kRowsAtOnce > 0 && kSteps <= 32, "the threads copy whole rows at once");

    const T* from;   // the first pixel of this thread
    uint32_t exist;  // of bit k the pixel of step k
    int to;

    __device__ __forceinline__ Halo(const Problem& p, const TileOfItem& tile, int (*swizzle)(int)) {
        const int thread = thread_computed_late(), vector = thread % kVectors;
        const int x = thread / kVectors % kSlots, y = thread / (kVectors * kSlots);
        const int i = tile.top - K / 2, j = tile.left - K / 2 + x;
        from = element<const T>(p.features, tile.n, tile.c + vector * Vector, i + y, j);
        exist = 0;
        if (j >= 0 && j < p.features.w && x < kColumns + K - 1) {
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
                const int row = i + y + k * kRowsAtOnce;
                exist |= static_cast<uint32_t>(row >= 0 && row < p.features.h) << k;
            }
        }
        to = (y * Width + x) * kChannelsOfSlice + (vector ^ swizzle(x)) * Vector;
    }

    // Copies the next slice, of which `channels` channels exist; 0 outside.
    __device__ __forceinline__ void copy(const Array& array, int channels, T* features) {
        const auto thread = static_cast<uint32_t>(thread_computed_late());  // by which quotients are shifts
        const int first = static_cast<int>(thread / (kVectors * kSlots));
        if (thread / kVectors % kSlots >= Width) return;
        uint32_t rows = static_cast<int>(thread % kVectors) * Vector < channels ? exist : 0;
        const int64_t step = kRowsAtOnce * array.stride_h;
        const T* pixel = from;
        features += to;
#pragma unroll 4
        for (int k = 0; k < kSteps; k++, pixel += step, rows >>= 1) {
            if (kHeight % kRowsAtOnce != 0 && first + k * kRowsAtOnce >= kHeight) break;
            copy_async<Vector * sizeof(T)>(features + k * kRowsAtOnce * Width * kChannelsOfSlice, pixel,
                                           (rows & 1) != 0);
        }
        from += kChannelsOfSlice;
    }
};

// ---- with adjacent columns ----

constexpr int kBefore = 2, kWidth = kBefore + kColumns + 2;  // columns of a halo, from an even one on

// Copies `Count` elements at once: of 2 bytes not by themselves.
template <int Count, class T>
__device__ __forceinline__ void copy_elements(T* to, const T* from, bool exist) {
    if constexpr (Count * sizeof(T) >= 4) {
        copy_async<Count * sizeof(T)>(to, from, exist);
    } else {
        *to = exist ? load_input(from) : T{};
    }
}

// The features of a tile of `Rows` rows with their halo in shared memory: [channel][row][column] of a slice, with
// channels `Channel` elements apart. A thread copies `Count` columns of some rows in some channels. Threads of a warp
// share rows, so that its accesses have few lines.
template <int K, int Rows, int Threads, int Channel, int Count, class T>
struct HaloOfColumns {
    static constexpr int kHeight = Rows + K - 1, kInRow = kWidth / Count;
    static constexpr int kChannelsAtOnce = 7, kRowsAtOnce = Threads / (kInRow * kChannelsAtOnce);
    static_assert(kRowsAtOnce > 0, "the threads copy whole rows at once");

    const T* from;
    int row, channel, to;
    int rows_begin, rows_end;  // of the halo, that exist in these columns

    __device__ __forceinline__ HaloOfColumns(const Problem& p, const TileOfItem& tile) {
        const int thread = thread_computed_late(), x = thread % kInRow * Count;
        row = thread / kInRow % kRowsAtOnce;
        channel = thread / (kInRow * kRowsAtOnce);
        const int i = tile.top - K / 2, j = tile.left - kBefore + x;
        from = element<const T>(p.features, tile.n, tile.c + channel, i + row, j);
        to = channel * Channel + row * kWidth + x;
        rows_begin = -i;
        rows_end = j >= 0 && j < p.features.w ? static_cast<int>(p.features.h) - i : 0;
    }

    // Copies the next slice, of which `channels` channels exist; 0 outside.
    __device__ __forceinline__ void copy(const Array& array, int channels, T* features) {
        const T* next = from;
        from += kChannelsOfSlice * array.stride_c;
        if (channel >= kChannelsAtOnce) return;
#pragma unroll 1
        for (int y = row; y < kHeight; y += kRowsAtOnce, next += kRowsAtOnce * array.stride_h) {
            const int exist = y >= rows_begin && y < rows_end ? channels - channel : 0;  // so many channels
            const T* pixel = next;
            T* const staged = features + to + (y - row) * kWidth;
#pragma unroll
            for (int q = 0; q < kChannelsOfSlice; q += kChannelsAtOnce, pixel += kChannelsAtOnce * array.stride_c) {
                if (q + kChannelsAtOnce > kChannelsOfSlice && q + channel >= kChannelsOfSlice) break;
                copy_elements<Count>(staged + q * Channel, pixel, q < exist);
            }
        }
    }
};

}  // namespace carafepp::cuda
