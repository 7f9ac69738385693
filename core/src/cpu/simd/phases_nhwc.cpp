// SPDX-License-Identifier: Apache-2.0
//
// Convex upsampling from logits with adjacent channels, forward and backward, compiled once for each instruction set:
// softmax, float32, one group of few channels, up a multiple of 4. A tap of all outputs of a cell is adjacent in
// logits: a lane is an output. The outputs of a cell share a window, so features are scalars.
//
// The kernel takes a row of cells in slices. Outputs, or their gradients, are staged cell by cell. The gradient of
// features sums the products of each cell at the places of its window. Then it adds these sums to their sources. A
// block is some rows of sources, and reads all cells whose windows touch them. Each source is summed in the same order
// in any block.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int kTogether = L < kFewestPhases ? 2 : 1;  // tiles of outputs, to hide latency
constexpr int64_t kSliceLogits = 4608;                // 18 KiB, in the level 1 cache
constexpr int64_t kPrefetchAhead = 1152;              // logits, behind the first of a cell

// ---- contraction: a channel of a cell ----

// `masks` lack the scales of their outputs.
void reassemble_cell(const TapRows<float>& masks, const float* scales, const float* window, float* outputs) {
    for (int q = 0; q < masks.cells; q += kTogether * L) {
        Vector<float> sums[kTogether] = {};
        const float* mask = masks.first + q;
        for (int t = 0; t < masks.taps; t++, mask += masks.step) {
            const Vector<float> feature = in_register(splat(window[t]));
#pragma GCC unroll 2
            for (int v = 0; v < kTogether; v++) sums[v] += load(mask + v * L) * feature;
        }
#pragma GCC unroll 2
        for (int v = 0; v < kTogether; v++) store(sums[v] * load(scales + q + v * L), outputs + q + v * L);
    }
}

// Adds the products of a channel, unless it is the first.
template <bool kAdds>
void grads_of_masks(const float* grad_outputs, const float* window, const TapRows<float>& grads) {
    for (int q = 0; q < grads.cells; q += kTogether * L) {
        Vector<float> grad_output[kTogether];
#pragma GCC unroll 2
        for (int v = 0; v < kTogether; v++) grad_output[v] = load(grad_outputs + q + v * L);
        float* grad = grads.first + q;
        for (int t = 0; t < grads.taps; t++, grad += grads.step) {
            const Vector<float> feature = in_register(splat(window[t]));
#pragma GCC unroll 2
            for (int v = 0; v < kTogether; v++)
                store((kAdds ? load(grad + v * L) : Vector<float>{}) + grad_output[v] * feature, grad + v * L);
        }
    }
}

// Sums the products of each tap in vectors. Scales `grad_outputs` in place, as nothing else reads them afterwards.
void sum_products(const TapRows<float>& masks, const float* scales, float* grad_outputs, float* sums) {
    constexpr int kTaps = 3;  // at a time
    for (int q = 0; q < masks.cells; q += L) store(load(grad_outputs + q) * load(scales + q), grad_outputs + q);
    for (int first = 0; first < masks.taps; first += kTaps) {
        Vector<float> sum[kTaps] = {};
        const int64_t last = masks.taps - 1 - first;
        const float* const mask = masks.tap(first);
        for (int q = 0; q < masks.cells; q += L) {
            const Vector<float> grad_output = load(grad_outputs + q);
#pragma GCC unroll 3
            for (int t = 0; t < kTaps; t++)
                sum[t] += grad_output * load(mask + std::min<int64_t>(t, last) * masks.step + q);
        }
#pragma GCC unroll 3
        for (int t = 0; t < kTaps; t++) store(sum[t], sums + (first + t) * L);
    }
}

// ---- the kernel ----

// Adjacent channels of adjacent columns are columns of one channel.
void join_channels(Array& image) {
    if (image.stride_c != 1 || image.stride_w != image.c) return;
    image.w *= image.c;
    image.c = 1;
    image.stride_w = 1;
}

// The output, the gradient of features or that of logits. The latter normalises the masks that the gradient of features
// needs. If a thread takes images whole, it computes both.
struct PhasesNhwc {
    using A = float;

    const Problem& p;
    const Array& result;
    const Result kind;
    const Array* const grad_features;  // beside those of logits, or NULL
    const int64_t up = p.factor.up, k = p.kernel_size, channels = p.features.c;
    const int taps = static_cast<int>(p.taps()), outputs = static_cast<int>(up * up);  // of a cell
    const int64_t logits_size = taps * outputs, outputs_size = channels * outputs;     // of a cell
    const int64_t cells = kind == kGradLogits ? p.logits.w : ceil_div(p.out_w, up);

