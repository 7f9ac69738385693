// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/row_deinterleave.h"

#include <algorithm>
#include <cassert>

#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// Deinterleaves a row of adjacent columns, of some channels: a vector of cells of all channels at a time. `row` is that
// of the first channel.
template <int Factor, class T>
CARAFEPP_INLINE void deinterleave_row(const Array& array, const T* row, int64_t channels, const Deinterleaved& layout,
                                      Accumulator<T>* to) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    for (int64_t k = 0; k < layout.lanes<A>(); k += L) {
        const int64_t column = (layout.cell + k) * Factor;
        const auto stage_channels = [&](auto load_residues) __attribute__((always_inline)) {
            const T* from = row + column;
            A* cells = to + k;
            for (int64_t c = 0; c < channels; c++, from += array.stride_c, cells += layout.channel_stride) {
                Vector<A> residues[Factor];
                load_residues(from, residues);
#pragma GCC unroll 8
                for (int residue = 0; residue < Factor; residue++)
                    store(residues[residue], cells + residue * layout.residue_stride);
            }
        };
        if (column >= 0 && column + Factor * L <= array.w) {
            stage_channels([](const T* from, Vector<A>(&residues)[Factor]) __attribute__((always_inline)) {
                if constexpr (Factor == 2 && std::is_same_v<T, BFloat16>) {
                    residues[0] = load_even(from);
                    residues[1] = load_odd(from);
                    return;
                }
#pragma GCC unroll 8
                for (int v = 0; v < Factor; v++) residues[v] = load(from + v * L);
                deinterleave<A, Factor>(residues);
            });
            continue;
        }
        int begin[Factor], end[Factor];  // columns of the row, of each vector
        for (int v = 0; v < Factor; v++) {
            begin[v] = static_cast<int>(std::clamp<int64_t>(-column - v * L, 0, L));
            end[v] = static_cast<int>(std::clamp<int64_t>(array.w - column - v * L, begin[v], L));
        }
        stage_channels([&](const T* from, Vector<A>(&residues)[Factor]) __attribute__((always_inline)) {
            if constexpr (std::is_same_v<T, float> && Factor <= 4) {
#pragma GCC unroll 4
                for (int v = 0; v < Factor; v++) residues[v] = load_between(from + v * L, begin[v], end[v]);
            } else {  // for its size
                A columns[Factor * L];
#pragma GCC unroll 1
                for (int v = 0; v < Factor; v++) store(load_between(from + v * L, begin[v], end[v]), columns + v * L);
#pragma GCC unroll 8
                for (int v = 0; v < Factor; v++) residues[v] = load(columns + v * L);
            }
            deinterleave<A, Factor>(residues);
        });
    }
}

// The lanes of a residue, of [0, lanes), that hold columns of the row.
CARAFEPP_INLINE Range lanes_inside(int64_t width, const Deinterleaved& layout, int residue, int64_t lanes) {
    const int64_t begin = std::clamp<int64_t>(-layout.cell, 0, lanes);
    const int64_t end = std::clamp(columns_of(width, layout.factor, residue) - layout.cell, begin, lanes);
    return {begin, end};
}

// Deinterleaves a row of columns that lie `stride` apart, by any factor.
template <class T>
CARAFEPP_INLINE void deinterleave_strided(const T* row, int64_t stride, int64_t width, const Deinterleaved& layout,
                                          Accumulator<T>* to) {
    using A = Accumulator<T>;
    const int factor = layout.factor;
    const int64_t lanes = layout.lanes<A>();
    for (int residue = 0; residue < factor; residue++, to += layout.residue_stride) {
        const Range inside = lanes_inside(width, layout, residue, lanes);
        const T* const first = row + (layout.cell * factor + residue) * stride;
        std::fill(to, to + inside.begin, A{0});
        for (int64_t k = inside.begin; k < inside.end; k++) to[k] = widen(first[k * factor * stride]);
        std::fill(to + inside.end, to + lanes, A{0});
    }
}

