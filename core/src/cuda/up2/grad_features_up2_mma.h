// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 on tensor cores, in gather form. A block has a tile of the result of eight rows,
// and a warp 4 x 4 pixels of it. Once the block stages the masks of all outputs whose windows reach the tile. Each warp
// builds band matrices from them, which stay in its registers. Then the block goes through the channels a slice at a
// time. It copies grad_output with its halo to where the masks were, multiplies it by the bands, and stores the sums by
// way of shared memory. A zero of a band makes NaN of an infinite gradient. Sums that are not finite are computed
// again, tap by tap.
#pragma once

#include "cuda/tiles.h"
#include "cuda/up2/mma_up2.h"
#include "cuda/up2/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kOfWarp = 4;                   // columns and rows of a warp's pixels
constexpr int kRowsOfHalf = 2, kHalves = 2;  // of these pixels: a half is the columns of a product
constexpr int kFour = 4, kFours = 2;         // sources of a product, and how many products they need
constexpr int kBeforeTile = 2;               // columns of sources, and as many behind it
constexpr int kChannelsOfMma = 16;
constexpr int64_t kSlicesToStage = 4;  // which take as long as to stage the masks of a tile
static_assert(kOfWarp + 2 * kBeforeTile == kFours * kFour && kBeforeTile >= 5 / 2, "all sources are in the fours");

// A tile of the result with `Columns` columns, the sources whose windows reach it, and their outputs.
template <int K, int Columns>
struct TileShape {
    static constexpr int kRows = 8, kColumns = Columns, kPixels = kRows * kColumns;
    static constexpr int kThreads = kPixels / (kOfWarp * kOfWarp) * 32;
    static constexpr int kSourceRows = kRows + K - 1, kSourceColumns = kColumns + 2 * kBeforeTile;
    static constexpr int kSources = kSourceRows * kSourceColumns;
    static constexpr int kGradRows = kUp * kSourceRows, kGradColumns = kUp * kSourceColumns;
};

// The first of this warp's pixels in a tile.
template <class Tile>
struct PixelsOfWarp {
    int number, row, column, lane;

    explicit __device__ __forceinline__ PixelsOfWarp(int thread = thread_computed_late()) {
        constexpr int kWarpsInRow = Tile::kColumns / kOfWarp;
        number = thread / 32;
        row = number / kWarpsInRow * kOfWarp;
        column = number % kWarpsInRow * kOfWarp;
        lane = thread % 32;
    }
};

// ---- masks ----

// Calls put(t, mask) for the taps of an output, where the normaliser is a sigmoid. It asks for logits again in each
// loop: it is rarely needed, and with taps in registers would be long.
template <int K, class Logit, class Put>
__device__ __forceinline__ void normalize_by_sigmoid(carafepp_normalizer normalizer, Logit logit, Put put) {
    if (normalizer == CARAFEPP_SIGMOID) {
#pragma unroll 1
        for (int t = 0; t < K * K; t++) put(t, sigmoid(logit(t)));
        return;
    }
    // sigmoid(x) is exp(min(x, 0)) / (1 + exp(-|x|)), and a common factor keeps sums from 0.
    const auto least = [](float x) { return x < 0 ? x : 0; };
    float largest = -INFINITY, sum = 0;
#pragma unroll 1
    for (int t = 0; t < K * K; t++) largest = fmaxf(largest, least(logit(t)));
    const auto term = [&](float x) { return expf(least(x) - largest) / (1 + expf(-fabsf(x))); };
#pragma unroll 1
    for (int t = 0; t < K * K; t++) sum += term(logit(t));
    const float scale = 1 / sum;
#pragma unroll 1
    for (int t = 0; t < K * K; t++) put(t, term(logit(t)) * scale);
}

// Turns the logits of an output into masks. The device's power of 2 is exact enough for 16 bits.
template <int Taps>
__device__ __forceinline__ void softmax(float (&taps)[Taps]) {
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int t = 0; t < Taps; t++) largest = fmaxf(largest, taps[t]);
#pragma unroll
    for (int t = 0; t < Taps; t++) {
        taps[t] = power_of_2((taps[t] - largest) * kLog2OfE);  // the difference first: logits may be huge
        sum += taps[t];
    }
    const float scale = 1 / sum;
