// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor. A block has a tile of outputs of a group. A thread has a quad, three
// or four outputs below each other, and some taps of a column of their windows, with all sums in registers. The block
// goes through the channels in slices, as vectors of four in shared memory: features with their halo, and grad_output.
// Both stand there column by column, so a thread loads at constant distances. With adjacent channels the next slice
// arrives meanwhile, as copies of vectors; else it passes registers, which transpose it. Outputs of a source
// share the features that a thread loads, and those of neighbouring sources most of them. So, where a source has
// several outputs, two threads have both their quads through the channels, each with half of them. In the end they
// share sums.
#pragma once

#include "cuda/any/grad_masks_plan.h"

namespace carafepp::cuda {

// The slot of a number, from the first row on.
__device__ __forceinline__ Slot slot_of(const GradMasksTilesPlan& plan, int number) {
    const int quad = number / kQuad, of_quad = plan.own_rows.number, own = number % kQuad;
    int row = quad * of_quad + min(own, of_quad - 1), source = plan.rows.source(row), end = plan.rows.count;
    if (plan.quads_of_source > 0) {
        source = quad / plan.quads_of_source;
        row -= source * plan.quads_of_source * of_quad;
        source += plan.rows.offset;
        row += plan.rows.first(source);
        end = plan.rows.first(source + 1);
    }
    const int cell = row / plan.tile.cell.number;
    return {row < end && own < of_quad ? row : -1, source, cell, row - cell * plan.tile.cell.number};
}

// As one load.
__device__ __forceinline__ StagedPixel load_pixel(const StagedPixel* pixel) {
    const uint4 words = *reinterpret_cast<const uint4*>(pixel);
    return {static_cast<int64_t>(uint64_t{words.y} << 32 | words.x), static_cast<int>(words.z),
            static_cast<int>(words.w)};
}

// The channel that is `bytes` behind `from`, if channels were adjacent.
template <class T>
__device__ __forceinline__ const T* channel_of(int64_t from, int stride_c, int bytes) {
    return reinterpret_cast<const T*>(at_stride(reinterpret_cast<const char*>(from), stride_c, bytes));
}

// Copies a vector of channels for the pixels `first`, first + step ...
__device__ __forceinline__ void copy_pixels(const StagedPixel* pixels, int count, int first, int step, int bytes,
                                            float4* to) {
#pragma unroll 1
    for (int number = first; number < count; number += kPixels * step) {
        StagedPixel own[kPixels];  // all before the copies: nvcc separates loads and copies by other instructions
#pragma unroll
        for (int k = 0; k < kPixels; k++) own[k] = load_pixel(pixels + min(number + k * step, count - 1));
#pragma unroll
        for (int k = 0; k < kPixels; k++) {
            if (number + k * step < count)
                copy_async<sizeof(float4)>(to + own[k].to, reinterpret_cast<const void*>(own[k].from + bytes), true);
        }
    }
}

// The same for any strides and dtype, through registers. Of the channels `there` exist; others are 0.
template <bool Vectors, class T>
__device__ __forceinline__ void load_pixels(const StagedPixel* pixels, int count, int first, int step, int bytes,
                                            int bytes_of_channel, int there, float4* to) {
#pragma unroll 1
    for (int number = first; number < count; number += kPixels * step) {
        float4 values[kPixels];
        int places[kPixels];
#pragma unroll
        for (int k = 0; k < kPixels; k++) {
            const StagedPixel pixel = load_pixel(pixels + min(number + k * step, count - 1));
            const T* const from = channel_of<T>(pixel.from, pixel.stride_c, bytes);
            places[k] = pixel.to;
            if constexpr (Vectors) {
                values[k] = load_channels(from);
            } else {
                const auto load_one = [&](int v) {
                    const auto here = reinterpret_cast<int64_t>(from);
                    return v < there ? widen(load_input(channel_of<T>(here, pixel.stride_c, v * bytes_of_channel))) : 0;
                };
                values[k] = make_float4(load_one(0), load_one(1), load_one(2), load_one(3));
            }
        }
#pragma unroll
        for (int k = 0; k < kPixels; k++) {
            if (number + k * step < count) to[places[k]] = values[k];
        }
    }
}

// The same for pairs of columns, `apart` in a slice, and all channels of a vector.
__device__ __forceinline__ void load_pairs(const StagedPixel* pixels, int count, int first, int step, int bytes,
                                           int bytes_of_channel, int apart, float4* to) {
    constexpr int kPairs = kPixels / 2;
#pragma unroll 1
    for (int number = first; number < count; number += kPairs * step) {
        float2 values[kPairs][kVector];
        int places[kPairs];
#pragma unroll
        for (int k = 0; k < kPairs; k++) {
            const StagedPixel pixel = load_pixel(pixels + min(number + k * step, count - 1));
            const auto from = reinterpret_cast<int64_t>(channel_of<float>(pixel.from, pixel.stride_c, bytes));
            places[k] = pixel.to;
#pragma unroll
            for (int v = 0; v < kVector; v++) {
                const float* const channel = channel_of<float>(from, pixel.stride_c, v * bytes_of_channel);
                values[k][v] = load_columns(channel, true);
            }
        }
#pragma unroll
        for (int k = 0; k < kPairs; k++) {
            if (number + k * step < count) {
                const float2(&pair)[kVector] = values[k];
                to[places[k]] = make_float4(pair[0].x, pair[1].x, pair[2].x, pair[3].x);
                to[places[k] + apart] = make_float4(pair[0].y, pair[1].y, pair[2].y, pair[3].y);
            }
        }
    }
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
    return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// Adds the products of a slice to the sums of a quad of outputs, or of two, and `Taps` taps below each other.
// `features` are those of the first output. Threads of two quads share the vectors of both: `share` has every second
// one.
template <int Taps, int Pattern>
__device__ __forceinline__ void add_products(const GradMasksTilesPlan& plan, int vectors, int share,
                                             const float4* features, const float4* grad_output, const Slot* slots,
                                             float (&sums)[kMostSums]) {
    if constexpr (Pattern == kAnySources) {
        int apart[kQuad];
#pragma unroll
        for (int o = 0; o < kQuad; o++) apart[o] = slots[o].source - slots[0].source;
#pragma unroll 1
        for (int left = vectors; left > 0; left--, features += plan.plane, grad_output += plan.plane) {
#pragma unroll
            for (int o = 0; o < kQuad; o++) {
                const float4 grad = grad_output[o], *const feature = features + apart[o];
#pragma unroll
                for (int tap = 0; tap < Taps; tap++)
                    sums[o * Taps + tap] = dot(grad, feature[tap], sums[o * Taps + tap]);
            }
        }
    } else {
        constexpr int kUp = Pattern / 8, kDown = Pattern % 8, kShares = is_paired(Pattern, Taps) ? 2 : 1,
                      kRows = kShares * rows_of_quad(Pattern, Taps);
        features += share * plan.plane, grad_output += share * plan.plane;
#pragma unroll 1
        for (int left = vectors - share; left > 0;
             left -= kShares, features += kShares * plan.plane, grad_output += kShares * plan.plane) {
            float4 grad[kRows];
#pragma unroll
            for (int o = 0; o < kRows; o++) grad[o] = grad_output[o];
#pragma unroll
            for (int y = 0; y < Taps + (kRows - 1) * kDown / kUp; y++) {
                const float4 one = features[y];
#pragma unroll
                for (int o = 0; o < kRows; o++) {
                    const int tap = y - o * kDown / kUp;
                    if (tap >= 0 && tap < Taps) sums[o * Taps + tap] = dot(grad[o], one, sums[o * Taps + tap]);
                }
            }
        }
    }
}

template <int Number>
using Constant = std::integral_constant<int, Number>;

// Calls f(taps, pattern) with constants.
template <int Pattern, class F>
__device__ __forceinline__ void with_taps(int taps, F f) {
    if (taps == 3) f(Constant<3>(), Constant<Pattern>());
    if (taps == 5) f(Constant<5>(), Constant<Pattern>());
    if constexpr (Pattern != pattern_of(8, 1)) {
        if (taps == 7) f(Constant<7>(), Constant<Pattern>());
    }
}
template <class F>
__device__ __forceinline__ void with_pattern(int taps, int pattern, F f) {
    switch (pattern) {
        case kAnySources: with_taps<kAnySources>(taps, f); break;
        case pattern_of(8, 1): with_taps<pattern_of(8, 1)>(taps, f); break;
        case pattern_of(6, 1): with_taps<pattern_of(6, 1)>(taps, f); break;
        case pattern_of(4, 1): with_taps<pattern_of(4, 1)>(taps, f); break;
        case pattern_of(3, 1): with_taps<pattern_of(3, 1)>(taps, f); break;
        case pattern_of(3, 2): with_taps<pattern_of(3, 2)>(taps, f); break;
        case pattern_of(2, 1): with_taps<pattern_of(2, 1)>(taps, f); break;
        case pattern_of(1, 1): with_taps<pattern_of(1, 1)>(taps, f); break;
        case pattern_of(1, 2): with_taps<pattern_of(1, 2)>(taps, f); break;
        case pattern_of(1, 3): with_taps<pattern_of(1, 3)>(taps, f); break;
    }
}

// A tile of outputs: its image and group, its first slot and column.
struct TileOfGroup {
    int64_t n, group;
    int first_slot, left;

    __device__ __forceinline__ TileOfGroup(const GradMasksTilesPlan& plan, int64_t item) {
        const uint32_t tile = static_cast<uint32_t>(item), row = tile / plan.column_tiles, image = row / plan.row_tiles;
        n = image / plan.groups;
        group = image - n * plan.groups;
        first_slot = static_cast<int>(row - image * plan.row_tiles) * plan.tile.rows;
        left = static_cast<int>(tile - row * plan.column_tiles) * plan.tile.columns.number;
    }
};

// The part of a thread: a column of outputs and one of taps, `count` taps from row `a` on, and a quad. A thread without
// a part has no taps. Eight neighbouring threads load features of neighbouring columns, from different banks.
struct Part {
    int x, b, a, count, quad, segment;

    __device__ __forceinline__ Part(const GradMasksTilesPlan& plan, int thread) {
        const int k = plan.kernel_size.number, line = plan.kernel_size.quotient(thread),
                  segment_line = plan.tile.columns.quotient(line);
        b = thread - line * k;
        x = line - segment_line * plan.tile.columns.number;
        quad = plan.segments.quotient(segment_line);
        segment = segment_line - quad * plan.segments.number;
        a = segment * plan.own_taps;
        count = quad < plan.quads ? min(k - a, plan.own_taps) : 0;
    }
};

// The first column of a tile's features. Pairs begin with an even one.
__device__ __forceinline__ int left_of_halo(const GradMasksTilesPlan& plan, int left) {
    const int source = plan.columns.source(left) - plan.kernel_size.number / 2;
    return plan.run == 2 ? source - (source & 1) : source;
}

// Finds the pixels of a tile whose first feature is (top, left). Pixels beyond a border are any others: what comes of
// them is 0 in the end. Threads that store eight pairs together do so to different banks, as half of them have the next
// row.
__device__ __forceinline__ void find_pixels(const Problem& p, const GradMasksTilesPlan& plan, const TileOfGroup& tile,
                                            const Slot* slots, int top, int left, StagedPixel* pixels) {
    const int run = plan.run;
#pragma unroll 1
    for (int number = static_cast<int>(threadIdx.x); number < plan.pixels; number += static_cast<int>(blockDim.x)) {
        const bool of_features = number < plan.pixels_of_halo;
        const Array& array = of_features ? p.features : p.grad_output;
        const Divisor& runs = of_features ? plan.runs_of_halo : plan.runs_of_tile;
        const int own = of_features ? number : number - plan.pixels_of_halo, parity = run == 2 ? own & 1 : 0,
                  run_number = run == 2 ? own >> 1 : own, row_of_runs = runs.quotient(run_number),
                  x = (run_number - row_of_runs * runs.number) * run, y = row_of_runs * run + parity;
        int row = top + y, column = left + x, to = x * plan.halo_pitch + y;
        if (!of_features) {
            const int quad = min(plan.own_rows.quotient(y), plan.quads - 1);
            row = slots[quad * kQuad + y - quad * plan.own_rows.number].row;
            column = tile.left + x;
            to = plan.grads_at + x * plan.pitch + y;
        }
        row = min(max(row, 0), static_cast<int>(array.h) - 1);
        column = min(max(column, 0), static_cast<int>(array.w) - run);
        const int64_t place = tile.n * array.stride_n + tile.group * plan.channels * array.stride_c +
                              row * array.stride_h + column * array.stride_w;
        pixels[number] = {reinterpret_cast<int64_t>(array.data) + place * plan.itemsize, to,
                          static_cast<int>(array.stride_c)};
    }
}

// The sums of a thread's own quad, from those of a row after row. A thread of a pair has the sums of both quads over
// half of the channels, and the two exchange them through shared memory. All threads of a block call it.
template <int Taps>
__device__ __forceinline__ void share_sums(const GradMasksTilesPlan& plan, const Part& own,
                                           const float (&of_rows)[kMostSums], float* told,
                                           float (&sums)[kQuad][kMostTaps]) {
    const int threads = static_cast<int>(blockDim.x), thread = thread_computed_late(),
              apart = plan.kernel_size.number * plan.tile.columns.number * plan.segments.number;
    // Calls f(own sum, sum of a row, where threads tell it) for each of a quad, which begins with row `first`.
    const auto each = [&](auto first, auto f) __attribute__((always_inline)) {
#pragma unroll
        for (int o = 0; o < kQuad; o++) {
#pragma unroll
            for (int tap = 0; tap < Taps; tap++) {
                const int row = decltype(first)::value + o;  // of quads of three, the fourth is any
                f(sums[o][tap], of_rows[min(row * Taps + tap, kMostSums - 1)], told + (o * Taps + tap) * threads);
            }
        }
    };
    const auto keep = [](float& sum, float of_row, float*) { sum = of_row; };
    if (!plan.paired) {
        each(Constant<0>(), keep);
        return;
    }
    __syncthreads();  // slices are read
    const auto share = [&](auto rows) __attribute__((always_inline)) {
        if (own.quad % 2 == 0) {
            each(rows, [&](float, float of_row, float* at) { at[thread + apart] = of_row; });
            each(Constant<0>(), keep);
        } else {
            each(Constant<0>(), [&](float, float of_row, float* at) { at[thread - apart] = of_row; });
            each(rows, keep);
        }
    };
    if (own.count > 0) {
        if (plan.own_rows.number == 3) {
            share(Constant<3>());
        } else {
            share(Constant<kQuad>());
        }
    }
    __syncthreads();
    each(Constant<0>(), [&](float& sum, float, const float* at) { sum += at[thread]; });
}

template <bool Vectors>
__global__ void __launch_bounds__(kThreadsOfTile, 1)
    grad_masks_tiles_kernel(Arguments arguments, GradMasksTilesPlan plan) {
    const Problem& p = arguments.problem;
    const int k = plan.kernel_size.number, radius = k / 2, parts = k * plan.segments.number;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    Slot* const slots = shared_memory<Slot>();
    OutputPlace* const places = reinterpret_cast<OutputPlace*>(slots + plan.tile.rows);
    StagedPixel* const pixels = reinterpret_cast<StagedPixel*>(places);  // while there are channels
    float4* const staged = reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(places) + plan.places_bytes);
    float2* const partial = reinterpret_cast<float2*>(staged);  // [part][output], when the channels are done
    float* const finished = reinterpret_cast<float*>(partial + parts * plan.tile.room);  // [tap][output]

    const int stagers = threads / plan.vectors;  // of a vector
    const int vector = Vectors ? thread % plan.vectors : thread / stagers,
              first_pixel = Vectors ? thread / plan.vectors : thread % stagers;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        int features_at = 0, grads_at = 0, own_slot = -1, share = 0;  // of this thread, in a slice; -1: it has no part
        {
            const TileOfGroup tile(plan, item);
#pragma unroll 1
            for (int number = thread; number < plan.tile.rows; number += threads)
                slots[number] = slot_of(plan, tile.first_slot + number);
            __syncthreads();
            const int top = slots[0].source - radius, left = left_of_halo(plan, tile.left);
            find_pixels(p, plan, tile, slots, top, left, pixels);
            const Part own(plan, thread);
            if (own.count > 0) {
                share = plan.paired ? own.quad % 2 : 0;
                const int first = own.quad - share;
                own_slot = first * kQuad;
                features_at = (plan.columns.source(tile.left + own.x) - radius + own.b - left) * plan.halo_pitch +
                              slots[own_slot].source - radius + own.a - top;
                grads_at = plan.grads_at + own.x * plan.pitch + first * plan.own_rows.number;
            }
        }
        float of_rows[kMostSums] = {};
        const int slices = p.out_h > 0 && p.out_w > 0 ? plan.slices : 0;  // or there may be no arrays
        int buffer = 0;
#pragma unroll 1
        for (int number = 0; number <= slices; number++) {  // is staged, and the one before it contracted
            wait_for_copies();
            __syncthreads();
            float4* const to = staged + buffer + vector * plan.plane;
            if (number < slices) {
                with_storage(p.features.dtype, [&](auto storage) __attribute__((always_inline)) {
                    using T = decltype(storage);
                    const int channel = (number * plan.vectors + vector) * kVector, there = plan.channels - channel,
                              bytes = channel * plan.itemsize;
                    if (there <= 0) return;
                    if constexpr (Vectors && std::is_same_v<T, float>) {
                        copy_pixels(pixels, plan.pixels, first_pixel, stagers, bytes, to);
                    } else if (!Vectors && std::is_same_v<T, float> && plan.run == 2) {
                        load_pairs(pixels, plan.pixels, first_pixel, stagers, bytes, plan.itemsize, plan.pitch, to);
                    } else {
                        load_pixels<Vectors, T>(pixels, plan.pixels, first_pixel, stagers, bytes, plan.itemsize, there,
                                                to);
                    }
                });
            }
            buffer = plan.vectors * plan.plane - buffer;
            if (number > 0 && own_slot >= 0) {
                const int vectors = min(plan.vectors, plan.all_vectors - (number - 1) * plan.vectors);
                const float4* const slice = staged + buffer;
                with_pattern(plan.own_taps, plan.pattern, [&](auto taps, auto pattern) __attribute__((always_inline)) {
                    add_products<decltype(taps)::value, decltype(pattern)::value>(
                        plan, vectors, share, slice + features_at, slice + grads_at, slots + own_slot, of_rows);
                });
            }
        }
        const TileOfGroup tile(plan, computed_late(item));
        const Part own(plan, thread_computed_late());
        float sums[kQuad][kMostTaps] = {};
        with_taps<kAnySources>(plan.own_taps, [&](auto taps, auto) __attribute__((always_inline)) {
            share_sums<decltype(taps)::value>(plan, own, of_rows, reinterpret_cast<float*>(staged), sums);
        });
        const int height = static_cast<int>(p.features.h), width = static_cast<int>(p.features.w),
                  top = slots[0].source - radius, left = left_of_halo(plan, tile.left);
        const bool inside = top >= 0 && top + plan.halo_rows <= height && left >= 0 &&
                            left + plan.halo_columns <= width;
        if (!inside && own.count > 0) {  // a tap beyond a border is 0, whatever the gradient there
            const int source = plan.columns.source(tile.left + own.x) - radius + own.b;
#pragma unroll
            for (int o = 0; o < kQuad; o++) {
                const int i = slots[own.quad * kQuad + o].source - radius + own.a;  // of its first row
                const int first = min(max(-i, 0), kMostTaps), end = min(max(height - i, 0), kMostTaps);
                const bool column_there = source >= 0 && source < width;
                const int there = column_there ? (1 << end) - (1 << min(first, end)) : 0;  // bits of taps
#pragma unroll
                for (int tap = 0; tap < kMostTaps; tap++) {
                    if ((there & 1 << tap) == 0) sums[o][tap] = 0;
                }
            }
        }
        __syncthreads();  // what follows takes the place of slices
        finish_grad_masks(arguments, plan.tile, {tile.n, tile.group, slots, tile.left},
                          {own.quad * kQuad, own.x, own.a * k + own.b, k, own.count, own.segment * k + own.b}, parts,
                          plan.normalized, sums, finished, partial, places);
        __syncthreads();
    }
}

template <bool Vectors>
void grad_masks_tiles(const Problem& p, const Array& grad_masks) {
    const GradMasksTilesPlan plan(p, Vectors);
    launch(grad_masks_tiles_kernel<Vectors>, plan.items, plan.threads, plan.shared_bytes, p, grad_masks, plan);
}

}  // namespace carafepp::cuda
