// SPDX-License-Identifier: Apache-2.0
//
// The forward with adjacent channels, compiled once for each instruction set. A vector holds channels of one pixel. For
// up >= down, up*up outputs are centred on one source and read one window. A vector of features serves them all. If one
// output is centred on a source, neighbours in a run share what their windows have in common. First comes the plan.
// Each item then stages the masks of a tile, contracts the taps of its windows in register tiles, and writes.
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
    int run;               // cells of one output each with overlapping windows, contracted together
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
        run = up == 1 && down < p.kernel_size ? 2 : 1;
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
struct ForwardTile {
    int64_t n, group, groups;
    SharedWindow rows;
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
TileWeights<Accumulator<T>> stage_tile(const ReassembleNhwc<T>& plan, const ForwardTile& at, int64_t cell, int count,
                                       Accumulator<T>* scratch) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    const Problem& p = plan.p;
    const int64_t up = plan.up, taps = plan.taps;
    A *const tile = scratch, *const pixels = scratch + plan.tile_size;
    const Range rows{at.rows.begin, at.rows.end};
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

// The outputs centred on one source, and their window. In a run, each output is centred on a source of its own. Its
// window begins `shift` columns behind the one before it, and `window` is the union.
template <class T>
struct WindowOutputs {
    using A = Accumulator<T>;
    static constexpr int kMost = kMaxFactor * kMaxFactor;

    PixelWindow<const T> window;
    PixelPrefetch<T> prefetch;
    int kernel_size, shift;
    int64_t tap_stride;  // of weights
    bool non_temporal;
    int count = 0;
    const A* weights[kMost];  // of each output
    T* outputs[kMost];

    void step_to_next_group(int64_t channels, int64_t taps) {
        window.corner += channels;
        prefetch.first += channels;
        for (int o = 0; o < count; o++) {
            weights[o] += taps;
            outputs[o] += channels;
        }
    }
};

// Adds the pixel x to the sums of outputs [kFirst, kLast), times weight_of(output).
template <int kFirst, int kLast, bool kTail, int P, int NV, class T, class F>
CARAFEPP_INLINE void add_tap(const T* x, int tail, F weight_of, Vector<Accumulator<T>> (&sums)[P][NV]) {
    Vector<Accumulator<T>> features[NV];
    read_channels<NV, kTail>(x, tail, features);
    if constexpr (kLast - kFirst > 1) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) features[v] = in_register(features[v]);
    }
#pragma GCC unroll 8
    for (int o = kFirst; o < kLast; o++) {
        const Vector<Accumulator<T>> weight = splat(weight_of(o));
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) sums[o][v] += weight * features[v];
    }
}

// Adds a row of the union of the windows of a run, from `Segment` on. A segment is the columns that the same outputs
// read: the first output alone, both, the second alone.
template <bool kTail, int Segment = 0, int NV, class T>
CARAFEPP_INLINE void add_row_of_run(const WindowOutputs<T>& at, const T* x, const Accumulator<T>* (&weights)[2], int b,
                                    int tail, Vector<Accumulator<T>> (&sums)[2][NV]) {
    constexpr int kFirst = Segment / 2, kLast = std::min(Segment + 1, 2);
    const int end = kLast < 2 ? at.shift : at.kernel_size + kFirst * at.shift;
    for (const int last = std::min(end, at.window.b_end); b < last; b++, x += at.window.pixel_stride) {
        add_tap<kFirst, kLast, kTail>(x, tail, [&](int o) { return *weights[o]; }, sums);
        for (int o = 0; o < 2; o++) weights[o] += at.tap_stride;
    }
    if constexpr (Segment < 2) add_row_of_run<kTail, Segment + 1>(at, x, weights, b, tail, sums);
}

