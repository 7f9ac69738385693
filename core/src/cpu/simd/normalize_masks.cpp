// SPDX-License-Identifier: Apache-2.0
//
// Masks from logits, and the gradient of logits from that of masks, in any layout. Compiled once for each instruction
// set. First comes the plan. Each tile, all rows of outputs of its cells, is then loaded, normalised and stored.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr double kCostOfElement = 1;  // in multiply-adds

// ---- plan ----

template <class A>
struct NormalizePlan {
    static constexpr int L = kLanes<A>;

    const Problem& p;
    MaskTiles<A> logits, masks;
    int64_t cell_rows, cells;     // of a group of an image
    int64_t row_size, tile_size;  // of a row of outputs of a tile, of all its rows
    int64_t items, scratch_size;  // rows of cells; two tiles and a row
    int threads;

    NormalizePlan(const Problem& problem, int64_t phases, int64_t cell_rows, int64_t cells)
        : p(problem), logits(p, phases, true), masks(p, phases, false), cell_rows(cell_rows), cells(cells) {
        row_size = logits.row_size(L);
        tile_size = p.factor.up * row_size;
        items = p.logits.n * p.groups * cell_rows;
        scratch_size = 2 * tile_size + row_size;
        threads = threads_for(items,
                              kCostOfElement * static_cast<double>(items * cells) * static_cast<double>(tile_size / L));
    }
};

// `count` cells of one row of cells, and their rows of outputs: all, and those that a crop leaves.
struct Tile {
    int64_t n, group, cell;
    int count;
    Range rows, outputs;
};

// Calls f(tile, scratch) for all tiles.
template <class A, class F>
void for_each_tile(const NormalizePlan<A>& plan, const F& f) {
    constexpr int L = kLanes<A>;
    run_items<A>(plan.items, plan.threads, plan.scratch_size, [&](int64_t item, A* scratch) {
        Tile at;
        at.rows.begin = at.outputs.begin = item % plan.cell_rows * plan.p.factor.up;
        at.rows.end = at.rows.begin + plan.p.factor.up;
        at.outputs.end = std::min(at.rows.end, plan.p.out_h);
        at.group = item / plan.cell_rows % plan.p.groups;
        at.n = item / plan.cell_rows / plan.p.groups;
        for (at.cell = 0; at.cell < plan.cells; at.cell += L) {
            at.count = static_cast<int>(std::min<int64_t>(L, plan.cells - at.cell));
            f(at, scratch);
        }
    });
}

template <class A>
void normalize_tiles(const Problem& p, const Array& result) {
    constexpr int L = kLanes<A>;
    const int64_t up = p.factor.up;
    const NormalizePlan<A> plan(p, std::min(up, p.out_w), ceil_div(p.out_h, up), ceil_div(p.out_w, up));
    for_each_tile(plan, [&](const Tile& at, A* tile) {
        plan.logits.stage(at.n, at.group, at.outputs, at.cell, at.count, L, tile);
        plan.masks.store_rows(at.n, at.group, at.outputs, at.cell, at.count, L, tile, result);
    });
}

template <class A>
void normalize_tiles_backward(const Problem& p, const Array& grad_logits) {
    constexpr int L = kLanes<A>;
    const NormalizePlan<A> plan(p, p.factor.up, p.logits.h, p.logits.w);
    for_each_tile(plan, [&](const Tile& at, A* grad) {
        A *const logits = grad + plan.tile_size, *const masks = logits + plan.tile_size;
        plan.logits.load_rows(p.logits, at.n, at.group, at.rows, at.cell, at.count, L, logits);
        plan.masks.load_rows(p.grad_masks, at.n, at.group, at.outputs, at.cell, at.count, L, grad);
        for (int64_t row = 0; row < (at.outputs.end - at.outputs.begin) * plan.row_size; row += plan.row_size)
            plan.logits.normalize_row_backward(grad + row, logits + row, masks, L);
        plan.logits.zero_cropped_grads(at.rows, at.cell, L, plan.logits.order(L), grad);
        plan.logits.store_rows(at.n, at.group, at.rows, at.cell, at.count, L, grad, grad_logits);
    });
}

}  // namespace

void normalize_masks(const Problem& problem, const Array& masks) {
    with_accumulator(problem.logits.dtype,
                     [&](auto sums) { normalize_tiles<typename decltype(sums)::type>(problem, masks); });
}

void normalize_masks_backward(const Problem& problem, const Array& grad_logits) {
    with_accumulator(problem.logits.dtype,
                     [&](auto sums) { normalize_tiles_backward<typename decltype(sums)::type>(problem, grad_logits); });
}

}  // namespace carafepp::CARAFEPP_ISA
