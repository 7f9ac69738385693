// SPDX-License-Identifier: Apache-2.0
// The kernel normalisers (section 3.2 and Table 14 of the paper) and their gradients, one source for host and device.
//
// normalize_taps() serves the kernels that tell it how to load, reduce and store taps, as numbers or vectors. Copies of
// its formulas stay, each for a reason:
//
//   - normalize() serves the reference and the generic CUDA kernels, on tiles of any number of lanes: tap t of lane q
//     is tile[t*pitch + q]. Compilers vectorise its innermost loops over lanes. It divides by the sum, as the
//     definition does; a product with the reciprocal rounds otherwise.
//   - normalize_registers() keeps the taps of CUDA kernels in registers (cuda/masks.h). So does softmax() of the
//     gradients for up x2 and down x2, which also sums the gradients (cuda/grad_masks.h).
//   - softmax() and normalize_by_sigmoid() serve masks that become 16 bits (cuda/up2/grad_features_up2_mma.h). The
//     second asks for logits again, as it is rare.
//   - finish_staging() shares the taps of an output among threads (cuda/masks.h); normalize_line() has an output in a
//     thread (cuda/any/stage_lines.h). Both are in shared memory.
//   - stage_rows_of_taps() has taps of an output in registers of some threads (cuda/any/grad_features_units.h).
//   - BandStage leaves the division by the sum to the sums of products (cuda/any/stage_bands.h).
//   - through_normalizer() has some taps of four outputs in a thread, and the sums in registers
//     (cuda/any/grad_masks_tiles.h).
//   - to_multiples() has taps of a pixel in a thread, and leaves their factor to its caller (cuda/up1/up1.h).
//   - mask_of() needs no memory for the other taps of a mask (cuda/masks.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

#define CARAFEPP_NORMALIZER CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline

namespace carafepp {

// The functions of a value, which is a number here; cpu/simd/normalize.h has those of vectors.
template <class V>
struct Arithmetic {
    using Number = V;
    CARAFEPP_NORMALIZER V minus_magnitude(V x) { return -std::fabs(x); }
    CARAFEPP_NORMALIZER V exp_of_nonpositive(V x) { return std::exp(x); }
    CARAFEPP_NORMALIZER V log1p_of_fraction(V x) { return std::log1p(x); }
};

template <class V>
CARAFEPP_NORMALIZER V sigmoid(V logit) {
    using Number = typename Arithmetic<V>::Number;
    const V small = Arithmetic<V>::exp_of_nonpositive(Arithmetic<V>::minus_magnitude(logit));  // never overflows
    return (logit < 0 ? small : V{} + Number{1}) / (small + Number{1});
}

template <class V>
CARAFEPP_NORMALIZER V log_sigmoid(V logit) {
    const V small = Arithmetic<V>::exp_of_nonpositive(Arithmetic<V>::minus_magnitude(logit));
    return (logit < 0 ? logit : V{}) - Arithmetic<V>::log1p_of_fraction(small);
}

// ---- the taps of an output ----
//
// `Taps` tells how they are held: as `count` values of a type Value. A value has a tap of one output, or lanes with
// taps of several outputs, or several taps of each.
//
//     logit(k), mask(k), grad(k)                load the k-th
//     store_mask(k, value), store_grad(k, value)
//     reduce(value, f)                          f over the lanes or threads that hold taps of an output
//     filled(k, value, x)                       the value, but x in lanes without a tap

struct Larger {
    template <class V>
    CARAFEPP_HOST_DEVICE __attribute__((always_inline)) V operator()(V a, V b) const {
        return a > b ? a : b;
    }
};

struct Plus {
    template <class V>
    CARAFEPP_HOST_DEVICE __attribute__((always_inline)) V operator()(V a, V b) const {
        return a + b;
    }
};

// Masks = softmax of load(k).
template <class Taps, class Load>
CARAFEPP_NORMALIZER void softmax_taps(const Taps& taps, Load load) {
    using V = typename Taps::Value;
    using Number = typename Arithmetic<V>::Number;
    constexpr Number kInfinity = static_cast<Number>(INFINITY);
    V largest = taps.filled(0, load(0), -kInfinity), other = largest;  // two dependency chains, to hide latency
    int64_t k = 1;
    for (; k + 1 < taps.count; k += 2) {
        other = Larger()(load(k), other);
        largest = Larger()(taps.filled(k + 1, load(k + 1), -kInfinity), largest);
    }
    if (k < taps.count) other = Larger()(taps.filled(k, load(k), -kInfinity), other);
    largest = taps.reduce(Larger()(other, largest), Larger());
    V sum{};
    for (k = 0; k < taps.count; k++) {
        const V x = taps.filled(k, load(k) - largest, Number{0});  // exp of an infinity would take longer
        const V e = taps.filled(k, Arithmetic<V>::exp_of_nonpositive(x), Number{0});
        taps.store_mask(k, e);
        sum += e;
    }
    const V scale = Number{1} / taps.reduce(sum, Plus());
    for (k = 0; k < taps.count; k++) taps.store_mask(k, taps.mask(k) * scale);
}

// Logits to masks.
template <class Taps>
CARAFEPP_NORMALIZER void normalize_taps(carafepp_normalizer normalizer, const Taps& taps) {
    const auto logit = [&](int64_t k) __attribute__((always_inline)) { return taps.logit(k); };
    const auto mask = [&](int64_t k) __attribute__((always_inline)) { return taps.mask(k); };
    switch (normalizer) {
        case CARAFEPP_SOFTMAX: softmax_taps(taps, logit); break;
        case CARAFEPP_SIGMOID:
            for (int64_t k = 0; k < taps.count; k++) taps.store_mask(k, sigmoid(logit(k)));
            break;
        case CARAFEPP_SIGMOID_NORMALIZED:
            for (int64_t k = 0; k < taps.count; k++) taps.store_mask(k, log_sigmoid(logit(k)));
            softmax_taps(taps, mask);
            break;
        default:
            for (int64_t k = 0; k < taps.count; k++) taps.store_mask(k, logit(k));
    }
}

// The gradient of masks to that of logits, in place.
template <class Taps>
CARAFEPP_NORMALIZER void normalize_taps_backward(carafepp_normalizer normalizer, const Taps& taps) {
    using V = typename Taps::Value;
    using Number = typename Arithmetic<V>::Number;
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer == CARAFEPP_SIGMOID) {
        for (int64_t k = 0; k < taps.count; k++)
            taps.store_grad(k, taps.grad(k) * (taps.mask(k) * (Number{1} - taps.mask(k))));
        return;
    }
    V mean{};  // of the gradient, weighted by the masks
    for (int64_t k = 0; k < taps.count; k++) mean += taps.mask(k) * taps.grad(k);
    mean = taps.reduce(mean, Plus());
    for (int64_t k = 0; k < taps.count; k++) taps.store_grad(k, taps.mask(k) * (taps.grad(k) - mean));
    if (normalizer != CARAFEPP_SIGMOID_NORMALIZED) return;
    // The derivative of log(sigmoid(l)) is sigmoid(-l).
    for (int64_t k = 0; k < taps.count; k++) taps.store_grad(k, taps.grad(k) * sigmoid(-taps.logit(k)));
}

