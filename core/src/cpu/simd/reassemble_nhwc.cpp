// SPDX-License-Identifier: Apache-2.0
//
// The forward with adjacent channels, compiled once for each instruction set. A vector holds channels of one pixel. For
// up >= down, up*up outputs are centred on one source and read one window. A vector of features serves two or four of
// them. If one output is centred on a source and channels are few, two neighbours share what their windows have in
// common.
// First comes the plan. Each item then stages the masks of a tile, contracts the taps of its windows in register tiles,
// and writes.
#include <algorithm>
#include <cassert>

#include "cpu/geometry.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/masks_nhwc.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// ---- plan ----

constexpr int64_t kMostLogitsOfCell = 64 * 1024;  // in scratch: at most half of it

template <class T>
struct ReassembleNhwc {
    using A = Accumulator<T>;
    static constexpr int64_t L = kLanes<A>;
    static constexpr Result kResult = kReassemble;

    const Problem& p;
    const Array& output;
    MaskTiles<A> masks;
    CellWindows column_windows;  // of a cell
    int64_t up, down, taps;
    int64_t channels;     // of a group
    int64_t part, parts;  // groups of an item; number of such parts
    int64_t cells;        // of a row of outputs
    int64_t row_windows;  // rows of windows in an image
    int64_t window_rows;  // of outputs that share a row of windows, at most
    bool non_temporal;
    bool runs;             // two cells of one output each, whose windows overlap, are contracted together
    bool masks_in_place;   // read where they are
    bool logits_in_place;  // normalised without a transposition
    bool logits_of_cells;  // the same, a cell at a time, each tap in vectors of its own
    int64_t tile_cells, tile_groups;
    int64_t tile_size;    // [row][tap][phase][lane], or the logits of a cell
    int64_t pixels_size;  // [cell][row][phase][tap], or in the order of logits
    int64_t items, scratch_size;

    ReassembleNhwc(const Problem& problem, const Array& result, [[maybe_unused]] int64_t scratch_bytes = kScratchBytes)
        : p(problem), output(result), masks{p, std::min(p.factor.up, p.out_w)}, column_windows(p.factor, masks.phases) {
        up = p.factor.up;
        down = p.factor.down;
        taps = p.taps();
        channels = p.features.c / p.groups;
        part = groups_of_item(p.groups, channels);
        parts = ceil_div(p.groups, part);
        cells = ceil_div(p.out_w, up);
        row_windows = shared_windows_in(p.factor, p.out_h);
        window_rows = ceil_div(up, down);
        non_temporal = takes_non_temporal_stores<T>(output, channels);
        masks_in_place = !p.from_logits && p.masks.stride_c == 1 && p.masks.dtype == kDtypeOf<A>;
        logits_in_place = p.from_logits && p.logits.stride_c == 1 && (up == 1 || down == 1) &&
                          CellMasks<A>::fits(up * up);
        // One output alone has enough sums to hide latency only in whole register tiles.
        runs = up == 1 && down < p.kernel_size && channels % (8 * L) != 0;
        logits_of_cells = p.from_logits && p.logits.stride_c == 1 && !logits_in_place && 3 * window_rows * up > L &&
                          taps * up * up <= kMostLogitsOfCell;
        tile_cells = masks_in_place ? cells : logits_of_cells ? 1 : L;
        tile_groups = masks_in_place ? part : 1;
        tile_size = std::max(window_rows * masks.row_size(L), logits_of_cells ? (taps + L) * up * up : 0);
        pixels_size = masks_in_place    ? 0
                      : logits_of_cells ? taps * ceil_div(window_rows * up, L) * L
                                        : tile_cells * ceil_div(window_rows * up * taps, L) * L;
        items = output.n * parts * row_windows;
        scratch_size = tile_size + pixels_size;
        assert(scratch_size * int64_t{sizeof(A)} <= scratch_bytes);
    }

    void run_item(int64_t item, A* scratch) const;
};

// A tile in the rows of outputs that share a row of windows, from `group` on.
template <class T>
struct ForwardTile {
    int64_t n, group, groups;
    Range rows;                 // of outputs
    int tap_rows;               // inside the borders
    int64_t first_tap;          // of these rows
    const T* features;          // column 0 of the first of them
    T* outputs;                 // column 0
    PixelPrefetch<T> prefetch;  // of rows that the next row of windows reads first
};

// ---- staging ----

// The weights of a tile. Rows count from the item's first. Tap t of output (row, phase) of the q-th cell is
// first[row*row_stride + q*cell_stride + phase*phase_stride + t*tap_stride].
template <class A>
struct TileWeights {
    const A* first;
    int64_t row_stride, cell_stride, phase_stride, tap_stride;
};

