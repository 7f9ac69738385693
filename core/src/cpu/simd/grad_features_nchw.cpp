// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features with columns in lanes, compiled once for each instruction set. Made for adjacent columns, it
// takes any strides. A vector holds one source (row, residue) of neighbouring cells. One item gathers its whole sum, in
// one order, however many threads there are.
//
// For a block of sources, the kernel stages the masks of all outputs that read them. Then it sweeps down the rows of
// these outputs, some channels at a time. It deinterleaves each row of grad_output, and adds its products to the sums
// of the sources that it reads. At last it writes the sums. Masks of large windows would leave the caches. The kernel
// stages those during the sweep, for many channels at a time.
//
// Without up, and with a down of 2, an output adds few products to a sum. There each source gathers them: the sums of
// two rows in both residues stay in registers until they are written.
#include <algorithm>

#include "cpu/geometry.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/tile_transpose.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockMasks = 160 * 1024;  // elements; 640 KiB of float
constexpr int64_t kFewestRows = 8;           // of a block, if fewer tiles make room for them
constexpr int64_t kFewChannels = 16;         // their rows of grad_output stay in the level 1 cache
constexpr int64_t kManyChannels = 128;       // if the masks are staged again for each of these blocks

// A register tile has sums of some rows of sources, in some channels. The masks of a tap and grad_output of these
// channels share the registers with them.
constexpr int kTileRows = 5;
constexpr int tile_channels(int rows) { return kVectorRegisters == 32 || rows < 3 ? 4 : rows <= 4 ? 3 : 2; }

// A register tile that gathers has sums of two rows of sources in both residues, in some channels.
constexpr int kGatherChannels = kVectorRegisters == 32 ? 6 : 3;

// ---- plan ----

// The taps by which the outputs of a phase read a residue. Each reads the cell before that of the tap before it.
struct TapRun {
    int64_t grads;  // place of the first tap in staged outputs
    int taps;
};

// The cell that a tap of a row reads for the first source of a tile, and its place in staged masks.
struct TapPlace {
    int64_t cell, masks;
};

// One item computes a block: some rows of some tiles of sources, in all channels of a group. It stages and contracts
// some of these channels at a time.
struct GradFeaturesBlockShape {
    int64_t tiles, rows, channels;
};

// The sizes of staged arrays for blocks of a shape, in elements of the sums.
struct GradFeaturesSizes {
    int64_t mask_rows;                             // of outputs whose masks are staged together
    int64_t masks_tap, masks_row, masks_tile;      // [tile][row of outputs][tap of a row][tap row][lane]
    int64_t cells, cell_stride, all_masks_stride;  // of outputs that read a block, with halo
    int64_t sums_row;                              // [residue][channel][lane]
    int64_t masks, sums, rows, grads_or_masks, scratch;
};

struct GradFeaturesPlan {
    int64_t tiles;     // of a row of sources
    bool keeps_masks;  // of all rows of outputs that read a block; else of those centred on one row of sources
    bool gathers;      // two rows of sources at a time
    GradFeaturesBlockShape block;
    int64_t blocks_across, blocks_down, items;
    bool non_temporal;  // whole rows are collected, and copied by non-temporal stores
    GradFeaturesSizes sizes;
    // The taps of a row lie in the order of their runs: by residue, phase and column.
    TapPlace tap_places[kMaxFactor * kMaxKernelSize];  // [b][phase]
    TapRun runs[kMaxFactor * kMaxFactor];
    int runs_of[kMaxFactor + 1], taps_of[kMaxFactor];  // a residue has runs [runs_of[residue], runs_of[residue + 1])
};

// The masks that a tile stages for a block of `rows` rows of sources.
int64_t masks_of_tile(const Problem& p, int64_t rows, int64_t lanes) {
    return p.factor.first_output(rows + p.kernel_size - 1) * std::min(rows, p.kernel_size) * p.kernel_size *
           p.factor.up * lanes;
}

bool writes_non_temporal_rows(const Array& grad_features, bool all_tiles) {
    return all_tiles && grad_features.stride_w == 1 && grad_features.stride_h == grad_features.w &&
           wants_non_temporal_stores(grad_features);
}

// Rows of outputs that read two rows of sources, at most, if down is 2.
int64_t gathered_rows(const Problem& p) { return (p.kernel_size + 1) / 2; }

