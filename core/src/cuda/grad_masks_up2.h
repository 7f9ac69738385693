// SPDX-License-Identifier: Apache-2.0
// What the gradients of masks and logits for up x2 share: masks or logits of the outputs of 32 sources in shared
// memory, a line for each source in the order of their channels, so that adjacent ones are read and written together.
#pragma once

#include "cuda/grad_masks.h"
#include "cuda/up2.h"

namespace carafepp::cuda {

template <int K>
struct Lines {
    static constexpr int kSize = K * K * kOutputs + 1;  // so that lines begin in different banks

    static __device__ __forceinline__ int place(const Problem& p, int tap, int output) {
        return p.from_logits ? tap * kOutputs + output : output * K * K + tap;
    }
};

// Calls f(pointer, place) for each mask of 32 sources, `Columns` in a row, from (i, j) on: where it is in `array`, of
// the shape of masks or logits, and where in the lines. Of outputs that a crop leaves out only logits exist.
template <int K, int Columns, int Threads, class T, class F>
__device__ __forceinline__ void for_each_of_lines(const Problem& p, const Array& array, int64_t n, int64_t group, int i,
                                                  int j, F f) {
    constexpr int kOfSource = K * K * kOutputs;
    const bool taps_adjacent = array.stride_c < array.stride_w;
    for (int k = static_cast<int>(threadIdx.x); k < kSources * kOfSource; k += Threads) {
        const int source = taps_adjacent ? k / kOfSource : k % kSources,
                  place = taps_adjacent ? k % kOfSource : k / kSources;
        const int tap = p.from_logits ? place / kOutputs : place % (K * K),
                  o = p.from_logits ? place % kOutputs : place / (K * K);
        const int row = i + source / Columns, column = j + source % Columns;
        const Output output{row * kUp + o / kUp, column * kUp + o % kUp};
        if (row >= p.features.h || column >= p.features.w) continue;
        if (!p.from_logits && (output.i >= p.out_h || output.j >= p.out_w)) continue;
        f(mask_at<T>(p, array, n, group, tap, output), source * Lines<K>::kSize + place);
    }
}

// The gradients of masks that all threads have put into `lines`, carried through the normaliser and written. `logits`
// are as many lines. Ends with a barrier.
template <int K, int Columns, int Threads, class T>
__device__ __forceinline__ void finish_lines(const Problem& p, int64_t n, int64_t group, int i, int j, float* lines,
                                             float* logits, const Array& grad_masks) {
    if (p.from_logits) {
        for_each_of_lines<K, Columns, Threads, T>(p, p.logits, n, group, i, j,
                                                  [&](MaskPointer<T> from, int place) { logits[place] = from[0]; });
    }
    __syncthreads();
    const int source = static_cast<int>(threadIdx.x) / kOutputs, output = static_cast<int>(threadIdx.x) % kOutputs;
    const int own_i = i + source / Columns, own_j = j + source % Columns;
    if (source < kSources && own_i < p.features.h && own_j < p.features.w) {
        const int begin = source * Lines<K>::kSize + Lines<K>::place(p, 0, output), step = Lines<K>::place(p, 1, 0);
        const bool computed = own_i * kUp + output / kUp < p.out_h && own_j * kUp + output % kUp < p.out_w;
        float grad[K * K];
#pragma unroll
        for (int t = 0; t < K * K; t++) grad[t] = computed ? lines[begin + t * step] : 0;  // where a crop leaves it out
        if (computed) clear_outside<K>(p, own_i, own_j, grad);  // whatever the gradient there
        if (computed && p.from_logits) through_normalizer<K>(logits + begin, kOutputs, p.normalizer, grad);
#pragma unroll
        for (int t = 0; t < K * K; t++) lines[begin + t * step] = grad[t];
    }
    __syncthreads();
    for_each_of_lines<K, Columns, Threads, T>(p, grad_masks, n, group, i, j,
                                              [&](MaskPointer<T> to, int place) { to.store(0, lines[place]); });
    __syncthreads();
}

}  // namespace carafepp::cuda
