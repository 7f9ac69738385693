// SPDX-License-Identifier: Apache-2.0
//
// The forward with columns in lanes, compiled once for each instruction set. A vector holds the same output (row,
// phase) of neighbouring cells; it needs the masks as they are staged. For a block of rows of outputs: stage the masks
// of all tiles; then for some channels at a time sweep down the rows, two at a time: stage the rows of features that
// come into their windows, contract the taps tile by tile, and write out.
#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/shared_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kMasksInBlock = 384 * 1024 / kVectorBytes;    // vectors, of a level 2 cache
constexpr int64_t kFeaturesInBlock = 24 * 1024 / kVectorBytes;  // vectors, of a level 1 cache
constexpr int64_t kMostFeatures = 1024 * 1024 / kVectorBytes;   // vectors, where rows are wide
constexpr int64_t kRowsBytes = 64 * 1024;                       // of outputs, that are written out soon

constexpr int kMostPhases = 4;  // contracted at once, of one row or, up to two, of both

// Channels contracted at once, with one phase and with more: as many as there are registers for their sums.
constexpr int kFor1 = kVectorRegisters == 32 ? 8 : 4, kFor2 = kVectorRegisters == 32 ? 4 : 3;

// One tile of one or two rows of outputs, whose windows begin `step` rows of features apart.
template <class A>
struct Windows {
    const A* features;  // staged, at the tile's first cell
    int64_t channel_stride;
    const int* rows;     // where each is, from the first window's first tap on
    const int* columns;  // in a row, of each tap
    int kernel_size;
    int begin, end;  // rows that are inside
    int step;
    const A* weights[2];  // of each row of outputs, at its first tap
    int64_t tap_stride;   // of the weights
    A* outputs;           // of the first row, in the first channel
    int64_t output_channel_stride, output_row_stride;
    int64_t count;     // columns of outputs
    int64_t phases;    // in a cell of them
    bool past_caches;  // are whole vectors of outputs written
    Ahead* ahead;
    int lines_ahead;  // fetched with each row of taps
};

// Adds the taps of rows [begin, end) of features, from one channel on, to the rows [First, Last) of outputs. `K` is the
// kernel size, or 0 where the compiler does not know it; where it does, the weights of neighbouring taps are adjacent.
// Whatever else is computed here takes the place of a multiplication: hence so few addresses.
template <int K, int First, int Last, int R, int Q, int NC, class A>
CARAFEPP_INLINE void accumulate(const Windows<A>& windows, const A* channel, int begin, int end,
                                Vector<A> (&sums)[R][Q][NC]) {
    constexpr int L = kLanes<A>;
    const int kernel_size = K > 0 ? K : windows.kernel_size;
    const int64_t tap_stride = K > 0 ? Q * L : windows.tap_stride;
    const int64_t stride = windows.channel_stride, three_channels = 3 * stride;
    for (int y = begin; y < end; y++) {
        const A* const row = channel + windows.rows[y];
        const A* weights[R];
#pragma GCC unroll 2
        for (int r = First; r < Last; r++) {
            weights[r] = windows.weights[r] + (y - r * windows.step) * kernel_size * tap_stride;
        }
        for (int k = 0; k < windows.lines_ahead; k++) windows.ahead->fetch_line();
        const auto add_tap = [&](int b) __attribute__((always_inline)) {
            Vector<A> features[NC];
#pragma GCC unroll 8
            for (int c = 0; c < NC; c += 4) {
                const A* const x = row + windows.columns[b] + c * stride;
                features[c] = load(x);
                if (c + 1 < NC) features[c + 1] = load(x + stride);
                if (c + 2 < NC) features[c + 2] = load(x + 2 * stride);
                if (c + 3 < NC) features[c + 3] = load(x + three_channels);
            }
#pragma GCC unroll 2
            for (int r = First; r < Last; r++) {
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++) {
                    const Vector<A> weight = load(weights[r] + q * L);
#pragma GCC unroll 8
                    for (int c = 0; c < NC; c++) sums[r][q][c] += weight * features[c];
                }
                weights[r] += tap_stride;
            }
        };
        if constexpr (K > 0) {
#pragma GCC unroll 5
            for (int b = 0; b < K; b++) add_tap(b);
        } else {
            for (int b = 0; b < kernel_size; b++) add_tap(b);
        }
    }
}

