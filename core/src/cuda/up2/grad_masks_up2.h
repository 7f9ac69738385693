// SPDX-License-Identifier: Apache-2.0
// The gradients of masks and logits for up x2. A block has a tile of 4 x 16 sources. It goes through the channels a
// slice at a time, and copies each slice's features with their halo, and the gradients, into shared memory. Then each
// thread has the gradients of the masks of two neighbouring outputs, which it carries through the normaliser.
#pragma once

#include "cuda/columns.h"
#include "cuda/grad_masks.h"
#include "cuda/up2/stage_masks_up2.h"

namespace carafepp::cuda {

// A tile of 4 x 16 sources. Thread r * kSourcesOfTile + s finishes the two outputs in row r of source s.
constexpr int kTileRows = 4, kTileColumns = 16, kSourcesOfTile = kTileRows * kTileColumns;
static_assert(kBlock == kSourcesOfTile * kUp, "each thread finishes two outputs");

struct SourcesPlan {
    uint32_t tile_rows, tiles, groups;  // of an image, of a row, of the channels
    int channels;                       // of a group
    int columns_of_warp;                // without tensor cores
    int64_t items;

    explicit SourcesPlan(const Problem& p)
        : tile_rows(static_cast<uint32_t>(ceil_div(p.features.h, kTileRows))),
          tiles(static_cast<uint32_t>(ceil_div(p.features.w, kTileColumns))),
          groups(static_cast<uint32_t>(p.groups)),
          channels(static_cast<int>(p.features.c / p.groups)),
          columns_of_warp(carafepp::cuda::columns_of_warp(p, 32, 32 / kTileRows)),
          items(p.features.n * p.groups * tile_rows * tiles) {}
};

// Why these kernels do not take a problem: they count tiles and channels in 32 bits, and places in a tile.
inline const char* not_for_source_tiles(const Problem& p, const Array& grad_masks) {
    const int64_t images = p.features.n * p.groups, rows = ceil_div(p.features.h, kTileRows) + 1;
    if (images > INT32_MAX / rows / (ceil_div(p.features.w, kTileColumns) + 1)) return "tiles are too many";
    if (p.features.c > INT32_MAX) return "channels are too many";
    const auto larger = [](int64_t stride, int64_t most) { return stride > most || stride < -most; };
    for (const Array* array : {&p.features, &p.grad_output, &p.logits, &grad_masks}) {
        if (array->empty()) continue;
        if (larger(array->stride_c, INT32_MAX / kOutputs)) return "channels are too far apart";
        if (larger(array->stride_h, INT32_MAX / 32) || larger(array->stride_w, INT32_MAX / 32))
            return "pixels are too far apart";
    }
    return nullptr;
}

// The tile of an item, in all channels of a group.
struct SourcesOfBlock {
    int64_t n, group, c;  // the first channel
    int top, left;

    __device__ __forceinline__ SourcesOfBlock(const SourcesPlan& plan, int64_t item) {
        const uint32_t number = static_cast<uint32_t>(item), row = number / plan.tiles, image = row / plan.tile_rows;
        left = static_cast<int>(number % plan.tiles) * kTileColumns;
        top = static_cast<int>(row % plan.tile_rows) * kTileRows;
        n = image / plan.groups;
        group = image % plan.groups;
        c = group * plan.channels;
    }
    __device__ __forceinline__ SourcesOfBlock(int64_t n, int64_t group, int64_t c, int top, int left)
        : n(n), group(group), c(c), top(top), left(left) {}
};

// ---- the contraction ----

constexpr int kHaloRows = 2 * kWarps, kHaloColumns = kTileColumns + 5 - 1, kOutputRows = kTileRows * kUp;
static_assert(kHaloRows >= kTileRows + 5 - 1, "the halo of 5 x 5 taps");

// Copies features of a tile with its halo, with adjacent channels. Four lanes have the vectors of a pixel. A thread has
// every other pixel of a column, and one of the columns beside the tile. In shared memory pixels and vectors are
// `PixelsApart` and `VectorsApart`.
template <int K, int Vector, int PixelsApart, int VectorsApart, class T>
struct HaloOfVectors {
    static constexpr int kLanes = 4, kRowsAtOnce = kBlock / kLanes / kTileColumns, kSteps = kHaloRows / kRowsAtOnce;
    static_assert(kHaloRows * 4 == kBlock / kLanes, "a thread has one pixel beside the tile");

    const T* inner;
    int outer;  // from `inner` on
    int stride_h;
    uint32_t exist;  // of bit k the inner pixel of step k, of bit kSteps the outer one
    int to_inner, to_outer;

