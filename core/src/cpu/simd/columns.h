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

namespace carafepp {
namespace {

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

// A vector of a row from `column` on; 0 where the row has no such column.
template <class T>
CARAFEPP_INLINE Vector<Accumulator<T>> load_columns(const T* row, int64_t column, int64_t width) {
    constexpr int L = kLanes<Accumulator<T>>;
    if (column >= 0 && column + L <= width) return load(row + column);
    if (column <= -L || column >= width) return Vector<Accumulator<T>>{};
    return load_between(row + column, static_cast<int>(std::max<int64_t>(-column, 0)),
                        static_cast<int>(std::min<int64_t>(width - column, L)));
}

// to[part*pitch + k] = row[(cell + k)*parts + part], or 0 outside the row, for as many k as whole vectors hold `count`.
template <int Parts, class T>
CARAFEPP_INLINE void split_row(const T* row, int64_t width, int64_t cell, int64_t count, Accumulator<T>* to,
                               int64_t pitch) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    int64_t k = 0;
    const auto split_up_to = [&](int64_t end, auto load_at) __attribute__((always_inline)) {
        for (; k < end; k += L) {
            const int64_t column = (cell + k) * Parts;
            Vector<A> parts[Parts];
#pragma GCC unroll 4
            for (int part = 0; part < Parts; part++) parts[part] = load_at(column + part * L);
            deinterleave<A, Parts>(parts);
#pragma GCC unroll 4
            for (int part = 0; part < Parts; part++) store(parts[part], to + k + part * pitch);
        }
    };
    const auto some = [=](int64_t column) __attribute__((always_inline)) { return load_columns(row, column, width); };
    split_up_to(std::min(count, -cell), some);
    const int64_t end_inside = std::min(count, width / Parts - cell - L + 1);
    if constexpr (Parts == 2 && std::is_same_v<T, BFloat16>) {
        for (; k < end_inside; k += L) {
            store(load_even(row + (cell + k) * Parts), to + k);
            store(load_odd(row + (cell + k) * Parts), to + k + pitch);
        }
    }
    split_up_to(end_inside, [=](int64_t column) __attribute__((always_inline)) { return load(row + column); });
    split_up_to(count, some);
}

// Of the lanes [0, lanes) of a part, those that are columns of the row.
CARAFEPP_INLINE Slice lanes_inside(int64_t width, int parts, int part, int64_t cell, int64_t lanes) {
    const int64_t begin = std::clamp<int64_t>(-cell, 0, lanes);
    return {static_cast<int>(begin), static_cast<int>(std::clamp(ceil_div(width - part, parts) - cell, begin, lanes))};
}

// How rows are split: from which cell on, how many, and how far apart channels, rows and parts lie then.
struct Split {
    int parts;
    int64_t cell, count, channel_pitch, row_pitch, part_pitch;

    template <class A>
    int64_t lanes() const {
        return ceil_div(count, kLanes<A>) * kLanes<A>;
    }
};

// The same as split_row of columns that lie `stride` apart, into any number of parts.
template <class T>
CARAFEPP_INLINE void split_strided(const T* row, int64_t stride, int64_t width, const Split& split,
                                   Accumulator<T>* to) {
    using A = Accumulator<T>;
    const int parts = split.parts;
    const int64_t lanes = split.lanes<A>();
    for (int part = 0; part < parts; part++, to += split.part_pitch) {
        const Slice inside = lanes_inside(width, parts, part, split.cell, lanes);
        const T* const first = row + (split.cell * parts + part) * stride;
        std::fill(to, to + inside.begin, A{0});
        for (int64_t k = inside.begin; k < inside.end; k++) to[k] = widen(first[k * parts * stride]);
        std::fill(to + inside.end, to + lanes, A{0});
    }
}

// The same of all channels of a row at once, adjacent in pixels that lie `stride` apart: a vector of pixels is
// transposed. No part has fewer columns than that.
template <class T>
void split_pixels(const T* row, int64_t stride, int64_t width, int channels, const Split& split, Accumulator<T>* to) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    const int parts = split.parts;
    const int64_t lanes = split.lanes<A>();
    for (int part = 0; part < parts; part++, to += split.part_pitch) {
        const Slice inside = lanes_inside(width, parts, part, split.cell, lanes);
        const T* const first = row + (split.cell * parts + part) * stride;
        for (int c = 0; c < channels; c++) {
            A* const of_channel = to + c * split.channel_pitch;
            std::fill(of_channel, of_channel + inside.begin, A{0});
            std::fill(of_channel + inside.end, of_channel + lanes, A{0});
        }
        for (int k = inside.begin; k < inside.end; k += L) {
            const int at = std::min(k, inside.end - L);
            load_channels<T>(first + at * parts * stride, parts * stride, L, channels,
                             adjacent_places(to + at, split.channel_pitch));
        }
    }
}

// Whether channels are adjacent and columns are not, and there are enough of them to make up for transposing.
CARAFEPP_INLINE bool as_pixels(const Array& array, int64_t channels) {
    return array.stride_c == 1 && array.stride_w != 1 && channels >= 4;
}

// Some rows of some channels of an array.
template <class T>
void split_rows(const Array& array, int64_t n, int64_t channel, int64_t channels, Rows rows, const Split& split,
                Accumulator<T>* to) {
    using A = Accumulator<T>;
    const Slice fewest = lanes_inside(array.w, split.parts, split.parts - 1, split.cell, split.lanes<A>());
    if (as_pixels(array, channels) && fewest.end - fewest.begin >= kLanes<A>) {
        for (int64_t row = rows.begin; row < rows.end; row++, to += split.row_pitch) {
            split_pixels(element<const T>(array, n, channel, row, 0), array.stride_w, array.w,
                         static_cast<int>(channels), split, to);
        }
        return;
    }
    const int64_t cell = split.cell, count = split.count, pitch = split.part_pitch, width = array.w;
    const auto split_each = [&](auto split_one) __attribute__((always_inline)) {
        for (int64_t c = 0; c < channels; c++) {
            const T* from = element<const T>(array, n, channel + c, rows.begin, 0);
            A* of_row = to + c * split.channel_pitch;
            for (int64_t row = rows.begin; row < rows.end; row++, from += array.stride_h, of_row += split.row_pitch)
                split_one(from, of_row);
        }
    };
    if (array.stride_w == 1 && split.parts <= 4) {
        with_count<4>(split.parts, [&](auto parts) __attribute__((always_inline)) {
            split_each([=](const T* from, A* of_row) __attribute__((always_inline)) {
                split_row<decltype(parts)::value>(from, width, cell, count, of_row, pitch);
            });
        });
    } else {
        split_each([&](const T* from, A* of_row)
                       __attribute__((always_inline)) { split_strided(from, array.stride_w, width, split, of_row); });
    }
}

// The inverse, of one vector of each part: `count` columns.
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
            stream(load(reinterpret_cast<const float*>(reinterpret_cast<const char*>(from + k) + part)),
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

}  // namespace
}  // namespace carafepp
