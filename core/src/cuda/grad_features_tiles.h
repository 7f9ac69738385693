// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor, of problems that grad_features_units.h leaves. A block has a tile of sources
// in a slice of channels. It goes through the outputs whose windows touch the tile, in bands of rows. It stages the
// masks of a band as [output][tap], and in smaller bands grad_output, with four channels of a pixel in a vector. A
// thread has a unit, kOwn sources of a row, in some vectors of channels. A vector of grad_output serves each source of
// the unit whose window has it, and a mask serves all vectors. Each column of sources that outputs are centred on has a
// loop of its own, which knows the sources that such outputs touch. Where units are few, several threads have one, each
// every so many rows of a band.
#pragma once

#include "cuda/grad_output.h"

namespace carafepp::cuda {

constexpr int kOwn = 4;                 // sources of a thread
constexpr int kThreadsOfTile = 256;     // at most
constexpr int kMostLanes = 32;          // threads of a unit along the channels: a warp
constexpr int kFewestLanes = 8;         // of those, if there are channels
constexpr int kMostParts = 8;           // threads of a unit along the rows of a band
constexpr int kMostUnitColumns = 16;    // of a tile
constexpr int kTapsOfThread = 13;       // of an output, at most: half of 5 x 5, a quarter of 7 x 7
constexpr int kMostWindow = 19;         // kernel_size: a warp has the taps of an output
constexpr int kBlocksAtOnce = 2 * 132;  // that a large device runs

struct GradFeaturesPlan {
    Outputs rows, columns;
    int lanes, parts, threads;
    int height, unit_columns;     // rows of sources and units in a row, of a tile
    int most_rows, most_columns;  // of outputs whose windows touch a tile
    int band, mask_band;          // rows of which grad_output and masks are staged at once
    Divisor width;                // of a row of a band: odd where threads of a warp have several rows
    int depth;                    // vectors from pixel to pixel: odd, as pixels begin in other banks then
    int64_t tap;                  // elements from tap to tap of masks or logits
    int log_together;             // 2^log_together threads have the taps of an output
    CopyPlan copy;
    bool whole_units;  // four columns are stored at once
    int64_t row_tiles, column_tiles;
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    // With `vectors` of channels of a thread.
    GradFeaturesPlan(const Problem& p, int vectors, bool channels_adjacent, const Array& grad_features)
        : GradFeaturesPlan(p, 1, vectors) {
        const int64_t all = std::max<int64_t>(ceil_div(p.features.c / p.groups, kVector), 1);
        const int k = static_cast<int>(p.kernel_size);
        int most_lanes = 1;
        while (most_lanes < kMostLanes && most_lanes * vectors < all) most_lanes *= 2;
        GradFeaturesPlan best = *this;
        double least = INFINITY;
        for (int tried = most_lanes; tried >= kFewestLanes || least == INFINITY; tried /= 2) {
            GradFeaturesPlan plan(p, tried, vectors);
            plan.channel_blocks = ceil_div(all, tried * vectors);
            const double cost = plan.choose_tile(p, k, vectors);
            if (cost < least) least = cost, best = plan;
        }
        *this = best;
        choose_bands(k);
        tap = p.from_logits ? p.logits.stride_c * p.factor.up * p.factor.up : p.masks.stride_c;
        whole_units = not_for_columns(grad_features, kOwn) == nullptr;
        const int units = height * unit_columns;
        const int most_parts = std::min({band, kMostParts, 32 / lanes, kThreadsOfTile / (units * lanes)});
        for (parts = 1; parts * 2 <= most_parts;) parts *= 2;
        threads = kThreadsOfTile;  // they stage more at once
        copy = CopyPlan(channels_adjacent, threads, lanes * vectors, most_columns, depth);
    }

