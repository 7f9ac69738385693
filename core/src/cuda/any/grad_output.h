// SPDX-License-Identifier: Apache-2.0
// grad_output of a band as the gradients of features for any factor have it in shared memory: grads[output][vector],
// with four channels of a pixel in a vector. And how they store the sums of four sources of a row.
#pragma once

#include "cuda/any/bands.h"
#include "cuda/columns.h"

namespace carafepp::cuda {

constexpr int kVectorsOfChunk = 16;  // that a warp copies of its pixels, with adjacent columns

// How the threads of a block copy a band. With adjacent channels neighbouring threads have the 2^log_vectors vectors of
// a pixel. Else warps have chunks of vectors of pixels.
struct CopyPlan {
    int rows, columns, log_columns;  // pixels that the block copies at once, with adjacent channels
    int log_vectors, log_chunks;     // of a pixel
    int at_once;                     // columns of a row that are one vector in memory, or 1
    Divisor groups;                  // of so many columns, in a row of a band
    int depth;                       // vectors from pixel to pixel in shared memory

    CopyPlan(int threads, int vectors, int at_once, int width, int depth)
        : log_columns(0), log_vectors(0), log_chunks(0), at_once(at_once), groups(width / at_once), depth(depth) {
        while (1 << log_vectors < vectors) log_vectors++;
        while (kVectorsOfChunk << log_chunks < vectors) log_chunks++;
        const int pixels = std::max(threads >> log_vectors, 1);
        while (1 << log_columns < width && 2 << log_columns <= pixels) log_columns++;
        columns = 1 << log_columns;
        rows = pixels / columns;
    }
};

// Elements of 16 bits, of either dtype: loops over them are compiled once.
struct Bits16 {
    uint16_t bits;
};

struct Widen16 {
    bool float16;

