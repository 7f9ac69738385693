// SPDX-License-Identifier: Apache-2.0
// What the gradients of masks and logits share. With adjacent columns the warps of a block have the same sources, a
// lane one (or an output and the one below it), and each sums over some of the channels for all outputs of these; then
// each warp has one of the outputs.
#pragma once

#include "cuda/masks.h"
#include "cuda/window.h"

namespace carafepp::cuda {

constexpr int kSources = 32;  // of a block: the lanes of a warp
constexpr int kWarps = 4, kBlock = kWarps * kSources;

// grad = the sums of output `warp`, if there is one, of all warps, always added in the same order. `shared` holds
// kBlock*K*K. Begins and ends with a barrier.
template <int K, int Outputs>
__device__ __forceinline__ void sum_of_warps(const float (&sums)[Outputs][K * K], float* shared, float (&grad)[K * K]) {
    constexpr int kTaps = K * K;
    const int lane = static_cast<int>(threadIdx.x) % kSources, warp = static_cast<int>(threadIdx.x) / kSources;
#pragma unroll
    for (int t = 0; t < kTaps; t++) grad[t] = 0;
#pragma unroll
    for (int o = 0; o < Outputs; o++) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kTaps; t++) shared[(warp * kTaps + t) * kSources + lane] = sums[o][t];
        __syncthreads();
        if (warp != o) continue;
#pragma unroll
        for (int t = 0; t < kTaps; t++) {
            for (int w = 0; w < kWarps; w++) grad[t] += shared[(w * kTaps + t) * kSources + lane];
        }
    }
    __syncthreads();
}

// The gradient of a mask to that of its logit; `mean` is that of all the output's, weighted by their masks.
__device__ __forceinline__ float through_normalizer(carafepp_normalizer normalizer, float grad, float mask, float mean,
                                                    float logit) {
    if (normalizer == CARAFEPP_SIGMOID) return grad * (mask * (1 - mask));
    grad = mask * (grad - mean);
    return normalizer == CARAFEPP_SIGMOID_NORMALIZED ? grad * sigmoid(-logit) : grad;
}

// The same of all taps of an output.
template <int K, class Pointer>
__device__ __forceinline__ void through_normalizer(Pointer logits, int64_t step, carafepp_normalizer normalizer,
                                                   float (&grad)[K * K]) {
    if (normalizer == CARAFEPP_NONE) return;
    float masks[K * K], mean = 0;
    load_taps<K>(logits, step, true, normalizer, masks);
#pragma unroll
    for (int t = 0; t < K * K; t++) mean += masks[t] * grad[t];
#pragma unroll
    for (int t = 0; t < K * K; t++) grad[t] = through_normalizer(normalizer, grad[t], masks[t], mean, logits[t * step]);
}

// The same with the taps of an output in eight threads. All lanes of a warp call it.
template <int K, class T, int Count>
__device__ __forceinline__ void through_normalizer_together(const Problem& p, int64_t n, int64_t group, Output output,
                                                            int lane, int taps, float (&grad)[Count]) {
    if (p.normalizer == CARAFEPP_NONE) return;
    float logits[kOwnTaps<K>] = {}, masks[kOwnTaps<K>] = {}, mean = 0;
    for_each_own_tap<K>(
        lane, taps, [&](int k, int tap) { logits[k] = masks[k] = mask_at<T>(p, p.logits, n, group, tap, output)[0]; });
    normalize_together<K>(p.normalizer, lane, taps, masks);
    for_each_own_tap<K>(lane, taps, [&](int k, int) { mean += masks[k] * grad[k]; });
    mean = sum_over_taps(mean);
    for_each_own_tap<K>(lane, taps, [&](int k, int) {
        grad[k] = through_normalizer(p.normalizer, grad[k], masks[k], mean, logits[k]);
    });
}

// Writes the gradient of masks or logits of an output, whose window is around source (i, j), with adjacent columns; 0
// where a crop leaves it out and there is only a logit.
template <int K, class T>
__device__ __forceinline__ void write_output(const Problem& p, int64_t n, int64_t group, Output output, int i, int j,
                                             int logits_apart, float (&grad)[K * K], const Array& grad_masks) {
    const bool computed = output.i < p.out_h && output.j < p.out_w;
    if (!computed && !p.from_logits) return;
    const int64_t step = p.from_logits ? logits_apart : 1;
    if (computed) {
        clear_outside<K>(p, i, j, grad);  // whatever the gradient there
        if (p.from_logits) {
            through_normalizer<K>(mask_at<T>(p, p.logits, n, group, 0, output), step * p.logits.stride_c, p.normalizer,
                                  grad);
        }
    }
    const MaskPointer<T> to = mask_at<T>(p, grad_masks, n, group, 0, output);
#pragma unroll
    for (int t = 0; t < K * K; t++) to.store(t * step * grad_masks.stride_c, computed ? grad[t] : 0.0f);
}

}  // namespace carafepp::cuda
