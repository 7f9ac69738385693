// SPDX-License-Identifier: Apache-2.0
// Cells of groups of one channel, with adjacent channels. Each channel has masks of its own, which are adjacent too. A
// tile has the masks of the outputs of one cell, as [tap][output][lane]: a lane is a channel. Staging it is a
// transposition.
#pragma once

#include "cpu/geometry.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/tile_transpose.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// A cell of logits has up*up outputs; of masks it is one output.
template <class A>
struct ChannelCells {
    static constexpr int L = kLanes<A>;

    const Problem& p;
    int64_t up, outputs;    // of a cell
    int64_t taps;           // of an output
    int64_t rows, columns;  // of cells
    int64_t tile_size;      // [tap][output][lane]
    MaskTiles<A> masks;     // whose phases are the outputs of a cell

    // From logits, `all` adds the cells whose outputs a crop leaves out.
    ChannelCells(const Problem& problem, bool all)
        : p(problem), up(p.from_logits ? p.factor.up : 1), outputs(up * up), masks(p, outputs) {
        taps = p.taps();
        rows = all && p.from_logits ? p.logits.h : ceil_div(p.out_h, up);
        columns = all && p.from_logits ? p.logits.w : ceil_div(p.out_w, up);
        tile_size = taps * outputs * L;
    }

    // Calls f(first, count) for vectors of channels. The last may overlap the one before it.
    template <class F>
    void for_each_vector(F f) const {
        for_each_block<L>(static_cast<int>(p.groups), f);
    }

    // The tile of channels [first, first + count) of a cell of an array. Other lanes are 0.
    void load(const Array& array, int64_t n, int64_t row, int64_t column, int first, int count, A* tile) const;
    void store(const A* tile, int64_t n, int64_t row, int64_t column, int first, int count, const Array& array) const;

    // Stages the masks of such a tile.
    void stage(int64_t n, int64_t row, int64_t column, int first, int count, A* tile) const {
        load(p.from_logits ? p.logits : p.masks, n, row, column, first, count, tile);
        if (p.from_logits) masks.normalize_row(tile, L);
    }

    // Calls f(i, j, o) for the outputs of a cell that are in the crop. Output o has the taps tile[(t*outputs + o)*L].
    template <class F>
    void for_each_output(int64_t row, int64_t column, F f) const {
        const int64_t end_i = std::min((row + 1) * up, p.out_h), end_j = std::min((column + 1) * up, p.out_w);
        for (int64_t i = row * up; i < end_i; i++) {
            for (int64_t j = column * up; j < end_j; j++) f(i, j, (i - row * up) * up + j - column * up);
        }
    }
};

}  // namespace carafepp::CARAFEPP_ISA
