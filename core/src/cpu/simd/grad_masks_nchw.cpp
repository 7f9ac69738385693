// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits with columns in lanes, compiled once for each instruction set. Made for adjacent
// columns, it takes any strides. A vector holds one tap of one output (row, phase) of neighbouring cells. So a sum over
// channels never crosses lanes.
//
// For a block of outputs, the kernel deinterleaves rows of features and of grad_output, some channels at a time. It
// adds their products to the sums of all taps. At last it turns gradients of masks into those of logits, and writes
// them.
#include <algorithm>

#include "cpu/geometry.h"
#include "cpu/scratch.h"
#include "cpu/simd/border.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockSums = 32 * 1024;      // elements; 128 KiB of float, read and written once for some channels
constexpr int64_t kMostCellSums = 128 * 1024;  // elements; all rows of a tile of cells
constexpr int64_t kMostChannels = 32;          // staged together
constexpr int64_t kRowsTogether = 8;           // rows of outputs that are contracted together, unless up is large

// A register tile has sums of some outputs that read the same features, in some tap columns.
constexpr int kTileOutputs = 4;
constexpr int most_tap_columns(int outputs) { return kVectorRegisters == 32 || outputs <= 2 ? 5 : 3; }

// ---- plan ----

// One item computes a block: some rows of some tiles of outputs, in all channels of a group. Its rows come in steps of
// plan.row_step. It stages and contracts some of its channels at a time.
struct GradMasksBlockShape {
    int64_t tiles, row_steps, channels;
};

// The sizes of staged arrays for blocks of a shape, in elements of the sums.
struct GradMasksSizes {
    int64_t residue_stride, features_channel, features_row;  // [row][channel][residue][cell]
    int64_t grads_phase;                                     // [row][phase][channel][lane]
    int64_t sums, grads, features, logits, scratch;
};

struct GradMasksPlan {
    // With logits these are rows and cells of the logits' outputs, cropped ones too.
    int64_t rows, cells, tiles;
    int64_t row_step;       // rows that are written together: those of a cell, or one if windows are large
    int64_t rows_together;  // in one contraction
    int64_t row_size;       // sums of a row of a tile: [tap][phase][lane]
    GradMasksBlockShape block;
    int64_t blocks_across, blocks_down, items;
    GradMasksSizes sizes;
    int64_t tap_offsets[kMaxFactor][kMaxKernelSize];  // [window][b]
};

GradMasksSizes sizes_of(const Problem& p, const Columns& columns, const GradMasksPlan& plan,
                        const GradMasksBlockShape& block, int64_t lanes) {
    const int64_t up = p.factor.up, down = p.factor.down;
    GradMasksSizes sizes;
    sizes.residue_stride = ceil_div(block.tiles * lanes + columns.halo(), lanes) * lanes;
    sizes.features_channel = down * sizes.residue_stride;
    // A vector more keeps the rows of all channels from competing for a few sets of the cache.
    sizes.features_row = block.channels * sizes.features_channel + lanes;
    sizes.grads_phase = (block.channels + 1) * lanes;
    sizes.sums = block.tiles * block.row_steps * plan.row_step * plan.row_size;
    sizes.grads = plan.rows_together * up * sizes.grads_phase;
    sizes.features = (block.row_steps * down + p.kernel_size) * sizes.features_row;
    sizes.logits = p.from_logits ? (plan.row_step + 1) * plan.row_size : 0;
    sizes.scratch = sizes.sums + sizes.grads + sizes.features + sizes.logits;
    return sizes;
}

