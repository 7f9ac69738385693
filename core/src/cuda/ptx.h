// SPDX-License-Identifier: Apache-2.0
// Dynamic shared memory and PTX, which only nvcc compiles. An emulated build has tests/cuda/emulated first on its
// include path. The files cuda/ptx.h and cuda_runtime.h there take the place of this one and of CUDA's. Nothing else
// differs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dtypes.h"

namespace carafepp::cuda {

// The dynamic shared memory of a block.
template <class A>
__device__ __forceinline__ A* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<A*>(memory);
}

// sums += a * b on tensor cores, in the fragments of PTX's mma.m16n8k8. All lanes of a warp take part.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, Float16>) {
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
        __trap();  // is_compiled_for keeps launches away
#endif
    }
#endif
}

}  // namespace carafepp::cuda
