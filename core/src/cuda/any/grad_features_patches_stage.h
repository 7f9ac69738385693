// SPDX-License-Identifier: Apache-2.0
// Staging for the gradient of features for any factor on tensor cores: masks as matrices, and bands of grad_output.
#pragma once

#include "cuda/any/grad_features_patches_plan.h"
#include "cuda/any/grad_output.h"
#include "cuda/any/stage_pixels.h"

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
    int warp;

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
        const int to_next_row = ((kLanes - 1) * K + 1) * tap, to_last_row = has_last ? to_next_row : -(K - 1) * tap;
        const int* const terms = room.row_terms();
        first_element += lane * K * plan.tap;
#pragma unroll 1
        for (int before = warp * (32 / kLanes); before < all; before += threads / kLanes) {
            const Own own = output(before + thread % 32 / kLanes);
            const int64_t place = first_element + own.from;
            float values[kRows][K];
            // A thread without a last row loads the one before again.
            const auto load = [&](auto* from) __attribute__((always_inline)) {
#pragma unroll
                for (int t = 0; t < kRows * K; t++) {
                    const float value = widen(load_input(from));
                    values[t / K][t % K] = t / K < kRows - 1 || has_last ? value : -INFINITY;
                    const int step = t % K < K - 1 ? tap : t / K < kRows - 2 ? to_next_row : to_last_row;
                    from = at_stride(from, step, 1);
                }
            };
            if (of_float) {
                load(static_cast<const float*>(array.data) + place);
            } else {
                load(static_cast<const T*>(array.data) + place);
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

constexpr int kNoPlace = INT32_MIN;  // of an output that does not exist

// Stages eight channels of pixels from `first` on, of which `channels` exist; 0 for pixels that do not, and from `end`
// on. Channels are adjacent. They arrive as copies of this thread do.
template <class T>
__device__ __forceinline__ void copy_pixels_ahead(const T* from, const int* pixels, int count, int end, int first,
                                                  int step, int channels, T* to, int apart) {
    if (channels <= 0) end = 0;
    pixels += first, to += first * apart;
    // Places are loaded ahead of copies: a copy that follows a load of shared memory waits for it.
    const auto copy = [&](auto number, int pixel) __attribute__((always_inline)) {
        constexpr int kAtOnce = decltype(number)::value;
        int places[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) places[k] = pixels[k * step];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            const bool exists = places[k] != kNoPlace && pixel + k * step < end;
            const T* const at = at_stride(from, places[k], 1);  // nobody reads there what does not exist
            copy_async<kWide * sizeof(T)>(to + k * step * apart, at, exists);
        }
        pixels += kAtOnce * step, to += kAtOnce * step * apart;
    };
    constexpr std::integral_constant<int, 4> kFour;
    constexpr std::integral_constant<int, 1> kOne;
    int pixel = first;
#pragma unroll 1
    for (; pixel + 3 * step < count; pixel += 4 * step) copy(kFour, pixel);
#pragma unroll 1
    for (; pixel < count; pixel += step) copy(kOne, pixel);
}

// A block stages a band of grad_output with adjacent columns. Outputs that do not exist are 0. Channels that do not
// exist keep what was there, and nobody reads their sums.
template <class T>
struct BandCopy {
    const T* from;  // the first channel of the first output
    const Array& grad_output;
    const GradPatchesPlan& plan;
    int rows;         // that exist
    int64_t columns;  // likewise
    int channels;     // likewise

    // Neighbouring threads have chunks of some columns, and groups of threads have channels.
    __device__ __forceinline__ void copy(T* to) const {
        const int thread = thread_computed_late(), line = plan.copied_across.quotient(thread);
        if (line >= plan.copied_lines.number) return;
        const int count = plan.copied_lines.quotient(max(channels - line + plan.copied_lines.number - 1, 0));
        const int at_once = plan.copied_at_once, step_to = plan.copied_lines.number * plan.channel;
        const int64_t step = plan.copied_lines.number * grad_output.stride_c;
#pragma unroll 1
        for (int chunk = thread - line * plan.copied_across.number; chunk < plan.chunks;
             chunk += plan.copied_across.number) {
            const int y = plan.chunks_in_row.quotient(chunk), x = (chunk - y * plan.chunks_in_row.number) * at_once;
            const bool exists = y < rows && x < columns;
            const T* at = from + (exists ? y * grad_output.stride_h + x * grad_output.stride_w : 0) +
                          line * grad_output.stride_c;
            T* to_channel = to + line * plan.channel + y * plan.pitch + x;
            const auto copy_channels = [&](auto copy_one) __attribute__((always_inline)) {
                repeat<4>(count, [&]() __attribute__((always_inline)) {
                    copy_one();
                    at += step, to_channel += step_to;
                });
            };
            if (at_once == 8) {
                copy_channels([&] { copy_async<8 * sizeof(T)>(to_channel, at, exists); });
            } else if (at_once == 4) {
                copy_channels([&] { copy_async<4 * sizeof(T)>(to_channel, at, exists); });
            } else if (at_once == 2) {
                copy_channels([&] { copy_async<2 * sizeof(T)>(to_channel, at, exists); });
            } else {
                copy_channels([&] { *to_channel = exists ? load_input(at) : T{}; });
            }
        }
    }
};

}  // namespace carafepp::cuda
