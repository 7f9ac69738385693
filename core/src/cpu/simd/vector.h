// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that a translation unit is compiled for, by the compiler's vector extensions.
// Conversions of halves, masked tails and non-temporal stores are intrinsics. Every processor has vectors of 16 bytes.
//
// Everything has internal linkage, and what translation units share is in the namespace of their instruction set. An
// inline function shared by two instruction sets would be linked once, from either. It might then run where it must
// not.
#pragma once

#if CARAFEPP_VECTOR_BYTES > 16
#if !defined(__clang__)  // gcc 12 takes the undefined operands of its own intrinsics for mistakes
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "dtypes.h"

#define CARAFEPP_INLINE static inline __attribute__((always_inline))
#define CARAFEPP_MEMBER inline __attribute__((always_inline))  // of a struct

namespace carafepp {
namespace {

constexpr int kVectorBytes = CARAFEPP_VECTOR_BYTES;
#if CARAFEPP_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// Vectors of the type A that sums are kept in, and of the storage types as they lie in memory.
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t natural __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
    typedef uint64_t natural __attribute__((vector_size(kVectorBytes)));
};

template <class A>
using Vector = typename VectorOf<A>::type;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
CARAFEPP_INLINE Vector<A> splat(A value) {
    return value - Vector<A>{};
}

// The same vector. The compiler keeps it in a register: it does not load it again for each multiplication.
template <class V>
CARAFEPP_INLINE V in_register(V vector) {
#if CARAFEPP_VECTOR_BYTES == 64
    asm("" : "+v"(vector));
#elif defined(__aarch64__)
    asm("" : "+w"(vector));
#elif defined(__x86_64__)
    asm("" : "+x"(vector));
#endif
    return vector;
}

// The same pointer. The compiler knows nothing of it, so it takes no other for the base of addresses.
template <class P>
CARAFEPP_INLINE P opaque(P pointer) {
    asm("" : "+r"(pointer));
    return pointer;
}

// Calls f(n) with n in [1, Most] known to the compiler.
template <int Most, class F>
static inline __attribute__((always_inline)) void with_count(int n, F f) {
    if constexpr (Most > 1) {
        if (n < Most) {
            with_count<Most - 1>(n, f);
            return;
        }
    }
    f(std::integral_constant<int, Most>());
}

// ---- loads, widening ----

CARAFEPP_INLINE Vector<float> load(const float* from) {
    return *reinterpret_cast<const VectorOf<float>::unaligned*>(from);
}
CARAFEPP_INLINE Vector<double> load(const double* from) {
    return *reinterpret_cast<const VectorOf<double>::unaligned*>(from);
}

#if CARAFEPP_VECTOR_BYTES == 64

CARAFEPP_INLINE Vector<float> load(const Float16* from) {
    return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
CARAFEPP_INLINE Vector<float> load(const BFloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (Vector<float>)_mm512_slli_epi32(wide, 16);
}

#elif CARAFEPP_VECTOR_BYTES == 32

CARAFEPP_INLINE Vector<float> load(const Float16* from) {
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
CARAFEPP_INLINE Vector<float> load(const BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (Vector<float>)_mm256_slli_epi32(wide, 16);
}

#else

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// 16-bit elements, each in the upper half of its lane.
template <class T>
CARAFEPP_INLINE VectorOf<float>::integer load_high(const T* from) {
    typedef VectorOf<float>::integer Integer;
#if defined(__aarch64__)
    return (Integer)vshlq_n_u32(vmovl_u16(vld1_u16(&from->bits)), 16);
#else
    return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Integer) << 16;
#endif
}

CARAFEPP_INLINE Vector<float> load(const Float16* from) {
#if defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
#else  // as widen(Float16)
    typedef VectorOf<float>::integer Integer;
    const Integer high = load_high(from), exponent_and_fraction = (high & 0x7fff0000) >> 3;
    const Integer exponent = exponent_and_fraction & 0x0f800000;
    const Integer normal = exponent_and_fraction + ((127 - 15) << 23);
    const Integer infinite_or_nan = normal + ((255 - 31 - (127 - 15)) << 23);
    const Integer denormal = (Integer)((Vector<float>)(normal + (1 << 23)) - 0x1p-14f);
    const Integer magnitude = exponent == 0 ? denormal : exponent == 0x0f800000 ? infinite_or_nan : normal;
    return (Vector<float>)(magnitude | (high & INT32_MIN));
#endif
}
CARAFEPP_INLINE Vector<float> load(const BFloat16* from) { return (Vector<float>)load_high(from); }

#endif

// ---- stores, rounding to nearest, ties to even ----

CARAFEPP_INLINE void store(Vector<float> value, float* to) {
    *reinterpret_cast<VectorOf<float>::unaligned*>(to) = value;
}
CARAFEPP_INLINE void store(Vector<double> value, double* to) {
    *reinterpret_cast<VectorOf<double>::unaligned*>(to) = value;
}

// Rounds to bfloat16, in the upper halves; `number` has no NaN.
CARAFEPP_INLINE VectorOf<float>::natural round_to_upper_half(Vector<float> number) {
    const VectorOf<float>::natural bits = (VectorOf<float>::natural)number;
    return bits + 0x7fff + ((bits >> 16) & 1);
}
CARAFEPP_INLINE VectorOf<float>::natural rounded_to_bfloat16(Vector<float> value) {
    const VectorOf<float>::natural quiet_nan = (VectorOf<float>::natural)value | 0x00400000u;
    return (value != value ? quiet_nan : round_to_upper_half(value)) >> 16;
}

#if CARAFEPP_VECTOR_BYTES == 64

CARAFEPP_INLINE void store(Vector<float> value, Float16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CARAFEPP_INLINE void store(Vector<float> value, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)rounded_to_bfloat16(value)));
}
CARAFEPP_INLINE bool any_is_nan(Vector<float> a, Vector<float> b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
}
CARAFEPP_INLINE void store_non_temporal(Vector<float> value, float* to) { _mm512_stream_ps(to, (__m512)value); }
CARAFEPP_INLINE void store_non_temporal(Vector<double> value, double* to) { _mm512_stream_pd(to, (__m512d)value); }

