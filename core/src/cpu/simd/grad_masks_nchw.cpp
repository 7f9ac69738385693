// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits, with columns in lanes, compiled once for each instruction set. Made for adjacent
// columns, it takes any strides. A vector holds one tap of one output (row, phase) of neighbouring cells, so that a sum
// over channels never crosses lanes. For a block of rows of cells, or of outputs if windows are large: for some
// channels at a time split the rows of grad_output and of features into lanes and add their products to the sums of
// every tap; then take the sums of masks back to those of logits, and write out.
#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/shared_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kSumElements = 32 * 1024;  // of a block: in float 128 KiB, read and written once in `kChannels`
constexpr int64_t kMostSums = 128 * 1024;    // of a row of cells of a tile
constexpr int64_t kChannels = 32;            // at a time
constexpr int kMostOutputs = 4;              // that one loaded vector of features serves

// Tap columns whose sums are kept in registers at once, beside those of `outputs`.
constexpr int most_columns(int outputs) { return kVectorRegisters == 32 || outputs <= 2 ? 5 : 3; }

// Some outputs that read the same row of features at the same columns.
template <class A>
struct Outputs {
    const A* grads[kMostOutputs];  // channels a vector apart
    A* sums[kMostOutputs];         // of column 0 of the tap row of each
    int64_t tap_stride;            // of the sums
};

// What is read next, fetched meanwhile.
struct NextRows {
    Ahead outputs, sources;
};

// NB tap columns from `b` on, P outputs: sums += grad_output * features, over `channels`.
template <int P, int NB, class A>
__attribute__((noinline)) void contract(const Outputs<A>& outputs, const A* features, int64_t channel_stride,
                                        const int64_t* columns, int b, int64_t channels, NextRows& next) {
    constexpr int L = kLanes<A>;
    Vector<A> sums[P][NB];
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) {
#pragma GCC unroll 5
        for (int k = 0; k < NB; k++) sums[o][k] = load(outputs.sums[o] + (b + k) * outputs.tap_stride);
    }
    const A* grads[P];
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) grads[o] = outputs.grads[o];
    int64_t column[NB];
#pragma GCC unroll 5
    for (int k = 0; k < NB; k++) column[k] = columns[b + k];
    for (int64_t at = 0; at < channels * L; at += L, features += channel_stride) {
        next.outputs.fetch_line();
        next.sources.fetch_line();
        Vector<A> read[NB];
#pragma GCC unroll 5
        for (int k = 0; k < NB; k++) read[k] = load(features + column[k]);
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
        for (int k = 0; k < NB; k++) store(sums[o][k], outputs.sums[o] + (b + k) * outputs.tap_stride);
    }
}

template <int P, class A>
void contract_columns(const Outputs<A>& outputs, const A* features, int64_t channel_stride, const int64_t* columns,
                      int kernel_size, int64_t channels, NextRows& next) {
    constexpr int kMost = most_columns(P);
    const int slices = (kernel_size + kMost - 1) / kMost;
    for (int k = 0; k < slices; k++) {
        const Slice part = slice(0, kernel_size, k, slices);
        with_count<kMost>(part.end - part.begin, [&](auto columns_here) {
            contract<P, columns_here()>(outputs, features, channel_stride, columns, part.begin, channels, next);
        });
    }
}

template <class T>
struct GradMasksNchw {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_masks;
    const MaskTiles<A> masks{p, p.factor.up};
    const ColumnTaps taps{p};
    const int64_t up = p.factor.up, down = p.factor.down;
    const int64_t channels = p.features.c / p.groups;
    const int64_t strip = up >= 2 * down ? ceil_div(up, down) : 8;  // rows of outputs that are contracted together
    const int64_t row_size = masks.row_size(L);
    // With logits, all their sub-pixels, also where a crop leaves no output.
    const int64_t rows = p.from_logits ? p.logits.h * up : p.out_h;
    const int64_t cells = p.from_logits ? p.logits.w : ceil_div(p.out_w, up);
    // Rows of outputs that are written together: those of a cell, or of a large window each.
    const int64_t unit = takes_whole_cells(p, grad_masks) || up * row_size <= kMostSums ? up : 1;
    const int64_t tiles = ceil_div(cells, L), units = ceil_div(rows, unit);

    // Items are `panel` tiles of `block` units, computed `at_once` channels at a time; sizes follow from that.
    int64_t panel = std::clamp<int64_t>(kSumElements / (unit * row_size), 1, tiles);
    int64_t block = std::clamp<int64_t>(kSumElements / (unit * row_size * panel), 1, units);
    int64_t at_once = std::min(channels, kChannels);
    int64_t pitch;                     // of a part of a row of features
    int64_t output_size, source_size;  // of a row of one phase of outputs, of a row of features
    int64_t scratch_size, sums_size, grads_size, features_size;
    int64_t items, panels, blocks;

    const Phases phases{p.factor, up};
    int64_t columns[kMaxFactor][kMaxKernelSize];  // where the taps of a group of phases begin in a row of features

