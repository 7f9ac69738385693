// SPDX-License-Identifier: Apache-2.0
//
// The forward of groups of one channel, with adjacent channels, compiled once for each instruction set. Masks are
// nearly all that it reads.
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
    // Vectors of taps are transposed in registers.
    const bool in_place = std::is_same_v<T, A> && !p.from_logits && p.masks.dtype == p.features.dtype &&
                          cells.taps >= L;

    // One row of cells.
    void run_item(int64_t item, A* tile) const {
        const int64_t n = item / cells.rows, row = item % cells.rows;
        PixelWindow<const T> windows[kMaxFactor * kMaxFactor];  // of channel 0
        int64_t tap_offsets[kMaxKernelSize * kMaxKernelSize];
        for (int64_t t = 0; t < cells.taps && in_place; t++)
            tap_offsets[t] = t / p.kernel_size * p.features.stride_h + t % p.kernel_size * p.features.stride_w;
        for (int64_t column = 0; column < cells.columns; column++) {
            cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                windows[o] = window_of<const T>(p, p.features, n, 0, p.factor.source(i), p.factor.source(j));
            });
            cells.for_each_vector([&](int first, int count, auto tail) {
                if constexpr (std::is_same_v<T, A> && !tail()) {
                    if (in_place && windows[0].taps() == cells.taps) {
                        const T* const masks = element<const T>(p.masks, n, first * cells.taps, row, column);
                        store(sum_in_place(masks, windows[0].corner + first, tap_offsets),
                              element<T>(output, n, first, row, column));
                        return;
                    }
                }
                cells.stage(n, row, column, first, count, tile);
                cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                    const Vector<A> sum = sum_over_taps<tail()>(windows[o], first, count, tile + o * L);
                    store_some<tail()>(sum, element<T>(output, n, first, i, j), count);
                });
            });
        }
    }

    // `masks` are those of the first channel. The processor alone does not prefetch them in time.
    CARAFEPP_MEMBER Vector<A> sum_in_place(const A* masks, const A* pixel, const int64_t* tap_offsets) const {
        constexpr int64_t kAhead = 16384 / sizeof(A), kLine = 64 / sizeof(A);
        const int64_t taps = cells.taps;
        Vector<A> sums[2] = {};  // two dependency chains, to hide latency
        int64_t t = 0;
        for (; t + L <= taps; t += L) {
            Vector<A> rows[L];
#pragma GCC unroll 16
            for (int i = 0; i < L * L; i += kLine) __builtin_prefetch(masks + kAhead + t * L + i);
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) rows[i] = load(masks + i * taps + t);
            transpose<A>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) sums[i % 2] += rows[i] * load(pixel + tap_offsets[t + i]);
        }
        if (t + 1 == taps) {
            Vector<A> last;
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) last[i] = masks[i * taps + t];
            sums[0] += last * load(pixel + tap_offsets[t]);
        } else if (t < taps) {
            A block[L * L];
            transpose_block(masks + taps - L, taps, block, L);
            for (; t < taps; t++) sums[0] += load(block + (t - taps + L) * L) * load(pixel + tap_offsets[t]);
        }
        return sums[0] + sums[1];
    }

    template <bool kTail>
    CARAFEPP_MEMBER Vector<A> sum_over_taps(const PixelWindow<const T>& window, int first, int count,
                                            const A* masks) const {
        const int64_t step = cells.outputs * L, pixel_stride = window.pixel_stride;
        Vector<A> sums[2] = {};  // two dependency chains, to hide latency
        for (int a = window.a_begin; a < window.a_end; a++) {
            const T* pixel = window.pixel(a, window.b_begin) + first;
            const A* mask = masks + (a * p.kernel_size + window.b_begin) * step;
            int left = window.b_end - window.b_begin;
            for (; left > 1; left -= 2, pixel += 2 * pixel_stride, mask += 2 * step) {
                sums[0] += load(mask) * load_some<kTail>(pixel, count);
                sums[1] += load(mask + step) * load_some<kTail>(pixel + pixel_stride, count);
            }
            if (left > 0) sums[0] += load(mask) * load_some<kTail>(pixel, count);
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