#elif CARAFEPP_VECTOR_BYTES == 32

CARAFEPP_INLINE void store(Vector<float> value, Float16* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
CARAFEPP_INLINE void store(Vector<float> value, BFloat16* to) {
    const __m256i wide = (__m256i)rounded_to_bfloat16(value);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}
CARAFEPP_INLINE bool any_is_nan(Vector<float> a, Vector<float> b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}
CARAFEPP_INLINE void store_non_temporal(Vector<float> value, float* to) { _mm256_stream_ps(to, (__m256)value); }
CARAFEPP_INLINE void store_non_temporal(Vector<double> value, double* to) { _mm256_stream_pd(to, (__m256d)value); }

#else

CARAFEPP_INLINE void store(Vector<float> value, Float16* to) {
#if defined(__aarch64__)
    vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(value)));
#else  // as narrow<Float16>
    typedef VectorOf<float>::integer Integer;
    const Integer sign = ((Integer)value >> 16) & 0x8000, magnitude = (Integer)value & 0x7fffffff;
    const Integer normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Integer denormal = (Integer)((Vector<float>)magnitude + 0.5f) - 0x3f000000;
    const Integer infinity = Integer{} + 0x7c00, nan = Integer{} + 0x7e00;
    const Integer bits = magnitude > 0x7f800000    ? nan
                         : magnitude >= 0x477ff000 ? infinity
                         : magnitude < 0x38800000  ? denormal
                                                   : normal;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(sign | bits, Halves);
#endif
}
CARAFEPP_INLINE void store(Vector<float> value, BFloat16* to) {
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(rounded_to_bfloat16(value), Halves);
}
CARAFEPP_INLINE bool any_is_nan(Vector<float> a, Vector<float> b) {
    const VectorOf<float>::integer nan = (a != a) | (b != b);
    return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}
template <class A>
CARAFEPP_INLINE void store_non_temporal(Vector<A> value, A* to) {
    store(value, to);
}

#endif

