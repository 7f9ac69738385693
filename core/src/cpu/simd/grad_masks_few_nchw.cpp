// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits for few channels in a group, compiled once for each instruction set. A vector holds
// one tap of one output (row, phase) of neighbouring cells.
//
// For a block of rows, the kernel stages the features that the windows reach. For each slice of masks it computes the
// gradients, turns them into those of logits, and writes them.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockFeatures = 64 * 1024;  // elements; in the level 2 cache

// ---- contraction: the taps of a tile ----

template <class A>
struct FewProducts {
    Range tap_rows;     // inside the border
    const A* features;  // of the first tap row, inside or not
    int64_t row_stride, channel_stride;
    int64_t tap_offsets[kMaxKernelSize];
    int kernel_size;
    const A* output;  // its gradients
    int64_t output_channel;
};

// Sums the products of NC channels, with those of the channels before, if there are any. K is the kernel size, or 0 if
// the compiler does not know it.
template <int K, int NC, class A>
__attribute__((noinline)) void grads_of_few_channels(FewProducts<A> at, TapRows<A> grads, int64_t channel) {
    const int k = K > 0 ? K : at.kernel_size;
    const int64_t channel_stride = at.channel_stride;
    for (int64_t q = 0; q < grads.cells; q += kLanes<A>) {
        Vector<A> output[NC];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) output[c] = load(at.output + (channel + c) * at.output_channel + q);
        A* to = grads.tap(at.tap_rows.begin * k) + q;
        const A* row = at.features + channel * channel_stride + at.tap_rows.begin * at.row_stride + q;
        for (int64_t a = at.tap_rows.begin; a < at.tap_rows.end; a++, row += at.row_stride) {
            for_tap_columns<K>(k, [&](int b) __attribute__((always_inline)) {
                const A* const features = row + at.tap_offsets[b];
                Vector<A> sum = channel > 0 ? load(to) : Vector<A>{};
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) sum += output[c] * load(features + c * channel_stride);
                store(sum, to);
                to += grads.step;
            });
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
                             p.taps() * (p.from_logits ? 2 : p.factor.up), grad_masks};
    const int64_t up = p.factor.up, k = p.kernel_size, taps = p.taps(), channels = few.channels;
    const int64_t block_rows = rows_of_block<A>(
        p, cell_rows, (kBlockFeatures / std::max<int64_t>(channels * few.sources_row, 1) - k) / few.down,
        grad_masks.n* p.groups);
    const int64_t blocks = ceil_div(cell_rows, block_rows), items = grad_masks.n * p.groups * blocks;
    const int64_t staged_rows = p.factor.source(block_rows * up - 1) + k;
    const int64_t features_channel = staged_rows * few.sources_row;
    const int64_t features_size = channels * features_channel;
    const int64_t output_size = channels * up * few.slice_cells;  // of a row
    const int64_t scratch_size = features_size + few.rows_together * output_size +
                                 (p.from_logits ? 3 : 1) * few.slice_size();
    const bool non_temporal = wants_non_temporal_stores(grad_masks);

    struct Staged {
        A *features, *output, *grads, *logits, *masks;
        int64_t first_source = 0;
    };

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        const int64_t begin = block * block_rows * up;
        const int64_t end = std::min(begin + block_rows * up, p.from_logits ? cell_rows * up : p.out_h);
        Staged staged;
        staged.features = scratch;
        staged.output = staged.features + features_size;
        staged.grads = staged.output + few.rows_together * output_size;
        staged.logits = staged.grads + few.slice_size();
        staged.masks = staged.logits + few.slice_size();
        if (begin < p.out_h) {
            staged.first_source = p.rows().source(begin);
            few.stage_features(n, group, {begin, std::min(end, p.out_h)}, features_channel, staged.features);
        }
        for (Slice slice = few.first_slice(n, group, {begin, end}); slice.row < end; slice = few.next(slice)) {
            A* const grads = staged.grads + few.place(slice) * few.cells;
            if (slice.row < p.out_h) {
                grads_of_slice(slice, staged, grads);
            } else {
                zero_taps({grads, few.tap_step(), static_cast<int>(taps),
                           static_cast<int>(few.tap_step() - few.place(slice) * few.cells)});
            }
            if (few.is_last_together(slice)) write_slice(slice, staged.grads);
        }
        if (non_temporal) finish_non_temporal_stores();
    }

    void grads_of_slice(const Slice& s, const Staged& staged, A* of_slice) const {
        A* const output = staged.output + few.place(s) * output_size;
        if (s.phase == 0) few.stage_grads(s, output);
        const int64_t top = p.rows().source(s.row) - p.radius();
        FewProducts<A> at;
        at.tap_rows = {std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)};
        if (channels == 0) at.tap_rows = {0, 0};
        at.features = staged.features + (p.rows().source(s.row) - staged.first_source) * few.sources_row + s.cell;
        at.row_stride = few.sources_row;
        at.channel_stride = features_channel;
        at.kernel_size = static_cast<int>(k);
        at.output_channel = up * few.slice_cells;
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            const TapRows<A> grads = few.rows_of_phase(s, phase, of_slice);
            zero_taps(grads.of({0, at.tap_rows.begin * k}));
            zero_taps(grads.of({at.tap_rows.end * k, taps}));
            few.find_taps(phase, at.tap_offsets);
            at.output = output + phase * few.slice_cells;
            for_few_channels<A>(k, channels, [&](auto known, int64_t c, auto count) {
                grads_of_few_channels<known(), count()>(at, grads, c);
            });
            few.zero_outside(grads, phase, s.cell);  // features are 0 there, but grad_output may be Inf or NaN
            if (p.from_logits) turn_into_logits(s, grads, staged);
            few.zero_cropped(grads, few.columns.outputs(phase) - s.cell);
        }
    }

    void turn_into_logits(const Slice& s, const TapRows<A>& grads, const Staged& staged) const {
        if (few.by_softmax()) {
            SlicePrefetch prefetch = few.prefetch_of(few.next(s));
            few.for_parts(s, {0, s.count}, few.kBeyond, staged.logits,
                          [&](int64_t first, const TapRows<const A>& logits) {
                softmax_backward<kTilesTogether<A>>(logits, grads.from(first), staged.masks, first, prefetch);
            });
        } else {
            few.stage_slice(s, staged.logits);
            few.tiles().normalize_row_backward(grads.first, staged.logits, staged.masks, L);
        }
    }

    void zero_taps(const TapRows<A>& outside) const {
        for (int64_t t = 0; t < outside.taps; t++) std::fill_n(outside.tap(t), outside.cells, A{0});
    }

    // ---- write out ----

    void write_slice(const Slice& s, const A* grads) const {
        const Array array = few.taps_of(grad_masks, s);
        const int64_t row = few.row_in_array(s) - few.place(s), factor = few.factor_in_array(), first = s.cell * factor;
        const Range slice_columns = {first, std::min(first + s.count * factor, array.w)};
        const int64_t size = few.place(s) * array.w + slice_columns.size();
        for (int64_t t = 0; t < taps; t++, grads += few.tap_step()) {
            const int64_t channel = s.group * taps + t;
            if (factor == 1 && array.stride_w == 1 && array.dtype == kDtypeOf<A>) {
                A* const to = element<A>(array, s.n, channel, row, first);
                non_temporal ? copy_non_temporal(grads, size, to) : void(std::copy_n(grads, size, to));
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
