// SPDX-License-Identifier: Apache-2.0
// The cases of cases/table.py, and the formulas of carafepp.h as plain loops in double. C++ computes them itself,
// because its tests make arrays while they run. By tests/test_definition.py, reference.py gives the same numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "carafepp/carafepp.h"

namespace definition {

using Shape = std::vector<int64_t>;  // N, C, H, W
using Numbers = std::vector<double>;

inline int64_t count(const Shape& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

struct Case {
    std::string name;
    int64_t n, c, h, w;
    int up, down, kernel_size, groups;
    int64_t crop_h = -1, crop_w = -1;        // no crop
    bool for_cuda = false;                   // a shape around the tiles of CUDA kernels
    int64_t padding_h = -1, padding_w = -1;  // the default

    bool padded() const { return padding_h >= 0; }
    int64_t offset_h() const { return padded() ? kernel_size / 2 - padding_h : 0; }
    int64_t offset_w() const { return padded() ? kernel_size / 2 - padding_w : 0; }
    int64_t centres_h() const { return std::max<int64_t>(h - 2 * offset_h(), 0); }
    int64_t centres_w() const { return std::max<int64_t>(w - 2 * offset_w(), 0); }
    int64_t out_h() const { return crop_h < 0 ? (centres_h() * up + down - 1) / down : crop_h; }
    int64_t out_w() const { return crop_w < 0 ? (centres_w() * up + down - 1) / down : crop_w; }
    int64_t cells_h() const { return (centres_h() + down - 1) / down; }
    int64_t cells_w() const { return (centres_w() + down - 1) / down; }
    int64_t taps() const { return int64_t{kernel_size} * kernel_size; }

    int64_t terms() const { return n * c * out_h() * out_w() * taps(); }  // of one forward pass

    Shape features() const { return {n, c, h, w}; }
    Shape output() const { return {n, c, out_h(), out_w()}; }
    Shape masks() const { return {n, groups * taps(), out_h(), out_w()}; }
    Shape logits() const { return {n, groups * taps() * up * up, cells_h(), cells_w()}; }
};

// All rows of the table, which CMake writes.
inline const Case kCases[] = {
#include "cases.inc"
};

// The parameters of a call: without crop and padding, or with those of a case.
inline carafepp_params params_of(int up, int down, int kernel_size, int groups, int normalizer = CARAFEPP_SOFTMAX) {
    carafepp_params params{};
    params.struct_size = sizeof params;
    params.up = up;
    params.down = down;
    params.kernel_size = kernel_size;
    params.groups = groups;
    params.normalizer = normalizer;
    return params;
}

inline carafepp_params params_of(const Case& p, int normalizer = CARAFEPP_NONE) {
    carafepp_params params = params_of(p.up, p.down, p.kernel_size, p.groups, normalizer);
    params.flags = CARAFEPP_SIZE;
    params.size[0] = p.out_h();
    params.size[1] = p.out_w();
    if (p.padded()) params.flags |= CARAFEPP_PADDING;
    params.padding[0] = p.padding_h;
    params.padding[1] = p.padding_w;
    return params;
}

// A result, and the sum of the magnitudes of the products that it consists of.
struct Sums {
    Numbers value, magnitude;
    explicit Sums(const Shape& shape) : value(static_cast<size_t>(count(shape))), magnitude(value.size()) {}
    void add(size_t at, double a, double b) {
        value[at] += a * b;
        magnitude[at] += std::abs(a * b);
    }
};

// Call f(output, mask, feature) with the indices of every output and each of its taps inside the border.
template <class F>
void for_each_term(const Case& p, F f) {
    const int64_t k = p.kernel_size, r = k / 2;
    for (int64_t n = 0; n < p.n; n++)
        for (int64_t c = 0; c < p.c; c++)
            for (int64_t oi = 0; oi < p.out_h(); oi++)
                for (int64_t oj = 0; oj < p.out_w(); oj++)
                    for (int64_t a = -r; a <= r; a++)
                        for (int64_t b = -r; b <= r; b++) {
                            const int64_t i = oi * p.down / p.up + p.offset_h() + a,
                                          j = oj * p.down / p.up + p.offset_w() + b;
                            if (i < 0 || i >= p.h || j < 0 || j >= p.w) continue;
                            const int64_t g = c / (p.c / p.groups);
                            const int64_t channel = n * p.groups * p.taps() + g * p.taps() + (a + r) * k + b + r;
                            f(static_cast<size_t>(((n * p.c + c) * p.out_h() + oi) * p.out_w() + oj),
                              static_cast<size_t>((channel * p.out_h() + oi) * p.out_w() + oj),
                              static_cast<size_t>(((n * p.c + c) * p.h + i) * p.w + j));
                        }
}

inline Sums reassemble(const Case& p, const Numbers& features, const Numbers& masks) {
    Sums output(p.output());
    for_each_term(p, [&](size_t y, size_t m, size_t x) { output.add(y, masks[m], features[x]); });
    return output;
}

inline Sums grad_features(const Case& p, const Numbers& grad_output, const Numbers& masks) {
    Sums grad(p.features());
    for_each_term(p, [&](size_t y, size_t m, size_t x) { grad.add(x, grad_output[y], masks[m]); });
    return grad;
}

inline Sums grad_masks(const Case& p, const Numbers& grad_output, const Numbers& features) {
    Sums grad(p.masks());
    for_each_term(p, [&](size_t y, size_t m, size_t x) { grad.add(m, grad_output[y], features[x]); });
    return grad;
}

// Call f(masks, logits) for every output and group: the indices of its taps.
template <class F>
void for_each_window(const Case& p, F f) {
    const size_t taps = static_cast<size_t>(p.taps());
    std::vector<size_t> masks(taps), logits(taps);
    for (int64_t n = 0; n < p.n; n++)
        for (int64_t g = 0; g < p.groups; g++)
            for (int64_t oi = 0; oi < p.out_h(); oi++)
                for (int64_t oj = 0; oj < p.out_w(); oj++) {
                    for (int64_t t = 0; t < p.taps(); t++) {
                        const int64_t channel = (n * p.groups + g) * p.taps() + t;
                        const int64_t shuffled = (channel * p.up + oi % p.up) * p.up + oj % p.up;
                        masks[static_cast<size_t>(t)] = static_cast<size_t>((channel * p.out_h() + oi) * p.out_w() +
                                                                            oj);
                        logits[static_cast<size_t>(t)] = static_cast<size_t>(
                            (shuffled * p.cells_h() + oi / p.up) * p.cells_w() + oj / p.up);
                    }
                    f(masks, logits);
                }
}

inline double sigmoid(double logit) { return 1 / (1 + std::exp(-logit)); }

// log(sigmoid(logit)) without overflow.
inline double log_sigmoid(double logit) { return std::min(logit, 0.0) - std::log1p(std::exp(-std::abs(logit))); }

inline Numbers normalized(Numbers taps, carafepp_normalizer normalizer) {
    if (normalizer == CARAFEPP_NONE) return taps;
    if (normalizer == CARAFEPP_SIGMOID) {
        for (double& tap : taps) tap = sigmoid(tap);
        return taps;
    }
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        for (double& tap : taps) tap = log_sigmoid(tap);
    }
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (double tap : taps) largest = std::max(largest, tap);
    for (double& tap : taps) sum += tap = std::exp(tap - largest);
    for (double& tap : taps) tap /= sum;
    return taps;
}

inline Sums normalize_masks(const Case& p, const Numbers& logits, carafepp_normalizer normalizer) {
    Sums result(p.masks());
    for_each_window(p, [&](const std::vector<size_t>& masks_at, const std::vector<size_t>& logits_at) {
        Numbers taps;
        for (size_t at : logits_at) taps.push_back(logits[at]);
        taps = normalized(taps, normalizer);
        for (size_t t = 0; t < taps.size(); t++) result.add(masks_at[t], taps[t], 1);
    });
    return result;
}

// The magnitude of the factor 1 - sigmoid is 1, as it may be computed by that subtraction.
inline Sums normalize_masks_backward(const Case& p, const Sums& grad_masks, const Numbers& logits,
                                     carafepp_normalizer normalizer) {
    Sums result(p.logits());
    for_each_window(p, [&](const std::vector<size_t>& masks_at, const std::vector<size_t>& logits_at) {
        Numbers taps;
        for (size_t at : logits_at) taps.push_back(logits[at]);
        const Numbers masks = normalized(taps, normalizer);
        const bool has_sum = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
        double mean = 0, mean_magnitude = 0;
        for (size_t t = 0; has_sum && t < taps.size(); t++) {
            mean += masks[t] * grad_masks.value[masks_at[t]];
            mean_magnitude += std::abs(masks[t]) * grad_masks.magnitude[masks_at[t]];
        }
        for (size_t t = 0; t < taps.size(); t++) {
            const double weight = normalizer == CARAFEPP_NONE ? 1 : masks[t];
            const bool has_sigmoid = normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
            const double slope = has_sigmoid ? sigmoid(-taps[t]) : 1;
            result.value[logits_at[t]] = weight * (grad_masks.value[masks_at[t]] - mean) * slope;
            result.magnitude[logits_at[t]] = weight * (grad_masks.magnitude[masks_at[t]] + mean_magnitude);
        }
    });
    return result;
}

}  // namespace definition
