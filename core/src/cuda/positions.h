// SPDX-License-Identifier: Apache-2.0
// The positions of an axis, for any factor: sources, or outputs where each has a source of its own.
#pragma once

#include "cuda/platform.h"

namespace carafepp::cuda {

constexpr int kMostSize = INT32_MAX / 4;  // of the numbers that places of an axis are computed from

// The positions of an axis. With `Several` outputs of a source, up > down, each is a source; else an output.
struct Positions {
    uint32_t up, down;
    int offset, outputs;

    Positions(Factor factor, int64_t offset_of_axis, int64_t outputs_of_axis)
        : up(static_cast<uint32_t>(factor.up)),
          down(static_cast<uint32_t>(factor.down)),
          offset(static_cast<int>(offset_of_axis)),
          outputs(static_cast<int>(outputs_of_axis)) {}

    template <bool Several>
    __device__ __forceinline__ int source(int position) const {
        return (Several ? position : static_cast<int>(static_cast<uint32_t>(position) * down / up)) + offset;
    }
    template <bool Several>
    __device__ __forceinline__ int first_output(int position) const {
        return Several ? static_cast<int>((static_cast<uint32_t>(position) * up + down - 1) / down) : position;
    }
    template <bool Several>
    __device__ __forceinline__ int end_output(int position) const {
        return min(first_output<Several>(position + 1), outputs);
    }
    int count() const { return up > down ? static_cast<int>((outputs - 1) * int64_t{down} / up) + 1 : outputs; }
    // The most rows or columns of features from the first to the last source of some positions.
    int sources(int positions) const {
        return up > down ? positions : static_cast<int>(ceil_div((positions - 1) * int64_t{down}, up)) + 1;
    }
};

}  // namespace carafepp::cuda
