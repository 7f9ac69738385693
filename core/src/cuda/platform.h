// SPDX-License-Identifier: Apache-2.0
// What kernels and launchers need beside C++: CUDA, or the emulation that runs the same sources on the CPU in tests.
#pragma once

#if defined(CARAFEPP_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/cuda.h"
#include "dtypes.h"
#include "problem.h"

namespace carafepp::cuda {

constexpr int kThreads = 256;                // of a block
constexpr int64_t kSharedBytes = 40 * 1024;  // that every device gives to every block

// The dynamic shared memory of a block.
template <class A>
__device__ __forceinline__ A* shared_memory() {
#if defined(CARAFEPP_EMULATION)
    return static_cast<A*>(emulation::shared_memory());
#else
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<A*>(memory);
#endif
}

#if defined(CARAFEPP_EMULATION)
using std::max, std::min;
#else
void check(cudaError_t error);            // throws Failure for an error, which it clears for the caller
int architecture_of(const void* kernel);  // the current device runs code for this one: 80 is 8.0
#endif

// The first parameter of every kernel. nvcc keeps a problem in fewer registers if its result comes in the same
// parameter: inner loops are up to 8% shorter than with two.
struct Arguments {
    Problem problem;
    Array result;
};

// Queues blocks of `threads` on the stream of a problem. They go on to the next item when there are more items than a
// grid can have blocks.
template <class... Plan>
void launch(void (*kernel)(Arguments, Plan...), int64_t items, int threads, int64_t shared_bytes,
            const Problem& problem, const Array& result, std::common_type_t<Plan>... plan) {
    Arguments arguments{problem, result};
    const auto stream = static_cast<cudaStream_t>(problem.stream);
#if defined(CARAFEPP_EMULATION)
    const int64_t most_blocks = emulation::settings().most_blocks;
#else
    const int64_t most_blocks = INT32_MAX;
#endif
    const dim3 grid(static_cast<unsigned>(std::min(items, most_blocks))), block(static_cast<unsigned>(threads));
#if defined(CARAFEPP_EMULATION)
    emulation::launch(kernel, grid, block, static_cast<size_t>(shared_bytes), stream, arguments, plan...);
#else
    void* pointers[] = {&arguments, &plan...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                           static_cast<size_t>(shared_bytes), stream));
#endif
}

// Call f(T()) with the storage type of features, for kernels of 32 bits at most, and of 16 bits.
template <class F>
void with_floats(const Problem& p, F f) {
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        if constexpr (sizeof(T) <= sizeof(float)) f(T());
    });
}
template <class F>
void with_halves(const Problem& p, F f) {
    with_floats(p, [&](auto feature) {
        if constexpr (sizeof feature == 2) f(feature);
    });
}

// Quotients of numbers that are not negative: in 32 bits where those do, as 64 take ten times as long.
struct Quotient {
    int64_t quotient, remainder;
};
__device__ __forceinline__ Quotient divide(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) {
        const uint32_t x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
        return {x / y, x % y};
    }
    return {a / b, a % b};
}

// Two elements of 16 bits in a word, from floats and to floats. From sm_80 on one instruction narrows both; either half
// of a word is widened as it stands.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t bits;
    if constexpr (std::is_same_v<T, Float16>) {
        const __half2 pair = __floats2half2_rn(low, high);
        std::memcpy(&bits, &pair, sizeof bits);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        std::memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
#else
    return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}
template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
    return make_float2(widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)}));
}

// sums += a * b on tensor cores, in the fragments of PTX's mma.m16n8k8. All lanes of a warp take part.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
    constexpr bool kHalf = std::is_same_v<T, Float16>;
#if defined(CARAFEPP_EMULATION)
    const uint32_t fragment[] = {b};
    emulation::mma_m16n8k8(kHalf ? emulation::MmaType::kFloat16 : emulation::MmaType::kBFloat16, sums, a, fragment);
#elif defined(__CUDA_ARCH__)
    if constexpr (kHalf) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
    } else {
#if __CUDA_ARCH__ >= 800
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
#else
        __trap();  // never launched: not_for_... has asked is_compiled_for
#endif
    }
#endif
}

// Whether what the current device would run of a kernel is code for this architecture (80 is 8.0) or a newer one.
// Devices that the build does not know translate code for an old one.
template <class... Parameters>
bool is_compiled_for(int architecture, void (*kernel)(Parameters...)) {
#if defined(CARAFEPP_EMULATION)
    return architecture > 0 && kernel != nullptr;
#else
    return architecture_of(reinterpret_cast<const void*>(kernel)) >= architecture;
#endif
}

}  // namespace carafepp::cuda
