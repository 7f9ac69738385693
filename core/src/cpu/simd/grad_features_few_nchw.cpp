// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for few channels in a group, compiled once for each instruction set. A vector holds the same
// output (row, phase) of neighbouring cells.
//
// All windows of a cell lie in one larger window. For each row of cells, the kernel sums products at each place of that
// window. Then it adds these sums to their sources. A block is some rows of sources, and reads all cells whose windows
// touch them. Each source is summed in the same order in any block.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockSources = 64 * 1024;  // elements; in the level 2 cache

// ---- contraction: the taps of a tile ----

template <class A>
struct FewScatter {
    Range tap_rows;  // that touch the block
    A* sums;         // [row][column][channel][cell] of the window of a cell, from the first of these tap rows on
    int64_t sums_row, sums_column, sums_channel;
    int kernel_size;
    bool adds;        // to the sums; otherwise they are these products
    const A* output;  // its gradients
    int64_t output_channel;
    SlicePrefetch* prefetch;
};

// Adds the products of NC channels. The masks lack a factor of each cell if there are scales. K is the kernel size, or
// 0 if the compiler does not know it. `first` is the cell of the first mask.
template <int K, int NC, class A>
__attribute__((noinline)) void add_grads_of_few_channels(FewScatter<A> at, TapRows<const A> masks, const A* scales,
                                                         int64_t first, int64_t channel) {
    const int k = K > 0 ? K : at.kernel_size;
    const int64_t sums_column = at.sums_column, sums_channel = at.sums_channel;
    SlicePrefetch prefetch = *at.prefetch;
    for (int64_t q = 0; q < masks.cells; q += kLanes<A>) {
        prefetch.prefetch_until(first + q + kLanes<A>);
        Vector<A> output[NC];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) {
            output[c] = load(at.output + (channel + c) * at.output_channel + first + q);
            if (scales) output[c] *= load(scales + q);
        }
        const A* mask = masks.tap(at.tap_rows.begin * k) + q;
        A* row = at.sums + channel * sums_channel + first + q;
        for (int64_t a = at.tap_rows.begin; a < at.tap_rows.end; a++, row += at.sums_row) {
            A* sums = row;
            for_tap_columns<K>(k, [&](int) __attribute__((always_inline)) {
                const Vector<A> of_tap = load(mask);
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) {
                    A* const sum = sums + c * sums_channel;
                    store((at.adds ? load(sum) : Vector<A>{}) + of_tap * output[c], sum);
                }
                mask += masks.step;
                sums += sums_column;
            });
        }
    }
    *at.prefetch = prefetch;
}

// ---- the kernel ----

template <class Sums>
struct GradFeaturesFewNchw {
    using A = Sums;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_features;
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, channels = p.features.c / p.groups;
    const int64_t window = p.factor.source(up - 1) + k;  // rows and columns of the window of a cell
    const FewChannels<A> few{p, ceil_div(p.out_w, up),
                             p.taps() * (p.from_logits ? 1 : up) + window * window * channels + channels * up, Array()};
    const int64_t block_rows = rows_of_block<A>(p, grad_features.h,
                                                kBlockSources / std::max<int64_t>(channels * few.sources_row, 1),
                                                grad_features.n* p.groups);
    const int64_t blocks = ceil_div(grad_features.h, block_rows), items = grad_features.n * p.groups * blocks;
    const int64_t source_row_size = channels * few.sources_row;  // [row][channel][residue][cell]
    const int64_t sums_channel = few.slice_cells, sums_column = channels * sums_channel,
                  sums_row = window * sums_column, sums_size = window * sums_row;
    const int64_t grads_size = channels * up * few.slice_cells;
    const int64_t scratch_size = block_rows * source_row_size + few.slice_size() + few.slice_cells + sums_size +
                                 grads_size;

