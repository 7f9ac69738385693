// SPDX-License-Identifier: Apache-2.0
// The gradients of masks and logits for one factor. Sums stay in registers through all channels. In the end, each
// thread has the gradients of the masks of some outputs, and carries them through the normaliser.
#pragma once

#include "cuda/softmax_gradient.h"
#include "cuda/window.h"

namespace carafepp::cuda {

constexpr int kWarps = 4, kBlock = kWarps * 32;  // of a block, threads

// Turns the logits of an output into powers.
template <int K>
__device__ __forceinline__ SoftmaxGradient softmax_gradient(float (&taps)[K * K], const float (&grad)[K * K]) {
    float largest = -INFINITY;
#pragma unroll
    for (int t = 0; t < K * K; t++) largest = fmaxf(largest, taps[t]);
    SoftmaxGradient gradient;
#pragma unroll
    for (int t = 0; t < K * K; t++) {
        taps[t] = SoftmaxGradient::power(taps[t], largest);
        gradient.add(taps[t], grad[t]);
    }
    gradient.finish();
    return gradient;
}

// Carries the gradients of the masks of a thread's outputs through the normaliser. Their logits are in shared memory,
// and change: own[t * step] are those of a tap, as a float or as the floats of a vector. Most problems have a softmax,
// so what is for others is not unrolled. clear(grad) clears the taps of an output beyond the borders. Sums are 0 there,
// as features are, unless a factor is no finite number: then the mean is none either, and only then a softmax clears.
template <int K, class Outputs, int Count, class Clear>
__device__ __forceinline__ void through_normalizer(carafepp_normalizer normalizer, Outputs* own, int step,
                                                   float (&grad)[Count][K * K], Clear clear) {
    static_assert(sizeof(Outputs) == Count * sizeof(float), "a vector has all outputs");
    constexpr int kTaps = K * K;
    const auto floats_of = [](const Outputs& outputs) { return reinterpret_cast<const float*>(&outputs); };
    const auto for_each_logit = [&](auto f) {
#pragma unroll 1
        for (int t = 0; t < kTaps; t++) {
#pragma unroll
            for (int q = 0; q < Count; q++) {
                float& logit = reinterpret_cast<float*>(own + t * step)[q];
                logit = f(logit);
            }
        }
    };
    if (normalizer != CARAFEPP_SOFTMAX) {
        for_each_logit([&](float logit) {
            const float mask = sigmoid(logit);
            return normalizer == CARAFEPP_SIGMOID ? mask * (1 - mask) : log_sigmoid(logit);
        });
    }
    float taps[Count][kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; t++) {
        const Outputs outputs = own[t * step];
#pragma unroll
        for (int q = 0; q < Count; q++) taps[q][t] = floats_of(outputs)[q];
    }
#pragma unroll
    for (int q = 0; q < Count; q++) {
        SoftmaxGradient gradient{1, 0};  // of a sigmoid, whose taps are factors of the gradients
        const bool is_softmax = normalizer != CARAFEPP_SIGMOID;
        if (is_softmax) gradient = softmax_gradient<K>(taps[q], grad[q]);
        if (!is_softmax || !gradient.is_finite()) {
            clear(grad[q]);
            if (is_softmax) gradient.weigh_again(taps[q], grad[q]);
        }
#pragma unroll
        for (int t = 0; t < kTaps; t++) grad[q][t] = gradient(taps[q][t], grad[q][t]);
    }
    if (normalizer != CARAFEPP_SIGMOID_NORMALIZED) return;
    for_each_logit([](float log_of_sigmoid) { return -expm1f(log_of_sigmoid); });  // the sigmoid of -logit
#pragma unroll
    for (int t = 0; t < kTaps; t++) {
        const Outputs factors = own[t * step];
#pragma unroll
        for (int q = 0; q < Count; q++) grad[q][t] *= floats_of(factors)[q];
    }
}

}  // namespace carafepp::cuda
