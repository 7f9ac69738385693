// SPDX-License-Identifier: Apache-2.0
//
// The forward with adjacent columns, compiled once for each instruction set. A vector holds the same output (row,
// phase) of neighbouring cells; it needs the masks as they are staged. For a block of rows of outputs: stage the masks
// of all tiles; then for some channels at a time sweep down the rows, two at a time: stage the rows of features that
// come into their windows, contract the taps tile by tile, and write out.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/bands.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"

namespace carafepp {
namespace {

constexpr int64_t kMasksInBlock = 384 * 1024 / kVectorBytes;    // vectors, of a level 2 cache
constexpr int64_t kFeaturesInBlock = 24 * 1024 / kVectorBytes;  // vectors, of a level 1 cache
constexpr int64_t kSumsInBlock = 128 * 1024 / kVectorBytes;     // vectors, of a level 2 cache, twice
constexpr int64_t kCacheLine = 64;

constexpr int kMostPhases = 4;  // contracted at once, of one row or, up to two, of both

// Channels contracted at once, with one phase and with more: as many as there are registers for their sums.
constexpr int kFor1 = kVectorRegisters == 32 ? 8 : 4, kFor2 = kVectorRegisters == 32 ? 4 : 3;

// ---- staging rows of features: in the type of sums, 0 beyond the borders, by column modulo down ----

// The same columns of a row in several channels. Unless `Inside`, those from `begin` to `end` are inside.
template <int Down, bool Inside, class T>
CARAFEPP_INLINE void stage_columns(const T* from, int64_t from_stride, int64_t channels, int64_t begin, int64_t end,
                                   Accumulator<T>* to, int64_t to_stride, int64_t residue_stride) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    int first[Down], last[Down];
    for (int k = 0; k < Down; k++) {
        first[k] = static_cast<int>(std::clamp<int64_t>(begin - k * L, 0, L));
        last[k] = static_cast<int>(std::clamp<int64_t>(end - k * L, 0, L));
    }
    for (int64_t c = 0; c < channels; c++, from += from_stride, to += to_stride) {
        Vector<A> columns[Down];
#pragma GCC unroll 4
        for (int k = 0; k < Down; k++) {
            columns[k] = Inside ? load(from + k * L) : load_between(from + k * L, first[k], last[k]);
        }
        deinterleave<A, Down>(columns);
#pragma GCC unroll 4
        for (int k = 0; k < Down; k++) store(columns[k], to + k * residue_stride);
    }
}

// From `column` on, which may lie outside, `cells` columns of each residue.
template <int Down, class T>
void stage_row(const T* row, int64_t from_stride, int64_t channels, int64_t width, int64_t column, int64_t cells,
               Accumulator<T>* to, int64_t to_stride, int64_t residue_stride) {
    constexpr int64_t L = kLanes<Accumulator<T>>;
    for (int64_t cell = 0; cell < cells; cell += L, column += Down * L, to += L) {
        if (column >= 0 && column + Down * L <= width) {
            stage_columns<Down, true>(row + column, from_stride, channels, 0, Down * L, to, to_stride, residue_stride);
        } else {
            stage_columns<Down, false>(row + column, from_stride, channels, -column, width - column, to, to_stride,
                                       residue_stride);
        }
    }
}

// The same for any factor.
template <class T>
void stage_row(int64_t down, const T* row, int64_t from_stride, int64_t channels, int64_t width, int64_t column,
               int64_t cells, Accumulator<T>* to, int64_t to_stride, int64_t residue_stride) {
    for (int64_t c = 0; c < channels; c++, row += from_stride, to += to_stride) {
        for (int64_t k = 0; k < down; k++) {
            for (int64_t cell = 0; cell < cells; cell++) {
                const int64_t x = column + cell * down + k;
                to[k * residue_stride + cell] = x >= 0 && x < width ? widen(row[x]) : Accumulator<T>{0};
            }
        }
    }
}

// ---- contracting the taps of a tile ----

// What is done between contractions, so that memory is not idle.
struct Meanwhile {
    void (*step)(Meanwhile& self);
};

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
    int64_t count;   // columns of outputs
    int64_t phases;  // in a cell of them
};

