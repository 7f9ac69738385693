// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns of 16 bits, on tensor cores: see grad_features_up2_mma.h. A
// tile has 32 columns, where two narrower ones have no fewer and the device has the shared memory. Rows are whole
// sectors.
#include "cuda/up2/grad_features_up2_mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kNarrowTile = 16, kWideTile = 32;  // columns

// A slice: gradients as [channel][row][column], results as [channel][pixel]. A thread copies some columns of all
// channels, and stores two columns of some channels.
template <int K, class T, int Columns>
struct SliceOfColumns {
    using Tile = TileShape<K, Columns>;
    static constexpr int kChannels = kChannelsOfMma;
    static constexpr int kBuffers = Columns == kWideTile ? 2 : 1;  // a multiprocessor has one block then, or two
    // Vectors of eight elements of a channel are odd in number, so that eight channels are in different banks.
    static constexpr int kChannel = Tile::kGradRows * Tile::kGradColumns + 8, kGrads = kChannels * kChannel;
    static constexpr int kOfChannel = Tile::kPixels + 4, kResults = kChannels * kOfChannel;  // likewise two rows
    static constexpr int kChannelsAtOnce = 2 * Tile::kThreads / Tile::kPixels;               // that the block stores
    static_assert(kChannel / 8 % 2 == 1);

    const T* from;     // the corner of the gradients of the next slice
    int out_i, out_j;  // which is this output
    int reach_warp;    // place of the lane's row of the matrices
    int put_at;        // place of the lane's first sum
    T* result;         // the thread's pair of columns in its first channel of the next slice
    bool exists;       // the pair
    bool finite = true;

    // The pair of columns that a thread stores.
    static __device__ __forceinline__ int column_of(int thread) { return 2 * thread % Tile::kColumns; }
    static __device__ __forceinline__ int row_of(int thread) { return 2 * thread / Tile::kColumns % Tile::kRows; }
    static __device__ __forceinline__ int channel_of(int thread) { return 2 * thread / Tile::kPixels; }

    __device__ __forceinline__ SliceOfColumns(const Problem& p, const Array& grad_features, const TileOfItem& tile) {
        const int thread = thread_computed_late();
        out_i = (tile.top - K / 2) * kUp;
        out_j = (tile.left - kBeforeTile) * kUp;
        from = element<const T>(p.grad_output, tile.n, tile.c, out_i, out_j);
        const PixelsOfWarp<Tile> own;
        reach_warp = own.lane % 16 * kChannel + (own.row * kUp + own.lane / 16) * Tile::kGradColumns + own.column * kUp;
        put_at = own.lane / 4 * kOfChannel + (own.row + own.lane % 4 / 2) * Tile::kColumns + own.column +
                 own.lane % 2 * 2;
        const int row = tile.top + row_of(thread), column = tile.left + column_of(thread);
        result = element<T>(grad_features, tile.n, tile.c + channel_of(thread), row, column);
        exists = row < p.features.h && column >= 0 && column < p.features.w;
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

    __device__ __forceinline__ void load(const T* grads, int, int row, int four, uint32_t (&words)[4]) const {
        load_matrices<false>(grads + reach_warp + row * kUp * Tile::kGradColumns + four * kFour * kUp, words);
    }

    __device__ __forceinline__ void put(const float (&sums)[kHalves][4], int, T* results) const {
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                T* const to = results + put_at + k * 8 * kOfChannel + half * kRowsOfHalf * Tile::kColumns;
                *reinterpret_cast<uint32_t*>(to) = pair_of<T>(sums[half][2 * k], sums[half][2 * k + 1]);
            }
        }
    }

    __device__ __forceinline__ void store(const Array& grad_features, int channels, const T* results) {
        const int thread = thread_computed_late(), end = exists ? channels - channel_of(thread) : 0;
        results += channel_of(thread) * kOfChannel + 2 * thread % Tile::kPixels;
#pragma unroll
        for (int channel = 0; channel < kChannels; channel += kChannelsAtOnce) {
            const uint32_t word = *reinterpret_cast<const uint32_t*>(results + channel * kOfChannel);
            if (channel < end) store_word(word, result);
            finite = finite && are_finite<T>(word);
            result += kChannelsAtOnce * grad_features.stride_c;
        }
    }

    template <class F>
    static __device__ __forceinline__ void for_each_stored(int channels, F f) {
        const int thread = thread_computed_late();
#pragma unroll 1
        for (int k = 2 * channel_of(thread); k < 2 * channels; k += k % 2 == 0 ? 1 : 2 * kChannelsAtOnce - 1)
            f(k / 2, row_of(thread), column_of(thread) + k % 2);
    }
};

template <int K, class T, int Columns>
__global__ void __launch_bounds__(TileShape<K, Columns>::kThreads, kWideTile / Columns)
    grad_features_up2_nchw_mma_kernel(Arguments arguments, Tiles plan) {
    compute_grad_features<K, T, SliceOfColumns<K, T, Columns>>(arguments.problem, arguments.result, plan);
}

// Columns of the first tile left of the result. So rows of a tile's gradients begin with a whole sector. None if that
// takes more tiles.
int columns_before(const Problem& p, int columns) {
    constexpr int kBefore = 8 - kBeforeTile;
    const int64_t width = p.features.w;
    return ceil_div(width + kBefore, columns) == ceil_div(width, columns) ? kBefore : 0;
}

// Queues the kernel of K and T with these columns of a tile.
template <int K, class T, int Columns>
void launch_columns(const Problem& p, const Array& grad_features) {
    launch_grad_features<SliceOfColumns<K, T, Columns>, K>(grad_features_up2_nchw_mma_kernel<K, T, Columns>, p,
                                                           grad_features, columns_before(p, Columns));
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw_mma(const Problem& p, const Array& grad_features) {
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_columns_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, grad_features_up2_nchw_mma_kernel<5, BFloat16, kNarrowTile>);
}

void grad_features_up2_nchw_mma(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const int64_t wide = ceil_div(p.features.w, kWideTile), narrow = ceil_div(p.features.w, kNarrowTile);
        if (2 * wide == narrow && not_for_shared_memory(kBytesOfBlock<SliceOfColumns<k, T, kWideTile>, k>) == nullptr) {
            launch_columns<k, T, kWideTile>(p, grad_features);
        } else {
            launch_columns<k, T, kNarrowTile>(p, grad_features);
        }
    });
}

}  // namespace carafepp::cuda
