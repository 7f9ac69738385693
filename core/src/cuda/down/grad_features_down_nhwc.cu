// SPDX-License-Identifier: Apache-2.0
// The gradient of features in downsampling with adjacent channels, where windows overlap little. The sources between
// four outputs are a cell: no other outputs touch them. A thread has some channels of a cell.
#include "cuda/down/grad_features_down.h"

namespace carafepp::cuda {
namespace {

template <class T>
constexpr int kOwn = kVectorsOfWords<T> * kVector;  // channels of a thread
inline int own_channels(const Problem& p) { return static_cast<int>(sizeof(uint4) / itemsize(p.features.dtype)); }

// Numbers that are computed here and kept: compilers widen 16 bits wherever they multiply, to save registers.
__device__ __forceinline__ void keep([[maybe_unused]] float4& values) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+f"(values.x), "+f"(values.y), "+f"(values.z), "+f"(values.w));
#endif
}

// Cell y of an axis is between outputs y - 1 and y, and has the centre of the first one. The first cell that has
// sources, and how many have.
inline int first_cell(int64_t offset) { return offset > 0 ? 0 : 1; }
inline int64_t cells_of(int64_t sources, int64_t offset, int64_t down) {
    return floor_div(sources - 1 - offset, down) + 2 - first_cell(offset);
}

struct DownNhwcPlan {
    static constexpr int kMostColumns = 32, kMostLanes = 8;  // cells in a row of a tile; lanes that store a line
    static constexpr int kMostDown = 16;                     // a thread stores all sources of a cell
    static constexpr int kBlocks = 3;                        // of a multiprocessor

    Outputs rows, columns;
    int first_row, first_column;  // cells
    int lanes;                    // threads of a cell
    int slice;                    // their channels
    Tiles tiles;                  // of cells
    Divisor cells, outputs;       // in a row of a tile
    int64_t cost_of_slice, cost_of_tile;

