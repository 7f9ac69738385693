// SPDX-License-Identifier: Apache-2.0
// Shared by kernels on tensor cores, for arrays of 16 bits. In the fragments of PTX's mma.m16n8k8 and
// mma.m16n8k16 a lane holds pairs of elements. Below, `row` is lane / 4 and `pair` is lane % 4: a lane sums in rows
// `row` and `row` + 8, columns 2 * pair and 2 * pair + 1.
#pragma once

#include "cuda/columns.h"

namespace carafepp::cuda {

constexpr int kWide = 8;  // channels in 16 bytes

// A number that all lanes have, such that compilers see it: they split no branch on it.
__device__ __forceinline__ int same_in_warp(int number) { return __shfl_sync(0xffffffffu, number, 0); }

// ---- stores ----

// Transposes 4 x 4 words of four neighbouring lanes: lane q gets word q of each.
__device__ __forceinline__ uint4 transpose_words(const uint32_t (&words)[4], int lane) {
    const bool odd = lane % 2 != 0, upper = lane / 2 % 2 != 0;
    const auto exchange = [](uint32_t word, int distance) { return __shfl_xor_sync(0xffffffffu, word, distance); };
    const uint32_t first = exchange(odd ? words[0] : words[1], 1), second = exchange(odd ? words[2] : words[3], 1);
    const uint2 low = odd ? make_uint2(first, words[1]) : make_uint2(words[0], first),
                high = odd ? make_uint2(second, words[3]) : make_uint2(words[2], second);
    const uint2 own = upper ? high : low;
    const uint2 other{exchange(upper ? low.x : high.x, 2), exchange(upper ? low.y : high.y, 2)};
    return upper ? make_uint4(other.x, other.y, own.x, own.y) : make_uint4(own.x, own.y, other.x, other.y);
}

template <class T>
__device__ __forceinline__ void store_word(uint32_t word, T* to) {
    __stcs(reinterpret_cast<uint32_t*>(to), word);
}

// Adds 0 times both elements of a pair. So `zeros`, 0 at first, stay 0 as long as elements are finite.
template <class T>
__device__ __forceinline__ void add_zeros(uint32_t pair, uint32_t& zeros) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, Float16>) {
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
    }
#else
    const float2 elements = widen_pair<T>(pair);
    if (!(fabsf(elements.x) < INFINITY && fabsf(elements.y) < INFINITY)) zeros = 1;
#endif
}

// ---- masks ----

// The scale of masks. Normalised masks are at most 1 and perhaps small, so as float16 they would lose bits.
template <class T>
__device__ __forceinline__ float scale_of_masks(const Problem& p) {
    return std::is_same_v<T, Float16> && p.from_logits && p.normalizer != CARAFEPP_NONE ? 0x1p15f : 1.0f;
}

// An output in one channel without tensor cores, with the window around (i, j). A zero of a matrix makes NaN of an
// infinite feature; here no zero is multiplied. `weights` are `apart` from tap to tap.
template <int K, class T>
__device__ float output_tap_by_tap(const Problem& p, int64_t n, int64_t c, int64_t i, int64_t j, const float* weights,
                                   int apart) {
    float sum = 0;
#pragma unroll 1
    for (int t = 0; t < K * K; t++) {
        const int64_t y = i + t / K - K / 2, x = j + t % K - K / 2;
        if (y >= 0 && y < p.features.h && x >= 0 && x < p.features.w)
            sum += weights[t * apart] * widen(*element<const T>(p.features, n, c, y, x));
    }
    return sum;
}

// ---- why these kernels do not take a problem ----

inline const char* not_of_16_bits(const Problem& p) {
    return itemsize(p.features.dtype) != 2 ? "features are not of 16 bits" : nullptr;
}
inline const char* masks_too_large_for_mma(const Problem& p) {
    const bool normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
    const carafepp_dtype dtype = p.from_logits ? p.logits.dtype : p.masks.dtype;
    return normalized || dtype == p.features.dtype ? nullptr : "masks are of 32 bits and may be too large for 16";
}

// Only bfloat16 needs more than every device has: code for sm_80. `kernel` is one for bfloat16.
template <class... Parameters>
const char* not_compiled_for_bfloat16(const Problem& p, void (*kernel)(Parameters...)) {
    if (p.features.dtype != CARAFEPP_BFLOAT16 || is_compiled_for(80, kernel)) return nullptr;
    return "the device has no tensor cores for bfloat16, or this build no code for them";
}

}  // namespace carafepp::cuda
