// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features, with columns in lanes, compiled once for each instruction set. Made for adjacent columns,
// it takes any strides. It is gathered: a vector holds one source pixel (row, column modulo down) of neighbouring
// cells, and its sum over all outputs that read it is whole in one item, in one order whatever the threads. For a chunk
// of source rows: stage the masks of all rows of outputs that read them; then for a few channels at a time walk down
// these rows, split each into lanes, and add its products to the sums of the source rows that it reads; write the sums
// out. Windows so large that their masks would leave the caches are staged on the way down instead, for as many
// channels at a time as there is room for.
#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/tile_transpose.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kStagedElements = 160 * 1024;  // of masks of a chunk: in float 640 KiB
constexpr int64_t kLeastRows = 8;                // of a chunk, where a narrower panel makes room for them
constexpr int64_t kChannels = 16;                // at a time: their rows of grad_output stay in level 1
constexpr int64_t kMostChannels = 128;           // where all masks are staged for each such time

// What is kept in registers: the sums of some source rows, of some channels.
constexpr int kRowsAtOnce = kVectorRegisters == 32 ? 5 : 3;
constexpr int kChannelsAtOnce = 4;

// A tap of a phase, of the part that it reads.
struct Term {
    int64_t grads, weights;  // where its lanes begin
};

// Rows of outputs centred on one source row, for adjacent source rows that they read.
template <class A>
struct Visit {
    A* sums;  // of the first source row; channels lie a vector apart
    int64_t sums_row;
    const A* weights;  // of the first tap row
    int64_t weights_row, weights_output;
    const A* grads;
    int64_t grads_channel, grads_output;
    int64_t outputs;
    const Term *terms, *terms_end;
};

// NR source rows, NC channels: sums += masks * grad_output.
template <int NR, int NC, class A>
__attribute__((noinline)) void contract(const Visit<A>& visit, Ahead& ahead) {
    constexpr int L = kLanes<A>;
    Vector<A> sums[NR][NC];
#pragma GCC unroll 5
    for (int r = 0; r < NR; r++) {
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) sums[r][c] = load(visit.sums + r * visit.sums_row + c * L);
    }
    const int64_t grads_channel = visit.grads_channel, weights_row = visit.weights_row;
    for (int64_t o = 0; o < visit.outputs; o++) {
        const A* const grads = visit.grads + o * visit.grads_output;
        const A* const weights = visit.weights + o * visit.weights_output;
        for (const Term* term = visit.terms; term != visit.terms_end; term++) {
            const A* const from = grads + term->grads;
            ahead.fetch_line();
            Vector<A> weight[NR];
#pragma GCC unroll 5
            for (int r = 0; r < NR; r++) weight[r] = load(weights + term->weights + r * weights_row);
#pragma GCC unroll 4
            for (int c = 0; c < NC; c++) {
                const Vector<A> grad = load(from + c * grads_channel);
#pragma GCC unroll 5
                for (int r = 0; r < NR; r++) sums[r][c] += weight[r] * grad;
            }
        }
    }
#pragma GCC unroll 5
    for (int r = 0; r < NR; r++) {
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) store(sums[r][c], visit.sums + r * visit.sums_row + c * L);
    }
}

template <class T>
struct GradFeaturesNchw {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_features;
    const ColumnTaps taps{p};
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size;
    const int64_t channels = p.features.c / p.groups;
    const int64_t tiles = ceil_div(ceil_div(p.features.w, down), L);  // of sources

    // Items are `panel` tiles of `chunk` source rows, computed `at_once` channels at a time; sizes follow from that.
    int64_t panel = 1, chunk = p.features.h, at_once = std::min(channels, kChannels);
    int64_t weights_row = k * up * L;      // one tap row of a row of outputs: [b][phase][lane]
    int64_t weights_output, weights_tile;  // [tile][row of outputs][tap row][b][phase][lane]
    bool keeps_masks;     // of all rows of outputs that read a chunk; else of those centred on one source row
    int64_t staged_rows;  // of outputs
    int64_t span, pitch, all_masks_pitch;  // of cells whose outputs a panel is read by
    int64_t scratch_size, weights_size, sums_size, grads_size, rows_size;
    int64_t items, panels, chunks;
    bool streams;  // whole rows
    Term terms[kMaxFactor * kMaxKernelSize];
    int terms_of[kMaxFactor + 1];  // a part's terms are [terms_of[part], terms_of[part + 1])

