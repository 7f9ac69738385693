// SPDX-License-Identifier: Apache-2.0
// Copies of boxes of a tensor to shared memory (TMA), and their barriers (mbarrier), as emulation.cpp has them. It
// reports copies that nobody expects or waits for, and barriers that have not begun.
#pragma once

#include "emulation.h"

#define __grid_constant__

namespace carafepp::emulation {

// A tensor, the innermost axis first, as a CUtensorMap has it here. Strides are in bytes.
struct TensorMap {
    static constexpr int kAxes = 4;
    const char* data;
    int64_t sizes[kAxes], strides[kAxes];
    uint32_t box[kAxes];
};

// A barrier of shared memory that one arrival completes, once its bytes have arrived too. Its phases alternate.
void begin_barrier(uint64_t* barrier, Place place = Place::here());

// Arrives; `bytes` more are to come in this phase.
void expect_bytes(uint64_t* barrier, size_t bytes, Place place = Place::here());

// Copies the box that begins at `first`, a multiple of 16 bytes in a row; 0 outside the tensor. Deferred, it arrives
// when a thread waits.
void copy_box(void* shared, const TensorMap& map, const int (&first)[TensorMap::kAxes], uint64_t* barrier,
              Place place = Place::here());

// Waits for the end of the phase that is number `phase` of two.
void wait_for_phase(const uint64_t* barrier, bool phase, Place place = Place::here());

}  // namespace carafepp::emulation
