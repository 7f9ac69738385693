// SPDX-License-Identifier: Apache-2.0
// What the kernels for up x2 with adjacent channels of 16 bits share, on tensor cores (PTX's mma.m16n8k8, whose
// fragments give each lane pairs of elements): eight channels loaded and stored at once.
#pragma once

#include <initializer_list>

#include "cuda/channels.h"
#include "cuda/up2.h"

namespace carafepp::cuda {

constexpr int kWide = 8;  // channels in 16 bytes

// Eight channels as words of two, 0 where there are none.
struct Words {
    uint32_t of[4];
};
template <class T>
__device__ __forceinline__ Words load_words(const T* from, bool exist) {
    if (!exist) return {};
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    return {{words.x, words.y, words.z, words.w}};
}

// sums[channel of eight] += a * b, where a lane's pair of rows of b are two pixels. A column of the products is every
// eighth channel, so that a lane loads and stores eight adjacent ones.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[kWide][4], const uint32_t (&a)[2], const Words& even,
                                             const Words& odd) {
#pragma unroll
    for (int word = 0; word < 4; word++) {
        multiply_add<T>(sums[2 * word], a, (even.of[word] & 0xffff) | odd.of[word] << 16);
        multiply_add<T>(sums[2 * word + 1], a, even.of[word] >> 16 | (odd.of[word] & 0xffff0000));
    }
}

// Writes element k of each of eight channels' sums; whether all of them are finite.
template <class T>
__device__ __forceinline__ bool store_sums(const float (&sums)[kWide][4], int k, float scale, T* to) {
    float values[kWide];
    bool finite = true;
#pragma unroll
    for (int q = 0; q < kWide; q++) {
        values[q] = sums[q][k] * scale;
        finite = finite && fabsf(values[q]) < INFINITY;
    }
    __stcs(reinterpret_cast<uint4*>(to),
           make_uint4(pair_of<T>(values[0], values[1]), pair_of<T>(values[2], values[3]),
                      pair_of<T>(values[4], values[5]), pair_of<T>(values[6], values[7])));
    return finite;
}

// What masks are multiplied by: of float16, those that are normalised, at most 1 and perhaps small, would lose bits.
template <class T>
__device__ __forceinline__ float scale_of_masks(const Problem& p) {
    return std::is_same_v<T, Float16> && p.from_logits && p.normalizer != CARAFEPP_NONE ? 0x1p15f : 1.0f;
}

// Why these kernels do not take a problem, with channels in some arrays.
inline const char* not_for_mma(const Problem& p, std::initializer_list<const Array*> arrays) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (itemsize(p.features.dtype) != 2) return "features are not of 16 bits";
    for (const Array* array : arrays) {
        if (const char* reason = not_for_vectors(p, *array, kWide)) return reason;
    }
    return nullptr;
}

inline const char* masks_too_large_for_mma(const Problem& p) {
    const bool normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
    const carafepp_dtype dtype = p.from_logits ? p.logits.dtype : p.masks.dtype;
    return normalized || dtype == p.features.dtype ? nullptr : "masks are of 32 bits and may be too large for 16";
}

template <class... Parameters>
const char* not_compiled_for_bfloat16(void (*kernel)(Parameters...)) {
    return is_compiled_for(80, kernel) ? nullptr
                                       : "the device has no tensor cores for bfloat16, or this build no code for them";
}

}  // namespace carafepp::cuda
