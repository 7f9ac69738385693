// SPDX-License-Identifier: Apache-2.0
// Columns of a row, in lanes. Split by column modulo the factor, a row of outputs becomes its `up` phases and a row of
// sources its `down` parts, in each of which neighbouring cells are adjacent: then a tap of a phase reads one part,
// some cells on, whatever the factor is.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

struct Slice {
    int begin, end;
};

// Part `index` of [begin, end) when that is cut into `count` parts as equal as can be.
CARAFEPP_INLINE Slice slice(int begin, int end, int index, int count) {
    const int size = end - begin;
    return {begin + size * index / count, begin + size * (index + 1) / count};
}

// Which part each tap of each phase reads, and how many cells on.
struct ColumnTaps {
    struct Tap {
        int part, shift;
    };
    int kernel_size, phases, parts;
    int least_shift = 0, most_shift = 0;
    Tap taps[kMaxFactor * kMaxKernelSize];

    ColumnTaps(const Problem& p)
        : kernel_size(static_cast<int>(p.kernel_size)),
          phases(static_cast<int>(p.factor.up)),
          parts(static_cast<int>(p.factor.down)) {
        for (int phase = 0; phase < phases; phase++) {
            for (int b = 0; b < kernel_size; b++) {
                const int64_t column = p.factor.source(phase) + b - p.radius();
                Tap& tap = taps[phase * kernel_size + b];
                tap = {static_cast<int>(floor_mod(column, parts)), static_cast<int>(floor_div(column, parts))};
                least_shift = std::min(least_shift, tap.shift);
                most_shift = std::max(most_shift, tap.shift);
            }
        }
    }

    const Tap& at(int phase, int b) const { return taps[phase * kernel_size + b]; }
    int shifts() const { return most_shift - least_shift; }
};

// How rows are split: from which cell on, how many, and how far apart channels, rows and parts lie then.
struct Split {
    int parts;
    int64_t cell, count, channel_pitch, row_pitch, part_pitch;

    template <class A>
    int64_t lanes() const {
        return ceil_div(count, kLanes<A>) * kLanes<A>;
    }
};

// Whether channels are adjacent and columns are not, and there are enough of them to make up for transposing.
CARAFEPP_INLINE bool as_pixels(const Array& array, int64_t channels) {
    return array.stride_c == 1 && array.stride_w != 1 && channels >= 4;
}

// Some rows of some channels of an array, of any dtype whose sums are kept in A: of row r and channel c
// to[r*row_pitch + c*channel_pitch + part*part_pitch + k] is column (cell + k)*parts + part, or 0 outside the row, for
// as many k as whole vectors hold `count`.
template <class A>
void split_rows(const Array& array, int64_t n, int64_t channel, int64_t channels, Rows rows, const Split& split, A* to);

// `count` lanes to elements that lie `stride` apart.
template <class T>
CARAFEPP_INLINE void store_lanes(const Accumulator<T>* from, int count, T* to, int64_t stride) {
    if (stride == 1) {
        store_part(load(from), to, count);
        return;
    }
    for (int q = 0; q < count; q++) to[q * stride] = narrow<T>(from[q]);
}

// The inverse of split_rows, of one vector of each part: `count` columns.
template <int Parts, class T>
CARAFEPP_INLINE void store_columns(const Accumulator<T>* from, int64_t pitch, int64_t count, T* to) {
    using A = Accumulator<T>;
    Vector<A> parts[Parts];
#pragma GCC unroll 4
    for (int part = 0; part < Parts; part++) parts[part] = load(from + part * pitch);
    if constexpr (Parts == 2 && std::is_same_v<T, BFloat16>) {
        if (count >= 2 * kLanes<A>) {
            store_alternating(parts[0], parts[1], to);
            return;
        }
    }
    interleave<A, Parts>(parts);
#pragma GCC unroll 4
    for (int part = 0; part < Parts; part++) store_part(parts[part], to + part * kLanes<A>, count - part * kLanes<A>);
}

// The same of columns that lie `stride` apart.
template <class T>
CARAFEPP_INLINE void store_columns(const Accumulator<T>* from, int64_t pitch, int parts, int64_t count, T* to,
                                   int64_t stride) {
    if (stride == 1 && parts <= 4) {
        with_count<4>(parts, [&](auto n) __attribute__((always_inline)) {
            store_columns<decltype(n)::value>(from, pitch, count, to);
        });
        return;
    }
    for (int part = 0; part < parts; part++) {
        for (int64_t column = part, q = 0; column < count && q < kLanes<Accumulator<T>>; column += parts, q++)
            to[column * stride] = narrow<T>(from[part * pitch + q]);
    }
}

// Past the caches, but for the ends that do not fill a line.
template <class T>
CARAFEPP_INLINE void stream_lines(const T* from, int64_t count, T* to) {
    const int64_t line = 64 / int64_t{sizeof(T)};
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / sizeof(T)) % line;
    int64_t k = std::min(count, (line - misaligned) % line);
    std::copy_n(from, k, to);
    for (; k + line <= count; k += line) {
        for (int64_t part = 0; part < 64; part += kVectorBytes) {
            store_non_temporal(load(reinterpret_cast<const float*>(reinterpret_cast<const char*>(from + k) + part)),
                               reinterpret_cast<float*>(reinterpret_cast<char*>(to + k) + part));
        }
    }
    std::copy_n(from + k, count - k, to + k);
}

// Rows of some channels that are read next: fetched into the level 2 cache a line at a time, between arithmetic that
// hides how long that takes. Fetching ahead of what is read one page after the other is beyond the processor's own
// prefetching.
struct Ahead {
    const char* row = nullptr;  // the current one
    int64_t at = 0, row_bytes = 0;
    int64_t row_stride = 0, channel_stride = 0;  // from the last row of a channel to the next one's first
    int rows = 0, channels = 0;                  // channels that are left
    int row_index = 0;

    Ahead() = default;

    template <class T>
    Ahead(const Array& array, const T* first, int64_t columns, int64_t rows_of_channel, int64_t channel_count)
        : row(reinterpret_cast<const char*>(first)),
          row_bytes(columns * array.stride_w * int64_t{sizeof(T)}),
          row_stride(array.stride_h * int64_t{sizeof(T)}),
          rows(static_cast<int>(rows_of_channel)),
          channels(static_cast<int>(channel_count)) {
        channel_stride = array.stride_c * int64_t{sizeof(T)} - (rows - 1) * row_stride;
        if (rows <= 0 || columns <= 0) channels = 0;
        if (row_stride == row_bytes) {  // as one row
            row_bytes *= rows;
            channel_stride += (rows - 1) * row_stride;
            rows = 1;
        }
    }

    int64_t lines() const { return int64_t{channels} * rows * ((row_bytes + 63) / 64); }

    __attribute__((always_inline)) void fetch_line() {
        if (channels <= 0) return;
        __builtin_prefetch(row + at, 0, 2);
        at += 64;
        if (at < row_bytes) return;
        at = 0;
        if (++row_index < rows) {
            row += row_stride;
        } else {
            row_index = 0;
            row += channel_stride;
            channels--;
        }
    }
};

}  // namespace carafepp::CARAFEPP_ISA
