// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor. A block has a tile of sources in a slice of channels. It goes through the
// outputs whose windows touch the tile, in bands of rows. It stages the masks of a band, sorted by source, and
// grad_output with four channels of a pixel in a vector. A thread has a unit, kOwn sources of a column, in some vectors
// of channels: a vector of grad_output serves each source whose window has it, and a mask all vectors. Where channels
// are few, several threads have a unit, each every so many rows of a band.
#pragma once

#include "cuda/grad_tiles.h"

namespace carafepp::cuda {

constexpr int kOwn = 4;         // sources of a thread
constexpr int kMostLanes = 16;  // threads of a unit along the channels
constexpr int kMostParts = 4;   // threads of a unit along the rows of a band

struct GradFeaturesPlan {
    Outputs rows, columns;
    int lanes, parts, threads;
    int unit_rows, unit_columns;  // of a tile
    int most_rows, most_columns;  // of outputs whose windows touch a tile
    int band;                     // its rows
    Divisor width;                // of a row of a band: odd, as rows begin in other banks then
    int outputs;                  // of a band
    int depth;                    // vectors from pixel to pixel: odd if channels arrive one by one
    int slot;                     // masks of a source in a row, in whole vectors
    int64_t row_tiles, column_tiles;
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    GradFeaturesPlan(const Problem& p, int vectors_of_thread, bool channels_adjacent)
        : rows(p.factor, p.offset_h, p.out_h), columns(p.factor, p.offset_w, p.out_w), width(1), outputs(0) {
        const int64_t all = std::max<int64_t>(ceil_div(p.features.c / p.groups, kVector), 1);
        const int k = static_cast<int>(p.kernel_size);
        for (lanes = 1; lanes < kMostLanes && lanes * vectors_of_thread < all;) lanes *= 2;
        for (parts = 1; parts < kMostParts && parts * lanes < kMostParts;) parts *= 2;
        depth = lanes * vectors_of_thread | (channels_adjacent ? 0 : 1);
        channel_blocks = ceil_div(all, lanes * vectors_of_thread);
        slot = static_cast<int>(ceil_div(columns.most(k), kVector)) * kVector;
        const int units = kMostThreads / (lanes * parts);
        unit_columns = even(p.features.w, std::max(units / 4, 8));
        unit_rows = even(ceil_div(p.features.h, kOwn), std::max(units / unit_columns, 1));
        measure(k, even(most_rows_of(k), kMostSharedBytes));
        while (shared_bytes > kMostSharedBytes && (band > 1 || unit_rows > 1 || unit_columns > 1)) {
            if (band > 1) {
                measure(k, even(most_rows, band - 1));
            } else {
                (unit_rows > 1 ? unit_rows : unit_columns) -= 1;
                measure(k, 1);
            }
        }
        threads = static_cast<int>(ceil_div(unit_rows * unit_columns * lanes * parts, 32)) * 32;
        row_tiles = ceil_div(p.features.h, unit_rows * kOwn);
        column_tiles = ceil_div(p.features.w, unit_columns);
        items = p.features.n * p.groups * row_tiles * column_tiles * channel_blocks;
    }

private:
    // As many of `count` in each part as if `most` were in it: the last one is not much smaller.
    static int even(int64_t count, int64_t most) {
        return static_cast<int>(std::max<int64_t>(ceil_div(count, std::max<int64_t>(ceil_div(count, most), 1)), 1));
    }
    int most_rows_of(int k) const { return std::max(rows.most(unit_rows * kOwn + k - 1), 1); }

