// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor. A block has a tile of outputs of a group. It goes through the
// channels in slices, with features and their halo and grad_output in shared memory, four channels in a vector. A
// thread has one tap of four outputs of a row at a time, and adds what a slice gives to their sums in shared memory.
// Neighbouring threads have neighbouring taps, so grad_output serves all at once. Then the sums go through the
// normaliser, and are written in the order of memory.
#pragma once

#include "cuda/grad_tiles.h"

namespace carafepp::cuda {

constexpr int kMostVectors = 4;  // of a slice
constexpr int kQuad = 4;         // outputs of a thread

struct GradMasksTilesPlan {
    Outputs rows, columns;
    int height, columns_of_tile;    // of a tile, in outputs
    int plane_rows, plane_columns;  // of masks, or of the sub-pixels of logits
    int vectors;                    // of a slice
    int depth;                      // vectors from pixel to pixel: odd, as pixels begin in other banks then
    int halo_rows;
    Divisor halo_columns, width, quads, taps, kernel_size;
    int outputs;  // room for those of a tile: odd, as taps begin in other banks then
    int64_t row_tiles, column_tiles, items;
    int64_t shared_bytes;

    explicit GradMasksTilesPlan(const Problem& p)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          halo_columns(1),
          width(1),
          quads(1),
          taps(static_cast<int>(p.taps())),
          kernel_size(static_cast<int>(p.kernel_size)) {
        const int64_t all = ceil_div(p.features.c / p.groups, kVector);
        plane_rows = static_cast<int>(p.from_logits ? p.logits.h * p.factor.up : p.out_h);
        plane_columns = static_cast<int>(p.from_logits ? p.logits.w * p.factor.up : p.out_w);
        for (vectors = 1; vectors < kMostVectors && vectors < all;) vectors *= 2;
        height = 8;
        columns_of_tile = 16;
        measure();
        while (shared_bytes > kMostSharedBytes && (height > 1 || columns_of_tile > kQuad || vectors > 1)) {
            if (height > 1) {
                height--;
            } else if (columns_of_tile > kQuad) {
                columns_of_tile -= kQuad;
            } else {
                vectors /= 2;
            }
            measure();
        }
        row_tiles = ceil_div(plane_rows, height);
        column_tiles = ceil_div(plane_columns, columns_of_tile);
        items = p.features.n * p.groups * row_tiles * column_tiles;
    }

private:
    // The most features from the first to the last source of some outputs.
    static int sources(const Outputs& axis, int outputs_of_axis) {
        return static_cast<int>(ceil_div((outputs_of_axis - 1) * int64_t{axis.down}, axis.up)) + 1;
    }
    void measure() {
        depth = vectors | 1;
        halo_rows = sources(rows, height) + kernel_size.number - 1;
        halo_columns = Divisor(sources(columns, columns_of_tile) + kernel_size.number - 1);
        width = Divisor(columns_of_tile);
        quads = Divisor(columns_of_tile / kQuad);
        outputs = height * columns_of_tile | 1;
        const int64_t staged = (int64_t{halo_rows} * halo_columns.number + height * columns_of_tile) * depth *
                               int64_t{sizeof(float4)},
                      masks = (taps.number + 1) * int64_t{outputs} * int64_t{sizeof(float)};
        shared_bytes = 2 * (height + columns_of_tile) * int64_t{sizeof(BandLine)} +
                       std::max(staged, ceil_div(masks, 16) * 16) +
                       int64_t{taps.number} * outputs * int64_t{sizeof(float)};
    }
};

// Stages some channels of pixels from (top, left) on: 0 where there are none. Floats arrive as copies of this thread
// do.
template <bool Vectors>
__device__ __forceinline__ void stage_pixels(const Array& array, int64_t n, int64_t c, int channels, int top, int left,
                                             int end_row, int end_column, int rows, const Divisor& columns, int vectors,
                                             int depth, float4* to) {
    const int threads = static_cast<int>(blockDim.x), thread = thread_computed_late();
    const int lanes = Vectors ? vectors : kVector;  // of a pixel
    const int lane = Vectors ? thread % lanes : thread / (threads / lanes);
    const int step = threads / lanes;
    with_storage(array.dtype, [&](auto storage) {
        using T = decltype(storage);
        const T* const from = element<const T>(array, n, c + lane * (Vectors ? kVector : 1), 0, 0);
#pragma unroll 1
        for (int pixel = Vectors ? thread / lanes : thread % step; pixel < rows * columns.number; pixel += step) {
            const int y = columns.quotient(pixel), i = top + y, j = left + pixel - y * columns.number;
            const bool exists = i >= 0 && i < end_row && j >= 0 && j < end_column;
            const T* const at = from + (exists ? i * array.stride_h + j * array.stride_w : 0);
            if constexpr (Vectors) {
                const bool there = exists && lane * kVector < channels;
                if constexpr (std::is_same_v<T, float>) {
                    copy_async<sizeof(float4)>(to + pixel * depth + lane, there ? at : from, there);
                } else {
                    to[pixel * depth + lane] = load_channels(there ? at : from, there);
                }
            } else {
                float* const staged = reinterpret_cast<float*>(to + pixel * depth);
#pragma unroll 1
                for (int channel = lane; channel < vectors * kVector; channel += lanes) {
                    const bool there = exists && channel < channels;
                    const T* const element_at = there ? at + (channel - lane) * array.stride_c : from;
                    if constexpr (std::is_same_v<T, float>) {
                        copy_async<sizeof(float)>(staged + channel, element_at, there);
                    } else {
                        staged[channel] = there ? widen(load_input(element_at)) : 0;
                    }
                }
            }
        }
    });
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
    return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// Carries gradients of masks of outputs through the normaliser, whose unscaled masks are staged.
__device__ __forceinline__ void through_normalizer(const Problem& p, int64_t n, int64_t group, const Band& band,
                                                   const float* masks, const float* scales, float* grads) {
    const int taps = static_cast<int>(p.taps());
    const int64_t tap = taps_apart(p, p.logits);
#pragma unroll 1
    for (int output = static_cast<int>(threadIdx.x); output < band.outputs; output += static_cast<int>(blockDim.x)) {
        const int y = band.width.quotient(output), x = output - y * band.width.number;
        if (y >= band.height || x >= band.columns_count) continue;
        const float scale = scales[output];
        const float* mask = masks + output;
        float* grad = grads + output;
        if (p.normalizer == CARAFEPP_SIGMOID) {
#pragma unroll 1
            for (int t = 0; t < taps; t++, mask += band.outputs, grad += band.outputs) *grad *= *mask * (1 - *mask);
            continue;
        }
        float mean = 0;  // weighted by masks
#pragma unroll 4
        for (int t = 0; t < taps; t++, mask += band.outputs, grad += band.outputs) mean += *mask * scale * *grad;
        mask = masks + output, grad = grads + output;
#pragma unroll 4
        for (int t = 0; t < taps; t++, mask += band.outputs, grad += band.outputs)
            *grad = *mask * scale * (*grad - mean);
        if (p.normalizer != CARAFEPP_SIGMOID_NORMALIZED) continue;
        grad = grads + output;
        with_storage(p.logits.dtype, [&](auto storage) {
            using M = decltype(storage);
            const M* logit = element<const M>(p.logits, n, 0, 0, 0) + group * taps * tap + band.rows[y].from +
                             band.columns[x].from;
#pragma unroll 1
            for (int t = 0; t < taps; t++, grad += band.outputs, logit += tap) *grad *= sigmoid(-widen(*logit));
        });
    }
}

template <bool Vectors>
__global__ void __launch_bounds__(kMostThreads, 2)
    grad_masks_tiles_kernel(Arguments arguments, GradMasksTilesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;  // of the shape of masks or logits
    const int k = plan.kernel_size.number, taps = plan.taps.number, radius = k / 2;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    BandLine* const rows = shared_memory<BandLine>();  // of the input
    BandLine* const columns = rows + plan.height;
    BandLine* const result_rows = columns + plan.columns_of_tile;
    BandLine* const result_columns = result_rows + plan.height;
    float4* const features = reinterpret_cast<float4*>(result_columns + plan.columns_of_tile);
    const int pixels = plan.halo_rows * plan.halo_columns.number;
    float4* const grad_output = features + pixels * plan.depth;
    const int room = max((pixels + plan.height * plan.columns_of_tile) * plan.depth,
                         ((taps + 1) * plan.outputs + kVector - 1) / kVector);
    float* const masks = reinterpret_cast<float*>(features);  // when the channels are done
    float* const scales = masks + taps * plan.outputs;
    float* const grads = reinterpret_cast<float*>(features + room);  // [tap][output]
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, computed_late(plan.column_tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.row_tiles)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        const int64_t n = image.quotient, group = image.remainder, channels_in_group = p.features.c / p.groups;
        const int top = static_cast<int>(tile_row.remainder) * plan.height,
                  left = static_cast<int>(tile.remainder) * plan.columns_of_tile;
        const Array& array = p.from_logits ? p.logits : p.masks;
        const int64_t up = p.from_logits ? p.factor.up : 1;
        find_lines(p, plan.rows, top, plan.height, array.stride_h, up * array.stride_c, false, rows);
        find_lines(p, plan.rows, top, plan.height, result.stride_h, up * result.stride_c, false, result_rows);
        // A crop leaves out some outputs, and a tile has fewer at an end.
        const int existing_columns = max(min(plan.columns_of_tile, static_cast<int>(p.out_w) - left), 0),
                  written_columns = min(plan.columns_of_tile, plan.plane_columns - left);
        find_lines(p, plan.columns, left, existing_columns, array.stride_w, array.stride_c,
                   p.from_logits && array.stride_w < array.stride_c, columns);
        find_lines(p, plan.columns, left, written_columns, result.stride_w, result.stride_c,
                   p.from_logits && result.stride_w < result.stride_c, result_columns);
        for (int at = thread; at < taps * plan.outputs; at += threads) grads[at] = 0;
        const Band band{rows,       max(min(plan.height, static_cast<int>(p.out_h) - top), 0),
                        columns,    existing_columns,
                        plan.width, plan.outputs};
        const int source_top = plan.rows.source(top) - radius, source_left = plan.columns.source(left) - radius;
        const int units = band.height * plan.quads.number * taps;
        const int64_t contracted = band.height > 0 && existing_columns > 0 ? channels_in_group : 0;
#pragma unroll 1
        for (int64_t channel = 0; channel < contracted; channel += plan.vectors * kVector) {
            const int channels = static_cast<int>(min(channels_in_group - channel, int64_t{plan.vectors} * kVector));
            const int64_t c = group * channels_in_group + channel;
            stage_pixels<Vectors>(p.features, n, c, channels, source_top, source_left, static_cast<int>(p.features.h),
                                  static_cast<int>(p.features.w), plan.halo_rows, plan.halo_columns, plan.vectors,
                                  plan.depth, features);
            stage_pixels<Vectors>(p.grad_output, n, c, channels, top, left, static_cast<int>(p.out_h),
                                  static_cast<int>(p.out_w), plan.height, plan.width, plan.vectors, plan.depth,
                                  grad_output);
            wait_for_copies();
            __syncthreads();
#pragma unroll 1
            for (int unit = thread; unit < units; unit += threads) {
                const int quad = plan.taps.quotient(unit), t = unit - quad * taps;
                const int a = plan.kernel_size.quotient(t), b = t - a * k;
                const int y = plan.quads.quotient(quad), x = (quad - y * plan.quads.number) * kQuad;
                if (x >= existing_columns) continue;
                const int row = (rows[y].source - source_top - radius + a) * plan.halo_columns.number;
                const float4* feature[kQuad];
#pragma unroll
                for (int o = 0; o < kQuad; o++) {
                    const int source = columns[min(x + o, existing_columns - 1)].source;
                    feature[o] = features + (row + source - source_left - radius + b) * plan.depth;
                }
                const float4* grad = grad_output + (y * plan.width.number + x) * plan.depth;
                float sums[kQuad] = {};
                if (feature[0] == feature[kQuad - 1]) {  // outputs of one source
#pragma unroll 2
                    for (int v = 0; v < plan.vectors; v++) {
                        const float4 one = feature[0][v];
#pragma unroll
                        for (int o = 0; o < kQuad; o++) sums[o] = dot(grad[o * plan.depth + v], one, sums[o]);
                    }
                } else {
#pragma unroll 1
                    for (int v = 0; v < plan.vectors; v++) {
#pragma unroll
                        for (int o = 0; o < kQuad; o++) sums[o] = dot(grad[o * plan.depth + v], feature[o][v], sums[o]);
                    }
                }
                float* const to = grads + t * plan.outputs + y * plan.width.number + x;
#pragma unroll
                for (int o = 0; o < kQuad; o++) to[o] += sums[o];
            }
            __syncthreads();
        }
        __syncthreads();
        // 0 for a tap beyond a border, whatever the gradient there, and for an output that a crop leaves out.
#pragma unroll 1
        for (int unit = thread; unit < taps * plan.outputs; unit += threads) {
            const int t = unit / plan.outputs, output = unit - t * plan.outputs;
            const int y = plan.width.quotient(output), x = output - y * plan.width.number;
            bool exists = y < band.height && x < existing_columns;
            if (exists) {
                const int a = plan.kernel_size.quotient(t), i = rows[y].source - radius + a,
                          j = columns[x].source - radius + t - a * k;
                exists = i >= 0 && i < p.features.h && j >= 0 && j < p.features.w;
            }
            if (!exists) grads[unit] = 0;
        }
        if (p.from_logits && p.normalizer != CARAFEPP_NONE) {
            copy_masks(p, n, group, band, masks);
            wait_for_copies();
            __syncthreads();
            normalize_band(p.normalizer, taps, band, masks, scales);
            __syncthreads();
            through_normalizer(p, n, group, band, masks, scales, grads);
        }
        __syncthreads();
        const Band written{result_rows,    min(plan.height, plan.plane_rows - top),
                           result_columns, written_columns,
                           plan.width,     plan.outputs};
        const int64_t tap = taps_apart(p, result);
        with_storage(result.dtype, [&](auto storage) {
            using M = decltype(storage);
            M* const all = element<M>(result, n, 0, 0, 0) + group * taps * tap;
            walk_band(result, tap, written, [&](int64_t place, int own, int first, int step) {
                M* to = all + place;
                const float* from = grads + own;
#pragma unroll 2
                for (int t = first; t < taps; t += step, to += step * tap, from += step * plan.outputs)
                    *to = narrow<M>(*from);
            });
        });
        __syncthreads();
    }
}

// Why no tile can be planned for a problem.
inline const char* not_for_grad_masks_tiles(const Problem& p) {
    if (const char* reason = not_for_bands(p)) return reason;
    return GradMasksTilesPlan(p).shared_bytes > kMostSharedBytes ? "kernel_size is too large" : nullptr;
}

template <bool Vectors>
void grad_masks_tiles(const Problem& p, const Array& grad_masks) {
    const GradMasksTilesPlan plan(p);
    launch(grad_masks_tiles_kernel<Vectors>, plan.items, kMostThreads, plan.shared_bytes, p, grad_masks, plan);
}

}  // namespace carafepp::cuda