GradMasksPlan plan_grad_masks(const Problem& p, const Array& grad_masks, const Columns& columns,
                              const CellWindows& windows, int64_t lanes) {
    const int64_t up = p.factor.up, down = p.factor.down;
    GradMasksPlan plan;
    plan.rows = p.from_logits ? p.logits.h * up : p.out_h;
    plan.cells = p.from_logits ? p.logits.w : columns.cells;
    plan.tiles = ceil_div(plan.cells, lanes);
    plan.row_size = p.taps() * up * lanes;
    plan.row_step = takes_whole_cells(p, grad_masks) || up * plan.row_size <= kMostCellSums ? up : 1;
    plan.rows_together = up >= 2 * down ? ceil_div(up, down) : kRowsTogether;
    const int64_t row_steps = ceil_div(plan.rows, plan.row_step), step_size = plan.row_step * plan.row_size;

    GradMasksBlockShape block;
    block.tiles = std::clamp<int64_t>(kBlockSums / step_size, 1, plan.tiles);
    block.row_steps = std::clamp<int64_t>(kBlockSums / (step_size * block.tiles), 1, row_steps);
    block.channels = std::min(p.features.c / p.groups, kMostChannels);
    const int64_t most = kScratchBytes * lanes / kVectorBytes;
    while (sizes_of(p, columns, plan, block, lanes).scratch > most) {
        int64_t& largest = block.row_steps > 1 ? block.row_steps : block.tiles > 1 ? block.tiles : block.channels;
        if (largest <= 1) break;
        largest = ceil_div(largest, 2);
    }
    plan.blocks_across = ceil_div(plan.tiles, block.tiles);
    const int64_t blocks_of_step = grad_masks.n * p.groups * plan.blocks_across;
    const int64_t threads = threads_for(INT32_MAX, p.cost() / static_cast<double>(lanes));
    while (blocks_of_step * ceil_div(row_steps, block.row_steps) < threads &&
           block.row_steps * down >= 2 * p.kernel_size)
        block.row_steps = ceil_div(block.row_steps, 2);
    plan.block = block;
    plan.blocks_down = ceil_div(row_steps, block.row_steps);
    plan.items = blocks_of_step * plan.blocks_down;
    plan.sizes = sizes_of(p, columns, plan, block, lanes);
    for (int w = 0; w < windows.count; w++) {
        for (int b = 0; b < p.kernel_size; b++) {
            plan.tap_offsets[w][b] = columns.offset(columns.tap(windows.windows[w].begin, b),
                                                    plan.sizes.residue_stride);
        }
    }
    return plan;
}

template <class A>
struct GradMasksBlock {
    int64_t n, group, first_tile, tiles;
    Range rows;      // that are written
    Range computed;  // rows of them that are in the output
    Range sources;   // rows that these read, inside the border
    A* sums;         // [tile][row][tap][phase][lane]
    A* grads;        // [row][phase][channel][lane]; rows of a tile that are contracted together
    A* features;     // [row][channel][residue][cell]
    A* logits;       // [row][tap][phase][lane]; of a step, and a row of masks

    GradMasksBlock(const GradMasksPlan& plan, const Problem& p, int64_t item, A* scratch) {
        const int64_t across = item % plan.blocks_across, down = item / plan.blocks_across % plan.blocks_down;
        const int64_t image_group = item / plan.blocks_across / plan.blocks_down;
        n = image_group / p.groups;
        group = image_group % p.groups;
        first_tile = across * plan.block.tiles;
        tiles = std::min(plan.block.tiles, plan.tiles - first_tile);
        rows.begin = down * plan.block.row_steps * plan.row_step;
        rows.end = std::min(rows.begin + plan.block.row_steps * plan.row_step, plan.rows);
        computed = {rows.begin, std::min(rows.end, p.out_h)};
        sources = sources_of(p, computed);
        sums = scratch;
        grads = sums + plan.sizes.sums;
        features = grads + plan.sizes.grads;
        logits = features + plan.sizes.features;
    }

    A* sums_of(const GradMasksPlan& plan, int64_t tile, int64_t row) const {
        return sums + (tile * rows.size() + row - rows.begin) * plan.row_size;
    }
};

// ---- contraction: outputs that read the same row of features at the same columns ----