    __device__ __forceinline__ HaloOfVectors(const Problem& p, const SourcesOfBlock& tile, int thread) {
        const int vector = thread % kLanes, pixel = thread / kLanes;
        const int y = pixel / kTileColumns, x = pixel % kTileColumns + K / 2;
        const int outer_y = pixel / 4, side = pixel % 4, outer_x = side < K / 2 ? side : side + kTileColumns;
        const int left = tile.left - K / 2, i = tile.top - K / 2 + outer_y, j = left + outer_x;
        const int top = tile.top - K / 2 + y;
        const bool outer_exists = outer_x < kTileColumns + K - 1 && i >= 0 && i < p.features.h && j >= 0 &&
                                  j < p.features.w;
        exist = static_cast<uint32_t>(outer_exists) << kSteps;
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
            const int row = top + k * kRowsAtOnce;
            exist |= static_cast<uint32_t>(left + x < p.features.w && row >= 0 && row < p.features.h) << k;
        }
        inner = element<const T>(p.features, tile.n, tile.c + vector * Vector, top, left + x);
        stride_h = static_cast<int>(p.features.stride_h);
        outer = (outer_y - y) * stride_h + (outer_x - x) * static_cast<int>(p.features.stride_w);
        to_inner = (y * kHaloColumns + x) * PixelsApart + vector * VectorsApart;
        to_outer = (outer_y * kHaloColumns + outer_x) * PixelsApart + vector * VectorsApart;
    }

    // Copies the next `channels` channels, of which this thread has some or none; 0 outside.
    __device__ __forceinline__ void copy(int channels, bool has_some, T* slice) {
        const uint32_t copied = has_some ? exist : 0;
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
            copy_async<Vector * sizeof(T)>(slice + to_inner + k * kRowsAtOnce * kHaloColumns * PixelsApart,
                                           at_stride(inner, stride_h, k * kRowsAtOnce), (copied >> k & 1) != 0);
        }
        copy_async<Vector * sizeof(T)>(slice + to_outer, inner + outer, (copied >> kSteps & 1) != 0);
        inner += channels;
    }
};

// Without tensor cores two threads share a source: each has two vectors of four channels of a slice, its own. Of 7 x 7
// taps it has only the row in the middle in these, and three rows above or below in all vectors: so registers suffice.
// A warp has half of the columns of a tile, or half of its rows.
constexpr int kParts = kBlock / kSourcesOfTile, kOwnVectors = 2, kVectors = kParts * kOwnVectors;
constexpr int kSlice = kVectors * kVector;  // channels

template <int K>
struct PartOfSource {
    static constexpr int kRows = K < 7 ? 0 : K / 2;  // of taps, in all vectors
    static constexpr int kMiddleRows = K - 2 * kRows;
    static constexpr int kTaps = (kRows + kMiddleRows) * K;                    // first those in all vectors
    static constexpr int kVectors = kRows > 0 ? cuda::kVectors : kOwnVectors;  // its own first

    // The number in its slice of a part's vector v.
    static __device__ __forceinline__ int vector(int part, int v) {
        return (v < kOwnVectors ? part : kParts - 1 - part) * kOwnVectors + v % kOwnVectors;
    }
};

// The features of a slice, with the halo of a tile, in shared memory: [vector][row][column][channel]. Vectors begin in
// different banks. Four lanes have the vectors of a pixel, or the channels of a vector; they copy every 32nd pixel.
// `Count` channels are copied at once.
template <int K, int Count, class T>
struct HaloOfTile {
    static constexpr int kWidth = kTileColumns + K - 1, kPixels = (kTileRows + K - 1) * kWidth;
    static constexpr int kLanes = 4, kAtOnce = kBlock / kLanes, kSteps = static_cast<int>(ceil_div(kPixels, kAtOnce));
    static constexpr int kVectorsApart = kSteps * kAtOnce * kVector + 2 * kVector, kElements = kVectors * kVectorsApart;

    static constexpr bool kStaged = K == 7;                        // for places of pixels registers do not suffice
    static constexpr int64_t kBytes = 2 * kElements * sizeof(T) +  // of two slices
                                      (kStaged ? kSteps * kBlock * sizeof(int) : 0);

    const T* from;      // of the tile's first source
    int kept[kSteps];   // pixels from there on
    int* const staged;  // the same in shared memory
    uint32_t exist;     // of bit k the pixel of step k
    int to;

