// SPDX-License-Identifier: Apache-2.0
// Tiles for down x2. A block stages the masks of a tile once. It goes through the channels a slice at a time, and
// copies what the tile needs of each slice into shared memory.
#pragma once

#include "cuda/channels.h"
#include "cuda/down/down2.h"
#include "cuda/tiles.h"

namespace carafepp::cuda {

constexpr int64_t kEnoughItems = 768;  // that keep all multiprocessors evenly busy

// ---- masks ----

// The masks that a block stages: of Rows x Columns outputs. Tap t of an output is at [t * Apart + place(row, column)],
// where place(row, column) = place(row, 0) + place(0, column). `Threads` are a block, or each part of it.
template <int K, int Rows, int Columns, int Apart = Rows * Columns>
struct Masks {
    static constexpr int kOutputs = Rows * Columns, kApart = Apart, kElements = K * K * Apart;
    static_assert(kOutputs <= Apart, "taps do not overlap");

    // Stages the masks of the outputs from (top, left) on, or logits that become masks; 0 where there is no output.
    // Waits for the copies of this thread, and ends with a barrier.
    template <int Threads, class T, class Place>
    static __device__ __forceinline__ void stage(const Problem& p, int64_t n, int64_t group, int top, int left,
                                                 float* staged, Place place) {
        const Array& array = p.from_logits ? p.logits : p.masks;
        with_masks<T>(array, [&](auto mask) {
            using M = decltype(mask);
            const M* from = element<const M>(array, n, group * K * K, top, left);
            const int rows_begin = -top, rows_end = static_cast<int>(min(p.out_h - top, int64_t{Rows}));
            const int columns_begin = -left, columns_end = static_cast<int>(min(p.out_w - left, int64_t{Columns}));
            // Copies elements that are `step` apart; the k-th exists or is 0, and goes to to[offset(k)].
            const auto copy = [&](auto count, int64_t step, auto exists, auto offset, float* to) {
                constexpr int kCount = decltype(count)::value;
                if constexpr (std::is_same_v<M, float>) {
#pragma unroll
                    for (int k = 0; k < kCount; k++, from += step)
                        copy_async<sizeof(float)>(to + offset(k), from, exists(k));
                } else {
                    float values[kCount];
#pragma unroll
                    for (int k = 0; k < kCount; k++, from += step) values[k] = exists(k) ? widen(load_input(from)) : 0;
#pragma unroll
                    for (int k = 0; k < kCount; k++) to[offset(k)] = values[k];
                }
            };
            const int thread = thread_computed_late() % Threads;
            if (array.stride_c < array.stride_w) {  // neighbouring threads have neighbouring taps, and go down columns
                constexpr int kLanes = K * K <= 16 ? 16 : 32;
                const int tap = thread % kLanes;
                from += tap * array.stride_c + thread / kLanes * array.stride_w;
#pragma unroll 1
                for (int column = thread / kLanes; column < Columns; column += Threads / kLanes) {
                    const int begin = column >= columns_begin && column < columns_end ? rows_begin : Rows;
                    if (tap < K * K) {
                        copy(std::integral_constant<int, Rows>(), array.stride_h, [&](int row) {
                            return row >= begin && row < rows_end;
                        }, [&](int row) { return place(row, 0); }, staged + tap * Apart + place(0, column));
                        from -= Rows * array.stride_h;
                    }
                    from += Threads / kLanes * array.stride_w;
                }
            } else {  // or neighbouring outputs, and go through the taps
                constexpr int kLanes = kOutputs <= 64 ? 64 : 128, kStep = Threads / kLanes;
                constexpr int kTapsOfAll = K * K / kStep;  // the first threads may have one more
                static_assert(Threads % kLanes == 0, "all threads have outputs");
                const int first_tap = thread / kLanes;
                const M* const first = from + first_tap * array.stride_c;
#pragma unroll 1
                for (int output = thread % kLanes; output < kOutputs; output += kLanes) {
                    const int row = output / Columns, column = output % Columns;
                    const bool exist = row >= rows_begin && row < rows_end && column >= columns_begin &&
                                       column < columns_end;
                    from = first + row * array.stride_h + column * array.stride_w;
                    const auto copy_taps = [&](auto count, int tap) {
                        copy(count, kStep * array.stride_c, [&](int) { return exist; },
                             [&](int k) { return k * kStep * Apart; }, staged + place(row, column) + tap * Apart);
                    };
                    copy_taps(std::integral_constant<int, kTapsOfAll>(), first_tap);
                    if (first_tap < K * K % kStep)
                        copy_taps(std::integral_constant<int, 1>(), first_tap + kTapsOfAll * kStep);
                }
            }
        });
        wait_for_copies();
        __syncthreads();
        if (!p.from_logits) return;
        normalize_each<K, Threads>(p.normalizer, staged, Apart, Apart, [](int output) { return output; });
        __syncthreads();
    }

