// SPDX-License-Identifier: Apache-2.0
// Slices of adjacent channels of 16 bits, for the gradients of up x2 on tensor cores.
#pragma once

#include "cuda/up2/grad_features_up2_mma.h"

namespace carafepp::cuda {

constexpr int kChannelsOfSlice = 32, kVectorsOfSlice = kChannelsOfSlice / kWide;

// Pixels of an array in shared memory, as [row][column][channel].
template <int Rows, int Columns>
struct StagedPixels {
    static constexpr int kRows = Rows, kColumns = Columns;
    static constexpr int kRow = Columns * kChannelsOfSlice, kElements = Rows * kRow;
    static constexpr int kThreads = kVectorsOfSlice * Columns;  // that copy them

    // Vectors of eight neighbouring pixels are in different banks.
    static __device__ __forceinline__ int place(int row, int column, int vector) {
        return ((row * Columns + column) * kVectorsOfSlice + (vector ^ column / 2 % kVectorsOfSlice)) * kWide;
    }
};

// Copies a vector of each pixel of a column, slice by slice.
template <class T>
struct CopiedColumn {
    const T* from;   // the vector of the next slice, in the first row
    int begin, end;  // rows that exist

    // Pixels begin at (top, left). The outermost `unused` ones of `columns` are not needed.
    __device__ __forceinline__ CopiedColumn(const Array& array, const TileOfItem& tile, int top, int left, int columns,
                                            int unused, int thread)
        : begin(-top) {
        const int column = thread / kVectorsOfSlice, vector = thread % kVectorsOfSlice, j = left + column;
        const bool exists = column >= unused && column < columns - unused && j >= 0 && j < array.w;
        end = exists ? static_cast<int>(array.h) - top : 0;
        from = element<const T>(array, tile.n, tile.c + vector * kWide, top, j);
    }

    // Copies the next slice, 0 where there are no pixels. `channels` are those of the slice and behind it. `thread` is
    // the same again.
    template <class Pixels>
    __device__ __forceinline__ void copy(const Array& array, int channels, int thread, T* slice) {
        const int column = thread / kVectorsOfSlice, vector = thread % kVectorsOfSlice;
        const int end_of_copies = vector * kWide < channels ? end : 0;
        const T* pixel = from;
        slice += Pixels::place(0, column, vector);
#pragma unroll 8
        for (int y = 0; y < Pixels::kRows; y++, slice += Pixels::kRow, pixel += array.stride_h)
            copy_async<kWide * sizeof(T)>(slice, pixel, y >= begin && y < end_of_copies);
        from += kChannelsOfSlice;
    }
};

// A slice of the gradient of features: see compute_grad_features. Each warp has results of its own, as
// [pixel][channel]. A lane stores eight channels at once of two of the pixels.
template <int K, class T, int Columns>
struct SliceOfChannels {
    using Tile = TileShape<K, Columns>;
    using Grads = StagedPixels<Tile::kGradRows, Tile::kGradColumns>;
    static constexpr int kChannels = kChannelsOfSlice, kBuffers = 1;
    static constexpr int kGrads = Grads::kElements, kResults = Tile::kPixels * kChannels;
    static constexpr int kUnused = (kBeforeTile - K / 2) * kUp;         // columns at either end
    static constexpr int kRowsAtOnce = 32 / kVectorsOfSlice / kOfWarp;  // that a warp stores
    static_assert(kRowsAtOnce == kRowsOfHalf, "a lane has a pixel of each half");
    static_assert(Tile::kThreads >= Grads::kThreads, "threads copy a row at once");

    CopiedColumn<T> copied;
    PixelsOfWarp<Tile> own;
    int reach_warp;  // place of the lane's row of the matrices
    T* result;       // the lane's vector of the next slice, in the first half
    int rows;        // of its column that exist
    bool finite = true;

    // Vectors that a warp stores at once are in different banks, and those of neighbouring pairs of pixels.
    __device__ __forceinline__ int place_of_result(int pixel, int vector) const {
        return (own.number * kOfWarp * kOfWarp + pixel) * kChannels + (vector ^ pixel / 2 % kVectorsOfSlice) * kWide;
    }

    // A lane stores this vector of this pixel of a half.
    __device__ __forceinline__ int vector_of_lane() const { return own.lane % kVectorsOfSlice; }
    __device__ __forceinline__ int pixel_of_lane() const { return own.lane / kVectorsOfSlice; }
    __device__ __forceinline__ int row_of_lane() const { return own.row + pixel_of_lane() / kOfWarp; }
    __device__ __forceinline__ int column_of_lane() const { return own.column + pixel_of_lane() % kOfWarp; }

    __device__ __forceinline__ SliceOfChannels(const Problem& p, const Array& grad_features, const TileOfItem& tile)
        : copied(p.grad_output, tile, (tile.top - K / 2) * kUp, (tile.left - kBeforeTile) * kUp, Grads::kColumns,
                 kUnused, thread_computed_late()) {
        reach_warp = Grads::place(own.row * kUp + own.lane / 16, own.column * kUp + own.lane % 8, own.lane / 8 % 2);
        const int row = tile.top + row_of_lane(), column = tile.left + column_of_lane();
        result = element<T>(grad_features, tile.n, tile.c + vector_of_lane() * kWide, row, column);
        rows = column < p.features.w ? static_cast<int>(p.features.h) - row : 0;
    }

    __device__ __forceinline__ void copy(const Problem& p, int channels, T* grads) {
        const int thread = thread_computed_late();
        if (thread < Grads::kThreads) copied.template copy<Grads>(p.grad_output, channels, thread, grads);
    }

    __device__ __forceinline__ void load(const T* grads, int first, int row, int four, uint32_t (&words)[4]) const {
        load_matrices(grads + (reach_warp ^ first) + row * kUp * Grads::kRow + four * kFour * kUp * kChannels, words);
    }

    __device__ __forceinline__ void put(const float (&sums)[kHalves][4], int first, T* results) const {
        results += own.lane / 4;
        const int to = place_of_result(own.lane % 4 * 2, 0);
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int half = 0; half < kHalves; half++) {
                results[(to ^ (first + k / 2 * kWide)) + (half * kRowsOfHalf * kOfWarp + k % 2) * kChannels] =
                    narrow<T>(sums[half][k]);
            }
        }
    }

    __device__ __forceinline__ void store(const Array& grad_features, int channels, const T* results) {
        const int end = vector_of_lane() * kWide < channels ? rows : 0;
        results += place_of_result(pixel_of_lane(), vector_of_lane());
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const uint4 words = *reinterpret_cast<const uint4*>(results + half * kRowsOfHalf * kOfWarp * kChannels);
            if (half * kRowsOfHalf < end)
                __stcs(reinterpret_cast<uint4*>(result + half * kRowsOfHalf * grad_features.stride_h), words);
            finite = finite && are_finite<T>(words.x) && are_finite<T>(words.y) && are_finite<T>(words.z) &&
                     are_finite<T>(words.w);
        }
        result += kChannels;
    }

    template <class F>
    __device__ __forceinline__ void for_each_stored(int channels, F f) const {
#pragma unroll 1
        for (int channel = vector_of_lane() * kWide; channel < channels; channel++) {
            if (channel / kWide % kVectorsOfSlice != vector_of_lane()) continue;
#pragma unroll 1
            for (int half = 0; half < kHalves; half++) f(channel, row_of_lane() + half * kRowsOfHalf, column_of_lane());
        }
    }
};

}  // namespace carafepp::cuda
