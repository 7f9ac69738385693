// SPDX-License-Identifier: Apache-2.0
// Four channels of a pixel as one vector, in shared memory and, where channels are adjacent, in global memory.
#pragma once

#include "cuda/masks.h"

namespace carafepp::cuda {

constexpr int kVector = 4;  // channels

// Loads give 0 where there are no channels: elements of 16 bits before they are widened, under one condition.
__device__ __forceinline__ float4 load_channels(const float* from, bool exist = true) {
    return exist ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0, 0, 0, 0);
}
__device__ __forceinline__ void store_channels(float4 value, float* to) {
    __stcs(reinterpret_cast<float4*>(to), value);
}

template <class T>
__device__ __forceinline__ float4 load_channels(const T* from, bool exist = true) {
    const uint2 bits = exist ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
    const float2 low = widen_pair<T>(bits.x), high = widen_pair<T>(bits.y);
    return make_float4(low.x, low.y, high.x, high.y);
}
template <class T>
__device__ __forceinline__ void store_channels(float4 value, T* to) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(pair_of<T>(value.x, value.y), pair_of<T>(value.z, value.w)));
}

// Four channels in shared memory.
__device__ __forceinline__ float4 staged_channels(const float* from) { return *reinterpret_cast<const float4*>(from); }
template <class T>
__device__ __forceinline__ float4 staged_channels(const T* from) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    const float2 low = widen_pair<T>(bits.x), high = widen_pair<T>(bits.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

// The channels of 16 bytes.
template <class T>
constexpr int kVectorsOfWords = sizeof(uint4) / sizeof(T) / kVector;
template <class T>
__device__ __forceinline__ void widen_words(uint4 bits, float4 (&values)[kVectorsOfWords<T>]) {
    if constexpr (sizeof(T) == 2) {
        const float2 pairs[] = {widen_pair<T>(bits.x), widen_pair<T>(bits.y), widen_pair<T>(bits.z),
                                widen_pair<T>(bits.w)};
        values[0] = make_float4(pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y);
        values[1] = make_float4(pairs[2].x, pairs[2].y, pairs[3].x, pairs[3].y);
    } else {
        values[0] = make_float4(float_of(bits.x), float_of(bits.y), float_of(bits.z), float_of(bits.w));
    }
}
template <class T>
__device__ __forceinline__ void store_words(const float4 (&values)[kVectorsOfWords<T>], T* to) {
    if constexpr (sizeof(T) == 2) {
        __stcs(reinterpret_cast<uint4*>(to),
               make_uint4(pair_of<T>(values[0].x, values[0].y), pair_of<T>(values[0].z, values[0].w),
                          pair_of<T>(values[1].x, values[1].y), pair_of<T>(values[1].z, values[1].w)));
    } else {
        store_channels(values[0], to);
    }
}

// Four channels of a pixel, of which `there` exist; others are 0. `Vectors`: they are one vector in memory, and all
// exist or none.
template <bool Vectors, class T>
__device__ __forceinline__ float4 load_four(const T* from, int64_t stride_c, int there) {
    if constexpr (Vectors) {
        return load_channels(from, there > 0);
    } else {
        float4 values;
        values.x = there > 0 ? widen(load_input(from)) : 0;
        values.y = there > 1 ? widen(load_input(from + stride_c)) : 0;
        values.z = there > 2 ? widen(load_input(from + 2 * stride_c)) : 0;
        values.w = there > 3 ? widen(load_input(from + 3 * stride_c)) : 0;
        return values;
    }
}

// The same as copies of this thread.
template <bool Vectors>
__device__ __forceinline__ void copy_four(float4* to, const float* from, int64_t stride_c, int there) {
    float* const staged = reinterpret_cast<float*>(to);
    if constexpr (Vectors) {
        copy_async<sizeof(float4)>(staged, from, there > 0);
    } else {
#pragma unroll
        for (int v = 0; v < kVector; v++) copy_async<sizeof(float)>(staged + v, from + v * stride_c, v < there);
    }
}

__device__ __forceinline__ void add_products(float weight, float4 value, float4& sum) {
    sum.x += weight * value.x;
    sum.y += weight * value.y;
    sum.z += weight * value.z;
    sum.w += weight * value.w;
}

// Why channels of an array cannot be loaded and stored `count` at a time.
inline const char* not_for_vectors(const Problem& p, const Array& array, int count = kVector) {
    if (array.empty()) return nullptr;
    if (array.stride_c != 1) return "channels are not adjacent";
    if (p.features.c / p.groups % count != 0) return "channels of a group are not whole vectors";
    for (int64_t stride : {array.stride_n, array.stride_h, array.stride_w}) {
        if (stride % count != 0) return "pixels are not whole vectors apart";
    }
    const auto bytes = static_cast<uintptr_t>(count * itemsize(array.dtype));
    if (reinterpret_cast<uintptr_t>(array.data) % bytes != 0) return "an array is not aligned to vectors";
    return nullptr;
}

// How threads are spread in a block: `lanes` along channels, the others along the columns of a row.
struct Lanes {
    int lanes, columns;
    int64_t shared_bytes;

    // With `own` columns of a thread. Each column, and `halo` more, takes bytes of shared memory, of which there must
    // be enough.
    Lanes(int64_t channels, int own, int64_t bytes_of_column, int halo = 0, int most = 64) : lanes(4) {
        do {
            lanes *= 2;
            columns = kThreads / lanes * own;
            shared_bytes = (columns + halo) * bytes_of_column;
        } while (lanes < most && (lanes < channels / kVector || shared_bytes > kSharedBytes));
    }
};

}  // namespace carafepp::cuda
