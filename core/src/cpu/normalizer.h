// SPDX-License-Identifier: Apache-2.0
// The kernel normalisers (section 3.2 and Table 14 of the paper) and their gradients, on a staged tile: tap t of lane q
// at [t*lanes + q]. Every lane is one output pixel; loops over lanes are innermost so that they vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "problem.h"

namespace carafepp {

template <class A>
static A sigmoid(A logit) {
    const A small = std::exp(-std::abs(logit));  // never overflows
    return (logit < 0 ? small : A{1}) / (A{1} + small);
}

template <class A>
static A log_sigmoid(A logit) {
    return (logit < 0 ? logit : A{0}) - std::log1p(std::exp(-std::abs(logit)));
}

// tile[t][q] = softmax of tile[.][q] at t. `scratch` holds 2*lanes.
template <class A>
static void softmax(A* tile, int64_t taps, int64_t lanes, A* scratch) {
    A* const largest = scratch;
    A* const sum = scratch + lanes;
    for (int64_t q = 0; q < lanes; q++) largest[q] = -std::numeric_limits<A>::infinity();
    for (int64_t q = 0; q < lanes; q++) sum[q] = 0;
    for (int64_t t = 0; t < taps; t++) {
        const A* row = tile + t * lanes;
        for (int64_t q = 0; q < lanes; q++) largest[q] = row[q] > largest[q] ? row[q] : largest[q];
    }
    for (int64_t t = 0; t < taps; t++) {
        A* row = tile + t * lanes;
        for (int64_t q = 0; q < lanes; q++) row[q] = std::exp(row[q] - largest[q]);
        for (int64_t q = 0; q < lanes; q++) sum[q] += row[q];
    }
    for (int64_t t = 0; t < taps; t++) {
        A* row = tile + t * lanes;
        for (int64_t q = 0; q < lanes; q++) row[q] /= sum[q];
    }
}

// Logits to masks, in place.
template <class A>
static void normalize(carafepp_normalizer normalizer, A* tile, int64_t taps, int64_t lanes, A* scratch) {
    switch (normalizer) {
        case CARAFEPP_SOFTMAX: softmax(tile, taps, lanes, scratch); break;
        case CARAFEPP_SIGMOID:
            for (int64_t q = 0; q < taps * lanes; q++) tile[q] = sigmoid(tile[q]);
            break;
        case CARAFEPP_SIGMOID_NORMALIZED:
            for (int64_t q = 0; q < taps * lanes; q++) tile[q] = log_sigmoid(tile[q]);
            softmax(tile, taps, lanes, scratch);
            break;
        default: break;
    }
}

// The gradient of masks to that of logits, in place.
template <class A>
static void normalize_backward(carafepp_normalizer normalizer, A* grad, const A* masks, const A* logits, int64_t taps,
                               int64_t lanes, A* scratch) {
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer == CARAFEPP_SIGMOID) {
        for (int64_t q = 0; q < taps * lanes; q++) grad[q] *= masks[q] * (A{1} - masks[q]);
        return;
    }
    A* const mean = scratch;  // of the gradient, weighted by the masks
    for (int64_t q = 0; q < lanes; q++) mean[q] = 0;
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t q = 0; q < lanes; q++) mean[q] += masks[t * lanes + q] * grad[t * lanes + q];
    }
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t q = 0; q < lanes; q++)
            grad[t * lanes + q] = masks[t * lanes + q] * (grad[t * lanes + q] - mean[q]);
    }
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        for (int64_t q = 0; q < taps * lanes; q++) grad[q] *= sigmoid(-logits[q]);  // the derivative of log_sigmoid
    }
}

}  // namespace carafepp
