// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/masks.h"

#include <algorithm>

#include "cpu/simd/masks_nhwc.h"
#include "cpu/simd/normalize.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// Loads up to a vector of elements that lie `stride` apart; lanes beyond `count` are 0.
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

// Loads `count` columns, of some phases in turn, to the lanes of each phase; lanes beyond them are 0.
template <int Phases, class M>
CARAFEPP_INLINE void load_phases(const M* from, int64_t count, Accumulator<M>* to, int64_t pitch) {
    using A = Accumulator<M>;
    Vector<A> lanes[Phases];
#pragma GCC unroll 4
    for (int k = 0; k < Phases; k++) lanes[k] = load_part(from + k * kLanes<A>, count - k * kLanes<A>);
    deinterleave<A, Phases>(lanes);
#pragma GCC unroll 4
    for (int k = 0; k < Phases; k++) store(lanes[k], to + k * pitch);
}

// The inverse of load_phases, of two.
template <class M>
CARAFEPP_INLINE void store_pairs(const Accumulator<M>* even, const Accumulator<M>* odd, int64_t count, M* to) {
    using A = Accumulator<M>;
    const Vector<A> low = load(even), high = load(odd);
    store_part(shuffle<AlternatingLow, A>(low, high), to, count);
    store_part(shuffle<AlternatingHigh, A>(low, high), to + kLanes<A>, count - kLanes<A>);
}

// Moves elements of M between an array and staged rows.
template <class M>
struct Elements : MaskTiles<Accumulator<M>> {
    using A = Accumulator<M>;
    using MaskTiles<A>::L, MaskTiles<A>::p, MaskTiles<A>::phases, MaskTiles<A>::of_logits, MaskTiles<A>::first_tap,
        MaskTiles<A>::taps, MaskTiles<A>::row_size;

    void load_rows(const Array& array, int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch,
                   A* to) const {
        if (array.stride_c == 1 && of_logits) {
            load_channels<M>(locate(array, n, group, rows.begin / p.factor.up * p.factor.up, cell, 0).first,
                             array.stride_w, count, channels_of_logits(), order_of_logits<A>(rows, pitch, to));
            return;
        }
        for (int64_t row = rows.begin; row < rows.end; row++, to += row_size(pitch)) {
            if (has_adjacent_phases(array)) {
                const PhaseRow from = locate(array, n, group, row, cell, 0);
                const int64_t columns = columns_of(cell, count);
                with_count<kMostPhases>(static_cast<int>(phases), [&](auto known) __attribute__((always_inline)) {
                    for (int64_t t = 0; t < taps; t++) {
                        load_phases<decltype(known)::value>(from.first + t * from.tap_stride, columns,
                                                            to + t * phases * pitch, pitch);
                    }
                });
                continue;
            }
            for (int64_t phase = 0; phase < phases; phase++) {
                const PhaseRow from = locate(array, n, group, row, cell, phase);
                const int there = static_cast<int>(std::clamp<int64_t>(from.count, 0, count));
                A* const first = to + phase * pitch;
                if (array.stride_c == 1) {
                    load_channels<M>(from.first, from.cell_stride, there, static_cast<int>(taps),
                                     adjacent_channels(first, phases * pitch));
                    continue;
                }
                for (int64_t t = 0; t < taps; t++)
                    load_lanes(from.first + t * from.tap_stride, from.cell_stride, there, first + t * phases * pitch);
            }
        }
    }