    void measure(int k, int rows_of_band) {
        band = rows_of_band;
        most_rows = most_rows_of(k);
        most_columns = std::max(columns.most(unit_columns + k - 1), 2);
        width = Divisor(most_columns | 1);
        const int64_t all = int64_t{band} * (most_columns | 1);
        outputs = static_cast<int>(all);  // if it fits
        const int64_t grads = all * depth * int64_t{sizeof(float4)},
                      turned = int64_t{lanes} * kVector * (unit_rows * unit_columns | 1) * int64_t{sizeof(float)};
        shared_bytes = (most_rows + most_columns) * int64_t{sizeof(BandLine)} +
                       std::max(grads, ceil_div(turned, 16) * 16) +
                       int64_t{k} * band * unit_columns * slot * int64_t{sizeof(float)} +
                       (int64_t{k} * k + 1) * all * int64_t{sizeof(float)} +
                       (unit_rows * kOwn + 2 * unit_columns + 2 * (k + 1)) * int64_t{sizeof(int)};
    }
};

// Sorts the masks of a band by source: masks[a][row][column of sources][output of its own], as whole vectors. Those of
// sources beyond the tile are left out.
__device__ __forceinline__ void sort_masks(const GradFeaturesPlan& plan, int k, const Band& band, int top, int left,
                                           const int* slots, const float* staged, const float* scales, float* masks) {
    const int threads = static_cast<int>(blockDim.x), teams = max(threads / band.outputs, 1);
    const int thread = thread_computed_late(), team = teams > 1 ? thread / band.outputs : 0;
    const int apart = plan.band * plan.unit_columns * plan.slot;
    if (team >= teams) return;
#pragma unroll 1
    for (int output = thread - team * band.outputs; output < band.outputs; output += threads) {
        const int y = band.width.quotient(output), x = output - y * band.width.number;
        if (y >= band.height || x >= band.columns_count) continue;
        const int row = band.rows[y].source - k / 2 - top, column = band.columns[x].source - k / 2 - left;
        const int begin = max(-column, 0), count = min(plan.unit_columns - column, k) - begin;
        const int end = min(plan.unit_rows * kOwn - row, k);
        const float scale = scales[output];
        const float* const from = staged + begin * band.outputs + output;
        float* const to = masks + y * plan.unit_columns * plan.slot + x;
        const int* const slot = slots + column + begin;
#pragma unroll 1
        for (int a = max(-row, 0) + team; a < end; a += teams) {
            const float* mask = from + a * k * band.outputs;
            float* const of_row = to + a * apart;
#pragma unroll 2
            for (int b = 0; b < count; b++, mask += band.outputs) of_row[slot[b]] = *mask * scale;
        }
    }
}

// Copies grad_output of a band to grads[output][vector]. Floats arrive as copies of this thread do.
template <bool Vectors>
__device__ __forceinline__ void copy_grads(const Array& grad_output, const GradFeaturesPlan& plan, int64_t n, int64_t c,
                                           int channels, int top, int left, const Band& band, int vectors,
                                           float4* grads) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int lanes = Vectors ? vectors : 32;  // that have a pixel each time, or pixels of a channel
    const int lane = thread % lanes, step = Vectors ? threads / lanes : 32;
    int of_row = 1;  // pixels at once
    while (of_row < band.columns_count && of_row * 2 <= step) of_row *= 2;
    const int pixel = Vectors ? thread / lanes : lane, first_row = pixel / of_row, first_column = pixel % of_row;
    with_storage(grad_output.dtype, [&](auto storage) {
        using T = decltype(storage);
        const T* from = element<const T>(grad_output, n, c, top, left);
        from += first_column * grad_output.stride_w;
        const int64_t step_from = of_row * grad_output.stride_w;
        const int step_to = of_row * plan.depth, rows = step / of_row;
        if (first_row >= rows) return;
        const auto walk = [&](const T* at, auto copy) __attribute__((always_inline)) {
            at += first_row * grad_output.stride_h;
#pragma unroll 1
            for (int y = first_row; y < band.height; y += rows, at += rows * grad_output.stride_h) {
                const T* of_column = at;
                int to = (y * band.width.number + first_column) * plan.depth;
#pragma unroll 2
                for (int x = first_column; x < band.columns_count; x += of_row, of_column += step_from, to += step_to)
                    copy(of_column, to);
            }
        };
        if constexpr (Vectors) {
            from += lane * kVector;
            if (lane * kVector >= channels) return;
            walk(from, [&](const T* at, int to) __attribute__((always_inline)) {
                if constexpr (std::is_same_v<T, float>) {
                    copy_async<sizeof(float4)>(grads + to + lane, at, true);
                } else {
                    grads[to + lane] = load_channels(at);
                }
            });
        } else {
#pragma unroll 1
            for (int channel = thread / lanes; channel < channels; channel += threads / lanes) {
                float* const staged = reinterpret_cast<float*>(grads) + channel;
                walk(from + channel * grad_output.stride_c, [&](const T* at, int to) __attribute__((always_inline)) {
                    if constexpr (std::is_same_v<T, float>) {
                        copy_async<sizeof(float)>(staged + to * kVector, at, true);
                    } else {
                        staged[to * kVector] = widen(load_input(at));
                    }
                });
            }
        }
    });
}

