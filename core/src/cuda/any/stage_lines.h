// SPDX-License-Identifier: Apache-2.0
// Masks in shared memory, for any factor: of the outputs of some rows and columns, each with a place of its own.
#pragma once

#include "cuda/masks.h"
#include "cuda/positions.h"

namespace carafepp::cuda {

constexpr int kBlock = 128;  // threads

// A row or a column of outputs. The sums for a row and a column tell where masks are, and where they are staged.
struct Line {
    int64_t from;  // in global memory, or kNowhere
    int to;        // in shared memory
    int source;
};

// Calls f(row, column, exists) for the outputs of a thread, one of `Threads` that have the same. All lanes of a warp
// call it equally often. Outputs go on along a row or, of several threads, down a column: so these store to other
// banks.
template <int Threads, class F>
__device__ __forceinline__ void for_each_output(const Line* rows, int height, const Line* columns, int width, F f) {
    constexpr int kOutputs = kBlock / Threads;  // at once
    const int length = Threads == 1 ? width : height, lines = Threads == 1 ? height : width;
    const int thread = static_cast<int>(threadIdx.x) / Threads;
    const int further = static_cast<int>(computed_late(kOutputs / length));
    int line = thread / length, at = thread % length;
#pragma unroll 1
    for (int before = 0; before < height * width; before += kOutputs) {
        const bool in_tile = line < lines;
        const int own_row = in_tile ? Threads == 1 ? line : at : 0, own_column = in_tile ? Threads == 1 ? at : line : 0;
        const Line row = rows[own_row], column = columns[own_column];
        f(row, column, in_tile && row.from != kNowhere && column.from != kNowhere);
        line += further;
        at += kOutputs - further * length;
        if (at >= length) at -= length, line++;
    }
}

// Calls f(a, b) for the taps of an output that are beyond the borders: in rows `first` and each `step`-th more.
template <class F>
__device__ __forceinline__ void for_each_tap_outside(const Problem& p, const Line& row, const Line& column, int first,
                                                     int step, F f) {
    const int k = static_cast<int>(p.kernel_size), y = row.source - k / 2, x = column.source - k / 2;
#pragma unroll 1
    for (int a = first; a < k; a += step) {
        const bool there = y + a >= 0 && y + a < p.features.h;
#pragma unroll 1
        for (int b = 0; b < (there ? min(-x, k) : k); b++) f(a, b);
#pragma unroll 1
        for (int b = k - 1; b >= max(static_cast<int>(p.features.w) - x, 0); b--) f(a, b);
    }
}

// Calls f(Chunk) as often as `count` has so many, and then f(1).
template <int Chunk, class F>
__device__ __forceinline__ void in_chunks(int count, F f) {
#pragma unroll 1
    for (; count >= Chunk; count -= Chunk) f(std::integral_constant<int, Chunk>());
#pragma unroll 1
    for (; count > 0; count--) f(std::integral_constant<int, 1>());
}

// Turns the staged logits of an output, `apart` from each other, into masks. `largest` is the largest of them.
__device__ __forceinline__ void normalize_line(carafepp_normalizer normalizer, int count, int apart, float largest,
                                               float* taps) {
    constexpr int kChunk = 8;
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer != CARAFEPP_SOFTMAX) {
        largest = -INFINITY;
        float* at = taps;
#pragma unroll 1
        for (int t = 0; t < count; t++, at += apart) {
            *at = normalizer == CARAFEPP_SIGMOID ? sigmoid(*at) : log_sigmoid(*at);
            largest = fmaxf(largest, *at);
        }
        if (normalizer == CARAFEPP_SIGMOID) return;
    }
    float sum = 0;
    float* at = taps;
    in_chunks<kChunk>(count, [&](auto chunk) {
#pragma unroll
        for (int i = 0; i < decltype(chunk)::value; i++, at += apart) {
            const float power = power_of_2((*at - largest) * kLog2OfE);  // the difference first: logits may be huge
            *at = power;
            sum += power;
        }
    });
    const float scale = 1 / sum;
    at = taps;
    in_chunks<kChunk>(count, [&](auto chunk) {
#pragma unroll
        for (int i = 0; i < decltype(chunk)::value; i++, at += apart) *at *= scale;
    });
}

