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

// Finds elements of the lines in an array of the shape of masks or logits. The first line is that of source (i, j).
// There are `Columns` sources in a row.
template <int K, int Columns>
class LinesInArray {
public:
    __device__ __forceinline__ LinesInArray(const Problem& p, const Array& array, int i, int j)
        : array_(array),
          from_logits_(p.from_logits),
          rows_(static_cast<int>(p.from_logits ? p.features.h - i : min((p.features.h - i) * kUp, p.out_h - i * kUp))),
          columns_(
              static_cast<int>(p.from_logits ? p.features.w - j : min((p.features.w - j) * kUp, p.out_w - j * kUp))) {}

    // The element `index` of a source's line. A crop leaves out masks, but no logits.
    __device__ __forceinline__ StagedElement operator()(int source, int index) const {
        int row = source / Columns, column = source % Columns, channel = index;
        if (!from_logits_) {
            const int output = index / (K * K);
            row = row * kUp + output / kUp;
            column = column * kUp + output % kUp;
            channel = index % (K * K);
        }
        return {row * array_.stride_h + column * array_.stride_w + channel * array_.stride_c,
                source * Lines<K>::kSize + index, row < rows_ && column < columns_};
    }

private:
    const Array& array_;
    bool from_logits_;
    int rows_, columns_;  // that exist
};

// Copies the logits of 32 sources from (i, j) on into lines.
template <int K, int Columns, int Threads, class T>
__device__ __forceinline__ void load_lines(const Problem& p, int64_t n, int64_t group, int i, int j, float* lines) {
    constexpr int kOfSource = K * K * kOutputs;
    const Array& logits = p.logits;
    with_masks<T>(logits, [&](auto mask) {
        copy_grid<Threads>(element<const decltype(mask)>(logits, n, group * kOfSource, i, j), kSourcesOfBlock,
                           kOfSource, logits.stride_c < logits.stride_w, LinesInArray<K, Columns>(p, logits, i, j),
                           lines);
    });
}

// Writes lines to the masks or logits of 32 sources from (i, j) on.
template <int K, int Columns, int Threads, class T>
__device__ __forceinline__ void store_lines(const Problem& p, int64_t n, int64_t group, int i, int j,
                                            const float* lines, const Array& grad_masks) {
    constexpr int kOfSource = K * K * kOutputs;
    const LinesInArray<K, Columns> place(p, grad_masks, i, j);
    const int up = p.from_logits ? 1 : kUp, channels = p.from_logits ? kOfSource : K * K;
    with_masks<T>(grad_masks, [&](auto mask) {
        using M = decltype(mask);
        M* const to = element<M>(grad_masks, n, group * channels, i * up, j * up);
        Walk<Threads> walk(kSourcesOfBlock, kOfSource, grad_masks.stride_c < grad_masks.stride_w);
        for (; walk.in_grid(); walk.advance()) {
            const StagedElement at = place(walk.row(), walk.column());
            if (at.exists) to[at.from] = narrow<M>(lines[at.to]);
        }
    });
}

// Carries the gradients of masks in `lines` through the normaliser and writes them. `logits` is room for as many lines.
// Ends with a barrier.
template <int K, int Columns, int Threads, class T>
__device__ __forceinline__ void finish_lines(const Problem& p, int64_t n, int64_t group, int i, int j, float* lines,
                                             float* logits, const Array& grad_masks) {
    if (p.from_logits) load_lines<K, Columns, Threads, T>(p, n, group, i, j, logits);
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
    store_lines<K, Columns, Threads, T>(p, n, group, i, j, lines, grad_masks);
    __syncthreads();
}

}  // namespace carafepp::cuda