GradFeaturesSizes sizes_of(const Problem& p, const Columns& columns, const GradFeaturesBlockShape& block,
                           bool keeps_masks, bool gathers, bool non_temporal, int64_t lanes) {
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size;
    const int64_t rows_of_source = gathers ? gathered_rows(p) : ceil_div(up, down), tap_rows = std::min(block.rows, k);
    GradFeaturesSizes sizes;
    sizes.mask_rows = keeps_masks ? p.factor.first_output(block.rows + k - 1) : rows_of_source;
    sizes.masks_tap = tap_rows * lanes;
    sizes.masks_row = k * up * sizes.masks_tap;
    sizes.masks_tile = sizes.mask_rows * sizes.masks_row;
    sizes.cells = block.tiles * lanes + columns.halo();
    sizes.cell_stride = ceil_div(sizes.cells, lanes) * lanes;
    sizes.all_masks_stride = sizes.cell_stride + lanes;
    sizes.sums_row = down * block.channels * lanes;
    sizes.masks = block.tiles * sizes.masks_tile;
    sizes.sums = gathers ? kGatherChannels * 2 * down * lanes : block.tiles * block.rows * sizes.sums_row;
    const int64_t collected_rows = gathers ? 2 * block.channels : block.rows;
    sizes.rows = non_temporal ? ceil_div(collected_rows * p.features.w, lanes) * lanes : 0;
    const int64_t grads = block.channels * rows_of_source * up * sizes.cell_stride;
    const int64_t masks_of_row = (p.from_logits ? k : tap_rows) * k * up * sizes.all_masks_stride;
    sizes.grads_or_masks = std::max(grads, masks_of_row);
    sizes.scratch = sizes.masks + sizes.sums + sizes.rows + sizes.grads_or_masks;
    return sizes;
}

GradFeaturesPlan plan_grad_features(const Problem& p, const Array& grad_features, const Columns& columns,
                                    int64_t lanes) {
    const int64_t channels = p.features.c / p.groups, height = p.features.h, k = p.kernel_size;
    GradFeaturesPlan plan;
    plan.tiles = ceil_div(ceil_div(p.features.w, p.factor.down), lanes);
    const int64_t fewest_masks = masks_of_tile(p, std::min(kFewestRows, height), lanes);
    plan.keeps_masks = fewest_masks <= kBlockMasks;

    GradFeaturesBlockShape block;
    if (plan.keeps_masks) {
        block = {share_size(plan.tiles, kBlockMasks / fewest_masks), height, std::min(channels, kFewChannels)};
        while (block.rows > 1 && masks_of_tile(p, block.rows, lanes) * block.tiles > kBlockMasks)
            block.rows = ceil_div(block.rows, 2);
    } else {
        block = {1, std::min(height, k), std::min(channels, kManyChannels)};
    }
    const auto sizes = [&] {
        const bool non_temporal = writes_non_temporal_rows(grad_features, block.tiles == plan.tiles);
        GradFeaturesBlockShape whole_pairs = block;
        if (plan.gathers) whole_pairs.rows += block.rows % 2;
        return sizes_of(p, columns, whole_pairs, plan.keeps_masks, plan.gathers, non_temporal, lanes);
    };
    plan.gathers = plan.keeps_masks && p.factor.up == 1 && p.factor.down == 2 && grad_features.stride_w == 1 &&
                   p.features.dtype != CARAFEPP_FLOAT64;
    const int64_t most = kScratchBytes * lanes / kVectorBytes;
    while (sizes().scratch > most) {
        int64_t& largest = block.tiles > 1 ? block.tiles : block.rows > 1 ? block.rows : block.channels;
        if (largest <= 1) break;
        largest = ceil_div(largest, 2);
    }
    plan.blocks_across = ceil_div(plan.tiles, block.tiles);
    const int64_t blocks_of_row = grad_features.n * p.groups * plan.blocks_across;
    const int64_t threads = threads_for(INT32_MAX, p.cost() / static_cast<double>(lanes));
    while (blocks_of_row * ceil_div(height, block.rows) < threads && block.rows >= 2 * k)
        block.rows = ceil_div(block.rows, 2);
    if (plan.gathers) block.rows += block.rows % 2;
    plan.block = block;
    plan.blocks_down = ceil_div(height, block.rows);
    plan.items = blocks_of_row * plan.blocks_down;
    plan.non_temporal = writes_non_temporal_rows(grad_features, plan.blocks_across == 1);
    plan.sizes = sizes();

    int runs = 0, taps = 0;
    for (int residue = 0; residue < columns.down; residue++) {
        plan.runs_of[residue] = runs;
        plan.taps_of[residue] = taps;
        for (int phase = 0; phase < columns.phases; phase++) {
            TapRun run{0, 0};
            for (int b = 0; b < k; b++) {
                const Columns::Tap& tap = columns.tap(phase, b);
                if (tap.residue != residue) continue;
                const int64_t cell = columns.most_shift - tap.shift;
                if (run.taps++ == 0) run.grads = phase * plan.sizes.cell_stride + cell;
                plan.tap_places[b * columns.phases + phase] = {cell, taps++ * plan.sizes.masks_tap};
            }
            if (run.taps > 0) plan.runs[runs++] = run;
        }
    }
    plan.runs_of[columns.down] = runs;
    return plan;
}

