// SPDX-License-Identifier: Apache-2.0
// Slices and rows of the kernels for few channels in a group. Masks or logits are most of what these kernels read. They
// stage a slice that stays in the level 1 cache, or read it in place, and use it at once. Columns are in lanes.
#pragma once

#include <algorithm>

#include "cpu/geometry.h"
#include "cpu/mask_blocks.h"
#include "cpu/simd/border.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// Channels that are contracted together, and tiles that are normalised together, to hide latency.
template <class A>
constexpr int kRegisterChannels = std::is_same_v<A, float> ? 4 : 2;
template <class A>
constexpr int kTilesTogether = std::is_same_v<A, float> ? 2 : 1;
template <class A>
constexpr int kCellsTogether = kTilesTogether<A> * kLanes<A>;

// Elements of the sources that a block sums; in the level 2 cache.
constexpr int64_t kBlockSources = 64 * 1024;

// The taps of some neighbouring cells in one phase: [tap][cell]. Cells are a multiple of kCellsTogether.
template <class A>
struct TapRows {
    A* first;
    int64_t step;
    int taps, cells;

    TapRows<const A> read_only() const { return {first, step, taps, cells}; }
    A* tap(int64_t t) const { return first + t * step; }
    TapRows from(int64_t cell) const { return {first + cell, step, taps, cells - static_cast<int>(cell)}; }
    TapRows of(Range some) const { return {tap(some.begin), step, static_cast<int>(some.size()), cells}; }
};

// Calls f(K, channel, N) for N channels at a time. K is the kernel size if it has code of its own, else 0. Convex
// upsampling of one or two floats has it.
template <class A, class F>
CARAFEPP_INLINE void for_few_channels(int64_t kernel_size, int64_t channels, F f) {
    for (int64_t c = 0; c < channels; c += kRegisterChannels<A>) {
        with_count<kRegisterChannels<A>>(static_cast<int>(channels - c), [&](auto count) {
            if constexpr (std::is_same_v<A, float> && count() <= 2) {
                if (kernel_size == 3) return f(std::integral_constant<int, 3>(), c, count);
            }
            f(std::integral_constant<int, 0>(), c, count);
        });
    }
}

// Calls f(b) for the tap columns of a row, unrolled if the compiler knows how many.
template <int K, class F>
CARAFEPP_INLINE void for_tap_columns(int kernel_size, F f) {
    if constexpr (K > 0) {
#pragma GCC unroll 3
        for (int b = 0; b < K; b++) f(b);
    } else {
        for (int b = 0; b < kernel_size; b++) f(b);
    }
}

// The memory of a slice, to prefetch it while the one before is used.
struct SlicePrefetch {
    const char* first = nullptr;
    int64_t tap_bytes = 0, cell_bytes = 0, row_bytes = 0, at = 0;
    int taps = 0;

    // The part of the cells before `cell`.
    CARAFEPP_MEMBER void prefetch_until(int64_t cell) {
        for (const int64_t end = std::min(cell * cell_bytes, row_bytes); at < end; at += 64) {
            const char* line = first + at;
            for (int t = 0; t < taps; t++, line += tap_bytes) __builtin_prefetch(line, 0, 2);
        }
    }
};

// ---- softmax ----

// The numerators of softmax have a factor of 2^-exponent. Their sum is below 1, so their products with features do not
// overflow.
inline int exponent_of_softmax(int64_t taps) {
    return taps > 1 ? 64 - __builtin_clzll(static_cast<uint64_t>(taps)) : 0;
}

template <int N, class A>
CARAFEPP_INLINE void largest_logits(TapRows<const A> logits, int64_t q, Vector<A> (&largest)[N]) {
    constexpr int L = kLanes<A>;
    const A* from = logits.first + q;
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) largest[v] = load(from + v * L);
    for (int t = 1; t < logits.taps; t++) {
        from += logits.step;
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) largest[v] = larger(largest[v], load(from + v * L));
    }
}

// Stages the numerators of masks, and a factor of each cell.
template <int N, class A>
CARAFEPP_INLINE void softmax_of_tiles(TapRows<const A> logits, TapRows<A> masks, int64_t q, A* scales, int exponent) {
    constexpr int L = kLanes<A>;
    Vector<A> largest[N], all[N] = {};
    largest_logits<N, A>(logits, q, largest);
    const A* from = logits.first + q;
    A* mask = masks.first + q;
    for (int t = 0; t < logits.taps; t++, from += logits.step, mask += masks.step) {
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) {
            const Vector<A> e = exp_beside_1(load(from + v * L) - largest[v], exponent);
            store(e, mask + v * L);
            all[v] += e;
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) store(A{1} / all[v], scales + q + v * L);
}