template <class A>
struct GradMasksRegisterTile {
    const A* grads[kTileOutputs];  // channels lie a vector apart
    A* sums[kTileOutputs];         // first tap of a tap row of each output
    int64_t tap_stride;            // of the sums
    bool begins;                   // there are no sums yet
};

// The rows that are staged next, and how many of their lines are prefetched with each row of features.
struct RowPrefetches {
    RowPrefetch grads, features;
    int64_t grad_lines, feature_lines;
};

// Adds grad_output * features to the sums of P outputs and of NB tap columns from `b` on. The sums stay in registers.
template <int P, int NB, class A>
__attribute__((noinline)) void add_products_to_taps(const GradMasksRegisterTile<A>& tile, const A* features,
                                                    int64_t channel_stride, const int64_t* tap_offsets, int64_t b,
                                                    int64_t channels) {
    constexpr int L = kLanes<A>;
    const int64_t tap_stride = tile.tap_stride;
    Vector<A> sums[P][NB] = {};
    if (!tile.begins) {
#pragma GCC unroll 4
        for (int o = 0; o < P; o++) {
#pragma GCC unroll 5
            for (int k = 0; k < NB; k++) sums[o][k] = load(tile.sums[o] + (b + k) * tap_stride);
        }
    }
    const A* grads[P];
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) grads[o] = tile.grads[o];
    int64_t offset[NB];
#pragma GCC unroll 5
    for (int k = 0; k < NB; k++) offset[k] = tap_offsets[b + k];
    for (int64_t at = 0; at < channels * L; at += L, features += channel_stride) {
        Vector<A> read[NB];
#pragma GCC unroll 5
        for (int k = 0; k < NB; k++) read[k] = load(features + offset[k]);
#pragma GCC unroll 4
        for (int o = 0; o < P; o++) {
            const Vector<A> grad = load(grads[o] + at);
#pragma GCC unroll 5
            for (int k = 0; k < NB; k++) sums[o][k] += grad * read[k];
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) {
#pragma GCC unroll 5
        for (int k = 0; k < NB; k++) store(sums[o][k], tile.sums[o] + (b + k) * tap_stride);
    }
}

// Adds the products of P outputs in all tap columns.
template <int P, class A>
void add_products_of_outputs(const GradMasksRegisterTile<A>& tile, const A* features, int64_t channel_stride,
                             const int64_t* tap_offsets, int kernel_size, int64_t channels) {
    constexpr int kMost = most_tap_columns(P);
    const int shares = (kernel_size + kMost - 1) / kMost;
    for (int k = 0; k < shares; k++) {
        const Range some = share_of(kernel_size, k, shares);
        with_count<kMost>(static_cast<int>(some.size()), [&](auto columns) {
            add_products_to_taps<P, columns()>(tile, features, channel_stride, tap_offsets, some.begin, channels);
        });
    }
}

// ---- the kernel ----

template <class T>
struct GradMasksNchw {
    using A = Accumulator<T>;
    using Block = GradMasksBlock<A>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_masks;
    const MaskTiles<A> masks{p, p.factor.up};
    const Columns columns{p, p.factor.up};
    const CellWindows windows{p.factor, p.factor.up};
    const GradMasksPlan plan = plan_grad_masks(p, grad_masks, columns, windows, L);
    const GradMasksSizes& sizes = plan.sizes;
    const int64_t up = p.factor.up, down = p.factor.down;
    const int64_t channels = p.features.c / p.groups;
    const int64_t items = plan.items, scratch_size = plan.sizes.scratch;

    void run_item(int64_t item, A* scratch) const {
        const Block b(plan, p, item, scratch);
        zero_sums(b);
        for (int64_t c = 0; c < channels && b.computed.size() > 0; c += plan.block.channels)
            sweep_rows(b, b.group * channels + c, std::min(plan.block.channels, channels - c));
        for (int64_t tile = 0; tile < b.tiles; tile++) write_tile(b, tile);
    }

