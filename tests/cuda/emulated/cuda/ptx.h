// SPDX-License-Identifier: Apache-2.0
// Stands in the place of core/src/cuda/ptx.h where kernels are emulated. What is traced is inlined, so that a place is
// a line of a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "dtypes.h"

namespace carafepp::cuda {

template <class A>
A* shared_memory() {
    return static_cast<A*>(emulation::shared_memory());
}

inline int64_t computed_late(int64_t number) { return number; }
inline int thread_computed_late() { return static_cast<int>(threadIdx.x); }

template <class T>
__forceinline__ T* at_stride(T* from, int stride, int number) {
    return from + int64_t{stride} * number;
}

inline void sync_warps_of_block() { __syncthreads(); }

inline float power_of_2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }

template <int Bytes>
__forceinline__ void copy_async(void* shared, const void* global, bool exist,
                                emulation::Place place = emulation::Place::here()) {
    emulation::copy_async(shared, global, Bytes, exist ? Bytes : 0, place);
}

inline void wait_for_copies() {
    emulation::commit_copies();
    emulation::wait_for_copies(0);
}

template <bool Transposed = true, class T>
__forceinline__ void load_matrices(const T* row, uint32_t (&words)[4],
                                   emulation::Place place = emulation::Place::here()) {
    emulation::load_matrices(Transposed, row, words, place);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
    using emulation::MmaType;
    constexpr MmaType kType = std::is_same_v<T, Float16> ? MmaType::kFloat16 : MmaType::kBFloat16;
    emulation::mma_m16n8k8(kType, sums, a, {b});
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using emulation::MmaType;
    constexpr MmaType kType = std::is_same_v<T, Float16> ? MmaType::kFloat16 : MmaType::kBFloat16;
    emulation::mma_m16n8k16(kType, sums, a, b);
}

}  // namespace carafepp::cuda
