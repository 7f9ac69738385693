// SPDX-License-Identifier: Apache-2.0
// Masks as matrices for tensor cores, for any factor: 16 bits in shared memory. A patch is 16 outputs, and its window
// the pixels that they read, numbered row by row. A row of its matrix has an output's masks of these pixels, 0 where it
// has no tap. Masks are not divided by their sums; each output has a factor for that.
#pragma once

#include "cuda/any/stage_lines.h"
#include "cuda/mma.h"

namespace carafepp::cuda {

constexpr int kPatch = 16;                                         // outputs
constexpr int kTapPlaces = kOwnTaps<kMostOfEight> * kNormalizers;  // room for taps

// A row or column of outputs has in Line::to the numbers of its outputs in the tile, and of the pixels at their first
// taps. Both are sums for the row and the column.
__device__ __forceinline__ int line_of_patch(int output, int pixel) { return output << 16 | pixel; }

// Stages the masks of the outputs of some rows and columns, in a block of kBlock.
template <class T>
struct BandStage {
    const Problem& p;
    const Line* rows;
    int height;
    const Line* columns;
    int width;
    const int* taps;     // the pixel of each tap, from that of the first tap on
    int window_columns;  // pixels
    int apart;           // elements from output to output of a matrix
    bool inside;         // all windows are
    T* bands;            // 0 before
    float* factors;

    __device__ __forceinline__ void stage(int64_t n, int64_t group) const {
        const Array& array = p.from_logits ? p.logits : p.masks;
        const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
        const bool softmax = normalizer == CARAFEPP_SOFTMAX;
        const int64_t tap = taps_apart(p, array);
        const int64_t first = n * array.stride_n + group * p.taps() * tap;
        with_masks<T>(array, [&](auto mask) {
            const auto* const from = static_cast<const decltype(mask)*>(array.data) + first;
            if (!softmax && normalizer != CARAFEPP_NONE) {
                stage_sigmoids(from, tap, normalizer == CARAFEPP_SIGMOID_NORMALIZED);
            } else if (tap == 1) {
                stage_adjacent(from, softmax);
            } else {
                stage_apart(from, static_cast<int>(tap), softmax);
            }
        });
    }

private:
    // Scaled as masks are, without the sum. The difference comes first: logits may be huge.
    static __device__ __forceinline__ float power(float logit, float largest) {
        constexpr float kLog2OfScale = std::is_same_v<T, Float16> ? 15 : 0;
        return power_of_2((logit - largest) * kLog2OfE + kLog2OfScale);
    }

    // The place of the mask of an output's first tap.
    __device__ __forceinline__ T* first_of(const Line& row, const Line& column) const {
        const int to = row.to + column.to;
        return bands + (to >> 16) * apart + (to & 0xffff);
    }
    __device__ __forceinline__ void put_factor(const Line& row, const Line& column, float factor) const {
        factors[(row.to + column.to) >> 16] = factor;
    }

    // Taps beyond a border are 0, as 0 * Inf is NaN.
    __device__ __forceinline__ void clear_outside(const Line& row, const Line& column, int lane, int lanes) const {
        T* const first = first_of(row, column);
        for_each_tap_outside(p, row, column, lane, lanes, [&](int a, int b) { first[a * window_columns + b] = T{}; });
    }