    __device__ __forceinline__ float operator()(Bits16 value) const {
        return float16 ? widen(Float16{value.bits}) : widen(BFloat16{value.bits});
    }
};

// Calls f `count` times, N at once while there are so many.
template <int N, class F>
__device__ __forceinline__ void repeat(int count, F f) {
#pragma unroll 1
    for (; count >= N; count -= N) {
#pragma unroll
        for (int i = 0; i < N; i++) f();
    }
#pragma unroll 1
    for (; count > 0; count--) f();
}

// Copies grad_output of a band to grads[output][vector], from `first_element` on. Floats arrive as copies of this
// thread do. Neighbouring threads have vectors of a pixel.
__device__ __forceinline__ void copy_vectors(const Array& grad_output, int64_t first_element, int channels,
                                             const Band& band, const CopyPlan& plan, float4* grads) {
    const int thread = thread_computed_late(), row = thread >> plan.log_vectors >> plan.log_columns,
              column = thread >> plan.log_vectors & (plan.columns - 1), vector = thread & ((1 << plan.log_vectors) - 1);
    if (row >= plan.rows || vector * kVector >= channels) return;
    const int64_t step = plan.columns * grad_output.stride_w;
    const int to_step = plan.columns * plan.depth;
    const int count = static_cast<int>(static_cast<unsigned>(band.columns_count - column + plan.columns - 1) >>
                                       plan.log_columns);
    first_element += vector * kVector + column * grad_output.stride_w + row * grad_output.stride_h;
    grads += (row * band.width.number + column) * plan.depth + vector;
    const auto walk = [&](auto width, auto copy) __attribute__((always_inline)) {
        using T = decltype(width);
        const T* of_row = static_cast<const T*>(grad_output.data) + first_element;
        float4* to_row = grads;
#pragma unroll 1
        for (int y = row; y < band.height; y += plan.rows) {
            const T* from = of_row;
            float4* to = to_row;
            repeat<4>(count, [&]() __attribute__((always_inline)) {
                copy(to, from);
                from += step, to += to_step;
            });
            of_row += plan.rows * grad_output.stride_h;
            to_row += plan.rows * band.width.number * plan.depth;
        }
    };
    if (grad_output.dtype == CARAFEPP_FLOAT32) {
        walk(float(), [](float4* to, const float* from)
                          __attribute__((always_inline)) { copy_async<sizeof(float4)>(to, from, true); });
    } else {
        const Widen16 widened{grad_output.dtype == CARAFEPP_FLOAT16};
        walk(Bits16(), [=](float4* to, const Bits16* from) __attribute__((always_inline)) {
            const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
            const auto low = [&](uint32_t word) { return widened(Bits16{static_cast<uint16_t>(word)}); };
            *to = make_float4(low(bits.x), low(bits.x >> 16), low(bits.y), low(bits.y >> 16));
        });
    }
}

// Loads P columns of a row, which are one vector in memory; 0 where they do not exist.
template <int P, class T, class Widened>
__device__ __forceinline__ void load_row(const T* from, bool exist, Widened widened, float (&values)[4]) {
    if constexpr (P == 4) {
        const float4 loaded = load_channels(from, exist);
        values[0] = loaded.x, values[1] = loaded.y, values[2] = loaded.z, values[3] = loaded.w;
    } else if constexpr (P == 2) {
        const float2 loaded = load_columns(from, exist);
        values[0] = loaded.x, values[1] = loaded.y;
    } else {
        values[0] = exist ? widened(load_input(from)) : 0;
    }
}

// The same where P columns of a row are one vector in memory, or with any strides where P is 1. A thread has four
// channels of P pixels, as vectors of columns, which it stores as vectors of channels. Neighbouring threads have pixels
// of a row. With more columns than one four neighbours have vectors of a pixel: so eight store to different banks.
template <int P, class T, class Widened>
__device__ __forceinline__ void copy_columns(const Array& grad_output, int64_t first_element, int channels,
                                             const Band& band, const CopyPlan& plan, Widened widened, float4* grads) {
    constexpr int kAcross = P == 1 ? 1 : 4, kGroups = 32 / kAcross;    // vectors, and groups of columns, of a warp
    constexpr int kStep = kAcross * kVector, kLoads = P == 4 ? 1 : 2;  // channels of these; vectors that wait at once
    const int thread = thread_computed_late(), lane = thread % 32, stride_c = static_cast<int>(grad_output.stride_c);
    // Pairs of eight threads are not neighbours, as their second pixel would be in the banks of others.
    const int of_lane = P == 2 ? (lane / 4 & 4) | (lane / 2 & 2) | (lane / 8 & 1) : lane / kAcross;
    const int tasks = (band.height * plan.groups.number + kGroups - 1) / kGroups << plan.log_chunks;
#pragma unroll 1
    for (int task = thread / 32; task < tasks; task += static_cast<int>(blockDim.x) / 32) {
        const int group = (task >> plan.log_chunks) * kGroups + of_lane, y = plan.groups.quotient(group),
                  x = (group - y * plan.groups.number) * P;
        if (y >= band.height || x >= band.columns_count) continue;
        const int vector = (task & ((1 << plan.log_chunks) - 1)) * kVectorsOfChunk + lane % kAcross;
        const T* from = static_cast<const T*>(grad_output.data) + first_element + y * grad_output.stride_h +
                        x * grad_output.stride_w + vector * kVector * grad_output.stride_c;
        float4* to = grads + (y * band.width.number + x) * plan.depth + vector;
        int there = channels - vector * kVector;  // channels from this vector on
        const int end = max(there - kVectorsOfChunk * kVector, 0);
#pragma unroll 1
        for (; there > end; there -= kLoads * kStep) {
            float values[kLoads][kVector][4];
#pragma unroll
            for (int k = 0; k < kLoads * kVector; k++) {
                const int channel = k / kVector * kStep + k % kVector;
                load_row<P>(at_stride(from, stride_c, channel), channel < there, widened,
                            values[k / kVector][k % kVector]);
            }
#pragma unroll
            for (int v = 0; v < kLoads; v++) {
                if (v * kStep >= there) break;
#pragma unroll
                for (int k = 0; k < P; k++)
                    to[k * plan.depth + v * kAcross] = make_float4(values[v][0][k], values[v][1][k], values[v][2][k],
                                                                   values[v][3][k]);
            }
            from = at_stride(from, stride_c, kLoads * kStep), to += kLoads * kAcross;
        }
    }
}

// Copies grad_output of a band in either way.
template <bool Vectors>
__device__ __forceinline__ void copy_band(const Array& grad_output, int64_t first_element, int channels,
                                          const Band& band, const CopyPlan& plan, float4* grads) {
    const auto same = [](float value) { return value; };
    if constexpr (Vectors) {
        copy_vectors(grad_output, first_element, channels, band, plan, grads);
    } else if (plan.at_once == 4) {
        copy_columns<4, float>(grad_output, first_element, channels, band, plan, same, grads);
    } else if (plan.at_once == 2) {
        copy_columns<2, float>(grad_output, first_element, channels, band, plan, same, grads);
    } else if (grad_output.dtype == CARAFEPP_FLOAT32) {
        copy_columns<1, float>(grad_output, first_element, channels, band, plan, same, grads);
    } else {
        copy_columns<1, Bits16>(grad_output, first_element, channels, band, plan,
                                Widen16{grad_output.dtype == CARAFEPP_FLOAT16}, grads);
    }
}

// Stores the sums of four sources of a row, of which `own` exist, in V vectors of channels, `step` channels apart, of
// which `channels` exist from the first one on. `whole`: four columns are stored at once.
template <bool Vectors, int V, class T>
__device__ __forceinline__ void store_unit(const float4 (&sums)[4][V], int own, int channels, int step, bool whole,
                                           const Array& array, T* to) {
    if constexpr (Vectors) {
#pragma unroll
        for (int s = 0; s < 4; s++, to += array.stride_w) {
            if (s >= own) break;
#pragma unroll
            for (int v = 0; v < V; v++) {
                if (v * step < channels) store_channels(sums[s][v], at_stride(to, step, v));
            }
        }
    } else {
        const auto store = [&](auto all) __attribute__((always_inline)) {
#pragma unroll
            for (int v = 0; v < V; v++, to += step * array.stride_c) {
                T* of_channel = to;
                const auto store_channel = [&](int number, const float (&values)[4]) __attribute__((always_inline)) {
                    if (v * step + number < channels)
                        store_row<decltype(all)::value>(values, own, array.stride_w, of_channel);
                    of_channel += array.stride_c;
                };
                store_channel(0, {sums[0][v].x, sums[1][v].x, sums[2][v].x, sums[3][v].x});
                store_channel(1, {sums[0][v].y, sums[1][v].y, sums[2][v].y, sums[3][v].y});
                store_channel(2, {sums[0][v].z, sums[1][v].z, sums[2][v].z, sums[3][v].z});
                store_channel(3, {sums[0][v].w, sums[1][v].w, sums[2][v].w, sums[3][v].w});
            }
        };
        if (whole) {
            store(std::true_type());
        } else {
            store(std::false_type());
        }
    }
}

}  // namespace carafepp::cuda
