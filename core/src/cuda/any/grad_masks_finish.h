// SPDX-License-Identifier: Apache-2.0
// The end of a gradient of masks or logits for any factor. A block has all sums of a tile of outputs of a group, in
// registers: a thread those of four outputs and some taps. Logits arrive in shared memory; threads of an output carry
// its sums through the normaliser together; all threads write the gradients in the order of memory.
#pragma once

#include "cuda/any/bands.h"
#include "cuda/softmax_gradient.h"

namespace carafepp::cuda {

constexpr int kQuad = 4;      // outputs of a thread, in rows below each other
constexpr int kMostTaps = 7;  // of a thread

// A row of outputs, or -1, and the source that it is centred on. It is row `phase` of the outputs of a row of cells.
struct Slot {
    int row, source, cell, phase;
};

// The masks or logits of an output begin at `from`, or kNowhere. `own` is its number in shared memory.
struct OutputPlace {
    int64_t from;
    int own;
};

// The outputs of a tile. Shared memory has tap t of output (y, x) at t * room + y * pitch + x.
struct OutputsOfTile {
    int rows;  // of quads
    Divisor columns;
    int all_columns;                                      // of an image, where a tile may end
    Divisor cell;                                         // rows and columns of outputs of one: sub-pixels, or one
    Divisor rows_of_cell, columns_of_cell, cells_in_row;  // of a tile, whole ones or 1
    int pitch, room;

    CARAFEPP_HOST_DEVICE int count() const { return rows * columns.number; }
};

// Finds the outputs of a tile in an array of the shape of masks or logits, in the order of memory: where channels are
// adjacent, by cells; else by columns of cells, which are apart.
__device__ __forceinline__ void find_places(const OutputsOfTile& tile, const Array& array, const Slot* slots, int left,
                                            OutputPlace* places) {
    const int outputs = tile.count(), up = tile.cell.number;
    const int left_cell = left / up, left_phase = left - left_cell * up;
    const bool by_cells = array.stride_c < array.stride_w;
#pragma unroll 1
    for (int number = static_cast<int>(threadIdx.x); number < outputs; number += static_cast<int>(blockDim.x)) {
        int rest = number, y = 0, x = 0;
        const auto next = [&](const Divisor& count) {
            const int all = rest;
            rest = count.quotient(all);
            return all - rest * count.number;
        };
        if (by_cells) {
            x = next(tile.columns_of_cell);
            y = next(tile.rows_of_cell);
            x += next(tile.cells_in_row) * tile.columns_of_cell.number;
            y += rest * tile.rows_of_cell.number;
        } else {
            x = next(tile.cells_in_row) * tile.columns_of_cell.number;
            x += next(tile.columns_of_cell);
            y = rest;
        }
        const Slot row = slots[y];
        const int j = tile.cell.quotient(left_phase + x), phase = left_phase + x - j * up;
        OutputPlace place;
        place.from = row.row < 0 || left + x >= tile.all_columns
                         ? kNowhere
                         : row.cell * array.stride_h + (left_cell + j) * array.stride_w +
                               (row.phase * up + phase) * array.stride_c;
        place.own = y * tile.pitch + x;
        places[number] = place;
    }
}

// Calls f(from, own, first, step) for taps first, first + step ... of outputs: where the first one is, in memory and in
// shared memory. If taps are adjacent, neighbouring threads have neighbouring taps of an output; else neighbouring
// outputs.
template <class F>
__device__ __forceinline__ void for_each_place(const OutputsOfTile& tile, const OutputPlace* places, int64_t tap, F f) {
    const int outputs = tile.count(), thread = thread_computed_late();
    const int shift = tap == 1 ? 3 : 0, together = 1 << shift, first = thread & (together - 1);
#pragma unroll 1
    for (int output = thread >> shift; output < outputs; output += static_cast<int>(blockDim.x) >> shift) {
        const OutputPlace place = places[output];
        if (place.from != kNowhere) f(place.from + first * tap, first * tile.room + place.own, first, together);
    }
}

// The sums of a thread, and the same taps in shared memory: output o has its first at o * pitch, and they are `step`
// apart.
struct OwnTaps {
    float* first;
    int count, step, pitch;

