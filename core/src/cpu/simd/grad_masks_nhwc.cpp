// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits with adjacent channels, compiled once for each instruction set. For each cell:
// contract its outputs and their windows over the channels, several taps and outputs at a time, each in a vector of
// partial sums; sum the lanes of these vectors. For each tile: carry the gradient of the masks through the normaliser,
// write out.
#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/masks_nhwc.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/shared_windows.h"
#include "cpu/simd/tile_transpose.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int kMostSums = kVectorRegisters == 32 ? 20 : 12;  // in registers at once, beside what they are summed from

// Outputs that share a window, and where the sums of each stand: those of tap t at sums[o] + t * tap_step.
template <class T>
struct Outputs {
    using A = Accumulator<T>;
    static constexpr int kMost = kMaxFactor * kMaxFactor;

    const T* grads[kMost];
    A* sums[kMost];
    int count = 0;
};

// Where a cell has several pixels of features of its own, those that the cell below is the first to read.
template <class T>
struct PixelsBelow {
    const T* pixels[kMaxFactor * kMaxFactor];
    int count = 0;

    // One that has not been taken yet, if there is any left.
    const T* take(const T* otherwise) { return count > 0 ? pixels[--count] : otherwise; }
};

// What is fetched between arithmetic, channel by channel: pixels of the next cell, for the level 1 cache, or two of the
// cell below, which are longer on their way.
template <class T>
struct Next {
    const T *grad, *pixel, *pixel_below;

    template <bool below>
    __attribute__((always_inline)) void fetch(int64_t c) const {
        __builtin_prefetch(grad + c);
        __builtin_prefetch(pixel + c, 0, below ? 2 : 3);
        if (below) __builtin_prefetch(pixel_below + c, 0, 2);
    }
};