    void store_rows(int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch, const A* from,
                    const Array& array) const {
        if (array.stride_c == 1 && of_logits) {
            store_channels<M>(order_of_logits<const A>(rows, pitch, from), count, channels_of_logits(),
                              locate(array, n, group, rows.begin, cell, 0).first, array.stride_w);
            return;
        }
        for (int64_t row = rows.begin; row < rows.end; row++, from += row_size(pitch)) {
            if (has_pairs(array)) {
                const PhaseRow to = locate(array, n, group, row, cell, 0);
                for (int64_t t = 0; t < taps; t++) {
                    const A* const even = from + 2 * t * pitch;
                    store_pairs(even, even + pitch, columns_of(cell, count), to.first + t * to.tap_stride);
                }
                continue;
            }
            for (int64_t phase = 0; phase < phases; phase++) {
                const PhaseRow to = locate(array, n, group, row, cell, phase);
                const int there = static_cast<int>(std::clamp<int64_t>(to.count, 0, count));
                const A* const first = from + phase * pitch;
                if (array.stride_c == 1) {
                    store_channels<M>(adjacent_channels(first, phases * pitch), there, static_cast<int>(taps), to.first,
                                      to.cell_stride);
                    continue;
                }
                for (int64_t t = 0; t < taps; t++)
                    store_lanes(first + t * phases * pitch, there, to.first + t * to.tap_stride, to.cell_stride);
            }
        }
    }

    // Copies the masks of the outputs of `count` cells, with adjacent channels.
    void load_pixels(int64_t n, int64_t group, Range rows, int64_t cell, int64_t count, int64_t row_pitch,
                     A* to) const {
        const int64_t up = p.factor.up;
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
    }

    void store_cell(int64_t n, int64_t group, Range rows, int64_t cell, const A* from, const Array& result) const {
        for (int64_t row = rows.begin; row < rows.end; row++) {
            const int64_t columns = std::min(phases, p.out_w - cell * p.factor.up);
            const A* of_row = from + (row - rows.begin) * phases * taps;
            M* to = element<M>(result, n, group * taps, row, cell * p.factor.up);
            for (int64_t phase = 0; phase < columns; phase++, of_row += taps, to += result.stride_w) {
                for_each_block<L>(static_cast<int>(taps), [&](int begin, int size) __attribute__((always_inline)) {
                    store_part(load(of_row + begin), to + begin, size);
                });
            }
        }
    }

private:
    void copy_taps(const M* from, int64_t count, A* to) const {
        for_each_block<L>(static_cast<int>(count), [&](int begin, int size) __attribute__((always_inline)) {
            store_part(load_part(from + begin, size), to + begin, size);
        });
    }

    // One phase of a row of outputs of an array. It has `count` cells; tap t of the q-th is
    // first[t*tap_stride + q*cell_stride].
    struct PhaseRow {
        M* first;
        int64_t tap_stride, cell_stride, count;
    };

    PhaseRow locate(const Array& array, int64_t n, int64_t group, int64_t row, int64_t cell, int64_t phase) const {
        const int64_t up = p.factor.up;
        if (of_logits) {
            const int64_t channel = (group * taps * up + row % up) * up + phase;
            return {element<M>(array, n, channel, row / up, cell), up * up * array.stride_c, array.stride_w, L};
        }
        const int64_t channel = group * p.taps() + first_tap;
        return {element<M>(array, n, channel, row, cell * up + phase), array.stride_c, up * array.stride_w,
                ceil_div(p.out_w - phase, up) - cell};
    }

    // Masks whose phases lie side by side. Only floats have code for more than two, for its size.
    static constexpr int kMostPhases = std::is_same_v<M, float> ? 4 : 2;
    bool has_adjacent_phases(const Array& array) const {
        return !of_logits && p.factor.up <= kMostPhases && phases == p.factor.up && array.stride_w == 1 &&
               array.stride_c != 1;
    }
    bool has_pairs(const Array& array) const { return phases == 2 && has_adjacent_phases(array); }

    int64_t columns_of(int64_t cell, int count) const {
        return std::min<int64_t>(count * p.factor.up, p.out_w - cell * p.factor.up);
    }

    int channels_of_logits() const { return static_cast<int>(taps * p.factor.up * p.factor.up); }

