// SPDX-License-Identifier: Apache-2.0
// Neighbouring columns, the first a multiple of their number, loaded and stored as one.
#pragma once

#include "cuda/channels.h"

namespace carafepp::cuda {

// Loads give 0 where there are no columns: elements of 16 bits before they are widened, under one condition.
__device__ __forceinline__ float2 load_columns(const float* from, bool exist) {
    return exist ? __ldg(reinterpret_cast<const float2*>(from)) : make_float2(0, 0);
}
__device__ __forceinline__ void store_columns(float2 value, float* to) { __stcs(reinterpret_cast<float2*>(to), value); }

template <class T>
__device__ __forceinline__ float2 load_columns(const T* from, bool exist) {
    return widen_pair<T>(exist ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0);
}
template <class T>
__device__ __forceinline__ void store_columns(float2 value, T* to) {
    __stcs(reinterpret_cast<uint32_t*>(to), pair_of<T>(value.x, value.y));
}

// Calls f with `count` of columns, 4, 2 or 1, as a constant.
template <class F>
__device__ __forceinline__ void with_columns(int count, F f) {
    if (count == 4) {
        f(std::integral_constant<int, 4>());
    } else if (count == 2) {
        f(std::integral_constant<int, 2>());
    } else {
        f(std::integral_constant<int, 1>());
    }
}

// Stores neighbouring columns of a row in one channel: all as a vector, or `there` of them.
template <bool Whole, int P, class T>
__device__ __forceinline__ void store_row(const float (&values)[P], int there, int64_t stride_w, T* to) {
    if constexpr (Whole && P == 2) {
        store_columns(make_float2(values[0], values[1]), to);
    } else if constexpr (Whole && P == 4) {
        store_channels(make_float4(values[0], values[1], values[2], values[3]), to);
    } else {
#pragma unroll
        for (int q = 0; q < P; q++) {
            if (q < there) to[q * stride_w] = narrow<T>(values[q]);
        }
    }
}

// Copies `Count` elements at once: of 2 bytes not by themselves.
template <int Count, class T>
__device__ __forceinline__ void copy_elements(T* to, const T* from, bool exist) {
    if constexpr (Count * sizeof(T) >= 4) {
        copy_async<Count * sizeof(T)>(to, from, exist);
    } else {
        *to = exist ? load_input(from) : T{};
    }
}

// Why columns of an array cannot be, or not `count` of them.
inline const char* not_for_columns(const Array& array, int count = 2) {
    if (array.empty()) return nullptr;
    if (array.stride_w != 1) return "columns are not adjacent";
    if (array.w % count != 0) return count == 2 ? "columns are odd in number" : "columns are no multiple of a vector";
    for (int64_t stride : {array.stride_n, array.stride_c, array.stride_h}) {
        if (stride % count != 0) return "rows are not vectors of columns apart";
    }
    if (reinterpret_cast<uintptr_t>(array.data) % static_cast<uintptr_t>(count * itemsize(array.dtype)) != 0)
        return "an array is not aligned to vectors of columns";
    return nullptr;
}

// As many neighbouring columns of an array as are one vector in memory: 4, 2 or 1.
inline int columns_at_once(const Array& array) {
    return not_for_columns(array, 4) == nullptr ? 4 : not_for_columns(array, 2) == nullptr ? 2 : 1;
}

}  // namespace carafepp::cuda