template <class A>
struct GradFeaturesBlock {
    int64_t n, group, first_tile, tiles;
    int64_t first_cell;  // of the outputs that read the block; perhaps before the row
    Range sources;       // rows
    Range outputs;       // rows that read them
    A* masks;            // [tile][row of outputs][tap of a row][tap row][lane]
    A* sums;             // [tile][row][residue][channel][lane]
    A* rows;             // [row][column]; the result of one channel, or two rows of some
    A* grads;      // [channel][row of outputs][phase][cell]; if gathered, rows modulo those that are read together
    A* all_masks;  // [tap][phase][cell]; one row of outputs

    GradFeaturesBlock(const GradFeaturesPlan& plan, const Problem& p, const Columns& columns, int64_t item,
                      A* scratch) {
        const int64_t across = item % plan.blocks_across, down = item / plan.blocks_across % plan.blocks_down;
        const int64_t image_group = item / plan.blocks_across / plan.blocks_down;
        n = image_group / p.groups;
        group = image_group % p.groups;
        first_tile = across * plan.block.tiles;
        tiles = std::min(plan.block.tiles, plan.tiles - first_tile);
        first_cell = first_tile * kLanes<A> - columns.most_shift;
        sources.begin = down * plan.block.rows;
        sources.end = std::min(sources.begin + plan.block.rows, p.features.h);
        outputs = outputs_of(p, sources);
        masks = scratch;
        sums = masks + plan.sizes.masks;
        rows = sums + plan.sizes.sums;
        grads = all_masks = sums + plan.sizes.sums + plan.sizes.rows;  // one after the other
    }

    // Masks of a row of outputs; `first` is the first row that is staged with it.
    A* masks_of(const GradFeaturesPlan& plan, int64_t tile, int64_t row, int64_t first) const {
        return masks + tile * plan.sizes.masks_tile + (row - first) * plan.sizes.masks_row;
    }

    // Sums of a row of sources, counted from the first of the block.
    A* sums_of(const GradFeaturesPlan& plan, int64_t tile, int64_t row) const {
        return sums + (tile * plan.block.rows + row) * plan.sizes.sums_row;
    }
};

// ---- contraction: neighbouring rows of sources, and the outputs centred on one row that read them ----

template <class A>
struct GradFeaturesRegisterTile {
    A* sums;  // first row; channels lie a vector apart
    int64_t sums_row;
    int64_t begun;   // rows before it have sums, the others begin with 0
    const A* masks;  // first tap, first row
    int64_t masks_tap, masks_row;
    const A* grads;
    int64_t grads_channel, grads_row;
    int64_t outputs;  // rows
    const TapRun *runs, *runs_end;
};

// Adds masks * grad_output to the sums of NR rows of sources and NC channels, which stay in registers.
template <int NR, int NC, class A>
__attribute__((noinline)) void add_grads_to_sources(const GradFeaturesRegisterTile<A>& tile) {
    constexpr int L = kLanes<A>;
    A* const sums_of_tile = tile.sums;
    const int64_t sums_row = tile.sums_row;
    Vector<A> sums[NR][NC] = {};
#pragma GCC unroll 5
    for (int r = 0; r < NR; r++) {
        if (r >= tile.begun) continue;
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) sums[r][c] = load(sums_of_tile + r * sums_row + c * L);
    }
    const int64_t grads_channel = tile.grads_channel, masks_tap = tile.masks_tap;
    const A *of_row = tile.masks, *grads = tile.grads;
    for (int64_t o = tile.outputs; o > 0; o--, of_row += tile.masks_row, grads += tile.grads_row) {
        const A* masks = of_row;
        for (const TapRun* run = tile.runs; run != tile.runs_end; run++) {
            const A* from[NC];
            from[0] = opaque(grads + run->grads);
#pragma GCC unroll 4
            for (int c = 1; c < NC; c++) from[c] = opaque(from[c - 1] + grads_channel);
            for (int64_t t = 0; t < run->taps; t++, masks += masks_tap) {
                Vector<A> grad[NC];
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) grad[c] = in_register(load(from[c] - t));
#pragma GCC unroll 5
                for (int r = 0; r < NR; r++) {
                    const Vector<A> mask = in_register(load(masks + r * L));
#pragma GCC unroll 4
                    for (int c = 0; c < NC; c++) sums[r][c] += mask * grad[c];
                }
            }
        }
    }
