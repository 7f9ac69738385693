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

// A register tile has sums of some rows of sources, in some channels.
constexpr int kTileRows = kVectorRegisters == 32 ? 5 : 3;
constexpr int kTileChannels = 4;

// ---- plan ----

// The places of a tap in staged outputs and staged masks.
struct TapOffsets {
    int64_t grads, masks;
};

// One item computes a block: some rows of some tiles of sources, in all channels of a group. It stages and contracts
// some of these channels at a time.
struct GradFeaturesBlockShape {
    int64_t tiles, rows, channels;
};

// The sizes of staged arrays for blocks of a shape, in elements of the sums.
struct GradFeaturesSizes {
    int64_t mask_rows;                             // of outputs whose masks are staged together
    int64_t masks_tap_row, masks_row, masks_tile;  // [tile][row of outputs][tap row][b][phase][lane]
    int64_t cells, cell_stride, all_masks_stride;  // of outputs that read a block, with halo
    int64_t sums_row;                              // [residue][channel][lane]
    int64_t masks, sums, rows, grads_or_masks, scratch;
};

struct GradFeaturesPlan {
    int64_t tiles;     // of a row of sources
    bool keeps_masks;  // of all rows of outputs that read a block; else of those centred on one row of sources
    GradFeaturesBlockShape block;
    int64_t blocks_across, blocks_down, items;
    bool non_temporal;  // whole rows are collected, and copied by non-temporal stores
    GradFeaturesSizes sizes;
    TapOffsets taps[kMaxFactor * kMaxKernelSize];
    int taps_of[kMaxFactor + 1];  // those of a residue are [taps_of[residue], taps_of[residue + 1])
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

GradFeaturesSizes sizes_of(const Problem& p, const Columns& columns, const GradFeaturesBlockShape& block,
                           bool keeps_masks, bool non_temporal, int64_t lanes) {
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size;
    const int64_t rows_of_source = ceil_div(up, down), tap_rows = std::min(block.rows, k);
    GradFeaturesSizes sizes;
    sizes.mask_rows = keeps_masks ? p.factor.first_output(block.rows + k - 1) : rows_of_source;
    sizes.masks_tap_row = k * up * lanes;
    sizes.masks_row = tap_rows * sizes.masks_tap_row;
    sizes.masks_tile = sizes.mask_rows * sizes.masks_row;
    sizes.cells = block.tiles * lanes + columns.halo();
    sizes.cell_stride = ceil_div(sizes.cells, lanes) * lanes;
    sizes.all_masks_stride = sizes.cell_stride + lanes;
    sizes.sums_row = down * block.channels * lanes;
    sizes.masks = block.tiles * sizes.masks_tile;
    sizes.sums = block.tiles * block.rows * sizes.sums_row;
    sizes.rows = non_temporal ? ceil_div(block.rows * p.features.w, lanes) * lanes : 0;
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
        return sizes_of(p, columns, block, plan.keeps_masks, non_temporal, lanes);
    };
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
    plan.block = block;
    plan.blocks_down = ceil_div(height, block.rows);
    plan.items = blocks_of_row * plan.blocks_down;
    plan.non_temporal = writes_non_temporal_rows(grad_features, plan.blocks_across == 1);
    plan.sizes = sizes();

    int count = 0;
    for (int residue = 0; residue < columns.down; residue++) {
        plan.taps_of[residue] = count;
        for (int phase = 0; phase < columns.phases; phase++) {
            for (int b = 0; b < k; b++) {
                const Columns::Tap& tap = columns.tap(phase, b);
                if (tap.residue == residue) {
                    plan.taps[count++] = {phase * plan.sizes.cell_stride + columns.most_shift - tap.shift,
                                          (b * columns.phases + phase) * lanes};
                }
            }
        }
    }
    plan.taps_of[columns.down] = count;
    return plan;
}

template <class T>
struct GradFeaturesBlock {
    using A = Accumulator<T>;
    int64_t n, group, first_tile, tiles;
    int64_t first_cell;  // of the outputs that read the block; perhaps before the row
    Range sources;       // rows
    Range outputs;       // rows that read them
    A* masks;            // [tile][row of outputs][tap row][b][phase][lane]
    A* sums;             // [tile][row][residue][channel][lane]
    T* rows;             // [row][column]; the result of one channel
    A* grads;            // [channel][row of outputs][phase][cell]
    A* all_masks;        // [tap][phase][cell]; one row of outputs

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
        rows = reinterpret_cast<T*>(sums + plan.sizes.sums);
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
    const A* masks;  // first tap row
    int64_t masks_tap_row, masks_row;
    const A* grads;
    int64_t grads_channel, grads_row;
    int64_t outputs;  // rows
    const TapOffsets *taps, *taps_end;
};