template <int N>
using Number = std::integral_constant<int, N>;

// Adds the products of a row of outputs for sources [Begin, End) of a unit.
template <int Begin, int End, int V>
__device__ __forceinline__ void add_row(const float4* grads, int step, int lanes, const float* masks, int apart,
                                        int count, float4 (&sums)[kOwn][V]) {
    int k = 0;
#pragma unroll 1
    for (; k + kVector <= count; k += kVector, masks += kVector) {
        float weights[End - Begin][kVector];
#pragma unroll
        for (int s = 0; s < End - Begin; s++) {
            const float4 four = staged_channels(masks + s * apart);
            weights[s][0] = four.x, weights[s][1] = four.y, weights[s][2] = four.z, weights[s][3] = four.w;
        }
#pragma unroll
        for (int q = 0; q < kVector; q++, grads += step) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float4 grad = grads[v * lanes];
#pragma unroll
                for (int s = Begin; s < End; s++) add_products(weights[s - Begin][q], grad, sums[s][v]);
            }
        }
    }
#pragma unroll 1
    for (; k < count; k++, masks++, grads += step) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            const float4 grad = grads[v * lanes];
#pragma unroll
            for (int s = Begin; s < End; s++) add_products(masks[(s - Begin) * apart], grad, sums[s][v]);
        }
    }
}