// The masks of `count` cells from `cell` on, in the cheapest order. Uses all of scratch.
template <class T>
TileWeights<Accumulator<T>> stage_tile(const ReassembleNhwc<T>& plan, const ForwardTile<T>& at, int64_t cell, int count,
                                       Accumulator<T>* scratch) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    const Problem& p = plan.p;
    const int64_t up = plan.up, taps = plan.taps;
    A *const tile = scratch, *const pixels = scratch + plan.tile_size;
    const Range rows = at.rows;
    if (plan.masks_in_place) {
        return {element<const A>(p.masks, at.n, at.group * taps, rows.begin, cell * up), p.masks.stride_h,
                up * p.masks.stride_w, p.masks.stride_w, 1};
    }
    if (plan.logits_in_place) {
        const CellMasks<A> cell_masks(p.normalizer, taps, up * up);
        cell_masks.normalize(p.logits, {at.n, at.group * taps * up * up, rows.begin / up, cell}, count, pixels);
        return {pixels, up, cell_masks.size, 1, up * up};
    }
    if (plan.logits_of_cells) {
        const int64_t lanes = ceil_div(rows.size() * up, L) * L;
        CellMasks<A>(CARAFEPP_NONE, taps, up * up)
            .normalize(p.logits, {at.n, at.group * taps * up * up, rows.begin / up, cell}, count, tile);
        const A* from = tile + rows.begin % up * up;
        for (A* tap = pixels; tap < pixels + taps * lanes; tap += lanes, from += up * up) {
            for (int64_t k = 0; k < lanes; k += L) store(load(from + k), tap + k);
        }
        MaskTiles<A>(p, lanes / L).normalize_row(pixels, L);
        return {pixels, up, 0, 1, lanes};
    }
    // With other strides, a transposition takes longer than reading the taps one vector apart.
    if ((p.from_logits ? p.logits : p.masks).stride_c != 1) {
        plan.masks.stage(at.n, at.group, rows, cell, count, L, tile);
        return {tile, plan.masks.row_size(L), 1, L, plan.masks.phases * L};
    }
    const int64_t row_stride = L * up * taps;
    plan.masks.stage_pixels(at.n, at.group, rows, cell, count, tile, row_stride, pixels);
    return {pixels, row_stride, up * taps, taps, 1};
}

// ---- contraction ----

// The outputs centred on one source, and the taps of their window that are inside the borders. In a run, each of two
// outputs is centred on a source of its own. The window is then the union of theirs.
template <class T>
struct WindowOutputs {
    using A = Accumulator<T>;
    static constexpr int kMost = kMaxFactor * kMaxFactor;

    const T* first;  // pixel of the first tap
    int64_t row_stride, pixel_stride;
    int64_t row_taps, tap_stride;  // of weights
    int rows, columns;             // of taps, inside the borders
    int alone, behind;             // columns that only the first output of a run reads, and only the second
    PixelPrefetch<T> prefetch;
    bool non_temporal;
    int count;
    const A* weights[kMost];  // of the first tap, for each output
    T* outputs[kMost];

    void step_to_next_group(int64_t channels, int64_t taps) {
        first += channels;
        prefetch.first += channels;
        for (int o = 0; o < count; o++) {
            weights[o] += taps;
            outputs[o] += channels;
        }
    }
};

// Adds `count` columns of a row of taps to the sums of outputs [kFirst, kLast) of P. Steps behind them.
template <int kFirst, int kLast, bool kTail, int P, int NV, class T>
CARAFEPP_INLINE void add_columns(const WindowOutputs<T>& at, int count, int o, int tail, const T*& x, int64_t& tap,
                                 Vector<Accumulator<T>> (&sums)[P][NV]) {
    Vector<Accumulator<T>> features[NV];
    for (; count > 0; count--, x += at.pixel_stride, tap += at.tap_stride) {
        read_channels<NV, kTail>(x, tail, features);
        if constexpr (kLast - kFirst > 1) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) features[v] = in_register(features[v]);
        }
#pragma GCC unroll 8
        for (int q = kFirst; q < kLast; q++) {
            const Vector<Accumulator<T>> weight = splat(at.weights[o + q][tap]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) sums[q][v] += weight * features[v];
        }
    }
}

