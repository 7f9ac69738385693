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
struct FewProducts {
    TapRows<A> sums;    // those of tap rows inside the border
    const A* features;  // of the first of these tap rows
    int64_t row_stride, channel_stride;
    int64_t tap_offsets[kMaxKernelSize];
    int kernel_size;
    const A* grads;
    int64_t grads_channel;
    SlicePrefetch* prefetch;
};

// Sums the products of NC channels, with those of the channels before, if there are any. K is the kernel size, or 0 if
// the compiler does not know it.
template <int K, int NC, class A>
__attribute__((noinline)) void grads_of_few_channels(const FewProducts<A>& at, int64_t channel) {
    constexpr int L = kLanes<A>;
    const int k = K > 0 ? K : at.kernel_size, tap_rows = at.sums.taps / k;
    const int64_t channel_stride = at.channel_stride, step = at.sums.step;
    int64_t tap_offsets[K > 0 ? K : kMaxKernelSize];
    std::copy_n(at.tap_offsets, k, tap_offsets);
    SlicePrefetch prefetch = *at.prefetch;
    for (int64_t q = 0; q < at.sums.cells; q += L) {
        prefetch.prefetch_tile(q / L);
        Vector<A> grads[NC];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) grads[c] = load(at.grads + (channel + c) * at.grads_channel + q);
        A* sums = at.sums.first + q;
        const A* row = at.features + channel * channel_stride + q;
        for (int a = 0; a < tap_rows; a++, row += at.row_stride) {
#pragma GCC unroll 5
            for (int b = 0; b < k; b++, sums += step) {
                const A* const features = row + tap_offsets[b];
                Vector<A> sum = channel > 0 ? load(sums) : Vector<A>{};
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) sum += grads[c] * load(features + c * channel_stride);
                store(sum, sums);
            }
        }
    }
    *at.prefetch = prefetch;
}

// ---- normalisers ----

// Turns the gradients of masks into those of logits, which are then overwritten.
template <int N, class A>
CARAFEPP_INLINE void softmax_backward_of_tiles(const TapRows<A>& logits, const TapRows<A>& grads, int64_t q) {
    constexpr int L = kLanes<A>;
    A scales[N * L];
    softmax_of_tiles<N>({logits.first + q, logits.step, logits.taps, N * L}, 0, scales);
    Vector<A> means[N] = {};  // of the gradient, weighted by the masks
    const A* from = logits.first + q;
    A* to = grads.first + q;
    for (int t = 0; t < logits.taps; t++, from += logits.step, to += grads.step) {
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) means[v] += load(from + v * L) * load(to + v * L);
    }
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) means[v] *= load(scales + v * L);
    from = logits.first + q;
    to = grads.first + q;
    for (int t = 0; t < logits.taps; t++, from += logits.step, to += grads.step) {
#pragma GCC unroll 2
        for (int v = 0; v < N; v++)
            store(load(from + v * L) * load(scales + v * L) * (load(to + v * L) - means[v]), to + v * L);
    }
}

// `masks` is room for a tile.
template <class A>
__attribute__((noinline)) void normalize_rows_backward(carafepp_normalizer normalizer, const TapRows<A>& logits,
                                                       const TapRows<A>& grads, A* masks) {
    constexpr int L = kLanes<A>;
    int64_t q = 0;
    if (normalizer == CARAFEPP_SOFTMAX) {
        for (; q + kTilesTogether * L <= grads.cells; q += kTilesTogether * L)
            softmax_backward_of_tiles<kTilesTogether>(logits, grads, q);
        for (; q < grads.cells; q += L) softmax_backward_of_tiles<1>(logits, grads, q);
        return;
    }
    for (; q < grads.cells; q += L) {
        const TileTaps<A> tile{logits.first + q, masks, grads.first + q, grads.taps, grads.step};
        normalize_taps(normalizer, tile);
        normalize_taps_backward(normalizer, tile);
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
        SlicePrefetch prefetch;
        if (p.from_logits) {
            few.stage_slice(s, staged.logits);
            prefetch = few.prefetch_of(few.next(s));
        }
        const int64_t top = p.rows().source(s.row) - p.radius();
        const Range tap_rows = channels > 0 ? Range{std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)}
                                            : Range{0, 0};
        FewProducts<A> at;
        at.row_stride = few.sources_row;
        at.channel_stride = features_channel;
        at.kernel_size = static_cast<int>(k);
        at.grads_channel = up * few.slice_cells;
        at.features = staged.features + (top + tap_rows.begin - staged.sources.begin) * few.sources_row + s.cell;
        at.prefetch = &prefetch;
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            for (int64_t b = 0; b < k; b++)
                at.tap_offsets[b] = few.columns.offset(few.columns.tap(phase, b), few.residue_stride);
            const TapRows<A> grads = few.rows_of_phase(s, phase, staged.grads);
            zero_taps(grads, {0, tap_rows.begin * k});
            zero_taps(grads, {tap_rows.end * k, taps});
            at.sums = grads;
            at.sums.first = grads.tap(tap_rows.begin * k);
            at.sums.taps = static_cast<int>(tap_rows.size() * k);
            at.grads = staged.output + phase * few.slice_cells;
            with_kernel_size<A>(k, [&](auto known) {
                for_few_channels(channels, [&](int64_t c, auto count) {
                    grads_of_few_channels<known(), count()>(at, c);
                });
            });
            few.zero_outside(grads, phase, s.cell);  // features are 0 there, but grad_output may be Inf or NaN
            if (p.from_logits)
                normalize_rows_backward(p.normalizer, few.rows_of_phase(s, phase, staged.logits), grads, staged.masks);
            zero_cropped(grads, few.columns.outputs(phase) - s.cell);
        }
    }

    void zero_taps(const TapRows<A>& grads, Range outside) const {
        for (int64_t t = outside.begin; t < outside.end; t++) std::fill_n(grads.tap(t), grads.cells, A{0});
    }

    // Zeroes cells from `outputs` on, which a crop leaves out.
    void zero_cropped(const TapRows<A>& grads, int64_t outputs) const {
        const int64_t first = std::max<int64_t>(outputs, 0);
        for (int64_t t = 0; t < taps && first < grads.cells; t++)
            std::fill(grads.tap(t) + first, grads.tap(t) + grads.cells, A{0});
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
