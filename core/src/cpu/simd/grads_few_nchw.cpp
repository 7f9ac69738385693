// SPDX-License-Identifier: Apache-2.0
//
// The gradients for few channels in a group, compiled once for each instruction set. A vector holds the same output
// (row, phase) of neighbouring cells, or one tap of it.
//
// Features: all windows of a cell lie in one larger window. For each row of cells, the kernel sums products at each
// place of that window. Then it adds these sums to their sources. A block is some rows of sources, and reads all cells
// whose windows touch them. Each source is summed in the same order in any block.
//
// Masks or logits: for a block of rows, the kernel stages the features that the windows reach. For each slice of masks
// it computes the gradients, turns them into those of logits, and writes them.
//
// Both: the second kernel has normalised the masks that the first one needs. If a thread takes an image whole, it adds
// their products at once.
#include <algorithm>

#include "cpu/simd/few_channels.h"
#include "cpu/simd/kernels.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// ---- the gradient of features: the taps of a tile ----

template <class A>
struct FewScatter {
    Range tap_rows;  // that touch the block
    A* sums;         // [row][column][channel][cell] of the window of a cell, from the first of these tap rows on
    int64_t sums_row, sums_column, sums_channel;
    int kernel_size;
    bool adds;        // to the sums; otherwise they are these products
    const A* output;  // its gradients
    int64_t output_channel;
    SlicePrefetch* prefetch;
};

// Adds the products of NC channels. The masks lack a factor of each cell if there are scales. K is the kernel size, or
// 0 if the compiler does not know it. `first` is the cell of the first mask.
template <int K, int NC, class A>
__attribute__((noinline)) void add_grads_of_few_channels(FewScatter<A> at, TapRows<const A> masks, const A* scales,
                                                         int64_t first, int64_t channel) {
    const int k = K > 0 ? K : at.kernel_size;
    const int64_t sums_column = at.sums_column, sums_channel = at.sums_channel;
    SlicePrefetch prefetch = *at.prefetch;
    for (int64_t q = 0; q < masks.cells; q += kLanes<A>) {
        prefetch.prefetch_until(first + q + kLanes<A>);
        Vector<A> output[NC];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) {
            output[c] = load(at.output + (channel + c) * at.output_channel + first + q);
            if (scales) output[c] *= load(scales + q);
        }
        const A* mask = masks.tap(at.tap_rows.begin * k) + q;
        A* row = at.sums + channel * sums_channel + first + q;
        for (int64_t a = at.tap_rows.begin; a < at.tap_rows.end; a++, row += at.sums_row) {
            A* sums = row;
            for_tap_columns<K>(k, [&](int) __attribute__((always_inline)) {
                const Vector<A> of_tap = load(mask);
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) {
                    A* const sum = sums + c * sums_channel;
                    store((at.adds ? load(sum) : Vector<A>{}) + of_tap * output[c], sum);
                }
                mask += masks.step;
                sums += sums_column;
            });
        }
    }
    *at.prefetch = prefetch;
}

// ---- its kernel ----

// The staged rows of which a slice holds each cell. Slices from logits are alike for both gradients: each source is
// then summed in the same order, alone or together.
inline int64_t rows_of_slice_of_grads(const Problem& p, int64_t window) {
    const int64_t channels = p.features.c / p.groups, sums = window * window * channels;
    return p.from_logits ? p.taps() + sums : p.factor.up * (p.taps() + channels) + sums;
}