    // Calls f(output, tap) for each. Threads of a warp mostly have as many.
    template <class F>
    __device__ __forceinline__ void each_number(F f) const {
#pragma unroll
        for (int tap = 0; tap < kMostTaps; tap++) {
            if (tap >= count) break;
#pragma unroll
            for (int o = 0; o < kQuad; o++) f(o, tap);
        }
    }
    // The same with the element of shared memory.
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        each_number([&](int o, int tap) { f(o, tap, first[tap * step + o * pitch]); });
    }
    // f(element) for each element of shared memory. What is rare is not unrolled.
    template <class F>
    __device__ __forceinline__ void replace(F f) const {
#pragma unroll 1
        for (int at = 0; at < count * kQuad; at++) {
            float& element = first[at / kQuad * step + at % kQuad * pitch];
            element = f(element);
        }
    }
};

// Carries the gradients of masks of a thread's taps, `grads`, through the normaliser. Their logits are in shared
// memory; of a sigmoid, factors of the gradients stay there. The threads of an output are `parts`, and tell each other
// what they sum, as partial[part * room + o * pitch]. All threads of a block call it.
__device__ __forceinline__ void through_normalizer(carafepp_normalizer normalizer, const OwnTaps& taps,
                                                   float (&grads)[kQuad][kMostTaps], int part, int parts, int room,
                                                   float2* partial) {
    if (normalizer == CARAFEPP_SIGMOID) {
        taps.replace([](float logit) {
            const float mask = sigmoid(logit);
            return mask * (1 - mask);
        });
        return;
    }
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) taps.replace([](float logit) { return log_sigmoid(logit); });
    float powers[kQuad][kMostTaps], largest[kQuad] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    SoftmaxGradient gradients[kQuad];
    const auto tell = [&](int o) -> float2& { return partial[part * room + o * taps.pitch]; };
    // Calls f(output, what a thread told) for each.
    const auto each_part = [&](auto f) {
#pragma unroll 1
        for (int other = 0; other < (taps.count > 0 ? parts : 0); other++) {
#pragma unroll
            for (int o = 0; o < kQuad; o++) f(o, partial[other * room + o * taps.pitch]);
        }
    };
    taps.each([&](int o, int tap, float logit) {
        powers[o][tap] = logit;
        largest[o] = fmaxf(largest[o], logit);
    });
    if (taps.count > 0) {
#pragma unroll
        for (int o = 0; o < kQuad; o++) tell(o).x = largest[o];
    }
    __syncthreads();
    each_part([&](int o, float2 told) { largest[o] = fmaxf(largest[o], told.x); });
    taps.each_number([&](int o, int tap) {
        powers[o][tap] = SoftmaxGradient::power(powers[o][tap], largest[o]);
        gradients[o].add(powers[o][tap], grads[o][tap]);
    });
    __syncthreads();
    if (taps.count > 0) {
#pragma unroll
        for (int o = 0; o < kQuad; o++) {
            tell(o) = make_float2(gradients[o].scale, gradients[o].mean);
            gradients[o] = {};
        }
    }
    __syncthreads();
    each_part([&](int o, float2 told) {
        gradients[o].scale += told.x;
        gradients[o].mean += told.y;
    });
#pragma unroll
    for (int o = 0; o < kQuad; o++) gradients[o].finish();
    taps.each_number([&](int o, int tap) { grads[o][tap] = gradients[o](powers[o][tap], grads[o][tap]); });
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED)  // the sigmoid of -logit
        taps.replace([](float log_of_sigmoid) { return -expm1f(log_of_sigmoid); });
}

// The place of the block's tile.
struct TileInImage {
    int64_t n, group;
    const Slot* slots;  // of the rows
    int left;
};

