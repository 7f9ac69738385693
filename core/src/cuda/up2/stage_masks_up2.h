// SPDX-License-Identifier: Apache-2.0
// Masks for up x2 in shared memory, as [source][tap][output], for rows of neighbouring sources.
#pragma once

#include "cuda/channels.h"
#include "cuda/up2/up2.h"

namespace carafepp::cuda {

// Are four channels of logits one aligned vector?
template <class M>
__device__ __forceinline__ bool in_vectors(const Array& logits) {
    const int64_t strides = logits.stride_n | logits.stride_h | logits.stride_w;
    return logits.stride_c == 1 && strides % kVector == 0 &&
           reinterpret_cast<uintptr_t>(logits.data) % (kVector * sizeof(M)) == 0;
}

// Stages four channels, or zeros; floats arrive as copies of this thread do.
__device__ __forceinline__ void stage_vector(const float* from, bool exist, float* staged) {
    copy_async<kVector * sizeof(float)>(staged, from, exist);
}
template <class M>
__device__ __forceinline__ void stage_vector(const M* from, bool exist, float* staged) {
    *reinterpret_cast<float4*>(staged) = load_channels(from, exist);
}

// The same with one channel.
__device__ __forceinline__ void stage_element(const float* from, bool exist, float* staged) {
    copy_async<sizeof(float)>(staged, from, exist);
}
template <class M>
__device__ __forceinline__ void stage_element(const M* from, bool exist, float* staged) {
    *staged = exist ? widen(load_input(from)) : 0.0f;
}

// Copies logits of `rows` x `columns` sources, whose channels have the order [tap][output]. Columns [begin, end) of the
// first `rows_end` rows exist. Neighbouring threads have neighbouring vectors of a source, or neighbouring sources; so
// a thread finds its place once, and goes on by the same step.
template <int K, int Threads, class M>
__device__ __forceinline__ void copy_logits(const Array& logits, const M* from, int rows, int columns, int rows_end,
                                            int begin, int end, float* staged) {
    constexpr int kTaps = K * K, kElements = kTaps * kOutputs;  // of a source
    const int thread = thread_computed_late();
    if (in_vectors<M>(logits)) {
        const int at_once = columns / static_cast<int>(ceil_div(columns, Threads / kTaps));  // sources
        const int first = thread / kTaps;
        if (first >= at_once) return;
        from += first * logits.stride_w + thread % kTaps * kVector;
        staged += thread * kVector;
#pragma unroll 4
        for (int row = 0; row < rows; row++, from += logits.stride_h, staged += columns * kElements) {
            const M* vector = from;
#pragma unroll 2
            for (int before = 0; before < columns; before += at_once, vector += at_once * logits.stride_w) {
                const int column = before + first;
                if (columns % at_once != 0 && column >= columns) break;
                stage_vector(vector, row < rows_end && column >= begin && column < end, staged + before * kElements);
            }
        }
        return;
    }
    const int sources = rows * columns, lanes = min(sources, Threads), at_once = Threads / lanes;  // channels
    const int channel = thread / lanes;
    if (channel >= at_once) return;
    for (int source = thread % lanes; source < sources; source += lanes) {
        const int row = source / columns, column = source - row * columns;
        const bool exist = row < rows_end && column >= begin && column < end;
        const M* element = from + row * logits.stride_h + column * logits.stride_w + channel * logits.stride_c;
        float* to = staged + source * kElements + channel;
        const auto stage = [&](auto count) {
#pragma unroll
            for (int k = 0; k < decltype(count)::value; k++, element += at_once * logits.stride_c, to += at_once)
                stage_element(element, exist, to);
        };
        constexpr int kAtOnce = 8;
        int left = (kElements - 1 - channel) / at_once + 1;
#pragma unroll 1
        for (; left >= kAtOnce; left -= kAtOnce) stage(std::integral_constant<int, kAtOnce>());
#pragma unroll 1
        for (; left > 0; left--) stage(std::integral_constant<int, 1>());
    }
}

// Copies masks or logits of `rows` x `columns` sources from (i, first) on, in a block of `Threads`; 0 where there is
// none. Some arrive as copies of this thread do.
template <int K, int Threads, class M>
__device__ __forceinline__ void copy_sources(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first,
                                             int rows, int columns, float* staged) {
    constexpr int kTaps = K * K;
    const int begin = static_cast<int>(max(-first, int64_t{0}));  // columns that exist
    const int end = static_cast<int>(min(int64_t{columns}, p.features.w - first));
    if (p.from_logits) {
        const int rows_end = static_cast<int>(min(int64_t{rows}, p.features.h - i));
        copy_logits<K, Threads>(p.logits, element<const M>(p.logits, n, group * kTaps * kOutputs, i, first), rows,
                                columns, rows_end, begin, end, staged);
        return;
    }
    const Array& masks = p.masks;
    const int out_end = static_cast<int>(min(int64_t{end} * kUp, p.out_w - first * kUp));
    for (int r = 0; r < kUp; r++) {
        const int64_t out_i = i * kUp + r;
        const int rows_end = static_cast<int>(min(int64_t{rows}, ceil_div(p.out_h - out_i, kUp)));
        copy_grid<Threads>(element<const M>(masks, n, group * kTaps, out_i, first * kUp), kTaps, rows * columns * kUp,
                           masks.stride_w <= masks.stride_c, [&](int tap, int output) {
            const int row = rows == 1 ? 0 : output / (columns * kUp), column = output - row * columns * kUp;
            return StagedElement{tap * masks.stride_c + row * kUp * masks.stride_h + column * masks.stride_w,
                                 (output / kUp * kTaps + tap) * kOutputs + r * kUp + output % kUp,
                                 row < rows_end && column >= begin * kUp && column < out_end};
        }, staged);
    }
}

// Waits for copied masks of `sources` sources; logits become masks, `Own` outputs of a thread at once. Ends with a
// barrier.
template <int K, int Threads = kThreads, int Own = 2>
__device__ __forceinline__ void finish_sources(const Problem& p, int sources, float* staged) {
    wait_for_copies();
    __syncthreads();
    if (!p.from_logits) return;
    normalize_each<K, Threads, Own>(p.normalizer, staged, sources * kOutputs, kOutputs, [](int output) {
        return output / kOutputs * K * K * kOutputs + output % kOutputs;
    });
    __syncthreads();
}

// Stages masks, or logits that become masks; they are 0 where there are no sources. Ends with a barrier.
template <int K, class T, int Threads = kThreads, int Own = 2>
__device__ __forceinline__ void stage_sources(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first,
                                              int columns, float* staged, int rows = 1) {
    with_masks<T>(p.from_logits ? p.logits : p.masks, [&](auto mask) {
        copy_sources<K, Threads, decltype(mask)>(p, n, group, i, first, rows, columns, staged);
    });
    finish_sources<K, Threads, Own>(p, rows * columns, staged);
}

// Clears masks of taps beyond the ends of rows, for the forward, in a block of `Threads`. Sources are `columns` in a
// row from column `first` on. Features are 0 there, but 0 * Inf is NaN. Ends with a barrier.
template <int K, int Threads = kThreads>
__device__ void clear_staged_outside(const Problem& p, int64_t first, int columns, float* staged, int rows = 1) {
    if (first >= K / 2 && first + columns + K / 2 <= p.features.w) return;
    for (int k = thread_computed_late(); k < rows * columns * K * K; k += Threads) {
        const int64_t j = first + k / (K * K) % columns + k % K - K / 2;
        if (j >= 0 && j < p.features.w) continue;
        reinterpret_cast<float4*>(staged)[k] = make_float4(0, 0, 0, 0);
    }
    __syncthreads();
}

}  // namespace carafepp::cuda
