// SPDX-License-Identifier: Apache-2.0
// Staging of the masks of a tile, copied or normalised from logits; and the way back for their gradients.
//
// A cell is up x up outputs over down x down sources; the columns of its outputs are its phases. A tile is as many
// neighbouring cells as a vector has lanes. A row of outputs is staged as [tap][phase][cell]: normalising is arithmetic
// on whole vectors. A kernel reads one weight, for an output of one cell, or a vector of them, for all cells. Rows
// [tap][phase] lie `pitch` apart: the lanes of a tile, or of several.
#pragma once

#include "cpu/geometry.h"
#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// The order of the masks of a cell. Tap t of output (row, phase) is at row*row_step + phase*phase_step + t*tap_step.
struct Order {
    int64_t row_step, phase_step, tap_step;
};

// Tiles of an array, of any dtype whose sums are kept in A. `rows` are rows of outputs of one row of cells.
//
//     masks   [N, groups*taps, H', W']
//     logits  [N, groups*taps*up*up, ceil(H/down), ceil(W/down)]
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

    // Stages the masks of `count` cells from `cell` on, as [row][tap][phase][lane]. Lanes beyond them are finite.
    void stage(int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch, A* to) const;

    // Stages them output by output, each with its taps adjacent. Output (row, (cell + q)*up + phase) begins at
    // to + (row - rows.begin)*row_pitch + (q*up + phase)*taps. `tile` is room for the rows of a tile.
    void stage_pixels(int64_t n, int64_t group, Range rows, int64_t cell, int64_t count, A* tile, int64_t row_pitch,
                      A* to) const;

    // Stages an array of such tiles as it is: masks or logits.
    void load_rows(const Array& array, int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch,
                   A* to) const;

    // Writes staged rows to a result of masks; or of logits, with all rows and phases of its cells.
    void store_rows(int64_t n, int64_t group, Range rows, int64_t cell, int count, int64_t pitch, const A* from,
                    const Array& result) const;

    // Writes [row][phase][tap] of one cell to masks with adjacent channels. Reads whole vectors of taps.
    void store_cell(int64_t n, int64_t group, Range rows, int64_t cell, const A* from, const Array& result) const;

    // Turns a staged row of logits into masks.
    void normalize_row(A* row, int64_t pitch) const;

    // Turns the gradient of a staged row of masks into that of its logits. `masks` is room for a row.
    void normalize_row_backward(A* grad, const A* logits, A* masks, int64_t pitch) const;

    // Zeroes the gradients of outputs that a crop leaves out, of `count` cells.
    void zero_cropped_grads(Range rows, int64_t cell, int count, Order order, A* grad) const;
};

}  // namespace carafepp::CARAFEPP_ISA
