// SPDX-License-Identifier: Apache-2.0
// The normalisers of normalizer.h by vectors, on a staged tile. The lanes of tap t of phase p are a vector, which
// begins at (t*phases + p)*pitch.
#pragma once

#include "cpu/simd/vector.h"
#include "normalizer.h"

namespace carafepp {

template <class A>
struct VectorArithmetic {
    using Number = A;
    using V = Vector<A>;

    CARAFEPP_INLINE V minus_magnitude(V x) { return x < 0 ? x : -x; }
    CARAFEPP_INLINE V exp_of_nonpositive(V x) { return carafepp::exp_of_nonpositive(x); }

    // log(1 + y) for y in [0, 1], as 2*atanh(s) with s = y/(2+y) <= 1/3. The terms left out are below half a unit in
    // the last place.
    CARAFEPP_INLINE V log1p_of_fraction(V y) {
        constexpr int kTerms = sizeof(A) == sizeof(float) ? 7 : 16;
        const V s = y / (y + A{2}), square = s * s;
        V sum = splat(A{1} / (2 * kTerms + 1));
#pragma GCC unroll 16
        for (int k = kTerms - 1; k >= 0; k--) sum = sum * square + A{1} / static_cast<A>(2 * k + 1);
        return s * sum * A{2};
    }
};
template <>
struct Arithmetic<Vector<float>> : VectorArithmetic<float> {};
template <>
struct Arithmetic<Vector<double>> : VectorArithmetic<double> {};

namespace {

// The taps of one phase of a tile, `step` apart. Each lane of a vector is an output.
template <class A>
struct TileTaps {
    using Value = Vector<A>;

    const A* logits;  // may be the masks
    A *masks, *grads;
    int64_t count, step;

    CARAFEPP_MEMBER Value logit(int64_t k) const { return load(logits + k * step); }
    CARAFEPP_MEMBER Value mask(int64_t k) const { return load(masks + k * step); }
    CARAFEPP_MEMBER Value grad(int64_t k) const { return load(grads + k * step); }
    CARAFEPP_MEMBER void store_mask(int64_t k, Value mask) const { store(mask, masks + k * step); }
    CARAFEPP_MEMBER void store_grad(int64_t k, Value grad) const { store(grad, grads + k * step); }
    template <class F>
    CARAFEPP_MEMBER Value reduce(Value value, F) const {
        return value;
    }
    CARAFEPP_MEMBER Value filled(int64_t, Value value, A) const { return value; }
};

// Logits to masks, in place.
template <class A>
void normalize_tile(carafepp_normalizer normalizer, A* tile, int64_t taps, int64_t phases, int64_t pitch) {
    if (normalizer == CARAFEPP_NONE) return;
    for (A* first = tile; first < tile + phases * pitch; first += pitch)
        normalize_taps(normalizer, TileTaps<A>{first, first, nullptr, taps, phases * pitch});
}

// The gradient of masks to that of logits, in place.
template <class A>
void normalize_tile_backward(carafepp_normalizer normalizer, A* grad, A* masks, const A* logits, int64_t taps,
                             int64_t phases, int64_t pitch) {
    for (int64_t at = 0; at < phases * pitch; at += pitch)
        normalize_taps_backward(normalizer, TileTaps<A>{logits + at, masks + at, grad + at, taps, phases * pitch});
}

}  // namespace
}  // namespace carafepp
