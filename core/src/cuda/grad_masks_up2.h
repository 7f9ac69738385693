// SPDX-License-Identifier: Apache-2.0
// What the gradients of masks and logits for up x2 share: the warps of a block have the same sources, a lane one, and
// each sums over some of the channels for all four outputs; then each has one of the outputs.
#pragma once

#include "cuda/masks.h"
#include "cuda/up2.h"

namespace carafepp::cuda {

constexpr int kSources = 32;                 // of a block: the lanes of a warp
constexpr int kBlock = kOutputs * kSources;  // threads

// grad = the sums of output `warp`, of all warps, always added in the same order. `shared` holds kBlock*K*K. Begins and
// ends with a barrier.
template <int K>
__device__ __forceinline__ void sum_of_warps(const float (&sums)[kOutputs][K * K], float* shared,
                                             float (&grad)[K * K]) {
    constexpr int kTaps = K * K;
    const int lane = static_cast<int>(threadIdx.x) % kSources, warp = static_cast<int>(threadIdx.x) / kSources;
#pragma unroll
    for (int t = 0; t < kTaps; t++) grad[t] = 0;
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kTaps; t++) shared[(warp * kTaps + t) * kSources + lane] = sums[o][t];
        __syncthreads();
        if (warp != o) continue;
#pragma unroll
        for (int t = 0; t < kTaps; t++) {
            for (int w = 0; w < kOutputs; w++) grad[t] += shared[(w * kTaps + t) * kSources + lane];
        }
    }
    __syncthreads();
}

// The gradient of an output's masks to that of its logits.
template <int K, class M>
__device__ __forceinline__ void through_normalizer(const M* logits, int64_t step, carafepp_normalizer normalizer,
                                                   float (&grad)[K * K]) {
    if (normalizer == CARAFEPP_NONE) return;
    float masks[K * K], mean = 0;
    load_taps<K>(logits, step, true, normalizer, masks);
#pragma unroll
    for (int t = 0; t < K * K; t++) mean += masks[t] * grad[t];
#pragma unroll
    for (int t = 0; t < K * K; t++) {
        if (normalizer == CARAFEPP_SIGMOID) {
            grad[t] *= masks[t] * (1 - masks[t]);
        } else {
            grad[t] = masks[t] * (grad[t] - mean);
            if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) grad[t] *= sigmoid(-widen(logits[t * step]));
        }
    }
}

}  // namespace carafepp::cuda
