// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits with adjacent channels, compiled once for each instruction set. A register tile holds
// sums of some outputs times some taps, each in the lanes of one vector. First comes the plan. Each tile then contracts
// the windows of its cells over the channels and sums the lanes. It takes the gradient of masks to that of logits, and
// writes.
#include <algorithm>
#include <cassert>

#include "cpu/geometry.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/masks_nhwc.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/tile_transpose.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// ---- plan ----

// Groups of few channels, with one output for each window, have code of their own. To keep the library small, only that
// of float.
template <class T>
constexpr bool kOneOutput = std::is_same_v<T, float>;
constexpr int kMostVectors = 2;  // of channels

template <class T>
struct GradMasksNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;
    static constexpr Result kResult = kGradMasks;

    const Problem& p;
    const Array& grad_masks;
    MaskTiles<A> masks;
    CellWindows rows, columns;  // of a cell
    CellMasks<A> cell_masks;
    int64_t up, taps, radius;
    int64_t channels;          // of a group
    int64_t part, parts;       // groups of an item; number of such parts
    int64_t cell_rows, cells;  // with logits also those that a crop leaves no output for: their gradient is 0
    bool one_output;           // of each window, of few channels: sums over all channels are of one register tile
    bool as_masks, as_logits;  // channels of the result are adjacent: sums have their order, else that of a tile
    Order order;               // of the sums of a cell
    int64_t sums_of_cell;
    int64_t line_size;     // the same in whole vectors
    int64_t partial_size;  // [sum][lane]
    int64_t lines_size;    // [cell of a tile][sum], or [sum][lane]
    int64_t items, scratch_size;

    GradMasksNhwc(const Problem& problem, const Array& result, [[maybe_unused]] int64_t scratch_bytes = kScratchBytes)
        : p(problem),
          grad_masks(result),
          masks{p, p.from_logits ? p.factor.up : std::min(p.factor.up, p.out_w)},
          rows(p.factor, p.factor.up),
          columns(p.factor, masks.phases),
          cell_masks(p.normalizer, p.taps(), p.factor.up * p.factor.up) {
        up = p.factor.up;
        taps = p.taps();
        radius = p.radius();
        channels = p.features.c / p.groups;
        part = groups_of_item(p.groups, channels);
        parts = ceil_div(p.groups, part);
        one_output = kOneOutput<T> && up == 1 && channels > 0 && channels % L == 0 && channels <= kMostVectors * L;
        cell_rows = p.from_logits ? grad_masks.h : ceil_div(p.out_h, up);
        cells = p.from_logits ? grad_masks.w : ceil_div(p.out_w, up);
        as_masks = !p.from_logits && grad_masks.stride_c == 1;
        as_logits = p.from_logits && grad_masks.stride_c == 1 && p.logits.stride_c == 1 && CellMasks<A>::fits(up * up);
        order = as_logits ? Order{up, 1, up * up} : as_masks ? Order{masks.phases * taps, taps, 1} : masks.order(1);
        sums_of_cell = up * masks.phases * taps;
        line_size = ceil_div(sums_of_cell, L) * L;
        partial_size = line_size * L;
        lines_size = L * line_size;
        items = grad_masks.n * parts * cell_rows;
        scratch_size = partial_size + 4 * lines_size;
        assert(scratch_size * int64_t{sizeof(A)} <= scratch_bytes);
    }

    void run_item(int64_t item, A* scratch) const;
};

// A row of cells of a group. `rows` are its rows of outputs.
template <class A>
struct GradMasksItem {
    int64_t n, group, cell_row;
    Range rows;
    A* partial;  // sums of one cell, each in the lanes of a vector
};

// ---- staging ----

// Each function has room for three more tiles behind the lines of a tile.

// Writes the gradient of masks in the order of logits as that of logits.
template <class T, class A>
void write_logits(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell, int count, A* lines) {
    const CellAt first{at.n, at.group * plan.taps * plan.up * plan.up, at.cell_row, cell};
    A* const staged = lines + plan.lines_size;
    plan.cell_masks.normalize(plan.p.logits, first, count, staged);
    plan.cell_masks.normalize_backward(plan.p.logits, first, count, staged, lines);
    for (int q = 0; q < count; q++)
        plan.masks.zero_cropped_grads(at.rows, cell + q, 1, plan.order, lines + q * plan.line_size);
    plan.cell_masks.write(lines, plan.grad_masks, first, count);
}

