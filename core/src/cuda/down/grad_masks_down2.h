// SPDX-License-Identifier: Apache-2.0
// The gradients of masks and logits for down x2. A block has a tile of outputs, and goes through all channels a slice
// at a time. It copies the slice's features, with their halo, and its gradients into shared memory. The next slice
// arrives while one is contracted. All sums stay in registers until the last slice. Then they meet in shared memory,
// and a thread carries those of an output through the normaliser.
#pragma once

#include "cuda/down/tile_down2.h"
#include "cuda/grad_masks.h"

namespace carafepp::cuda {

constexpr int kTileRows = 4;  // of outputs
constexpr int kPair = 2;      // rows of outputs, of which a window is K + kDown rows high
constexpr int kPairs = kTileRows / kPair;

// Tiles of at most `columns`, whose items have all channels of a group.
constexpr int kAllChannels = INT32_MAX;
inline Tiles tiles_in_all_channels(const Problem& p, const Array& grad_masks, int columns, int step) {
    return {p, grad_masks.h, grad_masks.w, kTileRows, even_columns(grad_masks.w, columns, step), kAllChannels, 0};
}

// Why these kernels do not take a problem.
inline const char* not_for_grad_masks_down2(const Problem& p) {
    if (const char* reason = not_for_down2(p)) return reason;
    return p.features.c > kAllChannels ? "channels are too many" : nullptr;
}

// ---- the end of a tile: its sums are in shared memory, as [output][tap] ----

// Room for the sums and the logits of a tile whose rows are `Columns` apart.
template <int K, int Columns>
constexpr int64_t kBytesOfSums = 2 * int64_t{kTileRows} * Columns * K * K * sizeof(float);

// Carries the gradients of masks through the normaliser and writes them. Begins and ends with a barrier.
template <int K, int Columns, int Threads, class T>
__device__ __forceinline__ void finish_tile(const Problem& p, const TileOfItem& tile, int columns, float* sums,
                                            const Array& grad_masks) {
    constexpr int kTaps = K * K, kOutputs = kTileRows * Columns;
    static_assert(kOutputs <= Threads, "a thread has an output");
    const auto place_in = [&](const Array& array) {
        const int rows = static_cast<int>(min(array.h - tile.top, int64_t{kTileRows}));
        const int there = static_cast<int>(min(array.w - tile.left, int64_t{columns}));
        return [=, &array](int tap, int output) {
            const int row = output / Columns, column = output % Columns;
            return StagedElement{row * array.stride_h + column * array.stride_w + tap * array.stride_c,
                                 output * kTaps + tap, row < rows && column < there};
        };
    };
    const bool normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
    float* const logits = sums + kOutputs * kTaps;
    if (normalized) {
        with_masks<T>(p.logits, [&](auto mask) {
            copy_grid<Threads>(element<const decltype(mask)>(p.logits, tile.n, tile.group * kTaps, tile.top, tile.left),
                               kTaps, kOutputs, p.logits.stride_w <= p.logits.stride_c, place_in(p.logits), logits);
        });
    }
    __syncthreads();
    const int output = thread_computed_late();
    if (output < kOutputs) {
        const int i = tile.top + output / Columns, j = tile.left + output % Columns;
        const bool computed = i < p.out_h && j < p.out_w;  // or a crop leaves it out
        float* const own = sums + output * kTaps;
        float grad[1][kTaps];
        load_each(own, 1, grad[0]);
        const auto clear = [&](float (&taps)[kTaps]) {
            if (!window_inside<K>(p, i * kDown, j * kDown)) clear_taps_outside<K>(p, i * kDown, j * kDown, taps);
        };
        if (normalized) {
            through_normalizer<K>(p.normalizer, logits + output * kTaps, 1, grad, clear);
        } else {
            clear(grad[0]);
        }
#pragma unroll
        for (int t = 0; t < kTaps; t++) own[t] = computed ? grad[0][t] : 0;
    }
    __syncthreads();
    with_masks<T>(grad_masks, [&](auto mask) {
        using M = decltype(mask);
        M* const to = element<M>(grad_masks, tile.n, tile.group * kTaps, tile.top, tile.left);
        const auto place = place_in(grad_masks);
        Walk<Threads> walk(kTaps, kOutputs, grad_masks.stride_w <= grad_masks.stride_c);
        for (; walk.in_grid(); walk.advance()) {
            const StagedElement at = place(walk.row(), walk.column());
            if (at.exists) to[at.from] = narrow<M>(sums[at.to]);
        }
    });
    __syncthreads();
}

// ---- with adjacent columns ----

// Rows of a tile have 28 outputs at most. A slice has all columns of features that their windows reach, from kBefore
// ahead of the first output's source on.
constexpr int kMostColumns = 28, kWidth = kBefore + kDown * kMostColumns + 4;
template <int K>
constexpr int kHeight = kDown * (kTileRows - 1) + K;

struct ColumnsDown2Plan {
    Tiles tiles;
    bool fours;  // columns of features are copied four at once, or else two
    int copied;  // columns of grad_output at once: 4, 2 or 1

