// SPDX-License-Identifier: Apache-2.0
// Masks for up x2 in shared memory, as [source][tap][output], for neighbouring sources of a row.
#pragma once

#include "cuda/up2.h"

namespace carafepp::cuda {

constexpr int64_t kBytesOfTap = kOutputs * sizeof(float);  // of a source

// Turns staged logits of `outputs` outputs into masks, in a block of kThreads.
template <int K>
__device__ void normalize_staged(carafepp_normalizer normalizer, float* staged, int outputs) {
    constexpr int kTaps = K * K;
    const int lane = static_cast<int>(threadIdx.x) % kNormalizers;
    for (int first = 0; first < outputs; first += kThreads / kNormalizers) {
        const int output = first + static_cast<int>(threadIdx.x) / kNormalizers;
        const TapsOfEight<K> taps{lane, output < outputs ? kTaps : 0};
        float* const masks = staged + output / kOutputs * kTaps * kOutputs + output % kOutputs;
        float own[kOwnTaps<K>] = {};
        taps.each([&](int k, int tap) { own[k] = masks[tap * kOutputs]; });
        normalize_registers(normalizer, taps, own);
        taps.each([&](int k, int tap) { masks[tap * kOutputs] = own[k]; });
    }
}

// Stages masks, or logits that become masks; they are 0 outside the row. Ends with a barrier.
template <int K, class T>
__device__ void stage_sources(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first, int sources,
                              float* staged) {
    constexpr int kTaps = K * K;
    const Array& array = p.from_logits ? p.logits : p.masks;
    for_each_mask(array, kTaps, sources * kOutputs, [&](int64_t tap, int64_t k) {
        const int64_t j = first + k / kOutputs, output = k % kOutputs;
        const Pixel at{i * kUp + output / kUp, j * kUp + output % kUp};
        float weight = 0;
        if (j >= 0 && j < p.features.w && (p.from_logits || (at.i < p.out_h && at.j < p.out_w)))
            weight = mask_at<T>(p, array, n, group, tap, at)[0];
        staged[(k / kOutputs * kTaps + tap) * kOutputs + output] = weight;
    });
    __syncthreads();
    if (!p.from_logits) return;
    normalize_staged<K>(p.normalizer, staged, sources * kOutputs);
    __syncthreads();
}

// Clears masks of taps beyond the ends of the row, for the forward, in a block of kThreads. Features are 0 there, but
// 0 * Inf is NaN. Ends with a barrier.
template <int K>
__device__ void clear_staged_outside(const Problem& p, int64_t first, int sources, float* staged) {
    if (first >= K / 2 && first + sources + K / 2 <= p.features.w) return;
    for (int k = static_cast<int>(threadIdx.x); k < sources * K * K; k += kThreads) {
        const int64_t j = first + k / (K * K) + k % K - K / 2;
        if (j >= 0 && j < p.features.w) continue;
        reinterpret_cast<float4*>(staged)[k] = make_float4(0, 0, 0, 0);
    }
    __syncthreads();
}

}  // namespace carafepp::cuda