template <int N, class A>
__attribute__((noinline)) void softmax_of_rows(TapRows<const A> logits, TapRows<A> masks, A* scales) {
    const int exponent = exponent_of_softmax(logits.taps);
    for (int64_t q = 0; q < logits.cells; q += N * kLanes<A>) softmax_of_tiles<N>(logits, masks, q, scales, exponent);
}

// Turns the gradients of masks into those of logits. Stages the numerators of masks with the step of `grads`, and a
// factor of each cell.
template <int N, class A>
CARAFEPP_INLINE void softmax_backward_of_tiles(TapRows<const A> logits, TapRows<A> grads, A* masks, A* scales_of,
                                               int64_t q, int exponent) {
    constexpr int L = kLanes<A>;
    Vector<A> largest[N], all[N] = {}, means[N] = {}, scales[N];  // means of the gradients, weighted by the masks
    largest_logits<N, A>(logits, q, largest);
    const A* from = logits.first + q;
    A *mask = masks + q, *grad = grads.first + q;
    for (int t = 0; t < logits.taps; t++, from += logits.step, mask += grads.step, grad += grads.step) {
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) {
            const Vector<A> e = exp_beside_1(load(from + v * L) - largest[v], exponent);
            store(e, mask + v * L);
            all[v] += e;
            means[v] += e * load(grad + v * L);
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) {
        scales[v] = A{1} / all[v];
        store(scales[v], scales_of + q + v * L);
        means[v] *= scales[v] * scales[v];
    }
    mask = masks + q;
    grad = grads.first + q;
    for (int t = 0; t < logits.taps; t++, mask += grads.step, grad += grads.step) {
#pragma GCC unroll 2
        for (int v = 0; v < N; v++)
            store(load(mask + v * L) * (load(grad + v * L) * scales[v] - means[v]), grad + v * L);
    }
}

template <int N, class A>
__attribute__((noinline)) void softmax_backward(TapRows<const A> logits, TapRows<A> grads, A* masks, A* scales,
                                                int64_t first, SlicePrefetch& prefetch_of_slice) {
    SlicePrefetch prefetch = prefetch_of_slice;
    const int exponent = exponent_of_softmax(logits.taps);
    for (int64_t q = 0; q < logits.cells; q += N * kLanes<A>) {
        prefetch.prefetch_until(first + q + N * kLanes<A>);
        softmax_backward_of_tiles<N>(logits, grads, masks, scales, q, exponent);
    }
    prefetch_of_slice = prefetch;
}

// ---- slices ----

// The masks of one row of outputs in neighbouring cells. Logits lie by phase, so a slice has one phase of them. Masks
// have their phases side by side, so a slice has all.
struct Slice {
    int64_t n, group;
    Range rows;  // of the block
    int64_t row, cell, count;
    int64_t phase, phases;
};

template <class A>
struct FewChannels {
    static constexpr int L = kLanes<A>;
    static constexpr int64_t kCells = kCellsTogether<A>;
    static constexpr int64_t kSliceSize = 4096;                      // elements, of float 16 KiB
    static constexpr int64_t kTogether = 512, kSizeTogether = 4608;  // cells and masks of a phase of rows together

    const Problem& p;
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, taps = p.taps();
    const int64_t channels = p.features.c / p.groups;
    const Columns columns{p, up};
    const int64_t cells;                       // of a row
    const int64_t lanes = whole_tiles(cells);  // of a row
    const int64_t slice_phases = p.from_logits ? 1 : up;
    const int64_t slice_cells;
    const int64_t rows_together;  // rows of cells of which a phase is adjacent, in few slices

    // Features are staged as [channel][row][residue][cell], and their gradients are summed so.
    const int64_t residue_stride = whole_tiles(
        std::max(lanes + columns.halo(), whole_tiles(columns.sources(0)) - columns.least_shift));
    const int64_t sources_row = down * residue_stride;

    // `rows_of_slice` are the staged rows of which a slice holds each cell. A phase of rows together is adjacent in
    // `logits`, which may be a gradient.
    FewChannels(const Problem& problem, int64_t all_cells, int64_t rows_of_slice, const Array& logits)
        : p(problem),
          cells(all_cells),
          slice_cells(whole_tiles(share_size(std::max<int64_t>(lanes, 1),
                                             std::max<int64_t>(kSliceSize / rows_of_slice / kCells * kCells, kCells)))),
          rows_together(
              are_together(logits)
                  ? std::max<int64_t>(std::min(kTogether, kSizeTogether / taps) / std::max<int64_t>(lanes, 1), 1)
                  : 1) {}

