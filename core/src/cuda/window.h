// SPDX-License-Identifier: Apache-2.0
// The taps of the window around source (i, j) that are inside the borders.
#pragma once

#include "cuda/platform.h"

namespace carafepp::cuda {

// Why the kernels for one factor do not take a problem: output 0 is not centred on source 0.
constexpr const char* kLittlePadding = "padding is less than kernel_size / 2";

// Is tap t inside, and are all taps? Inner loops ask, so it counts in 32 bits.
template <int K>
__device__ __forceinline__ bool tap_inside(const Problem& p, int i, int j, int t) {
    const int height = static_cast<int>(p.features.h), width = static_cast<int>(p.features.w);
    const int y = i + t / K, x = j + t % K;
    return y >= K / 2 && y < height + K / 2 && x >= K / 2 && x < width + K / 2;
}
template <int K>
__device__ __forceinline__ bool window_inside(const Problem& p, int i, int j) {
    return i >= K / 2 && j >= K / 2 && i + K / 2 < p.features.h && j + K / 2 < p.features.w;
}

// Clears the taps of one output that are beyond the borders.
template <int K>
__device__ __forceinline__ void clear_taps_outside(const Problem& p, int i, int j, float (&taps)[K * K]) {
#pragma unroll
    for (int t = 0; t < K * K; t++) {
        if (!tap_inside<K>(p, i, j, t)) taps[t] = 0;
    }
}

}  // namespace carafepp::cuda