// The same by way of a transposed tile, for other strides; also of masks.
template <class T, class A>
void write_tile(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell, int count, const A* lines,
                A* tile) {
    constexpr int L = kLanes<A>;
    const Problem& p = plan.p;
    const MaskTiles<A>& masks = plan.masks;
    load_channels<A>(lines, plan.line_size, count, static_cast<int>((at.rows.end - at.rows.begin) * masks.row_size(1)),
                     adjacent_channels(tile, L));
    if (p.from_logits) {
        A *const logits = tile + plan.lines_size, *const staged = logits + plan.lines_size;
        masks.load_rows(p.logits, at.n, at.group, at.rows, cell, count, L, logits);
        for (int64_t row = 0; row < plan.up * masks.row_size(L); row += masks.row_size(L))
            masks.normalize_row_backward(tile + row, logits + row, staged, L);
        masks.zero_cropped_grads(at.rows, cell, L, masks.order(L), tile);
    }
    masks.store_rows(at.n, at.group, at.rows, cell, count, L, tile, plan.grad_masks);
}

// ---- contraction ----

constexpr int kMostSums = kVectorRegisters == 32 ? 20 : 12;  // of a register tile, beside what they are summed from

// The outputs that read one window. The sums of tap t of output o stand from sums[o] + t * tap_step on.
template <class T>
struct WindowGrads {
    static constexpr int kMost = kMaxFactor * kMaxFactor;

    const T* grads[kMost];
    Accumulator<T>* sums[kMost];
    int count = 0;
};

// Pixels of features to prefetch that the cell below is the first to read, where a cell has several.
template <class T>
struct PrefetchQueue {
    const T* pixels[kMaxFactor * kMaxFactor];
    int count = 0;

    // One that has not been taken yet, if there is any left.
    const T* take(const T* otherwise) { return count > 0 ? pixels[--count] : otherwise; }
};

// Pixels that are prefetched between arithmetic, channel by channel. They are of the next cell, for the level 1 cache.
// Or two are of the cell below, which are longer on their way.
template <class T>
struct ChannelPrefetch {
    const T *grad, *pixel, *pixel_below;

    template <bool below>
    __attribute__((always_inline)) void prefetch_channels(int64_t c) const {
        __builtin_prefetch(grad + c);
        __builtin_prefetch(pixel + c, 0, below ? 2 : 3);
        if (below) __builtin_prefetch(pixel_below + c, 0, 2);
    }
};

// A register tile: `P` outputs times NA x NB pixels from `pixels` on, over all channels of a group.
template <int P, int NA, int NB, class T>
CARAFEPP_INLINE void sum_over_channels(const T* const (&grads)[P], const T* pixels, int64_t row_stride,
                                       int64_t pixel_stride, int64_t channels, Accumulator<T>* const (&sums)[P],
                                       int64_t row_step, int64_t tap_step, const ChannelPrefetch<T>& prefetch) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    // Beside the sums, registers hold all gradients and a pixel, or a row of pixels and a gradient: nothing is read
    // twice.
    constexpr bool kGradsFit = P * NA * NB + P + 1 <= kVectorRegisters;
    Vector<A> sum[P][NA][NB] = {};
    const T* columns[NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; b++) {
        columns[b] = pixels + b * pixel_stride;
        if (NA > 1) columns[b] = opaque(columns[b]);  // else each tap has an address of its own, which spills
    }
    const auto add = [&](auto load_channels_from) __attribute__((always_inline)) {
        Vector<A> grad[P];
        if (kGradsFit) {
#pragma GCC unroll 4
            for (int o = 0; o < P; o++) grad[o] = in_register(load_channels_from(grads[o], 0));
        }
#pragma GCC unroll 4
        for (int a = 0; a < NA; a++) {
            Vector<A> features[NB];
#pragma GCC unroll 8
            for (int b = 0; b < NB; b++) {
                features[b] = load_channels_from(columns[b], a * row_stride);
                if (!kGradsFit) features[b] = in_register(features[b]);
            }
#pragma GCC unroll 20
            for (int k = 0; k < P * NB; k++) {
                const int o = kGradsFit ? k % P : k / NB, b = kGradsFit ? k / P : k % NB;
                if (!kGradsFit && b == 0) grad[o] = in_register(load_channels_from(grads[o], 0));
                if (kGradsFit && P > 1 && o == 0) features[b] = in_register(features[b]);
                sum[o][a][b] += grad[o] * features[b];
            }
        }
    };
    constexpr bool kPairs = std::is_same_v<T, BFloat16>;  // of vectors
    // If few products share a load, a cache line is prefetched once, not for each of its vectors.
    constexpr bool kTwoAtOnce = kPairs || (P == 1 && 2 * L * sizeof(T) <= 64);
    int64_t c = 0;
    if constexpr (kTwoAtOnce) {
        for (; c + 2 * L <= channels; c += 2 * L) {
            prefetch.template prefetch_channels<P == 1>(c);
            add([c](const T* from, int64_t row) __attribute__((always_inline)) {
                if constexpr (kPairs)
                    return load_even(from + (c + row));
                else
                    return load(from + (c + row));
            });
            add([c](const T* from, int64_t row) __attribute__((always_inline)) {
                if constexpr (kPairs)
                    return load_odd(from + (c + row));
                else
                    return load(from + (c + L + row));
            });
        }
    }
    for (; !kPairs && c + L <= channels; c += L) {
        prefetch.template prefetch_channels<P == 1>(c);
        add([c](const T* from, int64_t row) __attribute__((always_inline)) { return load(from + (c + row)); });
    }
    for (; c < channels; c += L) {
        const int rest = static_cast<int>(std::min<int64_t>(channels - c, L));
        add([c, rest](const T* from, int64_t row)
                __attribute__((always_inline)) { return load_between(from + (c + row), 0, rest); });
    }
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) {
#pragma GCC unroll 4
        for (int a = 0; a < NA; a++) {
#pragma GCC unroll 8
            for (int b = 0; b < NB; b++) store(sum[o][a][b], sums[o] + a * row_step + b * tap_step);
        }
    }
}