// Writes sums of all phases of a cell, which interleaved are vectors of outputs, each by store_vector(vector, to, q).
template <int R, int Q, int NC, class A, class F>
CARAFEPP_INLINE void write(const Vector<A> (&sums)[R][Q][NC], const Windows<A>& windows, A* outputs, F store_vector) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < NC; c++) {
            A* const to = outputs + r * windows.output_row_stride + c * windows.output_channel_stride;
            Vector<A> columns[Q];
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) columns[q] = sums[r][q][c];
            interleave<A, Q>(columns);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) store_vector(columns[q], to + q * kLanes<A>, q);
        }
    }
}

// The same of some phases: sums, [row][phase][channel], lie between those of others.
template <class A>
__attribute__((noinline)) void write_between(const A* sums, int rows, int phases, int channels,
                                             const Windows<A>& windows, A* outputs) {
    for (int r = 0; r < rows; r++) {
        for (int q = 0; q < phases; q++) {
            for (int c = 0; c < channels; c++) {
                A* const to = outputs + r * windows.output_row_stride + c * windows.output_channel_stride;
                const A* lane = sums + ((r * phases + q) * channels + c) * kLanes<A>;
                for (int64_t column = q; column < windows.count; column += windows.phases) to[column] = *lane++;
            }
        }
    }
}

// `R` rows and `Q` phases that read the same columns, `NC` channels at a time.
template <int K, int R, int Q, int NC, class A>
__attribute__((noinline)) void contract(const Windows<A>& windows, int64_t channels) {
    constexpr int L = kLanes<A>;
    const int begin = windows.begin, end = windows.end, k = windows.kernel_size, step = windows.step;
    for (int64_t c = 0; c < channels; c += NC) {
        if (c + NC > channels) c = channels - NC;  // some once more, rather than few at a time
        const A* const features = windows.features + c * windows.channel_stride;
        A* const outputs = windows.outputs + c * windows.output_channel_stride;
        Vector<A> sums[R][Q][NC] = {};
        if constexpr (R == 1) {
            accumulate<K, 0, 1>(windows, features, begin, end, sums);
        } else {
            accumulate<K, 0, 1>(windows, features, begin, std::min({end, step, k}), sums);
            accumulate<K, 0, 2>(windows, features, std::max(begin, step), std::min(end, k), sums);
            accumulate<K, 1, 2>(windows, features, std::max({begin, step, k}), end, sums);
        }
        const int64_t count = windows.count;
        if (Q != windows.phases) {
            A lanes[R * Q * NC * L];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++) {
#pragma GCC unroll 8
                    for (int n = 0; n < NC; n++) store(sums[r][q][n], lanes + ((r * Q + q) * NC + n) * L);
                }
            }
            write_between(lanes, R, Q, NC, windows, outputs);
        } else if (count < Q * L) {
            write(sums, windows, outputs, [count](Vector<A> vector, A* to, int q) __attribute__((always_inline)) {
                store_part(vector, to, count - q * L);
            });
        } else if (windows.past_caches) {
            write(sums, windows, outputs,
                  [](Vector<A> vector, A* to, int) __attribute__((always_inline)) { store_non_temporal(vector, to); });
        } else {
            write(sums, windows, outputs,
                  [](Vector<A> vector, A* to, int) __attribute__((always_inline)) { store(vector, to); });
        }
    }
}

// ---- the whole ----

// How a problem is cut, and where its features are staged: of each channel a ring of the rows that two rows of outputs
// reach.
struct Cut {
    int64_t rows, tiles, channels;                         // of a block
    int64_t reach_before, reach_behind;                    // cells beyond its own that the taps of a cell read
    int64_t ring, residue_stride, row_size, channel_size;  // of staged features
    int tap_columns[kMaxFactor][kMaxKernelSize];           // of each group of phases

    // Phases of one group, as many as are contracted at once.
    struct Part {
        int first, count, group;
    };
    Part parts[kMaxFactor];
    int parts_count = 0;