    DownNhwcPlan(const Problem& p, int rows_of_tile)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          first_row(first_cell(p.offset_h)),
          first_column(first_cell(p.offset_w)),
          lanes(lanes_of(p)),
          slice(lanes * own_channels(p)),
          tiles(tiles_of(p, rows_of_tile)),
          cells(tiles.columns),
          outputs(tiles.columns + 1) {
        const int64_t warps = ceil_div(rows_of_tile * tiles.columns * lanes, 32);
        cost_of_slice = warps * (60 + 60 * p.factor.down * p.factor.down);
        cost_of_tile = warps * 150 + 300 * (kThreads / 32) + cost_to_stage((rows_of_tile + 1) * outputs.number);
    }

private:
    static int lanes_of(const Problem& p) {
        int lanes = 1;
        while (lanes < kMostLanes && lanes * own_channels(p) < p.features.c / p.groups) lanes *= 2;
        return lanes;
    }
    Tiles tiles_of(const Problem& p, int rows_of_tile) const {
        const int64_t height = cells_of(p.features.h, p.offset_h, p.factor.down),
                      width = cells_of(p.features.w, p.offset_w, p.factor.down);
        return {p, height, width, rows_of_tile, even_part(width, kMostColumns), slice, 0};
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, DownNhwcPlan::kBlocks)
    grad_features_down_nhwc_kernel(Arguments arguments, DownNhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    constexpr int kVectors = kVectorsOfWords<T>;
    const int k = static_cast<int>(p.kernel_size), radius = k / 2, taps = k * k;
    const int down = static_cast<int>(plan.rows.down);
    // From a mask of a source to those of the outputs on its right and below: the same tap is that of another source.
    const int right = taps - down, below = plan.outputs.number * taps - down * k;
    float* const masks = shared_memory<float>();  // [output][tap]
    const int thread = static_cast<int>(threadIdx.x), channel = thread % plan.lanes * kOwn<T>;
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int top = tile.top + plan.first_row - 1, left = tile.left + plan.first_column - 1;  // the first outputs
        stage_masks_around<T>(p, tile.n, tile.group, top, left, plan.tiles.rows + 1, plan.outputs, masks);
#pragma unroll 1
        for (int cell = thread / plan.lanes; cell < plan.tiles.rows * plan.cells.number;
             cell += kThreads / plan.lanes) {
            const int y = plan.cells.quotient(cell), x = cell - y * plan.cells.number;
            const int i = (top + y) * down + plan.rows.offset, j = (left + x) * down + plan.columns.offset;
            const int first_row = max(-i, 0), end_row = min(down, static_cast<int>(grad_features.h) - i),
                      first_column = max(-j, 0), end_column = min(down, static_cast<int>(grad_features.w) - j);
            if (first_column >= end_column) continue;
            const bool has_upper = top + y >= 0 && top + y < p.out_h, has_lower = top + y + 1 < p.out_h,
                       has_left = left + x >= 0 && left + x < p.out_w, has_right = left + x + 1 < p.out_w;
            const float* const masks_of_cell = masks + (y * plan.outputs.number + x) * taps + radius * k + radius;
            const T* from = element<const T>(p.grad_output, tile.n, tile.c + channel, top + y, left + x);
            T* to = element<T>(grad_features, tile.n, tile.c + channel, i + first_row, j + first_column);
#pragma unroll 1
            for (int c = channel; c < tile.channels; c += plan.lanes * kOwn<T>) {
                const auto load = [&](const T* at, bool exists) __attribute__((always_inline)) {
                    return exists ? __ldg(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
                };
                const T* const lower = from + p.grad_output.stride_h;
                const uint4 loaded[] = {
                    load(from, has_upper && has_left), load(from + p.grad_output.stride_w, has_upper && has_right),
                    load(lower, has_lower && has_left), load(lower + p.grad_output.stride_w, has_lower && has_right)};
                float4 grads[4][kVectors];
#pragma unroll
                for (int output = 0; output < 4; output++) {
                    widen_words<T>(loaded[output], grads[output]);
#pragma unroll
                    for (float4& grad : grads[output]) keep(grad);
                }
                T* row = to;
#pragma unroll 1
                for (int a = first_row; a < end_row; a++, row += grad_features.stride_h) {
                    const bool of_upper = a <= radius, of_lower = down - a <= radius;
                    const float* masks_of_source = masks_of_cell + a * k + first_column;
                    T* source = row;
#pragma unroll 1
                    for (int b = first_column; b < end_column;
                         b++, masks_of_source++, source += grad_features.stride_w) {
                        float4 sums[kVectors] = {};
                        const auto add = [&](int output, int mask) __attribute__((always_inline)) {
#pragma unroll
                            for (int v = 0; v < kVectors; v++)
                                add_products(masks_of_source[mask], grads[output][v], sums[v]);
                        };
                        if (b <= radius) {
                            if (of_upper) add(0, 0);
                            if (of_lower) add(2, below);
                        }
                        if (down - b <= radius) {
                            if (of_upper) add(1, right);
                            if (of_lower) add(3, below + right);
                        }
                        store_words(sums, source);
                    }
                }
                from += plan.lanes * kOwn<T>, to += plan.lanes * kOwn<T>;
            }
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_down_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_grad_features_down(p)) return reason;
    if (p.factor.down > DownNhwcPlan::kMostDown) return "the factor is less than 1/16";
    if (const char* reason = not_for_vectors(p, p.grad_output, own_channels(p))) return reason;
    return not_for_vectors(p, grad_features, own_channels(p));
}

void grad_features_down_nhwc(const Problem& p, const Array& grad_features) {
    const auto plan = with_best_rows([&](int rows) { return DownNhwcPlan(p, rows); });
    const auto kernel = grad_features.dtype == CARAFEPP_FLOAT32   ? grad_features_down_nhwc_kernel<float>
                        : grad_features.dtype == CARAFEPP_FLOAT16 ? grad_features_down_nhwc_kernel<Float16>
                                                                  : grad_features_down_nhwc_kernel<BFloat16>;
    launch(kernel, plan.tiles.items, kThreads,
           (plan.tiles.rows + 1) * plan.outputs.number * p.taps() * int64_t{sizeof(float)}, p, grad_features, plan);
}

}  // namespace carafepp::cuda