template <class Sums>
struct GradFeaturesFewNchw {
    using A = Sums;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_features;
    const int64_t up = p.factor.up, down = p.factor.down, k = p.kernel_size, channels = p.features.c / p.groups;
    const int64_t window = p.factor.source(up - 1) + k;  // rows and columns of the window of a cell
    const FewChannels<A> few{p, p.from_logits ? p.logits.w : ceil_div(p.out_w, up), rows_of_slice_of_grads(p, window),
                             Array()};
    const int64_t block_rows = rows_of_block(p, L, grad_features.h,
                                             kBlockSources / std::max<int64_t>(channels * few.sources_row, 1),
                                             grad_features.n* p.groups);
    const int64_t blocks = ceil_div(grad_features.h, block_rows), items = grad_features.n * p.groups * blocks;
    const int64_t source_row_size = channels * few.sources_row;  // [row][channel][residue][cell]
    const int64_t sums_channel = few.slice_cells, sums_column = channels * sums_channel,
                  sums_row = window * sums_column, sums_size = window * sums_row;
    const int64_t grads_size = channels * up * few.slice_cells;
    const int64_t scratch_size = block_rows * source_row_size + few.slice_size() + few.slice_cells + sums_size +
                                 grads_size;

    __attribute__((noinline)) GradFeaturesFewNchw(const Problem& problem, const Array& result)
        : p(problem), grad_features(result) {}