#pragma GCC unroll 5
    for (int r = 0; r < NR; r++) {
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) store(sums[r][c], sums_of_tile + r * sums_row + c * L);
    }
}

// ---- contraction: two rows of sources in both residues, and the rows of outputs that read them ----

// A row of outputs, and the masks of its first tap row that reads one of the rows of sources.
template <class A>
struct GatheredRow {
    const A *grads, *masks;
    bool first, second;  // which of the rows of sources it reads
};

template <class A>
struct GradFeaturesGather {
    const GatheredRow<A>* rows;
    int rows_count;
    int64_t grads_offset, grads_channel;  // to the first channel, to the next
    int64_t masks_tap;
    int64_t residue_masks;  // from the first tap of a residue to that of the other
    // From the first grad_output back, so many are read by the second residue, then by both, then by the first.
    int64_t second_alone, both, first_alone;
    A* sources;
    int64_t sources_channel, sources_row;
    int sources_rows;  // that are written
};

// Adds grad_output of one cell to the sums of some rows and residues. `masks` are the next taps of each residue.
template <int R0, int R1, int Q0, int Q1, int NC, class A>
CARAFEPP_INLINE void gather_cell(const A* const (&grads)[NC], int64_t cell, const A* (&masks)[2], int64_t masks_tap,
                                 Vector<A> (&sums)[2][2][NC]) {
    Vector<A> grad[NC];
#pragma GCC unroll 6
    for (int c = 0; c < NC; c++) grad[c] = in_register(load(grads[c] - cell));
#pragma GCC unroll 2
    for (int q = Q0; q < Q1; q++) {
#pragma GCC unroll 2
        for (int r = R0; r < R1; r++) {
            const Vector<A> mask = in_register(load(masks[q] + (r - R0) * kLanes<A>));
#pragma GCC unroll 6
            for (int c = 0; c < NC; c++) sums[r][q][c] += mask * grad[c];
        }
        masks[q] = opaque(masks[q] + masks_tap);
    }
}

template <int R0, int R1, int NC, class A>
CARAFEPP_INLINE void gather_row(const GradFeaturesGather<A>& tile, const GatheredRow<A>& row,
                                Vector<A> (&sums)[2][2][NC]) {
    const A *grads[NC], *masks[2] = {row.masks, row.masks + tile.residue_masks};
    grads[0] = opaque(row.grads + tile.grads_offset);
#pragma GCC unroll 6
    for (int c = 1; c < NC; c++) grads[c] = opaque(grads[c - 1] + tile.grads_channel);
    const int64_t masks_tap = tile.masks_tap, both_end = tile.second_alone + tile.both;
    int64_t cell = 0;
    for (; cell < tile.second_alone; cell++) gather_cell<R0, R1, 1, 2>(grads, cell, masks, masks_tap, sums);
    for (; cell < both_end; cell++) gather_cell<R0, R1, 0, 2>(grads, cell, masks, masks_tap, sums);
    if (tile.first_alone > 0) gather_cell<R0, R1, 0, 1>(grads, cell, masks, masks_tap, sums);
}

// Writes the sums of some channels as columns.
template <class A>
__attribute__((noinline)) void gather_sources(const GradFeaturesGather<A>& tile) {
    constexpr int NC = kGatherChannels;
    Vector<A> sums[2][2][NC] = {};
    for (int n = 0; n < tile.rows_count; n++) {
        const GatheredRow<A>& row = tile.rows[n];
        if (!row.second) {
            gather_row<0, 1>(tile, row, sums);
        } else if (!row.first) {
            gather_row<1, 2>(tile, row, sums);
        } else {
            gather_row<0, 2>(tile, row, sums);
        }
    }
    const int64_t channel_stride = tile.sources_channel, row_stride = tile.sources_row;
    A* const to = tile.sources;
    const bool both = tile.sources_rows > 1;
    const auto write_row = [&](int r, A* to) __attribute__((always_inline)) {
#pragma GCC unroll 6
        for (int c = 0; c < NC; c++, to += channel_stride) {
            Vector<A> columns[2] = {sums[r][0][c], sums[r][1][c]};
            interleave<A, 2>(columns);
            store(columns[0], to);
            store(columns[1], to + kLanes<A>);
        }
    };
    write_row(0, to);
    if (both) write_row(1, to + row_stride);
}

// ---- the kernel ----