// Adds the taps of rows [begin, end) of features, from one channel on, to the rows [First, Last) of outputs.
template <int First, int Last, int R, int Q, int NC, class A>
CARAFEPP_INLINE void accumulate(const Windows<A>& windows, const A* channel, int begin, int end,
                                Vector<A> (&sums)[R][Q][NC]) {
    constexpr int L = kLanes<A>;
    for (int y = begin; y < end; y++) {
        const A* const row = channel + windows.rows[y];
        const A* weights[R];
#pragma GCC unroll 2
        for (int r = First; r < Last; r++) {
            weights[r] = windows.weights[r] + (y - r * windows.step) * windows.kernel_size * windows.tap_stride;
        }
        for (int b = 0; b < windows.kernel_size; b++) {
            Vector<A> features[NC];
#pragma GCC unroll 8
            for (int c = 0; c < NC; c++) features[c] = load(row + windows.columns[b] + c * windows.channel_stride);
#pragma GCC unroll 2
            for (int r = First; r < Last; r++) {
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++) {
                    const Vector<A> weight = load(weights[r] + q * L);
#pragma GCC unroll 8
                    for (int c = 0; c < NC; c++) sums[r][q][c] += weight * features[c];
                }
                weights[r] += windows.tap_stride;
            }
        }
    }
}

// Writes sums, [row][phase][channel], that do not fill whole vectors of outputs or lie between those of other phases.
template <int Q, class A>
__attribute__((noinline)) void write_parts(const A* sums, int rows, int channels, const Windows<A>& windows,
                                           A* outputs) {
    constexpr int L = kLanes<A>;
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < channels; c++) {
            const A* const first = sums + (r * Q * channels + c) * L;
            A* const to = outputs + r * windows.output_row_stride + c * windows.output_channel_stride;
            if (windows.phases == Q) {
                Vector<A> columns[Q];
                for (int q = 0; q < Q; q++) columns[q] = load(first + q * channels * L);
                interleave<A, Q>(columns);
                for (int q = 0; q < Q; q++) store_part(columns[q], to + q * L, windows.count - q * L);
                continue;
            }
            for (int q = 0; q < Q; q++) {
                const A* lane = first + q * channels * L;
                for (int64_t column = q; column < windows.count; column += windows.phases) to[column] = *lane++;
            }
        }
    }
}

// `R` rows and `Q` phases that read the same columns, `NC` channels at a time.
template <int R, int Q, int NC, class A>
__attribute__((noinline)) void contract(const Windows<A>& windows, int64_t channels, Meanwhile& meanwhile) {
    constexpr int L = kLanes<A>;
    const int begin = windows.begin, end = windows.end, k = windows.kernel_size, step = windows.step;
    const bool whole = Q == windows.phases && windows.count >= Q * L;
    for (int64_t c = 0; c < channels; c += NC) {
        if (c + NC > channels) c = channels - NC;  // some once more, rather than few at a time
        const A* const features = windows.features + c * windows.channel_stride;
        A* const outputs = windows.outputs + c * windows.output_channel_stride;
        Vector<A> sums[R][Q][NC] = {};
        if constexpr (R == 1) {
            accumulate<0, 1>(windows, features, begin, end, sums);
        } else {
            accumulate<0, 1>(windows, features, begin, std::min({end, step, k}), sums);
            accumulate<0, 2>(windows, features, std::max(begin, step), std::min(end, k), sums);
            accumulate<1, 2>(windows, features, std::max({begin, step, k}), end, sums);
        }
        if (whole) {
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
                for (int n = 0; n < NC; n++) {
                    A* const to = outputs + r * windows.output_row_stride + n * windows.output_channel_stride;
                    Vector<A> columns[Q];
#pragma GCC unroll 4
                    for (int q = 0; q < Q; q++) columns[q] = sums[r][q][n];
                    interleave<A, Q>(columns);
#pragma GCC unroll 4
                    for (int q = 0; q < Q; q++) store(columns[q], to + q * L);
                }
            }
        } else {
            A parts[R * Q * NC * L];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++) {
#pragma GCC unroll 8
                    for (int n = 0; n < NC; n++) store(sums[r][q][n], parts + ((r * Q + q) * NC + n) * L);
                }
            }
            write_parts<Q>(parts, R, NC, windows, outputs);
        }
        meanwhile.step(meanwhile);
    }
}

