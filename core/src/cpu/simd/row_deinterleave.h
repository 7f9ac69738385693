// SPDX-License-Identifier: Apache-2.0
// Rows of an array to rows of lanes, by column modulo a factor, and back. For outputs the factor is `up`, and this
// residue is the phase. For sources the factor is `down` (cpu/geometry.h).
#pragma once

#include <algorithm>

#include "cpu/geometry.h"
#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// How deinterleaved rows lie in scratch: `count` cells from `cell` on, in whole vectors.
struct Deinterleaved {
    int factor;
    int64_t cell, count, channel_stride, row_stride, residue_stride;

    template <class A>
    int64_t lanes() const {
        return ceil_div(count, kLanes<A>) * kLanes<A>;
    }
};

// Channels are adjacent and columns are not, and so many channels make up for transposing.
CARAFEPP_INLINE bool worth_transposing(const Array& array, int64_t channels) {
    return array.stride_c == 1 && array.stride_w != 1 && channels >= 4;
}

// Stages rows of some channels of an array, of any dtype whose sums are kept in A. Row r of channel c goes to `to +
// r*row_stride + c*channel_stride`. Its element [residue*residue_stride + k] is column `(cell + k)*factor + residue`,
// or 0 outside the row.
template <class A>
void deinterleave_rows(const Array& array, int64_t n, int64_t channel, int64_t channels, Range rows,
                       const Deinterleaved& layout, A* to);

// Stores `count` lanes to elements that lie `stride` apart.
template <class T>
CARAFEPP_INLINE void store_lanes(const Accumulator<T>* from, int count, T* to, int64_t stride) {
    if (stride == 1) {
        store_part(load(from), to, count);
        return;
    }
    for (int q = 0; q < count; q++) to[q * stride] = narrow<T>(from[q]);
}

// Stores `count` columns from one vector of each residue: the inverse of deinterleave_rows.
template <int Factor, class T>
CARAFEPP_INLINE void store_interleaved(const Accumulator<T>* from, int64_t residue_stride, int64_t count, T* to) {
    using A = Accumulator<T>;
    Vector<A> columns[Factor];
#pragma GCC unroll 8
    for (int residue = 0; residue < Factor; residue++) columns[residue] = load(from + residue * residue_stride);
    if constexpr (Factor == 2 && std::is_same_v<T, BFloat16>) {
        if (count >= 2 * kLanes<A>) {
            store_alternating(columns[0], columns[1], to);
            return;
        }
    }
    interleave<A, Factor>(columns);
    constexpr int L = kLanes<A>;
    if (count >= Factor * L) {
#pragma GCC unroll 8
        for (int k = 0; k < Factor; k++) store(columns[k], to + k * L);
        return;
    }
    A lanes[Factor * L];
#pragma GCC unroll 8
    for (int k = 0; k < Factor; k++) store(columns[k], lanes + k * L);
#pragma GCC unroll 1
    for (int k = 0; k < Factor; k++) store_part(load(lanes + k * L), to + k * L, count - k * L);
}

// Calls f(factor) with a factor known to the compiler, and returns true, if there are shuffles for it.
template <class F>
CARAFEPP_INLINE bool with_shuffles(int factor, F f) {
    if (factor == 8) {
        f(std::integral_constant<int, 8>());
        return true;
    }
    if (factor > 4) return false;
    with_count<4>(factor, f);
    return true;
}

// The same for any factor, and columns that lie `stride` apart.
template <class T>
CARAFEPP_INLINE void store_interleaved(const Accumulator<T>* from, int64_t residue_stride, int factor, int64_t count,
                                       T* to, int64_t stride) {
    const auto shuffle_columns = [&](auto known_factor) __attribute__((always_inline)) {
        store_interleaved<decltype(known_factor)::value>(from, residue_stride, count, to);
    };
    if (stride == 1 && with_shuffles(factor, shuffle_columns)) return;
    for (int residue = 0; residue < factor; residue++) {
        for (int64_t column = residue, q = 0; column < count && q < kLanes<Accumulator<T>>; column += factor, q++)
            to[column * stride] = narrow<T>(from[residue * residue_stride + q]);
    }
}

// Stores columns of a row of an array, of any dtype whose sums are kept in A. It is the inverse of
// deinterleave_rows.
template <class A>
void interleave_row(const A* from, int64_t residue_stride, int factor, const Array& array, int64_t n, int64_t channel,
                    int64_t row, Range columns);

// Elements before this one in its cache line.
template <class T>
inline int64_t elements_before(const T* at) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % 64 / sizeof(T));
}

// Copies by non-temporal stores, but for the ends that do not fill a line.
template <class T>
void copy_non_temporal(const T* from, int64_t count, T* to);

}  // namespace carafepp::CARAFEPP_ISA
