// SPDX-License-Identifier: Apache-2.0
// A checked problem: shapes, and index arithmetic (one source for host and device).
#pragma once

#include <cstdint>

#include "carafepp/carafepp.h"

#if defined(__CUDACC__)
#define CARAFEPP_HOST_DEVICE __host__ __device__
#else
#define CARAFEPP_HOST_DEVICE
#endif

namespace carafepp {

constexpr int kMaxKernelSize = 31;

// One array of a call, its axes N, C, H, W whatever the caller's were; strides in elements.
struct Array {
    void* data = nullptr;
    carafepp_dtype dtype = 0;
    int64_t n = 0, c = 0, h = 0, w = 0;
    int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;

    bool empty() const { return n == 0 || c == 0 || h == 0 || w == 0; }
};

// For b > 0.
CARAFEPP_HOST_DEVICE constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
CARAFEPP_HOST_DEVICE constexpr int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
CARAFEPP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// The rational factor, for rows and columns alike.
struct Factor {
    int64_t up = 1, down = 1;

    // The source that an output is centred on, with the default padding.
    CARAFEPP_HOST_DEVICE constexpr int64_t source(int64_t output) const { return output * down / up; }

    // The first output centred on `source` or behind it. It is also how many outputs are centred on earlier sources.
    CARAFEPP_HOST_DEVICE constexpr int64_t first_output(int64_t source) const { return ceil_div(source * up, down); }
};

// Rows or columns: which source an output is centred on, and the reverse.
struct Axis {
    Factor factor;
    int64_t offset;  // kernel_size/2 - padding, the source of output 0

    // src(i')
    CARAFEPP_HOST_DEVICE constexpr int64_t source(int64_t output) const { return factor.source(output) + offset; }

    // The first output centred on `source` or behind it. Before any crop, source i is in the windows of the outputs
    // [first_output(i - r), first_output(i + r + 1)).
    CARAFEPP_HOST_DEVICE constexpr int64_t first_output(int64_t source) const {
        return factor.first_output(source - offset);
    }

    // How many rows or columns of features, of `size`, windows can be centred on.
    CARAFEPP_HOST_DEVICE constexpr int64_t centres(int64_t size) const {
        return size > 2 * offset ? size - 2 * offset : 0;
    }

    // How many outputs there are without a crop.
    CARAFEPP_HOST_DEVICE constexpr int64_t natural_size(int64_t size) const {
        return factor.first_output(centres(size));
    }
};

// A call whose arguments were found right. Arrays that its function does not have are empty.
struct Problem {
    Factor factor;
    int64_t kernel_size = 1;
    int64_t groups = 1;
    carafepp_normalizer normalizer = CARAFEPP_NONE;
    carafepp_device device = CARAFEPP_CPU;
    int32_t device_index = 0;
    void* stream = nullptr;              // of CUDA
    bool from_logits = false;            // masks come from `logits`, normalised while they are read
    int64_t offset_h = 0, offset_w = 0;  // kernel_size/2 - padding
    int64_t out_h = 0, out_w = 0;        // H', W'

    Array features, masks, logits, grad_output, grad_masks;  // the inputs

    CARAFEPP_HOST_DEVICE int64_t taps() const { return kernel_size * kernel_size; }
    CARAFEPP_HOST_DEVICE int64_t radius() const { return kernel_size / 2; }
    CARAFEPP_HOST_DEVICE Axis rows() const { return {factor, offset_h}; }
    CARAFEPP_HOST_DEVICE Axis columns() const { return {factor, offset_w}; }

    // The cost of a call in multiply-adds, about: contraction, with taps beyond the border, and staging of masks.
    double cost() const {
        constexpr int64_t kCostOfMask = 8;
        return static_cast<double>(taps()) * static_cast<double>(features.n) *
               static_cast<double>(features.c + kCostOfMask * groups) * static_cast<double>(out_h) *
               static_cast<double>(out_w);
    }
};

}  // namespace carafepp