    struct Staged {
        A *sources, *masks, *sums, *grads;
        Range rows;  // of sources
    };

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / blocks / p.groups, group = item / blocks % p.groups, block = item % blocks;
        Staged staged;
        staged.rows = {block * block_rows, std::min((block + 1) * block_rows, grad_features.h)};
        staged.sources = scratch;
        staged.masks = staged.sources + block_rows * source_row_size;
        staged.sums = staged.masks + few.slice_size() + few.slice_cells;
        staged.grads = staged.sums + sums_size;
        std::fill_n(staged.sources, staged.rows.size() * source_row_size, A{0});
        const Range outputs = outputs_of(p, staged.rows);
        for (int64_t row = outputs.begin; row < outputs.end; row = (row / up + 1) * up)
            add_row_of_cells(n, group, {row, std::min((row / up + 1) * up, outputs.end)}, staged);
        write_sources(n, group, staged);
    }

    // Adds the rows of outputs of one row of cells.
    void add_row_of_cells(int64_t n, int64_t group, Range rows, const Staged& staged) const {
        for (int64_t cell = 0; cell < few.cells; cell += few.slice_cells) {
            if (up > 1) std::fill_n(staged.sums, sums_size, A{0});
            Slice slice = few.first_slice(n, group, rows);
            slice.cell = cell;
            slice.count = std::min(few.slice_cells, few.cells - cell);
            for (; slice.row < rows.end; slice.row++) {
                few.stage_grads(slice, staged.grads);
                for (slice.phase = 0; slice.phase < up; slice.phase += slice.phases) add_slice(slice, staged);
                slice.phase = 0;
            }
            shift_sums(rows.begin / up, slice, staged);
        }
    }

    // The slice that is staged after another one.
    Slice next(Slice s) const {
        s.phase += s.phases;
        if (s.phase < up) return s;
        s.phase = 0;
        if (++s.row % up != 0) return s;
        s.row -= up;
        s.phase = up - s.phases;
        return few.next(s);
    }

    // Adds the products of a phase of a slice. `first` is the cell of the first mask.
    __attribute__((noinline)) void add_phase(const Slice& s, int64_t phase, const TapRows<const A>& masks,
                                             const A* scales, int64_t first, const Staged& staged,
                                             SlicePrefetch& prefetch) const {
        const int64_t top = p.rows().source(s.row) - p.radius();
        const int64_t window_row = p.factor.source(s.row) - s.row / up * down;
        FewScatter<A> at;
        at.tap_rows = {std::max<int64_t>(staged.rows.begin - top, 0), std::min(k, staged.rows.end - top)};
        at.sums = staged.sums + (window_row + at.tap_rows.begin) * sums_row + p.factor.source(phase) * sums_column;
        at.sums_row = sums_row;
        at.sums_column = sums_column;
        at.sums_channel = sums_channel;
        at.kernel_size = static_cast<int>(k);
        at.adds = up > 1;
        at.output = staged.grads + phase * few.slice_cells;
        at.output_channel = up * few.slice_cells;
        at.prefetch = &prefetch;
        for_few_channels<A>(k, channels, [&](auto known, int64_t c, auto count) {
            add_grads_of_few_channels<known(), count()>(at, masks, scales, first, c);
        });
    }

    // The same for numerators of masks, which may be NaN where there is no output.
    __attribute__((noinline)) void add_numerators(const Slice& s, const TapRows<A>& masks, A* scales,
                                                  const Staged& staged, SlicePrefetch& prefetch) const {
        const int64_t outputs = few.columns.outputs(s.phase) - s.cell;
        few.zero_cropped(masks, outputs);
        few.zero_cropped({scales, 0, 1, masks.cells}, outputs);
        add_phase(s, s.phase, masks.read_only(), scales, 0, staged, prefetch);
    }

    void add_slice(const Slice& s, const Staged& staged) const {
        SlicePrefetch prefetch = few.prefetch_of(next(s));
        if (few.by_softmax()) {
            A* const scales = staged.masks + few.slice_size();
            const TapRows<A> masks = few.rows_of_phase(s, s.phase, staged.masks);
            few.for_parts(s, {0, s.count}, few.kBeyond, staged.masks,
                          [&](int64_t first, const TapRows<const A>& logits) {
                softmax_of_rows<kTilesTogether<A>>(logits, masks.from(first), scales + first);
            });
            add_numerators(s, masks, scales, staged, prefetch);
        } else if (few.masks_in_place()) {
            few.for_parts(s, {0, s.count}, few.kStaged, staged.masks,
                          [&](int64_t first, const TapRows<const A>& masks) {
                add_phase(s, s.phase, masks, nullptr, first, staged, prefetch);
            });
        } else {
            few.stage_masks(s, staged.masks);
            for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++)
                add_phase(s, phase, few.rows_of_phase(s, phase, staged.masks).read_only(), nullptr, 0, staged,
                          prefetch);
        }
    }

    // Adds the sums of a row of cells to their sources. Sources beyond the sides are in the halo.
    __attribute__((noinline)) void shift_sums(int64_t cell_row, const Slice& s, const Staged& staged) const {
        const int64_t top = cell_row * down + p.offset_h - p.radius();
        for (int64_t a = 0; a < window; a++) {
            const int64_t i = top + a;
            if (i < staged.rows.begin || i >= staged.rows.end) continue;
            A* const row = staged.sources + (i - staged.rows.begin) * source_row_size;
            for (int64_t b = 0; b < window; b++) {
                const int64_t column = b + p.offset_w - p.radius();
                const int64_t residue = floor_mod(column, down), shift = floor_div(column, down);
                for (int64_t c = 0; c < channels; c++) {
                    const A* const sums = staged.sums + a * sums_row + b * sums_column + c * sums_channel;
                    A* const to = row + c * few.sources_row + residue * few.residue_stride + s.cell + shift -
                                  few.columns.least_shift;
                    for (int64_t q = 0; q < s.count; q += L) store(load(to + q) + load(sums + q), to + q);
                }
            }
        }
    }

    // ---- write out ----

    __attribute__((noinline)) void write_sources(int64_t n, int64_t group, const Staged& staged) const {
        const A* row = staged.sources - few.columns.least_shift;
        for (int64_t i = staged.rows.begin; i < staged.rows.end; i++) {
            for (int64_t c = 0; c < channels; c++, row += few.sources_row) {
                interleave_row(row, few.residue_stride, static_cast<int>(down), grad_features, n, group * channels + c,
                               i, {0, grad_features.w});
            }
        }
    }
};

// ---- the gradient of masks or logits: the taps of a tile ----

template <class A>
struct FewProducts {
    Range tap_rows;     // inside the border
    const A* features;  // of the first tap row, inside or not
    int64_t row_stride, channel_stride;
    int64_t tap_offsets[kMaxKernelSize];
    int kernel_size;
    const A* output;  // its gradients
    int64_t output_channel;
};