    __device__ __forceinline__ HaloOfTile(const Problem& p, const SourcesOfBlock& tile, int thread, T* slices)
        : staged(reinterpret_cast<int*>(slices + 2 * kElements) + thread) {
        const int lane = thread % kLanes, pixel = thread / kLanes;
        const int stride_h = static_cast<int>(p.features.stride_h), stride_w = static_cast<int>(p.features.stride_w);
        from = element<const T>(p.features, tile.n, tile.c + lane * Count, tile.top, tile.left);
        to = pixel * kVector + lane * (Count == kVector ? kVectorsApart : 1);
        exist = 0;
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
            const int number = pixel + k * kAtOnce, y = number / kWidth - K / 2, x = number % kWidth - K / 2;
            const int i = tile.top + y, j = tile.left + x;
            const bool exists = number < kPixels && i >= 0 && i < p.features.h && j >= 0 && j < p.features.w;
            exist |= static_cast<uint32_t>(exists) << k;
            apart(k) = exists ? y * stride_h + x * stride_w : 0;
        }
    }

    __device__ __forceinline__ int& apart(int k) {
        if constexpr (kStaged) return staged[k * kBlock];
        return kept[k];
    }

    // Copies `Count` channels of the thread's pixels, if they exist; else 0.
    __device__ __forceinline__ void copy(bool channels_exist, T* slice) {
        const uint32_t copied = channels_exist ? exist : 0;
#pragma unroll
        for (int k = 0; k < kSteps; k++)
            copy_elements<Count>(slice + to + k * kAtOnce * kVector, from + apart(k), (copied >> k & 1) != 0);
    }
};

struct OwnSource {
    int part, row, column;
    int first_row, first_column;  // of the warp

    __device__ __forceinline__ OwnSource(const SourcesPlan& plan, int thread) {
        const bool wide = plan.columns_of_warp == kTileColumns;
        const int lane = thread % 32, warp = thread / 32 % kParts;
        part = thread / kSourcesOfTile;
        first_row = wide ? warp * (kTileRows / kParts) : 0;
        first_column = wide ? 0 : warp * (kTileColumns / kParts);
        row = first_row + lane / plan.columns_of_warp;
        column = first_column + lane % plan.columns_of_warp;
    }
    // Its window in the features of a slice.
    template <class Halo>
    __device__ __forceinline__ int window() const {
        return (row * Halo::kWidth + column) * kVector;
    }
    // All sources of its warp are beyond the last row or column.
    __device__ __forceinline__ bool idle(const Problem& p, const SourcesOfBlock& tile) const {
        return tile.top + first_row >= p.features.h || tile.left + first_column >= p.features.w;
    }
};

// sums[output][tap] += grad * features, over four channels, of rows of taps: `first` is the feature of the first tap.
template <int K, int Rows, int FirstTap, int Width, class T, int Taps>
__device__ __forceinline__ void add_rows(const T* first, const float (&grad)[kVector][kOutputs],
                                         float (&sums)[kOutputs][Taps]) {
#pragma unroll
    for (int t = 0; t < Rows * K; t++) {
        const float4 vector = staged_channels(first + (t / K * Width + t % K) * kVector);
        const float feature[kVector] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int q = 0; q < kVector; q++) {
#pragma unroll
            for (int o = 0; o < kOutputs; o++) sums[o][FirstTap + t] += grad[q][o] * feature[q];
        }
    }
}

// Adds the products of a part's vector v: `window` is its source's in the features of a slice.
template <int K, class Halo, class T>
__device__ __forceinline__ void add_window(const T* window, int part, int v, const float (&grad)[kVector][kOutputs],
                                           float (&sums)[kOutputs][PartOfSource<K>::kTaps]) {
    using Part = PartOfSource<K>;
    constexpr int kRow = Halo::kWidth * kVector;
    window += Part::vector(part, v) * Halo::kVectorsApart;
    add_rows<K, Part::kRows, 0, Halo::kWidth>(window + part * (K - Part::kRows) * kRow, grad, sums);
    if (v < kOwnVectors)
        add_rows<K, Part::kMiddleRows, Part::kRows * K, Halo::kWidth>(window + Part::kRows * kRow, grad, sums);
}

// Room for a pair for each tap and thread, in shared memory. Taps are so far apart that neighbouring ones of a source
// are in different banks.
constexpr int kPairsApart = kBlock + 2;
template <int K>
constexpr int64_t kBytesOfPairs = K * K * kPairsApart * sizeof(float2);

