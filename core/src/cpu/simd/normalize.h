// SPDX-License-Identifier: Apache-2.0
// The normalisers of normalizer.h and their gradients, by vectors, on a staged tile: the lanes of tap t of
// phase p, as many as a vector has, from (t*phases + p)*pitch on.
#pragma once

#include "cpu/simd/vector.h"

namespace carafepp {
namespace {

// log(1 + y) for y in [0, 1], as 2*atanh(s) with s = y/(2+y) <= 1/3: the terms left out are below half a unit in the
// last place.
template <class A>
CARAFEPP_INLINE Vector<A> log1p_of_fraction(Vector<A> y) {
    constexpr int kTerms = sizeof(A) == sizeof(float) ? 7 : 16;
    const Vector<A> s = y / (y + A{2}), square = s * s;
    Vector<A> sum = splat(A{1} / (2 * kTerms + 1));
#pragma GCC unroll 16
    for (int k = kTerms - 1; k >= 0; k--) sum = sum * square + A{1} / static_cast<A>(2 * k + 1);
    return s * sum * A{2};
}

template <class A>
CARAFEPP_INLINE Vector<A> sigmoid_of(Vector<A> logit) {
    const Vector<A> small = exp_of_nonpositive(logit < 0 ? logit : -logit);
    return (logit < 0 ? small : splat(A{1})) / (small + A{1});
}

template <class A>
CARAFEPP_INLINE Vector<A> log_sigmoid_of(Vector<A> logit) {
    const Vector<A> small = exp_of_nonpositive(logit < 0 ? logit : -logit);
    return (logit < 0 ? logit : Vector<A>{}) - log1p_of_fraction<A>(small);
}

// Softmax over taps that lie `step` apart, of one vector of lanes.
template <class A>
CARAFEPP_INLINE void softmax_of(A* first, int64_t taps, int64_t step) {
    Vector<A> largest = load(first),
              of_odd = largest;  // two chains, as one would wait for itself; taps are odd in number
    for (int64_t t = 1; t + 1 < taps; t += 2) {
        of_odd = larger(load(first + t * step), of_odd);
        largest = larger(load(first + (t + 1) * step), largest);
    }
    largest = larger(of_odd, largest);
    Vector<A> sum = {};
    for (int64_t t = 0; t < taps; t++) {
        const Vector<A> e = exp_of_nonpositive(load(first + t * step) - largest);
        store(e, first + t * step);
        sum += e;
    }
    const Vector<A> scale = A{1} / sum;
    for (int64_t t = 0; t < taps; t++) store(load(first + t * step) * scale, first + t * step);
}

// Gradients of masks to gradients of what softmax took, in place.
template <class A>
CARAFEPP_INLINE void softmax_backward_of(A* grad, const A* masks, int64_t taps, int64_t step) {
    Vector<A> mean = {};  // of the gradient, weighted by the masks
    for (int64_t t = 0; t < taps; t++) mean += load(masks + t * step) * load(grad + t * step);
    for (int64_t t = 0; t < taps; t++) store(load(masks + t * step) * (load(grad + t * step) - mean), grad + t * step);
}

// Logits to masks, in place.
template <class A>
void normalize_tile(carafepp_normalizer normalizer, A* tile, int64_t taps, int64_t phases, int64_t pitch) {
    const int64_t end = taps * phases * pitch;
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer == CARAFEPP_SIGMOID) {
        for (int64_t k = 0; k < end; k += pitch) store(sigmoid_of<A>(load(tile + k)), tile + k);
        return;
    }
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        for (int64_t k = 0; k < end; k += pitch) store(log_sigmoid_of<A>(load(tile + k)), tile + k);
    }
    for (int64_t phase = 0; phase < phases; phase++) softmax_of(tile + phase * pitch, taps, phases * pitch);
}

// The gradient of masks to that of logits, in place.
template <class A>
void normalize_tile_backward(carafepp_normalizer normalizer, A* grad, const A* masks, const A* logits, int64_t taps,
                             int64_t phases, int64_t pitch) {
    const int64_t end = taps * phases * pitch;
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer == CARAFEPP_SIGMOID) {
        for (int64_t k = 0; k < end; k += pitch) {
            const Vector<A> mask = load(masks + k);
            store(load(grad + k) * (mask * (A{1} - mask)), grad + k);
        }
        return;
    }
    for (int64_t phase = 0; phase < phases; phase++)
        softmax_backward_of(grad + phase * pitch, masks + phase * pitch, taps, phases * pitch);
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        // The derivative of log(sigmoid(l)) is sigmoid(-l).
        for (int64_t k = 0; k < end; k += pitch) store(load(grad + k) * sigmoid_of<A>(-load(logits + k)), grad + k);
    }
}

}  // namespace
}  // namespace carafepp