// A register tile: `P` outputs from `o` on, or a run; `NV` vectors of channels from `c` on.
template <int P, bool kRun, int NV, bool kTail, class T>
CARAFEPP_INLINE void sum_over_taps(const WindowOutputs<T>& at, int o, int64_t c, int tail) {
    Vector<Accumulator<T>> sums[P][NV] = {};
    for (int row = 0; row < at.prefetch.rows; row++) prefetch_row<NV>(at.prefetch, row, c);
    const T* row = at.first + c;
    int64_t row_tap = 0;
    for (int rows = at.rows; rows > 0; rows--, row += at.row_stride, row_tap += at.row_taps) {
        const T* x = row;
        int64_t tap = row_tap;
        if constexpr (kRun) {
            add_columns<0, 1, kTail>(at, at.alone, o, tail, x, tap, sums);
            add_columns<0, 2, kTail>(at, at.columns - at.alone - at.behind, o, tail, x, tap, sums);
            add_columns<1, 2, kTail>(at, at.behind, o, tail, x, tap, sums);
        } else {
            add_columns<0, P, kTail>(at, at.columns, o, tail, x, tap, sums);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < P; q++) write_channels<NV, kTail>(sums[q], at.outputs[o + q] + c, tail, at.non_temporal);
}

// The channels of a group from `c` on, for `P` outputs. Register tiles have as many vectors as there are registers for:
// with 16 registers four outputs have 12 sums, which hide latency, and 7 loads for 12 products. The last tiles have
// fewer vectors, and a tail.
template <int P, bool kRun, class T>
__attribute__((noinline)) void sum_channels_over_taps(const WindowOutputs<T>& at, int o, int64_t channels,
                                                      int64_t c = 0) {
    constexpr int L = kLanes<Accumulator<T>>;
    constexpr int kMost = P == 1 || kVectorRegisters == 32 ? 8 : P == 4 ? 3 : 4;
    for (; c + kMost * L <= channels; c += kMost * L) sum_over_taps<P, kRun, kMost, false>(at, o, c, 0);
    if (kMost > 4 && c + 4 * L <= channels) {
        sum_over_taps<P, kRun, 4, false>(at, o, c, 0);
        c += 4 * L;
    }
    if (c + 2 * L <= channels) {
        sum_over_taps<P, kRun, 2, false>(at, o, c, 0);
        c += 2 * L;
    }
    if (c + L <= channels) {
        sum_over_taps<P, kRun, 1, false>(at, o, c, 0);
        c += L;
    }
    if (c < channels) sum_over_taps<P, kRun, 1, true>(at, o, c, static_cast<int>(channels - c));
}

// The same for four outputs, which mostly lie in two rows. Non-temporal stores in turns to two rows take up to three
// times as long, if these are a multiple of 4 KiB apart. So some channels are staged, and leave output by output.
template <class T>
void sum_channels_of_four(WindowOutputs<T>& at, int o, int64_t channels) {
    constexpr int64_t L = kLanes<Accumulator<T>>, kStaged = 12 * L;
    if (!at.non_temporal) return sum_channels_over_taps<4, false>(at, o, channels);
    T staged[4][kStaged];
    T* outputs[4];
    std::copy_n(at.outputs + o, 4, outputs);
    at.non_temporal = false;
    for (int64_t c = 0; c < channels; c += kStaged) {
        const int64_t end = std::min(c + kStaged, channels);
        for (int q = 0; q < 4; q++) at.outputs[o + q] = staged[q] - c;
        sum_channels_over_taps<4, false>(at, o, end, c);
        for (int q = 0; q < 4; q++) {
            for (int64_t k = c; k < end; k += L) {
                Vector<Accumulator<T>> values[1];
                read_channels<1, false>(staged[q] + k - c, 0, values);
                write_channels<1, false>(values, outputs[q] + k, 0, true);
            }
        }
    }
    at.non_temporal = true;
    std::copy_n(outputs, 4, at.outputs + o);
}

// The groups of a tile, one after the other. With many registers a pair of outputs, which mostly lies in one row, has
// sums enough.
template <class T>
void reassemble_groups(const ReassembleNhwc<T>& plan, int64_t groups, WindowOutputs<T>& at) {
    while (true) {
        int o = 0;
        if constexpr (kVectorRegisters == 16 && !std::is_same_v<T, BFloat16>) {  // which has pairs of vectors
            for (; o + 4 <= at.count; o += 4) sum_channels_of_four(at, o, plan.channels);
        }
        for (; o + 2 <= at.count; o += 2) {
            at.alone + at.behind > 0 ? sum_channels_over_taps<2, true>(at, o, plan.channels)
                                     : sum_channels_over_taps<2, false>(at, o, plan.channels);
        }
        if (o < at.count) sum_channels_over_taps<1, false>(at, o, plan.channels);
        if (--groups == 0) return;
        at.step_to_next_group(plan.channels, plan.taps);
    }
}

// All outputs of `count` cells from `cell` on, window by window.
template <class T>
void reassemble_cells(const ReassembleNhwc<T>& plan, const ForwardTile<T>& tile, int64_t cell, int64_t count,
                      const TileWeights<Accumulator<T>>& weights) {
    const Problem& p = plan.p;
    const int64_t pixel_stride = p.features.stride_w, output_stride = plan.output.stride_w;
    const int64_t first_left = p.offset_w - p.radius();
    WindowOutputs<T> at;
    at.rows = tile.tap_rows;
    at.pixel_stride = pixel_stride;
    at.tap_stride = weights.tap_stride;
    at.row_stride = p.features.stride_h;
    at.row_taps = p.kernel_size * weights.tap_stride;
    at.prefetch = tile.prefetch;
    at.non_temporal = plan.non_temporal;
    const Accumulator<T>* of_cell = weights.first + tile.first_tap * weights.tap_stride;
    int run = 1;
    for (const int64_t end = cell + count; cell < end; cell += run, of_cell += run * weights.cell_stride) {
        run = plan.runs && cell + 2 <= end ? 2 : 1;
        const int64_t shift = (run - 1) * plan.down;
        at.prefetch.columns = static_cast<int>(run * plan.down);
        const int64_t first_column = cell * plan.down, first_output = cell * plan.up;
        for (int g = 0; g < plan.column_windows.count; g++) {
            const SharedWindow& columns = plan.column_windows.windows[g];
            const int64_t left = first_left + first_column + columns.source;
            const int64_t first = std::max<int64_t>(-left, 0);
            const int64_t last = std::min(p.kernel_size + shift, p.features.w - left);
            at.columns = static_cast<int>(last - first);
            at.alone = static_cast<int>(std::max<int64_t>(std::min(shift, last) - first, 0));
            at.behind = static_cast<int>(std::max<int64_t>(last - std::max(first, p.kernel_size), 0));
            at.first = tile.features + (left + first) * pixel_stride;
            at.prefetch.first = tile.prefetch.first + first_column * pixel_stride;
            at.prefetch.rows = g == 0 ? tile.prefetch.rows : 0;
            at.count = 0;
            const Accumulator<T>* of_row = of_cell + first * weights.tap_stride;
            T* row = tile.outputs + first_output * output_stride;
            const int64_t outputs_end = std::min(run > 1 ? run : columns.end, p.out_w - first_output);
            const int64_t step = run > 1 ? weights.cell_stride - shift * weights.tap_stride : weights.phase_stride;
            for (int64_t i = tile.rows.size(); i > 0; i--) {
                for (int64_t column = columns.begin; column < outputs_end; column++) {
                    at.weights[at.count] = of_row + column * step;
                    at.outputs[at.count++] = row + column * output_stride;
                }
                of_row += weights.row_stride;
                row += plan.output.stride_h;
            }
            reassemble_groups(plan, tile.groups, at);
        }
    }
}

// Prefetches the rows that the next row of windows reads first: as many pixels as a cell has sources.
template <class T>
ForwardTile<T> tile_of(const ReassembleNhwc<T>& plan, int64_t n, int64_t group, int64_t groups,
                       const SharedWindow& shared) {
    const Problem& p = plan.p;
    const Array& features = p.features;
    const int64_t channel = group * plan.channels, top = shared.source + p.offset_h - p.radius();
    const int64_t next = top + p.kernel_size, first = std::max<int64_t>(-top, 0);
    return {n,
            group,
            groups,
            {shared.begin, shared.end},
            static_cast<int>(std::min(p.kernel_size, features.h - top) - first),
            first * p.kernel_size,
            element<const T>(features, n, channel, top + first, 0),
            element<T>(plan.output, n, channel, shared.begin, 0),
            {element<const T>(features, n, channel, next, 0), features.stride_h, features.stride_w,
             static_cast<int>(std::min(ceil_div(plan.down, plan.up), features.h - next)), 0}};
}

template <class T>
void ReassembleNhwc<T>::run_item(int64_t item, A* scratch) const {
    const int64_t n = item / row_windows / parts, first = item / row_windows % parts * part;
    const int64_t end = std::min(first + part, p.groups);
    const SharedWindow rows = shared_window(p.factor, item % row_windows, p.out_h);
    for (int64_t cell = 0; cell < cells; cell += tile_cells) {
        const int64_t count = std::min(tile_cells, cells - cell);
        for (int64_t group = first; group < end; group += tile_groups) {
            const ForwardTile<T> tile = tile_of(*this, n, group, std::min(tile_groups, end - group), rows);
            reassemble_cells(*this, tile, cell, count, stage_tile(*this, tile, cell, static_cast<int>(count), scratch));
        }
    }
    if (non_temporal) finish_non_temporal_stores();
}

}  // namespace

void reassemble_nhwc(const Problem& problem, const Array& output) { run_kernel<ReassembleNhwc>(problem, output); }

void reassemble_any(const Problem& problem, const Array& output) { run_on_images<ReassembleNhwc>(problem, output); }

}  // namespace carafepp::CARAFEPP_ISA