    bool are_together(const Array& logits) const {
        return by_softmax() && channels <= kRegisterChannels<A> && up <= kMaxFactor && cells <= slice_cells &&
               logits.dtype == kDtypeOf<A> && logits.stride_w == 1 && logits.stride_h == logits.w && logits.w == cells;
    }

    static int64_t whole_tiles(int64_t cells) { return ceil_div(cells, kCells) * kCells; }

    // A staged slice is [tap][phase][cell], with room for those of rows together.
    int64_t tap_step() const { return slice_phases * slice_cells * rows_together; }
    int64_t slice_size() const { return taps * tap_step(); }

    // ---- slices ----

    Slice first_slice(int64_t n, int64_t group, Range rows) const {
        return {n, group, rows, rows.begin, 0, std::min(slice_cells, cells), 0, slice_phases};
    }

    // Which one of the rows of cells together has a slice.
    int64_t place(const Slice& s) const { return (s.row - s.rows.begin) / up % rows_together; }
    bool is_last_together(const Slice& s) const { return place(s) + 1 == rows_together || s.row + up >= s.rows.end; }
    bool is_last_of_row(const Slice& s) const { return s.phase + s.phases == up && s.cell + s.count == cells; }

    // The slice after another. Rows of cells together come first, then phases, cells and rows.
    __attribute__((noinline)) Slice next(Slice s) const {
        if (!is_last_together(s)) {
            s.row += up;
            return s;
        }
        s.row -= place(s) * up;
        s.phase += s.phases;
        if (s.phase < up) return s;
        s.phase = 0;
        s.cell += slice_cells;
        if (s.cell >= cells) {
            s.cell = 0;
            s.row++;
            if (s.row % up == 0) s.row += (rows_together - 1) * up;
        }
        s.count = std::min(slice_cells, cells - s.cell);
        return s;
    }

