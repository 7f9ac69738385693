// SPDX-License-Identifier: Apache-2.0
//
// The forward with columns in lanes, compiled once for each instruction set. A vector holds the same output (row,
// phase) of neighbouring cells, and staged masks have the same order.
//
// For a block of outputs, the kernel stages the masks. Then it sweeps down the rows, some channels and some rows at a
// time. It stages the rows of features that the windows reach, contracts the taps of each tile, and writes the outputs.
#include <algorithm>
#include <cassert>

#include "cpu/geometry.h"
#include "cpu/simd/border.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kBlockMaskVectors = 384 * 1024 / kVectorBytes;     // part of a level 2 cache
constexpr int64_t kBlockFeatureVectors = 28 * 1024 / kVectorBytes;   // part of a level 1 cache
constexpr int64_t kMostFeatureVectors = 1024 * 1024 / kVectorBytes;  // for wide rows
constexpr int64_t kNonTemporalBytes = 64 * 1024;                     // outputs collected for non-temporal stores
constexpr int64_t kPrefetchedBytes = 1024 * 1024;                    // inputs of a call that are worth prefetching

// A register tile has sums of one row of outputs, of two rows with at most two phases, or of three rows without a
// factor.
constexpr int kTilePhases = 4;
constexpr int kTileChannelsOfOnePhase = kVectorRegisters == 32 ? 8 : 6, kFewChannels = 4;  // of one phase
constexpr int kTileChannelsOfPhases = kVectorRegisters == 32 ? 4 : 3;
constexpr int kTileChannelsOfThreeRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kMostTileRows = 3;

// ---- plan ----

// Phases of a register tile, all with the same window.
struct TilePhases {
    int first, count, window;
};

// The sizes of a call, in elements of the sums unless a comment says otherwise. One item computes a block: some rows of
// some tiles, in all channels of a group. It stages and contracts some of these channels at a time.
struct ReassemblePlan {
    int64_t tiles, tile_columns;  // of a row, of a tile
    int64_t block_rows, block_tiles, block_channels;
    int64_t blocks_down, blocks_across, items;
    int64_t mask_row_size;  // [tap][phase][lane]; of a row of a tile

    // Features are staged as [channel][row modulo ring_rows][residue][cell]. The ring holds the windows of `tile_rows`
    // rows of outputs, which are contracted together.
    int64_t tile_rows, ring_rows, residue_stride, row_stride, channel_stride;
    // Tiles whose features are read in place. The tiles before them are staged from the first cell on. The tiles behind
    // them are staged at `behind`, from column `column_behind` on.
    Range in_place;
    int64_t behind, column_behind;
    int tap_offsets[kMaxFactor][kMaxKernelSize];  // [window][b]
    TilePhases register_tiles[kMaxFactor];
    int register_tiles_count;
    int64_t register_channels;  // of a register tile, at most

    bool prefetches;            // inputs
    bool stores_sums;           // into the output; otherwise first into `sums`: all phases of a tile of rows
    bool non_temporal_vectors;  // each vector of sums is a non-temporal store
    bool non_temporal_rows;     // rows are collected first, as their vectors are not whole cache lines
    int64_t line, rows_pitch;   // outputs of a cache line; of rows of a channel, and a line if they share one

    int64_t masks_size, features_size, sums_size, rows_size, scratch_size;
};

// Tells if there are register tiles of three rows: without factors, of a kernel size that the compiler knows.
bool contracts_three_rows(const Problem& p) {
    const bool known = p.kernel_size == 3 || p.kernel_size == 5 || p.kernel_size == 7;
    return p.factor.up == 1 && p.factor.down == 1 && known && p.features.dtype != CARAFEPP_FLOAT64;
}

// Tells if the outputs of a tile fill whole cache lines.
bool tiles_are_lines(const Array& output, int64_t tile_columns) {
    const int64_t line = 64 / itemsize(output.dtype);
    for (int64_t stride : {output.stride_n, output.stride_c, output.stride_h, tile_columns}) {
        if (stride % line != 0) return false;
    }
    return reinterpret_cast<uintptr_t>(output.data) % 64 == 0;
}

// Finds the tiles whose features can be read in place: their windows lie inside the row.
void read_in_place(ReassemblePlan& plan, const Problem& p, const Columns& columns, int64_t lanes) {
    plan.in_place = {plan.block_tiles, plan.block_tiles};
    const bool vectors = p.features.stride_w == 1 && itemsize(p.features.dtype) * lanes == kVectorBytes;
    if (p.factor.down > 1 || !vectors || plan.blocks_across > 1) return;
    const int64_t width = p.features.w, least = columns.least_shift, most = columns.most_shift;
    const Range inside = {ceil_div(std::max<int64_t>(-least, 0), lanes), std::min((width - most) / lanes, plan.tiles)};
    const int64_t column = std::min(inside.end * lanes + least, width - lanes);  // staged as whole vectors
    const int64_t before = inside.begin > 0 ? ceil_div(inside.begin * lanes + columns.halo(), lanes) * lanes : 0;
    const int64_t behind = inside.end < plan.tiles ? ceil_div(columns.cells + most - column, lanes) * lanes : 0;
    if (inside.size() == 0 || before + behind > plan.residue_stride) return;
    plan.in_place = inside;
    plan.behind = before;
    plan.column_behind = column;
    plan.residue_stride = before + behind;
}

