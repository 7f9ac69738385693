// SPDX-License-Identifier: Apache-2.0
// The gradients of masks and logits for up x2. Shared memory has a line for each of 32 sources: its outputs' masks or
// logits, in the order of channels. So threads read and write adjacent channels together. Then a thread finishes each
// output.
#pragma once

#include "cuda/grad_masks.h"
#include "cuda/tile_up2.h"

namespace carafepp::cuda {

constexpr int kRowsOfTile = kSourcesOfBlock / kColumns;
static_assert(kBlock == kSourcesOfBlock * kOutputs, "each thread finishes one output");

template <int K>
struct Lines {
    static constexpr int kSize = K * K * kOutputs;  // neighbouring lines begin in different banks
    static_assert(kSize % 32 == 4);

    static __device__ __forceinline__ int index(const Problem& p, int tap, int output) {
        return p.from_logits ? tap * kOutputs + output : output * K * K + tap;
    }
};

// Shared memory for two stages of what is contracted, or for the lines after them.
template <int K>
int64_t bytes_of_stages_or_lines(int64_t bytes_of_stage) {
    return std::max(2 * bytes_of_stage, kSourcesOfBlock * Lines<K>::kSize * int64_t{sizeof(float)});
}

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

// Calls f(element, staged) for each four channels of the logits of sources that exist.
template <int K, int Columns, class M, class F>
__device__ __forceinline__ void for_each_vector(const LinesInArray<K, Columns>& place, F f) {
    constexpr int kVectors = K * K;  // of a source
#pragma unroll 4
    for (int k = thread_computed_late(); k < kSourcesOfBlock * kVectors; k += kBlock) {
        const StagedElement at = place(k / kVectors, k % kVectors * kVector);
        if (at.exists) f(at.from, at.to);
    }
}

// Copies the logits of 32 sources from (i, j) on into lines. Some arrive as copies of this thread do.
template <int K, int Columns, class T>
__device__ __forceinline__ void load_lines(const Problem& p, int64_t n, int64_t group, int i, int j, float* lines) {
    constexpr int kOfSource = K * K * kOutputs;
    const Array& logits = p.logits;
    const LinesInArray<K, Columns> place(p, logits, i, j);
    with_masks<T>(logits, [&](auto mask) {
        using M = decltype(mask);
        const M* const from = element<const M>(logits, n, group * kOfSource, i, j);
        if (in_vectors<M>(logits)) {
            for_each_vector<K, Columns, M>(
                place, [&](int64_t element, int staged) { stage_vector(from + element, true, lines + staged); });
        } else {
            copy_grid<kBlock>(from, kSourcesOfBlock, kOfSource, logits.stride_c < logits.stride_w, place, lines);
        }
    });
}

// Writes lines to the masks or logits of 32 sources from (i, j) on.
template <int K, int Columns, class T>
__device__ __forceinline__ void store_lines(const Problem& p, int64_t n, int64_t group, int i, int j,
                                            const float* lines, const Array& grad_masks) {
    constexpr int kOfSource = K * K * kOutputs;
    const LinesInArray<K, Columns> place(p, grad_masks, i, j);
    const int up = p.from_logits ? 1 : kUp, channels = p.from_logits ? kOfSource : K * K;
    with_masks<T>(grad_masks, [&](auto mask) {
        using M = decltype(mask);
        M* const to = element<M>(grad_masks, n, group * channels, i * up, j * up);
        if (p.from_logits && in_vectors<M>(grad_masks)) {
            for_each_vector<K, Columns, M>(place, [&](int64_t element, int staged) {
                store_channels(*reinterpret_cast<const float4*>(lines + staged), to + element);
            });
            return;
        }
        Walk<kBlock> walk(kSourcesOfBlock, kOfSource, grad_masks.stride_c < grad_masks.stride_w);
        for (; walk.in_grid(); walk.advance()) {
            const StagedElement at = place(walk.row(), walk.column());
            if (at.exists) to[at.from] = narrow<M>(lines[at.to]);
        }
    });
}

// Carries the gradient of an output's masks through the normaliser, all but the sigmoid before a softmax. `line` has
// its logits. The other normalisers' loops are not unrolled, as a softmax is what matters.
template <int K>
__device__ __forceinline__ void through_staged_normalizer(carafepp_normalizer normalizer, float* line,
                                                          float (&grad)[K * K]) {
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer != CARAFEPP_SOFTMAX) {
#pragma unroll 1
        for (int t = 0; t < K * K; t++) {
            float& tap = line[t * kOutputs];
            tap = normalizer == CARAFEPP_SIGMOID ? sigmoid(tap) : log_sigmoid(tap);
        }
    }
    float masks[K * K];
    load_each(line, kOutputs, masks);
    if (normalizer == CARAFEPP_SIGMOID) {
#pragma unroll
        for (int t = 0; t < K * K; t++) grad[t] *= masks[t] * (1 - masks[t]);
        return;
    }
    normalize_registers(CARAFEPP_SOFTMAX, TapsOfThread<K>(), masks);
    normalize_registers_backward(CARAFEPP_SOFTMAX, TapsOfThread<K>(), masks, [](int) { return 0.0f; }, grad);
}

