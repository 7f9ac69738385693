// SPDX-License-Identifier: Apache-2.0
// Tiles of sources for up x2. A block stages the masks of a tile once. It goes through the channels a slice at a time,
// and copies each slice's features with their halo into shared memory.
#pragma once

#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kColumns = 8;  // of a tile
constexpr int kChannelsOfSlice = 32;
constexpr int kSlots = 16;             // threads along the columns of a halo
constexpr int64_t kEnoughItems = 384;  // that keep all multiprocessors busy

struct TileUp2Plan {
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t slices;            // of an item
    int64_t channel_blocks;    // of a group
    int64_t items;

    // Items have fewer slices if there are less than `enough` items.
    TileUp2Plan(const Problem& p, int rows, int64_t enough = kEnoughItems) {
        tile_rows = ceil_div(p.features.h, rows);
        tiles = ceil_div(p.features.w, kColumns);
        const int64_t of_channels = p.features.n * p.groups * tile_rows * tiles,
                      all = std::max<int64_t>(ceil_div(p.features.c / p.groups, kChannelsOfSlice), 1);
        slices = all;
        while (slices > 2 && of_channels * ceil_div(all, slices) < enough) slices = ceil_div(slices, 2);
        channel_blocks = ceil_div(all, slices);
        items = of_channels * channel_blocks;
    }
};

// An item: a tile, in some channels.
struct TileOfBlock {
    int64_t n, c;  // the first channel
    int64_t group;
    int top, left;  // source
    int channels;

    __device__ __forceinline__ TileOfBlock(const Problem& p, const TileUp2Plan& plan, int64_t item, int rows) {
        const Quotient channel_block = divide(item, computed_late(plan.channel_blocks)),
                       tile = divide(channel_block.quotient, computed_late(plan.tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.tile_rows)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        n = image.quotient;
        group = image.remainder;
        top = static_cast<int>(tile_row.remainder) * rows;
        left = static_cast<int>(tile.remainder) * kColumns;
        const int64_t channels_in_group = p.features.c / p.groups,
                      first = channel_block.remainder * plan.slices * kChannelsOfSlice;
        c = group * channels_in_group + first;
        channels = static_cast<int>(min(channels_in_group - first, plan.slices * kChannelsOfSlice));
    }
};

// ---- with adjacent channels ----

// The features of a tile of `Rows` rows with their halo, `Width` columns of them, in shared
// memory: [row][column][channel] of a slice. A thread copies `Vector` channels of some pixels of a column. Their place
// among the channels of a pixel is xor `swizzle(column)` vectors.
template <int K, int Rows, int Width, int Threads, int Vector, class T>
struct Halo {
    static constexpr int kVectors = kChannelsOfSlice / Vector, kHeight = Rows + K - 1;
    static constexpr int kElements = kHeight * Width * kChannelsOfSlice;
    static constexpr int kRowsAtOnce = Threads / (kSlots * kVectors);
    static_assert(Width <= kSlots && kRowsAtOnce > 0, "the threads copy whole rows at once");

    const T* from;             // the first pixel of this thread
    int rows_begin, rows_end;  // of the halo, that exist in its column
    int to;

    __device__ __forceinline__ Halo(const Problem& p, const TileOfBlock& tile, int (*swizzle)(int)) {
        const int thread = thread_computed_late(), vector = thread % kVectors;
        const int x = thread / kVectors % kSlots, y = thread / (kVectors * kSlots);
        const int i = tile.top - K / 2, j = tile.left - K / 2 + x;
        from = element<const T>(p.features, tile.n, tile.c + vector * Vector, i + y, j);
        rows_begin = -i;
        rows_end = j >= 0 && j < p.features.w && x < kColumns + K - 1 ? static_cast<int>(p.features.h) - i : 0;
        to = (y * Width + x) * kChannelsOfSlice + (vector ^ swizzle(x)) * Vector;
    }

    // Copies the next slice, of which `channels` channels exist; 0 outside.
    __device__ __forceinline__ void copy(const Array& array, int channels, T* features) {
        const int thread = thread_computed_late(), first = thread / (kVectors * kSlots);
        if (thread / kVectors % kSlots >= Width) return;
        const int end = thread % kVectors * Vector < channels ? rows_end : 0;
        const T* pixel = from;
        features += to;
#pragma unroll 2
        for (int y = first; y < kHeight; y += kRowsAtOnce) {
            copy_async<Vector * sizeof(T)>(features, pixel, y >= rows_begin && y < end);
            pixel += kRowsAtOnce * array.stride_h;
            features += kRowsAtOnce * Width * kChannelsOfSlice;
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

// Copies the features of a slice of `channels` channels for a tile of `Rows` rows with their halo, from the halo's
// corner on: to [channel][row][column], with channels `apart`. 0 outside.
template <int K, int Rows, int Threads, int Count, class T>
__device__ __forceinline__ void copy_rows(const Problem& p, const T* from, const TileOfBlock& tile, int channels,
                                          int apart, T* features) {
    constexpr int kInRow = kWidth / Count;
    for (int k = thread_computed_late(); k < (Rows + K - 1) * kInRow; k += Threads) {
        const int y = k / kInRow, x = k % kInRow * Count, i = tile.top - K / 2 + y, j = tile.left - kBefore + x;
        const bool exist = i >= 0 && i < p.features.h && j >= 0 && j < p.features.w;
        const T* pixel = from + y * p.features.stride_h + x;
        T* to = features + y * kWidth + x;
#pragma unroll 4
        for (int q = 0; q < kChannelsOfSlice; q++, pixel += p.features.stride_c, to += apart)
            copy_elements<Count>(to, pixel, exist && q < channels);
    }
}

}  // namespace carafepp::cuda