// Sums the products of NC channels, with those of the channels before, if there are any. K is the kernel size, or 0 if
// the compiler does not know it.
template <int K, int NC, class A>
__attribute__((noinline)) void grads_of_few_channels(FewProducts<A> at, TapRows<A> grads, int64_t channel) {
    const int k = K > 0 ? K : at.kernel_size;
    const int64_t channel_stride = at.channel_stride;
    for (int64_t q = 0; q < grads.cells; q += kLanes<A>) {
        Vector<A> output[NC];
#pragma GCC unroll 4
        for (int c = 0; c < NC; c++) output[c] = load(at.output + (channel + c) * at.output_channel + q);
        A* to = grads.tap(at.tap_rows.begin * k) + q;
        const A* row = at.features + channel * channel_stride + at.tap_rows.begin * at.row_stride + q;
        for (int64_t a = at.tap_rows.begin; a < at.tap_rows.end; a++, row += at.row_stride) {
            for_tap_columns<K>(k, [&](int b) __attribute__((always_inline)) {
                const A* const features = row + at.tap_offsets[b];
                Vector<A> sum = channel > 0 ? load(to) : Vector<A>{};
#pragma GCC unroll 4
                for (int c = 0; c < NC; c++) sum += output[c] * load(features + c * channel_stride);
                store(sum, to);
                to += grads.step;
            });
        }
    }
}

// ---- its kernel ----

template <class Sums>
struct GradMasksFewNchw {
    using A = Sums;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_masks;
    const GradFeaturesFewNchw<Sums>* const features;  // is computed too, from the same masks, or NULL
    static constexpr bool kMayAddFeatures = std::is_same_v<A, float>;
    // With logits also the rows and cells that a crop leaves out.
    const int64_t cell_rows = p.from_logits ? p.logits.h : ceil_div(p.out_h, p.factor.up);
    const FewChannels<A> few{p, p.from_logits ? p.logits.w : ceil_div(p.out_w, p.factor.up),
                             p.from_logits ? rows_of_slice_of_grads(p, p.factor.source(p.factor.up - 1) + p.kernel_size)
                                           : p.taps() * p.factor.up,
                             grad_masks};
    const int64_t up = p.factor.up, k = p.kernel_size, taps = p.taps(), channels = few.channels;
    const int64_t block_rows = rows_of_block(
        p, L, cell_rows, (kBlockFeatures / std::max<int64_t>(channels * few.sources_row, 1) - k) / few.down,
        grad_masks.n* p.groups);
    const int64_t blocks = ceil_div(cell_rows, block_rows), images = grad_masks.n * p.groups;
    const int64_t items = features ? images : images * blocks;
    const int64_t staged_rows = p.factor.source(block_rows * up - 1) + k;
    const int64_t features_channel = staged_rows * few.sources_row;
    const int64_t features_size = channels * features_channel;
    const int64_t output_size = channels * up * few.slice_cells;   // of a row
    const int64_t sums_size = features ? features->sums_size : 0;  // of a row
    const int64_t sources_size = features ? p.features.h * features->source_row_size : 0;
    const int64_t scratch_size = features_size + few.rows_together * (output_size + sums_size) +
                                 (p.from_logits ? 3 : 1) * few.slice_size() + few.slice_cells + sources_size;
    const bool non_temporal = wants_non_temporal_stores(grad_masks);

    __attribute__((noinline)) GradMasksFewNchw(const Problem& problem, const Array& result,
                                               const GradFeaturesFewNchw<Sums>* also = nullptr)
        : p(problem), grad_masks(result), features(also) {}

    struct Staged {
        A *features, *output, *grads, *logits, *masks, *scales, *sums, *sources;
        int64_t first_source = 0;
    };

    // Tells if one thread may take an image whole, in a row of slices.
    bool may_add_features() const {
        return few.by_softmax() && few.cells <= few.slice_cells && threads_worth<A>(p) <= images &&
               p.features.h * features->source_row_size <= 2 * kBlockSources &&
               scratch_size * int64_t{sizeof(A)} <= kScratchBytes;
    }