    // Outputs are staged as [cell][channel][output]; before or after, as rows [row][channel][column].
    const int64_t slice_cells = share_size(std::max<int64_t>(cells, 1), kSliceLogits / logits_size);
    const int64_t slice_pitch = ceil_div(slice_cells * up, L) * L, slice_size = channels * up * slice_pitch;

    // Features are staged as [row][channel][column], and their gradients are summed so. The window of cell 0 begins in
    // column `first_column`.
    const int64_t first_column = p.offset_w - p.radius();
    const int64_t pitch = ceil_div(p.logits.w + k - 1, L) * L + L, row_size = channels * pitch;

    // A block is a row of cells, or some rows of sources. An item is a block, or an image where it computes both
    // gradients.
    const int64_t rows = kind == kGradFeatures ? p.features.h
                         : kind == kGradLogits ? p.logits.h
                                               : ceil_div(p.out_h, up);
    const int64_t block_rows = kind == kGradFeatures
                                   ? rows_of_block(p, kLanes<float>, rows, kBlockSources / row_size, result.n)
                                   : 1;
    const int64_t blocks = grad_features ? 1 : ceil_div(rows, block_rows), items = result.n * blocks;

    const int64_t features_size = (kind == kGradFeatures ? block_rows : k) * row_size;
    const int64_t window_size = (channels * taps + L) * L;  // features of a window, or a vector of sums for each
    const int64_t sources_size = grad_features ? p.features.h * row_size : 0;
    const bool non_temporal = kind == kGradLogits && wants_non_temporal_stores(result) && result.stride_w == result.c;
    const int64_t scratch_size = features_size + 2 * slice_size + logits_size + outputs + window_size +
                                 (non_temporal ? slice_cells * logits_size : 0) + sources_size;

    __attribute__((noinline)) PhasesNhwc(const Problem& problem, const Array& result, Result kind,
                                         const Array* grad_features = nullptr)
        : p(problem), result(result), kind(kind), grad_features(grad_features) {}

    struct Staged {
        float *features, *outputs, *rows, *masks, *scales, *window, *grads, *sources;
        Range source_rows;
    };

    void run_item(int64_t item, float* scratch) const {
        const int64_t n = item / blocks, begin = item % blocks * block_rows;
        const Range block = {begin, std::min(begin + block_rows, rows)};
        Staged staged;
        staged.features = scratch;
        staged.outputs = staged.features + features_size;
        staged.rows = staged.outputs + slice_size;
        staged.masks = staged.rows + slice_size;
        staged.scales = staged.masks + logits_size;
        staged.window = staged.scales + outputs;
        staged.grads = staged.window + window_size;
        staged.sources = kind == kGradFeatures ? staged.features : scratch + scratch_size - sources_size;
        staged.source_rows = grad_features ? Range{0, p.features.h} : block;
        const bool sums_sources = kind == kGradFeatures || grad_features;
        if (sums_sources) std::fill_n(staged.sources, staged.source_rows.size() * row_size, 0.0f);
        const Range some = kind == kGradFeatures ? cell_rows_of(block) : grad_features ? Range{0, rows} : block;
        for (int64_t row = some.begin; row < some.end; row++) {
            if (kind != kGradFeatures) stage_features(n, row, staged.features);
            run_row(n, row, staged);
        }
        if (non_temporal) finish_non_temporal_stores();
        if (!sums_sources) return;
        const Array& to = grad_features ? *grad_features : result;
        for (int64_t i = staged.source_rows.begin; i < staged.source_rows.end; i++) {
            const float* const from = staged.sources + (i - staged.source_rows.begin) * row_size;
            write_row(from - first_column, pitch, to, n, i, {0, to.w});
        }
    }

    // The rows of cells whose windows touch rows of sources.
    Range cell_rows_of(Range sources) const {
        const Range reads = outputs_of(p, sources);
        return {reads.begin / up, ceil_div(reads.end, up)};
    }

    void run_row(int64_t n, int64_t row, const Staged& staged) const {
        for (int64_t begin = 0; begin < cells; begin += slice_cells) {
            const int64_t count = std::min(slice_cells, cells - begin);
            if (kind != kReassembleWithLogits) stage_grads(n, row, begin, count, staged);
            for (int64_t cell = begin; cell < begin + count; cell++) {
                float* const of_cell = staged.outputs + (cell - begin) * outputs_size;
                if (kind == kGradLogits) {
                    float* const grads = non_temporal ? staged.grads + (cell - begin) * logits_size
                                                      : element<float>(result, n, 0, row, cell);
                    grads_of_cell(n, row, cell, of_cell, {grads, outputs, taps, outputs}, staged);
                } else {
                    contract_cell(n, row, cell, of_cell, staged);
                }
            }
            if (kind == kReassembleWithLogits) write_outputs(n, row, begin, count, staged);
            if (non_temporal)
                copy_non_temporal(staged.grads, count * logits_size, element<float>(result, n, 0, row, begin));
        }
    }