    template <class P>
    ChannelOrder<P> order_of_logits(Range rows, int64_t pitch, P* staged) const {
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

// Calls f(Elements<M>) for the dtype of an array.
template <class A, class F>
void with_elements(const MaskTiles<A>& tiles, const Array& array, F f) {
    with_type_of<A>(array.dtype, [&](auto type) { f(Elements<typename decltype(type)::type>{tiles}); });
}

}  // namespace

template <class A>
void MaskTiles<A>::stage(int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch, A* to) const {
    load_rows(of_logits ? p.logits : p.masks, n, group, rows, cell, count, pitch, to);
    if (!of_logits) return;
    for (int64_t row = rows.begin; row < rows.end; row++, to += row_size(pitch)) normalize_row(to, pitch);
}

template <class A>
void MaskTiles<A>::stage_pixels(int64_t n, int64_t group, Range rows, int64_t cell, int64_t count, A* tile,
                                int64_t row_pitch, A* to) const {
    if (!of_logits && p.masks.stride_c == 1) {
        with_elements(*this, p.masks,
                      [&](const auto& masks) { masks.load_pixels(n, group, rows, cell, count, row_pitch, to); });
        return;
    }
    const int64_t up = p.factor.up;
    const CellMasks<A> cells(p.normalizer, taps, up * up);
    const bool whole_cells = rows.size() == up && phases == up;
    if (of_logits && p.logits.stride_c == 1 && whole_cells && cells.splits()) {
        const int64_t most = up * row_size(L) / cells.size;
        for (int64_t q = 0; q < count; q += most) {
            const int here = static_cast<int>(std::min(most, count - q));
            cells.normalize(p.logits, {n, group * cells.channels, rows.begin / up, cell + q}, here, tile);
            cells.split(tile, here, row_pitch, to + q * up * taps);
        }
        return;
    }
    for (int64_t q = 0; q < count; q += L) {
        const int lanes = static_cast<int>(std::min<int64_t>(L, count - q));
        stage(n, group, rows, cell + q, lanes, L, tile);
        for (int64_t row = 0; row < rows.end - rows.begin; row++) {
            for (int64_t phase = 0; phase < phases; phase++) {
                store_channels<A>(adjacent_channels<const A>(tile + row * row_size(L) + phase * L, phases * L), lanes,
                                  static_cast<int>(taps), to + row * row_pitch + (q * up + phase) * taps, up * taps);
            }
        }
    }
}

template <class A>
void MaskTiles<A>::load_rows(const Array& array, int64_t n, int64_t group, Range rows, int64_t cell, int count,
                             int64_t pitch, A* to) const {
    with_elements(*this, array,
                  [&](const auto& inputs) { inputs.load_rows(array, n, group, rows, cell, count, pitch, to); });
}

template <class A>
void MaskTiles<A>::store_rows(int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch,
                              const A* from, const Array& result) const {
    with_elements(*this, result,
                  [&](const auto& results) { results.store_rows(n, group, rows, cell, count, pitch, from, result); });
}

template <class A>
void MaskTiles<A>::store_cell(int64_t n, int64_t group, Range rows, int64_t cell, const A* from,
                              const Array& result) const {
    with_elements(*this, result, [&](const auto& results) { results.store_cell(n, group, rows, cell, from, result); });
}

template <class A>
void MaskTiles<A>::normalize_row(A* row, int64_t pitch) const {
    normalize_tile(p.normalizer, row, taps, phases, pitch);
}

template <class A>
void MaskTiles<A>::normalize_row_backward(A* grad, const A* logits, A* masks, int64_t pitch) const {
    std::copy_n(logits, row_size(pitch), masks);
    normalize_row(masks, pitch);
    normalize_tile_backward(p.normalizer, grad, masks, logits, taps, phases, pitch);
}

template <class A>
void MaskTiles<A>::zero_cropped_grads(Range rows, int64_t cell, int count, Order order, A* grad) const {
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

template struct MaskTiles<float>;
template struct MaskTiles<double>;

}  // namespace carafepp::CARAFEPP_ISA
