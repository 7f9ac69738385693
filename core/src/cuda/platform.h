// SPDX-License-Identifier: Apache-2.0
// Launches, limits of a block, quotients and conversions, for all kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/ptx.h"
#include "dtypes.h"
#include "problem.h"

namespace carafepp::cuda {

constexpr int kThreads = 256;                    // of a block
constexpr int64_t kMostSharedBytes = 48 * 1024;  // that every device gives to a block
constexpr int64_t kMostAskedBytes = 64 * 1024;   // and to one that asks for more
constexpr int64_t kSharedBytes = 40 * 1024;      // of a block of the generic kernels

// Plans give a large device even work: an H100 or H200 has so many multiprocessors. They do not ask the device if sums
// depend on them, so results have the same bits on all devices of an architecture.
constexpr int64_t kMultiprocessors = 132;

void check(cudaError_t error);             // throws Failure for an error, which it clears for the caller
[[noreturn]] void fail(const char* text);  // throws Failure
int architecture_of(const void* kernel);   // the current device runs code for this one: 80 is 8.0

int most_shared_bytes();    // that the current device gives to a block
int64_t multiprocessors();  // of the current device

// Why the current device gives a block less than `bytes` of shared memory, or NULL.
const char* not_for_shared_memory(int64_t bytes);

// The first parameter of every kernel; its plan is the second. Problem and result are one parameter, as nvcc needs
// fewer registers so. Inner loops are up to 8% shorter than with two. Shapes: features [N, C, H, W], grad_output
// [N, C, H', W'], masks [N, groups * K * K, H', W'], logits
// [N, groups * K * K * up * up, ceil(H/down), ceil(W/down)].
struct Arguments {
    Problem problem;
    Array result;
};

// As many of `count` in each part as if `most` were in it, at least 1: the last part is not much smaller.
inline int even_part(int64_t count, int64_t most) {
    return static_cast<int>(std::max<int64_t>(ceil_div(count, std::max<int64_t>(ceil_div(count, most), 1)), 1));
}

// Queues blocks of `threads` on the stream of a problem. They go on to the next item when there are more items than a
// grid can have blocks. `shared_bytes` may be as many as not_for_shared_memory() allows.
template <class Plan>
void launch(void (*kernel)(Arguments, Plan), int64_t items, int threads, int64_t shared_bytes, const Problem& problem,
            const Array& result, std::common_type_t<Plan> plan) {
    Arguments arguments{problem, result};
    void* parameters[] = {&arguments, &plan};
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(items, INT32_MAX)));
    // The same limit in each launch: launches of other threads, which need less, leave it.
    if (shared_bytes > kMostSharedBytes)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes()));
    check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), parameters,
                           static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(problem.stream)));
}

// Calls f(k, T()) with the kernel size of a problem, one of `Sizes`, as a constant and with the type T of its features.
// T has at most `MostBytes`, and 2 at least.
template <int MostBytes, int... Sizes, class F>
void with_kernel_size(const Problem& p, F f) {
    bool found = false;
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        if constexpr (sizeof(T) <= MostBytes)
            ((p.kernel_size == Sizes && (f(std::integral_constant<int, Sizes>(), T()), found = true)) || ...);
    });
    if (!found) fail("no kernel for this kernel_size and dtype");
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

// Quotients of small numbers by one that is known beforehand.
struct Divisor {
    int number;
    uint32_t reciprocal;

    explicit Divisor(int number) : number(number), reciprocal(static_cast<uint32_t>((int64_t{1} << 31) / number + 1)) {}

    // For n * number < 2^31.
    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * reciprocal >> 31);
    }
};

// An element of an input, by a load that may run before earlier stores.
template <class T>
__device__ __forceinline__ T load_input(const T* from) {
    if constexpr (sizeof(T) == 2) {
        return {__ldg(&from->bits)};
    } else {
        return __ldg(from);
    }
}

// Two elements of 16 bits in a word, from floats and to floats. From sm_80 on one instruction narrows both; either half
// of a word is widened as it stands.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t bits;
    if constexpr (std::is_same_v<T, Float16>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
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

// Is the code that the current device would run for this architecture (80 is 8.0) or a newer one? A device that the
// build does not know translates code for an older one.
template <class... Parameters>
bool is_compiled_for(int architecture, void (*kernel)(Parameters...)) {
    return architecture_of(reinterpret_cast<const void*>(kernel)) >= architecture;
}

}  // namespace carafepp::cuda