    // ---- cells ----

    // The logits of a cell. Prefetches those of a cell that is soon read.
    __attribute__((noinline)) TapRows<const float> logits_of(int64_t n, int64_t row, int64_t cell) const {
        const float* const first = element<const float>(p.logits, n, 0, row, cell);
        for (int64_t line = 0; line < logits_size; line += 64 / sizeof(float))
            __builtin_prefetch(first + kPrefetchAhead + line);
        return {first, outputs, taps, outputs};
    }

    // Computes the outputs, or adds to the gradients of features.
    void contract_cell(int64_t n, int64_t row, int64_t cell, float* of_cell, const Staged& staged) const {
        const TapRows<float> masks{staged.masks, outputs, taps, outputs};
        softmax_of_rows<kTogether>(logits_of(n, row, cell), masks, staged.scales);
        if (kind == kGradFeatures) return add_products(row, cell, of_cell, staged);
        for (int64_t c = 0; c < channels; c++, of_cell += outputs) {
            load_window(staged.features + c * pitch + cell, staged.window);
            reassemble_cell(masks, staged.scales, staged.window, of_cell);
        }
    }

    // Adds to the gradients of features, from the numerators of masks.
    __attribute__((noinline)) void add_products(int64_t row, int64_t cell, float* of_cell, const Staged& staged) const {
        const TapRows<float> masks{staged.masks, outputs, taps, outputs};
        zero_cropped(row, cell, masks);
        zero_cropped(row, cell, {staged.scales, outputs, 1, outputs});
        for (int64_t c = 0; c < channels; c++, of_cell += outputs)
            sum_products(masks, staged.scales, of_cell, staged.window + c * taps * L);
        add_sums(row, cell, staged);
    }

    void grads_of_cell(int64_t n, int64_t row, int64_t cell, float* of_cell, const TapRows<float>& grads,
                       const Staged& staged) const {
        SlicePrefetch none;
        for (int64_t c = 0; c < channels; c++) {
            load_window(staged.features + c * pitch + cell, staged.window);
            (c == 0 ? grads_of_masks<false> : grads_of_masks<true>)(of_cell + c * outputs, staged.window, grads);
        }
        zero_outside(row, cell, grads);
        softmax_backward<kTogether>(logits_of(n, row, cell), grads, staged.masks, staged.scales, 0, none);
        zero_cropped(row, cell, grads);
        if (grad_features) add_products(row, cell, of_cell, staged);
    }

    __attribute__((noinline)) void load_window(const float* features, float* window) const {
        for (int64_t a = 0; a < k; a++, features += row_size) {
            for (int64_t b = 0; b < k; b++) *window++ = features[b];
        }
    }

    // Adds the sums of a cell to the sources of its window. Sources beyond the sides are in the halo.
    void add_sums(int64_t row, int64_t cell, const Staged& staged) const {
        for (int64_t t = 0; t < channels * taps; t += L) {
            Vector<float> sums[L];
#pragma GCC unroll 16
            for (int v = 0; v < L; v++) sums[v] = load(staged.window + (t + v) * L);
            store(sums_of_lanes<float>(sums), staged.window + t);
        }
        const float* sum = staged.window;
        const int64_t top = row + p.offset_h - p.radius();
        for (int64_t c = 0; c < channels; c++) {
            float* sources = staged.sources + (top - staged.source_rows.begin) * row_size + c * pitch + cell;
            for (int64_t i = top; i < top + k; i++, sources += row_size, sum += k) {
                if (i < staged.source_rows.begin || i >= staged.source_rows.end) continue;
                for (int64_t b = 0; b < k; b++) sources[b] += sum[b];
            }
        }
    }

    // Zeroes the taps beyond the border: features are 0 there, but grad_output may be Inf or NaN.
    void zero_outside(int64_t row, int64_t cell, const TapRows<float>& grads) const {
        const int64_t top = row + p.offset_h - p.radius(), left = cell + first_column;
        if (top >= 0 && left >= 0 && top + k <= p.features.h && left + k <= p.features.w) return;
        for (int64_t t = 0; t < taps; t++) {
            const int64_t i = top + t / k, j = left + t % k;
            if (i < 0 || i >= p.features.h || j < 0 || j >= p.features.w) std::fill_n(grads.tap(t), outputs, 0.0f);
        }
    }

