// SPDX-License-Identifier: Apache-2.0
// grad_output of a band as the gradients of features for any factor have it in shared memory: grads[output][vector],
// with four channels of a pixel in a vector. And how they store the sums of four sources of a row.
#pragma once

#include "cuda/columns.h"
#include "cuda/grad_tiles.h"

namespace carafepp::cuda {

// How the threads of a block copy a band: with adjacent channels neighbouring threads have the `vectors` of a pixel,
// which are 2^log_vectors. Else they have pixels of a row.
struct CopyPlan {
    int rows, columns, log_columns;  // pixels that the block copies at once
    int log_vectors;
    int depth;  // vectors from pixel to pixel in shared memory

    CopyPlan(bool channels_adjacent, int threads, int vectors, int most_columns, int depth)
        : log_columns(0), log_vectors(0), depth(depth) {
        while (1 << log_vectors < vectors) log_vectors++;
        const int at_once = channels_adjacent ? std::max(threads >> log_vectors, 1) : 32;
        while (1 << log_columns < most_columns && 2 << log_columns <= at_once) log_columns++;
        columns = 1 << log_columns;
        rows = at_once / columns;
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

// The part of each band of grad_output that a thread copies: every so many pixels of every so many rows.
struct CopyOfThread {
    int row, column;
    int vector;  // the first one, of four channels

    __device__ __forceinline__ CopyOfThread(const CopyPlan& plan, bool channels_adjacent) {
        const int thread = thread_computed_late(), pixel = channels_adjacent ? thread >> plan.log_vectors : thread % 32;
        row = pixel >> plan.log_columns;
        column = pixel & (plan.columns - 1);
        vector = channels_adjacent ? thread & ((1 << plan.log_vectors) - 1) : thread / 32;
    }
};

// Copies grad_output of a band to grads[output][vector], from `first_element` on. Floats arrive as copies of this
// thread do. Neighbouring threads have vectors of a pixel.
__device__ __forceinline__ void copy_vectors(const Array& grad_output, int64_t first_element, int channels,
                                             const Band& band, const CopyPlan& plan, const CopyOfThread& own,
                                             float4* grads) {
    if (own.row >= plan.rows || own.vector * kVector >= channels) return;
    const int64_t step = plan.columns * grad_output.stride_w;
    const int to_step = plan.columns * plan.depth;
    const int count = static_cast<int>(static_cast<unsigned>(band.columns_count - own.column + plan.columns - 1) >>
                                       plan.log_columns);
    first_element += own.vector * kVector + own.column * grad_output.stride_w + own.row * grad_output.stride_h;
    grads += (own.row * band.width.number + own.column) * plan.depth + own.vector;
    const auto walk = [&](auto width, auto copy) __attribute__((always_inline)) {
        using T = decltype(width);
        const T* of_row = static_cast<const T*>(grad_output.data) + first_element;
        float4* to_row = grads;
#pragma unroll 1
        for (int y = own.row; y < band.height; y += plan.rows) {
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

// The same with any strides. Neighbouring threads have pixels of a row, warps have vectors.
__device__ __forceinline__ void copy_pixels(const Array& grad_output, int64_t first_element, int channels,
                                            const Band& band, const CopyPlan& plan, const CopyOfThread& own,
                                            float4* grads) {
    const int warps = static_cast<int>(blockDim.x) / 32, stride_c = static_cast<int>(grad_output.stride_c);
    const int count = channels / kVector - own.vector, rest = channels % kVector;
    const bool has_rest = rest > 0 && channels / kVector % warps == own.vector;
    first_element += own.vector * kVector * grad_output.stride_c;
    const auto walk = [&](auto width, auto widened) __attribute__((always_inline)) {
        using T = decltype(width);
#pragma unroll 1
        for (int y = own.row; y < band.height; y += plan.rows) {
#pragma unroll 1
            for (int x = own.column; x < band.columns_count; x += plan.columns) {
                const T* from = static_cast<const T*>(grad_output.data) + first_element + y * grad_output.stride_h +
                                x * grad_output.stride_w;
                float4* to = grads + (y * band.width.number + x) * plan.depth + own.vector;
                const auto load = [&](int number, bool exists) __attribute__((always_inline)) {
                    return exists ? widened(load_input(at_stride(from, stride_c, number))) : 0.0f;
                };
                repeat<2>(count > 0 ? (count + warps - 1) / warps : 0, [&]() __attribute__((always_inline)) {
                    *to = make_float4(load(0, true), load(1, true), load(2, true), load(3, true));
                    from = at_stride(from, stride_c, warps * kVector), to += warps;
                });
                if (has_rest) *to = make_float4(load(0, true), load(1, rest > 1), load(2, rest > 2), 0);
            }
        }
    };
    if (grad_output.dtype == CARAFEPP_FLOAT32) {
        walk(float(), [](float value) { return value; });
    } else {
        walk(Bits16(), Widen16{grad_output.dtype == CARAFEPP_FLOAT16});
    }
}

// Copies grad_output of a band in either way.
template <bool Vectors>
__device__ __forceinline__ void copy_band(const Array& grad_output, int64_t first_element, int channels,
                                          const Band& band, const CopyPlan& plan, float4* grads) {
    const CopyOfThread own(plan, Vectors);
    if constexpr (Vectors) {
        copy_vectors(grad_output, first_element, channels, band, plan, own, grads);
    } else {
        copy_pixels(grad_output, first_element, channels, band, plan, own, grads);
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