// A register tile: `P` outputs from `first` on, or a run; `NV` vectors of channels from `c` on.
template <int P, bool kRun, int NV, bool kTail, class T>
CARAFEPP_INLINE void sum_over_taps(const WindowOutputs<T>& at, int first, int64_t c, int tail) {
    using A = Accumulator<T>;
    Vector<A> sums[P][NV] = {};
    const PixelWindow<const T>& window = at.window;
    const int64_t tap_stride = at.tap_stride, row_taps = at.kernel_size * tap_stride;
    const T* row = window.pixel(window.a_begin, window.b_begin) + c;
    int64_t tap = window.a_begin * row_taps + window.b_begin * tap_stride;
    for (int a = window.a_begin; a < window.a_end; a++, row += window.row_stride, tap += row_taps) {
        if (a - window.a_begin < at.prefetch.rows) prefetch_row<NV>(at.prefetch, a - window.a_begin, c);
        const A* weights[P];  // of the first column in the window of each output, or in the union
#pragma GCC unroll 4
        for (int o = 0; o < P; o++) weights[o] = at.weights[first + o] + tap - o * at.shift * tap_stride;
        if constexpr (kRun) {
            add_row_of_run<kTail>(at, row, weights, window.b_begin, tail, sums);
        } else {
            const T* x = row;
            for (int b = window.b_begin; b < window.b_end; b++, x += window.pixel_stride) {
                add_tap<0, P, kTail>(x, tail, [&](int o) { return *weights[o]; }, sums);
#pragma GCC unroll 4
                for (int o = 0; o < P; o++) weights[o] += tap_stride;
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < P; o++) write_channels<NV, kTail>(sums[o], at.outputs[first + o] + c, tail, at.non_temporal);
}

// All channels of a group, for `P` outputs. Register tiles have as many vectors as there are registers for; the last
// ones have fewer, and a tail.
template <int P, bool kRun, class T>
__attribute__((noinline)) void sum_channels_over_taps(const WindowOutputs<T>& at, int first, int64_t channels) {
    constexpr int L = kLanes<Accumulator<T>>;
    constexpr int kMost = P == 1 || (kRun && kVectorRegisters == 32) ? 8 : P == 4 && kVectorRegisters == 16 ? 2 : 4;
    int64_t c = 0;
    for (; c + kMost * L <= channels; c += kMost * L) sum_over_taps<P, kRun, kMost, false>(at, first, c, 0);
    if (kMost > 4 && c + 4 * L <= channels) {
        sum_over_taps<P, kRun, 4, false>(at, first, c, 0);
        c += 4 * L;
    }
    if (kMost > 2 && c + 2 * L <= channels) {
        sum_over_taps<P, kRun, 2, false>(at, first, c, 0);
        c += 2 * L;
    }
    if (c + L <= channels) {
        sum_over_taps<P, kRun, 1, false>(at, first, c, 0);
        c += L;
    }
    if (c < channels) sum_over_taps<P, kRun, 1, true>(at, first, c, static_cast<int>(channels - c));
}

template <class T>
void reassemble_window(const WindowOutputs<T>& at, int64_t channels) {
    if (at.shift > 0) return sum_channels_over_taps<2, true>(at, 0, channels);
    int first = 0;
    for (; first + 4 <= at.count; first += 4) sum_channels_over_taps<4, false>(at, first, channels);
    for (; first + 2 <= at.count; first += 2) sum_channels_over_taps<2, false>(at, first, channels);
    if (first < at.count) sum_channels_over_taps<1, false>(at, first, channels);
}

// The groups of a tile, one after the other.
template <class T>
void reassemble_groups(const ReassembleNhwc<T>& plan, int64_t groups, WindowOutputs<T>& at) {
    for (; groups > 0; groups--) {
        reassemble_window(at, plan.channels);
        at.step_to_next_group(plan.channels, plan.taps);
    }
}

// The rows that the next row of windows reads first: as many pixels as the cells have sources.
template <class T>
PixelPrefetch<T> pixel_prefetch(const ReassembleNhwc<T>& plan, const ForwardTile& at, int64_t cell, int cell_count) {
    const Array& features = plan.p.features;
    const int64_t row = at.rows.source + plan.p.offset_h + plan.p.radius() + 1;
    const int64_t rows = std::min(ceil_div(plan.down, plan.up), features.h - row);
    return {element<const T>(features, at.n, at.group * plan.channels, row, cell * plan.down), features.stride_h,
            features.stride_w, static_cast<int>(rows), static_cast<int>(cell_count * plan.down)};
}

template <class T>
void set_window(const ReassembleNhwc<T>& plan, const ForwardTile& item, int64_t column, int64_t tap_stride, int shift,
                int outputs, WindowOutputs<T>& at) {
    at.window = window_of<const T>(plan.p, plan.p.features, item.n, item.group * plan.channels, item.rows.source,
                                   column, shift * (outputs - 1));
    at.kernel_size = static_cast<int>(plan.p.kernel_size);
    at.shift = shift;
    at.tap_stride = tap_stride;
    at.non_temporal = plan.non_temporal;
}

// All outputs of one cell, the q-th of its tile, window by window.
template <class T>
void reassemble_cell(const ReassembleNhwc<T>& plan, const ForwardTile& item, int64_t cell,
                     const TileWeights<Accumulator<T>>& weights, int64_t q) {
    const SharedWindow& rows = item.rows;
    for (int g = 0; g < plan.column_windows.count; g++) {
        const SharedWindow& columns = plan.column_windows.windows[g];
        WindowOutputs<T> at;
        set_window(plan, item, cell * plan.down + columns.source, weights.tap_stride, 0, 1, at);
        if (g == 0) at.prefetch = pixel_prefetch(plan, item, cell, 1);
        const int64_t end = std::min<int64_t>(columns.end, plan.p.out_w - cell * plan.up);
        for (int64_t row = rows.begin; row < rows.end; row++) {
            for (int64_t phase = columns.begin; phase < end; phase++) {
                at.weights[at.count] = weights.first + (row - rows.begin) * weights.row_stride +
                                       q * weights.cell_stride + phase * weights.phase_stride;
                at.outputs[at.count++] = element<T>(plan.output, item.n, item.group * plan.channels, row,
                                                    cell * plan.up + phase);
            }
        }
        reassemble_groups(plan, item.groups, at);
    }
}

// The outputs of a run of neighbouring cells, which have one each.
template <class T>
void reassemble_run(const ReassembleNhwc<T>& plan, const ForwardTile& item, int64_t cell,
                    const TileWeights<Accumulator<T>>& weights, int64_t q) {
    WindowOutputs<T> at;
    set_window(plan, item, cell * plan.down, weights.tap_stride, static_cast<int>(plan.down), plan.run, at);
    at.prefetch = pixel_prefetch(plan, item, cell, plan.run);
    at.count = plan.run;
    for (int o = 0; o < plan.run; o++) {
        at.weights[o] = weights.first + (q + o) * weights.cell_stride;
        at.outputs[o] = element<T>(plan.output, item.n, item.group * plan.channels, item.rows.begin, cell + o);
    }
    reassemble_groups(plan, item.groups, at);
}

template <class T>
void ReassembleNhwc<T>::run_item(int64_t item, A* scratch) const {
    const int64_t n = item / row_windows / parts, first = item / row_windows % parts * part;
    const int64_t end = std::min(first + part, p.groups);
    const SharedWindow rows = shared_window(p.factor, item % row_windows, p.out_h);
    for (int64_t cell = 0; cell < cells; cell += tile_cells) {
        const int64_t count = std::min(tile_cells, cells - cell);
        for (int64_t group = first; group < end; group += tile_groups) {
            const ForwardTile at{n, group, std::min(tile_groups, end - group), rows};
            const TileWeights<A> weights = stage_tile(*this, at, cell, static_cast<int>(count), scratch);
            int64_t q = 0;
            for (; run > 1 && q + run <= count; q += run) reassemble_run(*this, at, cell + q, weights, q);
            for (; q < count; q++) reassemble_cell(*this, at, cell + q, weights, q);
        }
    }
    if (non_temporal) finish_non_temporal_stores();
}

}  // namespace

void reassemble_nhwc(const Problem& problem, const Array& output) { run_kernel<ReassembleNhwc>(problem, output); }

void reassemble_any(const Problem& problem, const Array& output) { run_on_images<ReassembleNhwc>(problem, output); }

}  // namespace carafepp::CARAFEPP_ISA
