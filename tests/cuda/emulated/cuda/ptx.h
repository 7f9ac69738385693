// SPDX-License-Identifier: Apache-2.0
// Stands in the place of core/src/cuda/ptx.h where kernels are emulated.
#pragma once

#include <cuda_runtime.h>

#include "dtypes.h"

namespace carafepp::cuda {

template <class A>
A* shared_memory() {
    return static_cast<A*>(emulation::shared_memory());
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
    using emulation::MmaType;
    constexpr MmaType kType = std::is_same_v<T, Float16> ? MmaType::kFloat16 : MmaType::kBFloat16;
    emulation::mma_m16n8k8(kType, sums, a, {b});
}

}  // namespace carafepp::cuda