    // Clears the taps beyond the borders of features, which are 0 there: 0 * Inf is NaN. Ends with a barrier.
    template <int Threads, class Place>
    static __device__ __forceinline__ void clear_outside(const Problem& p, int top, int left, float* staged,
                                                         Place place) {
        const int first_i = top * kDown - K / 2, first_j = left * kDown - K / 2;
        const int height = static_cast<int>(p.features.h), width = static_cast<int>(p.features.w);
        const bool inside = first_i >= 0 && first_i + kDown * (Rows - 1) + K <= height && first_j >= 0 &&
                            first_j + kDown * (Columns - 1) + K <= width;
#pragma unroll 1
        for (int output = thread_computed_late() % Threads; !inside && output < kOutputs; output += Threads) {
            const int i = first_i + output / Columns * kDown, j = first_j + output % Columns * kDown;
            const int rows_begin = -i, rows_end = height - i, columns_begin = -j, columns_end = width - j;
            if (rows_begin <= 0 && rows_end >= K && columns_begin <= 0 && columns_end >= K) continue;
            float* const taps = staged + place(output / Columns, output % Columns);
#pragma unroll
            for (int b = 0; b < K; b++) {
                const bool outside = b < columns_begin || b >= columns_end;
#pragma unroll
                for (int a = 0; a < K; a++) {
                    if (outside || a < rows_begin || a >= rows_end) taps[(a * K + b) * Apart] = 0;
                }
            }
        }
        __syncthreads();
    }
};

// ---- quads: 2 x 2 features, which hold each tap once, in the windows of a few outputs ----

constexpr int kFeatures = kDown * kDown;  // of a quad

// The outputs of a row or column whose windows reach a quad. They begin `kBefore` before its own.
template <int K>
struct Reach {
    static constexpr int kBefore = K / 2 / 2, kOutputs = kBefore + 1 + (K / 2 + 1) / 2;
};

// Calls f(feature, t) for each feature of a quad that is tap t of output (y, x). Outputs count from the first that
// reaches it.
template <int K, class F>
__device__ __forceinline__ void for_each_tap_of_quad(int y, int x, F f) {
#pragma unroll
    for (int feature = 0; feature < kFeatures; feature++) {
        const int a = K / 2 + feature / kDown - kDown * (y - Reach<K>::kBefore);
        const int b = K / 2 + feature % kDown - kDown * (x - Reach<K>::kBefore);
        if (a >= 0 && a < K && b >= 0 && b < K) f(feature, a * K + b);
    }
}

// ---- with adjacent channels ----

constexpr int kBytesOfCopy = 16, kBytesOfPixel = 64;  // in a slice
constexpr int kCopiesOfPixel = kBytesOfPixel / kBytesOfCopy;
constexpr int kAbsent = INT32_MIN;  // the place of a pixel that does not exist
template <class T>
constexpr int kChannelsOfCopy = kBytesOfCopy / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChannelsOfPixel = kBytesOfPixel / static_cast<int>(sizeof(T));

// Finds `Count` pixels of an image: places, in copies from its first channel on. at(q) is pixel number q.
template <int Count, int Threads, class T, class At>
__device__ __forceinline__ void find_pixels(const Array& array, At at, int* places) {
#pragma unroll 1
    for (int q = thread_computed_late(); q < Count; q += Threads) {
        const int2 pixel = at(q);
        const bool exists = pixel.x >= 0 && pixel.x < array.h && pixel.y >= 0 && pixel.y < array.w;
        const int64_t place = (pixel.x * array.stride_h + pixel.y * array.stride_w) / kChannelsOfCopy<T>;
        places[q] = exists ? static_cast<int>(place) : kAbsent;
    }
}

// Copies a slice of these pixels, of which `channels` channels exist, to [pixel][channel]; 0 where there is none. It
// does nothing without channels.
template <int Count, int Threads, class T>
__device__ __forceinline__ void copy_pixels(const T* from, const int* places, int channels, T* staged) {
    constexpr int kInFlight = 4, kStep = Threads / kCopiesOfPixel;
    const int thread = thread_computed_late(), first = thread / kCopiesOfPixel,
              channel = thread % kCopiesOfPixel * kChannelsOfCopy<T>;
    if (channels <= 0) return;
    const bool has_some = channel < channels;
    from += channel;
    staged += first * kChannelsOfPixel<T> + channel;
    places += first;
#pragma unroll
    for (int before = 0; before < Count; before += kInFlight * kStep) {
        int place[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; k++) {
            const int q = before + k * kStep;  // and `first`
            if (q + kStep <= Count || first + q < Count) place[k] = places[q];
        }
#pragma unroll
        for (int k = 0; k < kInFlight; k++) {
            const int q = before + k * kStep;
            if (q + kStep <= Count || first + q < Count) {
                copy_async<kBytesOfCopy>(staged + q * kChannelsOfPixel<T>,
                                         from + int64_t{place[k]} * kChannelsOfCopy<T>,
                                         has_some && place[k] != kAbsent);
            }
        }
    }
}

// Why an array cannot be copied so.
inline const char* not_for_pixels(const Problem& p, const Array& array) {
    const int64_t count = kBytesOfCopy / itemsize(p.features.dtype);
    if (const char* reason = not_for_vectors(p, array, static_cast<int>(count))) return reason;
    const int64_t most = int64_t{INT32_MAX} * count / 2;
    const auto too_far = [&](int64_t size, int64_t stride) { return stride != 0 && size > most / std::abs(stride); };
    return too_far(array.h, array.stride_h) || too_far(array.w, array.stride_w) ? "pixels are too far apart" : nullptr;
}

// ---- with adjacent columns ----

constexpr int kBefore = 4;  // columns that are staged before the first of a tile

// Columns of a tile, a multiple of `step`. All tiles of a row have about as many, so that none is much narrower.
inline int even_columns(int64_t width, int most, int step) {
    const int64_t steps = ceil_div(width, step), tiles = std::max<int64_t>(ceil_div(steps, most / step), 1);
    return static_cast<int>(std::max<int64_t>(ceil_div(steps, tiles), 1)) * step;
}

// Columns of a row in shared memory, as floats.
__device__ __forceinline__ float2 staged_columns(const float* from) { return *reinterpret_cast<const float2*>(from); }
template <class T>
__device__ __forceinline__ float2 staged_columns(const T* from) {
    return widen_pair<T>(*reinterpret_cast<const uint32_t*>(from));
}

// Copies `Count` elements at once: of 2 bytes not by themselves.
template <int Count, class T>
__device__ __forceinline__ void copy_columns(T* to, const T* from, bool exist) {
    if constexpr (Count * sizeof(T) >= 4) {
        copy_async<Count * sizeof(T)>(to, from, exist);
    } else {
        *to = exist ? load_input(from) : T{};
    }
}

// Copies `channels` of at most `Channels` channels of `Rows` rows from row i on, `Width` columns from column j on, to
// [channel][row][column]; 0 where there are none, and from column `end` on.
template <int Rows, int Width, int Channels, int Threads, int Count, class T>
__device__ __forceinline__ void copy_rows(const Array& array, const T* from, int i, int j, int end, int channels,
                                          T* staged) {
#pragma unroll 1
    for (int k = thread_computed_late(); k < Rows * (Width / Count); k += Threads) {
        const int y = k / (Width / Count), x = k % (Width / Count) * Count;
        const bool exist = i + y >= 0 && i + y < static_cast<int>(array.h) && j + x >= 0 && j + x < end;
        const T* columns = from + y * array.stride_h + x;
        T* const to = staged + y * Width + x;
        const auto copy = [&](int q) {
            copy_columns<Count>(to + q * (Rows * Width), columns, exist);
            columns += array.stride_c;
        };
        if (channels >= Channels) {
#pragma unroll
            for (int q = 0; q < Channels; q++) copy(q);
        } else {
#pragma unroll 1
            for (int q = 0; q < channels; q++) copy(q);
        }
    }
}

}  // namespace carafepp::cuda