    Cut(const Problem& p, const Phases& phases, int64_t mask_row_size, int64_t lanes, int64_t threads) {
        const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, r = p.radius();
        const int64_t cells = ceil_div(p.out_w, up), all_tiles = ceil_div(cells, lanes);
        const bool whole_cells = up > 1 && up * mask_row_size <= kMasksInBlock * lanes;
        const int64_t unit = whole_cells ? up : 2, units = ceil_div(p.out_h, unit);  // of rows
        const int64_t tile_size = unit * mask_row_size;
        const int64_t at_once = up == 1 ? kFor1 : kFor2;
        reach_before = -floor_div(-r, down);
        reach_behind = floor_div(phases.groups[phases.count - 1].offset + r, down);
        ring = k + ceil_div(down, up);
        const int64_t most_cells = kMostFeatures * lanes / (at_once * ring * down) - reach_before - reach_behind;
        tiles = split(all_tiles, std::min(kMasksInBlock * lanes / tile_size, most_cells / lanes));
        const int64_t blocks_beside = p.features.n * p.groups * ceil_div(all_tiles, tiles);
        const int64_t blocks = threads > 1 ? ceil_div(4 * threads, blocks_beside) : 1;  // so that no thread waits long
        const int64_t fewest = std::min<int64_t>(4, units);
        rows = split(units, std::min(kMasksInBlock * lanes / (tile_size * tiles), std::max(units / blocks, fewest))) *
               unit;

        const int64_t block_cells = std::min(tiles * lanes, cells);
        residue_stride = ceil_div(block_cells + reach_before + reach_behind, lanes) * lanes;
        row_size = down * residue_stride;
        channel_size = ring * row_size;
        const int64_t all_channels = p.features.c / p.groups;
        channels = kFeaturesInBlock * lanes / channel_size;
        channels = split(all_channels, std::max<int64_t>(channels / at_once * at_once, at_once));

        for (int g = 0; g < phases.count; g++) {
            const Phases::Group& group = phases.groups[g];
            for (int first = group.begin; first < group.end; first += kMostPhases) {
                parts[parts_count++] = {first, std::min(group.end - first, kMostPhases), g};
            }
            for (int b = 0; b < k; b++) {
                const int64_t column = group.offset + b - r;
                tap_columns[g][b] = static_cast<int>(floor_mod(column, down) * residue_stride +
                                                     floor_div(column, down) + reach_before);
            }
        }
    }

    // The size of even parts, none larger than asked for.
    static int64_t split(int64_t all, int64_t largest) {
        return ceil_div(all, ceil_div(all, std::max<int64_t>(largest, 1)));
    }
};

template <class T>
struct ReassembleNchw {
    using A = Accumulator<T>;
    static constexpr int64_t L = kLanes<A>;

    const Problem& p;
    const Array& output;
    const MaskTiles<A> masks{p, std::min(p.factor.up, p.out_w)};
    const Phases phases{p.factor, masks.phases};
    const Cut cut{p, phases, masks.row_size(L), L, threads_worth<A>(p)};
    const int64_t channels = p.features.c / p.groups;
    const int64_t cells = ceil_div(p.out_w, p.factor.up), tiles = ceil_div(cells, L);
    const int64_t tile_columns = L * masks.phases;
    // Sums are written where they belong or, in other types and strides, by way of a buffer of a tile of two rows.
    const bool adjacent = std::is_same_v<T, A> && output.stride_w == 1;
    const bool past_caches = adjacent && wants_non_temporal_stores(output) && writes_lines();
    // Where their vectors are not whole lines, whole rows are collected before they leave past the caches.
    const bool by_rows = output.stride_w == 1 && wants_non_temporal_stores(output) && !past_caches &&
                         cut.tiles == tiles && 2 * cut.channels * p.out_w * int64_t{sizeof(T)} <= kRowsBytes;

    // Whether each vector of a tile, with the other phases', is a whole line or more.
    bool writes_lines() const {
        const int64_t line = 64 / int64_t{sizeof(T)};
        for (int64_t stride : {output.stride_n, output.stride_c, output.stride_h, tile_columns}) {
            if (stride % line != 0) return false;
        }
        return reinterpret_cast<uintptr_t>(output.data) % 64 == 0;
    }