    // Zeroes the outputs that a crop leaves out. Logits that are not finite may have made them NaN.
    __attribute__((noinline)) void zero_cropped(int64_t row, int64_t cell, const TapRows<float>& of_cell) const {
        if ((row + 1) * up <= p.out_h && (cell + 1) * up <= p.out_w) return;
        for (int64_t o = 0; o < outputs; o++) {
            if (row * up + o / up < p.out_h && cell * up + o % up < p.out_w) continue;
            for (int64_t t = 0; t < of_cell.taps; t++) of_cell.tap(t)[o] = 0.0f;
        }
    }

    // ---- staging, write out ----

    void stage_rows(const Array& image, int64_t n, Range some, Range columns, int64_t to_pitch, float* to) const {
        Array array = image;
        join_channels(array);
        const Deinterleaved layout{static_cast<int>(channels / array.c),
                                   columns.begin,
                                   columns.size(),
                                   to_pitch,
                                   channels * to_pitch,
                                   to_pitch};
        deinterleave_rows(array, n, 0, array.c, some, layout, to);
    }

    void write_row(const float* from, int64_t from_pitch, const Array& to, int64_t n, int64_t row,
                   Range columns) const {
        Array array = to;
        join_channels(array);
        const int64_t factor = channels / array.c;
        for (int64_t c = 0; c < array.c; c++, from += from_pitch) {
            interleave_row(from, from_pitch, static_cast<int>(factor), array, n, c, row,
                           {columns.begin * factor, columns.end * factor});
        }
    }

    // Stages the features of the windows of a row of cells; 0 beyond the border.
    void stage_features(int64_t n, int64_t row, float* to) const {
        const int64_t top = row + p.offset_h - p.radius();
        const Range inside = {std::max<int64_t>(top, 0), std::min(top + k, p.features.h)};
        std::fill_n(to, k * row_size, 0.0f);
        stage_rows(p.features, n, inside, {first_column, first_column + p.logits.w + k - 1}, pitch,
                   to + (inside.begin - top) * row_size);
    }

    // Copies outputs from cells to rows, or back: 4 at a time.
    template <bool kToRows>
    __attribute__((noinline)) void copy_outputs(int64_t count, const Staged& staged) const {
        typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
        float* of_cell = staged.outputs;
        for (int64_t q = 0; q < count; q++) {
            for (int64_t c = 0; c < channels; c++) {
                float* row = staged.rows + c * slice_pitch + q * up;
                for (int64_t i = 0; i < up; i++, row += channels * slice_pitch) {
                    for (int64_t phase = 0; phase < up; phase += 4, of_cell += 4) {
                        *reinterpret_cast<Quad*>(kToRows ? row + phase : of_cell) = *reinterpret_cast<const Quad*>(
                            kToRows ? of_cell : row + phase);
                    }
                }
            }
        }
    }

    // Stages grad_output, 0 where a crop leaves it out.
    void stage_grads(int64_t n, int64_t row, int64_t begin, int64_t count, const Staged& staged) const {
        const Range inside = {row * up, std::min((row + 1) * up, p.out_h)};
        if (inside.size() < up) std::fill_n(staged.rows, slice_size, 0.0f);
        if (inside.size() > 0)
            stage_rows(p.grad_output, n, inside, {begin * up, (begin + count) * up}, slice_pitch, staged.rows);
        copy_outputs<false>(count, staged);
    }

    void write_outputs(int64_t n, int64_t row, int64_t begin, int64_t count, const Staged& staged) const {
        copy_outputs<true>(count, staged);
        const Range columns = {begin * up, std::min((begin + count) * up, p.out_w)};
        for (int64_t i = row * up; i < std::min((row + 1) * up, p.out_h); i++)
            write_row(staged.rows + (i - row * up) * channels * slice_pitch, slice_pitch, result, n, i, columns);
    }
};

}  // namespace

void phases_nhwc(const Problem& problem, const Array& result, Result kind) {
    run_items(PhasesNhwc{problem, result, kind});
}

bool grads_few_nhwc(const Problem& problem, const Array& grad_features, const Array& grad_masks) {
    if (!phases_in_lanes(problem)) return false;
    const PhasesNhwc both{problem, grad_masks, kGradLogits, &grad_features};
    const bool together = threads_worth<float>(problem) <= grad_masks.n && both.sources_size <= 2 * kBlockSources;
    if (together) run_items(both);
    return together;
}

}  // namespace carafepp::CARAFEPP_ISA