// Use non-temporal stores if a result exceeds 4 MiB: it would leave the caches before anybody reads it.
CARAFEPP_INLINE bool wants_non_temporal_stores(const Array& result) {
    constexpr int64_t kBytes = int64_t{4} << 20;
    return result.n * result.c * result.h * result.w * itemsize(result.dtype) >= kBytes;
}

// Makes non-temporal stores visible to other threads in the order of other stores.
CARAFEPP_INLINE void finish_non_temporal_stores() {
#if CARAFEPP_VECTOR_BYTES > 16
    _mm_sfence();
#endif
}

// ---- parts of vectors: lanes [begin, end) are loaded and the others are 0; the first `count` lanes are stored ----

#if CARAFEPP_VECTOR_BYTES == 64

CARAFEPP_INLINE uint32_t lane_mask(int begin, int end) {
    return begin < end ? ((1u << end) - 1) & ~((1u << begin) - 1) : 0;
}
CARAFEPP_INLINE Vector<float> load_between(const float* from, int begin, int end) {
    return (Vector<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lane_mask(begin, end)), from);
}
CARAFEPP_INLINE Vector<double> load_between(const double* from, int begin, int end) {
    return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(begin, end)), from);
}
CARAFEPP_INLINE Vector<float> load_between(const Float16* from, int begin, int end) {
    return (Vector<float>)_mm512_cvtph_ps(
        _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lane_mask(begin, end)), from));
}
CARAFEPP_INLINE Vector<float> load_between(const BFloat16* from, int begin, int end) {
    const __m256i lanes = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lane_mask(begin, end)), from);
    return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(lanes), 16);
}
CARAFEPP_INLINE void store_first(Vector<float> value, float* to, int count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lane_mask(0, count)), (__m512)value);
}

#elif CARAFEPP_VECTOR_BYTES == 32

CARAFEPP_INLINE __m256i lane_mask(int begin, int end) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
}
CARAFEPP_INLINE Vector<float> load_between(const float* from, int begin, int end) {
    return (Vector<float>)_mm256_maskload_ps(from, lane_mask(begin, end));
}
CARAFEPP_INLINE void store_first(Vector<float> value, float* to, int count) {
    _mm256_maskstore_ps(to, lane_mask(0, count), (__m256)value);
}

#endif

// Four elements of 16 bits as one word, for processors without masked loads. A vector that is loaded right after its
// elements were stored one by one would wait for them.
template <class T>
CARAFEPP_INLINE uint64_t word_between(const T* from, int begin, int end) {
    uint64_t word = 0;
    if (begin <= 0 && end >= 4) {
        std::memcpy(&word, from, sizeof word);
    } else {
        for (int q = begin > 0 ? begin : 0; q < (end < 4 ? end : 4); q++) word |= uint64_t{from[q].bits} << 16 * q;
    }
    return word;
}

