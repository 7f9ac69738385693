// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/row_deinterleave.h"

#include <algorithm>
#include <cassert>

#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// Deinterleaves rows of adjacent columns, of some channels: a vector of cells of all of them at a time. `first` is the
// first row of the first channel.
template <int Factor, class T>
CARAFEPP_INLINE void deinterleave_columns(const Array& array, const T* first, int64_t channels, int64_t rows,
                                          const Deinterleaved& layout, Accumulator<T>* to) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    const int64_t residue_stride = layout.residue_stride;
    const int64_t channel_stride = layout.channel_stride, channel_step = array.stride_c;
    for (int64_t k = 0; k < layout.lanes<A>(); k += L) {
        const int64_t column = (layout.cell + k) * Factor;
        const auto stage_rows = [&](auto load_residues) __attribute__((always_inline)) {
            for (int64_t r = 0; r < rows; r++) {
                const T* from = first + r * array.stride_h + column;
                A* cells = to + r * layout.row_stride + k;
                for (int64_t c = 0; c < channels; c++, from += channel_step, cells += channel_stride) {
                    Vector<A> residues[Factor];
                    load_residues(from, residues);
#pragma GCC unroll 8
                    for (int residue = 0; residue < Factor; residue++)
                        store(residues[residue], cells + residue * residue_stride);
                }
            }
        };
        if (column >= 0 && column + Factor * L <= array.w) {
            stage_rows([](const T* from, Vector<A>(&residues)[Factor]) __attribute__((always_inline)) {
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
        stage_rows([&](const T* from, Vector<A>(&residues)[Factor]) __attribute__((always_inline)) {
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
    // Few rows of few channels stay in the level 1 cache, even if they lie in the same sets.
    constexpr int64_t kElements = 2048;
    const int64_t row_elements = layout.factor * layout.lanes<A>();
    const int64_t channels_together = std::max<int64_t>(512 / row_elements, 8);
    const int64_t together = std::max<int64_t>(kElements / (channels_together * row_elements), 1);
    const auto shuffle_columns = [&](auto factor) __attribute__((always_inline)) {
        for (int64_t c = 0; c < channels; c += channels_together) {
            for (int64_t r = 0; r < rows.size(); r += together) {
                deinterleave_columns<decltype(factor)::value>(
                    array, element<const T>(array, n, channel + c, rows.begin + r, 0),
                    std::min(channels - c, channels_together), std::min(rows.size() - r, together), layout,
                    to + c * layout.channel_stride + r * layout.row_stride);
            }
        }
    };
    if (array.stride_w == 1 && with_shuffles(layout.factor, shuffle_columns)) return;
    for (int64_t c = 0; c < channels; c++, to += layout.channel_stride) {
        const T* from = element<const T>(array, n, channel + c, rows.begin, 0);
        for (int64_t r = 0; r < rows.size(); r++, from += array.stride_h)
            deinterleave_strided(from, array.stride_w, array.w, layout, to + r * layout.row_stride);
    }
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

template <class T>
void copy_non_temporal(const T* from, int64_t count, T* to) {
    const int64_t line = 64 / int64_t{sizeof(T)};
    int64_t k = std::min(count, (line - elements_before(to)) % line);
    std::copy_n(from, k, to);
    const auto copy_lines = [&](auto lines) __attribute__((always_inline)) {
        constexpr int kLines = decltype(lines)::value;
        for (; k + kLines * line <= count; k += kLines * line) {
            const char* const bytes = reinterpret_cast<const char*>(from + k);
            char* const copies = reinterpret_cast<char*>(to + k);
#pragma GCC unroll 16
            for (int byte = 0; byte < kLines * 64; byte += kVectorBytes) {
                store_non_temporal(load(reinterpret_cast<const float*>(bytes + byte)),
                                   reinterpret_cast<float*>(copies + byte));
            }
        }
    };
    copy_lines(std::integral_constant<int, 4>());
    copy_lines(std::integral_constant<int, 1>());
    std::copy_n(from + k, count - k, to + k);
}

template void copy_non_temporal(const float*, int64_t, float*);
template void copy_non_temporal(const double*, int64_t, double*);
template void copy_non_temporal(const Float16*, int64_t, Float16*);
template void copy_non_temporal(const BFloat16*, int64_t, BFloat16*);
template void interleave_row(const float*, int64_t, int, const Array&, int64_t, int64_t, int64_t, Range);
template void interleave_row(const double*, int64_t, int, const Array&, int64_t, int64_t, int64_t, Range);
template void deinterleave_rows(const Array&, int64_t, int64_t, int64_t, Range, const Deinterleaved&, float*);
template void deinterleave_rows(const Array&, int64_t, int64_t, int64_t, Range, const Deinterleaved&, double*);

}  // namespace carafepp::CARAFEPP_ISA