    // What one item is: some rows of some tiles, all channels of a group.
    struct Block {
        int64_t n, group, first_row, rows, first_tile, tiles;
        int64_t first_cell, cells, first_column, columns;  // of outputs
        A *masks, *features, *outputs;
        T* rows_out;  // of some channels, two each
    };

    const int64_t masks_size = cut.rows * cut.tiles * masks.row_size(L);
    const int64_t features_size = cut.channels * cut.channel_size + L;  // the last load may reach beyond
    const int64_t outputs_size = adjacent ? 0 : 2 * cut.channels * tile_columns;
    const int64_t rows_size = by_rows ? 2 * cut.channels * p.out_w : 0;
    const int64_t scratch_size = masks_size + features_size + outputs_size + rows_size;
    const int64_t row_blocks = ceil_div(p.out_h, cut.rows), panels = ceil_div(tiles, cut.tiles);
    const int64_t items = output.n * p.groups * row_blocks * panels;

    void run_item(int64_t item, A* scratch) const {
        Block b;
        b.masks = scratch;
        b.features = b.masks + masks_size;
        b.outputs = b.features + features_size;
        b.rows_out = reinterpret_cast<T*>(b.outputs + outputs_size);
        b.first_tile = item % panels * cut.tiles;
        b.tiles = std::min(cut.tiles, tiles - b.first_tile);
        b.first_cell = b.first_tile * L;
        b.cells = std::min(b.tiles * L, cells - b.first_cell);
        b.first_column = b.first_cell * p.factor.up;
        b.columns = std::min(b.cells * p.factor.up, p.out_w - b.first_column);
        b.first_row = item / panels % row_blocks * cut.rows;
        b.rows = std::min(cut.rows, p.out_h - b.first_row);
        b.group = item / panels / row_blocks % p.groups;
        b.n = item / panels / row_blocks / p.groups;
        std::fill_n(b.features + cut.channels * cut.channel_size, L, A{0});
        stage_masks(b);
        contract_block(b);
        if (past_caches || by_rows) finish_non_temporal_stores();
    }

    // ---- masks ----

    A* staged_masks(const Block& b, int64_t row, int64_t tile) const {
        return b.masks + ((row - b.first_row) * b.tiles + tile) * masks.row_size(L);
    }

