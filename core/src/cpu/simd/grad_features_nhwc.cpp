// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features with adjacent channels, compiled once for each instruction set. A register tile holds a
// source tile and sums over all outputs whose windows touch it. A vector of grad_output serves every source of the tile
// that the window holds. First comes the plan. Each item then goes down its rows of sources. It stages the masks
// of the next outputs. For each source tile it packs the weights in their order, contracts, and writes.
#include <algorithm>
#include <cassert>
#include <iterator>
#include <numeric>

#include "cpu/geometry.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// The source tile: the sources of a register tile, and the vectors of channels of each.
constexpr int kRows = kVectorRegisters == 32 ? kMostSourceRows : 2;
constexpr int kColumns = kVectorRegisters == 32 ? kMostSourceColumns : 3;
constexpr int kSources = kRows * kColumns;
constexpr int kVectors = 2;

// ---- plan ----

template <class T>
struct GradFeaturesNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;
    static constexpr Result kResult = kGradFeatures;

    const Problem& p;
    const Array& grad_features;
    MaskTiles<A> masks;
    int64_t up, down, radius, taps;
    int64_t height, width;                // of features
    int64_t channels;                     // of a group
    int64_t output_rows, output_columns;  // whose windows touch a source tile, at most
    int64_t ring_rows, ring_columns;      // of staged masks: rows of cells, outputs
    int64_t item_rows, item_columns;      // sources: whole source tiles
    int64_t row_items, column_items;
    int64_t margin;       // of the ring, which packing reads beyond
    int64_t ring_size;    // [row of cells][row][output][tap]
    int64_t tile_size;    // [row][tap][phase][lane]
    int64_t packed_size;  // [row of outputs][output][row and column of the source tile]
    int64_t items, scratch_size;
    bool non_temporal;

    GradFeaturesNhwc(const Problem& problem, const Array& result, int64_t scratch_bytes = kScratchBytes)
        : p(problem), grad_features(result), masks{p, std::min(p.factor.up, p.out_w)} {
        // Bytes of grad_output that a row of source tiles reads, in the level 2 cache.
        constexpr int64_t kItemBytes = 768 * 1024;
        constexpr int64_t kRingBytes = 1024 * 1024;
        constexpr int64_t kItemRows = 24;  // each item begins with staging the masks of a window's rows
        up = p.factor.up;
        down = p.factor.down;
        radius = p.radius();
        taps = p.taps();
        height = p.features.h;
        width = p.features.w;
        channels = p.features.c / p.groups;
        output_rows = most_outputs_on(2 * radius + kRows);
        output_columns = most_outputs_on(2 * radius + kColumns);
        ring_rows = ceil_div(2 * radius + kRows, down) + 1;
        margin = kRows * p.kernel_size + kColumns;
        tile_size = up * masks.row_size(L);
        packed_size = output_rows * output_columns * kSources;

        const int64_t cells = std::max<int64_t>(ceil_div(p.out_w, up), 1);
        const int64_t outputs = std::min(kItemBytes / (output_rows * channels * int64_t{sizeof(T)}),
                                         kRingBytes / int64_t{sizeof(A)} / (ring_rows * up * taps));
        const int64_t most = std::max<int64_t>(outputs * down / up - 2 * radius, kColumns);
        item_columns = round_up(ceil_div(width, ceil_div(width, most)), kColumns);
        for (;; item_columns -= kColumns) {
            ring_columns = std::min(ceil_div(item_columns + 2 * radius, down) + 1, cells) * up;
            ring_size = round_up(ring_rows * up * ring_columns * taps + 2 * margin, L);
            scratch_size = ring_size + tile_size + packed_size;
            if (scratch_size * int64_t{sizeof(A)} <= scratch_bytes || item_columns == kColumns) break;
        }
        assert(scratch_size * int64_t{sizeof(A)} <= scratch_bytes);
        item_rows = round_up(ceil_div(height, ceil_div(height, kItemRows)), kRows);
        row_items = ceil_div(height, item_rows);
        column_items = ceil_div(width, item_columns);
        items = grad_features.n * p.groups * row_items * column_items;
        // A cache line that is written in two parts, far apart in time, leaves the processor twice.
        non_temporal = kVectors * L * sizeof(T) >= 64 && takes_non_temporal_stores<T>(grad_features, channels);
    }

    // How many outputs are centred on so many neighbouring sources, at most.
    int64_t most_outputs_on(int64_t sources) const { return ceil_div(sources * up, down) + 1; }

    static int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

    void run_item(int64_t item, A* scratch) const;
};