#pragma unroll
    for (int t = 0; t < Taps; t++) taps[t] *= scale;
}

// Copies the logits of a tile, which have the staged order. Ends with a barrier.
template <int K, class Tile, int Threads, class T>
__device__ __forceinline__ void copy_logits_of_tile(const Problem& p, const TileOfItem& tile, T* staged) {
    constexpr int kTaps = K * K;
    const int top = tile.top - K / 2, left = tile.left - kBeforeTile;
    const T* const corner = element<const T>(p.logits, tile.n, tile.group * kTaps * kOutputs, top, left);
    for (int k = thread_computed_late(); k < Tile::kSourceColumns * kTaps; k += Threads) {
        const int column = k / kTaps;
        const int end = left + column >= 0 && left + column < p.features.w ? static_cast<int>(p.features.h) : 0;
        const T* from = corner + column * p.logits.stride_w + k % kTaps * kOutputs;
#pragma unroll 4
        for (int row = 0; row < Tile::kSourceRows; row++, from += p.logits.stride_h) {
            copy_async<kOutputs * sizeof(T)>(staged + (row * Tile::kSourceColumns * kTaps + k) * kOutputs, from,
                                             top + row >= 0 && top + row < end);
        }
    }
    wait_for_copies();
    __syncthreads();
}

// Stages the masks of all outputs that reach a tile, times `scale`, as [row][column][tap][output] of sources; 0 where
// there is no output. A thread normalises an output, whose logits it finds there or in their array.
template <int K, class Tile, int Threads = Tile::kThreads, class T>
__device__ __forceinline__ void stage_masks_of_tile(const Problem& p, const TileOfItem& tile, float scale, T* staged) {
    constexpr int kTaps = K * K;
    const Array& array = p.from_logits ? p.logits : p.masks;
    const bool channels_adjacent = array.stride_c < array.stride_w;
    const bool copied = p.from_logits && array.dtype == p.features.dtype && in_vectors<T>(array);
    const int64_t step = copied ? kOutputs : array.stride_c * (p.from_logits ? kOutputs : 1);
    if (copied) copy_logits_of_tile<K, Tile, Threads>(p, tile, staged);
    // Calls f(exists, to, address) for each output, with the addresses of its first mask and first logit.
    const auto for_each_output = [&](auto mask, auto f) {
        using M = decltype(mask);
        const int apart = p.from_logits ? 1 : kUp, top = tile.top - K / 2, left = tile.left - kBeforeTile;
        const M* const corner = element<const M>(array, tile.n, tile.group * kTaps * (p.from_logits ? kOutputs : 1),
                                                 top * apart, left * apart);
#pragma unroll 1
        for (int k = thread_computed_late(); k < Tile::kSources * kOutputs; k += Threads) {
            const int source = channels_adjacent ? k / kOutputs : k % Tile::kSources;
            const int output = channels_adjacent ? k % kOutputs : k / Tile::kSources;
            const int row = source / Tile::kSourceColumns, column = source % Tile::kSourceColumns;
            const int out_row = row * kUp + output / kUp, out_column = column * kUp + output % kUp;
            const bool exists = top + row >= 0 && left + column >= 0 && top * kUp + out_row < p.out_h &&
                                left * kUp + out_column < p.out_w;
            T* const to = staged + source * kTaps * kOutputs + output;
            const M* const from = p.from_logits ? corner + row * array.stride_h + column * array.stride_w +
                                                      output * array.stride_c
                                                : corner + out_row * array.stride_h + out_column * array.stride_w;
            f(exists, to, std::is_same_v<M, T> && copied ? reinterpret_cast<const M*>(to) : from);
        }
    };
    const auto put = [=](T* to, int t, float mask) { to[t * kOutputs] = narrow<T>(scale * mask); };
    const bool plain = !p.from_logits || p.normalizer == CARAFEPP_NONE;
    with_masks<T>(array, [&](auto mask) {
        using M = decltype(mask);
        if (plain || p.normalizer == CARAFEPP_SOFTMAX) {
            for_each_output(mask, [&](bool exists, T* to, const M* from) {
                float taps[kTaps] = {};
                if (exists) {
#pragma unroll
                    for (int t = 0; t < kTaps; t++, from += step) taps[t] = widen(*from);
                    if (!plain) softmax(taps);
                }
#pragma unroll
                for (int t = 0; t < kTaps; t++) put(to, t, taps[t]);
            });
        } else {
            for_each_output(mask, [&](bool exists, T* to, const M* from) {
                const auto logit = [=](int t) { return widen(from[t * step]); };
                if (exists) normalize_by_sigmoid<K>(p.normalizer, logit, [=](int t, float m) { put(to, t, m); });
                for (int t = exists ? kTaps : 0; t < kTaps; t++) put(to, t, 0);
            });
        }
    });
}

