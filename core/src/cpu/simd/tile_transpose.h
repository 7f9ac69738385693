// SPDX-License-Identifier: Apache-2.0
// Adjacent channels of neighbouring cells to lanes, and back, by transposing.
#pragma once

#include <algorithm>

#include "cpu/simd/vector.h"

namespace carafepp::CARAFEPP_ISA {

// The order of the adjacent channels of a cell, and where each is staged. Channels of logits are numbered
// (tap*up + row)*up + phase. Channels of masks are taps: the same with an `up` of 1.
template <class A>
struct ChannelOrder {
    A* staged;  // row 0, phase 0 of tap 0
    int up, first_row, rows, phases;
    int64_t row_size, tap_size, pitch;
    int row = 0, phase = 0;
    int64_t tap_offset = 0;

    void seek(int channel) {
        phase = channel % up;
        row = channel / up % up - first_row;
        tap_offset = channel / (up * up) * tap_size;
    }

    // The next channel; NULL if its row or phase is not staged.
    A* next() {
        A* const channel = row >= 0 && row < rows && phase < phases
                               ? staged + row * row_size + tap_offset + phase * pitch
                               : nullptr;
        if (++phase == up) {
            phase = 0;
            if (++row == up - first_row) {
                row = -first_row;
                tap_offset += tap_size;
            }
        }
        return channel;
    }
};

// Channels that are staged in their order, `pitch` apart.
template <class A>
CARAFEPP_INLINE ChannelOrder<A> adjacent_channels(A* staged, int64_t pitch) {
    return {staged, 1, 0, 1, 1, 0, pitch, 0};
}

// Calls f(begin, size) for blocks of channels as wide as a vector that cover `channels`. The last may overlap the one
// before it.
template <int L, class F>
CARAFEPP_INLINE void for_each_block(int channels, F f) {
    for (int c = 0; c < channels; c += L) f(channels < L ? 0 : std::min(c, channels - L), std::min(channels, L));
}

// Stages `count` cells of `channels` adjacent elements: a cell is a lane. Other lanes become 0.
template <class M>
void load_channels(const M* from, int64_t cell_stride, int count, int channels, ChannelOrder<Accumulator<M>> order);

// The inverse. Channels that are not staged are 0.
template <class M>
void store_channels(ChannelOrder<const Accumulator<M>> order, int count, int channels, M* to, int64_t cell_stride);

// Transposes a block of as many rows as a vector has lanes, perhaps in place.
template <class From, class To>
__attribute__((noinline)) void transpose_block(const From* from, int64_t from_pitch, To* to, int64_t to_pitch) {
    using A = Accumulator<From>;
    constexpr int L = kLanes<A>;
    Vector<A> rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) rows[i] = load(from + i * from_pitch);
    transpose<A>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) store(rows[i], to + i * to_pitch);
}

}  // namespace carafepp::CARAFEPP_ISA