    // Zeroes the sums of rows with taps beyond the border, and of rows without an output. No other sum is read before
    // it is written.
    void zero_sums(const Block& b) const {
        for (int64_t row = b.rows.begin; row < b.rows.end; row++) {
            const int64_t top = p.rows().source(row) - p.radius();
            const bool inside = top >= 0 && top + p.kernel_size <= p.features.h;
            if (inside && row < b.computed.end && channels > 0) continue;
            for (int64_t tile = 0; tile < b.tiles; tile++) std::fill_n(b.sums_of(plan, tile, row), plan.row_size, A{0});
        }
    }

    // ---- staging ----

    void stage_features(const Block& b, int64_t channel, int64_t count) const {
        const Deinterleaved layout{static_cast<int>(down),       b.first_tile * L + columns.least_shift,
                                   b.tiles * L + columns.halo(), sizes.features_channel,
                                   sizes.features_row,           sizes.residue_stride};
        deinterleave_rows(p.features, b.n, channel, count, b.sources, layout, b.features);
    }

    void stage_grads(const Block& b, int64_t channel, int64_t count, int64_t tile, Range rows) const {
        const Deinterleaved layout{static_cast<int>(up),   (b.first_tile + tile) * L, L, L,
                                   up * sizes.grads_phase, sizes.grads_phase};
        deinterleave_rows(p.grad_output, b.n, channel, count, rows, layout, b.grads);
    }

    // The rows of grad_output that are staged next: those from `row` on, or the first of the next channels.
    RowPrefetch grads_prefetch(const Block& b, int64_t channel, int64_t row) const {
        const bool last = row == b.computed.end;
        const int64_t next = last ? b.computed.begin : row;
        const int64_t next_channel = last ? channel + plan.block.channels : channel;
        const int64_t column = b.first_tile * L * up;
        return {p.grad_output,
                b.n,
                next_channel,
                next,
                column,
                std::min(b.tiles * L * up, p.out_w - column),
                std::min(plan.rows_together, b.computed.end - next),
                std::min(plan.block.channels, (b.group + 1) * channels - next_channel)};
    }

    // The rows of features of the next channels.
    RowPrefetch features_prefetch(const Block& b, int64_t channel) const {
        const int64_t next = channel + plan.block.channels;
        const int64_t column = std::max<int64_t>(b.first_tile * L + columns.least_shift, 0) * down;
        return {p.features,
                b.n,
                next,
                b.sources.begin,
                column,
                std::min((b.tiles * L + columns.halo()) * down, p.features.w - column),
                b.sources.end - b.sources.begin,
                std::min(plan.block.channels, (b.group + 1) * channels - next)};
    }

    // ---- contraction ----

