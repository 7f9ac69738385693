// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns of 16 bits, on tensor cores: see grad_features_mma.h. A tile
// has 16 columns, so that its rows are whole sectors.
#include "cuda/grad_features_mma.h"

namespace carafepp::cuda {
namespace {

// A slice: gradients as [channel][row][column], results as [channel][pixel]. A thread copies some columns of all
// channels, and stores two columns of some channels.
template <int K, class T>
struct SliceOfColumns {
    using Tile = TileShape<K, 16>;
    static constexpr int kChannels = kChannelsOfMma;
    // Vectors of eight elements of a channel are odd in number, so that eight channels are in different banks.
    static constexpr int kChannel = Tile::kGradRows * Tile::kGradColumns + 8, kGrads = kChannels * kChannel;
    static constexpr int kChannelsAtOnce = 2 * Tile::kThreads / Tile::kPixels;  // that the block stores
    static_assert(kChannel / 8 % 2 == 1);

    const T* from;     // the corner of the gradients of the next slice
    int out_i, out_j;  // which is this output
    int matrices;      // place of the lane's row of the matrices
    int put_at;        // place of the lane's first result
    T* result;         // the thread's pair of columns in its first channel of the next slice

    // The pair of columns that a thread stores.
    static __device__ __forceinline__ int column_of(int thread) { return 2 * thread % Tile::kColumns; }
    static __device__ __forceinline__ int row_of(int thread) { return 2 * thread / Tile::kColumns % Tile::kRows; }
    static __device__ __forceinline__ int channel_of(int thread) { return 2 * thread / Tile::kPixels; }

    __device__ __forceinline__ SliceOfColumns(const Problem& p, const Array& grad_features, const TileOfResult& tile,
                                              int own_row, int own_column) {
        const int thread = thread_computed_late(), lane = thread % 32;
        out_i = (tile.top - K / 2) * kUp;
        out_j = (tile.left - kBeforeTile) * kUp;
        from = element<const T>(p.grad_output, tile.n, tile.c, out_i, out_j);
        matrices = lane % 16 * kChannel + own_row * kUp * Tile::kGradColumns + own_column * kUp + lane / 16 * 8;
        put_at = lane / 4 * Tile::kPixels + (own_row + lane % 4 / 2) * Tile::kColumns + own_column + lane % 2 * 2;
        result = element<T>(grad_features, tile.n, tile.c + channel_of(thread), tile.top + row_of(thread),
                            tile.left + column_of(thread));
    }

    template <int Count>
    __device__ __forceinline__ void copy_columns(const Problem& p, int channels, T* grads) const {
        constexpr int kInRow = Tile::kGradColumns / Count;
        for (int k = thread_computed_late(); k < Tile::kGradRows * kInRow; k += Tile::kThreads) {
            const int y = k / kInRow, x = k % kInRow * Count;
            const bool exist = out_i + y >= 0 && out_i + y < p.out_h && out_j + x >= 0 && out_j + x < p.out_w;
            const int end = exist ? channels : 0;
            const T* column = from + y * p.grad_output.stride_h + x;
            T* to = grads + y * Tile::kGradColumns + x;
#pragma unroll 8
            for (int q = 0; q < kChannels; q++, column += p.grad_output.stride_c, to += kChannel)
                copy_async<Count * sizeof(T)>(to, column, q < end);
        }
    }

    // Four columns at once, where these are aligned and exist together.
    __device__ __forceinline__ void copy(const Problem& p, int channels, T* grads) {
        constexpr int kMost = 4;
        const bool whole = (p.out_w | p.grad_output.stride_h | p.grad_output.stride_c) % kMost == 0;
        if (whole && reinterpret_cast<uintptr_t>(from) % (kMost * sizeof(T)) == 0) {
            copy_columns<kMost>(p, channels, grads);
        } else {
            copy_columns<2>(p, channels, grads);
        }
        from += kChannels * p.grad_output.stride_c;
    }

    __device__ __forceinline__ void load(const T* grads, int, int row, uint32_t (&words)[4]) const {
        load_matrices<false>(grads + matrices + row * Tile::kGradColumns, words);
    }

    __device__ __forceinline__ void put(const float (&sums)[kHalves][4], int, T* results) const {
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                T* const to = results + put_at + k * 8 * Tile::kPixels + half * kRowsOfHalf * Tile::kColumns;
                *reinterpret_cast<uint32_t*>(to) = pair_of<T>(sums[half][2 * k], sums[half][2 * k + 1]);
            }
        }
    }

    __device__ __forceinline__ void store(const Problem& p, const TileOfResult& tile, const Array& grad_features,
                                          int channels, const T* results) {
        const int thread = thread_computed_late();
        const int row = tile.top + row_of(thread), column = tile.left + column_of(thread);
        const int end = row < p.features.h && column >= 0 && column < p.features.w ? channels : 0;
        bool finite = true;
        T* to = result;
#pragma unroll
        for (int q = 0; q < kChannels; q += kChannelsAtOnce, to += kChannelsAtOnce * grad_features.stride_c) {
            const uint32_t word = *reinterpret_cast<const uint32_t*>(results + q * Tile::kPixels + 2 * thread);
            if (q + channel_of(thread) >= end) continue;
            store_word(word, to);
            finite = finite && are_finite<T>(word);
        }
#pragma unroll 1
        for (int k = finite ? 2 * end : 2 * channel_of(thread); k < 2 * min(end, kChannels); k++) {
            if ((k / 2 - channel_of(thread)) % kChannelsAtOnce != 0) continue;
            const int64_t c = tile.c + tile.channels - channels + k / 2;
            T* const at = element<T>(grad_features, tile.n, c, row, column + k % 2);
            if (!are_finite<T>(at->bits))
                *at = narrow<T>(feature_tap_by_tap<T>(p, tile.n, tile.group, c, row, column + k % 2));
        }
        result += kChannels * grad_features.stride_c;
    }
};

template <int K, class T>
__global__ void __launch_bounds__(256, 2)
    grad_features_up2_nchw_mma_kernel(Arguments arguments, GradFeaturesMmaPlan plan) {
    compute_grad_features<K, T, SliceOfColumns<K, T>>(arguments.problem, arguments.result, plan);
}

// Columns of the first tile left of the result. So rows of a tile's gradients begin with a whole sector. None if that
// takes more tiles.
template <class Tile>
int64_t columns_before(const Problem& p) {
    constexpr int kBefore = Tile::kColumns / kUp - kBeforeTile;
    const int64_t width = p.features.w;
    return ceil_div(width + kBefore, Tile::kColumns) == ceil_div(width, Tile::kColumns) ? kBefore : 0;
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, grad_features_up2_nchw_mma_kernel<5, BFloat16>);
}

void grad_features_up2_nchw_mma(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        using Slice = SliceOfColumns<k, T>;
        launch_grad_features<Slice, k>(grad_features_up2_nchw_mma_kernel<k, T>, p, grad_features,
                                       columns_before<typename Slice::Tile>(p));
    });
}

}  // namespace carafepp::cuda
