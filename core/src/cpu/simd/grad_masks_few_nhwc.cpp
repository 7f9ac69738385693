// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits of groups of one channel, with adjacent channels, compiled once for each instruction
// set. Each is a product of two numbers, which the normaliser then takes back to logits.
#include "cpu/simd/few_nhwc.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

template <class T>
struct GradMasksFewNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_masks;
    const ChannelCells<A> cells{p, true};
    const int64_t items = grad_masks.n * cells.rows, scratch_size = (p.from_logits ? 3 : 1) * cells.tile_size;

    // One row of cells.
    void run_item(int64_t item, A* grads) const {
        const int64_t n = item / cells.rows, row = item % cells.rows;
        A *const masks = grads + cells.tile_size, *const logits = masks + cells.tile_size;
        PixelWindow<const T> windows[kMaxFactor * kMaxFactor];  // of channel 0
        for (int64_t column = 0; column < cells.columns; column++) {
            bool whole = true;  // every gradient has a product
            cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                windows[o] = window_of<const T>(p, p.features, n, 0, p.factor.source(i), p.factor.source(j));
                whole = whole && windows[o].taps() == cells.taps;
            });
            whole = whole && !is_cropped(row, column);
            cells.for_each_vector([&](int first, int count) {
                if (!whole) std::fill_n(grads, cells.tile_size, A{0});
                cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                    const T* const grad_output = element<const T>(p.grad_output, n, first, i, j);
                    const Vector<A> grads_of_output = load_part(grad_output, count);
                    count == L ? multiply<false>(grads_of_output, windows[o], first, count, grads + o * L)
                               : multiply<true>(grads_of_output, windows[o], first, count, grads + o * L);
                });
                if (p.from_logits) {
                    cells.load(p.logits, n, row, column, first, count, logits);
                    cells.masks.normalize_row_backward(grads, logits, masks, L);
                    if (is_cropped(row, column)) zero_cropped(row, column, grads);
                }
                cells.store(grads, n, row, column, first, count, grad_masks);
            });
        }
    }

    template <bool kTail>
    void multiply(Vector<A> grad_output, const PixelWindow<const T>& window, int first, int count, A* grads) const {
        const int64_t step = cells.outputs * L, pixel_stride = window.pixel_stride;
        for (int a = window.a_begin; a < window.a_end; a++) {
            const T* pixel = window.pixel(a, window.b_begin) + first;
            A* grad = grads + (a * p.kernel_size + window.b_begin) * step;
            Vector<A> channels[1];
            for (int left = window.b_end - window.b_begin; left > 0; left--, pixel += pixel_stride, grad += step) {
                read_channels<1, kTail>(pixel, count, channels);
                store(grad_output * channels[0], grad);
            }
        }
    }

    bool is_cropped(int64_t row, int64_t column) const {
        return (row + 1) * cells.up > p.out_h || (column + 1) * cells.up > p.out_w;
    }

    // Logits that are not finite make these gradients NaN.
    void zero_cropped(int64_t row, int64_t column, A* grads) const {
        for (int64_t o = 0; o < cells.outputs; o++) {
            if (row * cells.up + o / cells.up < p.out_h && column * cells.up + o % cells.up < p.out_w) continue;
            for (int64_t t = 0; t < cells.taps; t++) store(Vector<A>{}, grads + (t * cells.outputs + o) * L);
        }
    }
};

}  // namespace

void grad_masks_few_nhwc(const Problem& problem, const Array& grad_masks) {
    if (phases_in_lanes(problem)) return phases_nhwc(problem, grad_masks, kGradLogits);
    run_kernel<GradMasksFewNhwc>(problem, grad_masks);
}

}  // namespace carafepp::CARAFEPP_ISA
