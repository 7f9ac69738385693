// SPDX-License-Identifier: Apache-2.0
// Staging for the gradient of features for any factor on tensor cores: masks as matrices, and bands of grad_output.
#pragma once

#include "cuda/grad_features_patches_plan.h"
#include "cuda/stage_pixels.h"

namespace carafepp::cuda {

constexpr int kMostInRegisters = 7;  // kernel_size: taps that some threads have
template <int K>
constexpr int kLanesOfOutput = K == 3   ? 1
                               : K == 5 ? 2
                                        : 4;

// Stages the masks of some rows of outputs, times `scale`, in matrices that are 0 before. `Row` r has its masks from
// `matrices` on.
template <class T>
struct MatrixStage {
    const Problem& p;
    const GradPatchesPlan& plan;
    const RoomOfPatches<T>& room;
    int first, count;  // rows
    int columns;

    __device__ __forceinline__ void stage(int64_t n, int64_t group) const {
        const Array& array = p.from_logits ? p.logits : p.masks;
        const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
        const int64_t first_element = n * array.stride_n + group * p.taps() * plan.tap;
        const bool plain = normalizer == CARAFEPP_NONE;
        if (p.kernel_size > kMostInRegisters || !(plain || normalizer == CARAFEPP_SOFTMAX)) {
            stage_one_by_one(array, first_element, normalizer);
        } else if (p.kernel_size == 3) {
            stage_in_registers<3>(array, first_element, plain);
        } else if (p.kernel_size == 5) {
            stage_in_registers<5>(array, first_element, plain);
        } else {
            stage_in_registers<7>(array, first_element, plain);
        }
    }

private:
    // An output of a thread.
    struct Own {
        bool exists;
        int64_t from;
        int to;
        int row, column;  // places of the terms of its first tap's row and column
    };
    // Neighbouring outputs have `group` columns in a row, then further rows of them.
    __device__ __forceinline__ Own output(int number) const {
        const int line = plan.group.quotient(number), group = plan.mask_rows.quotient(line),
                  y = line - group * plan.mask_rows.number;
        const int order = number + (group - line) * plan.group.number;
        const bool exists = y < count && order < columns;
        const OutputLine& row = room.rows()[first + (exists ? y : 0)];
        const OutputLine& column = room.columns()[room.columns()[exists ? order : 0].in_memory];
        return {exists, row.from + column.from, exists ? row.to + column.to : kBeyond, row.source,
                column.source + static_cast<int>(room.column_terms() - room.row_terms())};
    }
    __device__ __forceinline__ int numbers() const {
        return static_cast<int>(plan.group.quotient(plan.most_columns + plan.group.number - 1)) *
               plan.mask_rows.number * plan.group.number;
    }

    // Writes a mask, unless its source is beyond the tile.
    __device__ __forceinline__ void put(int place, T mask) const {
        if (place >= 0) room.matrices()[place] = mask;
    }

