// SPDX-License-Identifier: Apache-2.0
//
// The forward of groups of one channel, with adjacent channels, compiled once for each instruction set. Masks are
// nearly all that it reads. It transposes masks of float in registers, others in a tile.
#include "cpu/simd/few_nhwc.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

template <class T>
struct ReassembleFewNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& output;
    const ChannelCells<A> cells{p, false};
    const int64_t items = output.n * cells.rows, scratch_size = cells.tile_size;

    // One row of cells.
    void run_item(int64_t item, A* tile) const {
        const int64_t n = item / cells.rows, row = item % cells.rows;
        if constexpr (std::is_same_v<T, float>) {
            if (!p.from_logits && p.masks.dtype == CARAFEPP_FLOAT32 && p.groups >= L && cells.taps >= L)
                return transpose_in_registers(n, row);
        }
        PixelWindow<const T> windows[kMaxFactor * kMaxFactor];  // of channel 0
        for (int64_t column = 0; column < cells.columns; column++) {
            cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                windows[o] = window_of<const T>(p, p.features, n, 0, p.factor.source(i), p.factor.source(j));
            });
            cells.for_each_vector([&](int first, int count) {
                cells.stage(n, row, column, first, count, tile);
                cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                    const Vector<A> sum = count == L ? sum_over_taps<false>(windows[o], first, count, tile + o * L)
                                                     : sum_over_taps<true>(windows[o], first, count, tile + o * L);
                    store_part(sum, element<T>(output, n, first, i, j), count);
                });
            });
        }
    }

    // ---- masks of float: no tile ----

    static constexpr int64_t kOutside = INT64_MIN;

    void transpose_in_registers(int64_t n, int64_t i) const {
        int64_t tap_offsets[kMaxKernelSize * kMaxKernelSize];
        PixelWindow<const T> last = {};
        for (int64_t j = 0; j < p.out_w; j++) {
            const auto window = window_of<const T>(p, p.features, n, 0, p.factor.source(i), p.factor.source(j));
            if (j == 0 || window.b_begin != last.b_begin || window.b_end != last.b_end) find_taps(window, tap_offsets);
            last = window;
            const bool inside = window.taps() == cells.taps;
            const T* const masks = element<const T>(p.masks, n, 0, i, j);
            T* const to = element<T>(output, n, 0, i, j);
            for_each_block<L>(static_cast<int>(p.groups), [&](int first, int) __attribute__((always_inline)) {
                const A* const of_channels = masks + first * cells.taps;
                const T* const pixel = window.corner + first;
                store(inside ? sum_over_taps<true>(of_channels, pixel, tap_offsets)
                             : sum_over_taps<false>(of_channels, pixel, tap_offsets),
                      to + first);
            });
        }
    }

    void find_taps(const PixelWindow<const T>& window, int64_t* offsets) const {
        std::fill_n(offsets, cells.taps, kOutside);
        for (int a = window.a_begin; a < window.a_end; a++) {
            for (int b = window.b_begin; b < window.b_end; b++)
                offsets[a * p.kernel_size + b] = window.pixel(a, b) - window.corner;
        }
    }

    // `masks` are those of the first channel. The processor alone does not prefetch them in time.
    template <bool kInside>
    CARAFEPP_MEMBER Vector<A> sum_over_taps(const A* masks, const A* pixel, const int64_t* tap_offsets) const {
        constexpr int64_t kAhead = 16384 / sizeof(A), kLine = 64 / sizeof(A);
        const int64_t taps = cells.taps;
        Vector<A> sums[2] = {};  // two dependency chains, to hide latency
        const auto add_tap = [&](Vector<A> mask, int64_t t, int chain) __attribute__((always_inline)) {
            if (kInside || tap_offsets[t] != kOutside) sums[chain] += mask * load(pixel + tap_offsets[t]);
        };
        int64_t t = 0;
        for (; t + L <= taps; t += L) {
            Vector<A> rows[L];
#pragma GCC unroll 16
            for (int i = 0; i < L * L; i += kLine) __builtin_prefetch(masks + kAhead + t * L + i, 0, 2);
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) rows[i] = load(masks + i * taps + t);
            transpose<A>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) add_tap(rows[i], t + i, i % 2);
        }
        if (t + 1 == taps) {
            Vector<A> mask;
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) mask[i] = masks[i * taps + t];
            add_tap(mask, t, 0);
        } else if (t < taps) {
            A block[L * L];
            transpose_block(masks + taps - L, taps, block, L);
            for (; t < taps; t++) add_tap(load(block + (t - taps + L) * L), t, 0);
        }
        return sums[0] + sums[1];
    }

    // ---- a tile: masks of other types, or normalised logits ----

    template <bool kTail>
    CARAFEPP_MEMBER Vector<A> sum_over_taps(const PixelWindow<const T>& window, int first, int count,
                                            const A* masks) const {
        const int64_t step = cells.outputs * L, pixel_stride = window.pixel_stride;
        Vector<A> sums[2] = {}, channels[1];  // two dependency chains, to hide latency
        for (int a = window.a_begin; a < window.a_end; a++) {
            const T* pixel = window.pixel(a, window.b_begin) + first;
            const A* mask = masks + (a * p.kernel_size + window.b_begin) * step;
            const auto add_tap = [&](int chain) __attribute__((always_inline)) {
                read_channels<1, kTail>(pixel, count, channels);
                sums[chain] += load(mask) * channels[0];
                pixel += pixel_stride;
                mask += step;
            };
            int left = window.b_end - window.b_begin;
            for (; left > 1; left -= 2) {
                add_tap(0);
                add_tap(1);
            }
            if (left > 0) add_tap(0);
        }
        return sums[0] + sums[1];
    }
};

}  // namespace

void reassemble_few_nhwc(const Problem& problem, const Array& output) {
    if (phases_in_lanes(problem)) return phases_nhwc(problem, output, kReassembleWithLogits);
    run_kernel<ReassembleFewNhwc>(problem, output);
}

}  // namespace carafepp::CARAFEPP_ISA
