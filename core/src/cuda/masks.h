// SPDX-License-Identifier: Apache-2.0
// Masks, copied or normalised from logits. Every kernel begins so: with some outputs in shared memory, or with one in
// the registers of a thread. Outputs have numbers, row by row, `width` in a row. They are the outputs of the result or,
// for logits, all their sub-pixels.
#pragma once

#include "cuda/platform.h"
#include "normalizer.h"

namespace carafepp::cuda {

constexpr int kNormalizers = 8;  // neighbouring threads that normalise an output
static_assert(32 % kNormalizers == 0, "they are of one warp");

// Elements from tap to tap in an array of the shape of masks or logits.
CARAFEPP_HOST_DEVICE inline int64_t taps_apart(const Problem& p, const Array& array) {
    return array.stride_c * (p.from_logits ? p.factor.up * p.factor.up : 1);
}

// A pixel of the output, or of the features.
struct Pixel {
    int64_t i, j;
};

__device__ __forceinline__ Pixel pixel_at(int64_t number, int64_t width) {
    const Quotient rows = divide(number, width);
    return {rows.quotient, rows.remainder};
}

// Points to masks or logits. With features T they are of T, or of float if T has 16 bits. Each access asks for the
// type, since no inner loop reads or writes masks.
template <class T>
struct MaskPointer {
    void* address;
    bool of_float;

    __device__ __forceinline__ Accumulator<T> operator[](int64_t k) const {
        if (sizeof(T) == 2 && of_float) return static_cast<const float*>(address)[k];
        return widen(static_cast<const T*>(address)[k]);
    }
    __device__ __forceinline__ void store(int64_t k, Accumulator<T> value) const {
        if (sizeof(T) == 2 && of_float) {
            static_cast<float*>(address)[k] = static_cast<float>(value);
        } else {
            static_cast<T*>(address)[k] = narrow<T>(value);
        }
    }
};

template <class T>
__device__ __forceinline__ MaskPointer<T> mask_element(const Array& array, int64_t n, int64_t c, int64_t h, int64_t w) {
    const bool of_float = array.dtype == CARAFEPP_FLOAT32;
    if (sizeof(T) == 2 && of_float) return {element<float>(array, n, c, h, w), true};
    return {element<T>(array, n, c, h, w), of_float};
}

// Points to tap t of an output in an array of the shape of masks or, `from_logits`, of logits.
template <class T>
__device__ __forceinline__ MaskPointer<T> mask_at(const Problem& p, const Array& array, int64_t n, int64_t group,
                                                  int64_t t, Pixel output) {
    const int64_t tap = group * p.taps() + t;
    if (!p.from_logits) return mask_element<T>(array, n, tap, output.i, output.j);
    const int64_t up = p.factor.up;
    const Quotient row = divide(output.i, up), column = divide(output.j, up);
    return mask_element<T>(array, n, (tap * up + row.remainder) * up + column.remainder, row.quotient, column.quotient);
}

// Calls f(M()) with the type M of masks of features T.
template <class T, class F>
__device__ __forceinline__ void with_masks(const Array& masks, F f) {
    if (sizeof(T) == 2 && masks.dtype == CARAFEPP_FLOAT32) {
        f(float());
    } else {
        f(T());
    }
}

// The elements of a grid, spread over a block or a part of it. Adjacent threads get adjacent elements: of a row if
// `columns_adjacent`, else of a column. A thread divides once, as quotients take long.
template <int Threads>
class Walk {
public:
    __device__ __forceinline__ Walk(int rows, int columns, bool columns_adjacent)
        : columns_adjacent_(columns_adjacent),
          outer_size_(columns_adjacent ? rows : columns),
          inner_size_(columns_adjacent ? columns : rows),
          outer_step_(Threads / inner_size_),
          inner_step_(Threads % inner_size_),
          outer_(thread_computed_late() % Threads / inner_size_),
          inner_(thread_computed_late() % Threads % inner_size_) {}