    // Adds the products of all rows of a block, in `count` channels.
    void sweep_rows(const Block& b, int64_t channel, int64_t count) const {
        stage_features(b, channel, count);
        const bool begins = channel == b.group * channels;
        RowPrefetches prefetch;
        prefetch.features = features_prefetch(b, channel);
        const int64_t tiles = b.tiles * ceil_div(b.computed.size(), plan.rows_together);
        const int64_t feature_lines = ceil_div(prefetch.features.lines(), tiles);
        for (int64_t begin = b.computed.begin; begin < b.computed.end; begin += plan.rows_together) {
            const Range rows = {begin, std::min(begin + plan.rows_together, b.computed.end)};
            prefetch.grads = grads_prefetch(b, channel, rows.end);
            const int64_t sources = std::max<int64_t>(sources_of(p, rows).size(), 1);
            prefetch.feature_lines = ceil_div(feature_lines, sources);
            prefetch.grad_lines = ceil_div(prefetch.grads.lines(), b.tiles * sources);
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                stage_grads(b, channel, count, tile, rows);
                contract_rows(b, count, tile, rows, begins, prefetch);
            }
        }
    }

    // Contracts each row of features with the outputs of `rows` that read it.
    void contract_rows(const Block& b, int64_t count, int64_t tile, Range rows, bool begins,
                       RowPrefetches& prefetch) const {
        static_assert(kRowsTogether <= kMaxFactor);
        int64_t tops[kMaxFactor];  // of the windows of each row; a division each
        for (int64_t row = rows.begin; row < rows.end; row++)
            tops[row - rows.begin] = p.rows().source(row) - p.radius();
        const Range sources = sources_of(p, rows);
        for (int64_t i = sources.begin; i < sources.end; i++) {
            prefetch.features.prefetch_lines(prefetch.feature_lines);
            prefetch.grads.prefetch_lines(prefetch.grad_lines);
            const Range readers = outputs_of(p, {i, i + 1});
            const int64_t begin = std::max(readers.begin, rows.begin), end = std::min(readers.end, rows.end);
            const A* const features = b.features + (i - b.sources.begin) * sizes.features_row + tile * L;
            for (int w = 0; w < windows.count; w++) {
                const SharedWindow& window = windows.windows[w];
                const int width = window.end - window.begin;
                const int outputs = static_cast<int>(end - begin) * width;
                const int shares = (outputs + kTileOutputs - 1) / kTileOutputs;
                GradMasksRegisterTile<A> register_tile;
                register_tile.tap_stride = up * L;
                register_tile.begins = begins;
                int64_t row = begin - rows.begin, phase = window.begin;
                for (int k = 0; k < shares; k++) {
                    const int outputs_here = static_cast<int>(share_of(outputs, k, shares).size());
                    for (int o = 0; o < outputs_here; o++) {
                        register_tile.grads[o] = b.grads + (row * up + phase) * sizes.grads_phase;
                        register_tile.sums[o] = b.sums_of(plan, tile, rows.begin + row) +
                                                ((i - tops[row]) * p.kernel_size * up + phase) * L;
                        if (++phase == window.end) {
                            phase = window.begin;
                            row++;
                        }
                    }
                    with_count<kTileOutputs>(outputs_here, [&](auto known_outputs) {
                        add_products_of_outputs<known_outputs()>(register_tile, features, sizes.features_channel,
                                                                 plan.tap_offsets[w], static_cast<int>(p.kernel_size),
                                                                 count);
                    });
                }
            }
        }
    }

    // ---- write out ----

    // Taps beyond the border become 0: their features are 0, but grad_output may be Inf or NaN.
    void write_tile(const Block& b, int64_t tile) const {
        const int64_t cell = (b.first_tile + tile) * L;
        const int count = static_cast<int>(std::min<int64_t>(L, plan.cells - cell));
        for (int64_t row = b.computed.begin; row < b.computed.end; row++)
            zero_taps_outside(columns, cell, b.sums_of(plan, tile, row));
        for (int64_t row = b.rows.begin; row < b.rows.end; row += plan.row_step) {
            const Range together{row, std::min(row + plan.row_step, b.rows.end)};
            if (p.from_logits) turn_into_logits(b, together, cell, count, b.sums_of(plan, tile, row));
            masks.store_rows(b.n, b.group, together, cell, count, L, b.sums_of(plan, tile, row), grad_masks);
        }
    }

    // Turns the gradient of the masks of a tile into that of its logits.
    void turn_into_logits(const Block& b, Range together, int64_t cell, int count, A* grad) const {
        A* const masks_of_row = b.logits + plan.row_step * plan.row_size;
        masks.load_rows(p.logits, b.n, b.group, together, cell, count, L, b.logits);
        for (int64_t at = 0; at < plan.row_step * plan.row_size; at += plan.row_size)
            masks.normalize_row_backward(grad + at, b.logits + at, masks_of_row, L);
        masks.zero_cropped_grads(together, cell, L, masks.order(L), grad);
    }
};

}  // namespace

void grad_masks_nchw(const Problem& problem, const Array& grad_masks) {
    run_kernel<GradMasksNchw>(problem, grad_masks);
}

}  // namespace carafepp::CARAFEPP_ISA