// A lane's pairs of all band matrices that lead to a warp's pixels: from outputs of four sources in a row to the pixels
// of a half.
template <int K, class Tile>
struct Bands {
    static constexpr int kRows = K + kRowsOfHalf - 1;  // of sources that reach a half

    uint32_t of[kHalves][kRows][kFours][kUp];

    // From the staged masks of the tile.
    template <class T>
    __device__ __forceinline__ Bands(const T* staged, PixelsOfWarp<Tile> own) {
        const int y = own.lane / 4 / kOfWarp, x = own.lane / 4 % kOfWarp;  // the lane's pixel of a half
        staged += (own.row * Tile::kSourceColumns + own.column) * K * K * kOutputs;
#pragma unroll
        for (int four = 0; four < kFours; four++) {
            const int source = four * kFour + own.lane % 4;
            const int b = x - source + kBeforeTile + K / 2;  // the tap that leads to the pixel
#pragma unroll
            for (int half = 0; half < kHalves; half++) {
#pragma unroll
                for (int s = 0; s < kRows; s++) {
                    const int a = y - s + K - 1;
                    uint2 pairs = make_uint2(0, 0);
                    if (a >= 0 && a < K && b >= 0 && b < K) {
                        const int at = (half * kRowsOfHalf + s) * Tile::kSourceColumns + source;
                        pairs = *reinterpret_cast<const uint2*>(staged + ((at * K + a) * K + b) * kOutputs);
                    }
                    of[half][s][four][0] = pairs.x;
                    of[half][s][four][1] = pairs.y;
                }
            }
        }
    }
};

// ---- slices of channels ----

// Are both elements of a word finite? Adding 1 to an exponent of ones carries into the sign.
template <class T>
__device__ __forceinline__ bool are_finite(uint32_t word) {
    constexpr uint32_t kLowestOfExponent = std::is_same_v<T, Float16> ? 0x04000400 : 0x00800080;
    return (((word & 0x7fff7fff) + kLowestOfExponent) & 0x80008000) == 0;
}

