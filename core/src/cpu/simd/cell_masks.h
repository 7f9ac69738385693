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

// The first `count` lanes; the others are 0.
template <class V>
CARAFEPP_INLINE V first_lanes(V lanes, int count) {
    typedef std::remove_reference_t<decltype(lanes[0])> A;
    typename VectorOf<A>::integer number;
    for (int q = 0; q < kLanes<A>; q++) number[q] = q;
    return number < count ? lanes : V{};
}

template <class A>
struct CellMasks {
    static constexpr int L = kLanes<A>;

    carafepp_normalizer normalizer;
    int channels, outputs;  // taps*outputs, up*up
    int size = (channels + L - 1) / L * L;

    static bool fits(int64_t outputs) { return outputs <= L && L % outputs == 0; }

    // The masks of up to L cells, masks[q*size ..) of the q-th; beyond `channels` they are 0 or make no difference. One
    // step for all cells before the next, since each waits for the one before.
    template <class M>
    void normalize(const M* logits, int64_t cell_stride, int count, A* masks) const {
        for (int q = 0; q < count; q++) load_padded(logits + q * cell_stride, -infinity, masks + q * size);
        if (normalizer == CARAFEPP_NONE) return;
        if (normalizer == CARAFEPP_SIGMOID) {
            for (int k = 0; k < count * size; k += L) store(sigmoid_of<A>(load(masks + k)), masks + k);
            return;
        }
        if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
            for (int k = 0; k < count * size; k += L) store(log_sigmoid_of<A>(load(masks + k)), masks + k);
        }
        Vector<A> of_cell[L];  // the largest, then one over the sum
        for (int q = 0; q < count; q++) {
            const A* const cell = masks + q * size;
            Vector<A> largest = load(cell);
            for (int k = L; k < size; k += L) largest = larger(load(cell + k), largest);
            of_cell[q] = over_taps(largest, [](Vector<A> a, Vector<A> b) { return larger(a, b); });
        }
        for (int q = 0; q < count; q++) {
            A* const cell = masks + q * size;
            Vector<A> sum = {};
            for (int k = 0; k + L <= channels; k += L) {
                const Vector<A> e = exp_of_nonpositive(load(cell + k) - of_cell[q]);
                store(e, cell + k);
                sum += e;
            }
            if (const int rest = channels %
                                 L) {  // an exp that underflows, of padding, would cost as much as the others
                A* const last = cell + size - L;
                const Vector<A> e = exp_of_nonpositive(first_lanes(load(last) - of_cell[q], rest));
                store(first_lanes(e, rest), last);
                sum += first_lanes(e, rest);
            }
            of_cell[q] = A{1} / over_taps(sum, [](Vector<A> a, Vector<A> b) { return a + b; });
        }
        for (int q = 0; q < count; q++) {
            A* const cell = masks + q * size;
            for (int k = 0; k < size; k += L) store(load(cell + k) * of_cell[q], cell + k);
        }
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
        load_padded(logits, A{0}, masks);
        for (int k = 0; k < size; k += L) store(load(grad + k) * sigmoid_of<A>(-load(masks + k)), grad + k);
    }

    template <class M>
    void write(const A* from, M* to) const {
        for (int k = 0; k < size; k += L) store_part(load(from + k), to + k, channels - k);
    }

private:
    static constexpr A infinity = std::numeric_limits<A>::infinity();

    template <class M>
    void load_padded(const M* from, A padding, A* to) const {
        int k = 0;
        for (; k + L <= channels; k += L) store(load(from + k), to + k);
        if (k == channels) return;
        store(load_between(from + k, 0, channels - k), to + k);
        for (k = channels; k < size; k++) to[k] = padding;
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
