// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/masks_nhwc.h"

#include <limits>

#include "cpu/simd/normalize.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

template <int Distance>
struct Exchange {
    static constexpr int at(int lane, int) { return lane ^ Distance; }
};

// The first `count` lanes, the others replaced.
template <class A>
CARAFEPP_INLINE Vector<A> first_lanes(Vector<A> lanes, int count, A others) {
    typename VectorOf<A>::integer number;
    for (int q = 0; q < kLanes<A>; q++) number[q] = q;
    return number < count ? lanes : splat(others);
}

// What reads logits of M, and writes them.
template <class M>
struct Cells : CellMasks<Accumulator<M>> {
    using A = Accumulator<M>;
    using CellMasks<A>::L, CellMasks<A>::normalizer, CellMasks<A>::channels, CellMasks<A>::outputs, CellMasks<A>::size;

    void normalize(const M* logits, int64_t cell_stride, int count, A* masks) const {
        if (normalizer == CARAFEPP_SOFTMAX) return softmax(logits, cell_stride, count, masks);
        for (int q = 0; q < count; q++) {
            for (int k = 0; k < size; k += L) {
                const Vector<A> logit = load_part(logits + q * cell_stride + k, channels - k);
                store(normalizer == CARAFEPP_NONE      ? logit
                      : normalizer == CARAFEPP_SIGMOID ? sigmoid_of<A>(logit)
                                                       : log_sigmoid_of<A>(logit),
                      masks + q * size + k);
            }
        }
        if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) softmax<A>(masks, size, count, masks);
    }

    void normalize_backward(const M* logits, A* masks, A* grad) const {
        if (normalizer == CARAFEPP_SIGMOID) {
            for (int k = 0; k < size; k += L) {
                const Vector<A> mask = load(masks + k);
                store(load(grad + k) * (mask * (A{1} - mask)), grad + k);
            }
            return;
        }
        Vector<A> mean = {};  // of the gradient, weighted by the masks
        for (int k = 0; k < size; k += L) mean += load(masks + k) * load(grad + k);
        mean = over_taps(mean, [](Vector<A> a, Vector<A> b) { return a + b; });
        for (int k = 0; k < size; k += L) store(load(masks + k) * (load(grad + k) - mean), grad + k);
        if (normalizer != CARAFEPP_SIGMOID_NORMALIZED) return;
        for (int k = 0; k < size; k += L) {
            const Vector<A> logit = load_part(logits + k, channels - k);
            store(load(grad + k) * sigmoid_of<A>(-logit), grad + k);
        }
    }

    void write(const A* from, M* to) const {
        for (int k = 0; k < size; k += L) store_part(load(from + k), to + k, channels - k);
    }

private:
    static constexpr A infinity = std::numeric_limits<A>::infinity();

    // One step for all cells before the next, since each waits for the one before.
    template <class From>
    void softmax(const From* from, int64_t cell_stride, int count, A* masks) const {
        const int whole = channels / L * L, rest = channels - whole;
        Vector<A> of_cell[L];  // the largest, then one over the sum
        for (int q = 0; q < count; q++) {
            const From* const cell = from + q * cell_stride;
            Vector<A> largest = splat(-infinity);
            for (int k = 0; k < whole; k += L) largest = larger(load(cell + k), largest);
            if (rest > 0) largest = larger(first_lanes<A>(load_part(cell + whole, rest), rest, -infinity), largest);
            of_cell[q] = over_taps(largest, [](Vector<A> a, Vector<A> b) { return larger(a, b); });
        }
        for (int q = 0; q < count; q++) {
            const From* const cell = from + q * cell_stride;
            A* const to = masks + q * size;
            Vector<A> sum = {};
            for (int k = 0; k < whole; k += L) {
                const Vector<A> e = exp_of_nonpositive(load(cell + k) - of_cell[q]);
                store(e, to + k);
                sum += e;
            }
            if (rest > 0) {  // an exp that underflows, of padding, would cost as much as the others
                const Vector<A> x = load_part(cell + whole, rest) - of_cell[q];
                const Vector<A> e = first_lanes<A>(exp_of_nonpositive(first_lanes<A>(x, rest, A{0})), rest, A{0});
                store(e, to + whole);
                sum += e;
            }
            of_cell[q] = A{1} / over_taps(sum, [](Vector<A> a, Vector<A> b) { return a + b; });
        }
        for (int q = 0; q < count; q++) {
            A* const cell = masks + q * size;
            for (int k = 0; k < size; k += L) store(load(cell + k) * of_cell[q], cell + k);
        }
    }

    // What each output's lanes make together, in all of them.
    template <int Distance = 1, class F>
    Vector<A> over_taps(Vector<A> lanes, F f) const {
        if constexpr (Distance < L) {
            if (outputs <= Distance) lanes = f(lanes, shuffle<Exchange<Distance>, A>(lanes, lanes));
            return over_taps<2 * Distance>(lanes, f);
        } else {
            return lanes;
        }
    }
};

// Calls f(Cells<M>, the cell's first element) for the dtype of an array.
template <class A, class F>
void with_cells(const CellMasks<A>& masks, const Array& array, CellAt at, F f) {
    with_type_of<A>(array.dtype, [&](auto type) {
        using M = typename decltype(type)::type;
        f(Cells<M>{masks}, element<M>(array, at.n, at.channel, at.row, at.cell));
    });
}

}  // namespace

template <class A>
void CellMasks<A>::normalize(const Array& logits, CellAt at, int count, A* masks) const {
    with_cells(*this, logits, at,
               [&](const auto& cells, auto* first) { cells.normalize(first, logits.stride_w, count, masks); });
}

template <class A>
void CellMasks<A>::normalize_backward(const Array& logits, CellAt at, int count, A* masks, A* grads) const {
    if (normalizer == CARAFEPP_NONE) return;
    with_cells(*this, logits, at, [&](const auto& cells, auto* first) {
        for (int q = 0; q < count; q++)
            cells.normalize_backward(first + q * logits.stride_w, masks + q * size, grads + q * size);
    });
}

template <class A>
void CellMasks<A>::write(const A* from, const Array& result, CellAt at, int count) const {
    with_cells(*this, result, at, [&](const auto& cells, auto* first) {
        for (int q = 0; q < count; q++) cells.write(from + q * size, first + q * result.stride_w);
    });
}

template struct CellMasks<float>;
template struct CellMasks<double>;

}  // namespace carafepp::CARAFEPP_ISA
