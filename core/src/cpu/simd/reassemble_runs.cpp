// SPDX-License-Identifier: Apache-2.0
//
// The forward for runs, compiled once for each instruction set. Their outputs are neighbours, each centred on a source
// of its own. A vector holds channels of one pixel, in any layout. First comes the plan. Each item then stages features
// of a cache line of channels, contracts the taps of runs, and writes. Staged pixels are adjacent, so the windows of a
// row of outputs stay in the level 1 cache. Runs of the most frequent kinds share features between their outputs, and
// some of these read masks where they are. All others read staged masks.
#include <algorithm>
#include <utility>

#include "cpu/geometry.h"
#include "cpu/simd/border.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kChannels = kRunChannels;
constexpr int kVectors = kRunChannels / kLanes<float>;
constexpr int kLongRun = 6, kShortRun = kFewestRunColumns;
constexpr int kStagedRun = std::max(8 / kVectors, 2);  // whose masks are staged
constexpr int64_t kFeaturesBytes = 256 * 1024;         // staged, about: part of a level 2 cache
constexpr int64_t kMasksBytes = 256 * 1024;            // the same
constexpr int64_t kOutputsBytes = 64 * 1024;           // staged until they are written together, at most
constexpr int64_t kMostRowsTogether = 8;

// ---- plan ----

// An item computes some rows of outputs in the channels of a cache line. If masks are staged, several of these share
// them.
struct ReassembleRuns {
    using A = float;
    static constexpr int64_t L = kLanes<A>;

    const Problem& p;
    const Array& output;
    const bool sharing = shares_windows(p), in_place = reads_masks_in_place(p);
    const MaskTiles<A> masks{p, 1};
    const Columns columns{p, 1};
    const int64_t pitch = (ceil_div(p.out_w, L) | 1) * L;  // of staged masks, [tap][output]: spread over the cache
    int64_t before, width;         // columns of 0 before those of features: the padding; of a row of both
    int64_t parts, shares;         // cache lines of channels; an item takes one share of them
    int64_t rows_of_item, blocks;  // of outputs; items of the rows of an image
    int64_t rows_together;         // of outputs
    bool outputs_in_place, non_temporal;
    int64_t masks_size;                 // [row][tap][output]
    int64_t features_size;              // [row][column][channel]
    int64_t outputs_size, planes_size;  // [row][column][channel], of rows together; room for non-temporal stores
    int64_t items, scratch_size;

    ReassembleRuns(const Problem& problem, const Array& result) : p(problem), output(result) {
        constexpr int64_t kPixelBytes = kChannels * int64_t{sizeof(A)};
        const int64_t down = p.factor.down;
        parts = p.features.c / kChannels;
        const int64_t columns_read = (ceil_div(p.out_w, kStagedRun) * kStagedRun - 1) * down + p.kernel_size;
        before = sharing ? 0 : p.radius() - p.offset_w;
        width = sharing ? p.features.w : std::max(before + p.features.w, columns_read);
        // A thread gets about four items, so no thread waits long for the others.
        const int64_t threads = threads_worth<A>(p);
        const int64_t fewest_blocks = threads > 1 ? ceil_div(4 * threads, output.n * parts) : 1;
        const int64_t most_sources = kFeaturesBytes / (width * kPixelBytes);
        const int64_t most_rows = in_place ? p.out_h : kMasksBytes / (masks.row_size(pitch) * int64_t{sizeof(A)});
        rows_of_item = share_size(p.out_h, std::min({most_rows, (most_sources - p.kernel_size) / down + 1,
                                                     std::max(p.out_h / fewest_blocks, kMostRowsTogether)}));
        blocks = ceil_div(p.out_h, rows_of_item);
        const int64_t shares_for_threads = threads > 1 ? 4 * threads / (output.n * blocks) : 1;
        shares = in_place ? parts : std::clamp<int64_t>(shares_for_threads, 1, parts);
        items = output.n * blocks * shares;
        rows_together = std::clamp<int64_t>(kOutputsBytes / (p.out_w * kPixelBytes), 1, kMostRowsTogether);
        outputs_in_place = output.stride_c == 1 && output.dtype == kDtypeOf<A>;
        non_temporal = outputs_in_place
                           ? takes_non_temporal_stores<A>(output, kChannels)
                           : output.stride_w == 1 && output.stride_h == output.w && wants_non_temporal_stores(output);
        const int64_t sources = std::min((rows_of_item - 1) * down + p.kernel_size, p.features.h);
        masks_size = in_place ? 0 : rows_of_item * masks.row_size(pitch);
        features_size = sources * width * kChannels;
        outputs_size = outputs_in_place ? 0 : rows_together * p.out_w * kChannels;
        planes_size = outputs_in_place ? 0 : rows_together * p.out_w * L;
        scratch_size = masks_size + features_size + outputs_size + planes_size;
    }

