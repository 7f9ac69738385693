// SPDX-License-Identifier: Apache-2.0
//
// The forward for few channels in a group, compiled once for each instruction set. A vector holds neighbouring outputs
// of a row if it is from masks. From logits it holds the same output (row, phase) of neighbouring cells.
//
// For a block of rows, a kernel stages the features that the windows reach. From masks it adds the products of one tap
// row after the other to the sums of the block. From logits it contracts slices, and writes each row of outputs once it
// is whole. Softmax needs no masks in memory: each numerator is contracted as it is computed.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// ---- contraction: the taps of a tile ----

template <class A>
struct FewContraction {
    const A* features;  // of the first tap
    int64_t row_stride, channel_stride;
    int64_t tap_offsets[kMaxKernelSize];
    Range inside[kMaxKernelSize];  // cells whose tap is inside the border
    int kernel_size;
    A* outputs;
    int64_t output_channel;
    SlicePrefetch* prefetch;
};

// Adds the products of one tap of N tiles and NC channels.
template <int N, int NC, class A>
CARAFEPP_INLINE void add_tap(const Vector<A> (&masks)[N], const A* features, int64_t channel_stride,
                             Vector<A> (&sums)[N][NC]) {
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) {
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) sums[v][c] += masks[v] * load(features + c * channel_stride + v * kLanes<A>);
    }
}

// The masks of a tile from cell `q` on, 0 outside the border.
template <class A>
CARAFEPP_INLINE Vector<A> load_inside(const A* mask, const Range& inside, int64_t q) {
    constexpr int64_t L = kLanes<A>;
    const int64_t begin = std::clamp<int64_t>(inside.begin - q, 0, L);
    const int64_t end = std::clamp<int64_t>(inside.end - q, begin, L);
    return load_between(mask, static_cast<int>(begin), static_cast<int>(end));
}

// Adds the products of some tap rows to N tiles of NC channels. load_mask(mask, b) loads masks of tap column b.
template <int N, int NC, class A, class F>
CARAFEPP_INLINE void add_tap_rows_of_tiles(const FewContraction<A>& at, TapRows<const A> masks, const A* features,
                                           A* outputs, F load_mask) {
    constexpr int L = kLanes<A>;
    const int64_t output_channel = at.output_channel, channel_stride = at.channel_stride;
    const int k = at.kernel_size;
    Vector<A> sums[N][NC];
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) {
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) sums[v][c] = load(outputs + c * output_channel + v * L);
    }
    const A* mask = masks.first;
    for (int left = masks.taps; left > 0; left -= k, features += at.row_stride) {
        for (int b = 0; b < k; b++, mask += masks.step) {
            Vector<A> of_tiles[N];
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) of_tiles[v] = load_mask(mask + v * L, b);
            add_tap<N, NC, A>(of_tiles, features + at.tap_offsets[b], channel_stride, sums);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < NC; c++) {
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) store(sums[v][c], outputs + c * output_channel + v * L);
    }
}

// Adds the products of some tap rows to the outputs of NC channels. Does not read the masks of taps beyond the border.
template <int NC, class A>
__attribute__((noinline)) void add_tap_rows(const FewContraction<A>& at, TapRows<const A> masks, const A* features,
                                            A* outputs) {
    constexpr int N = std::max(4 / NC, 1);                      // tiles that share the steps from tap to tap
    constexpr int64_t L = kLanes<A>, kAhead = 256 / sizeof(A);  // elements from a mask to the one that is prefetched
    const Range inside = {at.inside[0].begin,                   // cells whose taps all are
                          std::min<int64_t>(at.inside[at.kernel_size - 1].end, masks.cells)};
    const auto load_whole = [](const A* mask, int) __attribute__((always_inline)) {
        __builtin_prefetch(mask + kAhead);
        return load(mask);
    };
    for (int64_t q = 0; q < masks.cells;) {
        if (q >= inside.begin && q + N * L <= inside.end) {
            add_tap_rows_of_tiles<N, NC>(at, masks.from(q), features + q, outputs + q, load_whole);
            q += N * L;
            continue;
        }
        if (N > 1 && q >= inside.begin && q + L <= inside.end) {
            add_tap_rows_of_tiles<1, NC>(at, masks.from(q), features + q, outputs + q, load_whole);
        } else {
            add_tap_rows_of_tiles<1, NC>(at, masks.from(q), features + q, outputs + q,
                                         [&](const A* mask, int b) __attribute__((always_inline)) {
                return load_inside(mask, at.inside[b], q);
            });
        }
        q += L;
    }
}

