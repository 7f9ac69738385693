// SPDX-License-Identifier: Apache-2.0
// Dynamic shared memory and PTX, which only nvcc compiles. An emulated build has tests/cuda/emulated first on its
// include path. The files cuda/ptx.h, cuda/boxes.h and those of CUDA there take the place of these. Nothing else
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
    extern __shared__ __align__(128) unsigned char memory[];
    return reinterpret_cast<A*>(memory);
}

// A number and a thread's number, such that what is computed from them stays in its loop. Ahead of it, it would take
// registers all the time.
__device__ __forceinline__ int64_t computed_late(int64_t number) {
    asm volatile("" : "+l"(number));
    return number;
}
__device__ __forceinline__ int thread_computed_late() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// from + number * stride, in elements. Compilers make two instructions of a sum in 64 bits; this is one.
template <class T>
__device__ __forceinline__ T* at_stride(T* from, int stride, int number) {
    T* to;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(stride), "r"(number * static_cast<int>(sizeof(T))), "l"(from));
    return to;
}

// A barrier of the block where warps may wait at different lines: those that have loops of their own.
__device__ __forceinline__ void sync_warps_of_block() { asm volatile("bar.sync 0;" ::: "memory"); }

// 2^x, or 0 if that is no normal number.
__device__ __forceinline__ float power_of_2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// 1 / x in one instruction, with an error of one unit in the last place; 0 if that is no normal number.
__device__ __forceinline__ float reciprocal(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

// Copies 4, 8 or 16 bytes from global to shared memory, or writes as many zeros if they do not exist. They are there
// after wait_for_copies() and, for other threads, a barrier. From sm_80 on they pass no register.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exist) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(global), "n"(Bytes), "r"(exist ? Bytes : 0)
        : "memory");
#else
    using Word = std::conditional_t<Bytes == 16, uint4, std::conditional_t<Bytes == 8, uint2, uint32_t> >;
    *static_cast<Word*>(shared) = exist ? __ldg(static_cast<const Word*>(global)) : Word{};
#endif
}

// Waits for the copies of this thread.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Loads four matrices of 8 x 8 elements of 16 bits from shared memory. Lane 8 * m + r tells where row r of matrix m is.
// A lane gets two elements of column lane / 4 of each, in rows 2 * (lane % 4) and the next. So they are `b` below.
// Not transposed, it gets two elements of row lane / 4, as halves of `a` have them. All lanes of a warp take part.
template <bool Transposed = true, class T>
__device__ __forceinline__ void load_matrices(const T* row, uint32_t (&words)[4]) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
    }
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

// The same in the fragments of mma.m16n8k16: words 2 and 3 of a, and word 1 of b, have the upper half of the sum.
// Devices before sm_80 take two steps.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, Float16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
    multiply_add<T>(sums, {a[0], a[1]}, b[0]);
    multiply_add<T>(sums, {a[2], a[3]}, b[1]);
#endif
}

}  // namespace carafepp::cuda