    __device__ __forceinline__ bool in_grid() const { return outer_ < outer_size_; }
    __device__ __forceinline__ int row() const { return columns_adjacent_ ? outer_ : inner_; }
    __device__ __forceinline__ int column() const { return columns_adjacent_ ? inner_ : outer_; }
    __device__ __forceinline__ void advance() {
        outer_ += outer_step_;
        inner_ += inner_step_;
        if (inner_ >= inner_size_) {
            inner_ -= inner_size_;
            outer_++;
        }
    }

private:
    bool columns_adjacent_;
    int outer_size_, inner_size_, outer_step_, inner_step_, outer_, inner_;
};

// The way of an element of a grid; if it does not exist, 0 goes there.
struct StagedElement {
    int64_t from;
    int to;
    bool exists;
};

// Copies a grid into shared memory; place(row, column) is a StagedElement. Several loads of a thread are in flight.
template <int Threads, class M, class A, class Place>
__device__ __forceinline__ void copy_grid(const M* from, int rows, int columns, bool columns_adjacent, Place place,
                                          A* staged) {
    constexpr int kInFlight = 4;
    for (Walk<Threads> walk(rows, columns, columns_adjacent); walk.in_grid();) {
        A values[kInFlight];
        int to[kInFlight];
#pragma unroll
        for (int load = 0; load < kInFlight; load++, walk.advance()) {
            const StagedElement element = place(walk.row(), walk.column());
            to[load] = walk.in_grid() ? element.to : -1;
            values[load] = walk.in_grid() && element.exists ? widen(load_input(from + element.from)) : A{0};
        }
#pragma unroll
        for (int load = 0; load < kInFlight; load++) {
            if (to[load] >= 0) staged[to[load]] = values[load];
        }
    }
}

// places[q] = where output number `first` + q begins in an array of the shape of masks or, with the sub-pixels of a
// factor `up`, of logits; from an image's and group's begin on. In a block of kThreads. Ends with a barrier.
__device__ __forceinline__ void find_outputs(const Array& array, int64_t up, int64_t first, int64_t outputs,
                                             int64_t width, int64_t* places) {
    for (int64_t q = threadIdx.x; q < outputs; q += kThreads) {
        const Pixel output = pixel_at(first + q, width);
        const Quotient row = divide(output.i, up), column = divide(output.j, up);
        places[q] = row.quotient * array.stride_h + column.quotient * array.stride_w +
                    (row.remainder * up + column.remainder) * array.stride_c;
    }
    __syncthreads();
}

// Taps [first_tap, first_tap + taps) of outputs at `places`, to to[tap*pitch + output], in a block of kThreads.
template <class T, class A>
__device__ __forceinline__ void load_masks(const Problem& p, const Array& array, int64_t n, int64_t group,
                                           int64_t first_tap, int64_t taps, int64_t outputs, const int64_t* places,
                                           A* to, int64_t pitch) {
    const int64_t apart = taps_apart(p, array);
    with_masks<T>(array, [&](auto mask) {
        const auto* const from = element<const decltype(mask)>(array, n, 0, 0, 0) +
                                 (group * p.taps() + first_tap) * apart;
        copy_grid<kThreads>(from, static_cast<int>(taps), static_cast<int>(outputs), array.stride_w <= array.stride_c,
                            [&](int t, int q) {
            return StagedElement{places[q] + t * apart, static_cast<int>(t * pitch + q), true};
        }, to);
    });
}

// Writes all taps of outputs at `places` from from[tap*pitch + output]: logits are `apart` sub-pixels from tap to tap.
template <class T, class A>
__device__ __forceinline__ void store_masks(const Problem& p, const Array& array, int64_t n, int64_t group,
                                            int64_t apart, int64_t outputs, const int64_t* places, const A* from,
                                            int64_t pitch) {
    with_masks<T>(array, [&](auto mask) {
        using M = decltype(mask);
        M* const to = element<M>(array, n, group * p.taps() * apart, 0, 0);
        Walk<kThreads> walk(static_cast<int>(p.taps()), static_cast<int>(outputs), array.stride_w <= array.stride_c);
        for (; walk.in_grid(); walk.advance())
            to[places[walk.column()] + walk.row() * apart * array.stride_c] = narrow<M>(
                from[walk.row() * pitch + walk.column()]);
    });
}

// f over the values of kNormalizers neighbouring threads. All lanes of a warp call it.
template <class V, class F>
__device__ __forceinline__ V over_normalizers(V value, F f) {
#pragma unroll
    for (int distance = 1; distance < kNormalizers; distance *= 2)
        value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// Turns staged logits, all taps of `outputs` outputs, into masks, in a block of kThreads. Begins and ends with a
// barrier.
template <class A>
__device__ void finish_staging(const Problem& p, int64_t outputs, A* staged, int64_t pitch) {
    __syncthreads();
    if (!p.from_logits) return;
    const int lane = static_cast<int>(threadIdx.x) % kNormalizers;
    for (int64_t before = 0; p.normalizer != CARAFEPP_NONE && before < outputs; before += kThreads / kNormalizers) {
        const int64_t q = before + threadIdx.x / kNormalizers, end = q < outputs ? p.taps() * pitch : 0;
        A largest = -static_cast<A>(INFINITY), sum = 0;
        for (int64_t t = q + lane * pitch; t < end; t += kNormalizers * pitch) {
            if (p.normalizer != CARAFEPP_SOFTMAX)
                staged[t] = p.normalizer == CARAFEPP_SIGMOID ? sigmoid(staged[t]) : log_sigmoid(staged[t]);
            largest = staged[t] > largest ? staged[t] : largest;
        }
        if (p.normalizer == CARAFEPP_SIGMOID) continue;
        largest = over_normalizers(largest, [](A a, A b) { return a > b ? a : b; });
        for (int64_t t = q + lane * pitch; t < end; t += kNormalizers * pitch) {
            staged[t] = Arithmetic<A>::exp_of_nonpositive(staged[t] - largest);
            sum += staged[t];
        }
        sum = over_normalizers(sum, [](A a, A b) { return a + b; });
        for (int64_t t = q + lane * pitch; t < end; t += kNormalizers * pitch) staged[t] /= sum;
    }
    __syncthreads();
}

// All taps, normalised if they come from logits; `places` is room for as many numbers as outputs. Ends with a barrier.
template <class T, class A>
__device__ void stage_masks(const Problem& p, int64_t n, int64_t group, int64_t first, int64_t outputs, int64_t width,
                            int64_t* places, A* to, int64_t pitch) {
    const Array& array = p.from_logits ? p.logits : p.masks;
    find_outputs(array, p.from_logits ? p.factor.up : 1, first, outputs, width, places);
    load_masks<T>(p, array, n, group, 0, p.taps(), outputs, places, to, pitch);
    finish_staging(p, outputs, to, pitch);
}

// One mask, normalised if it is from logits. It reads the other taps again in each pass, so it needs no memory for
// them. Only elements that tensor cores cannot compute need it.
template <class T>
__device__ float mask_of(const Problem& p, int64_t n, int64_t group, int64_t t, Pixel output) {
    const Array& array = p.from_logits ? p.logits : p.masks;
    const MaskPointer<T> taps = mask_at<T>(p, array, n, group, 0, output);
    const int64_t step = taps_apart(p, array);
    const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
    const auto tap = [&](int64_t k) {
        const float logit = taps[k * step];
        return normalizer == CARAFEPP_SIGMOID_NORMALIZED ? log_sigmoid(logit) : logit;
    };
    if (normalizer == CARAFEPP_NONE) return tap(t);
    if (normalizer == CARAFEPP_SIGMOID) return sigmoid(tap(t));
    float largest = -INFINITY, sum = 0;
    for (int64_t k = 0; k < p.taps(); k++) largest = tap(k) > largest ? tap(k) : largest;
    for (int64_t k = 0; k < p.taps(); k++) sum += expf(tap(k) - largest);
    return expf(tap(t) - largest) / sum;
}

// ---- logits to masks in registers: the taps of an output in one thread, or in eight of a warp ----

// All taps in one thread: each(f) calls f(register, tap).
template <int K>
struct TapsOfThread {
    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int t = 0; t < K * K; t++) f(t, t);
    }
    template <class F>
    __device__ __forceinline__ float over_threads(float value, F) const {
        return value;
    }
};