    GradMasksNchw(const Problem& problem, const Array& result) : p(problem), grad_masks(result) {
        for (find_sizes(); scratch_size > kScratchBytes / int64_t{sizeof(A)}; find_sizes()) {
            int64_t& most = block > 1 ? block : panel > 1 ? panel : at_once;
            if (most <= 1) break;
            most = ceil_div(most, 2);
        }
        panels = ceil_div(tiles, panel);
        for (blocks = ceil_div(units, block);; blocks = ceil_div(units, block)) {
            items = grad_masks.n * p.groups * blocks * panels;
            if (items >= threads_worth<A>(p) || block * down < 2 * p.kernel_size) break;
            block = ceil_div(block, 2);
        }
        find_sizes();
        for (int g = 0; g < phases.count; g++) {
            for (int b = 0; b < taps.kernel_size; b++) {
                const ColumnTaps::Tap& tap = taps.at(phases.groups[g].begin, b);
                columns[g][b] = tap.part * pitch + tap.shift - taps.least_shift;
            }
        }
    }

    void find_sizes() {
        pitch = ceil_div(panel * L + taps.shifts(), L) * L;
        // A vector more than needed, so that rows of all channels do not compete for a few sets of the cache.
        output_size = (at_once + 1) * L;
        source_size = at_once * down * pitch + L;
        sums_size = panel * block * unit * row_size;
        grads_size = strip * up * output_size;
        features_size = (block * down + p.kernel_size) * source_size;
        scratch_size = sums_size + grads_size + features_size + (p.from_logits ? (unit + 1) * row_size : 0);
    }

    // What one item is: some rows of cells of some tiles, all channels of a group.
    struct Block {
        int64_t n, group, first_tile, tiles;
        int64_t begin, end, computed_end;  // rows of outputs; those from computed_end on do not exist
        int64_t source_begin, source_end;  // rows of features, inside the border
        A* sums;                           // [tile][row][tap][phase][lane]
        A* grads;                          // of a strip of a tile: [row][phase][channel][lane]
        A* features;                       // [row][channel][part][cell]
        A* logits;
    };

    void run_item(int64_t item, A* scratch) const {
        Block b;
        b.sums = scratch;
        b.grads = b.sums + sums_size;
        b.features = b.grads + grads_size;
        b.logits = b.features + features_size;
        b.first_tile = item % panels * panel;
        b.tiles = std::min(panel, tiles - b.first_tile);
        b.begin = item / panels % blocks * block * unit;
        b.end = std::min(b.begin + block * unit, rows);
        b.computed_end = std::min(b.end, p.out_h);
        b.source_begin = std::max<int64_t>(p.factor.source(b.begin) - p.radius(), 0);
        b.source_end = std::min(p.factor.source(b.computed_end - 1) + p.radius() + 1, p.features.h);
        b.group = item / panels / blocks % p.groups;
        b.n = item / panels / blocks / p.groups;
        std::fill_n(b.sums, b.tiles * (b.end - b.begin) * row_size, A{0});
        for (int64_t c = 0; c < channels && b.begin < b.computed_end; c += at_once)
            contract_channels(b, b.group * channels + c, std::min(at_once, channels - c));
        for (int64_t tile = 0; tile < b.tiles; tile++) write(b, tile);
    }

    A* sums(const Block& b, int64_t tile, int64_t row) const {
        return b.sums + (tile * (b.end - b.begin) + row - b.begin) * row_size;
    }