// The products of a slice with a warp's bands. In those of mma.m16n8k16 rows are channels and columns are the pixels of
// a half. The sum is over the outputs of four sources, the upper ones first.
template <int K, class Slice, class OfTile, class T>
__device__ __forceinline__ void multiply_slice(const Slice& slice, const OfTile& bands, const T* grads, float unscale,
                                               T* results) {
#pragma unroll 1
    for (int first = 0; first < Slice::kChannels; first += kChannelsOfMma) {
        float sums[kHalves][4] = {};
#pragma unroll
        for (int y = 0; y < kOfWarp + K - 1; y++) {
#pragma unroll
            for (int four = 0; four < kFours; four++) {
                uint32_t words[4];
                slice.load(grads, first, y, four, words);
#pragma unroll
                for (int half = 0; half < kHalves; half++) {
                    const int s = y - half * kRowsOfHalf;
                    if (s >= 0 && s < OfTile::kRows) multiply_add<T>(sums[half], words, bands.of[half][s][four]);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kHalves * 4; k++) sums[k / 4][k % 4] *= unscale;
        slice.put(sums, first, results);
    }
}

// Computes the sums of a thread again that are not finite.
template <class T, class Slice>
__device__ __forceinline__ void compute_again(const Problem& p, const Array& grad_features, const Tiles& plan,
                                              int64_t item, const Slice& slice) {
    const TileOfItem again(p, plan, computed_late(item));
    slice.for_each_stored(again.channels, [&](int channel, int row, int column) {
        const int i = again.top + row, j = again.left + column;
        if (i >= p.features.h || j < 0 || j >= p.features.w) return;
        T* const at = element<T>(grad_features, again.n, again.c + channel, i, j);
        if (!(fabsf(widen(*at)) < INFINITY))
            *at = narrow<T>(feature_tap_by_tap<T>(p, again.n, again.group, again.c + channel, i, j));
    });
}

// The kernel. A Slice knows how gradients and results of a slice lie in memory. With two buffers of gradients the next
// slice arrives while this one is multiplied.
//
//     Slice(p, grad_features, tile)
//     copy(p, channels, grads)                     the next slice of grad_output, 0 where there is none
//     load(grads, first, row, four, words)         [row of outputs][eight channels] of sources that reach a warp
//     put(sums, first, results)                    the warp's sums
//     store(grad_features, channels, results)      the next slice of the result; notes if it is `finite`
//     for_each_stored(channels, f)                 calls f(channel, row, column) for the thread's results
//
// `channels` are those of the slice and behind it; `first` is the first of a product.
template <int K, class T, class Slice>
__device__ __forceinline__ void compute_grad_features(const Problem& p, const Array& grad_features, const Tiles& plan) {
    using Tile = typename Slice::Tile;
    using OfTile = Bands<K, Tile>;
    T* const buffers = shared_memory<T>();  // of gradients; before them, all masks
    T* const results = buffers + Slice::kBuffers * Slice::kGrads;
    const float scale = scale_of_masks<T>(p), unscale = 1 / scale;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        Slice slice(p, grad_features, tile);
        stage_masks_of_tile<K, Tile>(p, tile, scale, buffers);
        __syncthreads();
        const OfTile bands(buffers, PixelsOfWarp<Tile>());
        __syncthreads();
        T *grads = buffers, *next = buffers + (Slice::kBuffers - 1) * Slice::kGrads;
        slice.copy(p, tile.channels, grads);
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= Slice::kChannels) {
            const int behind = channels - Slice::kChannels;
            wait_for_copies();
            __syncthreads();
            if (Slice::kBuffers == 2 && behind > 0) slice.copy(p, behind, next);
            __syncwarp();  // lanes diverge in copies
            multiply_slice<K>(slice, bands, grads, unscale, results);
            __syncthreads();
            if (Slice::kBuffers == 1 && behind > 0) slice.copy(p, behind, next);
            slice.store(grad_features, channels, results);
            T* const multiplied = grads;
            grads = next;
            next = multiplied;
        }
        if (!slice.finite) compute_again<T>(p, grad_features, plan, item, slice);
        __syncthreads();
    }
}

// The shared memory of a block.
template <class Slice, int K>
constexpr int64_t kBytesOfBlock = int64_t{sizeof(uint16_t)} *
                                  std::max(Slice::Tile::kSources * K * K * kOutputs,
                                           Slice::kBuffers* Slice::kGrads + Slice::kResults);

// Queues a kernel of K and T for a problem; `before`: see Tiles.
template <class Slice, int K>
void launch_grad_features(void (*kernel)(Arguments, Tiles), const Problem& p, const Array& grad_features, int before) {
    using Tile = typename Slice::Tile;
    const Tiles plan = with_even_items(
        Tiles(p, p.features.h, p.features.w, Tile::kRows, Tile::kColumns, Slice::kChannels, 0, before),
        Slice::kChannels, kSlicesToStage, Slice::kBuffers == 1 ? 2 : 1);
    launch(kernel, plan.items, Tile::kThreads, kBytesOfBlock<Slice, K>, p, grad_features, plan);
}

}  // namespace carafepp::cuda
