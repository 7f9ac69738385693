// SPDX-License-Identifier: Apache-2.0
// Windows with adjacent channels, and the pixels that the kernels for them read and write.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd/vector.h"
#include "dtypes.h"
#include "problem.h"

namespace carafepp {
namespace {

// The window around a source. Its corner may be outside; taps [a_begin, a_end) x [b_begin, b_end) are inside the
// borders.
template <class T>
struct PixelWindow {
    T* corner;
    int64_t row_stride, pixel_stride;
    int a_begin, a_end, b_begin, b_end;

    T* pixel(int64_t a, int64_t b) const { return corner + a * row_stride + b * pixel_stride; }
    int64_t taps() const { return int64_t{a_end - a_begin} * (b_end - b_begin); }
};

// The window around source (i, j), or the union of the windows from there to `shift` columns behind. Here i and j count
// from the source of output (0, 0).
template <class T>
static inline PixelWindow<T> window_of(const Problem& p, const Array& features, int64_t n, int64_t c, int64_t i,
                                       int64_t j, int64_t shift = 0) {
    const int64_t top = i + p.offset_h - p.radius(), left = j + p.offset_w - p.radius();
    return {element<T>(features, n, c, top, left),
            features.stride_h,
            features.stride_w,
            static_cast<int>(std::max<int64_t>(-top, 0)),
            static_cast<int>(std::min(p.kernel_size, features.h - top)),
            static_cast<int>(std::max<int64_t>(-left, 0)),
            static_cast<int>(std::min(p.kernel_size + shift, features.w - left))};
}

// The groups that one item takes, of up to 256 channels. Their pixels and masks pass through the caches in the order of
// memory.
static inline int64_t groups_of_item(int64_t groups, int64_t channels) {
    return std::clamp<int64_t>(256 / std::max<int64_t>(channels, 1), 1, groups);
}

// `NV` vectors of channels, in an order of lanes that write_channels undoes; or the first `tail` lanes of one.
template <int NV, bool kTail, class T>
CARAFEPP_INLINE void read_channels(const T* from, int tail, Vector<Accumulator<T>> (&to)[NV]) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
        const T* const vector = from + v * kLanes<Accumulator<T>>;
        if constexpr (kTail) {
            to[v] = load_between(from, 0, tail);
        } else if constexpr (std::is_same_v<T, BFloat16> && NV % 2 == 0) {
            to[v] = v % 2 == 0 ? load_even(vector) : load_odd(vector - kLanes<float>);
        } else {
            to[v] = load(vector);
        }
    }
}

// The inverse. Use non-temporal stores only for whole vectors of what takes_non_temporal_stores() accepts.
template <int NV, bool kTail, class T>
CARAFEPP_INLINE void write_channels(const Vector<Accumulator<T>> (&from)[NV], T* to, int tail, bool non_temporal) {
    constexpr bool kPairs = std::is_same_v<T, BFloat16> && NV % 2 == 0;
    if constexpr (kTail) {
        store_first(from[0], to, tail);
        return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; v += kPairs ? 2 : 1) {
        T* const vector = to + v * kLanes<Accumulator<T>>;
        if constexpr (kPairs) {
            if (non_temporal) {
                store_non_temporal((Vector<float>)alternating(from[v], from[v + 1]), reinterpret_cast<float*>(vector));
            } else {
                store_alternating(from[v], from[v + 1], vector);
            }
        } else if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
            non_temporal ? store_non_temporal(from[v], vector) : store(from[v], vector);
        } else {
            store(from[v], vector);
        }
    }
}

// Pixels that are read some time later: prefetched into the level 2 cache between arithmetic, a few at a time. A burst
// of prefetches waits for its turn, and some processors drop it.
template <class T>
struct PixelPrefetch {
    const T* first = nullptr;
    int64_t row_stride = 0, pixel_stride = 0;
    int rows = 0, columns = 0;
};

// Prefetches `NV` vectors of channels from `c` on, of all columns of a row.
template <int NV, class T>
CARAFEPP_INLINE void prefetch_row(const PixelPrefetch<T>& prefetch, int row, int64_t c) {
    constexpr int kBytes = NV * kLanes<Accumulator<T>> * static_cast<int>(sizeof(T));
    const T* pixel = prefetch.first + row * prefetch.row_stride + c;
    for (int q = 0; q < prefetch.columns; q++, pixel += prefetch.pixel_stride) {
#pragma GCC unroll 8
        for (int line = 0; line < kBytes; line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(pixel) + line, 0, 2);
    }
}

// True if a result is large, and its pixels, with `channels` in a group, are whole aligned vectors. Half a vector has
// no non-temporal store, and no pair of vectors of float16 makes a whole one.
template <class T>
bool takes_non_temporal_stores(const Array& result, int64_t channels) {
    if (std::is_same_v<T, Float16> || !wants_non_temporal_stores(result)) return false;
    uint64_t offsets = reinterpret_cast<uintptr_t>(result.data);
    for (int64_t stride : {result.stride_n, result.stride_h, result.stride_w, channels})
        offsets |= static_cast<uint64_t>(stride) * sizeof(T);
    return offsets % kVectorBytes == 0;
}

}  // namespace
}  // namespace carafepp
