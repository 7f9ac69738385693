// SPDX-License-Identifier: Apache-2.0
// Index arithmetic of the CPU kernels: which sources an output reads, and which outputs read a source.
//
// Column q*up + phase of the outputs lies in cell q. It is centred on source column q*down + source(phase) + offset.
// The kernels stage a row of sources by residue, the column modulo down, and a row of outputs by phase. A tap of a
// phase then reads one residue, `shift` cells on, for any up and down. So all inner loops run over neighbouring cells.
#pragma once

#include <algorithm>
#include <vector>

#include "problem.h"

namespace carafepp {

constexpr int kMaxFactor = 16;  // up and down of the kernels with tables of phases

// The half-open range [begin, end).
struct Range {
    int64_t begin = 0, end = 0;
    constexpr int64_t size() const { return end > begin ? end - begin : 0; }
};

// How many columns of a row are `residue` modulo `factor`.
constexpr int64_t columns_of(int64_t width, int64_t factor, int64_t residue) {
    return residue < width ? ceil_div(width - residue, factor) : 0;
}

// Which residue each tap of each phase reads, and how many cells on.
struct Columns {
    struct Tap {
        int residue, shift;
        Range inside;  // cells in which the tap reads a column of the row
    };

    const int64_t up, down, kernel_size, phases;
    const int64_t width, out_width;  // W, W'
    const int64_t cells;             // of a row of outputs
    const int least_shift, most_shift;
    Range inside;            // cells whose taps all read columns of the row
    std::vector<Tap> table;  // [phase][b]

    Columns(const Problem& problem, int64_t phases);
    ~Columns();  // out of line: compiled once, without vector instructions

    const Tap& tap(int64_t phase, int64_t b) const { return table.data()[phase * kernel_size + b]; }

    // The cells, from 0 on, with a source column of a residue or an output of a phase.
    int64_t sources(int64_t residue) const { return columns_of(width, down, residue); }
    int64_t outputs(int64_t phase) const { return columns_of(out_width, up, phase); }

    // The cells around a tile that its windows reach, those of both sides together.
    int halo() const { return most_shift - least_shift; }

    // The element that the tap reads for the first staged cell, in rows [residue][cell] staged from `least_shift` on.
    int64_t offset(const Tap& tap, int64_t residue_stride) const {
        return tap.residue * residue_stride + tap.shift - least_shift;
    }
};

// Neighbouring outputs [begin, end) of one axis that are centred on one source: they share a window. `source` counts
// from the source of output 0.
struct SharedWindow {
    int64_t begin, end, source;
};

namespace {  // each instruction set has its own copies

// The size of even shares of `all`, none larger than `most`.
static inline int64_t share_size(int64_t all, int64_t most) {
    return ceil_div(all, ceil_div(all, std::max<int64_t>(most, 1)));
}

// Share `index` of [0, size) in `count` shares that differ by 1 at most.
static inline Range share_of(int size, int index, int count) {
    return {size * index / count, size * (index + 1) / count};
}

// Rows of sources, inside the border, that the windows of rows of outputs hold.
static inline Range sources_of(const Problem& p, Range outputs) {
    return {std::max<int64_t>(p.rows().source(outputs.begin) - p.radius(), 0),
            std::min(p.rows().source(outputs.end - 1) + p.radius() + 1, p.features.h)};
}

// Rows of outputs whose windows hold some of these rows of sources.
static inline Range outputs_of(const Problem& p, Range sources) {
    return {std::max<int64_t>(p.rows().first_output(sources.begin - p.radius()), 0),
            std::min(p.rows().first_output(sources.end + p.radius()), p.out_h)};
}

// How many shared windows `outputs` neighbours have. At most ceil(up/down) outputs share one.
static inline int64_t shared_windows_in(const Factor& factor, int64_t outputs) {
    return factor.up < factor.down ? outputs : factor.source(outputs - 1) + 1;
}

static inline SharedWindow shared_window(const Factor& factor, int64_t index, int64_t outputs) {
    if (factor.up < factor.down) return {index, index + 1, factor.source(index)};
    return {factor.first_output(index), std::min(factor.first_output(index + 1), outputs), index};
}

}  // namespace

// The shared windows of a cell along one axis: a table, as the divisions cost as much as a tap.
struct CellWindows {
    SharedWindow windows[kMaxFactor];
    int count;

    CellWindows(const Factor& factor, int64_t phases);
};

}  // namespace carafepp
