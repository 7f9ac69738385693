// SPDX-License-Identifier: Apache-2.0
// Tiles of sources for up x2. A block stages the masks of a tile once. It goes through the channels a slice at a time,
// and copies each slice's features with their halo into shared memory.
#pragma once

#include "cuda/columns.h"
#include "cuda/tiles.h"
#include "cuda/up2/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kColumns = 8;  // of most tiles
constexpr int kChannelsOfSlice = 32;
constexpr int kSlots = 16;  // threads along the columns of a halo

// A multiprocessor runs `blocks` at once. No bit of an output depends on how tiles are shared.
inline SharedTiles tiles_of_up2(const Problem& p, int rows, int columns, int64_t blocks, int before = 0) {
    return SharedTiles(Tiles(p, p.features.h, p.features.w, rows, columns, kChannelsOfSlice, 0, before),
                       kChannelsOfSlice, blocks * multiprocessors());
}

// Why these kernels, which count channels and slices of tiles in 32 bits, do not take a problem.
inline const char* tiles_too_many(const Problem& p) {
    if (p.features.c / p.groups > INT32_MAX - kChannelsOfSlice) return "channels are too many";
    constexpr int kFewestRows = 4;
    const Tiles tiles(p, p.features.h, p.features.w, kFewestRows, kColumns, kChannelsOfSlice, 0, kColumns);
    return tiles.items > INT32_MAX / (tiles.channels / kChannelsOfSlice) ? "tiles are too many" : nullptr;
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

// The rows, of `height`, that `units` of threads copy at once in the fewest turns. Other units have other channels.
constexpr int rows_at_once(int height, int units) {
    int best = 1, fewest = INT32_MAX;
    for (int rows = 1; rows <= std::min(height, units); rows++) {
        const int turns = static_cast<int>(ceil_div(height, rows) * ceil_div(kChannelsOfSlice, units / rows));
        if (turns < fewest) best = rows;
        fewest = std::min(turns, fewest);
    }
    return best;
}

// The features of a tile with their halo in shared memory, [channel][row][column] of a slice: `Height` rows of `Width`
// columns, of which `Before` are left of the tile. Channels are `Channel` elements apart. A thread copies `Count`
// columns, the same number in each call, of some rows in some channels. Threads of a warp share rows, so that its
// accesses have few lines.
template <int Height, int Width, int Before, int Channel, int Threads, class T>
struct HaloOfColumns {
    static constexpr int kElements = kChannelsOfSlice * Channel;
    template <int Count>
    static constexpr int kLanes = Width / Count;  // whole, so neighbouring threads go on in the next row
    template <int Count>
    static constexpr int kRowsAtOnce = rows_at_once(Height, Threads / kLanes<Count>);

    template <int Count>
    static constexpr int kTurns = static_cast<int>(ceil_div(Height, kRowsAtOnce<Count>));

    const T* from;   // this thread's first columns
    uint32_t exist;  // of bit k the row of turn k

    // The first row is `above` the tile.
    template <int Count>
    __device__ __forceinline__ void begin(const Problem& p, const TileOfItem& tile, int above) {
        const int x = thread_computed_late() % kLanes<Count> * Count, row = first_row<Count>();
        const int channel = first_channel<Count>();
        const int i = tile.top - above + row, j = tile.left - Before + x;
        from = element<const T>(p.features, tile.n, tile.c + channel, i, j);
        exist = 0;
        if (j < 0 || j >= p.features.w) return;
#pragma unroll
        for (int k = 0; k < kTurns<Count>; k++) {
            const int y = i + k * kRowsAtOnce<Count>;
            exist |= static_cast<uint32_t>(y >= 0 && y < p.features.h) << k;
        }
    }

    // Copies the next slice, of which `channels` channels exist; 0 outside.
    template <int Count>
    __device__ __forceinline__ void copy(const Array& array, int channels, T* features) {
        constexpr int kRows = kRowsAtOnce<Count>, kChannelsAtOnce = Threads / (kLanes<Count> * kRows);
        const int stride = static_cast<int>(array.stride_c);
        const T* next = from;
        from = at_stride(from, stride, kChannelsOfSlice);
        const int channel = first_channel<Count>();
        if (channel >= kChannelsAtOnce) return;
        features += channel * Channel + (thread_computed_late() - channel * kLanes<Count> * kRows) * Count;
        uint32_t rows = exist;
#pragma unroll 1
        for (int k = 0; k < kTurns<Count>; k++, rows >>= 1) {
            if (Height % kRows != 0 && k == kTurns<Count> - 1 && first_row<Count>() >= Height % kRows) break;
            const int there = (rows & 1) != 0 ? channels - channel : 0;  // so many channels
#pragma unroll
            for (int q = 0; q < kChannelsOfSlice; q += kChannelsAtOnce) {
                if (q + kChannelsAtOnce > kChannelsOfSlice && q + channel >= kChannelsOfSlice) break;
                copy_elements<Count>(features + q * Channel, at_stride(next, stride, q), q < there);
            }
            next += kRows * array.stride_h;
            features += kRows * Width;
        }
    }

private:
    template <int Count>
    static __device__ __forceinline__ int first_row() {
        return thread_computed_late() / kLanes<Count> % kRowsAtOnce<Count>;
    }
    template <int Count>
    static __device__ __forceinline__ int first_channel() {
        return thread_computed_late() / (kLanes<Count> * kRowsAtOnce<Count>);
    }
};

// Why these kernels do not take an array.
inline const char* channels_too_far_apart(const Array& array) {
    return array.stride_c != static_cast<int>(array.stride_c) ? "channels are too far apart" : nullptr;
}

}  // namespace carafepp::cuda
