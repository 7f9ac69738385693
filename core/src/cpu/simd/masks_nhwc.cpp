// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/masks_nhwc.h"

#include "cpu/simd/normalize.h"
#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

template <int Distance>
struct Exchange {
    static constexpr int at(int lane, int) { return lane ^ Distance; }
};

// The first `count` lanes; the others become `others`.
template <class A>
CARAFEPP_INLINE Vector<A> first_lanes(Vector<A> lanes, int count, A others) {
    typename VectorOf<A>::integer number;
    for (int q = 0; q < kLanes<A>; q++) number[q] = q;
    return number < count ? lanes : splat(others);
}

// The taps of one cell, whose logits are of M. Lane q of vector k has channel k*L + q, which is a tap of an output.
template <class M>
struct CellTaps {
    using A = Accumulator<M>;
    using Value = Vector<A>;
    static constexpr int L = kLanes<A>;

    const M* logits;
    A *masks, *grads;
    int64_t count;  // of vectors
    int channels, outputs;

    CARAFEPP_MEMBER Value logit(int64_t k) const { return load_part(logits + k * L, channels - k * L); }
    CARAFEPP_MEMBER Value mask(int64_t k) const { return load(masks + k * L); }
    CARAFEPP_MEMBER Value grad(int64_t k) const { return load(grads + k * L); }
    CARAFEPP_MEMBER void store_mask(int64_t k, Value mask) const { store(mask, masks + k * L); }
    CARAFEPP_MEMBER void store_grad(int64_t k, Value grad) const { store(grad, grads + k * L); }

    // Over the lanes of each output, which lie `outputs` apart: the result is in all of them.
    template <class F, int Distance = 1>
    CARAFEPP_MEMBER Value reduce(Value lanes, F f) const {
        if constexpr (Distance < L) {
            if (outputs <= Distance) lanes = f(lanes, shuffle<Exchange<Distance>, A>(lanes, lanes));
            return reduce<F, 2 * Distance>(lanes, f);
        } else {
            return lanes;
        }
    }

    CARAFEPP_MEMBER Value filled(int64_t k, Value value, A x) const {
        const int there = channels - static_cast<int>(k * L);
        return there < L ? first_lanes<A>(value, there, x) : value;
    }
};

// Calls f(taps) for each of `count` cells of an array of logits, or of the gradient of logits.
template <class A, class F>
void for_each_cell(const CellMasks<A>& cells, const Array& array, CellAt at, int count, A* masks, A* grads, F f) {
    with_type_of<A>(array.dtype, [&](auto type) {
        using M = typename decltype(type)::type;
        const M* logits = element<const M>(array, at.n, at.channel, at.row, at.cell);
        for (int q = 0; q < count; q++, logits += array.stride_w, masks += cells.size, grads += cells.size)
            f(CellTaps<M>{logits, masks, grads, cells.size / kLanes<A>, cells.channels, cells.outputs});
    });
}

}  // namespace

template <class A>
void CellMasks<A>::normalize(const Array& logits, CellAt at, int count, A* masks) const {
    for_each_cell(*this, logits, at, count, masks, masks, [&](const auto& taps) { normalize_taps(normalizer, taps); });
}

template <class A>
void CellMasks<A>::normalize_backward(const Array& logits, CellAt at, int count, A* masks, A* grads) const {
    for_each_cell(*this, logits, at, count, masks, grads,
                  [&](const auto& taps) { normalize_taps_backward(normalizer, taps); });
}

template <class A>
void CellMasks<A>::write(const A* from, const Array& result, CellAt at, int count) const {
    with_type_of<A>(result.dtype, [&](auto type) {
        using M = typename decltype(type)::type;
        M* to = element<M>(result, at.n, at.channel, at.row, at.cell);
        for (int q = 0; q < count; q++, from += size, to += result.stride_w) {
            for_each_block<L>(channels, [&](int begin, int size) __attribute__((always_inline)) {
                store_part(load(from + begin), to + begin, size);
            });
        }
    });
}

template <class A>
void CellMasks<A>::split(const A* masks, int count, int64_t row_pitch, A* to) const {
    const int taps = channels / outputs;
    for (int q = 0; q < count; q++, masks += size, to += 2 * taps) {
        for_each_block<L>(taps, [&](int begin, int) __attribute__((always_inline)) {
            Vector<A> lanes[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) lanes[v] = load(masks + 4 * begin + v * L);
            deinterleave<A, 4>(lanes);
#pragma GCC unroll 2
            for (int row = 0; row < 2; row++) {
                store(lanes[2 * row], to + row * row_pitch + begin);
                store(lanes[2 * row + 1], to + row * row_pitch + taps + begin);
            }
        });
    }
}

template struct CellMasks<float>;
template struct CellMasks<double>;

}  // namespace carafepp::CARAFEPP_ISA
