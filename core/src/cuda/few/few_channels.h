// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels for few channels of a group: an integer factor, up, and any strides. Nearly all their time
// goes to masks or logits, which a thread loads once, straight into registers. A block has a tile of sources. It stages
// the little else that it needs of them.
//
// A source has up * up outputs. A unit has P of them, neighbours in a row: one, or a quad. Neighbouring threads have
// neighbouring elements of the weights, so that loads are whole sectors: neighbouring sources where columns of logits
// are adjacent, else neighbouring units.
#pragma once

#include "cuda/columns.h"
#include "cuda/grad_masks.h"
#include "cuda/positions.h"
#include "cuda/tiles.h"

namespace carafepp::cuda {

constexpr int kFew = 4;  // channels of a group, at most
constexpr int kMostUp = 16;

// Quotients of small numbers by one that the plan knows.
struct SmallDivisor {
    int divisor;
    uint32_t inverse;

    explicit SmallDivisor(int64_t number)
        : divisor(static_cast<int>(number)), inverse((1u << 22) / static_cast<uint32_t>(number) + 1) {}

    // Exact for numbers below 2^9 * divisor, and below 2^22 / divisor.
    __device__ __forceinline__ int quotient(int number) const {
        return static_cast<int>(static_cast<uint32_t>(number) * inverse >> 22);
    }
};

// The number, as if each call had another one. Addresses that compilers compute from it take one instruction each. They
// would share a part of the sums, and take two.
__device__ __forceinline__ int computed_apart(int number) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(number));
#endif
    return number;
}

inline const Array& weights_of(const Problem& p) { return p.from_logits ? p.logits : p.masks; }

// Are four neighbouring outputs of a tap an aligned vector in an array of the shape of masks or logits?
inline bool in_quads(const Problem& p, const Array& weights) {
    if ((p.from_logits ? weights.stride_c : weights.stride_w) != 1) return false;
    const int64_t others = weights.stride_n | weights.stride_h |
                           (p.from_logits ? weights.stride_w : weights.stride_c | weights.w);
    return others % kVector == 0 &&
           reinterpret_cast<uintptr_t>(weights.data) % static_cast<uintptr_t>(kVector * itemsize(weights.dtype)) == 0;
}

// How units are spread.
struct FewPlan : Tiles {
    int height, width;          // sources of an image
    int log_columns;            // of the sources of a tile
    bool neighbouring_sources;  // else neighbouring units
    bool quads;                 // weights of a unit are a vector
    SmallDivisor up, parts;     // units of a source
    int units;                  // of a tile

    FewPlan(const Problem& p, int64_t height, int64_t width, int own, int most_units)
        : FewPlan(p, height, width, own, p.factor.up * p.factor.up / own,
                  width > 16  ? 5
                  : width > 8 ? 4
                              : 3,
                  most_units) {}

private:
    FewPlan(const Problem& p, int64_t height, int64_t width, int own, int64_t parts_of_source, int log_columns,
            int most_units)
        : Tiles(p, height, width, std::clamp(most_units / static_cast<int>(parts_of_source << log_columns), 1, 16),
                1 << log_columns, kFew, 0),
          height(static_cast<int>(height)),
          width(static_cast<int>(width)),
          log_columns(log_columns),
          neighbouring_sources(p.from_logits && p.logits.stride_w <= p.logits.stride_c),
          quads(own == kVector && in_quads(p, weights_of(p))),
          up(p.factor.up),
          parts(parts_of_source),
          units((rows << log_columns) * parts.divisor) {}
};

// A unit's place.
struct Unit {
    int row, column;   // of the source in the tile
    int i, j;          // its numbers; that of output 0 is 0
    int dy, dx;        // of the unit's first output, among those of the source
    int out_i, out_j;  // its numbers

    template <int P>
    __device__ __forceinline__ void find_outputs(const SmallDivisor& up, int part) {
        dy = up.quotient(part * P);
        dx = part * P - dy * up.divisor;
        out_i = i * up.divisor + dy;
        out_j = j * up.divisor + dx;
    }