    void run_item(int64_t item, A* scratch) const;

    // Masks of taps beyond the border become 0: features are staged as 0 there, and 0 times an infinite mask is NaN.
    void stage_masks(int64_t n, int64_t group, Range rows, A* to) const {
        for (int64_t row = rows.begin; row < rows.end; row++, to += masks.row_size(pitch)) {
            for (int64_t cell = 0; cell < p.out_w; cell += L) {
                const int count = static_cast<int>(std::min(L, p.out_w - cell));
                masks.stage(n, group, {row, row + 1}, cell, count, pitch, to + cell);
                if (!sharing) zero_phase_outside(columns, 0, cell, to + cell, pitch);
            }
        }
    }

    // The row of features, perhaps beyond the border, that the first tap row of an output reads.
    int64_t top(int64_t row) const { return row * p.factor.down + p.offset_h - p.radius(); }
};

// Rows of an array, as an array.
Array rows_of(Array array, Range rows) {
    array.data = element<char>(array, 0, 0, 0, 0) + rows.begin * array.stride_h * itemsize(array.dtype);
    array.h = rows.size();
    return array;
}

// Staged pixels of a block of channels, in rows of `pitch` pixels.
Array staged(float* data, int64_t height, int64_t width, int64_t pitch) {
    return {data, CARAFEPP_FLOAT32, 1, kChannels, height, width, 0, 1, pitch * kChannels, kChannels};
}

// ---- contraction ----

// Neighbouring outputs. Masks and features are those of the first output, in the first row of taps inside the border.
struct Run {
    const float* features;  // staged
    int64_t row_stride;
    int rows;  // of taps inside the border
    const float* masks;
    float* outputs;
    int64_t output_stride;
    bool non_temporal;

    // Writes the first `count` of them.
    template <int P>
    CARAFEPP_MEMBER void write(const Vector<float> (&sums)[P][kVectors], int64_t count = P) const {
#pragma GCC unroll 8
        for (int o = 0; o < P; o++) {
            if (o < count) write_channels<kVectors, false>(sums[o], outputs + o * output_stride, 0, non_temporal);
        }
    }
};

// ---- outputs that share the union of their windows ----

struct SharingRun : Run {
    int begin, end;                    // columns of the union inside the border
    int64_t tap_stride, output_masks;  // of masks, from tap to tap and from output to output
    int64_t next_masks;                // from masks to those of the next row of outputs, or 0: these are not prefetched
};

// Adds column `C` of a row of the union to the outputs whose windows hold it. Output o reads it by its tap C - o*kDown.
// The weights of these taps lie `distance` apart, from output to output: `low` reaches the first half of the outputs,
// `high` the second.
template <int C, int K, int kDown, int P>
CARAFEPP_INLINE void add_column(const SharingRun& run, const float* x, const float*& low, const float*& high,
                                int64_t tap_stride, int64_t distance, Vector<float> (&sums)[P][kVectors]) {
    constexpr int kFirst = C < K ? 0 : (C - K) / kDown + 1, kLast = std::min(P, C / kDown + 1);
    constexpr int kColumns = K + (P - 1) * kDown, kHalf = P / 2;
    // At most K/2 columns lie beyond a border.
    const bool inside = (C >= K / 2 || C >= run.begin) && (C < kColumns - K / 2 || C < run.end);
    if (inside) {
        Vector<float> features[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) features[v] = in_register(load(x + C * kChannels + v * kLanes<float>));
#pragma GCC unroll 8
        for (int o = kFirst; o < kLast; o++) {
            const Vector<float> weight = splat(o < kHalf ? low[o * distance] : high[(o - kHalf) * distance]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) sums[o][v] += weight * features[v];
        }
    }
    low = opaque(low + tap_stride);
    high = opaque(high + tap_stride);
}