ReassemblePlan plan_reassemble(const Problem& p, const Array& output, const Columns& columns,
                               const CellWindows& windows, int64_t lanes) {
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, channels = p.features.c / p.groups;
    ReassemblePlan plan;
    plan.tiles = ceil_div(columns.cells, lanes);
    plan.tile_columns = lanes * columns.phases;
    plan.mask_row_size = p.taps() * columns.phases * lanes;

    const bool three_rows = contracts_three_rows(p);
    plan.tile_rows = three_rows ? 3 : 2;
    plan.ring_rows = k + ceil_div((plan.tile_rows - 1) * down, up);
    // Windows of one phase need more channels than those of several.
    const int64_t register_channels = three_rows                     ? kTileChannelsOfThreeRows
                                      : up > 1 && windows.count == 1 ? kTileChannelsOfPhases
                                                                     : kTileChannelsOfOnePhase;
    plan.register_channels = register_channels;
    const int64_t most_cells = kMostFeatureVectors * lanes / (register_channels * plan.ring_rows * down) -
                               columns.halo();

    // A block has whole cells if their masks have room, else whole register tiles. A thread gets about four blocks, so
    // no thread waits long for the others.
    const int64_t row_step = up > 1 && up * plan.mask_row_size <= kBlockMaskVectors * lanes ? up : plan.tile_rows;
    const int64_t row_steps = ceil_div(p.out_h, row_step), masks_of_step = row_step * plan.mask_row_size;
    plan.block_tiles = share_size(plan.tiles, std::min(kBlockMaskVectors * lanes / masks_of_step, most_cells / lanes));
    plan.blocks_across = ceil_div(plan.tiles, plan.block_tiles);
    const int64_t threads = threads_for(INT32_MAX, p.cost() / static_cast<double>(lanes));
    const int64_t fewest_blocks_down = threads > 1 ? ceil_div(4 * threads, p.features.n * p.groups * plan.blocks_across)
                                                   : 1;
    const int64_t most_steps = std::max(row_steps / fewest_blocks_down, std::min<int64_t>(4, row_steps));
    plan.block_rows = row_step *
                      share_size(row_steps,
                                 std::min(kBlockMaskVectors * lanes / (masks_of_step * plan.block_tiles), most_steps));
    plan.blocks_down = ceil_div(p.out_h, plan.block_rows);
    plan.items = output.n * p.groups * plan.blocks_down * plan.blocks_across;

    const int64_t block_cells = std::min(plan.block_tiles * lanes, columns.cells);
    plan.residue_stride = ceil_div(block_cells + columns.halo(), lanes) * lanes;
    const int64_t channel_size = plan.ring_rows * down * plan.residue_stride;  // staged or in place
    read_in_place(plan, p, columns, lanes);
    plan.row_stride = down * plan.residue_stride;
    plan.channel_stride = plan.ring_rows * plan.row_stride;
    const int64_t most_channels = kBlockFeatureVectors * lanes / channel_size;
    plan.block_channels = std::min(channels, register_channels * share_size(ceil_div(channels, register_channels),
                                                                            most_channels / register_channels));

    plan.register_tiles_count = 0;
    for (int w = 0; w < windows.count; w++) {
        const SharedWindow& window = windows.windows[w];
        for (int first = static_cast<int>(window.begin); first < window.end; first += kTilePhases) {
            plan.register_tiles[plan.register_tiles_count++] = {
                first, static_cast<int>(std::min<int64_t>(window.end - first, kTilePhases)), w};
        }
        for (int b = 0; b < k; b++) {
            plan.tap_offsets[w][b] = static_cast<int>(
                columns.offset(columns.tap(window.begin, b), plan.residue_stride));
        }
    }

    const auto bytes = [](const Array& array) { return array.n * array.c * array.h * array.w * itemsize(array.dtype); };
    plan.prefetches = bytes(p.features) + bytes(p.from_logits ? p.logits : p.masks) >= kPrefetchedBytes;

    plan.line = 64 / itemsize(output.dtype);
    Array rows_together = output;
    rows_together.stride_h *= plan.tile_rows;
    plan.rows_pitch = plan.tile_rows * p.out_w;
    if (!tiles_are_lines(rows_together, plan.rows_pitch)) plan.rows_pitch += plan.line;
    plan.stores_sums = plan.register_tiles_count == 1 && output.stride_w == 1 &&
                       itemsize(output.dtype) * lanes == kVectorBytes;
    plan.non_temporal_vectors = plan.stores_sums && wants_non_temporal_stores(output) &&
                                tiles_are_lines(output, plan.tile_columns);
    plan.non_temporal_rows = output.stride_w == 1 && wants_non_temporal_stores(output) && !plan.non_temporal_vectors &&
                             plan.blocks_across == 1 && plan.tile_rows * p.out_w >= plan.line &&
                             plan.block_channels * plan.rows_pitch * itemsize(output.dtype) <= kNonTemporalBytes;

    plan.masks_size = plan.block_rows * plan.block_tiles * plan.mask_row_size;
    plan.features_size = plan.block_channels * plan.channel_stride + lanes;  // the last load may reach beyond
    plan.sums_size = plan.stores_sums ? 0 : plan.tile_rows * plan.block_channels * plan.tile_columns;
    plan.rows_size = plan.non_temporal_rows ? plan.line + plan.block_channels * plan.rows_pitch : 0;
    plan.scratch_size = plan.masks_size + plan.features_size + plan.sums_size + plan.rows_size;
    return plan;
}