// `masks` are those of the tap rows.
template <class A>
void add_tap_rows(const FewContraction<A>& at, int64_t channels, Range tap_rows, TapRows<const A> masks) {
    const A* const features = at.features + tap_rows.begin * at.row_stride;
    for_few_channels<A>(0, channels, [&](auto, int64_t c, auto count) {
        add_tap_rows<count()>(at, masks, features + c * at.channel_stride, at.outputs + c * at.output_channel);
    });
}

// Contracts softmax of logits. Taps beyond the border need no care: their masks are finite, or all masks are NaN. K is
// the kernel size, or 0 if the compiler does not know it.
template <int K, int N, int NC, class A>
CARAFEPP_INLINE void reassemble_logits_of_tiles(const FewContraction<A>& at, TapRows<const A> logits, int64_t first,
                                                int64_t q, int64_t channel, int exponent) {
    constexpr int L = kLanes<A>;
    const int k = K > 0 ? K : at.kernel_size;
    const int64_t channel_stride = at.channel_stride;
    Vector<A> largest[N], all[N] = {}, sums[N][NC] = {}, masks[N];
    largest_logits<N, A>(logits, q, largest);
    const A* from = logits.first + q;
    const A* row = at.features + channel * channel_stride + first + q;
    for (int a = 0; a < k; a++, row += at.row_stride) {
        for_tap_columns<K>(k, [&](int b) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int v = 0; v < N; v++) {
                masks[v] = exp_beside_1(load(from + v * L) - largest[v], exponent);
                all[v] += masks[v];
            }
            from += logits.step;
            add_tap<N, NC, A>(masks, row + at.tap_offsets[b], channel_stride, sums);
        });
    }
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) {
        const Vector<A> scale = A{1} / all[v];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++)
            store(sums[v][c] * scale, at.outputs + (channel + c) * at.output_channel + first + q + v * L);
    }
}

// `first` is the cell of the first logit.
template <int K, int NC, class A>
__attribute__((noinline)) void reassemble_few_logits(FewContraction<A> at, TapRows<const A> logits, int64_t first,
                                                     int64_t channel) {
    const int exponent = exponent_of_softmax(logits.taps);
    SlicePrefetch prefetch = *at.prefetch;
    for (int64_t q = 0; q < logits.cells; q += kCellsTogether<A>) {
        prefetch.prefetch_until(first + q + kCellsTogether<A>);
        reassemble_logits_of_tiles<K, kTilesTogether<A>, NC>(at, logits, first, q, channel, exponent);
    }
    *at.prefetch = prefetch;
}

// ---- from masks: a lane is a column of outputs ----

// deinterleave_rows() by a factor of 1. Copies rows that need neither widening nor gathering.
template <class A>
void stage_rows(const Array& array, int64_t n, int64_t channel, int64_t channels, Range rows,
                const Deinterleaved& layout, A* to) {
    if (array.stride_w != 1 || array.dtype != kDtypeOf<A>)
        return deinterleave_rows(array, n, channel, channels, rows, layout, to);
    const int64_t lanes = layout.lanes<A>(), begin = std::clamp<int64_t>(-layout.cell, 0, lanes);
    const int64_t end = std::clamp(array.w - layout.cell, begin, lanes);
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t i = rows.begin; i < rows.end; i++) {
            A* const row = to + c * layout.channel_stride + (i - rows.begin) * layout.row_stride;
            std::fill_n(row, begin, A{0});
            std::copy_n(element<const A>(array, n, channel + c, i, layout.cell + begin), end - begin, row + begin);
            std::fill_n(row + end, lanes - end, A{0});
        }
    }
}

template <class Sums>
struct ReassembleFewMasks {
    using A = Sums;

    const Problem& p;
    const Array& output;
    const bool in_place = p.masks.stride_w == 1 && p.masks.dtype == kDtypeOf<A>;
    const MaskBlocks blocks{p, kLanes<A>, !in_place};
    const int64_t k = p.kernel_size, channels = blocks.channels, items = blocks.items;
    const int64_t features_size = channels * blocks.sources_channel;
    const int64_t sums_channel = blocks.rows * blocks.lanes, sums_size = channels * sums_channel;
    const int64_t staged_size = std::max(channels * blocks.row_columns,
                                         in_place ? 0 : blocks.together * k * sums_channel);
    const int64_t scratch_size = features_size + sums_size + staged_size;