    struct Staged {
        A *sources, *masks, *sums, *grads;
        Range rows;  // of sources
    };

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        Staged staged;
        staged.rows = {block * block_rows, std::min((block + 1) * block_rows, grad_features.h)};
        staged.sources = scratch;
        staged.masks = staged.sources + block_rows * source_row_size;
        staged.sums = staged.masks + few.slice_size() + few.slice_cells;
        staged.grads = staged.sums + sums_size;
        std::fill_n(staged.sources, staged.rows.size() * source_row_size, A{0});
        const Range outputs = outputs_of(p, staged.rows);
        for (int64_t row = outputs.begin; row < outputs.end; row = (row / up + 1) * up)
            add_row_of_cells(n, group, {row, std::min((row / up + 1) * up, outputs.end)}, staged);
        write_sources(n, group, staged);
    }

    // Adds the rows of outputs of one row of cells.
    void add_row_of_cells(int64_t n, int64_t group, Range rows, const Staged& staged) const {
        for (int64_t cell = 0; cell < few.cells; cell += few.slice_cells) {
            if (up > 1) std::fill_n(staged.sums, sums_size, A{0});
            Slice slice = few.first_slice(n, group, rows);
            slice.cell = cell;
            slice.count = std::min(few.slice_cells, few.cells - cell);
            for (; slice.row < rows.end; slice.row++) {
                few.stage_grads(slice, staged.grads);
                for (slice.phase = 0; slice.phase < up; slice.phase += slice.phases) add_slice(slice, staged);
                slice.phase = 0;
            }
            shift_sums(rows.begin / up, slice, staged);
        }
    }

    // The slice that is staged after another one.
    Slice next(Slice s) const {
        s.phase += s.phases;
        if (s.phase < up) return s;
        s.phase = 0;
        if (++s.row % up != 0) return s;
        s.row -= up;
        s.phase = up - s.phases;
        return few.next(s);
    }

    void add_slice(const Slice& s, const Staged& staged) const {
        SlicePrefetch prefetch = few.prefetch_of(next(s));
        const int64_t top = p.rows().source(s.row) - p.radius();
        const int64_t window_row = p.factor.source(s.row) - s.row / up * down;
        FewScatter<A> at;
        at.tap_rows = {std::max<int64_t>(staged.rows.begin - top, 0), std::min(k, staged.rows.end - top)};
        at.sums_row = sums_row;
        at.sums_column = sums_column;
        at.sums_channel = sums_channel;
        at.kernel_size = static_cast<int>(k);
        at.output_channel = up * few.slice_cells;
        at.adds = up > 1;
        at.prefetch = &prefetch;
        const auto add_phase = [&](int64_t phase, const TapRows<const A>& masks, const A* scales, int64_t first) {
            at.sums = staged.sums + (window_row + at.tap_rows.begin) * sums_row + p.factor.source(phase) * sums_column;
            at.output = staged.grads + phase * few.slice_cells;
            for_few_channels<A>(k, channels, [&](auto known, int64_t c, auto count) {
                add_grads_of_few_channels<known(), count()>(at, masks, scales, first, c);
            });
        };
        if (few.by_softmax()) {
            A* const scales = staged.masks + few.slice_size();
            const TapRows<A> masks = few.rows_of_phase(s, s.phase, staged.masks);
            few.for_parts(s, {0, s.count}, few.kBeyond, staged.masks,
                          [&](int64_t first, const TapRows<const A>& logits) {
                softmax_of_rows<kTilesTogether<A>>(logits, masks.from(first), scales + first);
            });
            // Masks without an output may be NaN.
            const int64_t outputs = few.columns.outputs(s.phase) - s.cell;
            few.zero_cropped(masks, outputs);
            few.zero_cropped({scales, 0, 1, masks.cells}, outputs);
            add_phase(s.phase, masks.read_only(), scales, 0);
        } else if (few.masks_in_place()) {
            few.for_parts(
                s, {0, s.count}, few.kStaged, staged.masks,
                [&](int64_t first, const TapRows<const A>& masks) { add_phase(s.phase, masks, nullptr, first); });
        } else {
            few.stage_masks(s, staged.masks);
            for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++)
                add_phase(phase, few.rows_of_phase(s, phase, staged.masks).read_only(), nullptr, 0);
        }
    }

    // Adds the sums of a row of cells to their sources. Sources beyond the sides are in the halo.
    void shift_sums(int64_t cell_row, const Slice& s, const Staged& staged) const {
        const int64_t top = cell_row * down + p.offset_h - p.radius();
        for (int64_t a = 0; a < window; a++) {
            const int64_t i = top + a;
            if (i < staged.rows.begin || i >= staged.rows.end) continue;
            A* const row = staged.sources + (i - staged.rows.begin) * source_row_size;
            for (int64_t b = 0; b < window; b++) {
                const int64_t column = b + p.offset_w - p.radius();
                const int64_t residue = floor_mod(column, down), shift = floor_div(column, down);
                for (int64_t c = 0; c < channels; c++) {
                    const A* const sums = staged.sums + a * sums_row + b * sums_column + c * sums_channel;
                    A* const to = row + c * few.sources_row + residue * few.residue_stride + s.cell + shift -
                                  few.columns.least_shift;
                    for (int64_t q = 0; q < s.count; q += L) store(load(to + q) + load(sums + q), to + q);
                }
            }
        }
    }

    // ---- write out ----

    void write_sources(int64_t n, int64_t group, const Staged& staged) const {
        const A* row = staged.sources - few.columns.least_shift;
        for (int64_t i = staged.rows.begin; i < staged.rows.end; i++) {
            for (int64_t c = 0; c < channels; c++, row += few.sources_row) {
                interleave_row(row, few.residue_stride, static_cast<int>(down), grad_features, n, group * channels + c,
                               i, {0, grad_features.w});
            }
        }
    }
};

}  // namespace

void grad_features_few_nchw(const Problem& problem, const Array& grad_features) {
    with_accumulator(problem.features.dtype, [&](auto sums) {
        run_items(GradFeaturesFewNchw<typename decltype(sums)::type>{problem, grad_features});
    });
}

}  // namespace carafepp::CARAFEPP_ISA