template <class T>
struct ReassembleBlock {
    using A = Accumulator<T>;
    int64_t n, group, first_tile, tiles, first_cell, cells;
    Range rows;
    A* masks;     // [row][tile][tap][phase][lane]
    A* features;  // [channel][row modulo ring_rows][residue][cell]
    A* sums;      // [channel][row][column]; rows of a tile
    T* outputs;   // [channel][row][column]; whole rows, behind the rest of a cache line

    ReassembleBlock(const ReassemblePlan& plan, const Problem& p, const Columns& columns, int64_t item, A* scratch) {
        const int64_t across = item % plan.blocks_across, down = item / plan.blocks_across % plan.blocks_down;
        const int64_t image_group = item / plan.blocks_across / plan.blocks_down;
        n = image_group / p.groups;
        group = image_group % p.groups;
        first_tile = across * plan.block_tiles;
        tiles = std::min(plan.block_tiles, plan.tiles - first_tile);
        first_cell = first_tile * kLanes<A>;
        cells = std::min(tiles * kLanes<A>, columns.cells - first_cell);
        rows.begin = down * plan.block_rows;
        rows.end = std::min(rows.begin + plan.block_rows, p.out_h);
        masks = scratch;
        features = masks + plan.masks_size;
        sums = features + plan.features_size;
        outputs = reinterpret_cast<T*>(sums + plan.sums_size);
    }

    A* masks_of(const ReassemblePlan& plan, int64_t row, int64_t tile) const {
        return masks + ((row - rows.begin) * tiles + tile) * plan.mask_row_size;
    }
};

// ---- contraction: a tile of some rows of outputs ----

// The windows of the second row begin `window_step` rows of features after those of the first. Those of the third row
// begin one row after those of the second.
template <class A>
struct ReassembleRegisterTile {
    const A* features;  // staged, at the tile's first cell
    int64_t channel_stride;
    const int64_t* row_offsets;  // from the first row of the first window on
    const int* tap_offsets;
    bool adjacent_taps;  // in features, and in masks
    int kernel_size;
    int begin, end;  // rows of features inside the border
    int window_step;
    const A* masks[kMostTileRows];  // first tap of each row of outputs
    int64_t tap_stride;
    A* outputs;  // first row of the first channel
    int64_t output_channel_stride, output_row_stride;
    int64_t columns;   // of the output
    bool interleaves;  // has all phases and writes columns, else the lanes of each phase
    bool non_temporal;
    bool prefetches_outputs;  // those of the next rows
};

