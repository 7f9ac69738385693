// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels for up x2 on tensor cores, whose matrices are bands of masks.
#pragma once

#include <initializer_list>

#include "cuda/mma.h"
#include "cuda/up2/up2.h"

namespace carafepp::cuda {

// A lane's pair in the forward's band matrix: taps b and b + 1 of a window's row a, 0 outside the window. `weights`
// are the output's masks as stage_masks_up2.h stages them.
template <int K, class T>
__device__ __forceinline__ uint32_t pair_of_band(const float* weights, int a, int b, float scale) {
    const auto weight = [&](int tap) { return tap >= 0 && tap < K ? scale * weights[(a * K + tap) * kOutputs] : 0.0f; };
    return pair_of<T>(weight(b), weight(b + 1));
}

// Adds the products of a warp's outputs and of rows y and y + 1 of the pixels of their windows: tap y - s of row s.
template <class T, int Rows, int K>
__device__ __forceinline__ void add_two_rows(const uint32_t (&outputs)[Rows][4], const uint32_t (&pixels)[4], int y,
                                             float (&sums)[Rows][K][4]) {
#pragma unroll
    for (int of = 0; of < 2; of++) {
#pragma unroll
        for (int s = 0; s < Rows; s++) {
            const int a = y + of - s;
            if (a >= 0 && a < K) multiply_add<T>(sums[s][a], outputs[s], {pixels[of * 2], pixels[of * 2 + 1]});
        }
    }
}

// One element of the gradient of features without tensor cores, which multiplies no zero of a band.
template <class T>
__device__ float feature_tap_by_tap(const Problem& p, int64_t n, int64_t group, int64_t c, int64_t y, int64_t x) {
    const int64_t k = p.kernel_size, radius = p.radius();
    float sum = 0;
#pragma unroll 1
    for (int64_t t = 0; t < k * k; t++) {
        const int64_t i = y + radius - t / k, j = x + radius - t % k;  // the source whose tap t is this pixel
        if (i < 0 || i >= p.features.h || j < 0 || j >= p.features.w) continue;
#pragma unroll 1
        for (int o = 0; o < kOutputs; o++) {
            const Pixel output{i * kUp + o / kUp, j * kUp + o % kUp};
            if (output.i < p.out_h && output.j < p.out_w) {
                sum += mask_of<T>(p, n, group, t, output) *
                       widen(*element<const T>(p.grad_output, n, c, output.i, output.j));
            }
        }
    }
    return sum;
}

// ---- why these kernels do not take a problem ----

inline const char* not_for_mma(const Problem& p) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    return not_of_16_bits(p);
}

// With channels, or columns, of some arrays in fragments.
inline const char* not_for_channels_of_mma(const Problem& p, std::initializer_list<const Array*> arrays) {
    if (const char* reason = not_for_mma(p)) return reason;
    for (const Array* array : arrays) {
        if (const char* reason = not_for_vectors(p, *array, kWide)) return reason;
    }
    return nullptr;
}
inline const char* not_for_columns_of_mma(const Problem& p, std::initializer_list<const Array*> arrays) {
    if (const char* reason = not_for_mma(p)) return reason;
    for (const Array* array : arrays) {
        if (const char* reason = not_for_columns(*array)) return reason;
    }
    return nullptr;
}

}  // namespace carafepp::cuda