// Other types go through memory.
template <class T>
CARAFEPP_INLINE Vector<Accumulator<T>> load_between(const T* from, int begin, int end) {
    constexpr int L = kLanes<Accumulator<T>>;
    if (begin == 0 && end == L) return load(from);
    T lanes[L] = {};
    if constexpr (sizeof(T) == 2 && L == 4) {
        const uint64_t word = word_between(from, begin, end);
        std::memcpy(lanes, &word, sizeof lanes);
#if CARAFEPP_VECTOR_BYTES == 32
    } else if constexpr (sizeof(T) == 2) {
        const __m128i words = _mm_set_epi64x(static_cast<int64_t>(word_between(from + 4, begin - 4, end - 4)),
                                             static_cast<int64_t>(word_between(from, begin, end)));
        std::memcpy(lanes, &words, sizeof lanes);
#endif
    } else {
        for (int q = begin; q < end; q++) lanes[q] = from[q];
    }
    return load(lanes);
}
template <class T>
CARAFEPP_INLINE void store_first(Vector<Accumulator<T>> value, T* to, int count) {
    T lanes[kLanes<Accumulator<T>>];
    store(value, lanes);
    std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

// Loads or stores the first `count` lanes: none, some or all.
template <class T>
CARAFEPP_INLINE Vector<Accumulator<T>> load_part(const T* from, int64_t count) {
    return count >= kLanes<Accumulator<T>> ? load(from)
                                           : load_between(from, 0, static_cast<int>(count > 0 ? count : 0));
}
template <class T>
CARAFEPP_INLINE void store_part(Vector<Accumulator<T>> value, T* to, int64_t count) {
    if (count >= kLanes<Accumulator<T>>) {
        store(value, to);
    } else if (count > 0) {
        store_first(value, to, static_cast<int>(count));
    }
}

// ---- shuffles: lanes of two vectors, numbered through ----

struct EvenLanes {
    static constexpr int at(int lane, int) { return 2 * lane; }
};
struct OddLanes {
    static constexpr int at(int lane, int) { return 2 * lane + 1; }
};
struct AlternatingLow {  // low[0], high[0], low[1], ...
    static constexpr int at(int lane, int lanes) { return lane / 2 + lane % 2 * lanes; }
};
struct AlternatingHigh {  // and so on from their middle
    static constexpr int at(int lane, int lanes) { return lanes / 2 + AlternatingLow::at(lane, lanes); }
};

template <class Rule, class A, int... Lane>
CARAFEPP_INLINE Vector<A> shuffle_lanes(Vector<A> low, Vector<A> high, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(low, high, Rule::at(Lane, sizeof...(Lane))...);
#else
    return __builtin_shuffle(low, high, typename VectorOf<A>::integer{Rule::at(Lane, sizeof...(Lane))...});
#endif
}
template <class Rule, class A>
CARAFEPP_INLINE Vector<A> shuffle(Vector<A> low, Vector<A> high) {
    return shuffle_lanes<Rule, A>(low, high, std::make_integer_sequence<int, kLanes<A>>());
}

template <int Distance>
struct ExchangeLow {  // blocks of `Distance` lanes of the first, the odd ones replaced by the even ones of the second
    static constexpr int at(int lane, int lanes) { return lane & Distance ? lanes + lane - Distance : lane; }
};
template <int Distance>
struct ExchangeHigh {  // the even ones of the second replaced by the odd ones of the first
    static constexpr int at(int lane, int lanes) { return lane & Distance ? lanes + lane : lane + Distance; }
};

template <int First>
struct Unpack {  // in each four lanes, two of the first alternating with two of the second
    static constexpr int at(int lane, int lanes) { return lane / 4 * 4 + First + lane % 4 / 2 + lane % 2 * lanes; }
};

template <int First>
struct EveryOtherOfFour {  // in each four lanes, two of the first before two of the second
    static constexpr int at(int lane, int lanes) { return lane / 4 * 4 + First + lane % 2 * 2 + lane % 4 / 2 * lanes; }
};

// rows[i] lane k becomes rows[k] lane i.
template <class A, int Distance = 1>
CARAFEPP_INLINE void transpose(Vector<A> (&rows)[kLanes<A>]) {
    if constexpr (Distance == 1 && sizeof(A) == 4) {  // each shuffle is one instruction
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; i += 4) {
            Vector<A> low[2], high[2];
            for (int k = 0; k < 2; k++) {
                low[k] = shuffle<Unpack<0>, A>(rows[i + 2 * k], rows[i + 2 * k + 1]);
                high[k] = shuffle<Unpack<2>, A>(rows[i + 2 * k], rows[i + 2 * k + 1]);
            }
            rows[i] = shuffle<ExchangeLow<2>, A>(low[0], low[1]);
            rows[i + 1] = shuffle<ExchangeHigh<2>, A>(low[0], low[1]);
            rows[i + 2] = shuffle<ExchangeLow<2>, A>(high[0], high[1]);
            rows[i + 3] = shuffle<ExchangeHigh<2>, A>(high[0], high[1]);
        }
        if constexpr (kLanes<A> > 4) transpose<A, 4>(rows);
        return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i++) {
        if (i & Distance) continue;
        const Vector<A> low = rows[i], high = rows[i + Distance];
        rows[i] = shuffle<ExchangeLow<Distance>, A>(low, high);
        rows[i + Distance] = shuffle<ExchangeHigh<Distance>, A>(low, high);
    }
    if constexpr (2 * Distance < kLanes<A>) transpose<A, 2 * Distance>(rows);
}

