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
std::string text_of(cudaError_t error);  // its name and what it means
#endif

// Queues blocks of `threads`, which go on to the next item when there are more items than a grid can have blocks.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t items, int threads, int64_t shared_bytes, void* stream,
            std::common_type_t<Parameters>... arguments) {
#if defined(CARAFEPP_EMULATION)
    const int64_t most_blocks = emulation::settings().most_blocks;
#else
    const int64_t most_blocks = INT32_MAX;
#endif
    const dim3 grid(static_cast<unsigned>(std::min(items, most_blocks))), block(static_cast<unsigned>(threads));
#if defined(CARAFEPP_EMULATION)
    emulation::launch(kernel, grid, block, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream),
                      arguments...);
#else
    void* pointers[] = {&arguments...};
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                               static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) throw Failure{text_of(error)};
#endif
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

}  // namespace carafepp::cuda