// ---- tiles of any number of lanes ----

// Calls f(k) for the place of each element of a tile.
template <class F>
CARAFEPP_NORMALIZER void for_each_element(int64_t taps, int64_t pitch, int64_t lanes, F f) {
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t q = 0; q < lanes; q++) f(t * pitch + q);
    }
}

// tile[t][q] = softmax of tile[.][q] at t. `scratch` holds 2*lanes, here and below.
template <class A>
CARAFEPP_NORMALIZER void softmax(A* tile, int64_t taps, int64_t pitch, int64_t lanes, A* scratch) {
    A* const largest = scratch;
    A* const sum = scratch + lanes;
    for (int64_t q = 0; q < lanes; q++) largest[q] = -static_cast<A>(INFINITY);
    for (int64_t q = 0; q < lanes; q++) sum[q] = 0;
    for (int64_t t = 0; t < taps; t++) {
        const A* row = tile + t * pitch;
        for (int64_t q = 0; q < lanes; q++) largest[q] = row[q] > largest[q] ? row[q] : largest[q];
    }
    for (int64_t t = 0; t < taps; t++) {
        A* row = tile + t * pitch;
        for (int64_t q = 0; q < lanes; q++) row[q] = std::exp(row[q] - largest[q]);
        for (int64_t q = 0; q < lanes; q++) sum[q] += row[q];
    }
    for (int64_t t = 0; t < taps; t++) {
        A* row = tile + t * pitch;
        for (int64_t q = 0; q < lanes; q++) row[q] /= sum[q];
    }
}

// Logits to masks, in place.
template <class A>
CARAFEPP_NORMALIZER void normalize(carafepp_normalizer normalizer, A* tile, int64_t taps, int64_t pitch, int64_t lanes,
                                   A* scratch) {
    switch (normalizer) {
        case CARAFEPP_SOFTMAX: softmax(tile, taps, pitch, lanes, scratch); break;
        case CARAFEPP_SIGMOID:
            for_each_element(taps, pitch, lanes, [=](int64_t k) { tile[k] = sigmoid(tile[k]); });
            break;
        case CARAFEPP_SIGMOID_NORMALIZED:
            for_each_element(taps, pitch, lanes, [=](int64_t k) { tile[k] = log_sigmoid(tile[k]); });
            softmax(tile, taps, pitch, lanes, scratch);
            break;
        default: break;
    }
}

// The gradient of masks to that of logits, in place.
template <class A>
CARAFEPP_NORMALIZER void normalize_backward(carafepp_normalizer normalizer, A* grad, const A* masks, const A* logits,
                                            int64_t taps, int64_t pitch, int64_t lanes, A* scratch) {
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer == CARAFEPP_SIGMOID) {
        for_each_element(taps, pitch, lanes, [=](int64_t k) { grad[k] *= masks[k] * (A{1} - masks[k]); });
        return;
    }
    A* const mean = scratch;  // of the gradient, weighted by the masks
    for (int64_t q = 0; q < lanes; q++) mean[q] = 0;
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t q = 0; q < lanes; q++) mean[q] += masks[t * pitch + q] * grad[t * pitch + q];
    }
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t q = 0; q < lanes; q++)
            grad[t * pitch + q] = masks[t * pitch + q] * (grad[t * pitch + q] - mean[q]);
    }
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        for_each_element(taps, pitch, lanes, [=](int64_t k) { grad[k] *= sigmoid(-logits[k]); });  // log_sigmoid's
    }
}

}  // namespace carafepp
