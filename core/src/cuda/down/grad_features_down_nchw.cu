// SPDX-License-Identifier: Apache-2.0
// The gradient of features in downsampling with adjacent columns, where windows overlap little. A thread has a unit,
// 2 x 4 sources, in some channels. Two rows and three columns of outputs touch them. It keeps the masks that lead to
// its sources in registers through all channels, 0 where a source is outside a window. Such a zero makes NaN of an
// infinite gradient. Sums that are not finite are computed again, tap by tap.
#include "cuda/down/grad_features_down.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = 2, kColumns = 4;              // sources of a unit
constexpr int kOutputRows = 2, kOutputColumns = 3;  // that touch it

struct DownNchwPlan {
    static constexpr int kBlocks = 2;  // of a multiprocessor

    Outputs rows, columns;
    int slice;    // channels at once: of the threads of a unit
    Tiles tiles;  // of units
    int output_rows;
    Divisor outputs;  // in a row of those around a tile
    bool whole;       // four columns are stored at once
    int64_t cost_of_slice, cost_of_tile;

    DownNchwPlan(const Problem& p, const Array& grad_features, int rows_of_tile)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          slice(kThreads / (rows_of_tile * columns_of_tile(p))),
          tiles(p, ceil_div(p.features.h, kRows), ceil_div(p.features.w, kColumns), rows_of_tile, columns_of_tile(p),
                slice, 0),
          output_rows(rows.most(rows_of_tile * kRows + static_cast<int>(p.kernel_size) - 1)),
          outputs(std::max(columns.most(tiles.columns * kColumns + static_cast<int>(p.kernel_size) - 1), 1)),
          whole(not_for_columns(grad_features, kColumns) == nullptr),
          cost_of_slice(90 * ceil_div(rows_of_tile * tiles.columns * slice, 32)),
          cost_of_tile(1000 * (kThreads / 32) + cost_to_stage(output_rows * outputs.number)) {}

private:
    static int columns_of_tile(const Problem& p) {
        constexpr int kMost = 16;
        return even_part(ceil_div(p.features.w, kColumns), kMost);
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, DownNchwPlan::kBlocks)
    grad_features_down_nchw_kernel(Arguments arguments, DownNchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const int k = static_cast<int>(p.kernel_size), radius = k / 2;
    float* const masks = shared_memory<float>();  // [output][tap]
    const int units = plan.tiles.rows * plan.tiles.columns, sharers = plan.slice;
    const int thread = static_cast<int>(threadIdx.x), sharer = thread / units, unit = thread - sharer * units;
    const int unit_row = unit / plan.tiles.columns, unit_column = unit - unit_row * plan.tiles.columns;
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int top = plan.rows.first(tile.top * kRows - radius),
                  left = plan.columns.first(tile.left * kColumns - radius);
        stage_masks_around<T>(p, tile.n, tile.group, top, left, plan.output_rows, plan.outputs, masks);
        const int i = (tile.top + unit_row) * kRows, j = (tile.left + unit_column) * kColumns;
        if (sharer >= sharers || i >= grad_features.h || j >= grad_features.w) continue;
        // Outputs from here on exist, and all that touch the unit are among them.
        const int out_i = min(plan.rows.first(i - radius), static_cast<int>(p.out_h) - kOutputRows),
                  out_j = min(plan.columns.first(j - radius), static_cast<int>(p.out_w) - kOutputColumns);
        float weights[kOutputRows][kOutputColumns][kRows][kColumns];
#pragma unroll
        for (int y = 0; y < kOutputRows; y++) {
            const int a = i - plan.rows.source(out_i + y) + radius;
#pragma unroll
            for (int x = 0; x < kOutputColumns; x++) {
                const int b = j - plan.columns.source(out_j + x) + radius;
                const float* const of_output = masks +
                                               ((out_i + y - top) * plan.outputs.number + out_j + x - left) * k * k;
#pragma unroll
                for (int s = 0; s < kRows * kColumns; s++) {
                    const int row = a + s / kColumns, column = b + s % kColumns;
                    const bool inside = row >= 0 && row < k && column >= 0 && column < k;
                    weights[y][x][s / kColumns][s % kColumns] = inside ? of_output[row * k + column] : 0;
                }
            }
        }
        const int rows = static_cast<int>(min(grad_features.h - i, int64_t{kRows})),
                  columns = static_cast<int>(min(grad_features.w - j, int64_t{kColumns}));
        const T* from = element<const T>(p.grad_output, tile.n, tile.c + sharer, out_i, out_j);
        T* const first = element<T>(grad_features, tile.n, tile.c + sharer, i, j);
        const int64_t step = sharers * grad_features.stride_c;
        float zeros = 0;  // while all sums are finite
        const auto contract = [&](auto whole) __attribute__((always_inline)) {
            T* to = first;
#pragma unroll 1
            for (int c = sharer; c < tile.channels; c += sharers) {
                float sums[kRows][kColumns] = {};
#pragma unroll
                for (int y = 0; y < kOutputRows; y++) {
#pragma unroll
                    for (int x = 0; x < kOutputColumns; x++) {
                        const float grad = widen(load_input(from + y * p.grad_output.stride_h + x));
#pragma unroll
                        for (int s = 0; s < kRows * kColumns; s++)
                            sums[s / kColumns][s % kColumns] += weights[y][x][s / kColumns][s % kColumns] * grad;
                    }
                }
                zeros += sums[0][0] * 0;  // a gradient that is not finite spoils all sums
#pragma unroll
                for (int y = 0; y < kRows; y++) {
                    if (y < rows)
                        store_row<decltype(whole)::value>(sums[y], columns, 1, to + y * grad_features.stride_h);
                }
                from += sharers * p.grad_output.stride_c, to += step;
            }
        };
        if (plan.whole) {
            contract(std::true_type());
        } else {
            contract(std::false_type());
        }
        if (zeros == 0) continue;
        T* to = first;
#pragma unroll 1
        for (int c = sharer; c < tile.channels; c += sharers, to += step) {
#pragma unroll 1
            for (int s = 0; s < rows * kColumns; s++) {
                const int y = s / kColumns, x = s % kColumns;
                T* const stored = to + y * grad_features.stride_h + x;
                if (x < columns && !(fabsf(widen(*stored)) < INFINITY)) {
                    *stored = narrow<T>(feature_tap_by_tap<T>(p, plan.rows, plan.columns, tile.n, tile.group,
                                                              tile.c + c, i + y, j + x));
                }
            }
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_down_nchw(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_grad_features_down(p)) return reason;
    if (p.out_h < kOutputRows || p.out_w < kOutputColumns) return "there are few outputs";
    if (p.grad_output.stride_w != 1 || grad_features.stride_w != 1) return "columns are not adjacent";
    return nullptr;
}

void grad_features_down_nchw(const Problem& p, const Array& grad_features) {
    const auto plan = with_best_rows([&](int rows) { return DownNchwPlan(p, grad_features, rows); });
    const auto kernel = grad_features.dtype == CARAFEPP_FLOAT32   ? grad_features_down_nchw_kernel<float>
                        : grad_features.dtype == CARAFEPP_FLOAT16 ? grad_features_down_nchw_kernel<Float16>
                                                                  : grad_features_down_nchw_kernel<BFloat16>;
    launch(kernel, plan.tiles.items, kThreads,
           plan.output_rows * plan.outputs.number * p.taps() * int64_t{sizeof(float)}, p, grad_features, plan);
}

}  // namespace carafepp::cuda