    // Is there shared memory for one unit?
    static bool fits(const Problem& p) { return GradFeaturesPlan(p, 1, 2).shared_bytes <= kMostSharedBytes; }

private:
    GradFeaturesPlan(const Problem& p, int lanes, int vectors)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          lanes(lanes),
          width(1),
          depth(lanes * vectors | 1),
          log_together(0),
          copy(false, 1, 1, 1, depth) {
        while (kTapsOfThread << log_together < p.taps()) log_together++;
        measure(static_cast<int>(p.kernel_size), 1, 1);
    }

    int64_t shared_bytes_of(int k) const {
        return (most_rows + most_columns) * int64_t{sizeof(BandLine)} +
               int64_t{band} * width.number * depth * int64_t{sizeof(float4)} +
               (int64_t{mask_band} * width.number * k * k + height + unit_columns * kOwn + 2 * (k + 1)) *
                   int64_t{sizeof(float)};
    }

    // Tiles of `tile_height` rows of `units`, in bands of one row.
    void measure(int k, int tile_height, int units) {
        height = tile_height;
        unit_columns = units;
        most_rows = std::max(rows.most(height + k - 1), 1);
        most_columns = std::max(columns.most(unit_columns * kOwn + k - 1), 1);
        width = Divisor(lanes < 32 ? most_columns | 1 : most_columns);
        band = mask_band = 1;
        shared_bytes = shared_bytes_of(k);
    }

    // The tile whose instructions are the fewest, for a device that runs kBlocksAtOnce; returns how many a
    // multiprocessor runs, about.
    double choose_tile(const Problem& p, int k, int vectors) {
        const int most_units = kThreadsOfTile / lanes, units_of_warp = 32 / lanes;
        const int all_units = static_cast<int>(std::max<int64_t>(ceil_div(p.features.w, kOwn), 1));
        const int64_t images = p.features.n * p.groups * channel_blocks;
        const double visits = double(rows.most(k)) * columns.most(kOwn + k - 1);
        double least = INFINITY;
        int best_height = 1, best_columns = 1;
        for (int most = std::min({all_units, most_units, kMostUnitColumns}), tried = 0; most > 0;
             most -= (most + 3) / 4) {
            const int in_row = even_part(all_units, most);
            if (in_row == tried) continue;
            tried = in_row;
            const double rows_of_warp = in_row % units_of_warp == 0 ? 1 : 1 + double(units_of_warp) / in_row;
            for (int rows_tried = 0, h = most_units / in_row; h > 0; h -= (h + 3) / 4) {
                const int tile_height = even_part(p.features.h, h);
                if (tile_height == rows_tried) continue;
                rows_tried = tile_height;
                measure(k, tile_height, in_row);
                if (shared_bytes > kMostSharedBytes) continue;
                const int64_t tiles = images * ceil_div(p.features.h, height) * ceil_div(all_units, unit_columns);
                const double outputs = double(most_rows) * most_columns;
                const double bands = outputs * (depth * 16 + k * k * 4) / kMostSharedBytes;
                // Instructions of warps: masks and grad_output of an output, products.
                const double cost = 6000 + 1500 * bands + outputs * ((10 << log_together) + 0.3 * lanes * vectors) +
                                    visits * (k - 1 + rows_of_warp) / k * height * unit_columns * lanes / 32 *
                                        (12 + 10 * vectors);
                const double total = cost * static_cast<double>(ceil_div(tiles, kBlocksAtOnce));
                if (total < least) least = total, best_height = height, best_columns = unit_columns;
            }
        }
        measure(k, best_height, best_columns);
        row_tiles = ceil_div(p.features.h, height);
        column_tiles = ceil_div(all_units, unit_columns);
        items = images * row_tiles * column_tiles;
        return least;
    }

