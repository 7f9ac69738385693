// SPDX-License-Identifier: Apache-2.0
// Geometry of the kernels for down x2: output (i, j) is centred on source (2i, 2j).
#pragma once

#include "cuda/columns.h"
#include "cuda/masks.h"
#include "cuda/window.h"

namespace carafepp::cuda {

constexpr int kDown = 2;

// Why these kernels do not take a problem.
inline const char* not_for_down2(const Problem& p) {
    if (p.factor.up != 1 || p.factor.down != kDown) return "the factor is not 1/2";
    if (p.kernel_size != 3 && p.kernel_size != 5) return "kernel_size is not 3 or 5";
    if (p.offset_h != 0 || p.offset_w != 0) return kLittlePadding;
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    if (p.features.h > INT32_MAX - 128 || p.features.w > INT32_MAX - 128) return "rows or columns are too many";
    return nullptr;
}

}  // namespace carafepp::cuda