    template <int P>
    static __device__ __forceinline__ Unit of(const FewPlan& plan, const TileOfItem& tile, int number) {
        Unit unit;
        const int rest = plan.neighbouring_sources ? number >> plan.log_columns : number;
        const int before = plan.parts.quotient(rest), part = rest - before * plan.parts.divisor;
        const int source = plan.neighbouring_sources ? (before << plan.log_columns) | (number & (plan.columns - 1))
                                                     : before;
        unit.row = source >> plan.log_columns;
        unit.column = source & (plan.columns - 1);
        unit.i = tile.top + unit.row;
        unit.j = tile.left + unit.column;
        unit.find_outputs<P>(plan.up, part);
        return unit;
    }
};

// Clears the taps of an output beyond the borders.
template <int K>
__device__ __forceinline__ void clear_outside(const Problem& p, const Unit& unit, float (&taps)[K * K]) {
    const int i = unit.i + static_cast<int>(p.offset_h), j = unit.j + static_cast<int>(p.offset_w);
    if (!window_inside<K>(p, i, j)) clear_taps_outside<K>(p, i, j, taps);
}

// The places of a unit's taps in an array of the shape of masks or logits. All strides but that of images fit 32 bits.
struct WindowPlaces {
    int64_t first;           // from the image's begin
    int step, step_of_next;  // from tap to tap, and from output to output
    int last;                // output that has masks: none are beyond a crop, but loads may repeat it

    template <int K, int P>
    static __device__ __forceinline__ WindowPlaces of(const Problem& p, const Array& weights, int64_t group,
                                                      const Unit& unit) {
        const int up = static_cast<int>(p.factor.up), stride_c = static_cast<int>(weights.stride_c);
        WindowPlaces places;
        places.step = p.from_logits ? stride_c * up * up : stride_c;
        places.step_of_next = p.from_logits ? stride_c : static_cast<int>(weights.stride_w);
        places.last = p.from_logits ? P - 1 : min(P - 1, static_cast<int>(p.out_w) - 1 - unit.out_j);
        places.first = group * (K * K) * places.step +
                       int64_t{p.from_logits ? unit.i : unit.out_i} * static_cast<int>(weights.stride_h) +
                       int64_t{p.from_logits ? unit.j : unit.out_j} * static_cast<int>(weights.stride_w) +
                       int64_t{p.from_logits ? unit.dy * up + unit.dx : 0} * stride_c;
        return places;
    }
};

template <class T, int K, int P>
__device__ __forceinline__ void load_windows(const Problem& p, bool quads, const TileOfItem& tile, const Unit& unit,
                                             float (&taps)[P][K * K]) {
    const Array& weights = p.from_logits ? p.logits : p.masks;
    const WindowPlaces places = WindowPlaces::of<K, P>(p, weights, tile.group, unit);
    with_masks<T>(weights, [&](auto mask) __attribute__((always_inline)) {
        using M = decltype(mask);
        const M* const first = element<const M>(weights, tile.n, 0, 0, 0) + places.first;
        if (P == kVector && quads) {
#pragma unroll
            for (int t = 0; t < K * K; t++) {
                const float4 quad = load_channels(at_stride(first, places.step, t));
                taps[0][t] = quad.x, taps[1 % P][t] = quad.y, taps[2 % P][t] = quad.z, taps[3 % P][t] = quad.w;
            }
            return;
        }
#pragma unroll
        for (int q = 0; q < P; q++) {
            const M* const own = at_stride(first, places.step_of_next, min(q, places.last));
            const int step = computed_apart(places.step);
#pragma unroll
            for (int t = 0; t < K * K; t++) taps[q][t] = widen(*at_stride(own, step, t));
        }
    });
}

// Every number becomes f(number). Each in turn comes to the front, so the code of f stands once.
template <int Count, class F>
__device__ __forceinline__ void for_each_in_turn(float (&numbers)[Count], F f) {
#pragma unroll 1
    for (int k = 0; k < Count; k++) {
        const float front = f(numbers[0]);
#pragma unroll
        for (int t = 0; t + 1 < Count; t++) numbers[t] = numbers[t + 1];
        numbers[Count - 1] = front;
    }
}