// Loads the logits of a tile into shared memory, [tap][output]. They are there after wait_for_copies() and a barrier.
// All threads of a block call it, and share `places`, for all outputs.
__device__ __forceinline__ void load_logits(const Problem& p, const OutputsOfTile& tile, const TileInImage& at,
                                            OutputPlace* places, float* logits) {
    find_places(tile, p.logits, at.slots, at.left, places);
    __syncthreads();
    const int taps = static_cast<int>(p.taps());
    const int64_t tap = taps_apart(p, p.logits), first_tap = at.n * p.logits.stride_n + at.group * taps * tap;
    for_each_place(tile, places, tap, [&](int64_t place, int first, int t, int further) __attribute__((always_inline)) {
        with_storage(p.logits.dtype, [&](auto storage) __attribute__((always_inline)) {
            using M = decltype(storage);
            const M* from = static_cast<const M*>(p.logits.data) + first_tap + place;
            float* to = logits + first;
#pragma unroll 4
            for (int own_tap = t; own_tap < taps;
                 own_tap += further, from += further * tap, to += further * tile.room) {
                if constexpr (std::is_same_v<M, float>) {
                    copy_async<sizeof(float)>(to, from, true);
                } else {
                    *to = widen(load_input(from));
                }
            }
        });
    });
}

// Writes the gradients of a tile from shared memory, [tap][output], where they are after its barrier. All threads of a
// block call it, and share `places`, for all outputs.
__device__ __forceinline__ void write_gradients(const Arguments& arguments, const OutputsOfTile& tile,
                                                const TileInImage& at, OutputPlace* places, const float* gradients) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;  // of the shape of masks or logits
    find_places(tile, result, at.slots, at.left, places);
    __syncthreads();
    const int taps = static_cast<int>(p.taps());
    const int64_t tap = taps_apart(p, result), first_tap = at.n * result.stride_n + at.group * taps * tap;
    for_each_place(tile, places, tap, [&](int64_t place, int first, int t, int further) __attribute__((always_inline)) {
        with_storage(result.dtype, [&](auto storage) __attribute__((always_inline)) {
            using M = decltype(storage);
            M* to = static_cast<M*>(result.data) + first_tap + place;
            const float* from = gradients + first;
#pragma unroll 4
            for (int own_tap = t; own_tap < taps; own_tap += further, to += further * tap, from += further * tile.room)
                *to = narrow<M>(*from);
        });
    });
}

// The sums that a thread has of a tile: `count` taps from `tap` on, `further` apart, of output (row, column) and of
// those below. It is one of the `parts` threads of its outputs.
struct ThreadOfTile {
    int row, column, tap, further, count, part;
};

// Turns sums into gradients and writes them: through the normaliser, if `normalized`. Gradients of outputs that a crop
// leaves out are 0. All threads of a block call it. They share `finished`, [tap][output], `partial`, [part][output],
// and `places`, for all outputs.
__device__ __forceinline__ void finish_grad_masks(const Arguments& arguments, const OutputsOfTile& tile,
                                                  const TileInImage& at, const ThreadOfTile& own, int parts,
                                                  bool normalized, float (&sums)[kQuad][kMostTaps], float* finished,
                                                  float2* partial, OutputPlace* places) {
    const Problem& p = arguments.problem;
    const int height_out = static_cast<int>(p.out_h), width_out = static_cast<int>(p.out_w),
              output = own.row * tile.pitch + own.column;
    const OwnTaps own_taps{finished + own.tap * tile.room + output, own.count, own.further * tile.room, tile.pitch};
    if (normalized) {
        load_logits(p, tile, at, places, finished);
        wait_for_copies();
        __syncthreads();
        through_normalizer(p.normalizer, own_taps, sums, own.part, parts, tile.room, partial + output);
    }
    if (normalized && p.normalizer != CARAFEPP_SOFTMAX)  // factors are there
        own_taps.each([&](int o, int tap, float factor) { sums[o][tap] *= factor; });
    own_taps.each([&](int o, int tap, float& to) { to = sums[o][tap]; });
    const int last_row = at.slots[tile.rows - kQuad].row;  // that begins a quad
    if (last_row < 0 || last_row + kQuad > height_out || at.left + tile.columns.number > width_out) {
#pragma unroll 1
        for (int tap_of_quad = 0; tap_of_quad < own.count * kQuad; tap_of_quad++) {
            const int tap = tap_of_quad / kQuad, o = tap_of_quad % kQuad;
            if (at.left + own.column >= width_out || at.slots[own.row + o].row >= height_out)
                own_taps.first[tap * own_taps.step + o * tile.pitch] = 0;
        }
    }
    write_gradients(arguments, tile, at, places, finished);
}

}  // namespace carafepp::cuda
