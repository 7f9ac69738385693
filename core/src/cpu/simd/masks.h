// SPDX-License-Identifier: Apache-2.0
// The masks of a tile, staged in L1: copied, or normalised from logits; and their gradients on the way back.
//
// A cell is up x up outputs over down x down sources; the columns of its outputs are its phases. A tile is as many
// neighbouring cells as a vector has lanes. A row of outputs is staged as [tap][phase][cell], so that normalising is
// arithmetic on whole vectors, and a kernel reads either one weight (an output of one cell) or a vector of them (an
// output of all cells). Rows [tap][phase] lie `pitch` apart: the lanes of a tile, or of the panel that it is part of.
#pragma once

#include <algorithm>

#include "cpu/simd/normalize.h"
#include "cpu/simd/vector.h"

namespace carafepp {
namespace {

// Output rows [begin, end) of one row of cells.
struct Rows {
    int64_t begin, end;
};

// Up to a vector of elements that lie `stride` apart; lanes beyond `count` are 0.
template <class M>
CARAFEPP_INLINE void load_lanes(const M* from, int64_t stride, int count, Accumulator<M>* to) {
    using A = Accumulator<M>;
    if (stride == 1) {
        store(load_part(from, count), to);
        return;
    }
    if (stride == 2 && count > 0) {
        const int64_t there = 2 * count - 1;
        store(shuffle<EvenLanes, A>(load_part(from, there), load_part(from + kLanes<A>, there - kLanes<A>)), to);
        return;
    }
    for (int q = 0; q < count; q++) to[q] = widen(from[q * stride]);
    for (int q = count; q < kLanes<A>; q++) to[q] = 0;
}

template <class M>
CARAFEPP_INLINE void store_lanes(const Accumulator<M>* from, int count, M* to, int64_t stride) {
    if (stride == 1) {
        store_part(load(from), to, count);
        return;
    }
    for (int q = 0; q < count; q++) to[q * stride] = narrow<M>(from[q]);
}

// `count` columns, those of two phases in turn, to the lanes of each; lanes beyond them are 0.
template <class M>
CARAFEPP_INLINE void load_pairs(const M* from, int64_t count, Accumulator<M>* even, Accumulator<M>* odd) {
    using A = Accumulator<M>;
    constexpr int L = kLanes<A>;
    const Vector<A> low = load_part(from, count), high = load_part(from + L, count - L);
    store(shuffle<EvenLanes, A>(low, high), even);
    store(shuffle<OddLanes, A>(low, high), odd);
}

// The inverse of load_pairs.
template <class M>
CARAFEPP_INLINE void store_pairs(const Accumulator<M>* even, const Accumulator<M>* odd, int64_t count, M* to) {
    using A = Accumulator<M>;
    const Vector<A> low = load(even), high = load(odd);
    store_part(shuffle<AlternatingLow, A>(low, high), to, count);
    store_part(shuffle<AlternatingHigh, A>(low, high), to + kLanes<A>, count - kLanes<A>);
}

// Where the adjacent channels of a cell stand in staged rows, in their order: (tap*up + row)*up + phase of logits; of
// masks, tap, which is the same with an `up` of 1.
template <class A>
struct Places {
    A* staged;  // row 0, phase 0 of tap 0
    int up, first_row, rows, phases;
    int64_t row_size, tap_size, pitch;
    int row = 0, phase = 0;
    int64_t tap_offset = 0;

    void seek(int channel) {
        phase = channel % up;
        row = channel / up % up - first_row;
        tap_offset = channel / (up * up) * tap_size;
    }

