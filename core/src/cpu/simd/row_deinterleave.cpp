// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/row_deinterleave.h"

#include <algorithm>

#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

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
    const auto split_vectors = [&](int64_t k, auto load_at) __attribute__((always_inline)) {
        const int64_t column = (cell + k) * Parts;
        Vector<A> parts[Parts];
#pragma GCC unroll 4
        for (int part = 0; part < Parts; part++) parts[part] = load_at(column + part * L);
        deinterleave<A, Parts>(parts);
#pragma GCC unroll 4
        for (int part = 0; part < Parts; part++) store(parts[part], to + k + part * pitch);
    };
    const int64_t end_inside = std::min(count, width / Parts - cell - L + 1);
    for (int64_t k = 0; k < count; k += L) {
        for (; k >= -cell && k < end_inside; k += L) {
            if constexpr (Parts == 2 && std::is_same_v<T, BFloat16>) {
                store(load_even(row + (cell + k) * Parts), to + k);
                store(load_odd(row + (cell + k) * Parts), to + k + pitch);
            } else {
                split_vectors(k, [=](int64_t column) __attribute__((always_inline)) { return load(row + column); });
            }
        }
        if (k >= count) break;
        split_vectors(k,
                      [=](int64_t column) __attribute__((always_inline)) { return load_columns(row, column, width); });
    }
}

// Of the lanes [0, lanes) of a part, those that are columns of the row.
CARAFEPP_INLINE Slice lanes_inside(int64_t width, int parts, int part, int64_t cell, int64_t lanes) {
    const int64_t begin = std::clamp<int64_t>(-cell, 0, lanes);
    return {static_cast<int>(begin), static_cast<int>(std::clamp(ceil_div(width - part, parts) - cell, begin, lanes))};
}

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
                             adjacent_channels(to + at, split.channel_pitch));
        }
    }
}

template <class T>
void split_rows_of(const Array& array, int64_t n, int64_t channel, int64_t channels, Rows rows, const Split& split,
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

}  // namespace

template <class A>
void split_rows(const Array& array, int64_t n, int64_t channel, int64_t channels, Rows rows, const Split& split,
                A* to) {
    with_type_of<A>(array.dtype, [&](auto type) {
        split_rows_of<typename decltype(type)::type>(array, n, channel, channels, rows, split, to);
    });
}

template void split_rows(const Array&, int64_t, int64_t, int64_t, Rows, const Split&, float*);
template void split_rows(const Array&, int64_t, int64_t, int64_t, Rows, const Split&, double*);

}  // namespace carafepp::CARAFEPP_ISA