// The part that depends on the type of the sums only.
template <class A>
struct GradFeaturesSums {
    using Block = GradFeaturesBlock<A>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_features;
    const Columns columns{p, p.factor.up};
    const GradFeaturesPlan plan = plan_grad_features(p, grad_features, columns, L);
    const GradFeaturesSizes& sizes = plan.sizes;
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size;
    const int64_t channels = p.features.c / p.groups;
    const int64_t items = plan.items, scratch_size = plan.sizes.scratch;

    // ---- staging ----

    // The tap rows of a row of outputs that read the block.
    Range tap_rows(const Block& b, int64_t row) const {
        const int64_t top = p.rows().source(row) - p.radius();
        return {std::max<int64_t>(b.sources.begin - top, 0), std::min(b.sources.end - top, k)};
    }

    // Stages the masks of one row of outputs, each tap shifted to the cells of the sources that it reads. Masks of
    // cells without an output are 0. `first` is the first row that is staged with this one.
    void stage_masks(const Block& b, int64_t row, int64_t first) const {
        const Range inside = tap_rows(b, row);
        const int64_t stride = sizes.all_masks_stride;
        MaskTiles<A> masks{p, up};
        if (!p.from_logits) {  // a normaliser takes all taps together
            masks.first_tap = inside.begin * k;
            masks.taps = inside.size() * k;
        }
        const int64_t begin = std::clamp<int64_t>(b.first_cell, 0, columns.cells);
        const int64_t end = std::clamp<int64_t>(b.first_cell + sizes.cells, 0, columns.cells);
        // Cells that are not staged are 0. A vector that ends behind them is there before they are staged.
        const int64_t rows = masks.taps * up, before = -std::min<int64_t>(b.first_cell, 0);
        zero_cells(b.all_masks, rows, {0, before});
        for (int64_t cell = begin; cell < end; cell += L) {
            const int count = static_cast<int>(std::min<int64_t>(L, columns.cells - cell));
            masks.stage(b.n, b.group, {row, row + 1}, cell, count, stride, b.all_masks + (cell - b.first_cell));
        }
        zero_cells(b.all_masks, rows, {before + ceil_div(end - begin, L) * L, sizes.cells});
        zero_cropped_outputs(b, masks.taps);
        const TapPlace* const end_of_row = plan.tap_places + k * up;
        for (int64_t tile = 0; tile < b.tiles; tile++) {
            A* to = b.masks_of(plan, tile, row, first);
            const A* from = b.all_masks + (inside.begin * k - masks.first_tap) * up * stride + tile * L;
            for (int64_t a = inside.begin; a < inside.end; a++, to += L) {
                for (const TapPlace* tap = plan.tap_places; tap != end_of_row; tap++, from += stride)
                    store(load(from + tap->cell), to + tap->masks);
            }
        }
    }

    // A crop leaves out some outputs of the last cells. Their logits may be no numbers.
    void zero_cropped_outputs(const Block& b, int64_t taps) const {
        const int64_t end = std::min(columns.cells - b.first_cell, sizes.cells);
        for (int64_t phase = 0; phase < up; phase++) {
            const int64_t begin = std::max<int64_t>(columns.outputs(phase) - b.first_cell, 0);
            for (int64_t t = 0; begin < end && t < taps; t++) {
                A* const lanes = b.all_masks + (t * up + phase) * sizes.all_masks_stride;
                std::fill(lanes + begin, lanes + end, A{0});
            }
        }
    }

    // Zeroes whole vectors that cover some cells of rows of masks.
    void zero_cells(A* masks, int64_t rows, Range cells) const {
        if (cells.size() == 0) return;
        const Vector<A> zero = in_register(Vector<A>{});  // a vector is shorter than a call of memset
        for (int64_t r = 0; r < rows; r++, masks += sizes.all_masks_stride) {
            for (int64_t cell = cells.begin; cell < cells.end; cell += L) store(zero, masks + cell);
        }
    }

    // `staged_rows` are those of a channel.
    void stage_grads(const Block& b, int64_t channel, int64_t count, Range rows, int64_t staged_rows, A* to) const {
        const int64_t row_stride = up * sizes.cell_stride;
        const Deinterleaved layout{static_cast<int>(up),     b.first_cell, b.tiles * L + columns.halo(),
                                   staged_rows * row_stride, row_stride,   sizes.cell_stride};
        deinterleave_rows(p.grad_output, b.n, channel, count, rows, layout, to);
    }

    // The rows of grad_output that are staged after these: the next ones, or the first of the next channels.
    RowPrefetch grads_prefetch(const Block& b, int64_t channel, Range rows) const {
        const bool last = rows.end == b.outputs.end;
        const int64_t row = last ? b.outputs.begin : rows.end;
        const int64_t next_channel = last ? channel + plan.block.channels : channel;
        const int64_t left = (b.group + 1) * channels - next_channel;
        const int64_t column = std::max<int64_t>(b.first_cell * up, 0);
        return RowPrefetch(p.grad_output, b.n, next_channel, row, column, std::min(sizes.cells * up, p.out_w),
                           std::min(rows.size(), b.outputs.end - row), std::min(plan.block.channels, left));
    }

