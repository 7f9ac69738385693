// SPDX-License-Identifier: Apache-2.0
//
// The forward for few channels in a group, compiled once for each instruction set. A vector holds the same output (row,
// phase) of neighbouring cells.
//
// For a block of rows, the kernel stages the features that the windows reach. Then it contracts slices of masks or
// logits, and writes each row of outputs once it is whole. Softmax needs no masks in memory: each numerator is
// contracted as it is computed.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockFeatures = 64 * 1024;  // elements; in the level 2 cache

// ---- contraction: the taps of a tile ----

template <class A>
struct FewContraction {
    Range tap_rows;     // inside the border
    const A* features;  // of the first tap row, inside or not
    int64_t row_stride, channel_stride;
    int64_t tap_offsets[kMaxKernelSize];
    int kernel_size;
    A* outputs;
    int64_t output_channel;
    SlicePrefetch* prefetch;
};

// Adds the products of one tap of N tiles and NC channels.
template <int N, int NC, class A>
CARAFEPP_INLINE void add_tap(const Vector<A> (&masks)[N], const A* features, int64_t channel_stride,
                             Vector<A> (&sums)[N][NC]) {
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) {
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) sums[v][c] += masks[v] * load(features + c * channel_stride + v * kLanes<A>);
    }
}

// Contracts masks. `first` is the cell of the first of them.
template <int NC, class A>
__attribute__((noinline)) void reassemble_few_channels(FewContraction<A> at, TapRows<const A> masks, int64_t first,
                                                       int64_t channel) {
    SlicePrefetch prefetch = *at.prefetch;
    const int64_t channel_stride = at.channel_stride;
    for (int64_t q = 0; q < masks.cells; q += kLanes<A>) {
        prefetch.prefetch_until(first + q + kLanes<A>);
        Vector<A> sums[1][NC] = {};
        const A* mask = masks.tap(at.tap_rows.begin * at.kernel_size) + q;
        const A* row = at.features + channel * channel_stride + at.tap_rows.begin * at.row_stride + first + q;
        for (int64_t a = at.tap_rows.begin; a < at.tap_rows.end; a++, row += at.row_stride) {
            for (int b = 0; b < at.kernel_size; b++, mask += masks.step)
                add_tap<1, NC, A>({load(mask)}, row + at.tap_offsets[b], channel_stride, sums);
        }
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) store(sums[0][c], at.outputs + (channel + c) * at.output_channel + first + q);
    }
    *at.prefetch = prefetch;
}

// Contracts softmax of logits. Taps beyond the border need no care: their masks are finite, or all masks are NaN. K is
// the kernel size, or 0 if the compiler does not know it.
template <int K, int N, int NC, class A>
CARAFEPP_INLINE void reassemble_logits_of_tiles(const FewContraction<A>& at, TapRows<const A> logits, int64_t first,
                                                int64_t q, int64_t channel, int exponent) {
    constexpr int L = kLanes<A>;
    const int k = K > 0 ? K : at.kernel_size;
    const int64_t channel_stride = at.channel_stride;
    Vector<A> largest[N], all[N] = {}, sums[N][NC] = {}, masks[N];
    largest_logits<N, A>(logits, q, largest);
    const A* from = logits.first + q;
    const A* row = at.features + channel * channel_stride + first + q;
    for (int a = 0; a < k; a++, row += at.row_stride) {
        for_tap_columns<K>(k, [&](int b) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int v = 0; v < N; v++) {
                masks[v] = exp_beside_1(load(from + v * L) - largest[v], exponent);
                all[v] += masks[v];
            }
            from += logits.step;
            add_tap<N, NC, A>(masks, row + at.tap_offsets[b], channel_stride, sums);
        });
    }
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) {
        const Vector<A> scale = A{1} / all[v];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++)
            store(sums[v][c] * scale, at.outputs + (channel + c) * at.output_channel + first + q + v * L);
    }
}

// `first` is the cell of the first logit.
template <int K, int NC, class A>
__attribute__((noinline)) void reassemble_few_logits(FewContraction<A> at, TapRows<const A> logits, int64_t first,
                                                     int64_t channel) {
    const int exponent = exponent_of_softmax(logits.taps);
    SlicePrefetch prefetch = *at.prefetch;
    for (int64_t q = 0; q < logits.cells; q += kCellsTogether<A>) {
        prefetch.prefetch_until(first + q + kCellsTogether<A>);
        reassemble_logits_of_tiles<K, kTilesTogether<A>, NC>(at, logits, first, q, channel, exponent);
    }
    *at.prefetch = prefetch;
}

// ---- the kernel ----

