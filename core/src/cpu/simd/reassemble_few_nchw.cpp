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
struct FewRegisterTile {
    const A* masks;
    int64_t tap_step;
    const A* features;  // of the first tap row inside the border
    int64_t row_stride, channel_stride;
    const int64_t* tap_offsets;
    int kernel_size, tap_rows;
    A* sums;
    int64_t sums_channel;
};

template <int NC, class A>
__attribute__((noinline)) void reassemble_few_channels(const FewRegisterTile<A>& tile, int64_t channel) {
    Vector<A> sums[NC] = {};
    const A* masks = tile.masks;
    const A* row = tile.features + channel * tile.channel_stride;
    for (int a = 0; a < tile.tap_rows; a++, row += tile.row_stride) {
        for (int b = 0; b < tile.kernel_size; b++, masks += tile.tap_step) {
            const Vector<A> mask = load(masks);
            const A* const features = row + tile.tap_offsets[b];
#pragma GCC unroll 4
            for (int c = 0; c < NC; c++) sums[c] += mask * load(features + c * tile.channel_stride);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) store(sums[c], tile.sums + (channel + c) * tile.sums_channel);
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
    const int64_t scratch_size = features_size + few.slice_size() + channels * sums_channel;

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        const Range rows = {block * block_rows * up, std::min((block + 1) * block_rows * up, p.out_h)};
        const Range sources = sources_of(p, rows);
        A *const features = scratch, *const masks = features + features_size, *const sums = masks + few.slice_size();
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
        RowPrefetch prefetch = few.prefetch_of(next);
        const int64_t lines = few.lines_of_tile(s, prefetch);
        const int64_t top = p.rows().source(s.row) - p.radius();
        const Range tap_rows = {std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)};
        int64_t tap_offsets[kMaxKernelSize];
        FewRegisterTile<A> tile;
        tile.tap_step = few.tap_step();
        tile.row_stride = few.sources_row;
        tile.channel_stride = features_channel;
        tile.tap_offsets = tap_offsets;
        tile.kernel_size = static_cast<int>(k);
        tile.tap_rows = static_cast<int>(tap_rows.size());
        tile.sums_channel = sums_channel;
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            for (int64_t b = 0; b < k; b++)
                tap_offsets[b] = few.columns.offset(few.columns.tap(phase, b), few.residue_stride);
            A* const of_phase = masks + (phase - s.phase) * few.slice_cells;
            few.for_each_tile(s, prefetch, lines, [&](int64_t q) {
                few.normalize(of_phase + q);
                zero_phase_outside(few.columns, phase, s.cell + q, of_phase + q, tile.tap_step);
                tile.masks = of_phase + q + tap_rows.begin * k * tile.tap_step;
                tile.features = features + (top + tap_rows.begin - sources.begin) * few.sources_row + s.cell + q;
                tile.sums = sums + phase * few.lanes + s.cell + q;
                for (int64_t c = 0; c < channels; c += kRegisterChannels) {
                    with_count<kRegisterChannels>(static_cast<int>(channels - c),
                                                  [&](auto count) { reassemble_few_channels<count()>(tile, c); });
                }
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