    // ---- contraction ----

    // Adds all outputs that read a block, in `count` channels, to its sums.
    void sweep_outputs(const Block& b, int64_t channel, int64_t count) const {
        Range rows = {b.outputs.begin, b.outputs.begin};  // centred on one row of sources
        int64_t begun = 0;                                // rows of the block before it have sums
        for (; rows.begin < b.outputs.end; rows.begin = rows.end) {
            rows.end = std::min(p.rows().first_output(p.rows().source(rows.begin) + 1), b.outputs.end);
            if (!plan.keeps_masks) {
                for (int64_t row = rows.begin; row < rows.end; row++) stage_masks(b, row, rows.begin);
            }
            stage_grads(b, channel, count, rows, rows.size(), b.grads);
            const Range inside = tap_rows(b, rows.begin);
            const int64_t first_source = p.rows().source(rows.begin) - p.radius() + inside.begin - b.sources.begin;
            zero_sums(b, {begun, first_source});
            contract_outputs(b, channel, count, rows, first_source, begun);
            begun = std::max(begun, first_source + inside.size());
        }
        zero_sums(b, {begun, b.sources.size()});
    }

    // Zeroes the sums of sources that no output reads.
    void zero_sums(const Block& b, Range rows) const {
        if (rows.size() == 0) return;
        for (int64_t t = 0; t < b.tiles; t++)
            std::fill(b.sums_of(plan, t, rows.begin), b.sums_of(plan, t, rows.end), A{0});
    }

    // Adds rows of outputs that are centred on one row of sources. Rows of sources before `begun` have sums.
    void contract_outputs(const Block& b, int64_t channel, int64_t count, Range rows, int64_t first_source,
                          int64_t begun) const {
        const int rows_inside = static_cast<int>(tap_rows(b, rows.begin).size());
        const int tiles_down = (rows_inside + kTileRows - 1) / kTileRows;
        GradFeaturesRegisterTile<A> tile;
        tile.sums_row = sizes.sums_row;
        tile.masks_tap = sizes.masks_tap;
        tile.masks_row = sizes.masks_row;
        tile.grads_row = up * sizes.cell_stride;
        tile.grads_channel = rows.size() * tile.grads_row;
        tile.outputs = rows.size();
        RowPrefetch prefetch = grads_prefetch(b, channel, rows);
        const int64_t lines = ceil_div(prefetch.lines(), b.tiles * tiles_down * down);
        for (int64_t t = 0; t < b.tiles; t++) {
            const A* const masks = b.masks_of(plan, t, rows.begin, plan.keeps_masks ? b.outputs.begin : rows.begin);
            for (int s = 0; s < tiles_down; s++) {
                const Range some = share_of(rows_inside, s, tiles_down);
                tile.begun = begun - first_source - some.begin;
                for (int residue = 0; residue < down; residue++) {
                    prefetch.prefetch_lines(lines);
                    tile.masks = masks + plan.taps_of[residue] * sizes.masks_tap + some.begin * L;
                    tile.runs = plan.runs + plan.runs_of[residue];
                    tile.runs_end = plan.runs + plan.runs_of[residue + 1];
                    tile.sums = b.sums_of(plan, t, first_source + some.begin) + residue * plan.block.channels * L;
                    tile.grads = b.grads + t * L;
                    with_count<kTileRows>(static_cast<int>(some.size()), [&](auto tile_rows) {
                        constexpr int kChannels = tile_channels(tile_rows());
                        for (int64_t c = 0; c < count; c += kChannels) {
                            if (c + kChannels <= count) {
                                add_grads_to_sources<tile_rows(), kChannels>(tile);
                                tile.sums += kChannels * L;
                                tile.grads += kChannels * tile.grads_channel;
                                continue;
                            }
                            for (int64_t last = c; last < count; last++) {
                                add_grads_to_sources<tile_rows(), 1>(tile);
                                tile.sums += L;
                                tile.grads += tile.grads_channel;
                            }
                        }
                    });
                }
            }
        }
    }
};

template <class T>
struct GradFeaturesNchw : GradFeaturesSums<Accumulator<T>> {
    using A = Accumulator<T>;
    using Sums = GradFeaturesSums<A>;
    using Sums::L, Sums::p, Sums::grad_features, Sums::columns, Sums::plan, Sums::sizes, Sums::down, Sums::channels;
    using Sums::stage_masks, Sums::stage_grads, Sums::grads_prefetch, Sums::tap_rows, Sums::sweep_outputs;
    using typename Sums::Block;