// The other thread of the source gets the sums of its row of outputs, the last two. `grad` are those of this thread's
// row, of all taps and channels. Begins with a barrier.
template <int K>
__device__ __forceinline__ void exchange_sums(const float (&sums)[kOutputs][PartOfSource<K>::kTaps], int thread,
                                              int part, float2* pairs, float (&grad)[kUp][K * K]) {
    using Part = PartOfSource<K>;
    constexpr int kMiddle = Part::kRows * K;  // the first tap there
    const float2* const own = pairs + thread;
    const int first = part * (K - Part::kRows) * K * kPairsApart;  // tap, but for those in the middle
    float2* const others = pairs + (thread ^ kSourcesOfTile);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < Part::kTaps; t++) {
        const int to = t < kMiddle ? first : 0;
        others[to + t * kPairsApart] = make_float2(sums[kUp][t], sums[kUp + 1][t]);
        if (t < kMiddle) pairs[thread + to + t * kPairsApart] = make_float2(sums[0][t], sums[1][t]);
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < K * K; t++) {
        const float2 pair = own[t * kPairsApart];
        const bool both = t >= kMiddle && t < Part::kTaps;
        grad[0][t] = both ? sums[0][t] + pair.x : pair.x;
        grad[1][t] = both ? sums[1][t] + pair.y : pair.y;
    }
}

// The gradients of the masks of a thread's outputs, from its pairs.
template <int K>
__device__ __forceinline__ void load_pairs(const float2* own, float (&grad)[kUp][K * K]) {
#pragma unroll
    for (int t = 0; t < K * K; t++) {
        const float2 pair = own[t * kPairsApart];
        grad[0][t] = pair.x;
        grad[1][t] = pair.y;
    }
}

// Writes the band of a warp's products to the pairs of all threads. A warp has four columns of a tile. sums[s][a] are
// the products of a row of its sources and row a of their windows: rows are outputs, those of the upper row first, and
// columns are pixels, from `Before` pixels ahead of the first window on.
template <int K, int Before>
__device__ __forceinline__ void stage_band(const float (&sums)[kTileRows][K][4], int thread, float2* pairs) {
    const int warp = thread / 32, row = thread % 32 / 4, pair = thread % 4, column = row / kUp;  // of four sources
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const int b = 2 * pair + q - column - Before;
        if (b < 0 || b >= K) continue;
        float2* const first = pairs + b * kPairsApart + warp * (kTileColumns / kWarps) + column;
#pragma unroll
        for (int s = 0; s < kTileRows; s++) {
#pragma unroll
            for (int a = 0; a < K; a++) {
#pragma unroll
                for (int r = 0; r < kUp; r++) {
                    float2* const to = first + a * K * kPairsApart + r * kSourcesOfTile + s * kTileColumns;
                    reinterpret_cast<float*>(to)[row % kUp] = sums[s][a][r * 2 + q];
                }
            }
        }
    }
}

// ---- the normaliser ----

__device__ __forceinline__ bool is_normalized(const Problem& p) {
    return p.from_logits && p.normalizer != CARAFEPP_NONE;
}

// The place of the two outputs of a thread.
struct OwnOutputsPlace {
    int64_t n, group;
    int i, j, r;  // source, and the row of its outputs

    template <int K, class M>
    __device__ __forceinline__ M* first_of(const Problem& p, const Array& array) const {
        return p.from_logits ? element<M>(array, n, group * K * K * kOutputs + r * kUp, i, j)
                             : element<M>(array, n, group * K * K, int64_t{i} * kUp + r, int64_t{j} * kUp);
    }
    __device__ __forceinline__ bool exists(const Problem& p) const { return i < p.features.h && j < p.features.w; }
    __device__ __forceinline__ bool computed(const Problem& p, int q) const {
        return exists(p) && i * kUp + r < p.out_h && j * kUp + q < p.out_w;
    }
};

// Carries the gradients of the masks of this thread's outputs, whose logits are own[t * step], through the normaliser.
// Taps beyond borders get no gradient, whatever it is there.
template <int K>
__device__ __forceinline__ void through_normalizer(const Problem& p, const OwnOutputsPlace& at, float2* own, int step,
                                                   float (&grad)[kUp][K * K]) {
    const auto clear = [&](auto& of_output) {
        if (!window_inside<K>(p, at.i, at.j)) clear_taps_outside<K>(p, at.i, at.j, of_output);
    };
    if (is_normalized(p)) return through_normalizer<K>(p.normalizer, own, step, grad, clear);
#pragma unroll
    for (auto& of_output : grad) clear(of_output);
}