// ---- traffic between memory and the caches ----

// Runs of adjacent elements, `length` of them, in rows and channels.
template <class T>
struct Runs {
    T* data = nullptr;
    int64_t channel_stride = 0, row_stride = 0;
    int64_t channels = 0, rows = 0, length = 0;

    // Rows that follow each other without a gap are one.
    void join() {
        if (row_stride != length) return;
        length *= rows;
        rows = 1;
    }
    int64_t count() const { return channels * rows; }
};

// Goes from run to run.
template <class T>
struct Walk {
    Runs<T> runs;
    int64_t row = 0;
    T* run = runs.data;

    void next() {
        run += runs.row_stride;
        if (++row < runs.rows) return;
        row = 0;
        run += runs.channel_stride - runs.rows * runs.row_stride;
    }
};

// Finished sums on their way to the result, some at a time.
template <class T>
class Drain {
    using A = Accumulator<T>;
    static constexpr int64_t L = kLanes<A>;

public:
    void start(const Runs<const A>& from, const Runs<T>& to, bool past_caches) {
        from_ = {from};
        to_ = {to};
        left_ = to.count();
        length_ = to.length;
        past_caches_ = past_caches;
    }

    int64_t vectors() const { return left_ * (length_ / L + 2); }
    void finish() { step(vectors()); }

    void step(int64_t vectors) {
        while (vectors > 0 && left_ > 0) {
            if (past_caches_) {
                if (done_ == 0) align();
                for (; vectors > 0 && done_ + L <= length_; vectors--, done_ += L) {
                    stream(load(from_.run + done_), to_.run + done_);
                }
            } else {
                for (; vectors > 0 && done_ + L <= length_; vectors--, done_ += L) {
                    store(load(from_.run + done_), to_.run + done_);
                }
            }
            if (done_ + L <= length_) return;
            store_part(load(from_.run + done_), to_.run + done_, length_ - done_);
            done_ = 0;
            from_.next();
            to_.next();
            left_--;
            vectors--;
        }
    }

private:
    // Only whole aligned vectors are written past the caches.
    void align() {
        const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to_.run) / sizeof(T) % L);
        if (beyond == 0) return;
        done_ = std::min(L - beyond, length_);
        store_part(load(from_.run), to_.run, done_);
    }

    Walk<const A> from_;
    Walk<T> to_;
    int64_t left_ = 0, length_ = 0, done_ = 0;  // runs; elements of one
    bool past_caches_ = false;
};

// The features of the next channels on their way into the level 2 cache, some lines at a time.
template <class T>
class Prefetch {
    static constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(T));

public:
    void start(const Runs<const T>& from) {
        from_ = {from};
        left_ = from.count();
    }

    int64_t lines() const { return left_ * ceil_div(from_.runs.length, kStep); }

    void step(int64_t lines) {
        for (; lines > 0 && left_ > 0; lines--) {
            __builtin_prefetch(from_.run + done_, 0, 2);
            done_ += kStep;
            if (done_ < from_.runs.length) continue;
            done_ = 0;
            from_.next();
            left_--;
        }
    }

private:
    Walk<const T> from_;
    int64_t left_ = 0, done_ = 0;  // runs; elements of one
};

template <class T>
struct Traffic : Meanwhile {
    Drain<T> drain;
    Prefetch<T> prefetch;
    int64_t vectors = 0, lines = 0;  // a step

    Traffic() : Meanwhile{[](Meanwhile& self) { static_cast<Traffic&>(self).move(); }} {}

    void pace(int64_t steps) {
        vectors = ceil_div(drain.vectors(), steps);
        lines = ceil_div(prefetch.lines(), steps);
    }

    void move() {
        if (vectors > 0) drain.step(vectors);
        if (lines > 0) prefetch.step(lines);
    }
};