    void contract_channels(const Block& b, int64_t channel, int64_t count) const {
        split_sources(b, channel, count);
        NextRows next;
        next.sources = next_sources(b, channel);
        for (int64_t begin = b.begin; begin < b.computed_end; begin += strip) {
            const int64_t end = std::min(begin + strip, b.computed_end);
            next.outputs = next_outputs(b, channel, end);
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                split_outputs(b, channel, count, tile, begin, end);
                contract_strip(b, count, tile, begin, end, next);
            }
        }
    }

    // The rows of grad_output behind a strip that ends before `row`: the next strip's, or of the next channels.
    Ahead next_outputs(const Block& b, int64_t channel, int64_t row) const {
        const bool last = row == b.computed_end;
        const int64_t next = last ? b.begin : row, next_channel = last ? channel + at_once : channel;
        const int64_t column = b.first_tile * L * up;
        return {p.grad_output, element<const T>(p.grad_output, b.n, next_channel, next, column),
                std::min(b.tiles * L * up, p.out_w - column), std::min(strip, b.computed_end - next),
                std::min(at_once, (b.group + 1) * channels - next_channel)};
    }

    // The rows of features of the next channels.
    Ahead next_sources(const Block& b, int64_t channel) const {
        const int64_t next = channel + at_once,
                      column = std::max<int64_t>(b.first_tile * L + taps.least_shift, 0) * down;
        return {p.features, element<const T>(p.features, b.n, next, b.source_begin, column),
                std::min((b.tiles * L + taps.shifts()) * down, p.features.w - column), b.source_end - b.source_begin,
                std::min(at_once, (b.group + 1) * channels - next)};
    }

    void split_sources(const Block& b, int64_t channel, int64_t count) const {
        const Split split{static_cast<int>(down),
                          b.first_tile * L + taps.least_shift,
                          b.tiles * L + taps.shifts(),
                          down * pitch,
                          source_size,
                          pitch};
        split_rows(p.features, b.n, channel, count, {b.source_begin, b.source_end}, split, b.features);
    }

    void split_outputs(const Block& b, int64_t channel, int64_t count, int64_t tile, int64_t begin, int64_t end) const {
        const Split split{static_cast<int>(up), (b.first_tile + tile) * L, L, L, up * output_size, output_size};
        split_rows(p.grad_output, b.n, channel, count, {begin, end}, split, b.grads);
    }

    // Each row of features, with the outputs of a strip [strip_begin, strip_end) that read it.
    void contract_strip(const Block& b, int64_t count, int64_t tile, int64_t strip_begin, int64_t strip_end,
                        NextRows& next) const {
        const int64_t source_begin = std::max(p.factor.source(strip_begin) - p.radius(), b.source_begin);
        const int64_t source_end = std::min(p.factor.source(strip_end - 1) + p.radius() + 1, b.source_end);
        for (int64_t i = source_begin; i < source_end; i++) {
            const int64_t begin = std::max(p.factor.first_output(i - p.radius()), strip_begin);
            const int64_t end = std::min(p.factor.first_output(i + p.radius() + 1), strip_end);
            const A* const features = b.features + (i - b.source_begin) * source_size + tile * L;
            for (int g = 0; g < phases.count; g++) {
                const Phases::Group& group = phases.groups[g];
                const int width = group.end - group.begin;
                const int outputs = static_cast<int>(end - begin) * width;
                const int slices = (outputs + kMostOutputs - 1) / kMostOutputs;
                for (int k = 0; k < slices; k++) {
                    const Slice part = slice(0, outputs, k, slices);
                    Outputs<A> some;
                    some.tap_stride = up * L;
                    for (int o = part.begin; o < part.end; o++) {
                        const int64_t row = begin + o / width, phase = group.begin + o % width;
                        const int64_t a = i - p.factor.source(row) + p.radius();
                        some.grads[o - part.begin] = b.grads + ((row - strip_begin) * up + phase) * output_size;
                        some.sums[o - part.begin] = sums(b, tile, row) + (a * p.kernel_size * up + phase) * L;
                    }
                    with_count<kMostOutputs>(part.end - part.begin, [&](auto outputs_here) {
                        contract_columns<outputs_here()>(some, features, down * pitch, columns[g], taps.kernel_size,
                                                         count, next);
                    });
                }
            }
        }
    }

    void write(const Block& b, int64_t tile) const {
        const int64_t cell = (b.first_tile + tile) * L;
        const int count = static_cast<int>(std::min<int64_t>(L, cells - cell));
        for (int64_t row = b.begin; row < b.computed_end; row++) clear_outside(cell, sums(b, tile, row));
        for (int64_t row = b.begin; row < b.end; row += unit) {
            const Rows together{row, std::min(row + unit, b.end)};
            if (p.from_logits) to_logits(b, together, cell, count, sums(b, tile, row));
            masks.store_rows(b.n, b.group, together, cell, count, L, sums(b, tile, row), grad_masks);
        }
    }

    // Taps beyond a border, where features were 0 but grad_output may have been Inf or NaN.
    void clear_outside(int64_t cell, A* row) const {
        const int64_t k = p.kernel_size;
        if ((cell + taps.least_shift) * down >= 0 && (cell + L + taps.most_shift) * down <= p.features.w) return;
        for (int phase = 0; phase < up; phase++) {
            for (int b = 0; b < k; b++) {
                const ColumnTaps::Tap& tap = taps.at(phase, b);
                const int64_t first = -tap.shift - cell;
                const int64_t begin = std::clamp<int64_t>(first, 0, L);
                const int64_t end = std::clamp<int64_t>(first + ceil_div(p.features.w - tap.part, down), begin, L);
                for (int64_t a = 0; a < k; a++) {
                    A* const lanes = row + ((a * k + b) * up + phase) * L;
                    std::fill(lanes, lanes + begin, A{0});
                    std::fill(lanes + end, lanes + L, A{0});
                }
            }
        }
    }

    // The gradient of the masks of a tile to that of its logits, in place.
    void to_logits(const Block& b, Rows together, int64_t cell, int count, A* grad) const {
        A* const staged_masks = b.logits + unit * row_size;
        masks.load_rows(p.logits, b.n, b.group, together, cell, count, L, b.logits);
        for (int64_t at = 0; at < unit * row_size; at += row_size)
            masks.normalize_row_backward(grad + at, b.logits + at, staged_masks, L);
        masks.clear_cropped(together, cell, L, masks.order(L), grad);
    }
};

}  // namespace

void grad_masks_nchw(const Problem& problem, const Array& grad_masks) {
    run_kernel<GradMasksNchw>(problem, grad_masks);
}

}  // namespace carafepp::CARAFEPP_ISA
