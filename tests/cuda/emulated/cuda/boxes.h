// SPDX-License-Identifier: Apache-2.0
// Stands in the place of core/src/cuda/boxes.h where kernels are emulated.
#pragma once

#include <cuda.h>

#include "../../boxes.h"

namespace carafepp::cuda {

constexpr bool kCopiesBoxes = true;

inline void begin_barrier(uint64_t* barrier, emulation::Place place = emulation::Place::here()) {
    emulation::begin_barrier(barrier, place);
}
inline void write_before_boxes() {}
inline void expect_bytes(uint64_t* barrier, int bytes, emulation::Place place = emulation::Place::here()) {
    emulation::expect_bytes(barrier, static_cast<size_t>(bytes), place);
}
inline void copy_box(void* shared, const CUtensorMap& map, int x, int y, int z, int n, uint64_t* barrier,
                     emulation::Place place = emulation::Place::here()) {
    emulation::copy_box(shared, reinterpret_cast<const emulation::TensorMap&>(map), {x, y, z, n}, barrier, place);
}
inline void wait_for_phase(const uint64_t* barrier, unsigned phase, emulation::Place place = emulation::Place::here()) {
    emulation::wait_for_phase(barrier, phase != 0, place);
}

}  // namespace carafepp::cuda
