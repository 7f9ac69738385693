// SPDX-License-Identifier: Apache-2.0
// The masks of one cell where its logits are adjacent, and their gradient: [tap][output], so that a vector holds
// several taps of all the outputs and no transposing is needed. Where the outputs of a cell, up*up, divide a vector.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/simd/normalize.h"
#include "cpu/simd/vector.h"

namespace carafepp {
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

template <class A>
struct CellMasks {
    static constexpr int L = kLanes<A>;

    carafepp_normalizer normalizer;
    int channels, outputs;  // taps*outputs, up*up
    int size = (channels + L - 1) / L * L;

    static bool fits(int64_t outputs) { return outputs <= L && L % outputs == 0; }

    // The masks of up to L cells, masks[q*size ..) of the q-th; beyond `channels` they are 0 or make no difference.
    template <class M>
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

    // The gradient of the masks of a cell, grad[0 .. size), to that of its logits, in place. The masks are
    // lost.
    template <class M>
    void normalize_backward(const M* logits, A* masks, A* grad) const {
        if (normalizer == CARAFEPP_NONE) return;
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

    template <class M>
    void write(const A* from, M* to) const {
        for (int k = 0; k < size; k += L) store_part(load(from + k), to + k, channels - k);
    }

private:
    static constexpr A infinity = std::numeric_limits<A>::infinity();

    // One step for all cells before the next, since each waits for the one before.
    template <class M>
    void softmax(const M* from, int64_t cell_stride, int count, A* masks) const {
        const int whole = channels / L * L, rest = channels - whole;
        Vector<A> of_cell[L];  // the largest, then one over the sum
        for (int q = 0; q < count; q++) {
            const M* const cell = from + q * cell_stride;
            Vector<A> largest = splat(-infinity);
            for (int k = 0; k < whole; k += L) largest = larger(load(cell + k), largest);
            if (rest > 0) largest = larger(first_lanes<A>(load_part(cell + whole, rest), rest, -infinity), largest);
            of_cell[q] = over_taps(largest, [](Vector<A> a, Vector<A> b) { return larger(a, b); });
        }
        for (int q = 0; q < count; q++) {
            const M* const cell = from + q * cell_stride;
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

}  // namespace
}  // namespace carafepp