// The pixels that the taps of a window read, from its centre on. Taps outside the border, and those that fill the last
// vector, read the centre.
struct TapOffsets {
    int64_t offsets[kMaxKernelSize * kMaxKernelSize + kLanes<float>];
    int a_begin = 0, a_end = 0, b_begin = 0, b_end = 0;

    template <class T>
    void set(const PixelWindow<const T>& window, int kernel_size, int64_t size) {
        if (a_begin == window.a_begin && a_end == window.a_end && b_begin == window.b_begin && b_end == window.b_end)
            return;
        a_begin = window.a_begin, a_end = window.a_end, b_begin = window.b_begin, b_end = window.b_end;
        std::fill_n(offsets, size, 0);
        const int radius = kernel_size / 2;
        for (int a = a_begin; a < a_end; a++) {
            for (int b = b_begin; b < b_end; b++) {
                offsets[a * kernel_size + b] = (a - radius) * window.row_stride + (b - radius) * window.pixel_stride;
            }
        }
    }
};

// A register tile of one output: as many taps as a vector has lanes, over all channels. `line` has whole vectors.
template <int NV, class T>
__attribute__((noinline)) void sum_taps_of_output(const T* grads, const T* centre, const int64_t* offsets, int64_t taps,
                                                  Accumulator<T>* line) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    Vector<A> grad[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) grad[v] = load(grads + v * L);
    for (int64_t t = 0; t < taps; t += L) {
        Vector<A> sums[L] = {};
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) {
            const T* const pixel = centre + offsets[t + i];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sums[i] += grad[v] * load(pixel + v * L);
        }
        store(sums_of_lanes<A>(sums), line + t);
    }
}

// line = the gradient of the masks of the one output of a cell.
template <class T, class A>
void grad_masks_of_output(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell, TapOffsets& taps,
                          A* line) {
    const Problem& p = plan.p;
    const int k = static_cast<int>(p.kernel_size);
    const int64_t channel = at.group * plan.channels;
    const PixelWindow<const T> window = window_of<const T>(p, p.features, at.n, channel, at.cell_row * p.factor.down,
                                                           cell * p.factor.down);
    taps.set(window, k, plan.line_size);
    with_count<kMostVectors>(static_cast<int>(plan.channels / kLanes<A>), [&](auto vectors) {
        sum_taps_of_output<vectors()>(element<const T>(p.grad_output, at.n, channel, at.cell_row, cell),
                                      window.pixel(plan.radius, plan.radius), taps.offsets, plan.taps, line);
    });
    std::fill(line + plan.taps, line + plan.line_size, A{0});  // an infinite product there would reach all taps
    if (window.taps() == plan.taps) return;
    for (int a = 0; a < k; a++) {
        const bool inside = a >= window.a_begin && a < window.a_end;
        std::fill(line + a * k, line + a * k + (inside ? window.b_begin : k), A{0});
        std::fill(line + a * k + (inside ? window.b_end : k), line + a * k + k, A{0});
    }
}

// At most `most` of what is left, which two parts share evenly.
inline int part_of(int left, int most) {
    return left > most && left < 2 * most ? (left + 1) / 2 : std::min(most, left);
}

