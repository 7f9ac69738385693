// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits for few channels in a group, compiled once for each instruction set. A vector holds
// one tap of one output (row, phase) of neighbouring cells.
//
// For a block of rows, the kernel stages the features that the windows reach. It computes the gradients of a slice of
// masks a tile at a time, turns them into those of logits at once, and writes the slice.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockFeatures = 64 * 1024;  // elements; in the level 2 cache

// ---- contraction: the taps of a tile ----

template <class A>
struct FewGradRegisterTile {
    A* sums;
    int64_t tap_step;
    const A* features;  // of the first tap row inside the border
    int64_t row_stride, channel_stride;
    const int64_t* tap_offsets;
    int kernel_size, tap_rows;
    const A* grads;
    int64_t grads_channel;
};

// Sums the products of some channels; with those of the channels before, if there are any.
template <int NC, class A>
__attribute__((noinline)) void grads_of_few_channels(const FewGradRegisterTile<A>& tile, int64_t channel) {
    Vector<A> grads[NC];
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) grads[c] = load(tile.grads + (channel + c) * tile.grads_channel);
    A* sums = tile.sums;
    const A* row = tile.features + channel * tile.channel_stride;
    for (int a = 0; a < tile.tap_rows; a++, row += tile.row_stride) {
        for (int b = 0; b < tile.kernel_size; b++, sums += tile.tap_step) {
            const A* const features = row + tile.tap_offsets[b];
            Vector<A> sum = channel > 0 ? load(sums) : Vector<A>{};
#pragma GCC unroll 4
            for (int c = 0; c < NC; c++) sum += grads[c] * load(features + c * tile.channel_stride);
            store(sum, sums);
        }
    }
}

// ---- the kernel ----

template <class Sums>
struct GradMasksFewNchw {
    using A = Sums;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_masks;
    // With logits also the rows and cells that a crop leaves out.
    const int64_t cell_rows = p.from_logits ? p.logits.h : ceil_div(p.out_h, p.factor.up);
    const FewChannels<A> few{p, p.from_logits ? p.logits.w : ceil_div(p.out_w, p.factor.up),
                             p.taps() * (p.from_logits ? 2 : p.factor.up)};
    const int64_t up = p.factor.up, k = p.kernel_size, taps = p.taps(), channels = few.channels;
    const int64_t block_rows = few.rows_of_block(
        cell_rows, (kBlockFeatures / std::max<int64_t>(channels * few.sources_row, 1) - k) / few.down,
        grad_masks.n * p.groups);
    const int64_t blocks = ceil_div(cell_rows, block_rows), items = grad_masks.n * p.groups * blocks;
    const int64_t staged_rows = p.factor.source(block_rows * up - 1) + k;
    const int64_t features_channel = staged_rows * few.sources_row;
    const int64_t features_size = channels * features_channel;
    const int64_t output_size = channels * up * few.slice_cells;
    const int64_t scratch_size = features_size + output_size + (p.from_logits ? 3 : 1) * few.slice_size();
    const bool non_temporal = wants_non_temporal_stores(grad_masks);

