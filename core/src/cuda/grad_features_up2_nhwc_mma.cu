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
    static constexpr int kRowsAtOnce = Tile::kThreads / (kVectors * Tile::kColumns);  // that the block stores
    static_assert(Tile::kThreads >= kVectors * Tile::kGradColumns, "threads copy a row at once");

    const T* from;             // the thread's vector of the next slice, in the first row
    int rows_begin, rows_end;  // that exist in its column
    int matrices;              // place of the lane's row of the matrices
    int put_at;                // place of the lane's first result
    T* result;                 // the thread's vector of the next slice

    // Vectors that a warp loads or stores at once are in different banks.
    static __device__ __forceinline__ int place(int row, int column, int vector) {
        return ((row * Tile::kGradColumns + column) * kVectors + (vector ^ column / 2 % kVectors)) * kWide;
    }
    static __device__ __forceinline__ int place_of_result(int row, int column, int vector) {
        return ((row * Tile::kColumns + column) * kVectors + (vector ^ (column / 2 % 2 + row % 2 * 2))) * kWide;
    }

    // What a thread copies and stores.
    static __device__ __forceinline__ int vector_of(int thread) { return thread % kVectors; }
    static __device__ __forceinline__ int column_of(int thread) { return thread / kVectors % Tile::kColumns; }
    static __device__ __forceinline__ int row_of(int thread) { return thread / kVectors / Tile::kColumns; }

    __device__ __forceinline__ SliceOfChannels(const Problem& p, const Array& grad_features, const TileOfResult& tile,
                                               int own_row, int own_column) {
        const int thread = thread_computed_late(), lane = thread % 32, x = thread / kVectors;
        const int out_i = (tile.top - K / 2) * kUp, out_j = (tile.left - kBeforeTile) * kUp + x;
        const int64_t c = tile.c + vector_of(thread) * kWide;
        from = element<const T>(p.grad_output, tile.n, c, out_i, out_j);
        rows_begin = -out_i;
        constexpr int kUnused = (kBeforeTile - K / 2) * kUp;  // columns at either end
        const bool used = x >= kUnused && x < Tile::kGradColumns - kUnused && out_j >= 0 && out_j < p.out_w;
        rows_end = used ? static_cast<int>(p.out_h) - out_i : 0;
        matrices = place(own_row * kUp, own_column * kUp + lane / 16 * 8 + lane % 8, lane / 8 % 2);
        put_at = place_of_result(own_row + lane % 4 / 2, own_column + lane % 2 * 2, 0) + lane / 4;
        result = element<T>(grad_features, tile.n, c, tile.top + row_of(thread), tile.left + column_of(thread));
    }

    __device__ __forceinline__ void copy(const Problem& p, int channels, T* grads) {
        const int thread = thread_computed_late(), x = thread / kVectors;
        if (x >= Tile::kGradColumns) return;
        const int end = vector_of(thread) * kWide < channels ? rows_end : 0;
        const T* pixel = from;
        grads += place(0, x, vector_of(thread));
#pragma unroll 4
        for (int y = 0; y < Tile::kGradRows; y++, grads += Tile::kGradColumns * kChannels) {
            copy_async<kWide * sizeof(T)>(grads, pixel, y >= rows_begin && y < end);
            pixel += p.grad_output.stride_h;
        }
        from += kChannels;
    }

    __device__ __forceinline__ void load(const T* grads, int first, int row, uint32_t (&words)[4]) const {
        load_matrices(grads + (matrices ^ first) + row * Tile::kGradColumns * kChannels, words);
    }

    __device__ __forceinline__ void put(const float (&sums)[kHalves][4], int first, T* results) const {
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int pixel = half * kRowsOfHalf * Tile::kColumns + k % 2;
                results[(put_at ^ (first + k / 2 * kWide)) + pixel * kChannels] = narrow<T>(sums[half][k]);
            }
        }
    }

    __device__ __forceinline__ void store(const Problem& p, const TileOfResult& tile, const Array& grad_features,
                                          int channels, const T* results) {
        const int thread = thread_computed_late(), column = tile.left + column_of(thread);
        const int rows = vector_of(thread) * kWide < channels && column < p.features.w
                             ? static_cast<int>(p.features.h) - tile.top
                             : 0;  // that exist
        bool finite = true;
        T* to = result;
#pragma unroll
        for (int row = row_of(thread); row < Tile::kRows;
             row += kRowsAtOnce, to += kRowsAtOnce * grad_features.stride_h) {
            const uint4 words = *reinterpret_cast<const uint4*>(
                results + place_of_result(row, column_of(thread), vector_of(thread)));
            if (row >= rows) continue;
            __stcs(reinterpret_cast<uint4*>(to), words);
            finite = finite && are_finite<T>(words.x) && are_finite<T>(words.y) && are_finite<T>(words.z) &&
                     are_finite<T>(words.w);
        }
#pragma unroll 1
        for (int k = finite ? Tile::kRows * kWide : row_of(thread) * kWide; k < Tile::kRows * kWide; k++) {
            const int row = k / kWide, q = k % kWide;
            if ((row - row_of(thread)) % kRowsAtOnce != 0 || row >= rows) continue;
            const int64_t c = tile.c + tile.channels - channels + vector_of(thread) * kWide + q;
            T* const at = element<T>(grad_features, tile.n, c, tile.top + row, column);
            if (!are_finite<T>(at->bits))
                *at = narrow<T>(feature_tap_by_tap<T>(p, tile.n, tile.group, c, tile.top + row, column));
        }
        result += kChannels;
    }
};

template <int K, class T>
__global__ void __launch_bounds__(128, 4)
    grad_features_up2_nhwc_mma_kernel(Arguments arguments, GradFeaturesMmaPlan plan) {
    compute_grad_features<K, T, SliceOfChannels<K, T>>(arguments.problem, arguments.result, plan);
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
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