    void run_item(int64_t item, A* features) const {
        const MaskBlock block = blocks.block(item);
        A *const sums = features + features_size, *const staged = sums + sums_size;  // sums: [channel][row][column]
        stage_features(block, features, staged);
        std::fill_n(sums, sums_size, A{0});
        contract(block, features, staged, sums);
        for (int64_t c = 0; c < channels; c++) {
            const A* from = sums + c * sums_channel;
            for (int64_t i = block.rows.begin; i < block.rows.end; i++, from += blocks.lanes)
                write_row(from, block.n, block.group * channels + c, i, block.columns);
        }
    }

    void write_row(const A* from, int64_t n, int64_t channel, int64_t row, Range columns) const {
        if (output.stride_w == 1 && output.dtype == kDtypeOf<A>) {
            std::copy_n(from, columns.size(), element<A>(output, n, channel, row, columns.begin));
        } else {
            interleave_row(from, 0, 1, output, n, channel, row, columns);
        }
    }

    // Stages features from the top row of the first outputs on. Rows beyond the border stay as they are, columns are 0.
    // `row` is room for a row of features.
    void stage_features(const MaskBlock& block, A* to, A* row) const {
        const Range sources = sources_of(p, block.rows);
        const int64_t left = p.columns().source(block.columns.begin) - p.radius(), channel = block.group * channels;
        const int64_t up = blocks.up, down = blocks.down;
        to += (sources.begin - blocks.top(block.rows.begin)) * blocks.sources_row;
        if (up * down == 1) {
            const Deinterleaved layout{1, left, blocks.residue_stride, blocks.sources_channel, blocks.sources_row, 0};
            return stage_rows(p.features, block.n, channel, channels, sources, layout, to);
        }
        const Deinterleaved layout{1, left, blocks.row_columns, blocks.row_columns, 0, 0};
        for (int64_t i = sources.begin; i < sources.end; i++, to += blocks.sources_row) {
            stage_rows(p.features, block.n, channel, channels, {i, i + 1}, layout, row);
            for (int64_t c = 0; c < channels; c++)
                repeat_columns(row + c * blocks.row_columns, to + c * blocks.sources_channel);
        }
    }

    void repeat_columns(const A* row, A* to) const {
        const int64_t up = blocks.up, columns = blocks.residue_stride;
        if (blocks.down == 1) {
            const Array repeated{to, kDtypeOf<A>, 1, 1, 1, columns, 0, 0, 0, 1};
            return interleave_row(row, 0, static_cast<int>(up), repeated, 0, 0, 0, {0, columns});
        }
        for (int64_t residue = 0; residue < blocks.residues; residue++, to += columns) {
            for (int64_t phase = 0; phase < up; phase++) {
                const A* from = row + p.factor.source(phase) + residue;
                for (int64_t j = phase; j < columns; j += up, from += blocks.down) to[j] = *from;
            }
        }
    }

    void contract(const MaskBlock& block, const A* features, A* staged, A* sums) const {
        FewContraction<A> at;
        at.row_stride = blocks.sources_row;
        at.channel_stride = blocks.sources_channel;
        at.kernel_size = static_cast<int>(k);
        at.output_channel = sums_channel;
        for (int64_t b = 0; b < k; b++) {
            at.tap_offsets[b] = blocks.tap_offset(b);
            at.inside[b] = blocks.inside(b, block.columns);
        }
        const int64_t first_top = blocks.top(block.rows.begin);
        const int taps = static_cast<int>(blocks.together * k), cells = static_cast<int>(blocks.lanes);
        for (int64_t a = 0; a < k; a += blocks.together) {
            const int64_t channel = block.group * p.taps() + a * k;
            TapRows<const A> masks{staged, sums_channel, taps, cells};
            if (in_place) {
                masks.first = element<const A>(p.masks, block.n, channel, block.rows.begin, block.columns.begin);
                masks.step = p.masks.stride_c;
            } else {
                const Deinterleaved layout{1, block.columns.begin, block.columns.size(), sums_channel, blocks.lanes, 0};
                deinterleave_rows(p.masks, block.n, channel, taps, block.rows, layout, staged);
            }
            at.outputs = sums;
            for (int64_t i = block.rows.begin; i < block.rows.end; i++, at.outputs += blocks.lanes) {
                const int64_t top = blocks.top(i);
                const Range inside = {std::max(a, -top), std::min(a + blocks.together, p.features.h - top)};
                at.features = features + (top - first_top) * blocks.sources_row;
                if (inside.size() > 0)
                    add_tap_rows(at, channels, inside, masks.of({(inside.begin - a) * k, (inside.end - a) * k}));
                masks.first += in_place ? p.masks.stride_h : blocks.lanes;
            }
        }
    }
};