constexpr int kMostOfEight = 7;  // the largest kernel_size of which eight threads have the taps in registers

// Every eighth tap of an output in each of eight threads. Taps that it does not have are -INFINITY, and change no sum.
struct TapsInRegisters {
    using Taps = float[kOwnTaps<kMostOfEight>];

    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < kOwnTaps<kMostOfEight>; i++) f(i, i * kNormalizers);
    }
    template <class F>
    __device__ __forceinline__ float over_threads(float value, F f) const {
        return over_normalizers(value, f);
    }
};

// Stages the masks of the outputs of some rows and columns, in a block of kBlock; from tap to tap they are `apart`.
// Unless all windows are `inside`, taps beyond a border are 0, as 0 * Inf is NaN. A thread has all taps of an output,
// and many loads in flight. Where taps are adjacent, eight threads have them, in registers. Ends with a barrier.
template <class T>
__device__ __forceinline__ void stage_lines(const Problem& p, int64_t n, int64_t group, const Line* rows, int height,
                                            const Line* columns, int width, int apart, bool inside, float* masks) {
    constexpr int kChunk = 8;  // loads in flight: K * K is 8 m + 1
    const Array& array = p.from_logits ? p.logits : p.masks;
    const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
    const int64_t tap = taps_apart(p, array);
    const int64_t first = n * array.stride_n + group * p.taps() * tap;
    const int k = static_cast<int>(p.kernel_size);
    const int lane = static_cast<int>(threadIdx.x) % kNormalizers;
    const auto clear_outside = [&](const Line& row, const Line& column, int begin, int step, float* to) {
        for_each_tap_outside(p, row, column, begin, step, [&](int a, int b) { to[(a * k + b) * apart] = 0; });
    };
    if (tap == 1 && k <= kMostOfEight && (normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_NONE)) {
        for_each_output<kNormalizers>(rows, height, columns, width, [&](Line row, Line column, bool exists) {
            const int count = exists ? k * k - lane : 0;
            float* const to = masks + row.to + column.to;
            TapsInRegisters::Taps taps;
            with_masks<T>(array, [&](auto mask) {
                using M = decltype(mask);
                const auto* const from = static_cast<const M*>(array.data) +
                                         (exists ? computed_late(first + row.from + column.from + lane) : 0);
                TapsInRegisters().each(
                    [&](int i, int t) { taps[i] = t < count ? widen(load_input(from + t)) : -INFINITY; });
            });
            if (normalizer == CARAFEPP_SOFTMAX) normalize_registers(CARAFEPP_SOFTMAX, TapsInRegisters(), taps);
            float* at = to + lane * apart;
            TapsInRegisters().each([&](int i, int t) {
                if (t < count) *at = taps[i];
                at += kNormalizers * apart;
            });
            if (inside) return;
            __syncwarp();  // a thread clears taps of others
            if (exists) clear_outside(row, column, lane, kNormalizers, to);
        });
    } else {
        for_each_output<1>(rows, height, columns, width, [&](Line row, Line column, bool exists) {
            if (!exists) return;
            float* const to = masks + row.to + column.to;
            float largest = -INFINITY;
            with_masks<T>(array, [&](auto mask) {
                const auto* from = static_cast<const decltype(mask)*>(array.data) + first + row.from + column.from;
                float* at = to;
                in_chunks<kChunk>(k * k, [&](auto chunk) {
                    constexpr int kTaps = decltype(chunk)::value;
                    float taps[kTaps];
#pragma unroll
                    for (int i = 0; i < kTaps; i++) taps[i] = widen(load_input(from + i * tap));
                    from += kTaps * tap;
#pragma unroll
                    for (int i = 0; i < kTaps; i++, at += apart) {
                        *at = taps[i];
                        largest = fmaxf(largest, taps[i]);
                    }
                });
            });
            normalize_line(normalizer, k * k, apart, largest, to);
            if (!inside) clear_outside(row, column, 0, 1, to);
        });
    }
    __syncthreads();
}

}  // namespace carafepp::cuda
