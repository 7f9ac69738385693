// SPDX-License-Identifier: Apache-2.0
// What kernels and their launches share: limits of a block, launches, conversions and quotients.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/cuda.h"
#include "cuda/ptx.h"
#include "dtypes.h"
#include "problem.h"

namespace carafepp::cuda {

constexpr int kThreads = 256;                // of a block
constexpr int64_t kSharedBytes = 40 * 1024;  // that every device gives to every block

void check(cudaError_t error);            // throws Failure for an error, which it clears for the caller
int architecture_of(const void* kernel);  // the current device runs code for this one: 80 is 8.0

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
    void* parameters[] = {&arguments, &plan...};
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(items, INT32_MAX)));
    check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), parameters,
                           static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(problem.stream)));
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

// Tells if the code that the current device would run is for this architecture (80 is 8.0) or a newer one. Devices that
// the build does not know translate code for an old one.
template <class... Parameters>
bool is_compiled_for(int architecture, void (*kernel)(Parameters...)) {
    return architecture_of(reinterpret_cast<const void*>(kernel)) >= architecture;
}

}  // namespace carafepp::cuda
