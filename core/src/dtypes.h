// SPDX-License-Identifier: Apache-2.0
// The storage types, their conversions from and to the type that sums are kept in, and C++ types for dtypes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "problem.h"

namespace carafepp {

constexpr int64_t itemsize(carafepp_dtype dtype) { return (dtype & 0xff) / 8; }

struct Float16 {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

CARAFEPP_HOST_DEVICE inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

CARAFEPP_HOST_DEVICE inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

CARAFEPP_HOST_DEVICE inline float widen(float value) { return value; }
CARAFEPP_HOST_DEVICE inline double widen(double value) { return value; }
CARAFEPP_HOST_DEVICE inline float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

// A loop of it vectorises, since it has no branches. It holds if denormal floats are flushed to 0, since it has none. A
// device has an instruction for it, which agrees: every float16 is a float, so nothing is rounded.
CARAFEPP_HOST_DEVICE inline float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const uint32_t exponent_and_fraction = uint32_t{value.bits & 0x7fffu} << 13;
    const uint32_t exponent = exponent_and_fraction & 0x0f800000u;
    const uint32_t normal = exponent_and_fraction + ((127 - 15) << 23);
    const uint32_t infinite_or_nan = normal + ((255 - 31 - (127 - 15)) << 23);
    const uint32_t denormal = bits_of(float_of(normal + (1u << 23)) - float_of((127 - 14) << 23));
    const uint32_t magnitude = exponent == 0 ? denormal : exponent == 0x0f800000u ? infinite_or_nan : normal;
    return float_of(magnitude | uint32_t{value.bits & 0x8000u} << 16);
#endif
}

// Rounds to nearest, ties to even: to Inf beyond the largest number, and to denormals. A device's instructions (cvt.rn)
// agree in every bit, except that NaN may become another NaN. They stand here, as CUDA's headers for 16 bits take a
// second of each source's compilation.
template <class T>
CARAFEPP_HOST_DEVICE T narrow(float value);

template <class T>
CARAFEPP_HOST_DEVICE T narrow(double value);

template <>
CARAFEPP_HOST_DEVICE inline float narrow<float>(float value) {
    return value;
}

template <>
CARAFEPP_HOST_DEVICE inline double narrow<double>(double value) {
    return value;
}

template <>
CARAFEPP_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
    return rounded;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const uint32_t quiet_nan = bits | 0x00400000u;
    return {static_cast<uint16_t>((value != value ? quiet_nan : rounded) >> 16)};
#endif
}

template <>
CARAFEPP_HOST_DEVICE inline Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
    Float16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
    return rounded;
#else
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 leaves the fraction of a number below 2^-14 in units of 2^-24, rounded by the addition.
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t infinity = 0x7c00, nan = 0x7e00;
    const uint32_t bits = magnitude > 0x7f800000u    ? nan
                          : magnitude >= 0x477ff000u ? infinity  // 65520, halfway to the next power of two, and above
                          : magnitude < 0x38800000u  ? denormal
                                                     : normal;
    return {static_cast<uint16_t>(sign | bits)};
#endif
}

// The address of an element of an array. Always inlined, since every instruction set compiles its own
// (cpu/simd/vector.h).
template <class T>
CARAFEPP_HOST_DEVICE __attribute__((always_inline)) inline T* element(const Array& array, int64_t n, int64_t c,
                                                                      int64_t h, int64_t w) {
    return static_cast<T*>(array.data) + n * array.stride_n + c * array.stride_c + h * array.stride_h +
           w * array.stride_w;
}

// The type that sums of T are kept in.
template <class T>
struct AccumulatorOf {
    using type = float;
};

template <>
struct AccumulatorOf<double> {
    using type = double;
};

template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class A>
constexpr carafepp_dtype kDtypeOf = std::is_same_v<A, double> ? CARAFEPP_FLOAT64 : CARAFEPP_FLOAT32;

template <class T>
struct Type {
    using type = T;
};

// Calls f(Type<T>()) with the storage type of a dtype.
template <class F>
void with_type(carafepp_dtype dtype, F f) {
    switch (dtype) {
        case CARAFEPP_FLOAT32: return f(Type<float>());
        case CARAFEPP_FLOAT64: return f(Type<double>());
        case CARAFEPP_FLOAT16: return f(Type<Float16>());
        case CARAFEPP_BFLOAT16: return f(Type<BFloat16>());
    }
}

// The same of a dtype whose sums are kept in A.
template <class A, class F>
void with_type_of(carafepp_dtype dtype, F f) {
    with_type(dtype, [&](auto type) {
        if constexpr (std::is_same_v<Accumulator<typename decltype(type)::type>, A>) f(type);
    });
}

// Calls f(Type<A>()) with the type that sums of a dtype are kept in.
template <class F>
void with_accumulator(carafepp_dtype dtype, F f) {
    dtype == CARAFEPP_FLOAT64 ? f(Type<double>()) : f(Type<float>());
}

// Calls f(Type<T>(), Type<M>()) with the storage types of features and of masks or logits. A problem without features
// has one type.
template <class F>
void with_types(const Problem& problem, F f) {
    const carafepp_dtype masks = problem.from_logits ? problem.logits.dtype : problem.masks.dtype;
    const carafepp_dtype features = problem.features.dtype ? problem.features.dtype : masks;
    with_type(features, [&](auto features_type) {
        if (masks == features) {
            f(features_type, features_type);
        } else if constexpr (sizeof(typename decltype(features_type)::type) == 2) {
            f(features_type, Type<float>());
        }
    });
}

}  // namespace carafepp
