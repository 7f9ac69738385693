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

// ---- an output and the one below it, in one thread: rows of features that both windows reach are loaded once ----

constexpr int kPair = 2;  // outputs

template <int K>
struct Windows {
    static constexpr int kRadius = K / 2, kRows = K + kDown * (kPair - 1);
    static constexpr int kBefore = (kRadius + 1) / 2 * 2, kColumns = (kBefore + kRadius + 2) / 2 * 2;  // whole pairs
};

// The first element that is loaded of the windows of a pair in one channel. Then: is all of it inside the borders?
template <int K, class T>
__device__ __forceinline__ const T* windows_at(const Problem& p, int64_t n, int64_t c, int out_i, int out_j) {
    return element<const T>(p.features, n, c, out_i * kDown - Windows<K>::kRadius, out_j * kDown - Windows<K>::kBefore);
}
template <int K>
__device__ __forceinline__ bool windows_inside(const Problem& p, int out_i, int out_j) {
    using W = Windows<K>;
    const int top = out_i * kDown - W::kRadius, left = out_j * kDown - W::kBefore;
    return top >= 0 && left >= 0 && top + W::kRows <= p.features.h && left + W::kColumns <= p.features.w;
}

// Calls f(output, t, feature) for each tap of both windows, 0 beyond the borders. `Inside`: all taps are.
template <int K, bool Inside, class T, class F>
__device__ __forceinline__ void for_each_tap_of_pair(const Problem& p, const T* row, int out_i, int out_j, F f) {
    using W = Windows<K>;
    const int top = out_i * kDown - W::kRadius, left = out_j * kDown - W::kBefore;
#pragma unroll
    for (int y = 0; y < W::kRows; y++, row += p.features.stride_h) {
#pragma unroll
        for (int x = 0; x < W::kColumns; x += 2) {
            const bool inside = Inside ||
                                (top + y >= 0 && top + y < p.features.h && left + x >= 0 && left + x < p.features.w);
            const float2 features = load_columns(row + x, inside);
#pragma unroll
            for (int o = 0; o < kPair; o++) {
                const int a = y - kDown * o, b = x - (W::kBefore - W::kRadius);
                if (a < 0 || a >= K) continue;
                if (b >= 0) f(o, a * K + b, features.x);
                if (b + 1 < K) f(o, a * K + b + 1, features.y);
            }
        }
    }
}

}  // namespace carafepp::cuda