// One item: sources [top, bottom) x [left, right) of a group, and the cells whose outputs touch its columns.
template <class A>
struct GradFeaturesItem {
    int64_t n, group, top, bottom, left, right, first_cell, end_cell;
    A *ring, *tile, *packed;
};

// The first output centred on `source` or behind it; `outputs` if there is none.
int64_t first_output_inside(const Axis& axis, int64_t source, int64_t outputs) {
    return std::clamp<int64_t>(axis.first_output(source), 0, outputs);
}

// ---- staging ----

template <class T, class A>
A* staged_row(const GradFeaturesNhwc<T>& plan, const GradFeaturesItem<A>& at, int64_t row) {
    return at.ring + (row / plan.up % plan.ring_rows * plan.up + row % plan.up) * plan.ring_columns * plan.taps;
}

// The masks of the outputs of one row of cells, into the ring.
template <class T, class A>
void stage_cells(const GradFeaturesNhwc<T>& plan, const GradFeaturesItem<A>& at, int64_t cell_row) {
    const Range rows{cell_row * plan.up, std::min((cell_row + 1) * plan.up, plan.p.out_h)};
    plan.masks.stage_pixels(at.n, at.group, rows, at.first_cell, at.end_cell - at.first_cell, at.tile,
                            plan.ring_columns * plan.taps, staged_row(plan, at, rows.begin));
}

// ---- contraction ----

// A window is at most one source narrower than a source tile. So it holds the first sources of a tile, or the last, or
// all. One number, the range code, tells which of `most` sources they are.
static_assert(std::max(kRows, kColumns) - 1 <= 3, "windows of 3 hold an end of the source tile");
int range_code_in_tile(int64_t begin, int64_t taps, int most) {
    assert(taps >= most - 1 && begin < most && begin + taps > 0);
    return static_cast<int>(begin <= 0 ? std::min<int64_t>(begin + taps, most) - 1 : most - 1 + begin);
}

// Calls f(begin, end) with the sources of a range code, both known to the compiler.
template <int Most, int Code = 2 * Most - 2, class F>
CARAFEPP_INLINE void with_range(int range_code, F f) {
    if constexpr (Code > 0) {
        if (range_code != Code) {
            with_range<Most, Code - 1>(range_code, f);
            return;
        }
    }
    constexpr int kBegin = Code < Most ? 0 : Code - Most + 1, kEnd = Code < Most ? Code + 1 : Most;
    f(std::integral_constant<int, kBegin>(), std::integral_constant<int, kEnd>());
}

// Calls f(code, begin, end) with each range code in turn.
template <int Most, int Code = 0, class F>
CARAFEPP_INLINE void with_each_range(F f) {
    constexpr int kBegin = Code < Most ? 0 : Code - Most + 1, kEnd = Code < Most ? Code + 1 : Most;
    f(Code, std::integral_constant<int, kBegin>(), std::integral_constant<int, kEnd>());
    if constexpr (Code < 2 * Most - 2) with_each_range<Most, Code + 1>(f);
}

constexpr int64_t kMostOutputs = (std::max(kRows, kColumns) + kMaxKernelSize) * kMaxFactor;  // along an axis of a tile

// One row of outputs whose windows touch a row of source tiles.
template <class T>
struct OutputRow {
    const T* grads;               // of output 0
    const Accumulator<T>* masks;  // staged, from the tap on that reads the tiles' first row
    int range_code;               // of the tiles' rows
};

// All rows of outputs whose windows touch a row of source tiles.
template <class T>
struct OutputRows {
    OutputRow<T> rows[kMostOutputs];
    int count;
    int64_t end, next_end;  // the row behind them, and that of the tiles below
};

// All outputs whose windows touch a source tile. The weights are [output][row][column of the tile].
template <class T>
struct TileOutputs {
    const OutputRow<T>* rows;
    int row_count;
    int64_t ends[2 * kColumns - 1];  // of the weights of a row's outputs, by the range code of columns, which grows
    const Accumulator<T>* weights;
    int64_t first;  // of output (0, 0) of the tile, from output 0 on
    int64_t pixel_stride;
    PixelPrefetch<T> prefetch;  // rows that the tile below is the first to read: its columns
};

// A source tile of the result. Some of its sources may be beyond the borders.
template <class T>
struct SourceTile {
    T* first;
    int64_t row_stride, pixel_stride;
    int rows, columns;
    bool non_temporal;
};

