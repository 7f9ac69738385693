// SPDX-License-Identifier: Apache-2.0
// The kernel normalisers (section 3.2 and Table 14 of the paper) and their gradients, one source for host and device,
// on a staged tile: tap t of lane q at [t*pitch + q]. Every lane is one output pixel; loops over lanes are innermost so
// that they vectorise, and on a device every thread has one lane.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem.h"

namespace carafepp {

template <class A>
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline A sigmoid(A logit) {
    const A small = std::exp(-std::fabs(logit));  // never overflows
    return (logit < 0 ? small : A{1}) / (A{1} + small);
}

template <class A>
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline A log_sigmoid(A logit) {
    return (logit < 0 ? logit : A{0}) - std::log1p(std::exp(-std::fabs(logit)));
}

// Calls f(k) for the place of each element of a tile.
template <class F>
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline void for_each_element(int64_t taps, int64_t pitch,
                                                                                        int64_t lanes, F f) {
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t q = 0; q < lanes; q++) f(t * pitch + q);
    }
}

// tile[t][q] = softmax of tile[.][q] at t. `scratch` holds 2*lanes, here and below.
template <class A>
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline void softmax(A* tile, int64_t taps, int64_t pitch,
                                                                               int64_t lanes, A* scratch) {
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
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline void normalize(carafepp_normalizer normalizer,
                                                                                 A* tile, int64_t taps, int64_t pitch,
                                                                                 int64_t lanes, A* scratch) {
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
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) static inline void normalize_backward(
    carafepp_normalizer normalizer, A* grad, const A* masks, const A* logits, int64_t taps, int64_t pitch,
    int64_t lanes, A* scratch) {
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
