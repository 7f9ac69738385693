// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor. A block has a tile of outputs of a group. A thread has four outputs
// below each other and some taps of a column of their windows, with all sums in registers. The block goes through the
// channels in slices, as vectors of four in shared memory: features with their halo, and grad_output. The next slice
// arrives meanwhile. Outputs of a source share the features that a thread loads, and those of neighbouring sources most
// of them. Then the threads of an output carry its sums through the normaliser together, and write them in the order
// of memory.
#pragma once

#include "cuda/grad_masks_plan.h"

namespace carafepp::cuda {

// The slot of a number, from the first row on.
__device__ __forceinline__ Slot slot_of(const GradMasksTilesPlan& plan, int number) {
    int row = number, source = plan.rows.source(number);
    if (plan.slots > 0) {
        source = number / plan.slots;
        row = plan.rows.first(source + plan.rows.offset) + number - source * plan.slots;
        source += plan.rows.offset;
    }
    const int end = plan.slots == 0 ? plan.rows.count : plan.rows.first(source + 1), cell = row / plan.tile.cell.number;
    return {row < end ? row : -1, source, cell, row - cell * plan.tile.cell.number};
}

template <int Number>
using Constant = std::integral_constant<int, Number>;

// A block copies these: pixels of features, then of outputs. The addresses of their first channels are in shared
// memory, or 0.
struct Pixels {
    const int64_t* addresses;
    int features, count;
    int64_t feature_channel, output_channel;  // strides
};

// Stages a vector of channels from `channel` on, for the pixels `first`, first + step ... `channels` channels exist; 0
// elsewhere. Floats arrive as copies of this thread do.
template <bool Vectors, class T>
__device__ __forceinline__ void stage_pixels(const Pixels& pixels, int first, int step, int channel, int channels,
                                             float4* to) {
    const int64_t feature_at = channel * pixels.feature_channel, output_at = channel * pixels.output_channel;
    constexpr int kCount = std::is_same_v<T, float> ? 2 : 4;  // pixels whose loads are in flight together
#pragma unroll 1
    for (int pixel = first; pixel < pixels.count; pixel += kCount * step) {
        int64_t address[kCount];
        [[maybe_unused]] float4 values[kCount];
#pragma unroll
        for (int load = 0; load < kCount; load++) {
            const int at = pixel + load * step;
            address[load] = at < pixels.count ? pixels.addresses[at] : 0;
        }
#pragma unroll
        for (int load = 0; load < kCount; load++) {
            const int at = pixel + load * step;
            if (at >= pixels.count) break;
            const int there = address[load] != 0 ? channels : 0;
            const bool of_features = Vectors || at < pixels.features;
            [[maybe_unused]] const int64_t stride_c = of_features ? pixels.feature_channel : pixels.output_channel;
            const T* const from = reinterpret_cast<const T*>(address[load]) + (of_features ? feature_at : output_at);
            if constexpr (std::is_same_v<T, float>) {
                copy_four<Vectors>(to + at, from, stride_c, there);
            } else {
                values[load] = load_four<Vectors>(from, stride_c, there);
            }
        }
        if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
            for (int load = 0; load < kCount; load++) {
                if (pixel + load * step < pixels.count) to[pixel + load * step] = values[load];
            }
        }
    }
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
    return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// Adds the products of a slice to the sums of four outputs and `Taps` taps below each other. With `Sources` neighbours,
// or for 0 any, output o has its taps from features[apart[o]] on.
template <int Taps, int Sources>
__device__ __forceinline__ void add_products(const GradMasksTilesPlan& plan, const float4* features,
                                             const int (&apart)[kQuad], const float4* grad_output,
                                             float (&sums)[kQuad][kMostTaps]) {
    const int row = plan.halo_columns.number;
#pragma unroll 1
    for (int v = 0; v < plan.vectors; v++, features += plan.plane, grad_output += plan.plane) {
        float4 grad[kQuad];
#pragma unroll
        for (int o = 0; o < kQuad; o++) grad[o] = grad_output[o * plan.tile.columns.number];
        if constexpr (Sources > 0) {
            const float4* feature = features + apart[0];
#pragma unroll
            for (int y = 0; y < Taps + Sources - 1; y++, feature += row) {
                const float4 one = *feature;
#pragma unroll
                for (int o = 0; o < kQuad; o++) {
                    const int tap = y - o * Sources / kQuad;
                    if (tap >= 0 && tap < Taps) sums[o][tap] = dot(grad[o], one, sums[o][tap]);
                }
            }
        } else {
#pragma unroll
            for (int o = 0; o < kQuad; o++) {
                const float4* feature = features + apart[o];
#pragma unroll
                for (int tap = 0; tap < Taps; tap++, feature += row)
                    sums[o][tap] = dot(grad[o], *feature, sums[o][tap]);
            }
        }
    }
}

template <bool Vectors>
__global__ void __launch_bounds__(kThreadsOfTile, 2)
    grad_masks_tiles_kernel(Arguments arguments, GradMasksTilesPlan plan) {
    const Problem& p = arguments.problem;
    const int k = plan.kernel_size.number, radius = k / 2, width = plan.tile.columns.number;
    const int rows_of_tile = plan.tile.rows, outputs = plan.tile.count();
    const int halo = plan.halo_rows * plan.halo_columns.number, parts = k * plan.segments.number;
    const int height_in = static_cast<int>(p.features.h), width_in = static_cast<int>(p.features.w),
              height_out = static_cast<int>(p.out_h), width_out = static_cast<int>(p.out_w);
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    Slot* const slots = shared_memory<Slot>();
    OutputPlace* const places = reinterpret_cast<OutputPlace*>(slots + rows_of_tile);
    int64_t* const addresses = reinterpret_cast<int64_t*>(places);  // of pixels, while there are channels
    float4* const staged = reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(places) + plan.places_bytes);
    float2* const partial = reinterpret_cast<float2*>(staged);  // [part][output], when the channels are done
    float* const finished = reinterpret_cast<float*>(partial +
                                                     parts * plan.tile.room);  // [tap][output]: logits, gradients

