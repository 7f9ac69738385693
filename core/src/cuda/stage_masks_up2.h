// SPDX-License-Identifier: Apache-2.0
// Masks for up x2 in shared memory, as [source][tap][output], for neighbouring sources of a row.
#pragma once

#include "cuda/up2.h"

namespace carafepp::cuda {

constexpr int64_t kBytesOfTap = kOutputs * sizeof(float);  // of a source

// Copies masks or logits of `sources` sources of row i, in a block of kThreads; 0 outside the row.
template <int K, class M>
__device__ void copy_sources(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first, int sources,
                             float* staged) {
    constexpr int kTaps = K * K, kElements = kTaps * kOutputs;    // of a source
    const int begin = static_cast<int>(max(-first, int64_t{0}));  // sources that exist
    const int end = static_cast<int>(min(int64_t{sources}, p.features.w - first));
    if (p.from_logits) {  // the channels of a source have the order [tap][output]
        const Array& logits = p.logits;
        copy_grid<kThreads>(element<const M>(logits, n, group * kElements, i, first), sources, kElements,
                            logits.stride_c < logits.stride_w, [&](int source, int channel) {
            return StagedElement{source * logits.stride_w + channel * logits.stride_c, source * kElements + channel,
                                 source >= begin && source < end};
        }, staged);
        return;
    }
    const Array& masks = p.masks;
    const int out_end = static_cast<int>(min(int64_t{end} * kUp, p.out_w - first * kUp));
    for (int r = 0; r < kUp; r++) {
        const bool exists = i * kUp + r < p.out_h;
        copy_grid<kThreads>(element<const M>(masks, n, group * kTaps, i * kUp + r, first * kUp), kTaps, sources * kUp,
                            masks.stride_w <= masks.stride_c, [&](int tap, int column) {
            return StagedElement{tap * masks.stride_c + column * masks.stride_w,
                                 (column / kUp * kTaps + tap) * kOutputs + r * kUp + column % kUp,
                                 exists && column >= begin * kUp && column < out_end};
        }, staged);
    }
}

// Stages masks, or logits that become masks; they are 0 outside the row. Ends with a barrier.
template <int K, class T>
__device__ void stage_sources(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first, int sources,
                              float* staged) {
    with_masks<T>(p.from_logits ? p.logits : p.masks,
                  [&](auto mask) { copy_sources<K, decltype(mask)>(p, n, group, i, first, sources, staged); });
    __syncthreads();
    if (!p.from_logits) return;
    normalize_staged<K>(p.normalizer, staged, sources * kOutputs, kOutputs,
                        [](int output) { return output / kOutputs * K * K * kOutputs + output % kOutputs; });
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