// ---- from logits: a lane is a cell ----

template <class Sums>
struct ReassembleFewLogits {
    using A = Sums;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& output;
    const FewChannels<A> few{p, ceil_div(p.out_w, p.factor.up), p.taps(), p.logits};
    const int64_t up = p.factor.up, k = p.kernel_size, channels = few.channels;
    const int64_t cell_rows = ceil_div(p.out_h, up);
    const int64_t block_rows = rows_of_block(
        p, L, cell_rows, (kBlockFeatures / std::max<int64_t>(channels * few.sources_row, 1) - k) / few.down,
        output.n* p.groups);
    const int64_t blocks = ceil_div(cell_rows, block_rows), items = output.n * p.groups * blocks;
    const int64_t staged_rows = p.factor.source(block_rows * up - 1) + k;
    const int64_t features_channel = staged_rows * few.sources_row;
    const int64_t features_size = channels * features_channel;
    const int64_t sums_channel = up * few.lanes;  // [channel][phase][cell], a row of outputs
    const int64_t sums_size = channels * sums_channel;
    const int64_t scratch_size = features_size + few.slice_size() + few.rows_together * sums_size;

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        const Range rows = {block * block_rows * up, std::min((block + 1) * block_rows * up, p.out_h)};
        A *const features = scratch, *const masks = features + features_size, *const sums = masks + few.slice_size();
        few.stage_features(n, group, rows, features_channel, features);
        Slice slice = few.first_slice(n, group, rows);
        while (slice.row < rows.end) {
            const Slice next = few.next(slice);
            A* const of_row = sums + few.place(slice) * sums_size;
            contract_slice(slice, next, features, p.rows().source(rows.begin), masks, of_row);
            if (few.is_last_of_row(slice)) write_row(slice, of_row);
            slice = next;
        }
    }

    void contract_slice(const Slice& s, const Slice& next, const A* features, int64_t first_source, A* masks,
                        A* sums) const {
        SlicePrefetch prefetch = few.prefetch_of(next);
        const int64_t top = p.rows().source(s.row) - p.radius();
        FewContraction<A> at;
        at.features = features + (p.rows().source(s.row) - first_source) * few.sources_row + s.cell;
        at.row_stride = few.sources_row;
        at.channel_stride = features_channel;
        at.kernel_size = static_cast<int>(k);
        at.output_channel = sums_channel;
        at.outputs = sums + s.phase * few.lanes + s.cell;
        at.prefetch = &prefetch;
        few.find_taps(s.phase, at.tap_offsets);
        if (few.by_softmax() && channels <= kRegisterChannels<A>) {
            few.for_parts(s, {0, s.count}, few.kTwice, masks, [&](int64_t first, const TapRows<const A>& logits) {
                for_few_channels<A>(k, channels, [&](auto known, int64_t c, auto count) {
                    reassemble_few_logits<known(), count()>(at, logits, first, c);
                });
            });
            return;
        }
        TapRows<const A> rows = few.rows_of_phase(s, s.phase, masks).read_only();
        const Array logits = few.taps_of(p.logits, s);
        if (p.normalizer == CARAFEPP_NONE && logits.stride_w == 1 && logits.dtype == kDtypeOf<A>) {
            rows.first = element<const A>(logits, s.n, s.group * few.taps, few.row_in_array(s), s.cell);
            rows.step = logits.stride_c;
        } else {
            few.stage_masks(s, masks);
        }
        for (int64_t b = 0; b < k; b++) {
            const Range inside = few.columns.tap(s.phase, b).inside;
            at.inside[b] = {inside.begin - s.cell, std::min({inside.end, few.columns.outputs(s.phase)}) - s.cell};
        }
        for (int64_t c = 0; c < channels; c++) std::fill_n(at.outputs + c * sums_channel, rows.cells, A{0});
        for (int64_t a = std::max<int64_t>(-top, 0); a < std::min(k, p.features.h - top); a++)
            add_tap_rows(at, channels, {a, a + 1}, rows.of({a * k, a * k + k}));
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
    with_accumulator(problem.features.dtype, [&](auto sums) {
        using A = typename decltype(sums)::type;
        problem.from_logits ? run_items(ReassembleFewLogits<A>{problem, output})
                            : run_items(ReassembleFewMasks<A>{problem, output});
    });
}

}  // namespace carafepp::CARAFEPP_ISA