// Adds the taps in rows [begin, end) of features, from one channel on, to rows [First, Last) of outputs, and steps
// over their masks. K is the kernel size of adjacent taps, or 0 if the compiler does not know it. Loads limit the
// speed: features and masks that are used twice stay in registers. Addresses are pointers with constant offsets.
template <int K, int First, int Last, int R, int Q, int NC, class A>
CARAFEPP_INLINE void add_taps(const ReassembleRegisterTile<A>& tile, const A* channel, int begin, int end,
                              const A* (&masks)[R], Vector<A> (&sums)[R][Q][NC]) {
    constexpr int L = kLanes<A>;
    const int kernel_size = K > 0 ? K : tile.kernel_size;
    const int64_t tap_stride = K > 0 ? Q * L : tile.tap_stride, row_size = kernel_size * tap_stride;
    for (int y = begin; y < end; y++) {
        const A* rows[NC];
        rows[0] = opaque(channel + tile.row_offsets[y]);
#pragma GCC unroll 8
        for (int c = 1; c < NC; c++) rows[c] = opaque(rows[c - 1] + tile.channel_stride);
        const auto add_tap = [&](int b) __attribute__((always_inline)) {
            const int64_t tap = K > 0 ? b : tile.tap_offsets[b];
            const auto load_feature = [&](int c) __attribute__((always_inline)) {
                const Vector<A> feature = load(rows[c] + tap);
                return (Last - First) * Q > 1 ? in_register(feature) : feature;
            };
            const auto load_mask = [&](int r, int q) __attribute__((always_inline)) {
                return load(masks[r] + (K > 0 ? b * Q + q : q) * L);
            };
            if constexpr (NC > R * Q) {
                Vector<A> taps[R][Q];
#pragma GCC unroll 3
                for (int r = First; r < Last; r++) {
#pragma GCC unroll 4
                    for (int q = 0; q < Q; q++) taps[r][q] = in_register(load_mask(r, q));
                }
#pragma GCC unroll 8
                for (int c = 0; c < NC; c++) {
                    const Vector<A> feature = load_feature(c);
#pragma GCC unroll 3
                    for (int r = First; r < Last; r++) {
#pragma GCC unroll 4
                        for (int q = 0; q < Q; q++) sums[r][q][c] += taps[r][q] * feature;
                    }
                }
            } else {
                Vector<A> features[NC];
#pragma GCC unroll 8
                for (int c = 0; c < NC; c++) features[c] = load_feature(c);
#pragma GCC unroll 3
                for (int r = First; r < Last; r++) {
#pragma GCC unroll 4
                    for (int q = 0; q < Q; q++) {
                        const Vector<A> mask = load_mask(r, q);
#pragma GCC unroll 8
                        for (int c = 0; c < NC; c++) sums[r][q][c] += mask * features[c];
                    }
                }
            }
        };
        const int64_t step = K > 0 ? row_size : tap_stride;
        const auto next_masks = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 3
            for (int r = First; r < Last; r++) masks[r] = opaque(masks[r] + step);
        };
        if constexpr (K > 0) {
#pragma GCC unroll 7
            for (int b = 0; b < K; b++) add_tap(b);
            next_masks();
        } else {
            for (int b = 0; b < kernel_size; b++, next_masks()) add_tap(b);
        }
    }
}

// Calls store_vector(vector, to, q) for each vector of outputs. `Interleave` makes columns of the sums of all phases.
template <bool Interleave, int R, int Q, int NC, class A, class F>
CARAFEPP_INLINE void write_vectors(const Vector<A> (&sums)[R][Q][NC], const ReassembleRegisterTile<A>& tile, A* outputs,
                                   F store_vector) {
    // The compiler knows that stores to outputs do not change these.
    const int64_t channel_stride = tile.output_channel_stride, row_stride = tile.output_row_stride;
#pragma GCC unroll 8
    for (int c = 0; c < NC; c++, outputs += channel_stride) {
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) {
            Vector<A> vectors[Q];
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) vectors[q] = sums[r][q][c];
            if constexpr (Interleave) interleave<A, Q>(vectors);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) store_vector(vectors[q], outputs + r * row_stride + q * kLanes<A>, q);
        }
    }
}

// Turns rows of sums, [phase][lane], into rows of columns.
template <class A>
__attribute__((noinline)) void interleave_phases(A* row, int64_t rows, int phases) {
    constexpr int L = kLanes<A>;
    if (phases <= 4) {
        with_count<4>(phases, [&](auto known) __attribute__((always_inline)) {
            constexpr int N = decltype(known)::value;
            for (int64_t r = 0; r < rows; r++, row += N * L) {
                Vector<A> vectors[N];
#pragma GCC unroll 4
                for (int q = 0; q < N; q++) vectors[q] = load(row + q * L);
                interleave<A, N>(vectors);
#pragma GCC unroll 4
                for (int q = 0; q < N; q++) store(vectors[q], row + q * L);
            }
        });
        return;
    }
    A lanes[kMaxFactor * L];
    for (int64_t r = 0; r < rows; r++, row += phases * L) {
        std::copy_n(row, phases * L, lanes);
        for (int q = 0; q < phases; q++) {
            for (int lane = 0; lane < L; lane++) row[lane * phases + q] = lanes[q * L + lane];
        }
    }
}