template <int K, int kDown, int P, int... C>
CARAFEPP_INLINE void add_columns(const SharingRun& run, const float* x, const float* low, const float* high,
                                 int64_t tap_stride, int64_t distance, Vector<float> (&sums)[P][kVectors],
                                 std::integer_sequence<int, C...>) {
    (add_column<C, K, kDown>(run, x, low, high, tap_stride, distance, sums), ...);
}

// A register tile: a run of `P` outputs.
template <int K, int kDown, int P>
__attribute__((noinline)) void reassemble_run(const SharingRun& run) {
    Vector<float> sums[P][kVectors] = {};
    const int64_t tap_stride = run.tap_stride, distance = run.output_masks - kDown * tap_stride;
    const float *x = run.features, *masks = run.masks;
    for (int a = 0; a < run.rows; a++, x += run.row_stride, masks += K * run.tap_stride) {
        if (run.next_masks != 0 &&
            (tap_stride != 1 || a % 2 == 0)) {  // every other row of adjacent taps is a cache line further
            const float* next = masks + run.next_masks;
            for (int k = 0; k < K; k++, next += tap_stride == 1 ? run.output_masks : tap_stride)
                __builtin_prefetch(next);
        }
        add_columns<K, kDown>(run, x, masks, masks + P / 2 * distance, tap_stride, distance, sums,
                              std::make_integer_sequence<int, K + (P - 1) * kDown>());
    }
    run.write(sums);
}

// A row of outputs. The pointers of `row` are those of column 0.
template <int K, int kDown>
void reassemble_sharing_row(const Problem& p, const SharingRun& row) {
    SharingRun run = row;
    bool new_lines = true;  // of masks, in a row; every other run has none if taps are not adjacent
    for (int64_t j = 0, count; j < p.out_w; j += count, new_lines = !new_lines || row.tap_stride == 1) {
        run.next_masks = new_lines ? row.next_masks : 0;
        const int64_t left = p.out_w - j;
        count = left == kLongRun || left > 2 * kShortRun ? kLongRun : kShortRun;
        j = std::min(j, p.out_w - count);  // a run may compute outputs of the one before it again
        const int64_t column = j * kDown + p.offset_w - K / 2;
        run.begin = static_cast<int>(std::max<int64_t>(-column, 0));
        run.end = static_cast<int>(p.features.w - column);
        run.features = row.features + column * kChannels;
        run.masks = row.masks + j * run.output_masks;
        run.outputs = row.outputs + j * run.output_stride;
        count == kLongRun ? reassemble_run<K, kDown, kLongRun>(run) : reassemble_run<K, kDown, kShortRun>(run);
    }
}

void reassemble_sharing_row(const Problem& p, const SharingRun& row) {
    const bool down2 = p.factor.down == 2;
    if (p.kernel_size == 5) {
        down2 ? reassemble_sharing_row<5, 2>(p, row) : reassemble_sharing_row<5, 1>(p, row);
    } else {
        down2 ? reassemble_sharing_row<7, 2>(p, row) : reassemble_sharing_row<7, 1>(p, row);
    }
}

// ---- any other run ----

struct StagedRun : Run {
    int64_t source_stride, tap_stride;  // from output to output; of masks
    int kernel_size;
};