// Lane i: the sum of the lanes of rows[i].
template <class A, int Distance = 1>
CARAFEPP_INLINE Vector<A> sums_of_lanes(Vector<A> (&rows)[kLanes<A>]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i += 2 * Distance) {
        rows[i] = shuffle<ExchangeLow<Distance>, A>(rows[i], rows[i + Distance]) +
                  shuffle<ExchangeHigh<Distance>, A>(rows[i], rows[i + Distance]);
    }
    if constexpr (2 * Distance < kLanes<A>) return sums_of_lanes<A, 2 * Distance>(rows);
    return rows[0];
}

// ---- several rows of lanes in one, and back ----

// Elements k, k + 3, k + 6, ... of three vectors lie in different lanes. Two blends and a permutation gather them.
// third_vector() tells which of the vectors has such an element in a lane.
constexpr int third_vector(int lane, int lanes, int k) { return lane % 3 == k ? 0 : (lanes + lane) % 3 == k ? 1 : 2; }
template <int K, int Nth>
struct BlendThirds {  // the lanes of one of the vectors replace those of the others
    static constexpr int at(int lane, int lanes) { return lane + (third_vector(lane, lanes, K) == Nth ? lanes : 0); }
};
template <int K>
struct GatherThirds {
    static constexpr int at(int lane, int lanes) { return (3 * lane + K) % lanes; }
};
template <int K>
struct ScatterThirds {
    static constexpr int at(int lane, int lanes) { return (third_vector(lane, lanes, K) * lanes + lane - K) / 3; }
};
template <int Nth, int K>
struct BlendNth {  // the lanes of column K replace those of the others
    static constexpr int at(int lane, int lanes) { return lane + ((Nth * lanes + lane) % 3 == K ? lanes : 0); }
};
template <int K, class A>
CARAFEPP_INLINE Vector<A> every_third(Vector<A> a, Vector<A> b, Vector<A> c) {
    const Vector<A> thirds = shuffle<BlendThirds<K, 2>, A>(shuffle<BlendThirds<K, 1>, A>(a, b), c);
    return shuffle<GatherThirds<K>, A>(thirds, thirds);
}
template <int Nth, class A>
CARAFEPP_INLINE Vector<A> blend_thirds(Vector<A> a, Vector<A> b, Vector<A> c) {
    return shuffle<BlendNth<Nth, 2>, A>(shuffle<BlendNth<Nth, 1>, A>(a, b), c);
}

// columns[k] becomes elements k, k + N, k + 2N, ... of the N vectors read one after the other.
template <class A, int N>
CARAFEPP_INLINE void deinterleave(Vector<A> (&columns)[N]) {
    static_assert(N <= 4 || N == 8, "shuffles for more are not written");
    if constexpr (N == 2) {
        if constexpr (kVectorBytes == 32 && sizeof(A) == 4) {  // each shuffle is one instruction
            const Vector<A> low = shuffle<ExchangeLow<4>, A>(columns[0], columns[1]);
            const Vector<A> high = shuffle<ExchangeHigh<4>, A>(columns[0], columns[1]);
            columns[0] = shuffle<EveryOtherOfFour<0>, A>(low, high);
            columns[1] = shuffle<EveryOtherOfFour<1>, A>(low, high);
            return;
        }
        const Vector<A> even = shuffle<EvenLanes, A>(columns[0], columns[1]);
        columns[1] = shuffle<OddLanes, A>(columns[0], columns[1]);
        columns[0] = even;
    } else if constexpr (N == 3) {
        const Vector<A> a = columns[0], b = columns[1], c = columns[2];
        columns[0] = every_third<0, A>(a, b, c);
        columns[1] = every_third<1, A>(a, b, c);
        columns[2] = every_third<2, A>(a, b, c);
    } else if constexpr (N == 4) {
        Vector<A> low[2] = {columns[0], columns[1]}, high[2] = {columns[2], columns[3]};
        deinterleave<A, 2>(low);
        deinterleave<A, 2>(high);
        Vector<A> even[2] = {low[0], high[0]}, odd[2] = {low[1], high[1]};
        deinterleave<A, 2>(even);
        deinterleave<A, 2>(odd);
        columns[0] = even[0];
        columns[1] = odd[0];
        columns[2] = even[1];
        columns[3] = odd[1];
    } else if constexpr (N == 8) {
        Vector<A> even[4], odd[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            even[k] = shuffle<EvenLanes, A>(columns[2 * k], columns[2 * k + 1]);
            odd[k] = shuffle<OddLanes, A>(columns[2 * k], columns[2 * k + 1]);
        }
        deinterleave<A, 4>(even);
        deinterleave<A, 4>(odd);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            columns[2 * k] = even[k];
            columns[2 * k + 1] = odd[k];
        }
    }
}