// All taps of a window for `P` outputs from `first` on. Register tiles have as many rows and columns as there are
// registers for.
template <int P, class T>
__attribute__((noinline)) void sum_taps_over_channels(const GradMasksNhwc<T>& plan, const PixelWindow<const T>& window,
                                                      const WindowGrads<T>& outputs, int first,
                                                      PrefetchQueue<T>& queue) {
    using A = Accumulator<T>;
    constexpr int kColumns = std::min(5, kMostSums / P), kRows = std::min(3, kMostSums / P / kColumns);
    const int64_t tap_step = plan.order.tap_step * kLanes<A>, row_step = plan.p.kernel_size * tap_step;
    const int64_t row_stride = window.row_stride, pixel_stride = window.pixel_stride, channels = plan.channels;
    const int64_t next_cell = plan.up * plan.p.grad_output.stride_w;
    const T* grads[P];
    for (int o = 0; o < P; o++) grads[o] = outputs.grads[first + o];
    for (int a = window.a_begin; a < window.a_end;) {
        const int na = part_of(window.a_end - a, kRows);
        const T* pixels = window.pixel(a, window.b_begin);
        A* sums[P];
        for (int o = 0; o < P; o++) sums[o] = outputs.sums[first + o] + a * row_step + window.b_begin * tap_step;
        for (int b = window.b_begin; b < window.b_end;) {
            const int nb = part_of(window.b_end - b, kColumns);
            const T* const right = pixels + nb * pixel_stride;
            const ChannelPrefetch<T> prefetch{outputs.grads[first + static_cast<unsigned>(a) % P] + next_cell,
                                              queue.take(right), queue.take(right)};
            with_count<kRows>(na, [&](auto rows_here) __attribute__((always_inline)) {
                with_count<kColumns>(nb, [&](auto columns_here) __attribute__((always_inline)) {
                    sum_over_channels<P, rows_here(), columns_here()>(grads, pixels, row_stride, pixel_stride, channels,
                                                                      sums, row_step, tap_step, prefetch);
                });
            });
            for (int o = 0; o < P; o++) sums[o] += nb * tap_step;
            pixels = right;
            b += nb;
        }
        a += na;
    }
}

// The outputs of one cell that read one window.
template <class T, class A>
void grad_masks_of_window(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell, SharedWindow r,
                          SharedWindow q, PrefetchQueue<T>& queue) {
    const Problem& p = plan.p;
    const int64_t up = plan.up, channel = at.group * plan.channels;
    const PixelWindow<const T> window = window_of<const T>(
        p, p.features, at.n, channel, at.cell_row * p.factor.down + r.source, cell * p.factor.down + q.source);
    WindowGrads<T> outputs;
    for (int64_t row = r.begin; row < std::min<int64_t>(r.end, p.out_h - at.cell_row * up); row++) {
        for (int64_t phase = q.begin; phase < std::min<int64_t>(q.end, p.out_w - cell * up); phase++) {
            outputs.grads[outputs.count] = element<const T>(p.grad_output, at.n, channel, at.cell_row * up + row,
                                                            cell * up + phase);
            outputs.sums[outputs.count++] = at.partial +
                                            (row * plan.order.row_step + phase * plan.order.phase_step) * kLanes<A>;
        }
    }
    int first = 0;
    for (; first + 4 <= outputs.count; first += 4) sum_taps_over_channels<4>(plan, window, outputs, first, queue);
    for (; first + 2 <= outputs.count; first += 2) sum_taps_over_channels<2>(plan, window, outputs, first, queue);
    if (first < outputs.count) sum_taps_over_channels<1>(plan, window, outputs, first, queue);
}

template <class T, class A>
PrefetchQueue<T> prefetch_queue(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell) {
    const Problem& p = plan.p;
    const int64_t down = p.factor.down, most = std::min<int64_t>(down, kMaxFactor);
    PrefetchQueue<T> queue;
    if (plan.up >= down) return queue;
    const int64_t last = (at.cell_row + 1) * down + plan.rows.windows[plan.rows.count - 1].source + p.offset_h +
                         plan.radius;
    for (int64_t row = last + 1 - most; row < std::min(last + 1, p.features.h); row++) {
        for (int64_t column = cell * down; column < std::min(cell * down + most, p.features.w); column++)
            queue.pixels[queue.count++] = element<const T>(p.features, at.n, at.group * plan.channels, row, column);
    }
    return queue;
}

// True if all outputs of a cell exist and all windows are inside the borders: then every sum is written.
template <class T>
bool is_inner(const GradMasksNhwc<T>& plan, int64_t cell_row, int64_t cell) {
    const Problem& p = plan.p;
    const int64_t r = plan.radius, up = plan.up;
    const int64_t i = cell_row * p.factor.down + p.offset_h, j = cell * p.factor.down + p.offset_w;
    return plan.masks.phases == up && (cell_row + 1) * up <= p.out_h && (cell + 1) * up <= p.out_w && i >= r &&
           j >= r && i + plan.rows.windows[plan.rows.count - 1].source + r < p.features.h &&
           j + plan.columns.windows[plan.columns.count - 1].source + r < p.features.w;
}