    // The channels of a slice as the taps of an array of their own.
    __attribute__((noinline)) Array taps_of(const Array& masks, const Slice& s) const {
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
    SlicePrefetch prefetch_of(const Slice& s) const {
        const Array array = taps_of(masks_or_logits(), s);
        const int64_t row = row_in_array(s), first = s.cell * slice_phases, size = itemsize(array.dtype);
        SlicePrefetch prefetch;
        if (row >= array.h || first >= array.w) return prefetch;
        prefetch.first = static_cast<const char*>(array.data) +
                         (s.n * array.stride_n + s.group * taps * array.stride_c + row * array.stride_h +
                          first * array.stride_w) *
                             size;
        prefetch.tap_bytes = array.stride_c * size;
        prefetch.cell_bytes = slice_phases * array.stride_w * size;
        prefetch.row_bytes = std::min(s.count * slice_phases, array.w - first) * array.stride_w * size;
        prefetch.taps = static_cast<int>(taps);
        return prefetch;
    }

    // The rows of a phase of a staged slice.
    TapRows<A> rows_of_phase(const Slice& s, int64_t phase, A* slice) const {
        return {slice + (phase - s.phase) * slice_cells, tap_step(), static_cast<int>(taps),
                static_cast<int>(whole_tiles(s.count))};
    }

    // The last tile of a row of logits, if cells do not fill it. It begins earlier, and has cells twice. Or it goes
    // beyond the row, where the array goes on. Or it is staged.
    enum Tail { kTwice, kBeyond, kStaged };

    // A part of a slice of one phase, from a cell on.
    struct Part {
        int64_t cell;
        TapRows<const A> rows;
    };

    // Finds the parts of a slice. Tiles of the cells `whole` are read in place if they can be; the rest is staged.
    // Returns how many there are.
    __attribute__((noinline)) int find_parts(const Slice& s, Range whole, Tail tail, A* staged,
                                             Part (&parts)[3]) const {
        const Array array = taps_of(masks_or_logits(), s);
        const bool in_place = array.stride_w == 1 && array.dtype == kDtypeOf<A>;
        const int64_t there = std::min({whole.end, columns.outputs(s.phase) - s.cell, s.count});
        const int64_t begin = in_place ? std::min(whole_tiles(std::max<int64_t>(whole.begin, 0)), s.count) : s.count;
        const int64_t follow = array.stride_h == array.w ? (array.h - row_in_array(s)) * array.w - s.cell : 0;
        const bool beyond = tail == kBeyond && in_place && whole_tiles(s.count) <= follow;
        const int64_t end = beyond ? s.count : std::max(begin, there > 0 ? there / kCells * kCells : 0);
        const bool overlap = tail == kTwice && there == s.count && begin < end;
        int count = 0;
        for (const Range part : {Range{0, begin}, Range{begin, end}, Range{end, s.count}}) {
            if (part.size() == 0) continue;
            const bool last = part.begin == end, in_array = part.begin == begin && part.end == end;
            const int64_t cell = last && overlap ? s.count - kCells : part.begin;
            TapRows<const A> rows{staged + part.begin, tap_step(), static_cast<int>(taps),
                                  static_cast<int>(whole_tiles(part.size()))};
            if (in_array || (last && overlap)) {
                rows.first = element<const A>(array, s.n, s.group * taps, row_in_array(s), s.cell + cell);
                rows.step = array.stride_c;
            } else {
                Slice some = s;
                some.cell += part.begin;
                some.count = part.size();
                stage_slice(some, staged + part.begin);
            }
            parts[count++] = {cell, rows};
        }
        return count;
    }

    // Calls f(cell, rows) for each of them.
    template <class F>
    CARAFEPP_MEMBER void for_parts(const Slice& s, Range whole, Tail tail, A* staged, F f) const {
        Part parts[3];
        const int count = find_parts(s, whole, tail, staged, parts);
        for (int part = 0; part < count; part++) f(parts[part].cell, parts[part].rows);
    }

    // Masks that need no normaliser, one phase in a slice.
    bool masks_in_place() const { return slice_phases == 1 && (!p.from_logits || p.normalizer == CARAFEPP_NONE); }

    // Other normalisers take the rows of a slice as a tile of many phases.
    MaskTiles<A> tiles() const { return MaskTiles<A>{p, slice_cells / L}; }

    bool by_softmax() const { return p.from_logits && p.normalizer == CARAFEPP_SOFTMAX; }

    // Stages the masks of a slice, by any normaliser.
    void stage_masks(const Slice& s, A* to) const {
        stage_slice(s, to);
        if (p.from_logits) tiles().normalize_row(to, L);
    }

    // Zeroes the taps of these rows that lie beyond the border.
    __attribute__((noinline)) void zero_outside(const TapRows<A>& rows, int64_t phase, int64_t cell) const {
        for (int64_t q = 0; q < rows.cells; q += L)
            zero_phase_outside(columns, phase, cell + q, rows.first + q, rows.step);
    }

    // Zeroes cells from `outputs` on, which have none or one that a crop leaves out.
    __attribute__((noinline)) void zero_cropped(const TapRows<A>& rows, int64_t outputs) const {
        const int64_t first = std::max<int64_t>(outputs, 0);
        for (int64_t t = 0; t < rows.taps && first < rows.cells; t++)
            std::fill(rows.tap(t) + first, rows.tap(t) + rows.cells, A{0});
    }

    // The offsets of the taps of a phase in a row of staged features.
    void find_taps(int64_t phase, int64_t* offsets) const {
        for (int64_t b = 0; b < k; b++) offsets[b] = columns.offset(columns.tap(phase, b), residue_stride);
    }

    // ---- features ----

    // Stages the rows of features in the windows of rows of outputs; those beyond the border are 0.
    __attribute__((noinline)) void stage_features(int64_t n, int64_t group, Range rows, int64_t channel_stride,
                                                  A* to) const {
        const Range sources = sources_of(p, rows);
        const int64_t top = p.rows().source(rows.begin) - p.radius();
        const int64_t bottom = p.rows().source(rows.end - 1) + p.radius() + 1;
        for (A* of_channel = to; of_channel < to + channels * channel_stride; of_channel += channel_stride) {
            std::fill_n(of_channel, (sources.begin - top) * sources_row, A{0});
            std::fill(of_channel + (sources.end - top) * sources_row, of_channel + (bottom - top) * sources_row, A{0});
        }
        to += (sources.begin - top) * sources_row;
        const Deinterleaved layout{static_cast<int>(down), columns.least_shift, lanes + columns.halo(),
                                   channel_stride,         sources_row,         residue_stride};
        deinterleave_rows(p.features, n, group * channels, channels, sources, layout, to);
    }

    // Stages the cells of a slice of a row of grad_output, as [channel][phase][cell].
    __attribute__((noinline)) void stage_grads(const Slice& s, A* to) const {
        const Deinterleaved layout{static_cast<int>(up), s.cell, s.count, up * slice_cells, 0, slice_cells};
        deinterleave_rows(p.grad_output, s.n, s.group * channels, channels, {s.row, s.row + 1}, layout, to);
    }
};

}  // namespace
}  // namespace carafepp::CARAFEPP_ISA