    void run_item(int64_t item, A* scratch) const {
        const Block b(plan, p, columns, item, scratch);
        if (plan.keeps_masks) {
            for (int64_t row = b.outputs.begin; row < b.outputs.end; row++) stage_masks(b, row, b.outputs.begin);
        }
        for (int64_t c = 0; c < channels; c += plan.block.channels) {
            const int64_t channel = b.group * channels + c, count = std::min(plan.block.channels, channels - c);
            if (plan.gathers) {
                if constexpr (std::is_same_v<A, float>) sweep_sources(b, channel, count);
                continue;
            }
            sweep_outputs(b, channel, count);
            write_sums(b, channel, count);
        }
    }

    // ---- gathering ----

    // Gathers and writes two rows of sources at a time.
    void sweep_sources(const Block& b, int64_t channel, int64_t count) const {
        const int64_t ring = gathered_rows(p), width = p.features.w;
        int64_t staged = b.outputs.begin;  // rows of outputs before it are staged
        for (Range rows = b.sources; rows.begin < b.sources.end; rows.begin += 2) {
            rows.end = std::min(rows.begin + 2, b.sources.end);
            const Range readers = outputs_of(p, rows);
            const Range next = {staged, std::max(staged, readers.end)};
            for (; staged < next.end; staged++)
                stage_grads(b, channel, count, {staged, staged + 1}, ring, b.grads + staged % ring * sizes.cell_stride);
            T* const to = element<T>(grad_features, b.n, channel, rows.begin, b.first_tile * 2 * L);
            RowPrefetch prefetch = grads_prefetch(b, channel, next);
            if (!plan.non_temporal) {
                gather_sources_of(b, count, rows, readers, prefetch, to, grad_features.stride_c,
                                  grad_features.stride_h);
                continue;
            }
            T* const collected = reinterpret_cast<T*>(b.rows);
            gather_sources_of(b, count, rows, readers, prefetch, collected, 2 * width, width);
            for (int64_t c = 0; c < count; c++) {
                copy_non_temporal(collected + c * 2 * width, rows.size() * width, to + c * grad_features.stride_c);
            }
        }
        if (plan.non_temporal) finish_non_temporal_stores();
    }

    // Gathers one or two rows of sources from the rows of outputs that read them, and writes them to `to`.
    void gather_sources_of(const Block& b, int64_t count, Range rows, Range readers, RowPrefetch& prefetch, T* to,
                           int64_t channel_stride, int64_t row_stride) const {
        const TapRun *const first = plan.runs, *const second = plan.runs + plan.runs_of[1];
        const int first_taps = first->taps, second_taps = plan.runs_of[2] > plan.runs_of[1] ? second->taps : 0;
        GatheredRow<A> gathered[(kMaxKernelSize + 1) / 2];
        GradFeaturesGather<A> tile;
        tile.rows = gathered;
        tile.rows_count = static_cast<int>(readers.size());
        const int64_t grads_channel = tile.grads_channel = gathered_rows(p) * sizes.cell_stride;
        tile.masks_tap = sizes.masks_tap;
        tile.residue_masks = plan.taps_of[1] * sizes.masks_tap;
        tile.second_alone = second_taps > 0 ? second->grads - first->grads : 0;
        tile.both = std::min<int64_t>(first_taps, second_taps);
        tile.first_alone = first_taps - tile.both;
        tile.sources_rows = static_cast<int>(rows.size());
        const int64_t first_grad = first->grads + tile.second_alone;
        // The last channels overlap those before. Fewer than a register tile holds are computed one by one.
        const int64_t together = count < kGatherChannels ? 1 : kGatherChannels;
        if (together == 1) tile.grads_channel = 0;
        const int64_t lines = ceil_div(prefetch.lines(), b.tiles), tile_columns = 2 * L;
        for (int64_t row = readers.begin; row < readers.end; row++) {
            const Range inside = tap_rows(b, row);
            const int64_t a = rows.begin - p.rows().source(row) + p.radius();  // that reads the first row
            gathered[row - readers.begin] = {
                b.grads + row % gathered_rows(p) * sizes.cell_stride + first_grad,
                b.masks_of(plan, 0, row, b.outputs.begin) + (std::max(a, inside.begin) - inside.begin) * L,
                a >= inside.begin, a + 1 < inside.end};
        }
        for (int64_t t = 0; t < b.tiles; t++, to += tile_columns) {
            prefetch.prefetch_lines(lines);
            const int64_t left = p.features.w - (b.first_tile + t) * tile_columns;
            const bool in_place = std::is_same_v<T, A> && left >= tile_columns;
            tile.sources_row = in_place ? row_stride : tile_columns;
            tile.sources_channel = together == 1 ? 0 : in_place ? channel_stride : 2 * tile_columns;
            for (int64_t c = 0; c < count; c += together) {
                c = std::min(c, count - together);
                T* const of_channel = to + c * channel_stride;
                tile.grads_offset = c * grads_channel;
                tile.sources = in_place ? reinterpret_cast<A*>(of_channel) : b.sums;
                gather_sources(tile);
                if (!in_place)
                    write_gathered(b.sums, together, rows.size(), left, of_channel, channel_stride, row_stride);
            }
            for (int n = 0; n < tile.rows_count; n++) {
                gathered[n].grads += L;
                gathered[n].masks += sizes.masks_tile;
            }
        }
    }