    // For adjacent taps: eight threads have those of an output, in registers. K * K is 8 m + 1: a thread has m of
    // them, and the first one also the last tap.
    template <class M>
    __device__ __forceinline__ void stage_adjacent(const M* from, bool softmax) const {
        constexpr int kMost = kOwnTaps<kMostOfEight> - 1;
        const int count = static_cast<int>(p.taps()), lane = static_cast<int>(threadIdx.x) % kNormalizers;
        int places[kMost];
#pragma unroll
        for (int i = 0; i < kMost; i++) places[i] = taps[i * kNormalizers + lane];
        const int last_place = taps[count - 1];
        for_each_output<kNormalizers>(rows, height, columns, width, [&](Line row, Line column, bool exists) {
            const M* const logits = from + (exists ? computed_late(row.from + column.from) : 0);
            float values[kMost], last = widen(load_input(logits + count - 1)), sum = 1;
#pragma unroll
            for (int i = 0; i < kMost; i++) {
                values[i] = -INFINITY;
                if ((i + 1) * kNormalizers < count) values[i] = widen(load_input(logits + lane + i * kNormalizers));
            }
            if (softmax) {
                float largest = last;
                for (float value : values) largest = fmaxf(largest, value);
                largest = over_normalizers(largest, [](float a, float b) { return fmaxf(a, b); });
                last = power(last, largest);
                sum = lane == 0 ? last : 0;
                for (float& value : values) sum += value = power(value, largest);
                sum = over_normalizers(sum, [](float a, float b) { return a + b; });
            }
            if (exists) {
                T* const to = first_of(row, column);
#pragma unroll
                for (int i = 0; i < kMost; i++) {
                    if ((i + 1) * kNormalizers < count) to[places[i]] = narrow<T>(values[i]);
                }
                if (lane == 0) {
                    to[last_place] = narrow<T>(last);
                    put_factor(row, column, 1 / sum);
                }
            }
            if (inside) return;
            __syncwarp();  // a thread clears taps of others
            if (exists) clear_outside(row, column, lane, kNormalizers);
        });
    }

    // A thread has all taps of an output: K * K is 8 m + 1, so m chunks and the last. It keeps most of them from the
    // search for the largest on, and loads others again.
    template <class M>
    __device__ __forceinline__ void stage_apart(const M* from, int tap, bool softmax) const {
        constexpr int kChunk = 8, kMost = kOwnTaps<kMostOfEight> - 1, kKept = 3;  // all of K = 5
        const int chunks = static_cast<int>(p.taps()) / kChunk;
        for_each_output<1>(rows, height, columns, width, [&](Line row, Line column, bool exists) {
            if (!exists) return;
            const M* const first = from + computed_late(row.from + column.from);
            const auto load = [&](int t) { return widen(load_input(at_stride(first, tap, t))); };
            const float last = load(chunks * kChunk);
            float kept[kKept][kChunk], largest = last;
#pragma unroll
            for (int c = 0; c < kMost; c++) {
                if (c >= chunks) continue;
#pragma unroll
                for (int i = 0; i < kChunk; i++) {
                    const float value = load(c * kChunk + i);
                    if (c < kKept) kept[c][i] = value;
                    largest = fmaxf(largest, value);
                }
            }
            T* const to = first_of(row, column);
            float sum = 0;
            const auto put = [&](float value, int t) {
                if (softmax) value = power(value, largest);
                sum += value;
                to[taps[t]] = narrow<T>(value);
            };
#pragma unroll
            for (int c = 0; c < kMost; c++) {
                if (c >= chunks) continue;
#pragma unroll
                for (int i = 0; i < kChunk; i++) put(c < kKept ? kept[c][i] : load(c * kChunk + i), c * kChunk + i);
            }
            put(last, chunks * kChunk);
            if (!softmax) sum = 1;
            put_factor(row, column, 1 / sum);
            if (!inside) clear_outside(row, column, 0, 1);
        });
    }

    // The rarer normalisers.
    template <class M>
    __device__ __forceinline__ void stage_sigmoids(const M* from, int64_t tap, bool normalized) const {
        const int count = static_cast<int>(p.taps());
        const float scale = scale_of_masks<T>(p);
        for_each_output<1>(rows, height, columns, width, [&](Line row, Line column, bool exists) {
            if (!exists) return;
            const M* const first = from + computed_late(row.from + column.from);
            float largest = -INFINITY, sum = 0;
#pragma unroll 1
            for (int t = 0; t < count; t++) largest = fmaxf(largest, widen(load_input(first + t * tap)));
            largest = log_sigmoid(largest);
            T* const to = first_of(row, column);
#pragma unroll 1
            for (int t = 0; t < count; t++) {
                const float logit = widen(load_input(first + t * tap));
                const float mask = normalized ? power(log_sigmoid(logit), largest) : scale * sigmoid(logit);
                sum += mask;
                to[taps[t]] = narrow<T>(mask);
            }
            put_factor(row, column, 1 / (normalized ? sum : scale));
            if (!inside) clear_outside(row, column, 0, 1);
        });
    }
};

}  // namespace carafepp::cuda
