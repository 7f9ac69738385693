// SPDX-License-Identifier: Apache-2.0
// The masks of one cell where its logits are adjacent, and their gradient: [tap][output], so that a vector holds
// several taps of all the outputs and no transposing is needed. Where the outputs of a cell, up*up, divide a vector.
#pragma once

#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// Where in an array the channels of a group of a cell begin.
struct CellAt {
    int64_t n, channel, row, cell;
};

template <class A>
struct CellMasks {
    static constexpr int L = kLanes<A>;

    carafepp_normalizer normalizer;
    int channels, outputs;  // taps*up*up, up*up
    int size;               // of a cell: channels in whole vectors

    CellMasks(carafepp_normalizer normalizer, int64_t taps, int64_t outputs)
        : normalizer(normalizer),
          channels(static_cast<int>(taps * outputs)),
          outputs(static_cast<int>(outputs)),
          size(static_cast<int>(ceil_div(taps * outputs, L) * L)) {}

    static bool fits(int64_t outputs) { return outputs <= L && L % outputs == 0; }

    // The masks of up to L cells, masks[q*size ..) of the q-th; beyond `channels` they are 0 or make no difference.
    void normalize(const Array& logits, CellAt at, int count, A* masks) const;

    // The gradient of the masks of cells, grads[q*size ..), to that of their logits, in place. The masks are lost.
    void normalize_backward(const Array& logits, CellAt at, int count, A* masks, A* grads) const;

    // Cells, from[q*size ..), to a result.
    void write(const A* from, const Array& result, CellAt at, int count) const;
};

}  // namespace carafepp::CARAFEPP_ISA