// The reverse.
template <class A, int N>
CARAFEPP_INLINE void interleave(Vector<A> (&columns)[N]) {
    static_assert(N <= 4 || N == 8, "shuffles for more are not written");
    if constexpr (N == 2) {
        const Vector<A> low = shuffle<AlternatingLow, A>(columns[0], columns[1]);
        columns[1] = shuffle<AlternatingHigh, A>(columns[0], columns[1]);
        columns[0] = low;
    } else if constexpr (N == 3) {
        const Vector<A> a = shuffle<ScatterThirds<0>, A>(columns[0], columns[0]);
        const Vector<A> b = shuffle<ScatterThirds<1>, A>(columns[1], columns[1]);
        const Vector<A> c = shuffle<ScatterThirds<2>, A>(columns[2], columns[2]);
        columns[0] = blend_thirds<0, A>(a, b, c);
        columns[1] = blend_thirds<1, A>(a, b, c);
        columns[2] = blend_thirds<2, A>(a, b, c);
    } else if constexpr (N == 4 || N == 8) {
        Vector<A> even[N / 2], odd[N / 2];
#pragma GCC unroll 4
        for (int k = 0; k < N / 2; k++) {
            even[k] = columns[2 * k];
            odd[k] = columns[2 * k + 1];
        }
        interleave<A, N / 2>(even);
        interleave<A, N / 2>(odd);
#pragma GCC unroll 4
        for (int k = 0; k < N / 2; k++) {
            columns[2 * k] = shuffle<AlternatingLow, A>(even[k], odd[k]);
            columns[2 * k + 1] = shuffle<AlternatingHigh, A>(even[k], odd[k]);
        }
    }
}

// ---- bfloat16: a vector's bytes hold the even and the odd elements as two vectors of floats ----

typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UnalignedBits __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

CARAFEPP_INLINE Vector<float> load_even(const BFloat16* from) {
    return (Vector<float>)((Bits) * reinterpret_cast<const UnalignedBits*>(from) << 16);
}
CARAFEPP_INLINE Vector<float> load_odd(const BFloat16* from) {
    return (Vector<float>)((Bits) * reinterpret_cast<const UnalignedBits*>(from) & 0xffff0000u);
}
CARAFEPP_INLINE Bits alternating(Vector<float> even, Vector<float> odd) {
    if (__builtin_expect(any_is_nan(even, odd), false))
        return (Bits)rounded_to_bfloat16(even) | (Bits)rounded_to_bfloat16(odd) << 16;
    return (Bits)round_to_upper_half(even) >> 16 | ((Bits)round_to_upper_half(odd) & 0xffff0000u);
}

CARAFEPP_INLINE void store_alternating(Vector<float> even, Vector<float> odd, BFloat16* to) {
    *reinterpret_cast<UnalignedBits*>(to) = (UnalignedBits)alternating(even, odd);
}

// ---- arithmetic ----

template <class V>
CARAFEPP_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

// value * 2^exponent, rounded once. `magic + exponent` are the bits of `shifted`.
#if CARAFEPP_VECTOR_BYTES == 64