// Contracts a run whose masks are [tap][output]. Outputs beyond the row are not written.
__attribute__((noinline)) void reassemble_staged_run(const StagedRun& run, int64_t outputs) {
    constexpr int P = kStagedRun;
    Vector<float> sums[P][kVectors] = {};
    const float *row = run.features, *masks = run.masks;
    const int64_t source_stride = run.source_stride, tap_stride = run.tap_stride;
    for (int a = 0; a < run.rows; a++, row += run.row_stride) {
        const float* x = row;
        for (int b = 0; b < run.kernel_size; b++, x += kChannels, masks += tap_stride) {
#pragma GCC unroll 8
            for (int o = 0; o < P; o++) {
                const Vector<float> mask = splat(masks[o]);
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; v++) sums[o][v] += mask * load(x + o * source_stride + v * kLanes<float>);
            }
        }
    }
    run.write(sums, outputs);
}

// A row of outputs. The pointers of `row` are those of output 0.
void reassemble_staged_row(const Problem& p, const Run& row, int64_t tap_stride) {
    StagedRun run{row, p.factor.down * kChannels, tap_stride, static_cast<int>(p.kernel_size)};
    for (int64_t j = 0; j < p.out_w; j += kStagedRun) {
        reassemble_staged_run(run, p.out_w - j);
        run.masks += kStagedRun;
        run.features += kStagedRun * run.source_stride;
        run.outputs += kStagedRun * run.output_stride;
    }
}

void ReassembleRuns::run_item(int64_t item, A* scratch) const {
    const int64_t block = item / shares % blocks, n = item / shares / blocks, share = item % shares;
    const int64_t group_channels = p.features.c / p.groups;
    A *const features = scratch + masks_size, *const outputs = features + features_size;
    Run run;
    run.row_stride = width * kChannels;
    run.output_stride = outputs_in_place ? output.stride_w : kChannels;
    run.non_temporal = outputs_in_place && non_temporal;
    const Range all_rows = {block * rows_of_item, std::min((block + 1) * rows_of_item, p.out_h)};
    const Range sources = sources_of(p, all_rows);
    if (!sharing) std::fill_n(features, features_size, A{0});
    const int64_t first_part = parts * share / shares;
    for (int64_t part = first_part; part < parts * (share + 1) / shares; part++) {
        const int64_t channel = part * kChannels, group = channel / group_channels;
        const bool first_of_group = channel % group_channels == 0;
        if (!in_place && (first_of_group || part == first_part)) stage_masks(n, group, all_rows, scratch);
        load_image(rows_of(p.features, sources), n, channel,
                   staged(features + before * kChannels, sources.size(), p.features.w, width));
        for (Range rows = all_rows; rows.begin < all_rows.end; rows.begin = rows.end) {
            rows.end = std::min(rows.begin + rows_together, all_rows.end);
            for (int64_t row = rows.begin; row < rows.end; row++) {
                const int64_t first = std::max<int64_t>(top(row), 0), begin = first - top(row);
                const int64_t taps_before = begin * p.kernel_size;
                run.rows = static_cast<int>(std::min(p.kernel_size, p.features.h - top(row)) - begin);
                run.features = features + (first - sources.begin) * run.row_stride;
                run.outputs = outputs_in_place ? element<A>(output, n, channel, row, 0)
                                               : outputs + (row - rows.begin) * p.out_w * kChannels;
                if (in_place) {
                    run.masks = element<const A>(p.masks, n, group * p.taps() + taps_before, row, 0);
                    const int64_t next_masks = first_of_group && row + 1 < all_rows.end ? p.masks.stride_h : 0;
                    reassemble_sharing_row(p, {run, 0, 0, p.masks.stride_c, p.masks.stride_w, next_masks});
                    continue;
                }
                run.masks = scratch + (row - all_rows.begin) * masks.row_size(pitch) + taps_before * pitch;
                if (sharing) {
                    reassemble_sharing_row(p, {run, 0, 0, pitch, 1, 0});
                } else {
                    reassemble_staged_row(p, run, pitch);
                }
            }
            if (outputs_in_place) continue;
            store_image(staged(outputs, rows.size(), p.out_w, p.out_w), rows_of(output, rows), n, channel, non_temporal,
                        outputs + outputs_size);
        }
    }
    if (outputs_in_place && non_temporal) finish_non_temporal_stores();
}

}  // namespace

void reassemble_runs_any(const Problem& problem, const Array& output) { run_items(ReassembleRuns(problem, output)); }

}  // namespace carafepp::CARAFEPP_ISA