// Deinterleaves all channels of a row together, adjacent in columns that lie `stride` apart. It transposes a vector of
// cells at a time, so each residue has that many inside the row.
template <class T>
void deinterleave_adjacent_channels(const T* row, int64_t stride, int64_t width, int channels,
                                    const Deinterleaved& layout, Accumulator<T>* to) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    const int factor = layout.factor;
    const int64_t lanes = layout.lanes<A>();
    for (int residue = 0; residue < factor; residue++, to += layout.residue_stride) {
        const Range inside = lanes_inside(width, layout, residue, lanes);
        assert(inside.size() >= L);
        const T* const first = row + (layout.cell * factor + residue) * stride;
        for (int c = 0; c < channels; c++) {
            A* const of_channel = to + c * layout.channel_stride;
            std::fill(of_channel, of_channel + inside.begin, A{0});
            std::fill(of_channel + inside.end, of_channel + lanes, A{0});
        }
        for (int64_t k = inside.begin; k < inside.end; k += L) {
            const int64_t at = std::min(k, inside.end - L);
            load_channels<T>(first + at * factor * stride, factor * stride, L, channels,
                             adjacent_channels(to + at, layout.channel_stride));
        }
    }
}

template <class T>
void deinterleave_rows_of(const Array& array, int64_t n, int64_t channel, int64_t channels, Range rows,
                          const Deinterleaved& layout, Accumulator<T>* to) {
    using A = Accumulator<T>;
    const Range fewest = lanes_inside(array.w, layout, layout.factor - 1, layout.lanes<A>());
    if (worth_transposing(array, channels) && fewest.size() >= kLanes<A>) {
        for (int64_t row = rows.begin; row < rows.end; row++, to += layout.row_stride) {
            deinterleave_adjacent_channels(element<const T>(array, n, channel, row, 0), array.stride_w, array.w,
                                           static_cast<int>(channels), layout, to);
        }
        return;
    }
    // Few channels at a time: they may lie in the same sets of a cache.
    const auto for_each_row = [&](int64_t channels_together, auto deinterleave_some) __attribute__((always_inline)) {
        for (int64_t c = 0; c < channels; c += channels_together) {
            const T* from = element<const T>(array, n, channel + c, rows.begin, 0);
            A* of_row = to + c * layout.channel_stride;
            const int64_t count = std::min(channels_together, channels - c);
            for (int64_t row = rows.begin; row < rows.end; row++, from += array.stride_h, of_row += layout.row_stride)
                deinterleave_some(from, count, of_row);
        }
    };
    const auto shuffle_rows = [&](auto factor) __attribute__((always_inline)) {
        for_each_row(8, [&](const T* from, int64_t count, A* of_row) __attribute__((always_inline)) {
            deinterleave_row<decltype(factor)::value>(array, from, count, layout, of_row);
        });
    };
    if (array.stride_w == 1 && with_shuffles(layout.factor, shuffle_rows)) return;
    for_each_row(1, [&](const T* from, int64_t, A* of_row) __attribute__((always_inline)) {
        deinterleave_strided(from, array.stride_w, array.w, layout, of_row);
    });
}

}  // namespace

template <class A>
void deinterleave_rows(const Array& array, int64_t n, int64_t channel, int64_t channels, Range rows,
                       const Deinterleaved& layout, A* to) {
    with_type_of<A>(array.dtype, [&](auto type) {
        deinterleave_rows_of<typename decltype(type)::type>(array, n, channel, channels, rows, layout, to);
    });
}

template <class A>
void interleave_row(const A* from, int64_t residue_stride, int factor, const Array& array, int64_t n, int64_t channel,
                    int64_t row, Range columns) {
    with_type_of<A>(array.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        T* const to = element<T>(array, n, channel, row, columns.begin);
        for (int64_t k = 0; k < columns.size(); k += kLanes<A> * factor, from += kLanes<A>)
            store_interleaved(from, residue_stride, factor, columns.size() - k, to + k * array.stride_w,
                              array.stride_w);
    });
}

template void interleave_row(const float*, int64_t, int, const Array&, int64_t, int64_t, int64_t, Range);
template void interleave_row(const double*, int64_t, int, const Array&, int64_t, int64_t, int64_t, Range);
template void deinterleave_rows(const Array&, int64_t, int64_t, int64_t, Range, const Deinterleaved&, float*);
template void deinterleave_rows(const Array&, int64_t, int64_t, int64_t, Range, const Deinterleaved&, double*);

}  // namespace carafepp::CARAFEPP_ISA