// Zeroes what has no sum: the taps beyond the borders of a window, and all those of outputs that do not exist.
template <class T, class A>
void zero_absent_taps(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell, SharedWindow r,
                      SharedWindow q, A* line) {
    const Problem& p = plan.p;
    const int k = static_cast<int>(p.kernel_size);
    const PixelWindow<const T> window = window_of<const T>(
        p, p.features, at.n, 0, at.cell_row * p.factor.down + r.source, cell * p.factor.down + q.source);
    for (int64_t row = r.begin; row < r.end; row++) {
        for (int64_t phase = q.begin; phase < q.end; phase++) {
            const bool exists = at.cell_row * plan.up + row < p.out_h && cell * plan.up + phase < p.out_w;
            A* tap = line + row * plan.order.row_step + phase * plan.order.phase_step;
            for (int a = 0; a < k; a++) {
                const bool inside = exists && a >= window.a_begin && a < window.a_end;
                const int begin = inside ? window.b_begin : k, end = inside ? window.b_end : k;
                for (int b = 0; b < begin; b++) tap[b * plan.order.tap_step] = 0;
                for (int b = end; b < k; b++) tap[b * plan.order.tap_step] = 0;
                tap += k * plan.order.tap_step;
            }
        }
    }
}

// line = the gradient of the masks of one cell.
template <class T, class A>
void grad_masks_of_cell(const GradMasksNhwc<T>& plan, const GradMasksItem<A>& at, int64_t cell, A* line) {
    constexpr int L = kLanes<A>;
    PrefetchQueue<T> queue = prefetch_queue(plan, at, cell);
    for (int r = 0; r < plan.rows.count; r++) {
        for (int q = 0; q < plan.columns.count; q++)
            grad_masks_of_window(plan, at, cell, plan.rows.windows[r], plan.columns.windows[q], queue);
    }
    for (int64_t k = 0; k < plan.line_size; k += L) {
        Vector<A> partial[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) partial[i] = load(at.partial + (k + i) * L);
        store(sums_of_lanes<A>(partial), line + k);
    }
    if (is_inner(plan, at.cell_row, cell)) return;
    for (int r = 0; r < plan.rows.count; r++) {
        for (int q = 0; q < plan.columns.count; q++)
            zero_absent_taps(plan, at, cell, plan.rows.windows[r], plan.columns.windows[q], line);
    }
}

template <class T>
void GradMasksNhwc<T>::run_item(int64_t item, A* scratch) const {
    GradMasksItem<A> at;
    at.cell_row = item % cell_rows;
    const int64_t first = item / cell_rows % parts * part, end = std::min(first + part, p.groups);
    at.n = item / cell_rows / parts;
    at.rows = {at.cell_row * up, (at.cell_row + 1) * up};
    if (!p.from_logits) at.rows.end = std::min(at.rows.end, p.out_h);
    at.partial = scratch;
    A* const lines = scratch + partial_size;
    std::fill(at.partial + sums_of_cell * L, at.partial + partial_size, A{0});
    TapOffsets tap_offsets;
    for (int64_t cell = 0; cell < cells; cell += L) {
        const int count = static_cast<int>(std::min<int64_t>(L, cells - cell));
        for (at.group = first; at.group < end; at.group++) {
            for (int q = 0; q < count; q++) {
                A* const line = lines + q * line_size;
                if (!one_output || at.cell_row >= p.out_h || cell + q >= p.out_w) {
                    grad_masks_of_cell(*this, at, cell + q, line);
                } else if constexpr (kOneOutput<T>) {
                    grad_masks_of_output(*this, at, cell + q, tap_offsets, line);
                }
                if (as_masks) masks.store_cell(at.n, at.group, at.rows, cell + q, line, grad_masks);
            }
            if (as_logits) write_logits(*this, at, cell, count, lines);
            if (!as_logits && !as_masks) write_tile(*this, at, cell, count, lines, lines + lines_size);
        }
    }
}

}  // namespace

void grad_masks_nhwc(const Problem& problem, const Array& grad_masks) {
    run_kernel<GradMasksNhwc>(problem, grad_masks);
}

void grad_masks_any(const Problem& problem, const Array& grad_masks) {
    run_on_images<GradMasksNhwc>(problem, grad_masks);
}

}  // namespace carafepp::CARAFEPP_ISA