// `P` outputs times NA x NB pixels from `pixels` on.
template <int P, int NA, int NB, class T>
__attribute__((noinline)) void contract(const T* const* grads, const T* pixels, int64_t row_stride,
                                        int64_t pixel_stride, int64_t channels, Accumulator<T>* const* sums,
                                        int64_t row_step, int64_t tap_step, const Next<T>& next) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    Vector<A> sum[P][NA][NB] = {};
    const auto add = [&](auto load_channels_from) __attribute__((always_inline)) {
        Vector<A> grad[P];
#pragma GCC unroll 4
        for (int o = 0; o < P; o++) grad[o] = load_channels_from(grads[o]);
#pragma GCC unroll 4
        for (int a = 0; a < NA; a++) {
#pragma GCC unroll 8
            for (int b = 0; b < NB; b++) {
                const Vector<A> features = load_channels_from(pixels + a * row_stride + b * pixel_stride);
#pragma GCC unroll 4
                for (int o = 0; o < P; o++) sum[o][a][b] += grad[o] * features;
            }
        }
    };
    constexpr bool kPairs = std::is_same_v<T, BFloat16>;  // of vectors
    int64_t c = 0;
    if constexpr (kPairs) {
        for (; c + 2 * L <= channels; c += 2 * L) {
            next.template fetch<P == 1>(c);
            add([c](const T* from) __attribute__((always_inline)) { return load_even(from + c); });
            add([c](const T* from) __attribute__((always_inline)) { return load_odd(from + c); });
        }
    }
    for (; !kPairs && c + L <= channels; c += L) {
        next.template fetch<P == 1>(c);
        add([c](const T* from) __attribute__((always_inline)) { return load(from + c); });
    }
    for (; c < channels; c += L) {
        const int rest = static_cast<int>(std::min<int64_t>(channels - c, L));
        add([c, rest](const T* from) __attribute__((always_inline)) { return load_between(from + c, 0, rest); });
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

template <class T>
struct GradMasksNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;

    static constexpr Result kResult = Result::kGradMasks;

    const Problem& p;
    const Array& grad_masks;
    const int64_t up = p.factor.up, taps = p.taps();
    // Logits that a crop leaves no output for have a gradient too, 0.
    const MaskTiles<A> masks{p, p.from_logits ? up : std::min(up, p.out_w)};
    const Phases rows{p.factor, up};
    const Phases columns{p.factor, masks.phases};
    const int64_t cell_rows = p.from_logits ? grad_masks.h : ceil_div(p.out_h, up);
    const int64_t cells = p.from_logits ? grad_masks.w : ceil_div(p.out_w, up);
    const int64_t channels = p.features.c / p.groups;

    // Where channels of the result are adjacent, sums are in their order; else in that of a tile.
    const bool as_masks = !p.from_logits && grad_masks.stride_c == 1;
    const bool as_logits = p.from_logits && grad_masks.stride_c == 1 && p.logits.stride_c == 1 &&
                           CellMasks<A>::fits(up * up);
    const Order order = as_logits  ? Order{up, 1, up * up}
                        : as_masks ? Order{masks.phases * taps, taps, 1}
                                   : masks.order(1);
    const CellMasks<A> cell_masks{p.normalizer, static_cast<int>(taps * up * up), static_cast<int>(up * up)};
    const int64_t sums_of_cell = up * masks.phases * taps;
    const int64_t line_size = ceil_div(sums_of_cell, L) * L;

    const int64_t sums_size = line_size * L, tile_size = line_size * L;
    const int64_t scratch_size = sums_size + 4 * tile_size;
    const int64_t items = grad_masks.n * p.groups * cell_rows;

    struct Item {
        int64_t n, group, cell_row;
        Rows rows;
        A* sums;
    };

    void run_item(int64_t item, A* scratch) const {
        Item at;
        at.cell_row = item % cell_rows;
        at.group = item / cell_rows % p.groups;
        at.n = item / cell_rows / p.groups;
        at.rows = {at.cell_row * up, (at.cell_row + 1) * up};
        if (!p.from_logits) at.rows.end = std::min(at.rows.end, p.out_h);
        at.sums = scratch;
        A* const lines = at.sums + sums_size;
        std::fill(at.sums + sums_of_cell * L, at.sums + sums_size, A{0});
        for (int64_t cell = 0; cell < cells; cell += L) {
            const int count = static_cast<int>(std::min<int64_t>(L, cells - cell));
            for (int q = 0; q < count; q++) {
                A* const line = lines + q * line_size;
                contract_cell(at, cell + q, line);
                if (as_masks) masks.store_cell(at.n, at.group, at.rows, cell + q, line, grad_masks);
            }
            if (as_logits) write_logits(at, cell, count, lines, lines + tile_size);
            if (!as_logits && !as_masks) write_tile(at, cell, count, lines, lines + tile_size, tile_size);
        }
    }

    // line = the gradient of the masks of one cell.
    void contract_cell(const Item& at, int64_t cell, A* line) const {
        PixelsBelow<T> below = pixels_below(at, cell);
        if (!is_inner(at.cell_row, cell)) std::fill(at.sums, at.sums + sums_of_cell * L, A{0});
        for (int r = 0; r < rows.count; r++) {
            for (int q = 0; q < columns.count; q++) contract_window(at, cell, rows.groups[r], columns.groups[q], below);
        }
        for (int64_t k = 0; k < line_size; k += L) {
            Vector<A> partial[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) partial[i] = load(at.sums + (k + i) * L);
            store(sums_of_lanes<A>(partial), line + k);
        }
    }

    PixelsBelow<T> pixels_below(const Item& at, int64_t cell) const {
        PixelsBelow<T> below;
        if (up >= p.factor.down) return below;
        const int64_t down = p.factor.down, most = std::min<int64_t>(down, kMaxFactor);
        const int64_t last = (at.cell_row + 1) * down + rows.groups[rows.count - 1].offset + p.radius();
        for (int64_t row = last + 1 - most; row < std::min(last + 1, p.features.h); row++) {
            for (int64_t column = cell * down; column < std::min(cell * down + most, p.features.w); column++)
                below.pixels[below.count++] = element<const T>(p.features, at.n, at.group * channels, row, column);
        }
        return below;
    }

    // Whether all outputs of a cell are there, and all their windows inside the borders, so that every sum is written.
    bool is_inner(int64_t cell_row, int64_t cell) const {
        const int64_t r = p.radius(), i = cell_row * p.factor.down, j = cell * p.factor.down;
        return masks.phases == up && (cell_row + 1) * up <= p.out_h && (cell + 1) * up <= p.out_w && i >= r && j >= r &&
               i + rows.groups[rows.count - 1].offset + r < p.features.h &&
               j + columns.groups[columns.count - 1].offset + r < p.features.w;
    }

    // Lines in the order of the result. `staged` is room for as many.
    void write_logits(const Item& at, int64_t cell, int count, A* lines, A* staged) const {
        const CellAt first{at.n, at.group * taps * up * up, at.cell_row, cell};
        cell_masks.normalize(p.logits, first, count, staged);
        cell_masks.normalize_backward(p.logits, first, count, staged, lines);
        for (int q = 0; q < count; q++) masks.clear_cropped(at.rows, cell + q, 1, order, lines + q * line_size);
        cell_masks.write(lines, grad_masks, first, count);
    }

    // Lines in the order of a tile, through one.
    void write_tile(const Item& at, int64_t cell, int count, const A* lines, A* tile, int64_t tile_size) const {
        load_channels<A>(lines, line_size, count, static_cast<int>((at.rows.end - at.rows.begin) * masks.row_size(1)),
                         adjacent_places(tile, L));
        if (p.from_logits) {
            A *const logits = tile + tile_size, *const staged = tile + 2 * tile_size;
            masks.load_rows(p.logits, at.n, at.group, at.rows, cell, count, L, logits);
            for (int64_t row = 0; row < up; row++)
                masks.normalize_row_backward(tile + row * masks.row_size(L), logits + row * masks.row_size(L), staged,
                                             L);
            masks.clear_cropped(at.rows, cell, L, masks.order(L), tile);
        }
        masks.store_rows(at.n, at.group, at.rows, cell, count, L, tile, grad_masks);
    }

    // The outputs of one cell that read the same window.
    void contract_window(const Item& at, int64_t cell, Phases::Group r, Phases::Group q, PixelsBelow<T>& below) const {
        const PixelWindow<const T> window = window_of<const T>(p, p.features, at.n, at.group * channels,
                                                               at.cell_row * p.factor.down + r.offset,
                                                               cell * p.factor.down + q.offset);
        Outputs<T> outputs;
        for (int64_t row = r.begin; row < std::min<int64_t>(r.end, p.out_h - at.cell_row * up); row++) {
            for (int64_t phase = q.begin; phase < std::min<int64_t>(q.end, p.out_w - cell * up); phase++) {
                outputs.grads[outputs.count] = element<const T>(p.grad_output, at.n, at.group * channels,
                                                                at.cell_row * up + row, cell * up + phase);
                outputs.sums[outputs.count++] = at.sums + (row * order.row_step + phase * order.phase_step) * L;
            }
        }
        int first = 0;
        for (; first + 4 <= outputs.count; first += 4) contract_rows<4>(window, outputs, first, below);
        for (; first + 2 <= outputs.count; first += 2) contract_rows<2>(window, outputs, first, below);
        if (first < outputs.count) contract_rows<1>(window, outputs, first, below);
    }

    // At most `most` of what is left, which two parts share evenly.
    static int part_of(int left, int most) {
        return left > most && left < 2 * most ? (left + 1) / 2 : std::min(most, left);
    }

    // All taps of a window, as many rows and columns at a time as there are registers for.
    template <int P>
    void contract_rows(const PixelWindow<const T>& window, const Outputs<T>& outputs, int first,
                       PixelsBelow<T>& below) const {
        constexpr int kColumns = std::min(5, kMostSums / P), kRows = std::min(3, kMostSums / P / kColumns);
        const int64_t tap_step = order.tap_step * L, k = p.kernel_size;
        for (int a = window.a_begin; a < window.a_end;) {
            const int na = part_of(window.a_end - a, kRows);
            for (int b = window.b_begin; b < window.b_end;) {
                const int nb = part_of(window.b_end - b, kColumns);
                A* sums[P];
                for (int o = 0; o < P; o++) sums[o] = outputs.sums[first + o] + (a * k + b) * tap_step;
                const T* const right = window.pixel(a, b + nb);
                const Next<T> next{outputs.grads[first + a % P] + up * p.grad_output.stride_w, below.take(right),
                                   below.take(right)};
                with_count<kRows>(na, [&](auto rows_here) {
                    with_count<kColumns>(nb, [&](auto columns_here) {
                        contract<P, rows_here(), columns_here()>(outputs.grads + first, window.pixel(a, b),
                                                                 window.row_stride, window.pixel_stride, channels, sums,
                                                                 k * tap_step, tap_step, next);
                    });
                });
                b += nb;
            }
            a += na;
        }
    }
};

}  // namespace

void grad_masks_nhwc(const Problem& problem, const Array& grad_masks) { run<GradMasksNhwc>(problem, grad_masks); }

void grad_masks_any(const Problem& problem, const Array& grad_masks) {
    run_on_images<GradMasksNhwc>(problem, grad_masks);
}

}  // namespace carafepp::CARAFEPP_ISA
