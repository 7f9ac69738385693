// SPDX-License-Identifier: Apache-2.0
// The masks of a tile, staged in L1: copied, or normalised from logits; and their gradients on the way back.
//
// A cell is up x up outputs over down x down sources; the columns of its outputs are its phases. A tile is as many
// neighbouring cells as a vector has lanes. A row of outputs is staged as [tap][phase][cell], so that normalising is
// arithmetic on whole vectors, and a kernel reads either one weight (an output of one cell) or a vector of them (an
// output of all cells). Rows [tap][phase] lie `pitch` apart: the lanes of a tile, or of the panel that it is part of.
#pragma once

#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// Output rows [begin, end) of one row of cells.
struct Rows {
    int64_t begin, end;
};

// Where the masks of a cell stand: tap t of output (row, phase) at row*row_step + phase*phase_step + t*tap_step.
struct Order {
    int64_t row_step, phase_step, tap_step;
};

// Tiles of an array of masks, [N, groups*taps, H', W'], or of logits, [N, groups*taps*up*up, ceil(H'/up), ceil(W'/up)],
// of any dtype whose sums are kept in A.
template <class A>
struct MaskTiles {
    static constexpr int L = kLanes<A>;

    const Problem& p;
    int64_t phases;
    bool of_logits;           // else of masks
    int64_t first_tap, taps;  // of masks also fewer than all

    MaskTiles(const Problem& problem, int64_t phases) : MaskTiles(problem, phases, problem.from_logits) {}
    MaskTiles(const Problem& problem, int64_t phases, bool of_logits)
        : p(problem), phases(phases), of_logits(of_logits), first_tap(0), taps(problem.taps()) {}

    int64_t row_size(int64_t pitch) const { return taps * phases * pitch; }
    Order order(int64_t pitch) const { return {row_size(pitch), pitch, phases * pitch}; }

    // The masks of `count` cells from `cell` on, as [row][tap][phase][lane]. Lanes beyond them are finite.
    void stage(int64_t n, int64_t group, Rows rows, int64_t cell, int count, int64_t pitch, A* to) const;

    // The same pixel by pixel, each with its taps adjacent: of output (row, (cell + q)*up + phase) from
    // to + (row - rows.begin)*row_pitch + (q*up + phase)*taps on. `tile` is room for the rows of a tile.
    void stage_pixels(int64_t n, int64_t group, Rows rows, int64_t cell, int64_t count, A* tile, int64_t row_pitch,
                      A* to) const;

    // The same of any array of such tiles, as it is.
    void load_rows(const Array& array, int64_t n, int64_t group, Rows rows, int64_t cell, int count, int64_t pitch,
                   A* to) const;

    // Staged rows to a result, which has the shape of the masks or, with all rows and phases of its cells, logits.
    void store_rows(int64_t n, int64_t group, Rows rows, int64_t cell, int count, int64_t pitch, const A* from,
                    const Array& result) const;

    // [row][phase][tap] of one cell to a result of masks with adjacent channels. Reads whole vectors of taps.
    void store_cell(int64_t n, int64_t group, Rows rows, int64_t cell, const A* from, const Array& result) const;

    // A staged row of logits to masks.
    void normalize_row(A* row, int64_t pitch) const;

    // The gradient of a staged row of masks to that of its logits, in place. `masks` is room for a row.
    void normalize_row_backward(A* grad, const A* logits, A* masks, int64_t pitch) const;

    // Exactly 0 for logits of `count` cells whose output a crop leaves out.
    void clear_cropped(Rows rows, int64_t cell, int count, Order order, A* grad) const;
};

}  // namespace carafepp::CARAFEPP_ISA