template <class Sums>
struct ReassembleFewNchw {
    using A = Sums;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& output;
    const FewChannels<A> few{p, ceil_div(p.out_w, p.factor.up), p.taps() * (p.from_logits ? 1 : p.factor.up), p.logits};
    const int64_t up = p.factor.up, k = p.kernel_size, channels = few.channels;
    const int64_t cell_rows = ceil_div(p.out_h, up);
    const int64_t block_rows = rows_of_block<A>(
        p, cell_rows, (kBlockFeatures / std::max<int64_t>(channels * few.sources_row, 1) - k) / few.down,
        output.n* p.groups);
    const int64_t blocks = ceil_div(cell_rows, block_rows), items = output.n * p.groups * blocks;
    const int64_t staged_rows = p.factor.source(block_rows * up - 1) + k;
    const int64_t features_channel = staged_rows * few.sources_row;
    const int64_t features_size = channels * features_channel;
    const int64_t sums_channel = up * few.lanes;  // [channel][phase][cell], a row of outputs
    const int64_t sums_size = channels * sums_channel;
    const int64_t scratch_size = features_size + few.slice_size() + few.rows_together * sums_size;

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        const Range rows = {block * block_rows * up, std::min((block + 1) * block_rows * up, p.out_h)};
        A *const features = scratch, *const masks = features + features_size, *const sums = masks + few.slice_size();
        few.stage_features(n, group, rows, features_channel, features);
        Slice slice = few.first_slice(n, group, rows);
        while (slice.row < rows.end) {
            const Slice next = few.next(slice);
            A* const of_row = sums + few.place(slice) * sums_size;
            contract_slice(slice, next, features, p.rows().source(rows.begin), masks, of_row);
            if (few.is_last_of_row(slice)) write_row(slice, of_row);
            slice = next;
        }
    }

    void contract_slice(const Slice& s, const Slice& next, const A* features, int64_t first_source, A* masks,
                        A* sums) const {
        SlicePrefetch prefetch = few.prefetch_of(next);
        const int64_t top = p.rows().source(s.row) - p.radius();
        FewContraction<A> at;
        at.tap_rows = {std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)};
        at.features = features + (p.rows().source(s.row) - first_source) * few.sources_row + s.cell;
        at.row_stride = few.sources_row;
        at.channel_stride = features_channel;
        at.kernel_size = static_cast<int>(k);
        at.output_channel = sums_channel;
        at.prefetch = &prefetch;
        if (few.by_softmax() && channels <= kRegisterChannels<A>) {
            few.find_taps(s.phase, at.tap_offsets);
            at.outputs = sums + s.phase * few.lanes + s.cell;
            few.for_parts(s, {0, s.count}, few.kTwice, masks, [&](int64_t first, const TapRows<const A>& logits) {
                for_few_channels<A>(k, channels, [&](auto known, int64_t c, auto count) {
                    reassemble_few_logits<known(), count()>(at, logits, first, c);
                });
            });
            return;
        }
        if (few.masks_in_place()) {
            few.find_taps(s.phase, at.tap_offsets);
            at.outputs = sums + s.phase * few.lanes + s.cell;
            const Range whole = {few.columns.inside.begin - s.cell, few.columns.inside.end - s.cell};
            few.for_parts(s, whole, few.kTwice, masks, [&](int64_t first, const TapRows<const A>& rows) {
                if (rows.first == masks + first)
                    few.zero_outside({masks + first, rows.step, rows.taps, rows.cells}, s.phase, s.cell + first);
                contract_masks(at, rows, first);
            });
            return;
        }
        few.stage_masks(s, masks);
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            const TapRows<A> rows = few.rows_of_phase(s, phase, masks);
            few.zero_outside(rows, phase, s.cell);
            few.find_taps(phase, at.tap_offsets);
            at.outputs = sums + phase * few.lanes + s.cell;
            contract_masks(at, rows.read_only(), 0);
        }
    }

    __attribute__((noinline)) void contract_masks(const FewContraction<A>& at, const TapRows<const A>& masks,
                                                  int64_t first) const {
        for_few_channels<A>(
            0, channels, [&](auto, int64_t c, auto count) { reassemble_few_channels<count()>(at, masks, first, c); });
    }

    void write_row(const Slice& s, const A* sums) const {
        for (int64_t c = 0; c < channels; c++) {
            interleave_row(sums + c * sums_channel, few.lanes, static_cast<int>(up), output, s.n,
                           s.group * channels + c, s.row, {0, p.out_w});
        }
    }
};

}  // namespace

void reassemble_few_nchw(const Problem& problem, const Array& output) {
    with_accumulator(problem.features.dtype,
                     [&](auto sums) { run_items(ReassembleFewNchw<typename decltype(sums)::type>{problem, output}); });
}

}  // namespace carafepp::CARAFEPP_ISA