// Contracts R rows and Q phases that share a window, NC channels at a time. Their sums stay in registers.
template <int K, int R, int Q, int NC, class A>
__attribute__((noinline)) void reassemble_channels(const ReassembleRegisterTile<A>& tile, int64_t channels) {
    constexpr int L = kLanes<A>;
    assert(channels >= NC);
    const int begin = tile.begin, end = tile.end, k = tile.kernel_size, step = tile.window_step;
    const int64_t row_size = k * tile.tap_stride;
    for (int64_t c = 0; c < channels; c += NC) {
        // The last channels overlap those before: a full register tile is faster.
        if (c + NC > channels) c = channels - NC;
        const A* const features = tile.features + c * tile.channel_stride;
        A* const outputs = tile.outputs + c * tile.output_channel_stride;
        if (tile.prefetches_outputs) {
            const A* next = outputs + std::max(R, 2) * tile.output_row_stride;
#pragma GCC unroll 1
            for (int n = 0; n < NC; n++, next += tile.output_channel_stride) {
#pragma GCC unroll 3
                for (int r = 0; r < R; r++) __builtin_prefetch(next + r * tile.output_row_stride, 1, 2);
            }
        }
        Vector<A> sums[R][Q][NC] = {};
        const A* masks[R];
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) masks[r] = tile.masks[r] + std::max(begin - r * step, 0) * row_size;
        if constexpr (R == 1) {
            add_taps<K, 0, 1>(tile, features, begin, end, masks, sums);
        } else if constexpr (R == 2) {
            add_taps<K, 0, 1>(tile, features, begin, std::min({end, step, k}), masks, sums);
            add_taps<K, 0, 2>(tile, features, std::max(begin, step), std::min(end, k), masks, sums);
            add_taps<K, 1, 2>(tile, features, std::max({begin, step, k}), end, masks, sums);
        } else {
            static_assert(R == 3 && K >= R, "a step for each row of features");
            if (begin < 1) add_taps<K, 0, 1>(tile, features, 0, 1, masks, sums);
            if (begin < 2) add_taps<K, 0, 2>(tile, features, 1, 2, masks, sums);
            add_taps<K, 0, 3>(tile, features, std::max(begin, 2), std::min(end, K), masks, sums);
            if (end > K) add_taps<K, 1, 3>(tile, features, K, K + 1, masks, sums);
            if (end > K + 1) add_taps<K, 2, 3>(tile, features, K + 1, K + 2, masks, sums);
        }
        const int64_t columns = tile.columns;
        const auto store_all = [](Vector<A> vector, A* to, int) __attribute__((always_inline)) { store(vector, to); };
        if (!tile.interleaves) {
            write_vectors<false>(sums, tile, outputs, store_all);
        } else if (columns < Q * L) {
            write_vectors<true>(sums, tile, outputs,
                                [columns](Vector<A> vector, A* to, int q)
                                    __attribute__((always_inline)) { store_part(vector, to, columns - q * L); });
        } else if (tile.non_temporal) {
            write_vectors<true>(sums, tile, outputs, [](Vector<A> vector, A* to, int) __attribute__((always_inline)) {
                store_non_temporal(vector, to);
            });
        } else {
            write_vectors<true>(sums, tile, outputs, store_all);
        }
    }
}

template <int K, int Q, int NC, class A>
void reassemble_rows_together(const ReassembleRegisterTile<A>& tile, int64_t channels, int64_t rows) {
    if (rows == 2 && NC > kFewChannels && channels >= kFewChannels && channels < NC) {
        reassemble_channels<0, 2, Q, std::min(kFewChannels, NC)>(tile, channels);
    } else if (rows == 2) {
        channels >= NC ? reassemble_channels<K, 2, Q, NC>(tile, channels)
                       : reassemble_channels<0, 2, Q, 1>(tile, channels);
    } else {
        channels >= NC ? reassemble_channels<K, 1, Q, NC>(tile, channels)
                       : reassemble_channels<0, 1, Q, 1>(tile, channels);
    }
}

// One row after the other, as the registers do not hold the sums of both.
template <int K, int Q, int NC, class A>
void reassemble_rows_in_turn(const ReassembleRegisterTile<A>& both, int64_t channels, int64_t rows) {
    for (int r = 0; r < rows; r++) {
        ReassembleRegisterTile<A> tile = both;
        tile.row_offsets += r * tile.window_step;
        tile.begin = std::max(both.begin - r * tile.window_step, 0);
        tile.end = std::min(both.end - r * tile.window_step, tile.kernel_size);
        tile.masks[0] = both.masks[r];
        tile.outputs += r * tile.output_row_stride;
        channels >= NC ? reassemble_channels<K, 1, Q, NC>(tile, channels)
                       : reassemble_channels<0, 1, Q, 1>(tile, channels);
    }
}

// Tiles of three rows, or what is left at the end of a block.
template <int K, class A>
void reassemble_three_rows(const ReassembleRegisterTile<A>& tile, int64_t channels, int64_t rows) {
    if (rows < 3) return reassemble_rows_together<0, 1, kTileChannelsOfOnePhase>(tile, channels, rows);
    if (channels >= kTileChannelsOfThreeRows)
        return reassemble_channels<K, 3, 1, kTileChannelsOfThreeRows>(tile, channels);
    reassemble_rows_in_turn<0, 1, kTileChannelsOfOnePhase>(tile, channels, rows);
}