    struct Staged {
        A *features, *output, *grads, *logits, *masks;
        Range sources;
    };

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        const int64_t begin = block * block_rows * up;
        const int64_t end = std::min(begin + block_rows * up, p.from_logits ? cell_rows * up : p.out_h);
        Staged staged;
        staged.features = scratch;
        staged.output = staged.features + features_size;
        staged.grads = staged.output + output_size;
        staged.logits = staged.grads + few.slice_size();
        staged.masks = staged.logits + few.slice_size();
        if (begin < p.out_h) {
            staged.sources = sources_of(p, {begin, std::min(end, p.out_h)});
            few.stage_features(n, group, staged.sources, features_channel, staged.features);
        }
        for (Slice slice = few.first_slice(n, group, begin); slice.row < end; slice = few.next(slice)) {
            if (slice.row < p.out_h) {
                grads_of_slice(slice, staged);
            } else {
                std::fill_n(staged.grads, few.slice_size(), A{0});
            }
            write_slice(slice, staged.grads);
        }
        if (non_temporal) finish_non_temporal_stores();
    }

    void grads_of_slice(const Slice& s, const Staged& staged) const {
        if (s.phase == 0) few.stage_grads(s, staged.output);
        RowPrefetch prefetch;
        if (p.from_logits) {
            few.stage_slice(s, staged.logits);
            prefetch = few.prefetch_of(few.next(s));
        }
        const int64_t lines = few.lines_of_tile(s, prefetch);
        const int64_t top = p.rows().source(s.row) - p.radius();
        const Range tap_rows = channels > 0 ? Range{std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)}
                                            : Range{0, 0};
        int64_t tap_offsets[kMaxKernelSize];
        FewGradRegisterTile<A> tile;
        tile.tap_step = few.tap_step();
        tile.row_stride = few.sources_row;
        tile.channel_stride = features_channel;
        tile.tap_offsets = tap_offsets;
        tile.kernel_size = static_cast<int>(k);
        tile.tap_rows = static_cast<int>(tap_rows.size());
        tile.grads_channel = up * few.slice_cells;
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            for (int64_t b = 0; b < k; b++)
                tap_offsets[b] = few.columns.offset(few.columns.tap(phase, b), few.residue_stride);
            A* const of_phase = staged.grads + (phase - s.phase) * few.slice_cells;
            const int64_t outputs = few.columns.outputs(phase) - s.cell;
            few.for_each_tile(s, prefetch, lines, [&](int64_t q) {
                A* const grads = of_phase + q;
                zero_taps(grads, {0, tap_rows.begin * k});
                zero_taps(grads, {tap_rows.end * k, taps});
                tile.sums = grads + tap_rows.begin * k * tile.tap_step;
                tile.features = staged.features + (top + tap_rows.begin - staged.sources.begin) * few.sources_row +
                                s.cell + q;
                tile.grads = staged.output + phase * few.slice_cells + q;
                for (int64_t c = 0; c < channels; c += kRegisterChannels) {
                    with_count<kRegisterChannels>(static_cast<int>(channels - c),
                                                  [&](auto count) { grads_of_few_channels<count()>(tile, c); });
                }
                // Features are 0 there, but grad_output may be Inf or NaN.
                zero_phase_outside(few.columns, phase, s.cell + q, grads, tile.tap_step);
                if (p.from_logits) turn_into_logits(grads, staged.logits + q, staged.masks);
                if (q + L > outputs) zero_cropped(grads, outputs - q);
            });
        }
    }

    void zero_taps(A* grads, Range outside) const {
        for (int64_t t = outside.begin; t < outside.end; t++) store(Vector<A>{}, grads + t * few.tap_step());
    }

    // Turns the gradient of the masks of a tile into that of its logits.
    CARAFEPP_MEMBER void turn_into_logits(A* grads, const A* logits, A* masks) const {
        const TileTaps<A> tile{logits, masks, grads, taps, few.tap_step()};
        normalize_taps(p.normalizer, tile);
        normalize_taps_backward(p.normalizer, tile);
    }

    // Zeroes lanes from `outputs` on, which a crop leaves out.
    void zero_cropped(A* grads, int64_t outputs) const {
        const int end = static_cast<int>(std::max<int64_t>(outputs, 0));
        for (int64_t t = 0; t < taps; t++, grads += few.tap_step()) store(load_between(grads, 0, end), grads);
    }

    // ---- write out ----

    void write_slice(const Slice& s, const A* grads) const {
        const Array array = few.taps_of(grad_masks, s);
        const int64_t row = few.row_in_array(s), factor = few.factor_in_array(), first = s.cell * factor;
        const Range slice_columns = {first, std::min(first + s.count * factor, array.w)};
        for (int64_t t = 0; t < taps; t++, grads += few.tap_step()) {
            const int64_t channel = s.group * taps + t;
            if (non_temporal && factor == 1 && array.stride_w == 1 && array.dtype == kDtypeOf<A>) {
                copy_non_temporal(grads, slice_columns.size(), element<A>(array, s.n, channel, row, first));
            } else {
                interleave_row(grads, few.slice_cells, static_cast<int>(factor), array, s.n, channel, row,
                               slice_columns);
            }
        }
    }
};

}  // namespace

void grad_masks_few_nchw(const Problem& problem, const Array& grad_masks) {
    with_accumulator(problem.features.dtype, [&](auto sums) {
        run_items(GradMasksFewNchw<typename decltype(sums)::type>{problem, grad_masks});
    });
}

}  // namespace carafepp::CARAFEPP_ISA