    GradFeaturesNchw(const Problem& problem, const Array& result) : p(problem), grad_features(result) {
        choose_items();
        find_terms();
    }

    void choose_items() {
        const int64_t wanted = weights_of(std::min(kLeastRows, p.features.h));
        keeps_masks = wanted <= kStagedElements;
        if (keeps_masks) {
            panel = ceil_div(tiles, ceil_div(tiles, std::min(kStagedElements / wanted, tiles)));
            while (chunk > 1 && weights_of(chunk) * panel > kStagedElements) chunk = ceil_div(chunk, 2);
        } else {
            chunk = std::min(chunk, k);
            at_once = std::min(channels, kMostChannels);
        }
        for (find_sizes(); scratch_size > kScratchBytes / int64_t{sizeof(A)}; find_sizes()) {
            int64_t& most = panel > 1 ? panel : chunk > 1 ? chunk : at_once;
            if (most <= 1) break;
            most = ceil_div(most, 2);
        }
        panels = ceil_div(tiles, panel);
        for (chunks = ceil_div(p.features.h, chunk);; chunks = ceil_div(p.features.h, chunk)) {
            items = grad_features.n * p.groups * chunks * panels;
            if (items >= threads_worth<A>(p) || chunk < 2 * k) break;
            chunk = ceil_div(chunk, 2);
        }
        find_sizes();
    }

    void find_sizes() {
        staged_rows = keeps_masks ? p.factor.natural_size(chunk + k - 1) : ceil_div(up, down);
        weights_output = std::min(chunk, k) * weights_row;
        weights_tile = staged_rows * weights_output;
        span = panel * L + taps.shifts();
        pitch = ceil_div(span, L) * L;
        all_masks_pitch = pitch + L;
        weights_size = panel * weights_tile;
        sums_size = panel * chunk * down * at_once * L;
        const int64_t all_masks_size = (p.from_logits ? k : std::min(chunk, k)) * k * up * all_masks_pitch;
        grads_size = at_once * ceil_div(up, down) * up * pitch;
        streams = panel == tiles && grad_features.stride_w == 1 && grad_features.stride_h == p.features.w &&
                  wants_non_temporal_stores(grad_features);
        rows_size = streams ? ceil_div(chunk * p.features.w, L) * L : 0;
        scratch_size = weights_size + sums_size + rows_size + std::max(grads_size, all_masks_size);
    }

    // Staged masks of a tile, for a chunk of `rows` source rows.
    int64_t weights_of(int64_t rows) const {
        return p.factor.natural_size(rows + k - 1) * std::min(rows, k) * weights_row;
    }

    void find_terms() {
        int count = 0;
        for (int part = 0; part < down; part++) {
            terms_of[part] = count;
            for (int phase = 0; phase < up; phase++) {
                for (int b = 0; b < k; b++) {
                    const ColumnTaps::Tap& tap = taps.at(phase, b);
                    if (tap.part == part)
                        terms[count++] = {phase * pitch + taps.most_shift - tap.shift, (b * up + phase) * L};
                }
            }
        }
        terms_of[down] = count;
    }

    // What one item is: some source rows of some tiles, all channels of a group.
    struct Block {
        int64_t n, group, first_tile, tiles;
        int64_t begin, end;                  // source rows
        int64_t outputs_begin, outputs_end;  // rows that read them
        int64_t first_cell;                  // of the outputs that read the panel; perhaps outside
        A* weights;                          // [tile][row of outputs][tap row][b][phase][lane]
        A* sums;                             // [tile][row][part][channel][lane]
        A* grads;                            // [channel][row of outputs][phase][cell]
        T* rows;                             // of the result, of one channel
        A* all_masks;                        // of one row of outputs: [tap][phase][cell]
    };

    void run_item(int64_t item, A* scratch) const {
        Block b;
        b.weights = scratch;
        b.sums = b.weights + weights_size;
        b.rows = reinterpret_cast<T*>(b.sums + sums_size);
        b.grads = b.all_masks = b.sums + sums_size + rows_size;
        b.first_tile = item % panels * panel;
        b.tiles = std::min(panel, tiles - b.first_tile);
        b.first_cell = b.first_tile * L - taps.most_shift;
        b.begin = item / panels % chunks * chunk;
        b.end = std::min(b.begin + chunk, p.features.h);
        b.outputs_begin = std::max<int64_t>(p.factor.first_output(b.begin - p.radius()), 0);
        b.outputs_end = std::min(p.factor.first_output(b.end + p.radius()), p.out_h);
        b.group = item / panels / chunks % p.groups;
        b.n = item / panels / chunks / p.groups;
        if (keeps_masks) {
            for (int64_t row = b.outputs_begin; row < b.outputs_end; row++) stage(b, row, b.outputs_begin);
        }
        for (int64_t c = 0; c < channels; c += at_once) {
            const int64_t count = std::min(at_once, channels - c);
            contract_channels(b, b.group * channels + c, count);
            write(b, b.group * channels + c, count);
        }
    }

