// SPDX-License-Identifier: Apache-2.0
// Masks in shared memory, for any factor: of the outputs of some rows and columns, each with a place of its own.
#pragma once

#include "cuda/masks.h"

namespace carafepp::cuda {

constexpr int kBlock = 128;              // threads
constexpr int64_t kNowhere = INT64_MIN;  // the place of what does not exist

// A row or a column of outputs. The sums for a row and a column tell where masks are, and where they are staged.
struct Line {
    int64_t from;  // in global memory, or kNowhere
    int to;        // in shared memory
    int source;
};

// Stages the masks of the outputs of some rows and columns, in a block of kBlock; from tap to tap they are `apart`.
// Unless all windows are `inside`, taps beyond a border are 0, as 0 * Inf is NaN. Some neighbouring threads have the
// taps of an output: of one to eight, those that load neighbours in memory. Ends with a barrier.
template <class T>
__device__ __forceinline__ void stage_lines(const Problem& p, int64_t n, int64_t group, const Line* rows, int height,
                                            const Line* columns, int width, int apart, bool inside, float* masks) {
    constexpr int kInFlight = 4;
    const int outputs = height * width, k = static_cast<int>(p.kernel_size);
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int64_t sub_pixels = p.from_logits ? p.factor.up * p.factor.up : 1, tap = sub_pixels * array.stride_c;
    const int threads = tap == 1 ? kNormalizers : 1, lane = static_cast<int>(threadIdx.x) % threads;
    const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
#pragma unroll 1
    for (int before = 0; before < outputs; before += kBlock / threads) {  // all lanes of a warp, as they reduce
        const int number = min(before + static_cast<int>(threadIdx.x) / threads, outputs - 1);
        const Line row = rows[number / width], column = columns[number % width];
        const bool exists = before + static_cast<int>(threadIdx.x) / threads < outputs && row.from != kNowhere &&
                            column.from != kNowhere;
        const int count = exists ? k * k : 0, step = apart * threads;
        float* const first = masks + row.to + column.to + lane * apart;
        with_masks<T>(array, [&](auto mask) {
            using M = decltype(mask);
            const M* from = element<const M>(array, n, group * p.taps() * sub_pixels, 0, 0) +
                            (exists ? row.from + column.from : 0) + lane * tap;
            float* to = first;
#pragma unroll 1
            for (int t = lane; t < count; t += kInFlight * threads, to += kInFlight * step) {
                float taps[kInFlight];
#pragma unroll
                for (int load = 0; load < kInFlight; load++, from += tap * threads)
                    taps[load] = t + load * threads < count ? widen(load_input(from)) : 0;
#pragma unroll
                for (int load = 0; load < kInFlight; load++) {
                    if (t + load * threads < count) to[load * step] = taps[load];
                }
            }
        });
        if (normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
            float* at = first;
#pragma unroll 1
            for (int t = lane; t < count; t += threads, at += step)
                *at = normalizer == CARAFEPP_SIGMOID ? sigmoid(*at) : log_sigmoid(*at);
        }
        if (normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
            float largest = -INFINITY, sum = 0;
            float* at = first;
#pragma unroll 1
            for (int t = lane; t < count; t += threads, at += step) largest = *at > largest ? *at : largest;
            for (int distance = 1; distance < threads; distance *= 2)
                largest = Larger()(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
            at = first;
#pragma unroll 1
            for (int t = lane; t < count; t += threads, at += step) {
                *at = expf(*at - largest);
                sum += *at;
            }
            for (int distance = 1; distance < threads; distance *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            const float scale = 1 / sum;
            at = first;
#pragma unroll 1
            for (int t = lane; t < count; t += threads, at += step) *at *= scale;
        }
        if (inside) continue;
        float* at = first;
        int y = row.source - k / 2, x = column.source - k / 2 + lane;
#pragma unroll 1
        for (int t = lane; t < count; t += threads, at += step, x += threads) {
            for (; x >= column.source + k - k / 2; x -= k) y++;
            if (y < 0 || y >= p.features.h || x < 0 || x >= p.features.w) *at = 0;
        }
    }
    __syncthreads();
}

}  // namespace carafepp::cuda