// ---- the whole ----

// How a problem is cut, and where its features are staged: of each channel a ring of the rows that two rows of outputs
// reach.
struct Cut {
    int64_t rows, tiles, channels;                         // of a block
    int64_t reach_before, reach_behind;                    // cells beyond its own that the taps of a cell read
    int64_t ring, residue_stride, row_size, channel_size;  // of staged features
    int64_t sums_size;                                     // of a channel
    int tap_columns[kMaxPhases][kMaxKernelSize];           // of each group of phases

    // Phases of one group, as many as are contracted at once.
    struct Part {
        int first, count, group;
    };
    Part parts[kMaxPhases];
    int parts_count = 0;

    Cut(const Problem& p, const Phases& phases, int64_t mask_row_size, int64_t lanes) {
        const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, r = p.radius();
        const int64_t cells = ceil_div(p.out_w, up), all_tiles = ceil_div(cells, lanes);
        const int64_t unit = up == 1 ? 2 : up, units = ceil_div(p.out_h, unit);  // of rows
        const int64_t tile_size = unit * mask_row_size;
        tiles = split(all_tiles, kMasksInBlock * lanes / tile_size);
        const int64_t blocks_beside = p.result.n * p.groups * ceil_div(all_tiles, tiles);
        const int64_t threads = threads_for(INT32_MAX, p.multiply_adds() / static_cast<double>(lanes));
        const int64_t blocks = threads > 1 ? ceil_div(4 * threads, blocks_beside) : 1;  // so that no thread waits long
        const int64_t fewest = std::min<int64_t>(4, units);
        rows = split(units, std::min(kMasksInBlock * lanes / (tile_size * tiles), std::max(units / blocks, fewest))) *
               unit;

        reach_before = -floor_div(-r, down);
        reach_behind = floor_div(phases.groups[phases.count - 1].offset + r, down);
        const int64_t block_cells = std::min(tiles * lanes, cells);
        ring = k + ceil_div(down, up);
        residue_stride = ceil_div(block_cells + reach_before + reach_behind, lanes) * lanes;
        row_size = down * residue_stride;
        channel_size = ring * row_size;
        const int64_t phases_of_row = std::min(up, p.out_w);
        sums_size = rows * std::min(block_cells * up, p.out_w) + lanes * phases_of_row;
        const int64_t all_channels = p.features.c / p.groups, at_once = 4 * (up == 1 ? 2 : kFor2);
        channels = std::min(kFeaturesInBlock * lanes / channel_size, kSumsInBlock * lanes / sums_size);
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

template <class T, class M>
struct ReassembleNchw {
    using A = Accumulator<T>;
    static constexpr int64_t L = kLanes<A>;

    const Problem& p;
    const MaskTiles<M> masks{p, std::min(p.factor.up, p.out_w)};
    const Phases phases{p.factor, masks.phases};
    const Cut cut{p, phases, masks.row_size(L), L};
    const int64_t channels = p.features.c / p.groups;
    const int64_t cells = ceil_div(p.out_w, p.factor.up), tiles = ceil_div(cells, L);
    const bool past_caches = leaves_caches<T>(p.result);
    const bool drains = past_caches || sizeof(T) != sizeof(A);  // else sums are written where they belong

    // What one item is: some rows of some tiles, all channels of a group.
    struct Block {
        int64_t n, group, first_row, rows, first_tile, tiles;
        int64_t first_cell, cells, first_column, columns;  // of outputs
        A *masks, *features, *sums;
    };

    void run() const {
        const int64_t masks_size = cut.rows * cut.tiles * masks.row_size(L);
        const int64_t features_size = cut.channels * cut.channel_size + L;  // the last load may reach beyond
        const int64_t sums_size = drains ? 2 * cut.channels * cut.sums_size + L : 0;
        const int64_t scratch_size = masks_size + features_size + ceil_div(sums_size, L) * L;
        const int64_t row_blocks = ceil_div(p.out_h, cut.rows), panels = ceil_div(tiles, cut.tiles);
        const int64_t items = p.result.n * p.groups * row_blocks * panels;
        const int threads = threads_for(items, p.multiply_adds() / kLanes<A>);
        A* const scratch = static_cast<A*>(scratch_bytes(threads * scratch_size * int64_t{sizeof(A)}));
        parallel_for(items, threads, [&](int64_t item, int worker) noexcept {
            Block b;
            b.masks = scratch + worker * scratch_size;
            b.features = b.masks + masks_size;
            b.sums = b.features + features_size;
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
            if (past_caches) finish_streams();
        });
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
        const int64_t stride = p.features.stride_c, width = p.features.w;
        const int64_t column = (b.first_cell - cut.reach_before) * p.factor.down;
        const int64_t reached = b.cells + cut.reach_before + cut.reach_behind;
        const T* const row = element<const T>(p.features, b.n, channel, i, 0);
        A* const to = b.features + staged_row(i);
        switch (p.factor.down) {
            case 1: stage_row<1>(row, stride, count, width, column, reached, to, cut.channel_size, 0); break;
            case 2:
                stage_row<2>(row, stride, count, width, column, reached, to, cut.channel_size, cut.residue_stride);
                break;
            case 3:
                stage_row<3>(row, stride, count, width, column, reached, to, cut.channel_size, cut.residue_stride);
                break;
            case 4:
                stage_row<4>(row, stride, count, width, column, reached, to, cut.channel_size, cut.residue_stride);
                break;
            default:
                stage_row(p.factor.down, row, stride, count, width, column, reached, to, cut.channel_size,
                          cut.residue_stride);
        }
    }

    // What a block reads of some channels, but for columns beyond its own cells.
    Runs<const T> features_of(const Block& b, int64_t channel, int64_t count) const {
        const int64_t top = std::max<int64_t>(p.factor.source(b.first_row) - p.radius(), 0);
        const int64_t end = p.factor.source(b.first_row + b.rows - 1) + p.radius() + 1;
        const int64_t column = b.first_cell * p.factor.down;
        Runs<const T> runs{element<const T>(p.features, b.n, channel, top, column),
                           p.features.stride_c,
                           p.features.stride_h,
                           count,
                           std::min(end, p.features.h) - top,
                           std::min(b.cells * p.factor.down, p.features.w - column)};
        runs.join();
        return runs;
    }

    // ---- taps ----

    void contract_block(const Block& b) const {
        Traffic<T> traffic;
        A* sums = b.sums;
        for (int64_t c = 0; c < channels; c += cut.channels) {
            const int64_t channel = b.group * channels + c, count = std::min(cut.channels, channels - c);
            const int64_t next = std::min(cut.channels, channels - c - count);
            if (next > 0 && p.factor.up >= p.factor.down) traffic.prefetch.start(features_of(b, channel + count, next));
            traffic.pace(ceil_div(b.rows, 2) * b.tiles * cut.parts_count *
                         ceil_div(count, cut.parts[0].count == 1 ? kFor1 : kFor2));
            Runs<T> result{element<T>(p.result, b.n, channel, b.first_row, b.first_column),
                           p.result.stride_c,
                           p.result.stride_h,
                           count,
                           b.rows,
                           b.columns};
            Runs<A> outputs{sums, cut.sums_size, b.columns, count, b.rows, b.columns};
            if constexpr (sizeof(T) == sizeof(A)) {
                if (!drains) outputs = result;
            }
            contract_rows(b, outputs, channel, traffic);
            if (!drains) continue;
            if (p.result.stride_h == b.columns) {
                outputs.join();
                result.join();
            }
            traffic.drain.finish();
            traffic.drain.start(
                {outputs.data, outputs.channel_stride, outputs.row_stride, count, outputs.rows, outputs.length}, result,
                past_caches);
            sums = sums == b.sums ? b.sums + cut.channels * cut.sums_size : b.sums;
        }
        traffic.drain.finish();
    }

    // All rows of a block in some channels.
    void contract_rows(const Block& b, const Runs<A>& outputs, int64_t channel, Meanwhile& meanwhile) const {
        int64_t staged = 0;  // rows of features before this one are
        for (int64_t row = 0; row < b.rows; row += 2) {
            const int64_t i = b.first_row + row, rows = std::min<int64_t>(2, b.rows - row);
            const int64_t top = p.factor.source(i) - p.radius();
            const int64_t end = p.factor.source(i + rows - 1) + p.radius() + 1;
            for (staged = std::max(staged, top); staged < std::min(end, p.features.h); staged++) {
                stage_features(b, channel, outputs.channels, staged);
            }
            int staged_rows[kMaxKernelSize + kMaxDown];
            for (int64_t y = top; y < end; y++) staged_rows[y - top] = staged_row(y);
            Windows<A> w;
            w.channel_stride = cut.channel_size;
            w.rows = staged_rows;
            w.kernel_size = static_cast<int>(p.kernel_size);
            w.begin = static_cast<int>(std::max<int64_t>(-top, 0));
            w.end = static_cast<int>(std::min(end, p.features.h) - top);
            w.step = static_cast<int>(end - top - p.kernel_size);
            w.tap_stride = masks.phases * L;
            w.output_channel_stride = outputs.channel_stride;
            w.output_row_stride = outputs.row_stride;
            w.phases = masks.phases;
            // From right to left: whole vectors may be written to the scratch, since what they write beyond the end of
            // a row is written again, as the next row or the beginning of this pair's second, or is not read. Not so
            // where phases are written one after the other.
            const bool beyond = drains && cut.parts_count == 1;
            for (int64_t tile = b.tiles - 1; tile >= 0; tile--) {
                const int64_t column = tile * L * p.factor.up;
                w.features = b.features + tile * L;
                for (int k = 0; k < cut.parts_count; k++) {
                    const Cut::Part& part = cut.parts[k];
                    w.columns = cut.tap_columns[part.group];
                    for (int64_t r = 0; r < rows; r++) w.weights[r] = staged_masks(b, i + r, tile) + part.first * L;
                    w.outputs = outputs.data + row * outputs.row_stride + column + part.first;
                    w.count = (beyond ? L * masks.phases : std::min(L * masks.phases, b.columns - column)) - part.first;
                    switch (part.count) {
                        case 1: contract_pair<1, kFor1>(w, outputs.channels, rows, meanwhile); break;
                        case 2: contract_pair<2, kFor2>(w, outputs.channels, rows, meanwhile); break;
                        case 3: contract_each<3, kFor2>(w, outputs.channels, rows, meanwhile); break;
                        case 4: contract_each<4, kFor2>(w, outputs.channels, rows, meanwhile); break;
                    }
                }
            }
        }
    }

    template <int Q, int NC>
    static void contract_pair(const Windows<A>& w, int64_t count, int64_t rows, Meanwhile& meanwhile) {
        if (rows == 2) {
            count >= NC ? contract<2, Q, NC>(w, count, meanwhile) : contract<2, Q, 1>(w, count, meanwhile);
        } else {
            count >= NC ? contract<1, Q, NC>(w, count, meanwhile) : contract<1, Q, 1>(w, count, meanwhile);
        }
    }

    // One row after the other, where the registers do not hold the sums of both.
    template <int Q, int NC>
    static void contract_each(const Windows<A>& both, int64_t count, int64_t rows, Meanwhile& meanwhile) {
        for (int r = 0; r < rows; r++) {
            Windows<A> w = both;
            w.rows += r * w.step;
            w.begin = std::max(both.begin - r * w.step, 0);
            w.end = std::min(both.end - r * w.step, w.kernel_size);
            w.weights[0] = both.weights[r];
            w.outputs += r * w.output_row_stride;
            count >= NC ? contract<1, Q, NC>(w, count, meanwhile) : contract<1, Q, 1>(w, count, meanwhile);
        }
    }
};

}  // namespace

namespace CARAFEPP_ISA {

void reassemble_nchw(const Problem& problem) {
    with_types(problem, [&](auto features, auto masks) {
        ReassembleNchw<typename decltype(features)::type, typename decltype(masks)::type>{problem}.run();
    });
}

}  // namespace CARAFEPP_ISA
}  // namespace carafepp
