// SPDX-License-Identifier: Apache-2.0
// Geometry of the kernels for up x2: the window of a source serves its four outputs.
#pragma once

#include "cuda/masks.h"
#include "cuda/window.h"

namespace carafepp::cuda {

constexpr int kUp = 2, kOutputs = kUp * kUp;  // of a source

// Why these kernels do not take a problem.
inline const char* not_for_up2(const Problem& p, int64_t largest_kernel) {
    if (p.factor.up != kUp || p.factor.down != 1) return "the factor is not 2";
    if (p.kernel_size < 3 || p.kernel_size > largest_kernel)
        return largest_kernel == 5 ? "kernel_size is not 3 or 5" : "kernel_size is not 3, 5 or 7";
    if (p.offset_h != 0 || p.offset_w != 0) return kLittlePadding;
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    if (p.features.h > INT32_MAX / kUp - 64 || p.features.w > INT32_MAX / kUp - 64)
        return "rows or columns are too many";
    return nullptr;
}

// The columns of a warp that has `pixels` of a tile: `few`, or twice as many in half of the rows, if warps then have
// fewer pixels that do not exist.
inline int columns_of_warp(const Problem& p, int pixels, int few) {
    const auto computed = [&](int columns) {
        const int64_t rows = pixels / columns;
        return ceil_div(p.features.h, rows) * rows * ceil_div(p.features.w, columns) * columns;
    };
    return computed(2 * few) < computed(few) ? 2 * few : few;
}

// With columns in lanes, of two arrays.
inline const char* not_for_columns_of_up2(const Problem& p, const Array& one, const Array& other,
                                          int64_t largest_kernel = 5) {
    if (const char* reason = not_for_up2(p, largest_kernel)) return reason;
    for (const Array* array : {&one, &other}) {
        if (!array->empty() && array->stride_w != 1) return "columns are not adjacent";
    }
    return nullptr;
}

}  // namespace carafepp::cuda