    // The tap rows [begin, end) of a row of outputs that are inside the chunk.
    Slice tap_rows(const Block& b, int64_t row) const {
        const int64_t top = p.factor.source(row) - p.radius();
        return {static_cast<int>(std::max<int64_t>(b.begin - top, 0)), static_cast<int>(std::min(b.end - top, k))};
    }

    // Of a row of outputs, `staged` is the first that is staged with it.
    A* weights(const Block& b, int64_t tile, int64_t row, int64_t staged) const {
        return b.weights + tile * weights_tile + (row - staged) * weights_output;
    }

    // Of a source row of a tile: [part][channel][lane].
    A* sums(const Block& b, int64_t tile, int64_t row) const {
        return b.sums + (tile * chunk + row) * down * at_once * L;
    }

    // The masks of one row of outputs, each tap moved on to the cells of the sources that it reads; 0 where there is no
    // output.
    void stage(const Block& b, int64_t row, int64_t staged) const {
        const Slice inside = tap_rows(b, row);
        MaskTiles<A> masks{p, up};
        if (!p.from_logits) {  // a normaliser takes all taps together
            masks.first_tap = inside.begin * k;
            masks.taps = (inside.end - inside.begin) * k;
        }
        const int64_t cells = ceil_div(p.out_w, up), size = masks.row_size(all_masks_pitch);
        const int64_t begin = std::clamp<int64_t>(b.first_cell, 0, cells);
        const int64_t end = std::clamp<int64_t>(b.first_cell + span, 0, cells);
        for (int64_t cell = begin; cell < end; cell += L) {
            const int count = static_cast<int>(std::min<int64_t>(L, cells - cell));
            masks.stage(b.n, b.group, {row, row + 1}, cell, count, all_masks_pitch,
                        b.all_masks + (cell - b.first_cell));
        }
        for (int64_t phase = 0; phase < up; phase++) {
            const int64_t outputs = ceil_div(p.out_w - phase, up);
            if (b.first_cell >= 0 && b.first_cell + pitch <= outputs) continue;
            const int64_t last = std::clamp<int64_t>(outputs - b.first_cell, 0, pitch);
            for (int64_t at = phase * all_masks_pitch; at < size; at += up * all_masks_pitch) {
                A* const lanes = b.all_masks + at;
                std::fill(lanes, lanes + std::clamp<int64_t>(-b.first_cell, 0, pitch), A{0});
                std::fill(lanes + last, lanes + pitch, A{0});
            }
        }
        for (int64_t tile = 0; tile < b.tiles; tile++) {
            A* to = weights(b, tile, row, staged);
            for (int64_t t = inside.begin * k; t < inside.end * k; t++) {
                for (int phase = 0; phase < up; phase++, to += L) {
                    const int64_t shift = taps.most_shift - taps.at(phase, static_cast<int>(t % k)).shift;
                    store(load(b.all_masks + ((t - masks.first_tap) * up + phase) * all_masks_pitch + tile * L + shift),
                          to);
                }
            }
        }
    }

    void contract_channels(const Block& b, int64_t channel, int64_t count) const {
        std::fill_n(b.sums, b.tiles * chunk * down * at_once * L, A{0});
        int64_t next;
        for (int64_t row = b.outputs_begin; row < b.outputs_end; row = next) {
            next = row + 1;
            while (next < b.outputs_end && p.factor.source(next) == p.factor.source(row)) next++;
            if (!keeps_masks) {
                for (int64_t of_source = row; of_source < next; of_source++) stage(b, of_source, row);
            }
            split_outputs(b, channel, count, row, next);
            contract_outputs(b, channel, count, row, next);
        }
    }

    // Rows [begin, end) of grad_output.
    void split_outputs(const Block& b, int64_t channel, int64_t count, int64_t begin, int64_t end) const {
        const Split split{static_cast<int>(up),       b.first_cell, b.tiles * L + taps.shifts(),
                          (end - begin) * up * pitch, up * pitch,   pitch};
        split_rows(p.grad_output, b.n, channel, count, {begin, end}, split, b.grads);
    }

