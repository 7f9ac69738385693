// SPDX-License-Identifier: Apache-2.0
// Shared by the gradients for any factor: bands of rows of outputs. Dtypes and layouts are asked for when a kernel
// runs, as no inner loop does.
#pragma once

#include "cuda/channels.h"
#include "cuda/positions.h"

namespace carafepp::cuda {

// Calls f(T()) with the storage type of a dtype of at most 4 bytes.
template <class F>
__device__ __forceinline__ void with_storage(carafepp_dtype dtype, F f) {
    if (dtype == CARAFEPP_FLOAT32) {
        f(float());
    } else if (dtype == CARAFEPP_FLOAT16) {
        f(Float16());
    } else {
        f(BFloat16());
    }
}

// A row or a column of outputs. The sums of `from` of both tell where an output's masks or logits are.
struct BandLine {
    int64_t from;
    int source;
    int in_memory;  // of columns: the number of the one that stands here in the order of memory
};

// Finds rows or columns [first, first + count) in an array of the shape of masks or logits; `base` is added to `from`.
__device__ __forceinline__ void find_lines(const Problem& p, const Outputs& axis, int first, int count, int64_t stride,
                                           int64_t stride_of_phase, bool phases_apart, BandLine* lines,
                                           int64_t base = 0) {
    const int up = p.from_logits ? static_cast<int>(axis.up) : 1, pitch = phases_apart ? up : 1;
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < count; k += static_cast<int>(blockDim.x)) {
        const int cell = (first + k) / up, phase = (first + k) % up;
        lines[k].from = base + cell * stride + phase * stride_of_phase;
        lines[k].source = axis.source(first + k);
        // Columns of a phase are neighbours in memory, if columns are.
        const int own = k % pitch;
        lines[own * (count / pitch) + min(own, count % pitch) + k / pitch].in_memory = k;
    }
}

// A band of rows of outputs in shared memory: output (y, x) has the number y * width + x.
struct Band {
    const BandLine* rows;
    int height;
    const BandLine* columns;
    int columns_count;
    Divisor width;
};

// An element of the gradient of features by itself. A zero that stands for a mask that is not there makes NaN of an
// infinite gradient; here no such zero is multiplied.
template <class T>
__device__ float feature_tap_by_tap(const Problem& p, const Outputs& rows, const Outputs& columns, int64_t n,
                                    int64_t group, int64_t c, int y, int x) {
    const int k = static_cast<int>(p.kernel_size), radius = k / 2;
    float sum = 0;
#pragma unroll 1
    for (int i = rows.first(y - radius); i < rows.first(y + radius + 1); i++) {
#pragma unroll 1
        for (int j = columns.first(x - radius); j < columns.first(x + radius + 1); j++) {
            const int a = y - rows.source(i) + radius, b = x - columns.source(j) + radius;
            sum += mask_of<T>(p, n, group, a * k + b, {i, j}) * widen(*element<const T>(p.grad_output, n, c, i, j));
        }
    }
    return sum;
}

}  // namespace carafepp::cuda