    // Of the next channel; NULL where its row or phase is not staged.
    A* next() {
        A* const place = row >= 0 && row < rows && phase < phases ? staged + row * row_size + tap_offset + phase * pitch
                                                                  : nullptr;
        if (++phase == up) {
            phase = 0;
            if (++row == up - first_row) {
                row = -first_row;
                tap_offset += tap_size;
            }
        }
        return place;
    }
};

// The places of adjacent channels that are staged `pitch` apart.
template <class A>
CARAFEPP_INLINE Places<A> adjacent_places(A* staged, int64_t pitch) {
    return {staged, 1, 0, 1, 1, 0, pitch, 0};
}

// Blocks of channels as wide as a vector that cover `channels`: the last may overlap the one before it.
template <int L, class F>
CARAFEPP_INLINE void for_each_block(int channels, F f) {
    for (int c = 0; c < channels; c += L) f(channels < L ? 0 : std::min(c, channels - L), std::min(channels, L));
}

// A block of as many rows as a vector has lanes, perhaps in its own place.
template <class From, class To>
__attribute__((noinline)) void transpose_block(const From* from, int64_t from_pitch, To* to, int64_t to_pitch) {
    using A = Accumulator<From>;
    constexpr int L = kLanes<A>;
    Vector<A> rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) rows[i] = load(from + i * from_pitch);
    transpose<A>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) store(rows[i], to + i * to_pitch);
}

// `count` cells of `channels` adjacent elements to the lanes of their places, by transposing; other lanes become 0.
template <class M>
__attribute__((noinline)) void load_channels(const M* from, int64_t cell_stride, int count, int channels,
                                             Places<Accumulator<M>> places) {
    using A = Accumulator<M>;
    constexpr int L = kLanes<A>;
    alignas(kVectorBytes) A block[L * L];
    for (int q = count; q < L; q++) store(Vector<A>{}, block + q * L);
    for_each_block<L>(channels, [&](int begin, int size) {
        const M* cell = from + begin;
        if (count == L && size == L && places.up == 1) {  // places a pitch apart: no detour through a block
            transpose_block(cell, cell_stride, places.staged + begin * places.tap_size, places.tap_size);
            return;
        }
        for (int q = 0; q < count; q++, cell += cell_stride) store(load_part(cell, size), block + q * L);
        transpose_block(block, L, block, L);
        places.seek(begin);
        for (int c = 0; c < size; c++) {
            A* const place = places.next();
            if (place != nullptr) store(load(block + c * L), place);
        }
        for (int q = count; q < L; q++) store(Vector<A>{}, block + q * L);
    });
}

// The inverse of load_channels; places that are not staged are 0.
template <class M>
__attribute__((noinline)) void store_channels(Places<const Accumulator<M>> places, int count, int channels, M* to,
                                              int64_t cell_stride) {
    using A = Accumulator<M>;
    constexpr int L = kLanes<A>;
    alignas(kVectorBytes) A block[L * L];
    for_each_block<L>(channels, [&](int begin, int size) {
        if (count == L && size == L && places.up == 1) {
            transpose_block(places.staged + begin * places.tap_size, places.tap_size, to + begin, cell_stride);
            return;
        }
        places.seek(begin);
        for (int c = 0; c < L; c++) {
            const A* const place = c < size ? places.next() : nullptr;
            store(place != nullptr ? load(place) : Vector<A>{}, block + c * L);
        }
        transpose_block(block, L, block, L);
        M* cell = to + begin;
        for (int q = 0; q < count; q++, cell += cell_stride) store_part(load(block + q * L), cell, size);
    });
}

// Where the masks of a cell stand: tap t of output (row, phase) at row*row_step + phase*phase_step + t*tap_step.
struct Order {
    int64_t row_step, phase_step, tap_step;
};

// Tiles of an array of masks, [N, groups*taps, H', W'], or of logits, [N, groups*taps*up*up, ceil(H'/up), ceil(W'/up)].
template <class M>
struct MaskTiles {
    using A = Accumulator<M>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    int64_t phases;
    int64_t first_tap = 0, taps = p.taps();  // of masks, not of logits, also fewer than all

    int64_t row_size(int64_t pitch) const { return taps * phases * pitch; }
    Order order(int64_t pitch) const { return {row_size(pitch), pitch, phases * pitch}; }

    // The masks of `count` cells from `cell` on, as [row][tap][phase][lane]. Lanes beyond them are finite.
    void stage(int64_t n, int64_t group, Rows rows, int64_t cell, int count, int64_t pitch, A* to) const {
        load_rows(n, group, rows, cell, count, pitch, to);
        if (!p.from_logits) return;
        for (int64_t row = rows.begin; row < rows.end; row++, to += row_size(pitch)) normalize_row(to, pitch);
    }