    // Bands as high as fit; where one row of grad_output takes much, masks of more rows.
    void choose_bands(int k) {
        const auto fit = [&](int rows_of_grads, int rows_of_masks) {
            band = rows_of_grads, mask_band = rows_of_masks;
            shared_bytes = shared_bytes_of(k);
            return shared_bytes <= kMostSharedBytes;
        };
        const int enough = static_cast<int>(ceil_div((2 * 256) >> log_together, width.number));
        int both = most_rows, masks = 0;
        while (both > 1 && !fit(both, both)) both--;
        for (masks = std::min(most_rows, std::max(both, enough)); masks > 1 && !fit(both, masks);) {
            if (both > 1) {
                both--;
            } else {
                masks--;
            }
        }
        masks = even_part(most_rows, masks);
        fit(even_part(masks, both), masks);
    }
};

// Stages masks of a band as to[output][tap], from `first_element` of masks or logits on. Neighbouring threads,
// 2^log_together, have the taps of an output in registers. All lanes of a warp call it, as they reduce.
__device__ __forceinline__ void stage_outputs(const Array& array, carafepp_normalizer normalizer, int64_t first_element,
                                              int64_t tap, int taps, const Band& band, int log_together, float* to) {
    const int thread = thread_computed_late(), threads = static_cast<int>(blockDim.x), together = 1 << log_together;
    const int lane = thread & (together - 1), outputs = band.height * band.width.number;
    const int64_t step = together * tap;
    const bool of_float = array.dtype == CARAFEPP_FLOAT32;
    const bool sigmoids = normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
    const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
    first_element += lane * tap;
#pragma unroll 1
    for (int before = 0; before < outputs; before += threads >> log_together) {
        const int output = before + (thread >> log_together), y = band.width.quotient(output),
                  column = output - y * band.width.number;
        const bool exists = y < band.height && column < band.columns_count;
        const int x = exists ? band.columns[column].in_memory : 0;
        const int count = exists ? (taps - lane + together - 1) >> log_together : 0;
        const int64_t place = exists ? first_element + band.rows[y].from + band.columns[x].from : 0;
        float* const staged = to + (output - column + x) * taps + lane;
        float values[kTapsOfThread];  // those that do not exist change no sum
        if (of_float) {
            const float* from = static_cast<const float*>(array.data) + place;
#pragma unroll
            for (int i = 0; i < kTapsOfThread; i++, from += step) values[i] = i < count ? load_input(from) : -INFINITY;
        }
        const auto store = [&]() __attribute__((always_inline)) {
            float* at = staged;
#pragma unroll
            for (int i = 0; i < kTapsOfThread; i++, at += together) {
                if (i < count) *at = values[i];
            }
        };
        if (!of_float || sigmoids) {  // by way of shared memory, as loops there are short
            float* at = staged;
            if (of_float) {
                store();
            } else {
                const Bits16* from = static_cast<const Bits16*>(array.data) + place;
                const Widen16 widened{array.dtype == CARAFEPP_FLOAT16};
                repeat<4>(count, [&]() __attribute__((always_inline)) {
                    *at = widened(load_input(from));
                    at += together, from += step;
                });
            }
            if (sigmoids) {
                at = staged;
#pragma unroll 1
                for (int i = 0; i < count; i++, at += together)
                    *at = normalizer == CARAFEPP_SIGMOID ? sigmoid(*at) : log_sigmoid(*at);
            }
            if (!divides) continue;
            at = staged;
#pragma unroll
            for (int i = 0; i < kTapsOfThread; i++, at += together) values[i] = i < count ? *at : -INFINITY;
        }
        if (divides) {
            float largest = -INFINITY, sum = 0;
#pragma unroll
            for (int i = 0; i < kTapsOfThread; i++) largest = fmaxf(values[i], largest);
#pragma unroll 1
            for (int distance = 1; distance < together; distance *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
#pragma unroll
            for (int i = 0; i < kTapsOfThread; i++) {
                values[i] = power_of_2((values[i] - largest) * kLog2OfE);  // the difference first: logits may be huge
                sum += values[i];
            }
#pragma unroll 1
            for (int distance = 1; distance < together; distance *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            const float scale = 1 / sum;
#pragma unroll
            for (int i = 0; i < kTapsOfThread; i++) values[i] *= scale;
        }
        store();
    }
}

// A thread adds the products of these, in a row of outputs.
struct RowOfOutputs {
    const float* masks;  // of output 0, the tap that leads from column x of sources to source x - (K - 1) of the unit
    const float4* grads;
    int taps, depth;
    const int* begins;  // the outputs centred on column x of sources are [begins[x], begins[x + 1])
};

// Adds the products of outputs centred on columns [x, x_end) of sources, for sources [Begin, End) of a unit.
template <int Begin, int End, int V>
__device__ __forceinline__ void add_columns(const RowOfOutputs& row, int x, int x_end, int lanes,
                                            float4 (&sums)[kOwn][V]) {
    int output = row.begins[x];
#pragma unroll 1
    for (; x < x_end; x++) {
        const int end = row.begins[x + 1];
        const float* mask = row.masks + output * row.taps - x;
        const float4* grad = row.grads + output * row.depth;
#pragma unroll 1
        for (; output < end; output++, mask += row.taps, grad += row.depth) {
            float4 values[V];
#pragma unroll
            for (int v = 0; v < V; v++) values[v] = grad[v * lanes];
#pragma unroll
            for (int s = Begin; s < End; s++) {
                const float weight = mask[s];
#pragma unroll
                for (int v = 0; v < V; v++) add_products(weight, values[v], sums[s][v]);
            }
        }
    }
}

// V vectors of channels a thread. `Vectors`: one is a vector in memory.
template <int V, bool Vectors>
__global__ void __launch_bounds__(kThreadsOfTile, 2)
    grad_features_tiles_kernel(Arguments arguments, GradFeaturesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int k = static_cast<int>(p.kernel_size), radius = k / 2, taps = k * k;
    const int lanes = plan.lanes, vectors = lanes * V, depth = plan.depth;
    BandLine* const rows = shared_memory<BandLine>();
    BandLine* const columns = rows + plan.most_rows;
    float4* const grads = reinterpret_cast<float4*>(columns + plan.most_columns);
    float* const masks = reinterpret_cast<float*>(grads + plan.band * plan.width.number * depth);
    // The first output of the windows that touch a source, and further ones.
    int* const first_rows = reinterpret_cast<int*>(masks + plan.mask_band * plan.width.number * taps);
    int* const first_columns = first_rows + plan.height + k + 1;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % lanes,
              part = thread / lanes % plan.parts, unit = thread / (lanes * plan.parts);
    const int unit_row = unit / plan.unit_columns, unit_column = unit - unit_row * plan.unit_columns;
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
        const int top = static_cast<int>(tile_row.remainder) * plan.height,
                  left = static_cast<int>(tile.remainder) * plan.unit_columns * kOwn;
        const int out_top = plan.rows.first(top - radius), out_left = plan.columns.first(left - radius);
        const int out_rows = plan.rows.first(top + plan.height + k - 1 - radius) - out_top,
                  out_columns = plan.columns.first(left + plan.unit_columns * kOwn + k - 1 - radius) - out_left;
        const int64_t up = p.from_logits ? p.factor.up : 1;
        find_lines(p, plan.rows, out_top, out_rows, array.stride_h, up * array.stride_c, false, rows);
        find_lines(p, plan.columns, out_left, out_columns, array.stride_w, array.stride_c,
                   p.from_logits && array.stride_w < array.stride_c, columns);
#pragma unroll 1
        for (int d = thread; d <= plan.height + k; d += threads)
            first_rows[d] = plan.rows.first(top + d - radius) - out_top;
#pragma unroll 1
        for (int d = thread; d <= plan.unit_columns * kOwn + k; d += threads)
            first_columns[d] = plan.columns.first(left + d - radius) - out_left;
        __syncthreads();

        const int i = top + unit_row, j = left + unit_column * kOwn;
        const bool computes = unit_row < plan.height && i < grad_features.h && j < grad_features.w &&
                              lane * kVector < channels;
        const int begin_row = computes ? first_rows[unit_row] : 0, end_row = computes ? first_rows[unit_row + k] : 0;
        const int64_t first_mask = n * array.stride_n + group * taps * plan.tap;
        const int64_t first_grad = n * p.grad_output.stride_n + c * p.grad_output.stride_c +
                                   out_top * p.grad_output.stride_h + out_left * p.grad_output.stride_w;
        float4 sums[kOwn][V] = {};
#pragma unroll 1
        for (int first = 0, mask_first = 0, mask_end = 0; first < out_rows && out_columns > 0;) {
            if (first == mask_end) {
                mask_first = first;
                mask_end = min(first + plan.mask_band, out_rows);
                stage_outputs(array, p.from_logits ? p.normalizer : CARAFEPP_NONE, first_mask, plan.tap, taps,
                              {rows + first, mask_end - first, columns, out_columns, plan.width}, plan.log_together,
                              masks);
            }
            const Band band{rows + first, min(plan.band, mask_end - first), columns, out_columns, plan.width};
            copy_band<Vectors>(p.grad_output, first_grad + first * p.grad_output.stride_h, channels, band, plan.copy,
                               grads);
            wait_for_copies();
            __syncthreads();
            const int end = min(end_row, first + band.height);
#pragma unroll 1
            for (int y = max(begin_row, first) + part; y < end; y += plan.parts) {
                const int a = i - rows[y].source + radius;
                const RowOfOutputs row{masks + (y - mask_first) * plan.width.number * taps + a * k + k - 1,
                                       grads + (y - first) * plan.width.number * depth + lane, taps, depth,
                                       first_columns + unit_column * kOwn};
                add_columns<0, 1>(row, 0, 1, lanes, sums);
                add_columns<0, 2>(row, 1, 2, lanes, sums);
                add_columns<0, 3>(row, 2, 3, lanes, sums);
                add_columns<0, 4>(row, 3, k, lanes, sums);
                add_columns<1, 4>(row, k, k + 1, lanes, sums);
                add_columns<2, 4>(row, k + 1, k + 2, lanes, sums);
                add_columns<3, 4>(row, k + 2, k + 3, lanes, sums);
            }
            first += band.height;
            __syncthreads();
        }
        for (int distance = lanes; distance < lanes * plan.parts; distance *= 2) {
#pragma unroll
            for (int s = 0; s < kOwn; s++) {
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float4& sum = sums[s][v];
                    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, distance);
                    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, distance);
                    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, distance);
                    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, distance);
                }
            }
        }
        if (!computes || part > 0) continue;
        const int own = static_cast<int>(min(grad_features.w - j, int64_t{kOwn}));
        with_storage(grad_features.dtype, [&](auto storage) {
            using T = decltype(storage);
            store_unit<Vectors>(sums, own, channels - lane * kVector, lanes * kVector, plan.whole_units, grad_features,
                                element<T>(grad_features, n, c + lane * kVector, i, j));
        });
    }
}

template <bool Vectors>
void grad_features_tiles(const Problem& p, const Array& grad_features) {
    const int vectors = p.features.c / p.groups > kVector ? 2 : 1;
    const GradFeaturesPlan plan(p, vectors, Vectors, grad_features);
    const auto kernel = vectors == 2 ? grad_features_tiles_kernel<2, Vectors> : grad_features_tiles_kernel<1, Vectors>;
    launch(kernel, plan.items, plan.threads, plan.shared_bytes, p, grad_features, plan);
}

// Why no tile can be planned for a problem.
inline const char* not_for_grad_features_tiles(const Problem& p) {
    if (const char* reason = not_for_bands(p)) return reason;
    if (p.kernel_size < 3) return "kernel_size is less than 3";
    if (p.kernel_size > kMostWindow) return "kernel_size is more than 19";
    return GradFeaturesPlan::fits(p) ? nullptr : "the factor is too large";
}

}  // namespace carafepp::cuda
