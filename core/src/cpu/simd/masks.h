// SPDX-License-Identifier: Apache-2.0
// The masks of a tile, staged in L1: copied, or normalised from logits.
//
// A cell is `up` columns of outputs (phases) over `down` columns of sources. A tile is as many neighbouring cells as a
// vector has lanes, over the output rows of one band; it is staged as [row of the band][tap][phase][cell], so that
// normalising is arithmetic on whole vectors, and a kernel reads either one weight (an output of one cell) or a vector
// of them (an output of all cells).
#pragma once

#include <algorithm>

#include "cpu/normalizer.h"
#include "cpu/simd/vector.h"

namespace carafepp {
namespace {

// Up to a vector of elements that lie `stride` apart; lanes beyond `count` are 0.
template <class M>
CARAFEPP_INLINE void load_lanes(const M* from, int64_t stride, int count, Accumulator<M>* to) {
    using A = Accumulator<M>;
    if (stride == 1) {
        store(load_between(from, 0, count), to);
        return;
    }
    if (stride == 2 && count > 0) {
        store(load_every<2>(from, 0, 2 * count - 1), to);
        return;
    }
    for (int q = 0; q < count; q++) to[q] = widen(from[q * stride]);
    for (int q = count; q < kLanes<A>; q++) to[q] = 0;
}

// Softmax over taps, for each phase and lane.
CARAFEPP_INLINE void softmax_of_tile(float* tile, int64_t taps, int64_t phases) {
    const int64_t step = phases * kLanes<float>;
    for (int64_t p = 0; p < phases; p++) {
        float* const first = tile + p * kLanes<float>;
        Vector<float> largest = load(first);
        for (int64_t t = 1; t < taps; t++) largest = larger(load(first + t * step), largest);
        Vector<float> sum = splat(0.0f);
        for (int64_t t = 0; t < taps; t++) {
            const Vector<float> e = exp_of_nonpositive(load(first + t * step) - largest);
            store(e, first + t * step);
            sum += e;
        }
        const Vector<float> scale = 1.0f / sum;
        for (int64_t t = 0; t < taps; t++) store(load(first + t * step) * scale, first + t * step);
    }
}

// Tiles of one problem. M is the type masks or logits are stored in.
template <class M>
struct MaskTiles {
    using A = Accumulator<M>;

    const Problem& problem;
    int64_t phases;  // columns of outputs in a cell: min(up, W')

    int64_t row_size() const { return problem.taps() * phases * kLanes<A>; }

    // Stages one output row of `count` cells from `cell` on; `spare` holds 2 * phases * kLanes.
    void stage(int64_t n, int64_t group, int64_t out_i, int64_t cell, int count, A* to, A* spare) const {
        const Problem& p = problem;
        const int64_t taps = p.taps(), up = p.factor.up;
        for (int64_t phase = 0; phase < phases; phase++) {
            const M* from;
            int64_t tap_stride, stride, there = count;  // lanes that have an output
            if (p.from_logits) {
                from = element<const M>(p.logits, n, (group * taps * up + out_i % up) * up + phase, out_i / up, cell);
                tap_stride = up * up * p.logits.stride_c;
                stride = p.logits.stride_w;
            } else {
                from = element<const M>(p.masks, n, group * taps, out_i, cell * up + phase);
                tap_stride = p.masks.stride_c;
                stride = up * p.masks.stride_w;
                there = std::min(there, ceil_div(p.out_w - phase, up) - cell);
            }
            for (int64_t t = 0; t < taps; t++) {
                load_lanes(from + t * tap_stride, stride, static_cast<int>(there),
                           to + (t * phases + phase) * kLanes<A>);
            }
        }
        if (!p.from_logits) return;
        if constexpr (sizeof(A) == sizeof(float)) {
            if (p.normalizer == CARAFEPP_SOFTMAX) {
                softmax_of_tile(to, taps, phases);
                return;
            }
        }
        normalize(p.normalizer, to, taps, phases * kLanes<A>, spare);
    }
};

}  // namespace
}  // namespace carafepp
