// SPDX-License-Identifier: Apache-2.0
// The gradients of masks and logits. With adjacent columns, the warps of a block have the same sources or pairs of
// outputs, one in a lane. Each warp sums over a part of the channels, for all outputs of these. Then each warp has one
// of the outputs.
#pragma once

#include "cuda/masks.h"
#include "cuda/window.h"

namespace carafepp::cuda {

constexpr int kSourcesOfBlock = 32;  // of a block: the lanes of a warp
constexpr int kWarps = 4, kBlock = kWarps * kSourcesOfBlock;

// grad = the sums of output `warp`, if there is one, of all warps, always added in the same order. `shared` holds
// kBlock*K*K. Begins and ends with a barrier.
template <int K, int Outputs>
__device__ __forceinline__ void sum_of_warps(const float (&sums)[Outputs][K * K], float* shared, float (&grad)[K * K]) {
    constexpr int kTaps = K * K;
    const int lane = static_cast<int>(threadIdx.x) % kSourcesOfBlock,
              warp = static_cast<int>(threadIdx.x) / kSourcesOfBlock;
#pragma unroll
    for (int t = 0; t < kTaps; t++) grad[t] = 0;
#pragma unroll
    for (int o = 0; o < Outputs; o++) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kTaps; t++) shared[(warp * kTaps + t) * kSourcesOfBlock + lane] = sums[o][t];
        __syncthreads();
        if (warp != o) continue;
#pragma unroll
        for (int t = 0; t < kTaps; t++) {
            for (int w = 0; w < kWarps; w++) grad[t] += shared[(w * kTaps + t) * kSourcesOfBlock + lane];
        }
    }
    __syncthreads();
}

// Turns the gradient of masks into that of logits, in registers. logit(k) is the logit of register k.
template <class Taps, class Logit, int Masks, int Grads>
__device__ __forceinline__ void normalize_registers_backward(carafepp_normalizer normalizer, Taps taps,
                                                             const float (&masks)[Masks], Logit logit,
                                                             float (&grad)[Grads]) {
    float mean = 0;  // weighted by masks
    taps.each([&](int k, int) { mean += masks[k] * grad[k]; });
    mean = taps.over_threads(mean, [](float a, float b) { return a + b; });
    taps.each([&](int k, int) {
        if (normalizer == CARAFEPP_SIGMOID) {
            grad[k] *= masks[k] * (1 - masks[k]);
            return;
        }
        grad[k] = masks[k] * (grad[k] - mean);
        if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) grad[k] *= sigmoid(-logit(k));
    });
}

// Carries the gradient of the masks of one output through the normaliser, whose masks are computed again. `logits` are
// `step` apart.
template <int K, class Pointer>
__device__ __forceinline__ void through_normalizer(Pointer logits, int64_t step, carafepp_normalizer normalizer,
                                                   float (&grad)[K * K]) {
    if (normalizer == CARAFEPP_NONE) return;
    float masks[K * K];
    load_taps<K>(logits, step, true, normalizer, masks);
    normalize_registers_backward(normalizer, TapsOfThread<K>(), masks, [&](int k) { return logits[k * step]; }, grad);
}

// The same with the taps of an output in eight threads. All lanes of a warp call it.
template <int K, class T, int Count>
__device__ __forceinline__ void through_normalizer(const Problem& p, int64_t n, int64_t group, Pixel output,
                                                   TapsOfEight<K> taps, float (&grad)[Count]) {
    if (p.normalizer == CARAFEPP_NONE) return;
    float logits[kOwnTaps<K>] = {}, masks[kOwnTaps<K>] = {};
    taps.each([&](int k, int tap) { logits[k] = masks[k] = mask_at<T>(p, p.logits, n, group, tap, output)[0]; });
    normalize_registers(p.normalizer, taps, masks);
    normalize_registers_backward(p.normalizer, taps, masks, [&](int k) { return logits[k]; }, grad);
}

// Writes the gradient of masks or logits of an output with the window around source (i, j), with adjacent columns. It
// is 0 for a logit that a crop leaves out.
template <int K, class T>
__device__ __forceinline__ void write_output(const Problem& p, int64_t n, int64_t group, Pixel output, int i, int j,
                                             int logits_apart, float (&grad)[K * K], const Array& grad_masks) {
    const bool computed = output.i < p.out_h && output.j < p.out_w;
    if (!computed && !p.from_logits) return;
    const int64_t step = p.from_logits ? logits_apart : 1;
    if (computed) {
        clear_taps_outside<K>(p, i, j, grad);  // whatever the gradient there
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
