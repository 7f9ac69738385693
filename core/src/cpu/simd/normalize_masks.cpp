// SPDX-License-Identifier: Apache-2.0
//
// Masks from logits, and the gradient of masks to that of logits, in any layout, compiled once for each instruction
// set. For each tile, all rows of outputs of its cells: load, normalise, store.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr double kCostOfElement = 1;  // in multiply-adds

template <class A>
struct NormalizeMasks {
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const int64_t phases;
    const MaskTiles<A> logits{p, phases, true}, masks{p, phases, false};
    const int64_t up = p.factor.up;
    const int64_t row_size = logits.row_size(L), tile_size = up * row_size;

    void forward(const Array& result) const {
        for_each_tile(ceil_div(p.out_h, up), ceil_div(p.out_w, up), [&](const Tile& at, A* tile) {
            const Rows rows{at.rows.begin, std::min(at.rows.end, p.out_h)};
            logits.stage(at.n, at.group, rows, at.cell, at.count, L, tile);
            masks.store_rows(at.n, at.group, rows, at.cell, at.count, L, tile, result);
        });
    }

    void backward(const Array& grad_logits) const {
        for_each_tile(p.logits.h, p.logits.w, [&](const Tile& at, A* grad) {
            const Rows rows{at.rows.begin, std::min(at.rows.end, p.out_h)};
            A* const staged = grad + tile_size;
            logits.load_rows(p.logits, at.n, at.group, at.rows, at.cell, at.count, L, staged);
            masks.load_rows(p.grad_masks, at.n, at.group, rows, at.cell, at.count, L, grad);
            for (int64_t row = 0; row < rows.end - rows.begin; row++) {
                logits.normalize_row_backward(grad + row * row_size, staged + row * row_size, grad + 2 * tile_size, L);
            }
            logits.clear_cropped(at.rows, at.cell, L, logits.order(L), grad);
            logits.store_rows(at.n, at.group, at.rows, at.cell, at.count, L, grad, grad_logits);
        });
    }

    // `count` cells of one row of cells, and its rows of outputs, cropped ones included.
    struct Tile {
        int64_t n, group, cell;
        Rows rows;
        int count;
    };

    template <class F>
    void for_each_tile(int64_t cell_rows, int64_t cells, const F& f) const {
        const int64_t items = p.logits.n * p.groups * cell_rows;
        const int64_t scratch_size = 2 * tile_size + row_size;
        const double elements = static_cast<double>(items * cells) * static_cast<double>(tile_size / L);
        const int threads = threads_for(items, kCostOfElement * elements);
        A* const scratch = static_cast<A*>(scratch_bytes(threads * scratch_size * int64_t{sizeof(A)}));
        parallel_for(items, threads, [&](int64_t item, int worker) noexcept {
            Tile at;
            at.rows.begin = item % cell_rows * up;
            at.rows.end = at.rows.begin + up;
            at.group = item / cell_rows % p.groups;
            at.n = item / cell_rows / p.groups;
            for (at.cell = 0; at.cell < cells; at.cell += L) {
                at.count = static_cast<int>(std::min<int64_t>(L, cells - at.cell));
                f(at, scratch + worker * scratch_size);
            }
        });
    }
};

}  // namespace

void normalize_masks(const Problem& problem, const Array& masks) {
    with_accumulator(problem.logits.dtype, [&](auto sums) {
        NormalizeMasks<typename decltype(sums)::type>{problem, std::min(problem.factor.up, problem.out_w)}.forward(
            masks);
    });
}

void normalize_masks_backward(const Problem& problem, const Array& grad_logits) {
    with_accumulator(problem.logits.dtype, [&](auto sums) {
        NormalizeMasks<typename decltype(sums)::type>{problem, problem.factor.up}.backward(grad_logits);
    });
}

}  // namespace carafepp::CARAFEPP_ISA
