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

    const T* from;  // the thread's vector of the next slice, in the first row
    T* result;      // the same of the result
    bool finite = true;

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

    __device__ __forceinline__ SliceOfChannels(const Problem& p, const Array& grad_features, const TileOfResult& tile) {
        const int thread = thread_computed_late();
        const int64_t c = tile.c + vector_of(thread) * kWide;
        from = element<const T>(p.grad_output, tile.n, c, (tile.top - K / 2) * kUp,
                                (tile.left - kBeforeTile) * kUp + thread / kVectors);
        result = element<T>(grad_features, tile.n, c, tile.top + row_of(thread), tile.left + column_of(thread));
    }

    __device__ __forceinline__ void copy(const Problem& p, const TileOfResult& tile, int channels, T* grads) {
        constexpr int kUnused = (kBeforeTile - K / 2) * kUp;  // columns at either end
        const int thread = thread_computed_late(), x = thread / kVectors;
        const int out_i = (tile.top - K / 2) * kUp, out_j = (tile.left - kBeforeTile) * kUp + x;
        if (x >= Tile::kGradColumns) return;
        const bool exist = x >= kUnused && x < Tile::kGradColumns - kUnused && out_j >= 0 && out_j < p.out_w &&
                           vector_of(thread) * kWide < channels;
        const int end = exist ? static_cast<int>(p.out_h) : 0;
        const T* pixel = from;
        grads += place(0, x, vector_of(thread));
#pragma unroll 4
        for (int y = 0; y < Tile::kGradRows; y++, grads += Tile::kGradColumns * kChannels) {
            copy_async<kWide * sizeof(T)>(grads, pixel, out_i + y >= 0 && out_i + y < end);
            pixel += p.grad_output.stride_h;
        }
        from += kChannels;
    }

    static __device__ __forceinline__ int place_of_grads(PixelsOfWarp<Tile> own, int first) {
        return place(own.row * kUp, own.column * kUp + own.lane / 16 * 8 + own.lane % 8,
                     first / kWide + own.lane / 8 % 2);
    }
    static __device__ __forceinline__ void load(const T* grads, int row, uint32_t (&words)[4]) {
        load_matrices(grads + row * Tile::kGradColumns * kChannels, words);
    }

    static __device__ __forceinline__ void put(const float (&sums)[kHalves][4], int first, PixelsOfWarp<Tile> own,
                                               T* results) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            T* const to = results + own.lane / 4 +
                          place_of_result(own.row + own.lane % 4 / 2, own.column + own.lane % 2 * 2 + k % 2,
                                          first / kWide + k / 2);
#pragma unroll
            for (int half = 0; half < kHalves; half++)
                to[half * kRowsOfHalf * Tile::kColumns * kChannels] = narrow<T>(sums[half][k]);
        }
    }

    __device__ __forceinline__ void store(const Problem& p, const TileOfResult& tile, const Array& grad_features,
                                          int channels, const T* results) {
        const int thread = thread_computed_late();
        const bool exist = vector_of(thread) * kWide < channels && tile.left + column_of(thread) < p.features.w;
        T* to = result;
#pragma unroll
        for (int first = 0; first < Tile::kRows; first += kRowsAtOnce) {
            const int row = first + row_of(thread);
            const uint4 words = *reinterpret_cast<const uint4*>(
                results + place_of_result(row, column_of(thread), vector_of(thread)));
            if (exist && tile.top + row < p.features.h) __stcs(reinterpret_cast<uint4*>(to), words);
            finite = finite && are_finite<T>(words.x) && are_finite<T>(words.y) && are_finite<T>(words.z) &&
                     are_finite<T>(words.w);
            to += kRowsAtOnce * grad_features.stride_h;
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