template <int K>
constexpr int kOwnTaps = (K * K + kNormalizers - 1) / kNormalizers;

constexpr float kLog2OfE = 1.44269504f;

// The formulas of normalizer.h once more, for registers: with its loops over memory, taps would leave the registers.
template <class Taps, int Count>
__device__ __forceinline__ void normalize_registers(carafepp_normalizer normalizer, Taps own, float (&taps)[Count]) {
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer != CARAFEPP_SOFTMAX) {
        own.each(
            [&](int k, int) { taps[k] = normalizer == CARAFEPP_SIGMOID ? sigmoid(taps[k]) : log_sigmoid(taps[k]); });
        if (normalizer == CARAFEPP_SIGMOID) return;
    }
    float largest = -INFINITY, sum = 0;
    own.each([&](int k, int) { largest = fmaxf(taps[k], largest); });  // of NaN and a number the number
    largest = own.over_threads(largest, [](float a, float b) { return fmaxf(a, b); });
    own.each([&](int k, int) {
        taps[k] = power_of_2((taps[k] - largest) * kLog2OfE);  // the difference first: logits may be huge
        sum += taps[k];
    });
    const float scale = 1 / own.over_threads(sum, [](float a, float b) { return a + b; });
    own.each([&](int k, int) { taps[k] *= scale; });
}

