// SPDX-License-Identifier: Apache-2.0
// What the gradients of masks and logits for up x2 share with adjacent channels: masks or logits of the outputs of 32
// sources in shared memory, a line for each source in the order of their channels, so that adjacent ones are read and
// written together.
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
    for (int k = static_cast<int>(threadIdx.x); k < kSources * kOfSource; k += Threads) {
        const int source = k / kOfSource, place = k % kOfSource;
        const int tap = p.from_logits ? place / kOutputs : place % (K * K),
                  o = p.from_logits ? place % kOutputs : place / (K * K);
        const int row = i + source / Columns, column = j + source % Columns;
        const Output output{row * kUp + o / kUp, column * kUp + o % kUp};
        if (row >= p.features.h || column >= p.features.w) continue;
        if (!p.from_logits && (output.i >= p.out_h || output.j >= p.out_w)) continue;
        f(mask_at<T>(p, array, n, group, tap, output), source * Lines<K>::kSize + place);
    }
}

}  // namespace carafepp::cuda