template <int K, class A>
void reassemble_phases(const ReassembleRegisterTile<A>& tile, int phases, int64_t channels, int64_t rows) {
    static_assert(kTilePhases == 4, "a case for each number of phases");
    switch (phases) {
        case 1:
            if constexpr (K > 0) return reassemble_three_rows<K>(tile, channels, rows);
            reassemble_rows_together<K, 1, kTileChannelsOfOnePhase>(tile, channels, rows);
            break;
        case 2: reassemble_rows_together<K, 2, kTileChannelsOfPhases>(tile, channels, rows); break;
        case 3: reassemble_rows_in_turn<K, 3, kTileChannelsOfPhases>(tile, channels, rows); break;
        case 4: reassemble_rows_in_turn<K, 4, kTileChannelsOfPhases>(tile, channels, rows); break;
    }
}

// Contracts some rows of a tile, in some phases. Only floats have code for known kernel sizes, for its size.
template <class A>
void reassemble_tile(const ReassembleRegisterTile<A>& tile, int phases, int64_t channels, int64_t rows) {
    if constexpr (std::is_same_v<A, float>) {
        switch (tile.adjacent_taps ? tile.kernel_size : 0) {
            case 3: return reassemble_phases<3>(tile, phases, channels, rows);
            case 5: return reassemble_phases<5>(tile, phases, channels, rows);
            case 7:
                if (phases > 1) break;
                return reassemble_three_rows<7>(tile, channels, rows);
        }
    }
    reassemble_phases<0>(tile, phases, channels, rows);
}

// ---- the kernel ----

template <class T>
struct ReassembleNchw {
    using A = Accumulator<T>;
    using Block = ReassembleBlock<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& output;
    const MaskTiles<A> masks{p, std::min(p.factor.up, p.out_w)};
    const Columns columns{p, masks.phases};
    const ReassemblePlan plan = plan_reassemble(p, output, columns, CellWindows(p.factor, masks.phases), L);
    const int64_t channels = p.features.c / p.groups;
    const int64_t items = plan.items, scratch_size = plan.scratch_size;

    void run_item(int64_t item, A* scratch) const {
        const Block b(plan, p, columns, item, scratch);
        std::fill_n(b.features + plan.block_channels * plan.channel_stride, L, A{0});
        for (int64_t c = 0; c < channels; c += plan.block_channels) {
            // The last channels fill a register tile, with some of those before.
            const int64_t first = std::max<int64_t>(std::min(c, channels - plan.register_channels), 0);
            sweep_rows(b, b.group * channels + first, std::min(plan.block_channels, channels - first), c == 0);
        }
        if (plan.non_temporal_vectors || plan.non_temporal_rows) finish_non_temporal_stores();
    }

    // ---- staging ----