    // Rows [begin, end) of outputs, which are centred on one source row.
    void contract_outputs(const Block& b, int64_t channel, int64_t count, int64_t begin, int64_t end) const {
        const Slice inside = tap_rows(b, begin);
        const int64_t first = p.factor.source(begin) - p.radius() + inside.begin - b.begin;
        const int rows = inside.end - inside.begin, slices = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
        Visit<A> visit;
        visit.sums_row = down * at_once * L;
        visit.weights_row = weights_row;
        visit.weights_output = weights_output;
        visit.grads_output = up * pitch;
        visit.grads_channel = (end - begin) * up * pitch;
        visit.outputs = end - begin;
        const bool last = end == b.outputs_end;
        const int64_t next = last ? b.outputs_begin : end, next_channel = last ? channel + at_once : channel;
        const int64_t left = (b.group + 1) * channels - next_channel;
        Ahead ahead(p.grad_output,
                    element<const T>(p.grad_output, b.n, next_channel, next, std::max<int64_t>(b.first_cell * up, 0)),
                    std::min(span * up, p.out_w), std::min(end - begin, b.outputs_end - next), std::min(at_once, left));
        for (int64_t tile = 0; tile < b.tiles; tile++) {
            for (int s = 0; s < slices; s++) {
                const Slice some = slice(0, rows, s, slices);
                visit.weights = weights(b, tile, begin, keeps_masks ? b.outputs_begin : begin) +
                                some.begin * weights_row;
                for (int part = 0; part < down; part++) {
                    visit.terms = terms + terms_of[part];
                    visit.terms_end = terms + terms_of[part + 1];
                    A* const of_part = sums(b, tile, first + some.begin) + part * at_once * L;
                    for (int64_t c = 0; c < count; c += kChannelsAtOnce) {
                        visit.sums = of_part + c * L;
                        visit.grads = b.grads + c * visit.grads_channel + tile * L;
                        with_count<kRowsAtOnce>(some.end - some.begin, [&](auto rows_here) {
                            with_count<kChannelsAtOnce>(static_cast<int>(count - c), [&](auto channels_here) {
                                contract<rows_here(), channels_here()>(visit, ahead);
                            });
                        });
                    }
                }
            }
        }
    }

    void write(const Block& b, int64_t channel, int64_t count) const {
        if (as_pixels(grad_features, count)) {
            write_pixels(b, channel, static_cast<int>(count));
            return;
        }
        for (int64_t c = 0; c < count; c++) {
            T* const to = element<T>(grad_features, b.n, channel + c, b.begin, b.first_tile * L * down);
            if (streams) {
                write_rows(b, c, b.rows, p.features.w, 1);
                stream_lines(b.rows, (b.end - b.begin) * p.features.w, to);
                continue;
            }
            write_rows(b, c, to, grad_features.stride_h, grad_features.stride_w);
        }
        if (streams) finish_non_temporal_stores();
    }

    void write_rows(const Block& b, int64_t c, T* to, int64_t row_stride, int64_t column_stride) const {
        const int64_t tile_columns = L * down, sums_tile = chunk * down * at_once * L;
        for (int64_t i = 0; i < b.end - b.begin; i++, to += row_stride) {
            const A* from = sums(b, 0, i) + c * L;
            T* tile = to;
            int64_t left = p.features.w - b.first_tile * tile_columns;
            for (int64_t t = 0; t < b.tiles; t++) {
                store_columns(from, at_once * L, static_cast<int>(down), left, tile, column_stride);
                from += sums_tile;
                tile += tile_columns * column_stride;
                left -= tile_columns;
            }
        }
    }

    // All channels at once, adjacent in each pixel.
    void write_pixels(const Block& b, int64_t channel, int count) const {
        for (int64_t i = 0; i < b.end - b.begin; i++) {
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                for (int64_t part = 0; part < down; part++) {
                    const int64_t column = (b.first_tile + tile) * L * down + part;
                    const int64_t pixels = std::clamp<int64_t>(ceil_div(p.features.w - column, down), 0, L);
                    store_channels<T>(adjacent_channels<const A>(sums(b, tile, i) + part * at_once * L, L),
                                      static_cast<int>(pixels), count,
                                      element<T>(grad_features, b.n, channel, b.begin + i, column),
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