__device__ __forceinline__ void store_mask(float value, float* to) { __stcs(to, value); }
template <class M>
__device__ __forceinline__ void store_mask(float value, M* to) {
    __stcs(&to->bits, narrow<M>(value).bits);
}

// Carries the gradients of the masks of this thread's outputs through the normaliser and writes them, with adjacent
// columns.
template <int K, class T>
__device__ __forceinline__ void finish_two_outputs(const Problem& p, const OwnOutputsPlace& at,
                                                   float (&grad)[kUp][K * K], float2* own, const Array& grad_masks) {
    const bool exists = at.exists(p);
    const int logits_apart = exists ? static_cast<int>(p.logits.stride_c) : 0,
              apart = exists ? static_cast<int>(grad_masks.stride_c) * (p.from_logits ? kOutputs : 1) : 0;
    if (!exists) return;
    if (is_normalized(p)) {
        with_masks<T>(p.logits, [&](auto mask) {
            using M = const decltype(mask);
            M* left = at.template first_of<K, M>(p, p.logits);
            M* right = at_stride(left, logits_apart, 1);
#pragma unroll
            for (int t = 0; t < K * K; t++) {
                own[t * kPairsApart] = make_float2(widen(load_input(left)), widen(load_input(right)));
                left = at_stride(left, logits_apart, kOutputs);
                right = at_stride(right, logits_apart, kOutputs);
            }
        });
    }
    through_normalizer<K>(p, at, own, kPairsApart, grad);
    with_masks<T>(grad_masks, [&](auto mask) {
        using M = decltype(mask);
        M* const first = at.template first_of<K, M>(p, grad_masks);
#pragma unroll
        for (int q = 0; q < kUp; q++) {
            M* to = first + q * (p.from_logits ? grad_masks.stride_c : grad_masks.stride_w);
            if (at.computed(p, q)) {
#pragma unroll
                for (int t = 0; t < K * K; t++, to = at_stride(to, apart, 1)) store_mask(grad[q][t], to);
            } else if (p.from_logits) {  // a crop leaves it out
#pragma unroll 1
                for (int t = 0; t < K * K; t++, to = at_stride(to, apart, 1)) *to = M{};
            }
        }
    });
}

template <int K>
struct Lines {
    static constexpr int kSize = K * K * kOutputs;
    static_assert(kSize % 32 == 4, "neighbouring lines begin in different banks");
};

// Finds elements of lines in an array of the shape of masks or logits, from the first source of a tile on.
template <int K>
class LinesInArray {
public:
    __device__ __forceinline__ LinesInArray(const Problem& p, const Array& array, const SourcesOfBlock& tile)
        : array_(array), from_logits_(p.from_logits) {
        const int rows = static_cast<int>(p.features.h) - tile.top,
                  columns = static_cast<int>(p.features.w) - tile.left;
        rows_ = from_logits_ ? rows : min(rows * kUp, static_cast<int>(p.out_h) - tile.top * kUp);
        columns_ = from_logits_ ? columns : min(columns * kUp, static_cast<int>(p.out_w) - tile.left * kUp);
    }

    // The element of a source that is number `index` in the order of the array's channels. A crop leaves out masks, but
    // no logits.
    __device__ __forceinline__ StagedElement operator()(int source, int index) const {
        int row = source / kTileColumns, column = source % kTileColumns, channel = index, staged = index;
        if (!from_logits_) {
            const int output = index / (K * K);
            channel = index % (K * K);
            staged = channel * kOutputs + output;
            row = row * kUp + output / kUp;
            column = column * kUp + output % kUp;
        }
        return {row * array_.stride_h + column * array_.stride_w + channel * array_.stride_c,
                source * Lines<K>::kSize + staged, row < rows_ && column < columns_};
    }

private:
    const Array& array_;
    bool from_logits_;
    int rows_, columns_;  // that exist
};