    // Masks of taps beyond the border become 0: features are staged as 0 there, and 0 times an infinite mask is NaN.
    void stage_masks(const Block& b, Range rows) const {
        for (int64_t row = rows.begin; row < rows.end; row++) {
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                const int64_t cell = b.first_cell + tile * L;
                const int count = static_cast<int>(std::min<int64_t>(L, columns.cells - cell));
                A* const to = b.masks_of(plan, row, tile);
                masks.stage(b.n, b.group, {row, row + 1}, cell, count, L, to);
                zero_taps_outside(columns, cell, to);
            }
        }
    }

    int64_t row_offset(int64_t i) const { return floor_mod(i, plan.ring_rows) * plan.row_stride; }

    // Rows that lie one after the other in the ring.
    void stage_features(const Block& b, int64_t channel, int64_t count, Range rows) const {
        const auto stage = [&](int64_t cell, int64_t end, A* to) {
            const Deinterleaved layout{static_cast<int>(p.factor.down),
                                       cell,
                                       end - cell,
                                       plan.channel_stride,
                                       plan.row_stride,
                                       plan.residue_stride};
            deinterleave_rows(p.features, b.n, channel, count, rows, layout, to + row_offset(rows.begin));
        };
        const int64_t before = std::min(plan.in_place.begin * L, b.cells), end = b.first_cell + b.cells;
        if (before > 0)
            stage(b.first_cell + columns.least_shift, b.first_cell + before + columns.most_shift, b.features);
        if (plan.in_place.end < b.tiles) stage(plan.column_behind, end + columns.most_shift, b.features + plan.behind);
    }

    // The first cell of a tile: staged in row 0 of the ring, or in row 0 of the array.
    const A* features_of(const Block& b, int64_t channel, int64_t tile) const {
        if (tile < plan.in_place.begin) return b.features + tile * L;
        const int64_t column = tile * L + columns.least_shift;
        if (tile >= plan.in_place.end) return b.features + plan.behind + column - plan.column_behind;
        return reinterpret_cast<const A*>(element<const T>(p.features, b.n, channel, 0, column));
    }

    // The features that are staged next, after the rows before `end`. The windows of outputs up to row `last` are
    // staged.
    RowPrefetch features_prefetch(const Block& b, int64_t channel, int64_t count, int64_t last, int64_t end) const {
        const bool below = last + 1 < b.rows.end;
        const int64_t first = below ? end : std::max<int64_t>(p.rows().source(b.rows.begin) - p.radius(), 0);
        const int64_t next_last = std::min((below ? last : b.rows.begin - 1) + plan.tile_rows, b.rows.end - 1);
        const int64_t next_end = std::min(p.rows().source(next_last) + p.radius() + 1, p.features.h);
        const int64_t next = below ? channel : channel + count;
        const int64_t left = (b.group + 1) * channels - next;
        const int64_t column = std::max<int64_t>((b.first_cell + columns.least_shift) * p.factor.down, 0);
        const int64_t count_columns = std::min((b.cells + columns.halo()) * p.factor.down, p.features.w - column);
        return RowPrefetch(p.features, b.n, next, first, column, count_columns, next_end - first,
                           std::min(below ? count : plan.block_channels, left));
    }

    // The masks or logits of some rows of outputs.
    RowPrefetch masks_prefetch(const Block& b, Range rows) const {
        const Array& array = p.from_logits ? p.logits : p.masks;
        const int64_t up = p.from_logits ? p.factor.up : 1, phases = p.factor.up / up;
        const int64_t taps = p.taps() * up * up, first = rows.begin / up, column = b.first_cell * phases;
        const int64_t count_columns = std::min(b.cells * phases, array.w - column);
        return RowPrefetch(array, b.n, b.group * taps, first, column, count_columns, ceil_div(rows.end, up) - first,
                           taps);
    }

    // ---- contraction ----

    // Contracts all rows of a block, in `count` channels. The first sweep stages the masks.
    void sweep_rows(const Block& b, int64_t channel, int64_t count, bool stages_masks) const {
        int64_t staged = 0;  // rows of features before it are staged
        for (int64_t i = b.rows.begin; i < b.rows.end; i += plan.tile_rows) {
            const Range rows = {i, std::min(i + plan.tile_rows, b.rows.end)};
            const Range window = {p.rows().source(i) - p.radius(), p.rows().source(rows.end - 1) + p.radius() + 1};
            assert(window.size() <= plan.ring_rows);
            staged = std::max(staged, window.begin);
            for (const int64_t end = std::min(window.end, p.features.h); staged < end;) {
                const Range adjacent = {staged, std::min(end, staged + plan.ring_rows - staged % plan.ring_rows)};
                stage_features(b, channel, count, adjacent);
                staged = adjacent.end;
            }
            RowPrefetch inputs[] = {features_prefetch(b, channel, count, rows.end - 1, window.end), RowPrefetch()};
            if (stages_masks) {
                stage_masks(b, rows);
                if (rows.end < b.rows.end)
                    inputs[1] = masks_prefetch(b, {rows.end, std::min(rows.end + plan.tile_rows, b.rows.end)});
            }
            contract_rows(b, channel, count, rows, window, inputs);
        }
    }

    // Contracts some rows of outputs, whose windows together are the rows `window` of features.
    void contract_rows(const Block& b, int64_t channel, int64_t count, Range rows, Range window,
                       RowPrefetch* inputs) const {
        int64_t ring_offsets[kMaxKernelSize + kMaxFactor], offsets_in_place[kMaxKernelSize + kMaxFactor];
        for (int64_t y = window.begin; y < window.end; y++) {
            ring_offsets[y - window.begin] = row_offset(y);
            offsets_in_place[y - window.begin] = y * p.features.stride_h;
        }
        const int64_t channel_stride = plan.non_temporal_rows ? plan.rows_pitch : output.stride_c;
        const int64_t row_stride = plan.non_temporal_rows ? p.out_w : output.stride_h;
        ReassembleRegisterTile<A> tile;
        tile.adjacent_taps = p.factor.down == 1 && plan.register_tiles_count == 1;
        assert(!tile.adjacent_taps || plan.tap_offsets[0][p.kernel_size - 1] == p.kernel_size - 1);
        tile.kernel_size = static_cast<int>(p.kernel_size);
        tile.begin = static_cast<int>(std::max<int64_t>(-window.begin, 0));
        tile.end = static_cast<int>(std::min(window.end, p.features.h) - window.begin);
        tile.window_step = rows.size() > 2 ? 1 : static_cast<int>(window.size() - p.kernel_size);
        tile.tap_stride = columns.phases * L;
        tile.output_channel_stride = plan.stores_sums ? channel_stride : plan.tile_rows * plan.tile_columns;
        tile.output_row_stride = plan.stores_sums ? row_stride : plan.tile_columns;
        tile.interleaves = plan.register_tiles_count == 1;
        tile.non_temporal = plan.non_temporal_vectors;
        const bool prefetches_outputs = plan.stores_sums && !plan.non_temporal_vectors && !plan.non_temporal_rows;
        // The first tile of a cache line prefetches it.
        const int64_t tiles_of_line = std::max<int64_t>(plan.line / plan.tile_columns, 1);
        const int64_t lines = ceil_div(inputs[0].lines() + inputs[1].lines(), b.tiles * plan.register_tiles_count);
        const int64_t columns_of_tile = plan.tile_columns, mask_row_size = plan.mask_row_size, tiles = b.tiles;
        const int64_t first_column = b.first_cell * p.factor.up, result_stride = output.stride_w * columns_of_tile;
        T* result = plan.non_temporal_rows ? b.outputs + plan.line
                                           : element<T>(output, b.n, channel, rows.begin, first_column);
        const A* masks_of_tile = b.masks_of(plan, rows.begin, 0);
        for (int64_t t = 0; t < tiles; t++, result += result_stride, masks_of_tile += mask_row_size) {
            const int64_t tile_columns = std::min(columns_of_tile, p.out_w - first_column - t * columns_of_tile);
            A* sums = b.sums;
            if constexpr (std::is_same_v<T, A>) {
                if (plan.stores_sums) sums = result;
            }
            tile.prefetches_outputs = prefetches_outputs && t % tiles_of_line == 0;
            const bool in_place = t >= plan.in_place.begin && t < plan.in_place.end;
            tile.channel_stride = in_place ? p.features.stride_c : plan.channel_stride;
            tile.row_offsets = in_place ? offsets_in_place : ring_offsets;
            tile.features = features_of(b, channel, t);
            tile.columns = plan.stores_sums ? tile_columns : columns_of_tile;
            for (int k = 0; k < plan.register_tiles_count; k++) {
                const TilePhases& some = plan.register_tiles[k];
                tile.tap_offsets = plan.tap_offsets[some.window];
                for (int64_t r = 0; r < rows.size(); r++)
                    tile.masks[r] = masks_of_tile + r * tiles * mask_row_size + some.first * L;
                tile.outputs = sums + some.first * L;
                if (plan.prefetches) inputs[1].prefetch_lines(inputs[0].prefetch_lines(lines));
                reassemble_tile(tile, some.count, count, rows.size());
            }
            if (!plan.stores_sums)
                write_sums(b.sums, count, rows.size(), tile_columns, result, channel_stride, row_stride);
        }
        if (plan.non_temporal_rows) write_rows(b, channel, count, rows);
    }

    // ---- write out ----

    // Converts the sums of a tile to outputs.
    void write_sums(A* sums, int64_t count, int64_t rows, int64_t tile_columns, T* result, int64_t channel_stride,
                    int64_t row_stride) const {
        const auto for_each_channel = [&](auto store_rows) __attribute__((always_inline)) {
            for (int64_t c = 0; c < count; c++, sums += plan.tile_rows * plan.tile_columns, result += channel_stride)
                store_rows(sums, result);
        };
        const int phases = static_cast<int>(columns.phases);
        if constexpr (std::is_same_v<T, A>) {
            const auto shuffle_rows = [&](auto known_phases) __attribute__((always_inline)) {
                for_each_channel([&](const A* from, T* to) __attribute__((always_inline)) {
                    for (int64_t r = 0; r < rows; r++, from += plan.tile_columns, to += row_stride)
                        store_interleaved<decltype(known_phases)::value>(from, L, tile_columns, to);
                });
            };
            if (plan.register_tiles_count > 1 && output.stride_w == 1 && with_shuffles(phases, shuffle_rows)) return;
        }
        for_each_channel([&](A* of_channel, T* to) __attribute__((always_inline)) {
            if (plan.register_tiles_count > 1) interleave_phases(of_channel, rows, phases);
            for (int64_t r = 0; r < rows; r++, of_channel += plan.tile_columns, to += row_stride) {
                for (int64_t k = 0; k < tile_columns; k += L) {
                    store_lanes<T>(of_channel + k, static_cast<int>(std::min<int64_t>(tile_columns - k, L)),
                                   to + k * output.stride_w, output.stride_w);
                }
            }
        });
    }

    // Copies whole rows by non-temporal stores. Adjacent rows are one row: the outputs of its last line that other rows
    // share wait for those.
    void write_rows(const Block& b, int64_t channel, int64_t count, Range rows) const {
        const bool adjacent = output.stride_h == p.out_w, first = rows.begin == b.rows.begin;
        const int64_t copies = adjacent ? 1 : rows.size(), size = p.out_w * rows.size() / copies;
        for (int64_t c = 0; c < count; c++) {
            for (int64_t r = 0; r < copies; r++) {
                T* const from = b.outputs + c * plan.rows_pitch + plan.line + r * size;
                T* const to = element<T>(output, b.n, channel + c, rows.begin + r, 0);
                const int64_t before = adjacent && !first ? elements_before(to) : 0;
                const int64_t rest = adjacent && rows.end < b.rows.end ? elements_before(to + size) : 0;
                copy_non_temporal(from - before, before + size - rest, to - before);
                std::copy_n(from + size - rest, rest, from - rest);
            }
        }
    }
};

}  // namespace

void reassemble_nchw(const Problem& problem, const Array& output) { run_kernel<ReassembleNchw>(problem, output); }

}  // namespace carafepp::CARAFEPP_ISA