    void stage_masks(const Block& b) const {
        for (int64_t row = b.first_row; row < b.first_row + b.rows; row++) {
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                const int64_t cell = b.first_cell + tile * L;
                const int count = static_cast<int>(std::min<int64_t>(L, cells - cell));
                A* const to = staged_masks(b, row, tile);
                masks.stage(b.n, b.group, {row, row + 1}, cell, count, L, to);
                clear_outside(cell, to);
            }
        }
    }

    // Weights of taps beyond a border, where features are staged as 0: 0 * 0 even where the weight is Inf.
    void clear_outside(int64_t cell, A* row) const {
        const int64_t k = p.kernel_size, down = p.factor.down, left = cell * down - p.radius();
        const int64_t farthest = phases.groups[phases.count - 1].offset + k - 1;
        if (left >= 0 && left + farthest + (L - 1) * down < p.features.w) return;
        for (int g = 0; g < phases.count; g++) {
            for (int64_t b = 0; b < k; b++) {
                const int64_t column = left + phases.groups[g].offset + b;  // of the first lane
                const int64_t begin = std::clamp<int64_t>(ceil_div(-column, down), 0, L);
                const int64_t end = std::clamp<int64_t>(ceil_div(p.features.w - column, down), begin, L);
                if (begin == 0 && end == L) continue;
                for (int64_t a = 0; a < k; a++) {
                    for (int phase = phases.groups[g].begin; phase < phases.groups[g].end; phase++) {
                        A* const lanes = row + ((a * k + b) * masks.phases + phase) * L;
                        store(load_between(lanes, static_cast<int>(begin), static_cast<int>(end)), lanes);
                    }
                }
            }
        }
    }

    // ---- features ----

    int staged_row(int64_t i) const { return static_cast<int>(floor_mod(i, cut.ring) * cut.row_size); }

    void stage_features(const Block& b, int64_t channel, int64_t count, int64_t i) const {
        const Split split{static_cast<int>(p.factor.down),
                          b.first_cell - cut.reach_before,
                          b.cells + cut.reach_before + cut.reach_behind,
                          cut.channel_size,
                          0,
                          cut.residue_stride};
        split_rows(p.features, b.n, channel, count, {i, i + 1}, split, b.features + staged_row(i));
    }

    // ---- taps ----

    // All rows of a block, in all channels.
    void contract_block(const Block& b) const {
        for (int64_t c = 0; c < channels; c += cut.channels) {
            const int64_t channel = b.group * channels + c, count = std::min(cut.channels, channels - c);
            int64_t staged = 0;  // rows of features before this one are
            for (int64_t i = b.first_row; i < b.first_row + b.rows; i += 2) {
                const int64_t last = std::min(i + 1, b.first_row + b.rows - 1);
                const int64_t top = p.factor.source(i) - p.radius(), end = p.factor.source(last) + p.radius() + 1;
                for (staged = std::max(staged, top); staged < std::min(end, p.features.h); staged++)
                    stage_features(b, channel, count, staged);
                Ahead ahead = next_features(b, channel, count, last, end);
                contract_rows(b, channel, count, {i, last + 1}, {top, end}, ahead);
            }
        }
    }

    // Those that are staged next.
    Ahead next_features(const Block& b, int64_t channel, int64_t count, int64_t last, int64_t end) const {
        const bool below = last + 1 < b.first_row + b.rows;
        const int64_t first = below ? end : std::max<int64_t>(p.factor.source(b.first_row) - p.radius(), 0);
        const int64_t next_last = std::min(below ? last + 2 : b.first_row + 1, b.first_row + b.rows - 1);
        const int64_t next_end = std::min(p.factor.source(next_last) + p.radius() + 1, p.features.h);
        const int64_t next = below ? channel : channel + count;
        const int64_t left = (b.group + 1) * channels - next;
        const int64_t column = std::max<int64_t>((b.first_cell - cut.reach_before) * p.factor.down, 0);
        const int64_t columns = std::min((b.cells + cut.reach_before + cut.reach_behind) * p.factor.down,
                                         p.features.w - column);
        return Ahead(p.features, element<const T>(p.features, b.n, next, first, column), columns, next_end - first,
                     std::min(below ? count : cut.channels, left));
    }

    // One or two rows of outputs, whose windows are rows `sources` of features.
    void contract_rows(const Block& b, int64_t channel, int64_t count, Rows rows, Rows sources, Ahead& ahead) const {
        int staged_rows[kMaxKernelSize + kMaxFactor];
        for (int64_t y = sources.begin; y < sources.end; y++) staged_rows[y - sources.begin] = staged_row(y);
        Windows<A> w;
        w.channel_stride = cut.channel_size;
        w.rows = staged_rows;
        w.kernel_size = static_cast<int>(p.kernel_size);
        w.begin = static_cast<int>(std::max<int64_t>(-sources.begin, 0));
        w.end = static_cast<int>(std::min(sources.end, p.features.h) - sources.begin);
        w.step = static_cast<int>(sources.end - sources.begin - p.kernel_size);
        w.tap_stride = masks.phases * L;
        const int64_t channel_stride = by_rows ? 2 * p.out_w : output.stride_c;
        const int64_t row_stride = by_rows ? p.out_w : output.stride_h;
        w.output_channel_stride = adjacent ? channel_stride : 2 * tile_columns;
        w.output_row_stride = adjacent ? row_stride : tile_columns;
        w.phases = masks.phases;
        w.past_caches = past_caches;
        w.ahead = &ahead;
        const int64_t at_once = cut.parts[0].count == 1 ? kFor1 : kFor2;
        w.lines_ahead = static_cast<int>(
            ceil_div(ahead.lines(), b.tiles * cut.parts_count * ceil_div(count, at_once) * p.kernel_size));
        for (int64_t tile = 0; tile < b.tiles; tile++) {
            const int64_t column = b.first_column + tile * L * p.factor.up;
            const int64_t columns = std::min(tile_columns, p.out_w - column);
            T* const result = by_rows ? b.rows_out + column : element<T>(output, b.n, channel, rows.begin, column);
            A* outputs = b.outputs;
            if constexpr (std::is_same_v<T, A>) {
                if (adjacent) outputs = result;
            }
            w.features = b.features + tile * L;
            for (int k = 0; k < cut.parts_count; k++) {
                const Cut::Part& part = cut.parts[k];
                w.columns = cut.tap_columns[part.group];
                for (int64_t r = 0; r < rows.end - rows.begin; r++)
                    w.weights[r] = staged_masks(b, rows.begin + r, tile) + part.first * L;
                w.outputs = outputs + part.first;
                w.count = (adjacent ? columns : tile_columns) - part.first;
                contract_part(w, part.count, count, rows.end - rows.begin);
            }
            if (!adjacent) write(b.outputs, count, rows.end - rows.begin, columns, result, channel_stride, row_stride);
        }
        if (by_rows) stream_rows(b, channel, count, rows);
    }

    // A tile out of the buffer.
    void write(const A* outputs, int64_t count, int64_t rows, int64_t columns, T* result, int64_t channel_stride,
               int64_t row_stride) const {
        for (int64_t c = 0; c < count; c++, outputs += 2 * tile_columns, result += channel_stride) {
            for (int64_t r = 0; r < rows; r++) {
                const A* const from = outputs + r * tile_columns;
                T* const to = result + r * row_stride;
                for (int64_t k = 0; k < columns; k += L) {
                    store_lanes(from + k, static_cast<int>(std::min(columns - k, L)), to + k * output.stride_w,
                                output.stride_w);
                }
            }
        }
    }

    // Whole rows, past the caches but for the ends of what is adjacent.
    void stream_rows(const Block& b, int64_t channel, int64_t count, Rows rows) const {
        const int64_t all = rows.end - rows.begin, runs = output.stride_h == p.out_w ? 1 : all;
        for (int64_t c = 0; c < count; c++) {
            for (int64_t r = 0; r < runs; r++)
                stream_lines(b.rows_out + (2 * c + r) * p.out_w, p.out_w * all / runs,
                             element<T>(output, b.n, channel + c, rows.begin + r, 0));
        }
    }

    static void contract_part(const Windows<A>& w, int phases, int64_t channels, int64_t rows) {
        if constexpr (std::is_same_v<A, float>) {  // of doubles, one form serves all: they are to keep small
            switch (phases == w.phases ? w.kernel_size : 0) {
                case 3: return contract_phases<3>(w, phases, channels, rows);
                case 5: return contract_phases<5>(w, phases, channels, rows);
            }
        }
        contract_phases<0>(w, phases, channels, rows);
    }

    template <int K>
    static void contract_phases(const Windows<A>& w, int phases, int64_t channels, int64_t rows) {
        switch (phases) {
            case 1: contract_pair<K, 1, kFor1>(w, channels, rows); break;
            case 2: contract_pair<K, 2, kFor2>(w, channels, rows); break;
            case 3: contract_each<K, 3, kFor2>(w, channels, rows); break;
            case 4: contract_each<K, 4, kFor2>(w, channels, rows); break;
        }
    }

    template <int K, int Q, int NC>
    static void contract_pair(const Windows<A>& w, int64_t channels, int64_t rows) {
        if (rows == 2) {
            channels >= NC ? contract<K, 2, Q, NC>(w, channels) : contract<0, 2, Q, 1>(w, channels);
        } else {
            channels >= NC ? contract<K, 1, Q, NC>(w, channels) : contract<0, 1, Q, 1>(w, channels);
        }
    }

    // One row after the other, where the registers do not hold the sums of both.
    template <int K, int Q, int NC>
    static void contract_each(const Windows<A>& both, int64_t channels, int64_t rows) {
        for (int r = 0; r < rows; r++) {
            Windows<A> w = both;
            w.rows += r * w.step;
            w.begin = std::max(both.begin - r * w.step, 0);
            w.end = std::min(both.end - r * w.step, w.kernel_size);
            w.weights[0] = both.weights[r];
            w.outputs += r * w.output_row_stride;
            channels >= NC ? contract<K, 1, Q, NC>(w, channels) : contract<0, 1, Q, 1>(w, channels);
        }
    }
};

}  // namespace

void reassemble_nchw(const Problem& problem, const Array& output) { run_kernel<ReassembleNchw>(problem, output); }

}  // namespace carafepp::CARAFEPP_ISA