// Adds masks * grad_output to the sums of NR rows of sources and NC channels, which stay in registers.
template <int NR, int NC, class A>
__attribute__((noinline)) void add_grads_to_sources(const GradFeaturesRegisterTile<A>& tile, RowPrefetch& prefetch) {
    constexpr int L = kLanes<A>;
    Vector<A> sums[NR][NC];
#pragma GCC unroll 5
    for (int r = 0; r < NR; r++) {
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) sums[r][c] = load(tile.sums + r * tile.sums_row + c * L);
    }
    const int64_t grads_channel = tile.grads_channel, masks_tap_row = tile.masks_tap_row;
    for (int64_t o = 0; o < tile.outputs; o++) {
        const A* const grads = tile.grads + o * tile.grads_row;
        const A* const masks = tile.masks + o * tile.masks_row;
        for (const TapOffsets* tap = tile.taps; tap != tile.taps_end; tap++) {
            const A* const from = grads + tap->grads;
            prefetch.prefetch_line();
            Vector<A> mask[NR];
#pragma GCC unroll 5
            for (int r = 0; r < NR; r++) mask[r] = load(masks + tap->masks + r * masks_tap_row);
#pragma GCC unroll 4
            for (int c = 0; c < NC; c++) {
                const Vector<A> grad = load(from + c * grads_channel);
#pragma GCC unroll 5
                for (int r = 0; r < NR; r++) sums[r][c] += mask[r] * grad;
            }
        }
    }
#pragma GCC unroll 5
    for (int r = 0; r < NR; r++) {
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) store(sums[r][c], tile.sums + r * tile.sums_row + c * L);
    }
}

// ---- the kernel ----

template <class T>
struct GradFeaturesNchw {
    using A = Accumulator<T>;
    using Block = GradFeaturesBlock<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_features;
    const Columns columns{p, p.factor.up};
    const GradFeaturesPlan plan = plan_grad_features(p, grad_features, columns, L);
    const GradFeaturesSizes& sizes = plan.sizes;
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size;
    const int64_t channels = p.features.c / p.groups;
    const int64_t items = plan.items, scratch_size = plan.sizes.scratch;

    void run_item(int64_t item, A* scratch) const {
        const Block b(plan, p, columns, item, scratch);
        if (plan.keeps_masks) {
            for (int64_t row = b.outputs.begin; row < b.outputs.end; row++) stage_masks(b, row, b.outputs.begin);
        }
        for (int64_t c = 0; c < channels; c += plan.block.channels) {
            const int64_t channel = b.group * channels + c, count = std::min(plan.block.channels, channels - c);
            sweep_outputs(b, channel, count);
            write_sums(b, channel, count);
        }
    }

    // ---- staging ----

    // The tap rows of a row of outputs that read the block.
    Range tap_rows(const Block& b, int64_t row) const {
        const int64_t top = p.rows().source(row) - p.radius();
        return {std::max<int64_t>(b.sources.begin - top, 0), std::min(b.sources.end - top, k)};
    }

