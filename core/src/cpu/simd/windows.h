// SPDX-License-Identifier: Apache-2.0
// Windows with adjacent channels, pixel by pixel: what the kernels for NHWC read or write.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dtypes.h"
#include "problem.h"

namespace carafepp {
namespace {

// The window around one source pixel: where it begins (perhaps outside), and which taps of it are inside the borders.
template <class T>
struct PixelWindow {
    T* corner;
    int64_t row_stride, pixel_stride;
    int a_begin, a_end, b_begin, b_end;

    T* pixel(int64_t a, int64_t b) const { return corner + a * row_stride + b * pixel_stride; }
};

template <class T>
static inline PixelWindow<T> window_of(const Problem& p, const Array& features, int64_t n, int64_t c, int64_t i,
                                       int64_t j) {
    const int64_t top = i - p.radius(), left = j - p.radius();
    return {element<T>(features, n, c, top, left),
            features.stride_h,
            features.stride_w,
            static_cast<int>(std::max<int64_t>(-top, 0)),
            static_cast<int>(std::min(p.kernel_size, features.h - top)),
            static_cast<int>(std::max<int64_t>(-left, 0)),
            static_cast<int>(std::min(p.kernel_size, features.w - left))};
}

// Calls f(n) with n in [1, Most] known to the compiler.
template <int Most, class F>
static inline __attribute__((always_inline)) void with_count(int n, F f) {
    if constexpr (Most > 1) {
        if (n < Most) {
            with_count<Most - 1>(n, f);
            return;
        }
    }
    f(std::integral_constant<int, Most>());
}

}  // namespace
}  // namespace carafepp