// A register tile: `NV` vectors of channels from `c` on, or the first `tail` lanes of one.
template <int NV, bool kTail, class T>
__attribute__((noinline)) void sum_over_outputs(const TileOutputs<T>& outputs, const SourceTile<T>& sources, int64_t c,
                                                int tail) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    constexpr int kBlockBytes = NV * L * static_cast<int>(sizeof(T));
    Vector<A> sums[kRows][kColumns][NV] = {};
    const A* weights = outputs.weights;
    const int64_t pixel_stride = outputs.pixel_stride;
    for (int index = 0; index < outputs.row_count; index++) {
        if (index < outputs.prefetch.rows) prefetch_row<NV>(outputs.prefetch, index, c);
        const OutputRow<T>* const row = outputs.rows + index;
        const T* grads = row->grads + outputs.first + c;
        const A* const first = weights;
        with_range<kRows>(row->range_code, [&](auto r_begin, auto r_end) __attribute__((always_inline)) {
            with_each_range<kColumns>([&](int code, auto q_begin, auto q_end) __attribute__((always_inline)) {
                for (const A* const end = first + outputs.ends[code]; weights < end; weights += kSources) {
                    Vector<A> grad[NV];
                    read_channels<NV, kTail>(grads, tail, grad);
                    if constexpr ((r_end() - r_begin()) * (q_end() - q_begin()) > 1) {
#pragma GCC unroll 4
                        for (int v = 0; v < NV; v++) grad[v] = in_register(grad[v]);
                    }
                    // The next channels of this pixel are the next ones wanted.
                    if constexpr (NV == kVectors) {
#pragma GCC unroll 4
                        for (int byte = 0; byte < kBlockBytes; byte += 64)
                            __builtin_prefetch(reinterpret_cast<const char*>(grads + NV * L) + byte);
                    }
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
                        for (int q = 0; q < kColumns; q++) {
                            if (r < r_begin || r >= r_end || q < q_begin || q >= q_end) continue;
                            const Vector<A> weight = splat(weights[r * kColumns + q]);
#pragma GCC unroll 4
                            for (int v = 0; v < NV; v++) sums[r][q][v] += weight * grad[v];
                        }
                    }
                    grads += pixel_stride;
                }
            });
        });
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
        for (int q = 0; q < kColumns; q++) {
            if (r >= sources.rows || q >= sources.columns) continue;
            write_channels<NV, kTail>(sums[r][q], sources.first + r * sources.row_stride + q * sources.pixel_stride + c,
                                      tail, sources.non_temporal);
        }
    }
}

// All channels of a group: the last vectors overlap those before them, rather than being few.
template <class T>
void sum_channels_over_outputs(const TileOutputs<T>& outputs, const SourceTile<T>& sources, int64_t channels) {
    constexpr int64_t L = kLanes<Accumulator<T>>, kAtOnce = kVectors * L;
    if (channels < kAtOnce) {
        for (int64_t c = 0; c < channels; c += L)
            sum_over_outputs<1, true>(outputs, sources, c, static_cast<int>(std::min(channels - c, L)));
        return;
    }
    for (int64_t c = 0; c < channels; c += kAtOnce)
        sum_over_outputs<kVectors, false>(outputs, sources, std::min(c, channels - kAtOnce), 0);
}

template <class T, class A>
void find_rows(const GradFeaturesNhwc<T>& plan, const GradFeaturesItem<A>& at, int64_t i, OutputRows<T>& outputs) {
    const Problem& p = plan.p;
    const Axis in_rows = p.rows();
    outputs.count = 0;
    outputs.end = first_output_inside(in_rows, i + kRows + plan.radius, p.out_h);
    outputs.next_end = first_output_inside(in_rows, i + 2 * kRows + plan.radius, p.out_h);
    for (int64_t row = first_output_inside(in_rows, i - plan.radius, p.out_h); row < outputs.end; row++) {
        const int64_t top = in_rows.source(row) - plan.radius;
        outputs.rows[outputs.count++] = {element<const T>(p.grad_output, at.n, at.group * plan.channels, row, 0),
                                         staged_row(plan, at, row) + (i - top) * p.kernel_size,
                                         range_code_in_tile(top - i, p.kernel_size, kRows)};
    }
}