    // Stages the masks of one row of outputs, each tap shifted to the cells of the sources that it reads. Cells
    // without an output have 0. `first` is the first row that is staged with this one.
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
        for (int64_t cell = begin; cell < end; cell += L) {
            const int count = static_cast<int>(std::min<int64_t>(L, columns.cells - cell));
            masks.stage(b.n, b.group, {row, row + 1}, cell, count, stride, b.all_masks + (cell - b.first_cell));
        }
        zero_cells_without_output(b, masks.taps);
        for (int64_t tile = 0; tile < b.tiles; tile++) {
            A* to = b.masks_of(plan, tile, row, first);
            for (int64_t t = inside.begin * k; t < inside.end * k; t++) {
                for (int phase = 0; phase < up; phase++, to += L) {
                    const int64_t shift = columns.most_shift - columns.tap(phase, t % k).shift;
                    store(load(b.all_masks + ((t - masks.first_tap) * up + phase) * stride + tile * L + shift), to);
                }
            }
        }
    }

    void zero_cells_without_output(const Block& b, int64_t taps) const {
        const int64_t cells = sizes.cell_stride, stride = sizes.all_masks_stride;
        for (int64_t phase = 0; phase < up; phase++) {
            const int64_t outputs = columns.outputs(phase);
            if (b.first_cell >= 0 && b.first_cell + cells <= outputs) continue;
            const int64_t begin = std::clamp<int64_t>(-b.first_cell, 0, cells);
            const int64_t end = std::clamp<int64_t>(outputs - b.first_cell, 0, cells);
            for (int64_t t = 0; t < taps; t++) {
                A* const lanes = b.all_masks + (t * up + phase) * stride;
                std::fill(lanes, lanes + begin, A{0});
                std::fill(lanes + end, lanes + cells, A{0});
            }
        }
    }

    void stage_grads(const Block& b, int64_t channel, int64_t count, Range rows) const {
        const int64_t row_stride = up * sizes.cell_stride;
        const Deinterleaved layout{static_cast<int>(up),     b.first_cell, b.tiles * L + columns.halo(),
                                   rows.size() * row_stride, row_stride,   sizes.cell_stride};
        deinterleave_rows(p.grad_output, b.n, channel, count, rows, layout, b.grads);
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
        std::fill_n(b.sums, b.tiles * plan.block.rows * sizes.sums_row, A{0});
        Range rows = {b.outputs.begin, b.outputs.begin};  // centred on one row of sources
        for (; rows.begin < b.outputs.end; rows.begin = rows.end) {
            rows.end = std::min(p.rows().first_output(p.rows().source(rows.begin) + 1), b.outputs.end);
            if (!plan.keeps_masks) {
                for (int64_t row = rows.begin; row < rows.end; row++) stage_masks(b, row, rows.begin);
            }
            stage_grads(b, channel, count, rows);
            contract_outputs(b, channel, count, rows);
        }
    }

    // Adds rows of outputs that are centred on one row of sources.
    void contract_outputs(const Block& b, int64_t channel, int64_t count, Range rows) const {
        const Range inside = tap_rows(b, rows.begin);
        const int64_t first_source = p.rows().source(rows.begin) - p.radius() + inside.begin - b.sources.begin;
        const int rows_inside = static_cast<int>(inside.size());
        const int tiles_down = (rows_inside + kTileRows - 1) / kTileRows;
        GradFeaturesRegisterTile<A> tile;
        tile.sums_row = sizes.sums_row;
        tile.masks_tap_row = sizes.masks_tap_row;
        tile.masks_row = sizes.masks_row;
        tile.grads_row = up * sizes.cell_stride;
        tile.grads_channel = rows.size() * tile.grads_row;
        tile.outputs = rows.size();
        RowPrefetch prefetch = grads_prefetch(b, channel, rows);
        for (int64_t t = 0; t < b.tiles; t++) {
            const A* const masks = b.masks_of(plan, t, rows.begin, plan.keeps_masks ? b.outputs.begin : rows.begin);
            for (int s = 0; s < tiles_down; s++) {
                const Range some = share_of(rows_inside, s, tiles_down);
                tile.masks = masks + some.begin * sizes.masks_tap_row;
                for (int residue = 0; residue < down; residue++) {
                    tile.taps = plan.taps + plan.taps_of[residue];
                    tile.taps_end = plan.taps + plan.taps_of[residue + 1];
                    A* const sums = b.sums_of(plan, t, first_source + some.begin) + residue * plan.block.channels * L;
                    for (int64_t c = 0; c < count; c += kTileChannels) {
                        tile.sums = sums + c * L;
                        tile.grads = b.grads + c * tile.grads_channel + t * L;
                        with_count<kTileRows>(static_cast<int>(some.size()), [&](auto tile_rows) {
                            with_count<kTileChannels>(static_cast<int>(count - c), [&](auto tile_channels) {
                                add_grads_to_sources<tile_rows(), tile_channels()>(tile, prefetch);
                            });
                        });
                    }
                }
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
                write_rows(b, c, b.rows, p.features.w, 1);
                copy_non_temporal(b.rows, b.sources.size() * p.features.w, to);
            } else {
                write_rows(b, c, to, grad_features.stride_h, grad_features.stride_w);
            }
        }
        if (plan.non_temporal) finish_non_temporal_stores();
    }

    // Writes the rows of one channel of a block.
    void write_rows(const Block& b, int64_t c, T* to, int64_t row_stride, int64_t column_stride) const {
        const int64_t tile_columns = L * down, sums_tile = plan.block.rows * sizes.sums_row;
        for (int64_t i = 0; i < b.sources.size(); i++, to += row_stride) {
            const A* from = b.sums_of(plan, 0, i) + c * L;
            T* tile = to;
            int64_t left = p.features.w - b.first_tile * tile_columns;
            for (int64_t t = 0; t < b.tiles; t++) {
                store_interleaved(from, plan.block.channels * L, static_cast<int>(down), left, tile, column_stride);
                from += sums_tile;
                tile += tile_columns * column_stride;
                left -= tile_columns;
            }
        }
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