// V vectors of channels a thread. `Vectors`: one is a vector in memory.
template <int V, bool Vectors>
__global__ void __launch_bounds__(kMostThreads, 2)
    grad_features_tiles_kernel(Arguments arguments, GradFeaturesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const int k = static_cast<int>(p.kernel_size), radius = k / 2, vectors = plan.lanes * V;
    const int units = plan.unit_rows * plan.unit_columns, all = plan.outputs;
    BandLine* const rows = shared_memory<BandLine>();
    BandLine* const columns = rows + plan.most_rows;
    float4* const grads = reinterpret_cast<float4*>(columns + plan.most_columns);
    const int turned = (plan.lanes * kVector * (units | 1) + kVector - 1) / kVector;
    float* const masks = reinterpret_cast<float*>(grads + max(all * plan.depth, turned));
    float* const staged = masks + k * plan.band * plan.unit_columns * plan.slot;
    float* const scales = staged + k * k * all;
    int* const slots = reinterpret_cast<int*>(scales + all);
    int* const first_rows = slots + plan.unit_columns;  // of the windows that touch a source, and the next ones
    int* const first_columns = first_rows + plan.unit_rows * kOwn + k + 1;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % plan.lanes, part = thread / plan.lanes % plan.parts,
              unit = min(thread / (plan.lanes * plan.parts), units - 1);
    const bool has_unit = thread < units * plan.lanes * plan.parts;
    const int unit_row = unit / plan.unit_columns, unit_column = unit % plan.unit_columns;
    const int apart = plan.band * plan.unit_columns * plan.slot;  // from a row of taps to the next
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        __syncthreads();  // nobody reads the tables of the last tile, though no output touched it
        const Quotient block = divide(item, computed_late(plan.channel_blocks)),
                       tile = divide(block.quotient, computed_late(plan.column_tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.row_tiles)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        const int64_t n = image.quotient, group = image.remainder, channels_in_group = p.features.c / p.groups,
                      first_channel = block.remainder * vectors * kVector,
                      c = group * channels_in_group + first_channel;
        const int channels = static_cast<int>(min(channels_in_group - first_channel, int64_t{vectors} * kVector));
        const int top = static_cast<int>(tile_row.remainder) * plan.unit_rows * kOwn,
                  left = static_cast<int>(tile.remainder) * plan.unit_columns;
        const int out_top = plan.rows.first(top - radius), out_left = plan.columns.first(left - radius);
        const int out_rows = plan.rows.first(top + plan.unit_rows * kOwn + k - 1 - radius) - out_top,
                  out_columns = plan.columns.first(left + plan.unit_columns + k - 1 - radius) - out_left;
        const Array& array = p.from_logits ? p.logits : p.masks;
        const int64_t up = p.from_logits ? p.factor.up : 1;
        find_lines(p, plan.rows, out_top, out_rows, array.stride_h, up * array.stride_c, false, rows);
        find_lines(p, plan.columns, out_left, out_columns, array.stride_w, array.stride_c,
                   p.from_logits && array.stride_w < array.stride_c, columns);
#pragma unroll 1
        for (int d = thread; d <= plan.unit_rows * kOwn + k; d += threads)
            first_rows[d] = plan.rows.first(top + d - radius) - out_top;
#pragma unroll 1
        for (int d = thread; d <= plan.unit_columns + k; d += threads) {
            first_columns[d] = plan.columns.first(left + d - radius) - out_left;
            if (d < plan.unit_columns) slots[d] = d * plan.slot - first_columns[d];
        }
        __syncthreads();

        // Source s of this thread has rows [begin[s], end[s]) of outputs, and columns [out_j, out_j + own_columns).
        const int i = top + unit_row * kOwn, j = left + unit_column;
        const bool computes = has_unit && j < grad_features.w && lane * kVector < channels;
        const int out_j = first_columns[unit_column], own_columns = first_columns[unit_column + k] - out_j;
        const int* const begin = first_rows + unit_row * kOwn;
        const int* const end = begin + k;
        float4 sums[kOwn][V] = {};
#pragma unroll 1
        for (int first = 0; first < out_rows && out_columns > 0; first += plan.band) {
            const Band band{rows + first, min(plan.band, out_rows - first), columns, out_columns, plan.width, all};
            copy_masks(p, n, group, band, staged);
            copy_grads<Vectors>(p.grad_output, plan, n, c, channels, out_top + first, out_left, band, vectors, grads);
            wait_for_copies();
            __syncthreads();
            normalize_band(p.from_logits ? p.normalizer : CARAFEPP_NONE, k * k, band, staged, scales);
            __syncthreads();
            sort_masks(plan, k, band, top, left, slots, staged, scales, masks);
            __syncthreads();
            // Rows of outputs [from, to) have taps at the sources [lowest, highest).
            const auto add_rows = [&](auto lowest, auto highest, int from, int to) __attribute__((always_inline)) {
                constexpr int kLowest = decltype(lowest)::value, kHighest = decltype(highest)::value;
                int y = max(from - first, 0);
                y += (part - y) & (plan.parts - 1);
#pragma unroll 1
                for (; y < min(to - first, band.height); y += plan.parts) {
                    const int a = i + kLowest - band.rows[y].source + radius;
                    add_row<kLowest, kHighest>(grads + (y * band.width.number + out_j) * plan.depth + lane, plan.depth,
                                               plan.lanes,
                                               masks + a * apart + (y * plan.unit_columns + unit_column) * plan.slot,
                                               apart, own_columns, sums);
                }
            };
            if (computes) {
                add_rows(Number<0>(), Number<1>(), begin[0], begin[1]);
                add_rows(Number<0>(), Number<2>(), begin[1], begin[2]);
                add_rows(Number<0>(), Number<3>(), begin[2], begin[3]);
                add_rows(Number<0>(), Number<4>(), begin[3], end[0]);
                add_rows(Number<1>(), Number<4>(), end[0], end[1]);
                add_rows(Number<2>(), Number<4>(), end[1], end[2]);
                add_rows(Number<3>(), Number<4>(), end[2], end[3]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int s = 0; s < kOwn; s++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                for (int distance = plan.lanes; distance < plan.lanes * plan.parts; distance *= 2) {
                    float4& sum = sums[s][v];
                    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, distance);
                    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, distance);
                    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, distance);
                    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, distance);
                }
            }
        }
        if constexpr (Vectors) {
            if (!computes || part > 0) continue;
            with_storage(grad_features.dtype, [&](auto storage) {
                using T = decltype(storage);
                T* const to = element<T>(grad_features, n, c + lane * kVector, i, j);
#pragma unroll
                for (int s = 0; s < kOwn; s++) {
#pragma unroll
                    for (int v = 0; v < V; v++) {
                        const int channel = v * plan.lanes * kVector;
                        if (i + s < grad_features.h && channel + lane * kVector < channels)
                            store_channels(sums[s][v], to + s * grad_features.stride_h + channel);
                    }
                }
            });
        } else {
            // By way of shared memory, as neighbouring threads store neighbouring columns.
            float* const turn = reinterpret_cast<float*>(grads);  // [channel][unit]
            const int pitch = units | 1, channel = thread / units, own = thread - channel * units;
            const int own_row = top + own / plan.unit_columns * kOwn, own_column = left + own % plan.unit_columns;
            const int steps = threads / units;
#pragma unroll 1
            for (int turn_of = 0; turn_of < kOwn * V; turn_of++) {
                if (has_unit && part == 0) {
                    float* const to = turn + lane * kVector * pitch + unit;
#pragma unroll
                    for (int s = 0; s < kOwn; s++) {
#pragma unroll
                        for (int v = 0; v < V; v++) {
                            if (turn_of != v * kOwn + s) continue;
                            to[0] = sums[s][v].x, to[pitch] = sums[s][v].y;
                            to[2 * pitch] = sums[s][v].z, to[3 * pitch] = sums[s][v].w;
                        }
                    }
                }
                __syncthreads();
                const int i_ = own_row + turn_of % kOwn, before = turn_of / kOwn * plan.lanes * kVector;
                if (channel < steps && i_ < grad_features.h && own_column < grad_features.w) {
                    with_storage(grad_features.dtype, [&](auto storage) {
                        using T = decltype(storage);
                        T* to = element<T>(grad_features, n, c + before + channel, i_, own_column);
#pragma unroll 1
                        for (int of = channel; of < min(plan.lanes * kVector, channels - before);
                             of += steps, to += steps * grad_features.stride_c)
                            *to = narrow<T>(turn[of * pitch + own]);
                    });
                }
                __syncthreads();
            }
        }
    }
}

template <bool Vectors>
void grad_features_tiles(const Problem& p, const Array& grad_features) {
    const bool wide = p.features.c / p.groups > kMostLanes * kVector;
    const GradFeaturesPlan plan(p, wide ? 2 : 1, Vectors);
    const auto kernel = wide ? grad_features_tiles_kernel<2, Vectors> : grad_features_tiles_kernel<1, Vectors>;
    launch(kernel, plan.items, plan.threads, plan.shared_bytes, p, grad_features, plan);
}

// Why no tile can be planned for a problem.
inline const char* not_for_grad_features_tiles(const Problem& p) {
    if (const char* reason = not_for_bands(p)) return reason;
    if (p.kernel_size < 3) return "kernel_size is less than 3";
    return GradFeaturesPlan(p, 2, false).shared_bytes > kMostSharedBytes ? "kernel_size or the factor is too large"
                                                                         : nullptr;
}

}  // namespace carafepp::cuda
