// SPDX-License-Identifier: Apache-2.0
// The gradient of features in downsampling where windows overlap little: at most two rows and two columns of outputs
// touch a source. Nearly all bytes are those of the result, so threads read grad_output where it is. A block stages the
// masks of the outputs around its tile once, for many channels.
#pragma once

#include "cuda/any/bands.h"
#include "cuda/columns.h"
#include "cuda/tiles.h"

namespace carafepp::cuda {

constexpr int kMostWindowOfDown = 7;  // kernel_size

// For normalize_registers: the taps of an output in eight threads.
struct TapsOfEight {
    static constexpr int kCount = kOwnTaps<kMostWindowOfDown>;

    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < kCount; i++) f(i, i);
    }
    template <class F>
    __device__ __forceinline__ float over_threads(float value, F f) const {
        return over_normalizers(value, f);
    }
};

// Stages the masks of `rows` x `columns` outputs from (top, left) on, as [output][tap]; 0 where there is no output.
// Begins and ends with a barrier.
template <class T>
__device__ __forceinline__ void stage_masks_around(const Problem& p, int64_t n, int64_t group, int top, int left,
                                                   int rows, Divisor columns, float* masks) {
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int taps = static_cast<int>(p.taps()), outputs = rows * columns.number;
    const int lane = static_cast<int>(threadIdx.x) % kNormalizers;
    __syncthreads();  // nobody reads the masks of the last tile
#pragma unroll 1
    for (int before = 0; before < outputs; before += kThreads / kNormalizers) {
        const int output = before + static_cast<int>(threadIdx.x) / kNormalizers, y = columns.quotient(output),
                  i = top + y, j = left + output - y * columns.number;
        const bool exists = i >= 0 && i < p.out_h && j >= 0 && j < p.out_w && output < outputs;
        float values[TapsOfEight::kCount];
        with_masks<T>(array, [&](auto mask) {
            const auto* from = element<const decltype(mask)>(array, n, group * taps + lane, exists ? i : 0,
                                                             exists ? j : 0);
#pragma unroll
            for (int t = 0; t < TapsOfEight::kCount; t++, from += kNormalizers * array.stride_c)
                values[t] = lane + t * kNormalizers < taps ? widen(load_input(from)) : -INFINITY;
        });
        normalize_registers(p.from_logits ? p.normalizer : CARAFEPP_NONE, TapsOfEight(), values);
#pragma unroll
        for (int t = 0; t < TapsOfEight::kCount; t++) {
            const int tap = lane + t * kNormalizers;
            if (tap < taps && output < outputs) masks[output * taps + tap] = exists ? values[t] : 0;
        }
    }
    __syncthreads();
}

// Why these kernels do not take a problem.
inline const char* not_for_grad_features_down(const Problem& p) {
    if (const char* reason = not_for_tiles(p)) return reason;
    if (p.factor.up != 1 || p.factor.down < 2) return "the factor is not 1/2, 1/3, ...";
    if (p.kernel_size > kMostWindowOfDown) return "kernel_size is more than 7";
    if (p.kernel_size >= 2 * p.factor.down) return "three rows of outputs touch a source";
    return p.grad_output.empty() ? "there is no output" : nullptr;
}

// The instructions of all warps of a block for the masks of some outputs.
inline int64_t cost_to_stage(int64_t outputs) {
    return 230 * ceil_div(outputs * kNormalizers, kThreads) * (kThreads / 32);
}

// The plan with which the multiprocessor that has the most tiles is ready first; make(rows) is one for tiles of so many
// rows. A plan tells how many channels are a slice, and the instructions of all warps for one and for a tile.
template <class Make>
auto with_best_rows(Make make) {
    constexpr int kMostRows = 8;
    auto best = make(1);
    constexpr int64_t kBlocks = decltype(best)::kBlocks;
    int64_t least = INT64_MAX;
    for (int rows = 1; rows <= kMostRows; rows++) {
        auto plan = make(rows);
        plan.tiles = with_even_items(plan.tiles, plan.slice, ceil_div(plan.cost_of_tile, plan.cost_of_slice), kBlocks);
        const int64_t cost = std::max(ceil_div(plan.tiles.items, kMultiprocessors), kBlocks) *
                             (ceil_div(plan.tiles.channels, plan.slice) * plan.cost_of_slice + plan.cost_of_tile);
        if (cost >= least) continue;
        least = cost;
        best = plan;
    }
    return best;
}

}  // namespace carafepp::cuda