    void run_item(int64_t item, A* scratch) const {
        Staged staged;
        staged.features = scratch;
        staged.output = staged.features + features_size;
        staged.grads = staged.output + few.rows_together * output_size;
        staged.logits = staged.grads + few.slice_size();
        staged.masks = staged.logits + few.slice_size();
        staged.sources = scratch + scratch_size - sources_size;
        staged.sums = staged.sources - few.rows_together * sums_size;
        staged.scales = staged.sums - few.slice_cells;
        if (!kMayAddFeatures || !features) return run_block(item / blocks, item % blocks, staged);
        std::fill_n(staged.sources, sources_size, A{0});
        for (int64_t block = 0; block < blocks; block++) run_block(item, block, staged);
        features->write_sources(item / p.groups, item % p.groups, staged_for_features(0, staged));
    }

    void run_block(int64_t image, int64_t block, Staged& staged) const {
        const int64_t n = image / p.groups, group = image % p.groups, begin = block * block_rows * up;
        const int64_t end = std::min(begin + block_rows * up, p.from_logits ? cell_rows * up : p.out_h);
        if (begin < p.out_h) {
            staged.first_source = p.rows().source(begin);
            few.stage_features(n, group, {begin, std::min(end, p.out_h)}, features_channel, staged.features);
        }
        for (Slice slice = few.first_slice(n, group, {begin, end}); slice.row < end; slice = few.next(slice)) {
            const int64_t place = few.place(slice);
            A* const grads = staged.grads + place * few.cells;
            if (slice.row < p.out_h) {
                grads_of_slice(slice, staged, grads);
            } else {
                zero_taps({grads, few.tap_step(), static_cast<int>(taps),
                           static_cast<int>(few.tap_step() - place * few.cells)});
            }
            if (!few.is_last_together(slice)) continue;
            write_slice(slice, staged.grads);
            if constexpr (kMayAddFeatures) {
                if (features && few.is_last_of_row(slice) && slice.row % up == up - 1) shift_sums(slice, staged);
            }
        }
        if (non_temporal) finish_non_temporal_stores();
    }

    typename GradFeaturesFewNchw<Sums>::Staged staged_for_features(int64_t place, const Staged& staged) const {
        return {staged.sources,
                staged.masks,
                staged.sums + place * sums_size,
                staged.output + place * output_size,
                {0, p.features.h}};
    }

    // Adds a slice, whose numerators are staged, to the gradient of features.
    __attribute__((noinline)) void add_to_features(const Slice& s, const Staged& staged) const {
        const auto of_row = staged_for_features(few.place(s), staged);
        if (s.row % up == 0 && s.phase == 0) std::fill_n(of_row.sums, sums_size, A{0});
        SlicePrefetch none;
        features->add_numerators(s, few.rows_of_phase(s, s.phase, staged.masks), staged.scales, of_row, none);
    }

    // Adds the sums of rows together to their sources, after the last slice of them.
    void shift_sums(const Slice& s, const Staged& staged) const {
        for (int64_t place = 0; place <= few.place(s); place++) {
            const int64_t row = s.row / up - few.place(s) + place;
            if (row * up < p.out_h) features->shift_sums(row, s, staged_for_features(place, staged));
        }
    }