    // This thread's column of outputs and of taps, its first row of taps, and its quad.
    const int line = plan.tile.columns.quotient(thread), x = thread - line * width;
    const int segment_line = plan.kernel_size.quotient(line), b = line - segment_line * k;
    const int quad = plan.segments.quotient(segment_line), segment = segment_line - quad * plan.segments.number;
    const int a = segment * plan.own_taps, own_slot = quad * kQuad;
    const bool active = quad < plan.quads;
    const int count = active ? min(k - a, plan.own_taps) : 0;
    const int stagers = threads / plan.vectors;  // of a vector
    const int vector = Vectors ? thread % plan.vectors : thread / stagers,
              first_pixel = Vectors ? thread / plan.vectors : thread % stagers;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const uint32_t tile = static_cast<uint32_t>(item), tile_row = tile / plan.column_tiles,
                       tile_image = tile_row / plan.row_tiles;
        const int64_t n = tile_image / plan.groups, group = tile_image - n * plan.groups;
        const int first_slot = static_cast<int>(tile_row - tile_image * plan.row_tiles) * rows_of_tile,
                  left = static_cast<int>(tile - tile_row * plan.column_tiles) * width;
#pragma unroll 1
        for (int number = thread; number < rows_of_tile; number += threads)
            slots[number] = slot_of(plan, first_slot + number);
        __syncthreads();
        const int source_top = slots[0].source - radius, source_left = plan.columns.source(left) - radius;
        const auto first_address = [&](const Array& array) {
            return reinterpret_cast<int64_t>(array.data) +
                   (n * array.stride_n + group * plan.channels * array.stride_c) * plan.itemsize;
        };
        const auto address = [&](const Array& array, int row, int column_at, bool exists) {
            const int64_t place = row * array.stride_h + column_at * array.stride_w;
            return exists ? first_address(array) + place * plan.itemsize : 0;
        };
#pragma unroll 1
        for (int pixel = thread; pixel < halo; pixel += threads) {
            const int y = plan.halo_columns.quotient(pixel), i = source_top + y,
                      j = source_left + pixel - y * plan.halo_columns.number;
            addresses[pixel] = address(p.features, i, j, i >= 0 && i < height_in && j >= 0 && j < width_in);
        }
#pragma unroll 1
        for (int output = thread; output < outputs; output += threads) {
            const int y = plan.tile.columns.quotient(output), row = slots[y].row, column = left + output - y * width;
            addresses[halo + output] = address(p.grad_output, row, column,
                                               row >= 0 && row < height_out && column < width_out);
        }
        const int column = left + x, source = plan.columns.source(column) - radius + b;  // of this thread's taps
        int apart[kQuad];                                                                // see add_products
#pragma unroll
        for (int o = 0; o < kQuad; o++) {
            const int y = active ? slots[own_slot + o].source - radius + a - source_top : 0;
            apart[o] = y * plan.halo_columns.number + (active ? source - source_left : 0);
        }
        float sums[kQuad][kMostTaps] = {};
        const int slices = height_out > 0 && width_out > 0 ? plan.slices : 0;  // or there may be no arrays
        const Pixels pixels{addresses, halo, halo + outputs, p.features.stride_c, p.grad_output.stride_c};
        int channel = vector * kVector, buffer = 0;
#pragma unroll 1
        for (int number = 0; number <= slices; number++) {  // is staged, and the one before it contracted
            wait_for_copies();
            __syncthreads();
            if (number < slices) {
                float4* const to = staged + buffer + vector * plan.plane;
                with_storage(p.features.dtype, [&](auto storage) __attribute__((always_inline)) {
                    stage_pixels<Vectors, decltype(storage)>(pixels, first_pixel, stagers, channel,
                                                             plan.channels - channel, to);
                });
                channel += plan.vectors * kVector;
            }
            buffer = plan.vectors * plan.plane - buffer;
            if (number == 0 || !active) continue;
            const float4* const features = staged + buffer;
            const float4* const grads = features + halo + own_slot * width + x;
            const auto add = [&](auto own_taps, auto sources) __attribute__((always_inline)) {
                add_products<decltype(own_taps)::value, decltype(sources)::value>(plan, features, apart, grads, sums);
            };
            switch (plan.own_taps * 8 + plan.sources) {
                case 24 + 0: add(Constant<3>(), Constant<0>()); break;
                case 24 + 1: add(Constant<3>(), Constant<1>()); break;
                case 24 + 2: add(Constant<3>(), Constant<2>()); break;
                case 24 + 4: add(Constant<3>(), Constant<4>()); break;
                case 40 + 0: add(Constant<5>(), Constant<0>()); break;
                case 40 + 1: add(Constant<5>(), Constant<1>()); break;
                case 40 + 2: add(Constant<5>(), Constant<2>()); break;
                case 40 + 4: add(Constant<5>(), Constant<4>()); break;
                case 56 + 0: add(Constant<7>(), Constant<0>()); break;
                case 56 + 1: add(Constant<7>(), Constant<1>()); break;
                case 56 + 2: add(Constant<7>(), Constant<2>()); break;
                case 56 + 4: add(Constant<7>(), Constant<4>()); break;
            }
        }
        const bool inside = source_top >= 0 && source_top + plan.halo_rows <= height_in && source_left >= 0 &&
                            source_left + plan.halo_columns.number <= width_in;
        if (!inside && active) {  // a tap beyond a border is 0, whatever the gradient there
#pragma unroll
            for (int o = 0; o < kQuad; o++) {
                const int i = slots[own_slot + o].source - radius + a;  // of its first row
                const int first = min(max(-i, 0), kMostTaps), end = min(max(height_in - i, 0), kMostTaps);
                const bool column_there = source >= 0 && source < width_in;
                const int there = column_there ? (1 << end) - (1 << min(first, end)) : 0;  // bits of taps
#pragma unroll
                for (int tap = 0; tap < kMostTaps; tap++) {
                    if ((there & 1 << tap) == 0) sums[o][tap] = 0;
                }
            }
        }
        __syncthreads();  // what follows takes the place of slices
        const TileInImage at{n, group, slots, left};
        const ThreadOfTile own{own_slot, x, a * k + b, k, count, segment * k + b};
        finish_grad_masks(arguments, plan.tile, at, own, parts, plan.normalized, sums, finished, partial, places);
        __syncthreads();
    }
}

template <bool Vectors>
void grad_masks_tiles(const Problem& p, const Array& grad_masks) {
    const GradMasksTilesPlan plan(p, Vectors);
    launch(grad_masks_tiles_kernel<Vectors>, plan.items, plan.threads, plan.shared_bytes, p, grad_masks, plan);
}

}  // namespace carafepp::cuda
