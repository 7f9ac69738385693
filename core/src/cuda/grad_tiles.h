// SPDX-License-Identifier: Apache-2.0
// What the gradients for any factor share. A block has a tile, and goes through its outputs in bands of rows. It stages
// the masks of a band as [tap][output]. Dtypes and layouts are asked for when it runs, as no inner loop does.
#pragma once

#include "cuda/channels.h"

namespace carafepp::cuda {

constexpr int kMostThreads = 256;          // of a block
constexpr int64_t kBandBytes = 48 * 1024;  // of shared memory
constexpr int kMostSize = INT32_MAX / 4;   // of the numbers that places of an axis are computed from
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
    uint32_t number, reciprocal;

    explicit Divisor(int number)
        : number(static_cast<uint32_t>(number)), reciprocal(static_cast<uint32_t>((int64_t{1} << 32) / number + 1)) {}

    // For n * number < 2^32 and number > 1.
    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * reciprocal >> 32);
    }
    __device__ __forceinline__ int remainder(int n, int quotient) const {
        return n - quotient * static_cast<int>(number);
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
struct Line {
    int64_t from;
    int source;
    int next;  // of columns: the columns in the order of memory, where this one stands
};

// Finds rows or columns [first, first + count) in an array of the shape of masks or logits.
__device__ __forceinline__ void find_lines(const Problem& p, const Outputs& axis, int first, int count, int64_t stride,
                                           int64_t stride_of_phase, bool phases_apart, Line* lines) {
    const int up = p.from_logits ? static_cast<int>(axis.up) : 1, pitch = phases_apart ? up : 1;
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < count; k += static_cast<int>(blockDim.x)) {
        const int cell = (first + k) / up, phase = (first + k) % up;
        lines[k].from = cell * stride + phase * stride_of_phase;
        lines[k].source = axis.source(first + k);
        // Columns of a phase are neighbours in memory, if columns are.
        const int own = k % pitch;
        lines[own * (count / pitch) + min(own, count % pitch) + k / pitch].next = k;
    }
}

// A band of rows of outputs in shared memory: output (y, x) has the number y * width + x.
struct Band {
    const Line* rows;
    int height;
    const Line* columns;
    int columns_count;
    int width;
};

// Copies the masks or logits of a band to to[tap * apart + output]. They arrive as copies of this thread do. If taps
// are adjacent in memory, neighbouring threads have neighbouring taps of an output; else neighbouring outputs.
__device__ __forceinline__ void copy_masks(const Problem& p, int64_t n, int64_t group, const Band& band, float* to,
                                           int apart) {
    constexpr int kInFlight = 4;
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int64_t sub_pixels = p.from_logits ? p.factor.up * p.factor.up : 1, tap = sub_pixels * array.stride_c;
    const int taps = static_cast<int>(p.taps()), threads = static_cast<int>(blockDim.x);
    const int together = tap <= array.stride_w && sub_pixels < 16 ? kNormalizers : 1;
    const int all = band.height * band.columns_count * together, teams = max(threads / max(all, 1), 1);
    const int team = static_cast<int>(threadIdx.x) / (teams > 1 ? all : threads);
    if (team >= teams) return;
    with_storage(array.dtype, [&](auto storage) {
        using M = decltype(storage);
        const M* const masks = element<const M>(array, n, group * taps * sub_pixels, 0, 0);
#pragma unroll 1
        for (int k = static_cast<int>(threadIdx.x) - team * all; k < all; k += threads) {
            const int output = k / together, y = output / band.columns_count,
                      x = band.columns[output - y * band.columns_count].next;
            const int first = k % together + team * together, step = together * teams;
            const M* from = masks + band.rows[y].from + band.columns[x].from + first * tap;
            float* staged = to + first * apart + y * band.width + x;
            if constexpr (std::is_same_v<M, float>) {
#pragma unroll 4
                for (int t = first; t < taps; t += step, from += step * tap, staged += step * apart)
                    copy_async<sizeof(float)>(staged, from, true);
            } else {
#pragma unroll 1
                for (int t = first; t < taps; t += kInFlight * step) {
                    float values[kInFlight];
#pragma unroll
                    for (int load = 0; load < kInFlight; load++, from += step * tap)
                        values[load] = t + load * step < taps ? widen(load_input(from)) : 0;
#pragma unroll
                    for (int load = 0; load < kInFlight; load++, staged += step * apart) {
                        if (t + load * step < taps) *staged = values[load];
                    }
                }
            }
        }
    });
}

// Turns staged logits of `outputs` outputs into masks that scales[output] is a factor of. Neighbouring threads, a power
// of 2 and at most eight, have the taps of an output.
__device__ __forceinline__ void normalize_band(carafepp_normalizer normalizer, int taps, float* staged, int apart,
                                               int outputs, float* scales) {
    const int threads = static_cast<int>(blockDim.x);
    int together = 1;
    while (together < kNormalizers && outputs * together * 2 <= threads) together *= 2;
    const int lane = static_cast<int>(threadIdx.x) % together, step = together * apart;
    const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
#pragma unroll 1
    for (int before = 0; before < outputs; before += threads / together) {  // all lanes of a warp, as they reduce
        const int output = before + static_cast<int>(threadIdx.x) / together;
        float* const first = staged + output + lane * apart;
        const float* const end = staged + (output < outputs ? taps * apart : 0);
        if (normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
#pragma unroll 1
            for (float* at = first; at < end; at += step)
                *at = normalizer == CARAFEPP_SIGMOID ? sigmoid(*at) : log_sigmoid(*at);
        }
        float scale = 1;
        if (divides) {
            float largest = -INFINITY, sum = 0;
#pragma unroll 4
            for (const float* at = first; at < end; at += step) largest = Larger()(*at, largest);
            for (int distance = 1; distance < together; distance *= 2)
                largest = Larger()(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
#pragma unroll 4
            for (float* at = first; at < end; at += step) {
                *at = expf(*at - largest);
                sum += *at;
            }
            for (int distance = 1; distance < together; distance *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            scale = 1 / sum;
        }
        if (output < outputs && lane == 0) scales[output] = scale;
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