    // Writes `left` columns of some channels of a gathered tile, or all of its columns.
    void write_gathered(const A* from, int64_t count, int64_t rows, int64_t left, T* to, int64_t channel_stride,
                        int64_t row_stride) const {
        for (int64_t c = 0; c < count; c++, from += 4 * L, to += channel_stride) {
            for (int64_t r = 0; r < rows; r++) {
                store_part(load(from + 2 * r * L), to + r * row_stride, left);
                store_part(load(from + (2 * r + 1) * L), to + r * row_stride + L, left - L);
            }
        }
    }

    // ---- write out ----

    void write_sums(const Block& b, int64_t channel, int64_t count) const {
        if (worth_transposing(grad_features, count)) {
            write_adjacent_channels(b, channel, static_cast<int>(count));
            return;
        }
        for (int64_t c = 0; c < count; c++) {
            T* const to = element<T>(grad_features, b.n, channel + c, b.sources.begin, b.first_tile * L * down);
            if (plan.non_temporal) {
                T* const rows = reinterpret_cast<T*>(b.rows);
                write_rows(b, c, rows, p.features.w, 1);
                copy_non_temporal(rows, b.sources.size() * p.features.w, to);
            } else {
                write_rows(b, c, to, grad_features.stride_h, grad_features.stride_w);
            }
        }
        if (plan.non_temporal) finish_non_temporal_stores();
    }

    // Writes the rows of one channel of a block.
    void write_rows(const Block& b, int64_t c, T* to, int64_t row_stride, int64_t column_stride) const {
        const int64_t tile_columns = L * down, sums_tile = plan.block.rows * sizes.sums_row;
        const int64_t width = p.features.w - b.first_tile * tile_columns;
        const A* sums = b.sums + c * L;
        const auto for_each_tile = [&](auto store_tile) __attribute__((always_inline)) {
            for (int64_t i = b.sources.size(); i > 0; i--, sums += sizes.sums_row, to += row_stride) {
                const A* from = sums;
                T* tile = to;
                for (int64_t left = width, t = b.tiles; t > 0; t--, left -= tile_columns) {
                    store_tile(from, left, tile);
                    from += sums_tile;
                    tile += tile_columns * column_stride;
                }
            }
        };
        if (column_stride == 1 && down == 1) {
            for_each_tile([](const A* from, int64_t left, T* tile)
                              __attribute__((always_inline)) { store_part(load(from), tile, left); });
            return;
        }
        for_each_tile([&](const A* from, int64_t left, T* tile) __attribute__((noinline)) {
            store_interleaved(from, plan.block.channels * L, static_cast<int>(down), left, tile, column_stride);
        });
    }

    // Writes all channels together, adjacent in each pixel.
    void write_adjacent_channels(const Block& b, int64_t channel, int count) const {
        for (int64_t i = 0; i < b.sources.size(); i++) {
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                for (int64_t residue = 0; residue < down; residue++) {
                    const int64_t cell = (b.first_tile + tile) * L;
                    const int64_t pixels = std::clamp<int64_t>(columns.sources(residue) - cell, 0, L);
                    store_channels<T>(
                        adjacent_channels<const A>(b.sums_of(plan, tile, i) + residue * plan.block.channels * L, L),
                        static_cast<int>(pixels), count,
                        element<T>(grad_features, b.n, channel, b.sources.begin + i, cell * down + residue),
                        down * grad_features.stride_w);
                }
            }
        }
    }
};

}  // namespace

void grad_features_nchw(const Problem& problem, const Array& grad_features) {
    run_kernel<GradFeaturesNchw>(problem, grad_features);
}

}  // namespace carafepp::CARAFEPP_ISA