    ColumnsDown2Plan(const Problem& p, const Array& grad_masks)
        : tiles(tiles_in_all_channels(p, grad_masks, kMostColumns, 4)),
          fours(not_for_columns(p.features, 4) == nullptr),
          copied(columns_at_once(p.grad_output)) {}
};

inline const char* not_for_columns_down2(const Problem& p) {
    if (const char* reason = not_for_grad_masks_down2(p)) return reason;
    for (const Array* array : {&p.features, &p.grad_output}) {
        if (array->empty()) continue;
        if (array->stride_w != 1) return "columns are not adjacent";
        if (std::abs(array->stride_h) > INT32_MAX) return "rows are too far apart";
    }
    return not_for_columns(p.features);
}

// A thread copies this of each slice of an array: `Rows` rows of some columns, `count` at once, in some channels.
// place( channel, row, column) is where an element goes in shared memory. It is 0 where there is none.
template <int Rows, int Width, int Channels, int Threads, class T, class Place>
class CopiesOfColumns {
public:
    // From row i and column j on, up to column j + `most`.
    __device__ __forceinline__ CopiesOfColumns(const Array& array, const TileOfItem& tile, int i, int j, int most,
                                               int count)
        : stride_c_(array.stride_c), stride_h_(static_cast<int>(array.stride_h)), count_(count) {
        const int lanes = Width / count, thread = thread_computed_late(), x = thread % lanes * count;
        // Whole eights: channels so far apart have places that are equally far apart.
        at_once_ = Threads / lanes > 8 ? Threads / lanes / 8 * 8 : Threads / lanes;
        channel_ = thread / lanes < at_once_ ? thread / lanes : Channels;
        from_ = element<const T>(array, tile.n, tile.c + channel_, i, j + x);
        to_ = Place()(channel_, 0, x);
        rows_ = 0;
        if (x < most && j + x >= 0 && j + x < array.w) {
#pragma unroll
            for (int y = 0; y < Rows; y++) rows_ |= static_cast<uint32_t>(i + y >= 0 && i + y < array.h) << y;
        }
    }

    // Copies the next slice, of which `channels` channels exist.
    __device__ __forceinline__ void copy(int channels, T* staged) {
        staged += to_;
        if (count_ == 4) {  // the usual case
            if (channel_ < Channels) copy_rows_of<4, Rows>(from_, channel_ < channels ? rows_ : 0, staged);
        } else {
            const T* from = from_;
#pragma unroll 1
            for (int channel = channel_; channel < Channels; channel += at_once_) {
                const uint32_t rows = channel < channels ? rows_ : 0;
                if (count_ == 2) {
                    copy_rows_of<2, 1>(from, rows, staged);
                } else {
                    copy_rows_of<1, 1>(from, rows, staged);
                }
                from += at_once_ * stride_c_;
                staged += Place()(at_once_, 0, 0);
            }
        }
        from_ += Channels * stride_c_;
    }

private:
    template <int Count, int Unrolled>
    __device__ __forceinline__ void copy_rows_of(const T* from, uint32_t rows, T* staged) const {
#pragma unroll(Unrolled)
        for (int y = 0; y < Rows; y++)
            copy_columns<Count>(staged + Place()(0, y, 0), at_stride(from, stride_h_, y), (rows >> y & 1) != 0);
    }

    const T* from_;
    int64_t stride_c_;
    int stride_h_, count_, at_once_, channel_, to_;
    uint32_t rows_;  // that exist, as bits
};

// The copies of a tile. Features and Grads tell the places of elements.
template <int K, int Channels, int Threads, class T, class Features, class Grads>
struct CopiesOfTile {
    CopiesOfColumns<kHeight<K>, kWidth, Channels, Threads, T, Features> of_features;
    CopiesOfColumns<kTileRows, kMostColumns, Channels, Threads, T, Grads> of_grads;

    __device__ __forceinline__ CopiesOfTile(const Problem& p, const ColumnsDown2Plan& plan, const TileOfItem& tile)
        : of_features(p.features, tile, tile.top * kDown - K / 2, tile.left * kDown - kBefore,
                      kBefore + kDown * plan.tiles.columns + 4, plan.fours ? 4 : 2),
          of_grads(p.grad_output, tile, tile.top, tile.left, plan.tiles.columns, plan.copied) {}

    // Copies the next slice, unless there is none.
    __device__ __forceinline__ void copy(int channels, T* features, T* grads) {
        if (channels <= 0) return;
        of_features.copy(channels, features);
        of_grads.copy(channels, grads);
    }
};

// ---- on tensor cores ----

// A warp has four columns of outputs in all rows of a tile. The products of row y of the windows of two rows of outputs
// are sums[pair][y]. Their rows are 16 pixels, and their columns outputs, the upper row's first.
constexpr int kColumnsOfWarp = 4;
template <int K>
using Band = float[kPairs][K + kDown][4];

// Adds the products of row y of the windows of all outputs of a warp, over 16 channels. `outputs` are fragments of the
// gradients of two rows.
template <int K, class T>
__device__ __forceinline__ void add_row(int y, const uint32_t (&pixels)[4], const uint32_t (&outputs)[kPairs][2],
                                        Band<K>& sums) {
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
        const int of_pair = y - pair * kPair * kDown;
        if (of_pair >= 0 && of_pair < K + kDown) multiply_add<T>(sums[pair][of_pair], pixels, outputs[pair]);
    }
}

// Stages what is gradient of masks in the products, as [output][tap]. The first window begins at pixel `Before`, and
// the columns of a warp at `first`.
template <int K, int Columns, int Before>
__device__ __forceinline__ void stage_band(const Band<K>& sums, int first, float* staged) {
    const int lane = thread_computed_late() % 32, pixel = lane / 4, lower = lane % 4 / 2;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const int x = lane % 2 * 2 + q;
        if (first + x >= Columns) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int b = pixel + half * 8 - Before - kDown * x;
            if (b < 0 || b >= K) continue;
            float* const to = staged + ((lower * Columns + first + x) * K - lower * kDown) * K + b;
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
#pragma unroll
                for (int y = 0; y < K + kDown; y++) {
                    if (lower ? y >= kDown : y < K)
                        to[(pair * kPair * Columns * K + y) * K] = sums[pair][y][half * 2 + q];
                }
            }
        }
    }
}

}  // namespace carafepp::cuda
