// SPDX-License-Identifier: Apache-2.0
// The outputs of an axis, for any factor, and its positions: sources, or outputs where each has a source of its own.
#pragma once

#include "cuda/platform.h"

namespace carafepp::cuda {

constexpr int kMostFactor = 1 << 16;      // of kernels with tiles
constexpr int kMostSize = INT32_MAX / 4;  // of the numbers that places of an axis are computed from
constexpr int64_t kNowhere = INT64_MIN;   // the place of what does not exist

// The most sources from an output to the one `further` behind it. Both are in a block of so many outputs; blocks
// follow each other from output 0 on.
inline int most_sources(Factor factor, int64_t further, int64_t block) {
    const bool aligned = block * factor.down % factor.up == 0 || (factor.down == 1 && factor.up % block == 0);
    const int64_t numerator = further * factor.down;
    return static_cast<int>(
        std::min<int64_t>(aligned ? numerator / factor.up : ceil_div(numerator, factor.up), INT16_MAX));
}

// The outputs of an axis, and the sources that they are centred on.
struct Outputs {
    uint32_t up, down;
    int offset, count;

    Outputs(Factor factor, int64_t offset_of_axis, int64_t outputs)
        : up(static_cast<uint32_t>(factor.up)),
          down(static_cast<uint32_t>(factor.down)),
          offset(static_cast<int>(offset_of_axis)),
          count(static_cast<int>(outputs)) {}

    __device__ __forceinline__ int source(int output) const {
        return static_cast<int>(static_cast<uint32_t>(output) * down / up) + offset;
    }
    // The first output centred on `source` or behind it, or `count`.
    __device__ __forceinline__ int first(int source) const {
        const uint32_t centre = static_cast<uint32_t>(max(source - offset, 0));
        return min(static_cast<int>((centre * up + down - 1) / down), count);
    }
    // The most outputs centred on neighbouring sources.
    int most(int sources) const {
        return static_cast<int>(std::min<int64_t>(ceil_div(int64_t{sources} * up, down), count));
    }
};

// The positions of an axis. With `Several` outputs of a source, up > down, each is a source; else an output.
struct Positions : Outputs {
    using Outputs::Outputs;

    template <bool Several>
    __device__ __forceinline__ int source(int position) const {
        return Several ? position + offset : Outputs::source(position);
    }
    template <bool Several>
    __device__ __forceinline__ int first_output(int position) const {
        return Several ? static_cast<int>((static_cast<uint32_t>(position) * up + down - 1) / down) : position;
    }
    template <bool Several>
    __device__ __forceinline__ int end_output(int position) const {
        return min(first_output<Several>(position + 1), count);
    }
    int size() const { return up > down ? static_cast<int>((count - 1) * int64_t{down} / up) + 1 : count; }
    // The most rows or columns of features from the first to the last source of some positions.
    int sources(int positions) const {
        return up > down ? positions : static_cast<int>(ceil_div((positions - 1) * int64_t{down}, up)) + 1;
    }
};

// Why no kernel for any factor can plan tiles for a problem.
inline const char* not_for_tiles(const Problem& p) {
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    const int64_t factor = std::max(p.factor.up, p.factor.down);
    if (factor > kMostFactor) return "the factor is too large";
    for (int64_t size : {p.features.h, p.features.w, p.out_h, p.out_w}) {
        if (size > kMostSize / factor) return "rows or columns are too many";
    }
    return nullptr;
}

}  // namespace carafepp::cuda