    // Neighbouring threads, kLanesOfOutput, have each so many rows of an output's taps.
    template <int K>
    __device__ __forceinline__ void stage_in_registers(const Array& array, int64_t first_element, bool plain) const {
        constexpr int kLanes = kLanesOfOutput<K>, kRows = (K + kLanes - 1) / kLanes;
        const int thread = thread_computed_late(), threads = static_cast<int>(blockDim.x), lane = thread % kLanes;
        const int all = numbers(), tap = static_cast<int>(plan.tap);
        const bool of_float = array.dtype == CARAFEPP_FLOAT32, has_last = lane + (kRows - 1) * kLanes < K;
        const int* const terms = room.row_terms();
        first_element += lane * K * plan.tap;
#pragma unroll 1
        for (int before = 0; before < all; before += threads / kLanes) {
            const Own own = output(before + thread / kLanes);
            const int64_t place = first_element + own.from;
            float values[kRows][K];
            if (of_float) {
                const float* const from = static_cast<const float*>(array.data) + place;
#pragma unroll
                for (int t = 0; t < kRows * K; t++)
                    values[t / K][t % K] = t / K < kRows - 1 || has_last
                                               ? load_input(at_stride(from, tap, t / K * kLanes * K + t % K))
                                               : -INFINITY;
            } else {
                const T* const from = static_cast<const T*>(array.data) + place;
#pragma unroll
                for (int t = 0; t < kRows * K; t++)
                    values[t / K][t % K] = t / K < kRows - 1 || has_last
                                               ? widen(load_input(at_stride(from, tap, t / K * kLanes * K + t % K)))
                                               : -INFINITY;
            }
            float factor = scale_of_masks<T>(p);
            if (!plain) {
                float largest = -INFINITY, sum = 0;
#pragma unroll
                for (int t = 0; t < kRows * K; t++) largest = fmaxf(largest, values[t / K][t % K]);
#pragma unroll
                for (int distance = 1; distance < kLanes; distance *= 2)
                    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
#pragma unroll
                for (int t = 0; t < kRows * K; t++) {
                    float& value = values[t / K][t % K];
                    sum += value = power_of_2((value - largest) * kLog2OfE);  // the difference first: they may be huge
                }
#pragma unroll
                for (int distance = 1; distance < kLanes; distance *= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
                factor /= sum;
            }
            int of_row[kRows];
#pragma unroll
            for (int a = 0; a < kRows; a++) {
                of_row[a] = kBeyond;
                if (a < kRows - 1 || has_last) of_row[a] = own.to + terms[own.row + lane + a * kLanes];
            }
#pragma unroll
            for (int b = 0; b < K; b++) {
                const int of_column = terms[own.column + b];
#pragma unroll
                for (int a = 0; a < kRows; a++) put(of_row[a] + of_column, narrow<T>(values[a][b] * factor));
            }
        }
    }

    // A thread has all taps of an output, whatever their number and normaliser.
    __device__ __forceinline__ void stage_one_by_one(const Array& array, int64_t first_element,
                                                     carafepp_normalizer normalizer) const {
        const int k = static_cast<int>(p.kernel_size), all = numbers();
        const bool of_float = array.dtype == CARAFEPP_FLOAT32;
        const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
#pragma unroll 1
        for (int number = thread_computed_late(); number < all; number += static_cast<int>(blockDim.x)) {
            const Own own = output(number);
            if (!own.exists) continue;
            float largest = 0, factor = scale_of_masks<T>(p);
            // Three times: for the largest logit, for the sum, and for the masks.
#pragma unroll 1
            for (int time = divides ? 0 : 2; time < 3; time++) {
                int64_t place = first_element + own.from;
                float next = time == 0 ? -INFINITY : 0;
#pragma unroll 1
                for (int a = 0; a < k; a++) {
#pragma unroll 1
                    for (int b = 0; b < k; b++, place += plan.tap) {
                        float value = of_float ? load_input(static_cast<const float*>(array.data) + place)
                                               : widen(load_input(static_cast<const T*>(array.data) + place));
                        if (normalizer == CARAFEPP_SIGMOID) value = sigmoid(value);
                        if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) value = log_sigmoid(value);
                        if (time == 0) {
                            next = fmaxf(next, value);
                            continue;
                        }
                        if (divides) value = power_of_2((value - largest) * kLog2OfE);
                        next += value;
                        if (time == 2)
                            put(own.to + room.row_terms()[own.row + a] + room.row_terms()[own.column + b],
                                narrow<T>(value * factor));
                    }
                }
                if (time == 0) largest = next;
                if (time == 1) factor /= next;
            }
        }
    }
};

// How a block stages grad_output, eight channels of an output in a vector. What does not exist is 0.
template <class T>
struct BandCopy {
    const T* from;  // the first channel of the first output
    int stride_c;
    int channels;       // that exist
    int vectors;        // of the slice
    const int* places;  // of outputs, or kBeyond
    int outputs, pixel;

    // Takes adjacent channels. They arrive as copies of this thread do.
    __device__ __forceinline__ void copy_vectors(int vector, int first, int step, int end, T* to) const {
        to += first * pixel + vector * kWide;
        if (vector * kWide >= channels) end = 0;
#pragma unroll 2
        for (int output = first; output < outputs; output += step, to += step * pixel) {
            const int place = places[output];
            copy_async<kWide * sizeof(T)>(to, at_stride(from + vector * kWide, 1, place),
                                          output < end && place != kBeyond);
        }
    }

    // `Columns` neighbouring outputs at once, by way of registers; a warp has a vector. Instead of channels that do not
    // exist it stages the last one.
    template <int Columns>
    __device__ __forceinline__ void transpose(int end, T* to) const {
        const int thread = thread_computed_late(), lane = thread % 32, warps = static_cast<int>(blockDim.x) / 32;
        using Word = std::conditional_t<Columns == 2, uint32_t, uint16_t>;
#pragma unroll 1
        for (int vector = thread / 32; vector < vectors; vector += warps) {
            const int there = channels - vector * kWide;
            const T* const of_vector = from + int64_t{vector * kWide} * stride_c;
#pragma unroll 1
            for (int output = lane * Columns; output < outputs; output += 32 * Columns) {
                const int place = places[output];
                const bool exists = output < end && place != kBeyond && there > 0;
                uint32_t words[kWide];
                const T* at = of_vector + (exists ? place : 0);
#pragma unroll
                for (int v = 0; v < kWide; v++) {
                    words[v] = exists ? __ldg(reinterpret_cast<const Word*>(at)) : 0;
                    if (v + 1 < there) at = at_stride(at, stride_c, 1);
                }
#pragma unroll
                for (int k = 0; k < Columns; k++) {
                    // Eight neighbouring threads store to different banks if four of them begin with the second column.
                    const int column = Columns == 2 ? (lane / 4 + k) % 2 : 0;
                    uint32_t of[kWide / 2];
#pragma unroll
                    for (int v = 0; v < kWide; v += 2) of[v / 2] = halves_of(words[v], words[v + 1], column == 1);
                    *reinterpret_cast<uint4*>(to + (output + column) * pixel + vector * kWide) = make_uint4(
                        of[0], of[1], of[2], of[3]);
                }
            }
        }
    }
};

}  // namespace carafepp::cuda