// Carries the gradient of an output's masks, in registers, through the normaliser and writes it. Four neighbouring
// threads have the outputs of a source. `lines` is room for 32. Begins and ends with a barrier.
template <int K, int Columns, class T>
__device__ __forceinline__ void finish_outputs(const Problem& p, int64_t n, int64_t group, int i, int j,
                                               float (&grad)[K * K], float* lines, const Array& grad_masks) {
    __syncthreads();
    if (p.from_logits) {
        load_lines<K, Columns, T>(p, n, group, i, j, lines);
        wait_for_copies();
        __syncthreads();
    }
    const int thread = thread_computed_late(), source = thread / kOutputs, output = thread % kOutputs;
    const int own_i = i + source / Columns, own_j = j + source % Columns;
    const bool computed = own_i * kUp + output / kUp < p.out_h && own_j * kUp + output % kUp < p.out_w;
    float* const line = lines + source * Lines<K>::kSize + Lines<K>::index(p, 0, output);
    const int step = Lines<K>::index(p, 1, 0);
    if (computed) clear_taps_outside<K>(p, own_i, own_j, grad);  // whatever the gradient there
    if (computed && p.from_logits) through_staged_normalizer<K>(p.normalizer, line, grad);
#pragma unroll
    for (int t = 0; t < K * K; t++) line[t * step] = computed ? grad[t] : 0;  // where a crop leaves it out
    if (computed && p.from_logits && p.normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        const Pixel pixel{int64_t{own_i} * kUp + output / kUp, int64_t{own_j} * kUp + output % kUp};
        const MaskPointer<T> logits = mask_at<T>(p, p.logits, n, group, 0, pixel);
#pragma unroll 1
        for (int t = 0; t < K * K; t++) line[t * step] *= sigmoid(-logits[t * kOutputs * p.logits.stride_c]);
    }
    __syncthreads();
    store_lines<K, Columns, T>(p, n, group, i, j, lines, grad_masks);
    __syncthreads();
}

// The same with the gradients of masks in `lines`.
template <int K, int Columns, class T>
__device__ __forceinline__ void finish_lines(const Problem& p, int64_t n, int64_t group, int i, int j, float* lines,
                                             const Array& grad_masks) {
    __syncthreads();
    const int thread = thread_computed_late();
    const float* const line = lines + thread / kOutputs * Lines<K>::kSize + Lines<K>::index(p, 0, thread % kOutputs);
    float grad[K * K];
    load_each(line, Lines<K>::index(p, 1, 0), grad);
    finish_outputs<K, Columns, T>(p, n, group, i, j, grad, lines, grad_masks);
}

}  // namespace carafepp::cuda
