// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels of 16 bits, on tensor cores: see grad_features_mma.h. A
// tile has eight columns.
#include "cuda/grad_features_mma.h"

namespace carafepp::cuda {
namespace {

// A slice: gradients as [row][column][channel], results as [pixel][channel]. A thread copies and stores eight channels
// at once, of the pixels of a column.
template <int K, class T>
struct SliceOfChannels {
    using Tile = TileShape<K, 8>;
    static constexpr int kChannels = 32, kVectors = kChannels / kWide;
    static constexpr int kGrads = Tile::kGradRows * Tile::kGradColumns * kChannels;
    static constexpr int kResults = Tile::kPixels * kChannels;
    static constexpr int kRowsAtOnce = Tile::kThreads / (kVectors * Tile::kColumns);  // that the block stores
    static_assert(Tile::kThreads >= kVectors * Tile::kGradColumns, "threads copy a row at once");
    static_assert(kRowsAtOnce % 2 == 0, "rows that a thread stores have the same order of vectors");

    const T* from;             // the thread's vector of the next slice, in the first row
    int rows_begin, rows_end;  // that exist in its column
    int copied_to;             // its place
    int reach_warp;            // place of the lane's row of the matrices
    int put_at;                // place of the lane's first sum
    T* result;                 // the thread's vector of the next slice
    int rows;                  // of its column that exist
    bool finite = true;

    // Vectors that a warp loads or stores at once are in different banks.
    static __device__ __forceinline__ int place(int row, int column, int vector) {
        return ((row * Tile::kGradColumns + column) * kVectors + (vector ^ column / 2 % kVectors)) * kWide;
    }
    static __device__ __forceinline__ int place_of_result(int row, int column, int vector) {
        return ((row * Tile::kColumns + column) * kVectors + (vector ^ (column / 2 % 2 + row % 2 * 2))) * kWide;
    }

    // A thread copies and stores this vector of this pixel.
    static __device__ __forceinline__ int vector_of(int thread) { return thread % kVectors; }
    static __device__ __forceinline__ int column_of(int thread) { return thread / kVectors % Tile::kColumns; }
    static __device__ __forceinline__ int row_of(int thread) { return thread / kVectors / Tile::kColumns; }

    __device__ __forceinline__ SliceOfChannels(const Problem& p, const Array& grad_features, const TileOfItem& tile) {
        constexpr int kUnused = (kBeforeTile - K / 2) * kUp;  // columns at either end
        const int thread = thread_computed_late(), x = thread / kVectors;
        const int out_i = (tile.top - K / 2) * kUp, out_j = (tile.left - kBeforeTile) * kUp + x;
        const int64_t c = tile.c + vector_of(thread) * kWide;
        from = element<const T>(p.grad_output, tile.n, c, out_i, out_j);
        rows_begin = -out_i;
        rows_end = x >= kUnused && x < Tile::kGradColumns - kUnused && out_j >= 0 && out_j < p.out_w
                       ? static_cast<int>(p.out_h) - out_i
                       : 0;
        copied_to = place(0, x, vector_of(thread));
        const PixelsOfWarp<Tile> own;
        reach_warp = place(own.row * kUp, own.column * kUp + own.lane / 16 * 8 + own.lane % 8, own.lane / 8 % 2);
        put_at = place_of_result(own.row + own.lane % 4 / 2, own.column + own.lane % 2 * 2, 0) + own.lane / 4;
        const int row = tile.top + row_of(thread), column = tile.left + column_of(thread);
        result = element<T>(grad_features, tile.n, c, row, column);
        rows = column < p.features.w ? static_cast<int>(p.features.h) - row : 0;
    }

    __device__ __forceinline__ void copy(const Problem& p, int channels, T* grads) {
        const int thread = thread_computed_late();
        if (thread >= kVectors * Tile::kGradColumns) return;
        const int end = vector_of(thread) * kWide < channels ? rows_end : 0;
        const T* pixel = from;
        grads += copied_to;
#pragma unroll 8
        for (int y = 0; y < Tile::kGradRows; y++, grads += Tile::kGradColumns * kChannels) {
            copy_async<kWide * sizeof(T)>(grads, pixel, y >= rows_begin && y < end);
            pixel += p.grad_output.stride_h;
        }
        from += kChannels;
    }

    __device__ __forceinline__ void load(const T* grads, int first, int row, uint32_t (&words)[4]) const {
        load_matrices(grads + (reach_warp ^ first) + row * Tile::kGradColumns * kChannels, words);
    }

    __device__ __forceinline__ void put(const float (&sums)[kHalves][4], int first, T* results) const {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            T* const to = results + (put_at ^ (first + k / 2 * kWide)) + k % 2 * kChannels;
#pragma unroll
            for (int half = 0; half < kHalves; half++)
                to[half * kRowsOfHalf * Tile::kColumns * kChannels] = narrow<T>(sums[half][k]);
        }
    }

    __device__ __forceinline__ void store(const Array& grad_features, int channels, const T* results) {
        const int thread = thread_computed_late();
        const int end = vector_of(thread) * kWide < channels ? rows : 0;
        results += place_of_result(row_of(thread), column_of(thread), vector_of(thread));
        T* to = result;
#pragma unroll
        for (int row = 0; row < Tile::kRows; row += kRowsAtOnce, to += kRowsAtOnce * grad_features.stride_h) {
            const uint4 words = *reinterpret_cast<const uint4*>(results + row * Tile::kColumns * kChannels);
            if (row < end) __stcs(reinterpret_cast<uint4*>(to), words);
            finite = finite && are_finite<T>(words.x) && are_finite<T>(words.y) && are_finite<T>(words.z) &&
                     are_finite<T>(words.w);
        }
        result += kChannels;
    }

    template <class F>
    static __device__ __forceinline__ void for_each_stored(int channels, F f) {
        const int thread = thread_computed_late();
#pragma unroll 1
        for (int channel = vector_of(thread) * kWide; channel < channels; channel++) {
            if (channel / kWide % kVectors != vector_of(thread)) continue;
#pragma unroll 1
            for (int row = row_of(thread); row < Tile::kRows; row += kRowsAtOnce) f(channel, row, column_of(thread));
        }
    }
};

template <int K, class T>
__global__ void __launch_bounds__(128, 4) grad_features_up2_nhwc_mma_kernel(Arguments arguments, Tiles plan) {
    compute_grad_features<K, T, SliceOfChannels<K, T>>(arguments.problem, arguments.result, plan);
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_channels_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, grad_features_up2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        launch_grad_features<SliceOfChannels<k, T>, k>(grad_features_up2_nhwc_mma_kernel<k, T>, p, grad_features, 0);
    });
}

}  // namespace carafepp::cuda