// Turns staged logits of `outputs` outputs into masks, in a block of `Threads`, or in each such part of a block. Tap t
// of an output is staged[first(output) + t * step]. A thread has all taps of `Own` outputs at once: one, or two
// neighbours, which are one vector.
template <int K, int Threads, int Own = 2, class First>
__device__ __forceinline__ void normalize_each(carafepp_normalizer normalizer, float* staged, int outputs, int step,
                                               First first) {
    using Vector = std::conditional_t<Own == 2, float2, float>;
    if (normalizer == CARAFEPP_NONE) return;
    if (normalizer != CARAFEPP_SOFTMAX) {
#pragma unroll 1
        for (int k = thread_computed_late() % Threads; k < K * K * outputs; k += Threads)
            staged[k] = normalizer == CARAFEPP_SIGMOID ? sigmoid(staged[k]) : log_sigmoid(staged[k]);
        if (normalizer == CARAFEPP_SIGMOID) return;
        __syncthreads();
    }
#pragma unroll 1
    for (int output = thread_computed_late() % Threads * Own; output < outputs; output += Threads * Own) {
        float* const masks = staged + first(output);
        float taps[Own][K * K];
#pragma unroll
        for (int t = 0; t < K * K; t++) {
            const Vector of_tap = *reinterpret_cast<const Vector*>(masks + t * step);
            if constexpr (Own == 2) {
                taps[0][t] = of_tap.x;
                taps[1][t] = of_tap.y;
            } else {
                taps[0][t] = of_tap;
            }
        }
#pragma unroll
        for (auto& of_output : taps) normalize_registers(CARAFEPP_SOFTMAX, TapsOfThread<K>(), of_output);
#pragma unroll
        for (int t = 0; t < K * K; t++) {
            if constexpr (Own == 2) {
                *reinterpret_cast<float2*>(masks + t * step) = make_float2(taps[0][t], taps[1][t]);
            } else {
                masks[t * step] = taps[0][t];
            }
        }
    }
}

// taps[t] = from[t * step].
template <int Count>
__device__ __forceinline__ void load_each(const float* from, int64_t step, float (&taps)[Count]) {
#pragma unroll
    for (int t = 0; t < Count; t++, from += step) taps[t] = *from;
}
template <class T, int Count>
__device__ __forceinline__ void load_each(MaskPointer<T> from, int64_t step, float (&taps)[Count]) {
    if (sizeof(T) == 2 && from.of_float) return load_each(static_cast<const float*>(from.address), step, taps);
    const T* tap = static_cast<const T*>(from.address);
#pragma unroll
    for (int t = 0; t < Count; t++, tap += step) taps[t] = widen(*tap);
}

// Loads the masks of one output, `step` apart, and normalises them if they are logits. `from` is a MaskPointer, or
// points to staged floats.
template <int K, class Pointer>
__device__ __forceinline__ void load_taps(Pointer from, int64_t step, bool from_logits, carafepp_normalizer normalizer,
                                          float (&taps)[K * K]) {
    load_each(from, step, taps);
    if (from_logits) normalize_registers(normalizer, TapsOfThread<K>(), taps);
}

// The number of outputs whose masks and place fit into shared memory.
constexpr int64_t kBytesOfPlace = sizeof(int64_t);
inline int64_t outputs_in_shared(int64_t bytes_of_output, int64_t most) {
    return std::clamp<int64_t>(kSharedBytes / (bytes_of_output + kBytesOfPlace), 1, most);
}

}  // namespace carafepp::cuda