    __attribute__((noinline)) void grads_of_slice(const Slice& s, const Staged& staged, A* of_slice) const {
        A* const output = staged.output + few.place(s) * output_size;
        if (s.phase == 0) few.stage_grads(s, output);
        const int64_t top = p.rows().source(s.row) - p.radius();
        FewProducts<A> at;
        at.tap_rows = {std::max<int64_t>(-top, 0), std::min(k, p.features.h - top)};
        if (channels == 0) at.tap_rows = {0, 0};
        at.features = staged.features + (p.rows().source(s.row) - staged.first_source) * few.sources_row + s.cell;
        at.row_stride = few.sources_row;
        at.channel_stride = features_channel;
        at.kernel_size = static_cast<int>(k);
        at.output_channel = up * few.slice_cells;
        for (int64_t phase = s.phase; phase < s.phase + s.phases; phase++) {
            const TapRows<A> grads = few.rows_of_phase(s, phase, of_slice);
            zero_taps(grads.of({0, at.tap_rows.begin * k}));
            zero_taps(grads.of({at.tap_rows.end * k, taps}));
            few.find_taps(phase, at.tap_offsets);
            at.output = output + phase * few.slice_cells;
            for_few_channels<A>(k, channels, [&](auto known, int64_t c, auto count) {
                grads_of_few_channels<known(), count()>(at, grads, c);
            });
            few.zero_outside(grads, phase, s.cell);  // features are 0 there, but grad_output may be Inf or NaN
            if (p.from_logits) turn_into_logits(s, grads, staged);
            if constexpr (kMayAddFeatures) {
                if (features) add_to_features(s, staged);
            }
            const int64_t outputs = few.columns.outputs(phase) - s.cell;
            if (outputs < s.count) few.zero_cropped(grads, outputs);
        }
    }

    __attribute__((noinline)) void turn_into_logits(const Slice& s, const TapRows<A>& grads,
                                                    const Staged& staged) const {
        if (few.by_softmax()) {
            SlicePrefetch prefetch = few.prefetch_of(few.next(s));
            few.for_parts(s, {0, s.count}, few.kBeyond, staged.logits,
                          [&](int64_t first, const TapRows<const A>& logits) {
                softmax_backward<kTilesTogether<A>>(logits, grads.from(first), staged.masks + first,
                                                    staged.scales + first, first, prefetch);
            });
        } else {
            few.stage_slice(s, staged.logits);
            few.tiles().normalize_row_backward(grads.first, staged.logits, staged.masks, L);
        }
    }

    void zero_taps(const TapRows<A>& outside) const {
        for (int64_t t = 0; t < outside.taps; t++) std::fill_n(outside.tap(t), outside.cells, A{0});
    }

    // ---- write out ----

    __attribute__((noinline)) void write_slice(const Slice& s, const A* grads) const {
        const Array array = few.taps_of(grad_masks, s);
        const int64_t row = few.row_in_array(s) - few.place(s), factor = few.factor_in_array(), first = s.cell * factor;
        const Range slice_columns = {first, std::min(first + s.count * factor, array.w)};
        const int64_t size = few.place(s) * array.w + slice_columns.size();
        for (int64_t t = 0; t < taps; t++, grads += few.tap_step()) {
            const int64_t channel = s.group * taps + t;
            if (factor == 1 && array.stride_w == 1 && array.dtype == kDtypeOf<A>) {
                A* const to = element<A>(array, s.n, channel, row, first);
                non_temporal ? copy_non_temporal(grads, size, to) : void(std::copy_n(grads, size, to));
            } else {
                interleave_row(grads, few.slice_cells, static_cast<int>(factor), array, s.n, channel, row,
                               slice_columns);
            }
        }
    }
};

}  // namespace

void grad_features_few_nchw(const Problem& problem, const Array& grad_features) {
    with_accumulator(problem.features.dtype, [&](auto sums) {
        run_items(GradFeaturesFewNchw<typename decltype(sums)::type>{problem, grad_features});
    });
}

void grad_masks_few_nchw(const Problem& problem, const Array& grad_masks) {
    with_accumulator(problem.features.dtype, [&](auto sums) {
        run_items(GradMasksFewNchw<typename decltype(sums)::type>{problem, grad_masks});
    });
}

bool grads_few_nchw(const Problem& problem, const Array& grad_features, const Array& grad_masks) {
    if (problem.features.dtype == CARAFEPP_FLOAT64) return false;
    const GradFeaturesFewNchw<float> features{problem, grad_features};
    const GradMasksFewNchw<float> both{problem, grad_masks, &features};
    const bool together = both.may_add_features();
    if (together) run_items(both);
    return together;
}

}  // namespace carafepp::CARAFEPP_ISA
