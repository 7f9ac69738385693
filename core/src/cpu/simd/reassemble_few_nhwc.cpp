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

    // One row of cells.
    void run_item(int64_t item, A* tile) const {
        const int64_t n = item / cells.rows, row = item % cells.rows;
        PixelWindow<const T> windows[kMaxFactor * kMaxFactor];  // of channel 0
        for (int64_t column = 0; column < cells.columns; column++) {
            cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                windows[o] = window_of<const T>(p, p.features, n, 0, p.factor.source(i), p.factor.source(j));
            });
            cells.for_each_vector([&](int first, int count, auto tail) {
                cells.stage(n, row, column, first, count, tile);
                cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                    const Vector<A> sum = sum_over_taps<tail()>(windows[o], first, count, tile + o * L);
                    store_some<tail()>(sum, element<T>(output, n, first, i, j), count);
                });
            });
        }
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
