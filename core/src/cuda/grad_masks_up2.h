// SPDX-License-Identifier: Apache-2.0
// The gradients of masks and logits for up x2. Shared memory has a line for each of 32 sources: its outputs' masks or
// logits, in the order of channels. So threads read and write adjacent channels together.
#pragma once

#include "cuda/grad_masks.h"
#include "cuda/up2.h"

namespace carafepp::cuda {

template <int K>
struct Lines {
    static constexpr int kSize = K * K * kOutputs + 1;  // so that lines begin in different banks

    static __device__ __forceinline__ int index(const Problem& p, int tap, int output) {
        return p.from_logits ? tap * kOutputs + output : output * K * K + tap;
    }
};

// Calls f(pointer, index) for each mask of 32 sources from (i, j) on, `Columns` in a row. It points into `array`, of
// the shape of masks or logits; the index is into the lines. A crop leaves out masks, but no logits.
template <int K, int Columns, int Threads, class T, class F>
__device__ __forceinline__ void for_each_of_lines(const Problem& p, const Array& array, int64_t n, int64_t group, int i,
                                                  int j, F f) {
    constexpr int kOfSource = K * K * kOutputs;
    const bool taps_adjacent = array.stride_c < array.stride_w;
    for (int k = static_cast<int>(threadIdx.x); k < kSourcesOfBlock * kOfSource; k += Threads) {
        const int source = taps_adjacent ? k / kOfSource : k % kSourcesOfBlock,
                  index = taps_adjacent ? k % kOfSource : k / kSourcesOfBlock;
        const int tap = p.from_logits ? index / kOutputs : index % (K * K),
                  o = p.from_logits ? index % kOutputs : index / (K * K);
        const int row = i + source / Columns, column = j + source % Columns;
        const Pixel output{row * kUp + o / kUp, column * kUp + o % kUp};
        if (row >= p.features.h || column >= p.features.w) continue;
        if (!p.from_logits && (output.i >= p.out_h || output.j >= p.out_w)) continue;
        f(mask_at<T>(p, array, n, group, tap, output), source * Lines<K>::kSize + index);
    }
}

// Carries the gradients of masks in `lines` through the normaliser and writes them. `logits` is room for as many lines.
// Ends with a barrier.
template <int K, int Columns, int Threads, class T>
__device__ __forceinline__ void finish_lines(const Problem& p, int64_t n, int64_t group, int i, int j, float* lines,
                                             float* logits, const Array& grad_masks) {
    if (p.from_logits) {
        for_each_of_lines<K, Columns, Threads, T>(p, p.logits, n, group, i, j,
                                                  [&](MaskPointer<T> from, int index) { logits[index] = from[0]; });
    }
    __syncthreads();
    const int source = static_cast<int>(threadIdx.x) / kOutputs, output = static_cast<int>(threadIdx.x) % kOutputs;
    const int own_i = i + source / Columns, own_j = j + source % Columns;
    if (source < kSourcesOfBlock && own_i < p.features.h && own_j < p.features.w) {
        const int begin = source * Lines<K>::kSize + Lines<K>::index(p, 0, output), step = Lines<K>::index(p, 1, 0);
        const bool computed = own_i * kUp + output / kUp < p.out_h && own_j * kUp + output % kUp < p.out_w;
        float grad[K * K];
#pragma unroll
        for (int t = 0; t < K * K; t++) grad[t] = computed ? lines[begin + t * step] : 0;  // where a crop leaves it out
        if (computed) clear_taps_outside<K>(p, own_i, own_j, grad);  // whatever the gradient there
        if (computed && p.from_logits) through_normalizer<K>(logits + begin, kOutputs, p.normalizer, grad);
#pragma unroll
        for (int t = 0; t < K * K; t++) lines[begin + t * step] = grad[t];
    }
    __syncthreads();
    for_each_of_lines<K, Columns, Threads, T>(p, grad_masks, n, group, i, j,
                                              [&](MaskPointer<T> to, int index) { to.store(0, lines[index]); });
    __syncthreads();
}

}  // namespace carafepp::cuda
