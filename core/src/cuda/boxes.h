// SPDX-License-Identifier: Apache-2.0
// Copies of boxes of a tensor to shared memory, which one thread begins for its block: TMA, from sm_90 on. As ptx.h, it
// has a twin of the same name in tests/cuda/emulated.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace carafepp::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kCopiesBoxes = false;  // the functions below have no code then, and a kernel does not call them
#else
constexpr bool kCopiesBoxes = true;
#endif

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Begins a barrier in shared memory, of 8 bytes. A phase ends with one arrival and the bytes that this expects. One
// thread calls this; others, and its copies, may use the barrier after __syncthreads().
__device__ __forceinline__ void begin_barrier(uint64_t* barrier) {
    if constexpr (kCopiesBoxes)
        asm volatile(
            "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
            "fence.proxy.async.shared::cta;" ::"r"(shared_address(barrier))
            : "memory");
}

// Each thread calls it that has written where boxes are to arrive, before __syncthreads() and their copies.
__device__ __forceinline__ void write_before_boxes() {
    if constexpr (kCopiesBoxes) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives; copies bring as many bytes.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
    if constexpr (kCopiesBoxes)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                     : "memory");
}

// Copies a box that begins at (x, y, z, n), the innermost axis first. Outside the tensor it has zeros. x is a multiple
// of 16 bytes, or the instruction is illegal. Shared memory is aligned to 128 bytes, and nobody reads it any more.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap& map, int x, int y, int z, int n,
                                         uint64_t* barrier) {
    if constexpr (kCopiesBoxes)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
            "%5}], "
            "[%6];" ::"r"(shared_address(shared)),
            "l"(&map), "r"(x), "r"(y), "r"(z), "r"(n), "r"(shared_address(barrier))
            : "memory");
}

// Waits for the end of the phase that is number `phase` of two. Then this thread may read what it brought.
__device__ __forceinline__ void wait_for_phase(const uint64_t* barrier, unsigned phase) {
    const unsigned address = shared_address(barrier);
    unsigned ended = 1;
    do {
        if constexpr (kCopiesBoxes)
            asm volatile(
                "{\n\t"
                ".reg .pred ended;\n\t"
                "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n\t"
                "selp.u32 %0, 1, 0, ended;\n\t"
                "}"
                : "=r"(ended)
                : "r"(address), "r"(phase)
                : "memory");
    } while (ended == 0);
}

}  // namespace carafepp::cuda
