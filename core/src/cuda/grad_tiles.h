// SPDX-License-Identifier: Apache-2.0
// Shared by the gradients for any factor. A block has a tile, and goes through its outputs in bands of rows. It stages
// the masks of a band as [tap][output]. Dtypes and layouts are asked for when it runs, as no inner loop does.
#pragma once

#include "cuda/channels.h"
#include "cuda/positions.h"

namespace carafepp::cuda {

constexpr int kMostThreads = 256;  // of a block
constexpr int kMostFactor = 1 << 16;

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

// Quotients of small numbers by one that is known beforehand.
struct Divisor {
    int number;
    uint32_t reciprocal;

    explicit Divisor(int number) : number(number), reciprocal(static_cast<uint32_t>((int64_t{1} << 31) / number + 1)) {}

    // For n * number < 2^31.
    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * reciprocal >> 31);
    }
};

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

// Finds rows or columns [first, first + count) in an array of the shape of masks or logits.
__device__ __forceinline__ void find_lines(const Problem& p, const Outputs& axis, int first, int count, int64_t stride,
                                           int64_t stride_of_phase, bool phases_apart, BandLine* lines) {
    const int up = p.from_logits ? static_cast<int>(axis.up) : 1, pitch = phases_apart ? up : 1;
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < count; k += static_cast<int>(blockDim.x)) {
        const int cell = (first + k) / up, phase = (first + k) % up;
        lines[k].from = cell * stride + phase * stride_of_phase;
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
    int outputs;  // room for them
};

// Calls f(place, staged, first, step) for taps first, first + step ... of outputs of a band, in an array of the shape
// of masks or logits: where the first one is in memory and, as [tap][output], in shared memory. If taps are adjacent in
// memory, neighbouring threads have neighbouring taps of an output; else neighbouring outputs. Where outputs are few,
// teams of threads have taps of each.
template <class F>
__device__ __forceinline__ void walk_band(const Array& array, int64_t tap, const Band& band, F f) {
    const int threads = static_cast<int>(blockDim.x);
    const int together = tap <= array.stride_w && tap < 16 ? kNormalizers : 1;
    const int all = band.outputs * together, teams = max(threads / all, 1);
    const int thread = thread_computed_late(), team = teams > 1 ? thread / all : 0;
    if (team >= teams) return;
    const int own = thread - team * all, first = own % together + team * together, step = together * teams;
#pragma unroll 1
    for (int output = own / together; output < band.outputs; output += threads / together) {
        const int y = band.width.quotient(output), column = output - y * band.width.number;
        if (y >= band.height || column >= band.columns_count) continue;
        const int x = band.columns[column].in_memory;
        f(band.rows[y].from + band.columns[x].from + first * tap, first * band.outputs + y * band.width.number + x,
          first, step);
    }
}

// Elements from tap to tap in an array of the shape of masks or logits.
__device__ __forceinline__ int64_t taps_apart(const Problem& p, const Array& array) {
    return array.stride_c * (p.from_logits ? p.factor.up * p.factor.up : 1);
}

// Copies the masks or logits of a band to to[tap * outputs + output]. They arrive as copies of this thread do.
__device__ __forceinline__ void copy_masks(const Problem& p, int64_t n, int64_t group, const Band& band, float* to) {
    constexpr int kInFlight = 4;
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int64_t tap = taps_apart(p, array);
    const int taps = static_cast<int>(p.taps());
    with_storage(array.dtype, [&](auto storage) {
        using M = decltype(storage);
        const M* const masks = element<const M>(array, n, 0, 0, 0) + group * taps * tap;
        walk_band(array, tap, band, [&](int64_t place, int own, int first, int step) {
            const M* from = masks + place;
            float* staged = to + own;
            const int64_t from_step = step * tap;
            if constexpr (std::is_same_v<M, float>) {
#pragma unroll 4
                for (int t = first; t < taps; t += step, from += from_step, staged += step * band.outputs)
                    copy_async<sizeof(float)>(staged, from, true);
            } else {
#pragma unroll 1
                for (int t = first; t < taps; t += kInFlight * step) {
                    float values[kInFlight];
#pragma unroll
                    for (int load = 0; load < kInFlight; load++, from += from_step)
                        values[load] = t + load * step < taps ? widen(load_input(from)) : 0;
#pragma unroll
                    for (int load = 0; load < kInFlight; load++, staged += step * band.outputs) {
                        if (t + load * step < taps) *staged = values[load];
                    }
                }
            }
        });
    });
}

// Turns staged logits of a band into masks that scales[output] is a factor of. Neighbouring threads, a power of 2 and
// at most eight, have the taps of an output.
__device__ __forceinline__ void normalize_band(carafepp_normalizer normalizer, int taps, const Band& band,
                                               float* staged, float* scales) {
    const int threads = static_cast<int>(blockDim.x), thread = thread_computed_late();
    int together = 1;
    while (together < kNormalizers && band.outputs * together * 2 <= threads) together *= 2;
    const int lane = thread % together, step = together * band.outputs;
    const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
    if (normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
#pragma unroll 1
        for (int k = thread; k < taps * band.outputs; k += threads)
            staged[k] = normalizer == CARAFEPP_SIGMOID ? sigmoid(staged[k]) : log_sigmoid(staged[k]);
        __syncthreads();
    }
#pragma unroll 1
    for (int before = 0; before < band.outputs; before += threads / together) {  // all lanes of a warp, as they reduce
        const int output = before + thread / together, count = output < band.outputs ? taps : 0;
        float* const first = staged + output + lane * band.outputs;
        float scale = 1;
        if (divides) {
            float largest = -INFINITY, sum = 0, *at = first;
#pragma unroll 2
            for (int t = lane; t < count; t += together, at += step) largest = Larger()(*at, largest);
            for (int distance = 1; distance < together; distance *= 2)
                largest = Larger()(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
            at = first;
#pragma unroll 2
            for (int t = lane; t < count; t += together, at += step) {
                *at = expf(*at - largest);
                sum += *at;
            }
            for (int distance = 1; distance < together; distance *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            scale = 1 / sum;
        }
        if (count > 0 && lane == 0) scales[output] = scale;
    }
}

// Why no tile can be planned for a problem of any plan.
inline const char* not_for_bands(const Problem& p) {
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    const int64_t factor = std::max(p.factor.up, p.factor.down);
    if (factor > kMostFactor) return "the factor is too large";
    for (int64_t size : {p.features.h, p.features.w, p.out_h, p.out_w}) {
        if (size > kMostSize / factor) return "rows or columns are too many";
    }
    return nullptr;
}

}  // namespace carafepp::cuda