    // The same pixel by pixel, each with its taps adjacent: of output (row, (cell + q)*up + phase) from
    // to + (row - rows.begin)*row_pitch + (q*up + phase)*taps on. `tile` is room for the rows of a tile.
    void stage_pixels(int64_t n, int64_t group, Rows rows, int64_t cell, int64_t count, A* tile, int64_t row_pitch,
                      A* to) const {
        const int64_t up = p.factor.up;
        if (!p.from_logits && p.masks.stride_c == 1) {
            for (int64_t row = rows.begin; row < rows.end; row++, to += row_pitch) {
                const int64_t begin = cell * up, end = std::min((cell + count) * up, p.out_w);
                const M* from = element<const M>(p.masks, n, group * p.taps(), row, begin);
                if (p.masks.stride_w == taps) {
                    copy_taps(from, (end - begin) * taps, to);
                    continue;
                }
                for (int64_t j = begin; j < end; j++, from += p.masks.stride_w)
                    copy_taps(from, taps, to + (j - begin) * taps);
            }
            return;
        }
        for (int64_t q = 0; q < count; q += L) {
            const int lanes = static_cast<int>(std::min<int64_t>(L, count - q));
            stage(n, group, rows, cell + q, lanes, L, tile);
            for (int64_t row = 0; row < rows.end - rows.begin; row++) {
                for (int64_t phase = 0; phase < phases; phase++) {
                    store_channels<A>(adjacent_places<const A>(tile + row * row_size(L) + phase * L, phases * L), lanes,
                                      static_cast<int>(taps), to + row * row_pitch + (q * up + phase) * taps,
                                      up * taps);
                }
            }
        }
    }

    // What `stage` loads: masks or logits.
    void load_rows(int64_t n, int64_t group, Rows rows, int64_t cell, int count, int64_t pitch, A* to) const {
        const Array& array = p.from_logits ? p.logits : p.masks;
        if (array.stride_c == 1 && p.from_logits) {
            load_channels<M>(locate(array, n, group, rows.begin / p.factor.up * p.factor.up, cell, 0).first,
                             array.stride_w, count, channels_of_logits(), places_of_logits<A>(rows, pitch, to));
            return;
        }
        for (int64_t row = rows.begin; row < rows.end; row++, to += row_size(pitch)) {
            if (has_pairs(array)) {
                const Strip from = locate(array, n, group, row, cell, 0);
                for (int64_t t = 0; t < taps; t++) {
                    A* const even = to + 2 * t * pitch;
                    load_pairs(from.first + t * from.tap_stride, columns_of(cell, count), even, even + pitch);
                }
                continue;
            }
            for (int64_t phase = 0; phase < phases; phase++) {
                const Strip from = locate(array, n, group, row, cell, phase);
                const int there = static_cast<int>(std::clamp<int64_t>(from.count, 0, count));
                A* const first = to + phase * pitch;
                if (array.stride_c == 1) {
                    load_channels<M>(from.first, from.cell_stride, there, static_cast<int>(taps),
                                     adjacent_places(first, phases * pitch));
                    continue;
                }
                for (int64_t t = 0; t < taps; t++)
                    load_lanes(from.first + t * from.tap_stride, from.cell_stride, there, first + t * phases * pitch);
            }
        }
    }

    // Staged rows to the result, which has the shape of the masks or, with all rows and phases of its cells, logits.
    void store_rows(int64_t n, int64_t group, Rows rows, int64_t cell, int count, int64_t pitch, const A* from) const {
        const Array& array = p.result;
        if (array.stride_c == 1 && p.from_logits) {
            store_channels<M>(places_of_logits<const A>(rows, pitch, from), count, channels_of_logits(),
                              locate(array, n, group, rows.begin, cell, 0).first, array.stride_w);
            return;
        }
        for (int64_t row = rows.begin; row < rows.end; row++, from += row_size(pitch)) {
            if (has_pairs(array)) {
                const Strip to = locate(array, n, group, row, cell, 0);
                for (int64_t t = 0; t < taps; t++) {
                    const A* const even = from + 2 * t * pitch;
                    store_pairs(even, even + pitch, columns_of(cell, count), to.first + t * to.tap_stride);
                }
                continue;
            }
            for (int64_t phase = 0; phase < phases; phase++) {
                const Strip to = locate(array, n, group, row, cell, phase);
                const int there = static_cast<int>(std::clamp<int64_t>(to.count, 0, count));
                const A* const first = from + phase * pitch;
                if (array.stride_c == 1) {
                    store_channels<M>(adjacent_places(first, phases * pitch), there, static_cast<int>(taps), to.first,
                                      to.cell_stride);
                    continue;
                }
                for (int64_t t = 0; t < taps; t++)
                    store_lanes(first + t * phases * pitch, there, to.first + t * to.tap_stride, to.cell_stride);
            }
        }
    }