// The source tile with its corner at (i, j): packs the weights of its outputs, and contracts.
template <class T, class A>
void grad_features_of_source_tile(const GradFeaturesNhwc<T>& plan, const GradFeaturesItem<A>& at,
                                  const OutputRows<T>& rows, int64_t i, int64_t j) {
    const Problem& p = plan.p;
    const Axis in_columns = p.columns();
    const int64_t radius = plan.radius, k = p.kernel_size, channel = at.group * plan.channels;
    int64_t taps_of[kMostOutputs];  // of the output's window, where the tile's first source is in its rows
    const int64_t first = first_output_inside(in_columns, j - radius, p.out_w);
    const int64_t end = first_output_inside(in_columns, j + kColumns + radius, p.out_w);
    TileOutputs<T> outputs{rows.rows, rows.count, {}, at.packed, first * p.grad_output.stride_w, p.grad_output.stride_w,
                           {}};
    int64_t source = in_columns.source(first), remainder = first * plan.down % plan.up;
    for (int64_t q = first; q < end; q++) {
        outputs.ends[range_code_in_tile(source - radius - j, k, kColumns)] += kSources;
        taps_of[q - first] = (q - at.first_cell * plan.up) * plan.taps + j - source + radius;
        for (remainder += plan.down; remainder >= plan.up; remainder -= plan.up) source++;
    }

    std::partial_sum(std::begin(outputs.ends), std::end(outputs.ends), outputs.ends);
    A* packed = at.packed;
    for (int row = 0; row < rows.count; row++) {
        const A* const weights = rows.rows[row].masks;
        for (int64_t q = 0; q < end - first; q++, packed += kSources) {
#pragma GCC unroll 4
            for (int b = 0; b < kRows; b++)
                std::memcpy(packed + b * kColumns, weights + taps_of[q] + b * k, kColumns * sizeof(A));
        }
    }
    const int64_t own = first_output_inside(in_columns, j + radius, p.out_w);
    const int64_t own_end = first_output_inside(in_columns, j + radius + kColumns, p.out_w);
    outputs.prefetch = {element<const T>(p.grad_output, at.n, channel, rows.end, own), p.grad_output.stride_h,
                        p.grad_output.stride_w, static_cast<int>(rows.next_end - rows.end),
                        static_cast<int>(own_end - own)};
    const SourceTile<T> sources{element<T>(plan.grad_features, at.n, channel, i, j),
                                plan.grad_features.stride_h,
                                plan.grad_features.stride_w,
                                static_cast<int>(std::min<int64_t>(kRows, at.bottom - i)),
                                static_cast<int>(std::min<int64_t>(kColumns, plan.width - j)),
                                plan.non_temporal};
    sum_channels_over_outputs(outputs, sources, plan.channels);
}

template <class T>
void GradFeaturesNhwc<T>::run_item(int64_t item, A* scratch) const {
    GradFeaturesItem<A> at;
    at.left = item % column_items * item_columns;
    at.right = std::min(at.left + item_columns, width);
    at.top = item / column_items % row_items * item_rows;
    at.bottom = std::min(at.top + item_rows, height);
    at.group = item / column_items / row_items % p.groups;
    at.n = item / column_items / row_items / p.groups;
    at.first_cell = first_output_inside(p.columns(), at.left - radius, p.out_w) / up;
    at.end_cell = ceil_div(first_output_inside(p.columns(), at.left + item_columns + radius, p.out_w), up);
    at.ring = scratch + margin;
    at.tile = scratch + ring_size;
    at.packed = at.tile + tile_size;
    OutputRows<T> rows;
    int64_t staged = 0;  // rows of cells before it are
    for (int64_t i = at.top; i < at.bottom; i += kRows) {
        const int64_t end = ceil_div(first_output_inside(p.rows(), i + kRows + radius, p.out_h), up);
        staged = std::max(staged, first_output_inside(p.rows(), i - radius, p.out_h) / up);
        for (; staged < end; staged++) stage_cells(*this, at, staged);
        find_rows(*this, at, i, rows);
        for (int64_t j = at.left; j < at.right; j += kColumns) grad_features_of_source_tile(*this, at, rows, i, j);
    }
    if (non_temporal) finish_non_temporal_stores();
}

}  // namespace

void grad_features_nhwc(const Problem& problem, const Array& grad_features) {
    run_kernel<GradFeaturesNhwc>(problem, grad_features);
}

void grad_features_any(const Problem& problem, const Array& grad_features) {
    run_on_images<GradFeaturesNhwc>(problem, grad_features);
}

}  // namespace carafepp::CARAFEPP_ISA
