// SPDX-License-Identifier: Apache-2.0
// The masks of one cell whose logits are adjacent, and their gradient, as [tap][output]. A vector holds several taps of
// all the outputs: nothing is transposed. The outputs of a cell, up*up, must divide a vector.
#pragma once

#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// The first channel of a group of a cell of an array.
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

    // Tells if split() knows the cells: they have 2x2 outputs, whose taps fill a vector.
    bool splits() const { return outputs == 4 && fits(4) && channels >= 4 * L; }

    // Stages some cells output by output, each with its taps adjacent. The q-th cell begins at masks[q*size].
    void split(const A* masks, int count, int64_t row_pitch, A* to) const;

    // Normalises cells; the q-th begins at masks[q*size]. Lanes beyond its channels make no difference.
    void normalize(const Array& logits, CellAt at, int count, A* masks) const;

    // Turns the gradient of masks into that of logits. The q-th cell begins at grads[q*size].
    void normalize_backward(const Array& logits, CellAt at, int count, A* masks, A* grads) const;

    // Writes cells to a result. The q-th begins at from[q*size].
    void write(const A* from, const Array& result, CellAt at, int count) const;
};

}  // namespace carafepp::CARAFEPP_ISA