// Calls f(element, staged) for each four channels of the logits of sources of a tile that exist; `staged` is their
// place in lines. A warp has every fourth source.
template <int K, class M, class F>
__device__ __forceinline__ void for_each_vector(const Problem& p, const Array& array, const SourcesOfBlock& tile,
                                                float* lines, F f) {
    const int thread = thread_computed_late() % kBlock, warp = thread / 32;
    const int columns = static_cast<int>(p.features.w) - tile.left - warp;
#pragma unroll
    for (int channel = thread % 32 * kVector, end = Lines<K>::kSize; end > 0;
         channel += 32 * kVector, end -= 32 * kVector) {
        const int rows = channel < Lines<K>::kSize ? static_cast<int>(p.features.h) - tile.top : 0;
        const int stride_h = rows > 0 ? static_cast<int>(array.stride_h) : 0,
                  stride_w = columns > 0 ? static_cast<int>(array.stride_w) : 0;
        M* const first = element<M>(array, tile.n, tile.group * Lines<K>::kSize + channel, tile.top, tile.left + warp);
#pragma unroll
        for (int y = 0; y < kTileRows; y++) {
            M* const row = at_stride(first, stride_h, y);
#pragma unroll
            for (int x = 0; x < kTileColumns; x += kWarps) {
                if (y < rows && x < columns)
                    f(at_stride(row, stride_w, x), lines + (y * kTileColumns + x + warp) * Lines<K>::kSize + channel);
            }
        }
    }
}

// Writes the lines of a tile, with adjacent channels.
template <int K, class T>
__device__ __forceinline__ void store_lines(const Problem& p, const SourcesOfBlock& tile, float* lines,
                                            const Array& grad_masks) {
    constexpr int kOfSource = Lines<K>::kSize;
    with_masks<T>(grad_masks, [&](auto mask) {
        using M = decltype(mask);
        if (p.from_logits && in_vectors<M>(grad_masks)) {
            for_each_vector<K, M>(p, grad_masks, tile, lines, [](M* to, const float* staged) {
                store_channels(*reinterpret_cast<const float4*>(staged), to);
            });
            return;
        }
        const LinesInArray<K> place(p, grad_masks, tile);
        const int up = p.from_logits ? 1 : kUp, channels = p.from_logits ? kOfSource : K * K;
        M* const to = element<M>(grad_masks, tile.n, tile.group * channels, int64_t{tile.top} * up,
                                 int64_t{tile.left} * up);
        Walk<kBlock> walk(kSourcesOfTile, kOfSource, grad_masks.stride_c < grad_masks.stride_w);
        for (; walk.in_grid(); walk.advance()) {
            const StagedElement at = place(walk.row(), walk.column());
            if (at.exists) to[at.from] = narrow<M>(lines[at.to]);
        }
    });
}

// As finish_two_outputs(), with adjacent channels. Masks or logits of a source are a line in shared memory, as
// [tap][output], so that threads read and write adjacent channels together. Begins and ends with a barrier of the
// block, of which some threads may not take part in the rest.
template <int K, class T>
__device__ __forceinline__ void finish_by_lines(const Problem& p, const OwnOutputsPlace& at, const SourcesOfBlock& tile,
                                                float (&grad)[kUp][K * K], float* lines, const Array& grad_masks,
                                                bool takes_part = true) {
    constexpr int kTaps = K * K, kOfSource = Lines<K>::kSize;
    const int source = (at.i - tile.top) * kTileColumns + at.j - tile.left;
    float2* const own = reinterpret_cast<float2*>(lines + source * kOfSource + at.r * kUp);
    const bool finishes = takes_part && at.exists(p);
    __syncthreads();
    if (is_normalized(p)) {
        if (takes_part) {
            with_masks<T>(p.logits, [&](auto mask) {
                using M = const decltype(mask);
                if (in_vectors<M>(p.logits)) {
                    for_each_vector<K, M>(p, p.logits, tile, lines,
                                          [](M* from, float* staged) { stage_vector(from, true, staged); });
                } else {
                    copy_grid<kBlock>(element<M>(p.logits, tile.n, tile.group * kOfSource, tile.top, tile.left),
                                      kSourcesOfTile, kOfSource, p.logits.stride_c < p.logits.stride_w,
                                      LinesInArray<K>(p, p.logits, tile), lines);
                }
            });
        }
        wait_for_copies();
        __syncthreads();
    }
    if (finishes) {
        through_normalizer<K>(p, at, own, kOutputs / kUp, grad);
#pragma unroll
        for (int t = 0; t < kTaps; t++) own[t * kOutputs / kUp] = make_float2(grad[0][t], grad[1][t]);
#pragma unroll 1
        for (int q = 0; q < kUp; q++) {
            if (at.computed(p, q)) continue;  // or a crop leaves it out
#pragma unroll 1
            for (int t = 0; t < kTaps; t++) reinterpret_cast<float*>(own)[t * kOutputs + q] = 0;
        }
    }
    __syncthreads();
    if (takes_part) store_lines<K, T>(p, tile, lines, grad_masks);
    __syncthreads();
}

}  // namespace carafepp::cuda
