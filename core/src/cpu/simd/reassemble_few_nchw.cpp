// SPDX-License-Identifier: Apache-2.0
//
// The forward for few channels in a group, compiled once for each instruction set. A vector holds the same output (row,
// phase) of neighbouring cells.
//
// For a block of rows, the kernel stages the features that the windows reach. Then it stages slices of masks or logits,
// normalises them a tile at a time, contracts the tile, and writes each row of outputs once it is whole.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockFeatures = 64 * 1024;  // elements; in the level 2 cache

// ---- contraction: the taps of a tile ----

template <class A>
struct FewContraction {
    TapRows<A> masks;  // those of tap rows inside the border
    const A* scales;
    const A* features;  // of the first of these tap rows
    int64_t row_stride, channel_stride;
    int64_t tap_offsets[kMaxKernelSize];
    int kernel_size;
    A* sums;
    int64_t sums_channel;
    SlicePrefetch* prefetch;
};

// Contracts NC channels. K is the kernel size, or 0 if the compiler does not know it.
template <int K, int NC, class A>
__attribute__((noinline)) void reassemble_few_channels(const FewContraction<A>& at, int64_t channel) {
    constexpr int L = kLanes<A>;
    const int k = K > 0 ? K : at.kernel_size, tap_rows = at.masks.taps / k;
    const int64_t channel_stride = at.channel_stride, step = at.masks.step;
    int64_t tap_offsets[K > 0 ? K : kMaxKernelSize];
    std::copy_n(at.tap_offsets, k, tap_offsets);
    SlicePrefetch prefetch = *at.prefetch;
    for (int64_t q = 0; q < at.masks.cells; q += L) {
        prefetch.prefetch_tile(q / L);
        Vector<A> sums[NC] = {};
        const Vector<A> scale = load(at.scales + q);
        const A* masks = at.masks.first + q;
        const A* row = at.features + channel * channel_stride + q;
        for (int a = 0; a < tap_rows; a++, row += at.row_stride) {
#pragma GCC unroll 5
            for (int b = 0; b < k; b++, masks += step) {
                const Vector<A> mask = load(masks) * scale;
                const A* const features = row + tap_offsets[b];
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) sums[c] += mask * load(features + c * channel_stride);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) store(sums[c], at.sums + (channel + c) * at.sums_channel + q);
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
    const FewChannels<A> few{p, ceil_div(p.out_w, p.factor.up), p.taps() * (p.from_logits ? 1 : p.factor.up)};
    const int64_t up = p.factor.up, k = p.kernel_size, channels = few.channels;
    const int64_t cell_rows = ceil_div(p.out_h, up);
    const int64_t block_rows = few.rows_of_block(
        cell_rows, (kBlockFeatures / std::max<int64_t>(channels * few.sources_row, 1) - k) / few.down,
        output.n * p.groups);
    const int64_t blocks = ceil_div(cell_rows, block_rows), items = output.n * p.groups * blocks;
    const int64_t staged_rows = p.factor.source(block_rows * up - 1) + k;
    const int64_t features_channel = staged_rows * few.sources_row;
    const int64_t features_size = channels * features_channel;
    const int64_t sums_channel = up * few.lanes;  // [channel][phase][cell], a row of outputs
    const int64_t scratch_size = features_size + few.slice_size() + few.slice_cells + channels * sums_channel;

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        const Range rows = {block * block_rows * up, std::min((block + 1) * block_rows * up, p.out_h)};
        const Range sources = sources_of(p, rows);
        A *const features = scratch, *const masks = features + features_size;
        A* const sums = masks + few.slice_size() + few.slice_cells;
        few.stage_features(n, group, sources, features_channel, features);
        Slice slice = few.first_slice(n, group, rows.begin);
        while (slice.row < rows.end) {
            const Slice next = few.next(slice);
            contract_slice(slice, next, features, sources, masks, sums);
            if (next.row > slice.row) write_row(slice, sums);
            slice = next;
        }
    }

    void contract_slice(const Slice& s, const Slice& next, const A* features, Range sources, A* masks, A* sums) const {
        few.stage_slice(s, masks);
        SlicePrefetch prefetch = few.prefetch_of(next);
        const int64_t top = p.rows().source(s.row) - p.radius();
        const Range tap_rows = {std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)};
        FewContraction<A> at;
        at.row_stride = few.sources_row;
        at.channel_stride = features_channel;
        at.kernel_size = static_cast<int>(k);
        at.sums_channel = sums_channel;
        at.features = features + (top + tap_rows.begin - sources.begin) * few.sources_row + s.cell;
        at.prefetch = &prefetch;
        A* const scales = masks + few.slice_size();
        at.scales = scales;
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            for (int64_t b = 0; b < k; b++)
                at.tap_offsets[b] = few.columns.offset(few.columns.tap(phase, b), few.residue_stride);
            at.masks = few.rows_of_phase(s, phase, masks);
            few.normalize(at.masks, scales);
            few.zero_outside(at.masks, phase, s.cell);
            at.masks.first = at.masks.tap(tap_rows.begin * k);
            at.masks.taps = static_cast<int>(tap_rows.size() * k);
            at.sums = sums + phase * few.lanes + s.cell;
            with_kernel_size<A>(k, [&](auto known) {
                for_few_channels(channels, [&](int64_t c, auto count) {
                    reassemble_few_channels<known(), count()>(at, c);
                });
            });
        }
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
