// SPDX-License-Identifier: Apache-2.0
// What the kernels for up x2 with adjacent channels share: four channels of a pixel in a thread, loaded and stored as
// one, and the masks of some neighbouring sources of a row in shared memory.
#pragma once

#include "cuda/masks.h"
#include "cuda/up2.h"

namespace carafepp::cuda {

constexpr int kVector = 4;       // channels of a thread
constexpr int kNormalizers = 8;  // threads that normalise the taps of an output together

// ---- four channels ----

// Two elements of 16 bits in a word, as tensor cores take them, too.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
    return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

__device__ __forceinline__ float4 load_channels(const float* from) {
    return __ldg(reinterpret_cast<const float4*>(from));
}
__device__ __forceinline__ void store_channels(float4 value, float* to) {
    __stcs(reinterpret_cast<float4*>(to), value);
}

template <class T>
__device__ __forceinline__ float4 load_channels(const T* from) {
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
    const auto half = [](uint32_t word) { return widen(T{static_cast<uint16_t>(word)}); };
    return make_float4(half(bits.x), half(bits.x >> 16), half(bits.y), half(bits.y >> 16));
}
template <class T>
__device__ __forceinline__ void store_channels(float4 value, T* to) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(pair_of<T>(value.x, value.y), pair_of<T>(value.z, value.w)));
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

// ---- masks of sources (i, first .. first + sources), as [source][tap][output] ----

// Of the threads that normalise an output together.
template <class F>
__device__ __forceinline__ float over_taps(float value, F f) {
#pragma unroll
    for (int distance = 1; distance < kNormalizers; distance *= 2)
        value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// Logits that are staged, `outputs` of them, to masks. All threads of a block call it.
template <int K>
__device__ void normalize_staged(carafepp_normalizer normalizer, float* staged, int outputs) {
    constexpr int kTaps = K * K, kOwn = (kTaps + kNormalizers - 1) / kNormalizers;
    const int lane = static_cast<int>(threadIdx.x) % kNormalizers;
    for (int first = 0; first < outputs; first += kThreads / kNormalizers) {
        const int output = first + static_cast<int>(threadIdx.x) / kNormalizers;
        const bool exists = output < outputs;
        float* const taps = staged + output / kOutputs * kTaps * kOutputs + output % kOutputs;
        float own[kOwn] = {}, largest = -INFINITY;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int tap = k * kNormalizers + lane;
            if (!exists || tap >= kTaps) continue;
            const float logit = taps[tap * kOutputs];
            own[k] = normalizer == CARAFEPP_SIGMOID              ? sigmoid(logit)
                     : normalizer == CARAFEPP_SIGMOID_NORMALIZED ? log_sigmoid(logit)
                                                                 : logit;
            largest = own[k] > largest ? own[k] : largest;
        }
        float scale = 1;
        if (normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
            largest = over_taps(largest, [](float a, float b) { return a > b ? a : b; });
            float sum = 0;
#pragma unroll
            for (int k = 0; k < kOwn; k++) {
                if (!exists || k * kNormalizers + lane >= kTaps) continue;
                own[k] = expf(own[k] - largest);
                sum += own[k];
            }
            scale = 1 / over_taps(sum, [](float a, float b) { return a + b; });
        }
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int tap = k * kNormalizers + lane;
            if (exists && tap < kTaps) taps[tap * kOutputs] = own[k] * scale;
        }
    }
}

// Where there is no source the masks, or the logits that become masks, are 0. Ends with a barrier.
template <int K, class M>
__device__ void stage_sources(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first, int sources,
                              float* staged) {
    constexpr int kTaps = K * K;
    const Array& array = p.from_logits ? p.logits : p.masks;
    for_each_mask(array, kTaps, sources * kOutputs, [&](int64_t tap, int64_t k) {
        const int64_t j = first + k / kOutputs, output = k % kOutputs;
        const Output at{i * kUp + output / kUp, j * kUp + output % kUp};
        float weight = 0;
        if (j >= 0 && j < p.features.w && (p.from_logits || (at.i < p.out_h && at.j < p.out_w)))
            weight = widen(*mask_at<const M>(p, array, n, group, tap, at));
        staged[(k / kOutputs * kTaps + tap) * kOutputs + output] = weight;
    });
    __syncthreads();
    if (!p.from_logits) return;
    normalize_staged<K>(p.normalizer, staged, sources * kOutputs);
    __syncthreads();
}

// For the forward: masks of taps beyond a border become 0, as features are read as 0 there, and 0 * 0 is 0 even where a
// mask is Inf. Ends with a barrier.
template <int K>
__device__ void clear_outside(const Problem& p, int64_t first, int sources, float* staged) {
    if (first >= K / 2 && first + sources + K / 2 <= p.features.w) return;
    for (int k = static_cast<int>(threadIdx.x); k < sources * K * K; k += kThreads) {
        const int64_t j = first + k / (K * K) + k % K - K / 2;
        if (j >= 0 && j < p.features.w) continue;
        reinterpret_cast<float4*>(staged)[k] = make_float4(0, 0, 0, 0);
    }
    __syncthreads();
}

// How threads are spread in a block: `lanes` along channels, the others along the sources of a row.
struct Lanes {
    int lanes, sources;

    // With `own` sources of a thread, whose masks, with those of `halo` more, must fit into shared memory.
    Lanes(int64_t channels, int kernel_size, int own, int halo) : lanes(4) {
        do {
            lanes *= 2;
            sources = kThreads / lanes * own;
        } while (lanes < 64 && (lanes < channels / kVector || shared_bytes(kernel_size, halo) > kSharedBytes));
    }
    int64_t shared_bytes(int kernel_size, int halo) const {
        return int64_t{sources + halo} * kernel_size * kernel_size * kOutputs * int64_t{sizeof(float)};
    }
};

}  // namespace carafepp::cuda