    // A staged row of logits to masks.
    void normalize_row(A* row, int64_t pitch) const { normalize_tile(p.normalizer, row, taps, phases, pitch, L); }

    // The gradient of a staged row of masks to that of its logits, in place. `masks` is room for a row.
    void normalize_row_backward(A* grad, const A* logits, A* masks, int64_t pitch) const {
        std::copy_n(logits, row_size(pitch), masks);
        normalize_row(masks, pitch);
        normalize_tile_backward(p.normalizer, grad, masks, logits, taps, phases, pitch, L);
    }

    // Exactly 0 for logits of `count` cells whose output a crop leaves out.
    void clear_cropped(Rows rows, int64_t cell, int count, Order order, A* grad) const {
        const int64_t up = p.factor.up;
        if (rows.end <= p.out_h && (cell + count) * up <= p.out_w) return;
        for (int64_t row = rows.begin; row < rows.end; row++, grad += order.row_step) {
            for (int64_t phase = 0; phase < phases; phase++) {
                const int64_t outputs = row < p.out_h ? ceil_div(p.out_w - phase, up) - cell : 0;
                for (int64_t q = std::max<int64_t>(outputs, 0); q < count; q++) {
                    for (int64_t t = 0; t < taps; t++) grad[phase * order.phase_step + t * order.tap_step + q] = 0;
                }
            }
        }
    }

private:
    void copy_taps(const M* from, int64_t count, A* to) const {
        for_each_block<L>(static_cast<int>(count), [&](int begin, int size) __attribute__((always_inline)) {
            store_part(load_part(from + begin, size), to + begin, size);
        });
    }

    // One phase of a row of an array: tap t of the q-th cell is first[t*tap_stride + q*cell_stride]; `count` cells.
    struct Strip {
        M* first;
        int64_t tap_stride, cell_stride, count;
    };

    Strip locate(const Array& array, int64_t n, int64_t group, int64_t row, int64_t cell, int64_t phase) const {
        const int64_t up = p.factor.up;
        if (p.from_logits) {
            const int64_t channel = (group * taps * up + row % up) * up + phase;
            return {element<M>(array, n, channel, row / up, cell), up * up * array.stride_c, array.stride_w, L};
        }
        const int64_t channel = group * p.taps() + first_tap;
        return {element<M>(array, n, channel, row, cell * up + phase), array.stride_c, up * array.stride_w,
                ceil_div(p.out_w - phase, up) - cell};
    }

    // Masks whose two phases lie side by side.
    bool has_pairs(const Array& array) const {
        return !p.from_logits && p.factor.up == 2 && phases == 2 && array.stride_w == 1 && array.stride_c != 1;
    }

    int64_t columns_of(int64_t cell, int count) const {
        return std::min<int64_t>(count * p.factor.up, p.out_w - cell * p.factor.up);
    }

    int channels_of_logits() const { return static_cast<int>(taps * p.factor.up * p.factor.up); }

    template <class P>
    Places<P> places_of_logits(Rows rows, int64_t pitch, P* staged) const {
        const int up = static_cast<int>(p.factor.up);
        return {staged,
                up,
                static_cast<int>(rows.begin % up),
                static_cast<int>(rows.end - rows.begin),
                static_cast<int>(phases),
                row_size(pitch),
                phases * pitch,
                pitch};
    }
};

}  // namespace
}  // namespace carafepp