// May units be quads? With sigmoids, which are rare, none is: only for single outputs their code stands.
inline bool may_be_quads(const Problem& p) {
    const bool has_sigmoid = p.from_logits &&
                             (p.normalizer == CARAFEPP_SIGMOID || p.normalizer == CARAFEPP_SIGMOID_NORMALIZED);
    const bool taps_adjacent = !p.from_logits && p.masks.stride_c < p.masks.stride_w;
    return p.kernel_size == 3 && p.factor.up % kVector == 0 && !has_sigmoid && !taps_adjacent;
}

// Turns logits into masks, once they are multiplied by the result: a softmax leaves that to the sums of products.
template <int K, int P>
__device__ __forceinline__ float normalize_window(carafepp_normalizer normalizer, float (&taps)[K * K]) {
    if (normalizer == CARAFEPP_NONE) return 1;
    if constexpr (P == 1) {
        if (normalizer != CARAFEPP_SOFTMAX) {
            for_each_in_turn(taps, [&](float logit) {
                return normalizer == CARAFEPP_SIGMOID ? sigmoid(logit) : log_sigmoid(logit);
            });
            if (normalizer == CARAFEPP_SIGMOID) return 1;
        }
    }
    return softmax_gradient<K>(taps, taps).scale;
}

__device__ __forceinline__ carafepp_normalizer normalizer_of(const Problem& p) {
    return p.from_logits ? p.normalizer : CARAFEPP_NONE;
}

// The features of a group around a tile, as floats [channel][row][column], and 0 beyond the borders.
struct StagedFeatures {
    int width, plane;
    int64_t bytes;

    StagedFeatures(const Problem& p, const Tiles& plan)
        : width(plan.columns + static_cast<int>(p.kernel_size) - 1),
          plane((plan.rows + static_cast<int>(p.kernel_size) - 1) * width),
          bytes(p.features.c / p.groups * plane * int64_t{sizeof(float)}) {}

    // Ends with a barrier.
    template <class T>
    __device__ __forceinline__ void stage(const Problem& p, const TileOfItem& tile, float* staged) const {
        const int radius = static_cast<int>(p.kernel_size) / 2;
        const int top = tile.top + static_cast<int>(p.offset_h) - radius,
                  left = tile.left + static_cast<int>(p.offset_w) - radius;
        const T* from = element<const T>(p.features, tile.n, tile.c, 0, 0);
#pragma unroll 1
        for (int c = 0; c < tile.channels; c++, from += p.features.stride_c, staged += plane) {
#pragma unroll 1
            for (int k = thread_computed_late(); k < plane; k += kThreads) {
                const int row = k / width, y = top + row, x = left + k - row * width;
                const bool exists = y >= 0 && x >= 0 && y < p.features.h && x < p.features.w;
                staged[k] = exists ? widen(load_input(from + y * p.features.stride_h + x * p.features.stride_w)) : 0.0f;
            }
        }
        __syncthreads();
    }
};

// Calls f(k, own, T()) with the kernel size, 3 or 5, the outputs of a unit and the type of features.
template <class F>
void with_units(const Problem& p, bool quads, F f) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        if constexpr (k == 3) {
            if (quads) return f(k, std::integral_constant<int, kVector>(), feature);
        }
        f(k, std::integral_constant<int, 1>(), feature);
    });
}

// Why the kernels for few channels do not take a problem.
inline const char* not_for_few_channels(const Problem& p, const Array& result) {
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    if (p.factor.down != 1) return "down is not 1";
    if (p.factor.up > kMostUp) return "up is more than 16";
    if (p.kernel_size != 3 && p.kernel_size != 5) return "kernel_size is not 3 or 5";
    if (p.features.c / p.groups > kFew) return "a group has more than 4 channels";
    if (p.features.c == 0) return "there are no channels";
    for (int64_t size : {p.features.h, p.features.w, p.out_h, p.out_w}) {
        if (size > kMostSize / kMostUp) return "rows or columns are too many";
    }
    for (const Array* array : {&p.masks, &p.logits, &result}) {
        for (int64_t stride : {taps_apart(p, *array), array->stride_h, array->stride_w}) {
            if (!array->empty() && (stride > INT32_MAX || stride < -INT32_MAX)) return "strides are too long";
        }
    }
    return nullptr;
}

}  // namespace carafepp::cuda
