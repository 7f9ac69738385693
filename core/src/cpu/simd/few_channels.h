// SPDX-License-Identifier: Apache-2.0
// What the kernels for few channels in a group share. Masks or logits are most of what they read, so they stage them in
// slices that stay in the level 1 cache, and use each at once. Columns are in lanes.
#pragma once

#include <algorithm>

#include "cpu/geometry.h"
#include "cpu/simd/border.h"
#include "cpu/simd/normalize.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int kRegisterChannels = 4;  // contracted together

// The masks of one row of outputs in neighbouring cells. Logits lie by phase, so a slice has one phase of them. Masks
// have their phases side by side, so a slice has all.
struct Slice {
    int64_t n, group, row, cell, count;
    int64_t phase, phases;
};

template <class A>
struct FewChannels {
    static constexpr int L = kLanes<A>;
    static constexpr int64_t kSliceSize = 3072;  // elements, of float 12 KiB

    const Problem& p;
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, taps = p.taps();
    const int64_t channels = p.features.c / p.groups;
    const Columns columns{p, up};
    const int64_t cells;                         // of a row
    const int64_t lanes = whole_vectors(cells);  // of a row
    const int64_t slice_phases = p.from_logits ? 1 : up;
    const int64_t slice_cells;

    // Features are staged as [channel][row][residue][cell], and their gradients are summed so.
    const int64_t residue_stride = whole_vectors(
        std::max(lanes + columns.halo(), whole_vectors(columns.sources(0)) - columns.least_shift));
    const int64_t sources_row = down * residue_stride;

    // `rows_of_slice` are the staged rows of which a slice holds each cell.
    FewChannels(const Problem& problem, int64_t all_cells, int64_t rows_of_slice)
        : p(problem),
          cells(all_cells),
          slice_cells(whole_vectors(
              share_size(std::max<int64_t>(lanes, L), std::max<int64_t>(kSliceSize / rows_of_slice / L * L, L)))) {}

    static int64_t whole_vectors(int64_t elements) { return ceil_div(elements, L) * L; }

    // Of a staged slice, [tap][phase][cell].
    int64_t tap_step() const { return slice_phases * slice_cells; }
    int64_t slice_size() const { return taps * tap_step(); }

    // ---- blocks: some rows of cells of a group ----

    // Rows of a block whose bytes are within reason, while each thread has work.
    int64_t rows_of_block(int64_t rows, int64_t most, int64_t groups_of_images) const {
        const int64_t threads = threads_for(INT32_MAX, p.cost() / L);
        const int64_t fewest = threads > 1 ? ceil_div(4 * threads, groups_of_images) : 1;
        return share_size(rows, std::min(std::max<int64_t>(most, 1), ceil_div(rows, fewest)));
    }

    // ---- slices ----

    Slice first_slice(int64_t n, int64_t group, int64_t row) const {
        return {n, group, row, 0, std::min(slice_cells, cells), 0, slice_phases};
    }

    // The slice after another: of its cells, of its row, of the next row.
    Slice next(Slice s) const {
        s.phase += s.phases;
        if (s.phase < up) return s;
        s.phase = 0;
        s.cell += slice_cells;
        if (s.cell >= cells) {
            s.cell = 0;
            s.row++;
        }
        s.count = std::min(slice_cells, cells - s.cell);
        return s;
    }

    // The channels of a slice as the taps of an array of their own, without outputs that a crop leaves out.
    Array taps_of(const Array& masks, const Slice& s) const {
        Array array = masks;
        if (!p.from_logits) return array;
        const int64_t first = (s.row % up * up + s.phase) * array.stride_c * itemsize(array.dtype);
        array.data = static_cast<char*>(array.data) + first;
        array.stride_c *= up * up;
        return array;
    }
    int64_t row_in_array(const Slice& s) const { return p.from_logits ? s.row / up : s.row; }
    int factor_in_array() const { return static_cast<int>(slice_phases); }
    const Array& masks_or_logits() const { return p.from_logits ? p.logits : p.masks; }

    // Stages a slice of masks or logits. Cells without an output have 0.
    void stage_slice(const Slice& s, A* to) const {
        Array array = taps_of(masks_or_logits(), s);
        if (p.from_logits) array.w = std::min(array.w, columns.outputs(s.phase));
        const int64_t row = row_in_array(s);
        const Deinterleaved layout{factor_in_array(), s.cell, s.count, tap_step(), 0, slice_cells};
        deinterleave_rows(array, s.n, s.group * taps, taps, {row, row + 1}, layout, to);
    }

    // The memory of a slice.
    RowPrefetch prefetch_of(const Slice& s) const {
        const Array array = taps_of(masks_or_logits(), s);
        const int64_t row = row_in_array(s), factor = factor_in_array();
        RowPrefetch prefetch;
        if (row >= array.h) return prefetch;
        with_type_of<A>(array.dtype, [&](auto type) {
            using M = typename decltype(type)::type;
            const M* first = element<const M>(array, s.n, s.group * taps, row, s.cell * factor);
            prefetch = {array, first, std::min(s.count * factor, array.w - s.cell * factor), 1, taps};
        });
        return prefetch;
    }

    // Calls f(lane, of_tile) for each tile of a slice, and prefetches the next one in between.
    template <class F>
    CARAFEPP_MEMBER void for_each_tile(const Slice& s, RowPrefetch& prefetch, int64_t lines_of_tile, F f) const {
        for (int64_t q = 0; q < s.count; q += L) {
            for (int64_t line = 0; line < lines_of_tile; line++) prefetch.prefetch_line();
            f(q);
        }
    }

    // Lines to prefetch with each tile of a slice.
    int64_t lines_of_tile(const Slice& s, const RowPrefetch& prefetch) const {
        return ceil_div(prefetch.lines(), ceil_div(s.count, L) * s.phases);
    }

    // Logits to masks, in place, in the lanes of a tile.
    CARAFEPP_MEMBER void normalize(A* tile) const {
        if (!p.from_logits || p.normalizer == CARAFEPP_NONE) return;
        normalize_taps(p.normalizer, TileTaps<A>{tile, tile, nullptr, taps, tap_step()});
    }

    // ---- features ----

    void stage_features(int64_t n, int64_t group, Range sources, int64_t channel_stride, A* to) const {
        const Deinterleaved layout{static_cast<int>(down), columns.least_shift, lanes + columns.halo(), channel_stride,
                                   sources_row,            residue_stride};
        deinterleave_rows(p.features, n, group * channels, channels, sources, layout, to);
    }

    // Stages the cells of a slice of a row of grad_output, as [channel][phase][cell].
    void stage_grads(const Slice& s, A* to) const {
        const Deinterleaved layout{static_cast<int>(up), s.cell, s.count, up * slice_cells, 0, slice_cells};
        deinterleave_rows(p.grad_output, s.n, s.group * channels, channels, {s.row, s.row + 1}, layout, to);
    }
};

}  // namespace
}  // namespace carafepp::CARAFEPP_ISA
