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

// Masks or logits of the outputs of 32 sources in shared memory, a line for each source in the order of their channels,
// so that adjacent ones are read and written together.
template <int K>
struct Lines {
    static constexpr int kSize = K * K * kOutputs + 1;  // so that lines begin in different banks

    static __device__ __forceinline__ int place(const Problem& p, int tap, int output) {
        return p.from_logits ? tap * kOutputs + output : output * K * K + tap;
    }
};

// Calls f(element, place) for each mask of 32 sources, `Columns` in a row, from (i, j) on: where it is in `array`, of
// the shape of masks or logits, and where in the lines. Of outputs that a crop leaves out only logits exist.
template <int K, int Columns, int Threads, class M, class F>
__device__ __forceinline__ void for_each_of_lines(const Problem& p, const Array& array, int64_t n, int64_t group, int i,
                                                  int j, F f) {
    constexpr int kOfSource = K * K * kOutputs;
    for (int k = static_cast<int>(threadIdx.x); k < kSources * kOfSource; k += Threads) {
        const int source = k / kOfSource, place = k % kOfSource;
        const int tap = p.from_logits ? place / kOutputs : place % (K * K),
                  o = p.from_logits ? place % kOutputs : place / (K * K);
        const int row = i + source / Columns, column = j + source % Columns;
        const Output output{row * kUp + o / kUp, column * kUp + o % kUp};
        if (row >= p.features.h || column >= p.features.w) continue;
        if (!p.from_logits && (output.i >= p.out_h || output.j >= p.out_w)) continue;
        f(mask_at<M>(p, array, n, group, tap, output), source * Lines<K>::kSize + place);
    }
}

}  // namespace carafepp::cuda
