// SPDX-License-Identifier: Apache-2.0
// The derivative of a softmax, of an output whose taps one thread has, or several.
#pragma once

#include "cuda/masks.h"

namespace carafepp::cuda {

// A mask is proportional to a power, of its logit and the largest one of an output. First all taps are added, and sums
// of several threads, if there are. Then it is finished, and tells the gradient of each logit.
struct SoftmaxGradient {
    float scale = 0, mean = 0;  // sums of powers, and of gradients weighted by them

    static __device__ __forceinline__ float power(float logit, float largest) {
        return power_of_2((logit - largest) * kLog2OfE);  // the difference first: logits may be huge
    }
    __device__ __forceinline__ void add(float power, float grad) {
        scale += power;
        mean += power * grad;
    }
    __device__ __forceinline__ void finish() {
        scale = reciprocal(scale);
        mean *= scale * scale;
    }
    __device__ __forceinline__ bool is_finite() const { return fabsf(mean) < INFINITY; }
    // The mean of other gradients.
    template <int Count>
    __device__ __forceinline__ void weigh_again(const float (&powers)[Count], const float (&grads)[Count]) {
        mean = 0;
#pragma unroll
        for (int t = 0; t < Count; t++) mean += powers[t] * grads[t];
        mean *= scale * scale;
    }
    __device__ __forceinline__ float operator()(float power, float grad) const { return power * (grad * scale - mean); }
};

}  // namespace carafepp::cuda