CARAFEPP_INLINE Vector<float> scale(Vector<float> value, Vector<float> exponent, Vector<float>, Vector<float>) {
    return (Vector<float>)_mm512_scalef_ps((__m512)value, (__m512)exponent);
}
CARAFEPP_INLINE Vector<double> scale(Vector<double> value, Vector<double> exponent, Vector<double>, Vector<double>) {
    return (Vector<double>)_mm512_scalef_pd((__m512d)value, (__m512d)exponent);
}

#else

// In two factors, so that neither leaves the range.
CARAFEPP_INLINE Vector<float> scale(Vector<float> value, Vector<float>, Vector<float> shifted, Vector<float> magic) {
    typedef VectorOf<float>::integer Integer;
    const Integer exponent = (Integer)shifted - (Integer)magic;
    const Integer half = exponent >> 1;
    return value * (Vector<float>)((half + 127) << 23) * (Vector<float>)((exponent - half + 127) << 23);
}

// The exponent is raised above 0, as not every instruction set can shift a negative one.
CARAFEPP_INLINE Vector<double> scale(Vector<double> value, Vector<double>, Vector<double> shifted,
                                     Vector<double> magic) {
    typedef VectorOf<double>::natural Natural;
    const Natural exponent = (Natural)shifted - (Natural)magic + 2048;
    const Natural half = exponent >> 1;
    return value * (Vector<double>)((half - 1) << 52) * (Vector<double>)((exponent - half - 1) << 52);
}

#endif

// exp of numbers that are not positive, within 2 units in the last place, also if it is denormal. exp(-inf) = 0, and
// exp(NaN) = NaN. The polynomial is Cephes' over [-ln2/2, ln2/2].
CARAFEPP_INLINE Vector<float> exp_of_nonpositive(Vector<float> x) {
    const Vector<float> lowest = splat(-110.0f);  // exp of it is 0
    x = x < lowest ? lowest : x;
    const Vector<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector<float> shifted = x * 1.44269504088896341f + magic;
    const Vector<float> n = shifted - magic;
    Vector<float> r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Vector<float> p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return scale(p, n, shifted, magic);
}

// exp(x) * 2^-exponent of numbers that are not positive, for sums that have a term of exp(0). It is within 2 units in
// the last place down to exp(-10), then within 12, and 0 if it is below 2^-126. The polynomial is 2^f over [-1/2, 1/2].
// `magic` adds the bias of the exponent too: the bits of `shifted` need one shift.
CARAFEPP_INLINE Vector<float> exp_beside_1(Vector<float> x, int exponent) {
    const Vector<float> lowest = splat(0.6931f * static_cast<float>(exponent - 127));
    x = x < lowest ? lowest : x;
    const Vector<float> magic = splat(12582912.0f + static_cast<float>(127 - exponent));  // 1.5 * 2^23 + 127 - exponent
    const Vector<float> shifted = x * 1.44269504088896341f + magic;
    const Vector<float> f = x * 1.44269504088896341f - (shifted - magic);
    Vector<float> p = splat(1.534581242594868e-4f);
    p = p * f + 1.3399930903688073e-3f;
    p = p * f + 9.618489071726799e-3f;
    p = p * f + 5.550328642129898e-2f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + 1.0f;
    return p * (Vector<float>)((VectorOf<float>::integer)shifted << 23);
}

// The same in double: Taylor's series to r^13 / 13!.
CARAFEPP_INLINE Vector<double> exp_of_nonpositive(Vector<double> x) {
    const Vector<double> lowest = splat(-760.0);
    x = x < lowest ? lowest : x;
    const Vector<double> magic = splat(0x1.8p52);
    const Vector<double> shifted = x * 1.4426950408889634 + magic;
    const Vector<double> n = shifted - magic;
    Vector<double> r = x - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    Vector<double> p = splat(1.0);
#pragma GCC unroll 16
    for (int k = 13; k > 0; k--) p = p * (r * (1.0 / k)) + 1.0;
    return scale(p, n, shifted, magic);
}

CARAFEPP_INLINE Vector<double> exp_beside_1(Vector<double> x, int exponent) {
    return exp_of_nonpositive(x) * (1.0 / (1 << exponent));
}

}  // namespace
}  // namespace carafepp
