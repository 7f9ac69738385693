// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor and a kernel_size of 3, 5 or 7, in 16 channels of a group or more. A block
// has a tile of sources in a slice of channels. A thread has a unit: four sources of a row in four vectors of channels,
// whose sums stay in registers. The block goes through the outputs whose windows touch the tile, in bands of rows. It
// stages their masks, and grad_output with four channels of a pixel in a vector. Masks that lead from an output to the
// sources of a unit are one vector, too. So an output costs a thread five loads, and 64 products where its window has
// all four sources. Each column of sources that outputs are centred on has code of its own, which knows the sources
// that such outputs touch.
#pragma once

#include "cuda/grad_output.h"

namespace carafepp::cuda {

constexpr int kSources = 4;           // of a unit
constexpr int kVectorsOfThread = 4;   // of channels
constexpr int kThreadsOfUnits = 256;  // at most
constexpr int kMostLanesOfUnit = 16;  // threads of a unit
constexpr int kLargeDevice = 132;     // multiprocessors

// The masks of an output in shared memory: rows of taps, each tap at the place that its source has in a unit.
template <int K>
constexpr int kRowOfTaps = (K + kSources - 1 + 3) / 4 * 4;
template <int K>
constexpr int kOfOutput = K * kRowOfTaps<K> | 4;  // neighbours begin in other banks
inline int taps_of_output(int64_t k) { return k == 3 ? kOfOutput<3> : k == 5 ? kOfOutput<5> : kOfOutput<7>; }

struct UnitsPlan {
    Outputs rows, columns;
    int lanes, threads;
    int height, unit_columns;     // rows of sources and units in a row, of a tile
    int most_rows, most_columns;  // of outputs whose windows touch a tile
    int band;                     // rows that are staged at once
    Divisor width;                // of a row of a band
    int depth;                    // vectors from pixel to pixel: odd, as pixels begin in other banks then
    int tap;                      // elements from tap to tap of masks or logits
    CopyPlan copy;
    bool whole_units;  // four columns are stored at once
    int64_t row_tiles, column_tiles;
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;
    double cost;  // INFINITY: no tile fits

    UnitsPlan(const Problem& p, bool channels_adjacent, const Array& grad_features)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          width(1),
          tap(static_cast<int>(taps_apart(p, p.from_logits ? p.logits : p.masks))),
          copy(false, 1, 1, 1, 1),
          whole_units(not_for_columns(grad_features, kSources) == nullptr),
          cost(INFINITY) {
        const int64_t all = ceil_div(p.features.c / p.groups, kVector);
        int tried = kMostLanesOfUnit;
        while (tried > 1 && tried / 2 * kVectorsOfThread >= all) tried /= 2;
        UnitsPlan best = *this;
        for (int most = tried; tried > 0 && tried >= most / 4; tried /= 2) {
            lanes = tried;
            depth = lanes * kVectorsOfThread | 1;
            channel_blocks = ceil_div(all, lanes * kVectorsOfThread);
            try_tiles(p, channels_adjacent, best);
        }
        *this = best;
        if (cost == INFINITY) return;
        const int vectors = lanes * kVectorsOfThread;
        threads = std::max(static_cast<int>(ceil_div(height * unit_columns * lanes, 32)) * 32, vectors);
        copy = CopyPlan(channels_adjacent, threads, vectors, most_columns, depth);
    }

private:
    // Tiles of `tile_height` rows of `units`, in bands as high as fit. False if none does.
    bool measure(int k, int tile_height, int units) {
        height = tile_height;
        unit_columns = units;
        most_rows = std::max(rows.most(height + k - 1), 1);
        most_columns = std::max(columns.most(unit_columns * kSources + k - 1), 1);
        const int64_t lines = (most_rows + most_columns) * int64_t{sizeof(BandLine)} +
                              (height + unit_columns * kSources + 2 * (k + 1)) * int64_t{sizeof(int)};
        const int64_t row = most_columns *
                            (depth * int64_t{sizeof(float4)} + taps_of_output(k) * int64_t{sizeof(float)});
        const int64_t most = std::min<int64_t>((kMostAskedBytes - lines) / row, most_rows);
        if (most < 1) return false;
        band = static_cast<int>(ceil_div(most_rows, ceil_div(most_rows, most)));
        shared_bytes = lines + band * row;
        return true;
    }

    // Tries tiles; `best` becomes the one with the fewest instructions on the multiprocessor that has the most tiles.
    void try_tiles(const Problem& p, bool channels_adjacent, UnitsPlan& best) {
        const int k = static_cast<int>(p.kernel_size), most_units = kThreadsOfUnits / lanes;
        const int all_units = static_cast<int>(std::max<int64_t>(ceil_div(p.features.w, kSources), 1));
        // Instructions, and cycles of an L1.
        const double outputs_of_row = columns.most(kSources + k - 1),
                     of_output = kVector * kVectorsOfThread * 4.0 * k / (k + 3) + 14,
                     of_mask = k == 3   ? 5
                               : k == 5 ? 13
                                        : 25,
                     grads = lanes * kVectorsOfThread / 32.0;
        for (int tried = 0, in_row = std::min(all_units, most_units); in_row > 0; in_row -= (in_row + 3) / 4) {
            const int even_row = static_cast<int>(ceil_div(all_units, ceil_div(all_units, in_row)));
            if (even_row == tried) continue;
            tried = even_row;
            // Rows of a band that a warp goes through, as its units may be in several rows of sources.
            const int rows_of_warp = (32 / lanes - 1) / even_row + 1;
            const double visits = rows.most(k + rows_of_warp - 1);
            for (int h = std::min<int>(most_units / even_row, p.features.h); h > 0; h -= (h + 3) / 4) {
                if (!measure(k, h, even_row)) continue;
                row_tiles = ceil_div(p.features.h, height);
                column_tiles = ceil_div(all_units, unit_columns);
                items = p.features.n * p.groups * channel_blocks * row_tiles * column_tiles;
                const double warps = static_cast<double>(ceil_div(height * unit_columns * lanes, 32));
                const double staged = double(most_rows) * most_columns, columns_of_rows = visits * (k + kSources);
                const double instructions = warps * (500 + 100.0 * ceil_div(most_rows, band) + columns_of_rows * 6 +
                                                     visits * outputs_of_row * of_output) +
                                            staged * (of_mask + grads * (channels_adjacent ? 6 : 12));
                const double cycles = warps * (visits * outputs_of_row * 17 + 200) + staged * (grads * 8 + k * k / 4.0);
                cost = std::max(instructions / 2.4, cycles) + std::min(instructions / 2.4, cycles) / 4;
                cost *= static_cast<double>(ceil_div(items, kLargeDevice));
                if (cost >= best.cost) continue;
                width = Divisor(most_columns);
                best = *this;
            }
        }
    }
};

// Rows of taps of an output in a thread: three, or two of seven.
template <int K>
struct RowsOfTaps {
    static constexpr int kThreads = K == 3   ? 1
                                    : K == 5 ? 2
                                             : 4,
                         kRows = (K + kThreads - 1) / kThreads, kCount = kRows * K;

    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int k = 0; k < kCount; k++) f(k, k);
    }
    template <class F>
    __device__ __forceinline__ float over_threads(float value, F f) const {
#pragma unroll
        for (int distance = 1; distance < kThreads; distance *= 2)
            value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
        return value;
    }
};

// Stages masks of a band as to[output][row of taps]. All lanes of a warp call it, as they reduce.
template <int K>
__device__ __forceinline__ void stage_rows_of_taps(const Array& array, carafepp_normalizer normalizer, int tap,
                                                   const Band& band, float* to) {
    using Taps = RowsOfTaps<K>;
    const int thread = thread_computed_late(), first_row = thread % Taps::kThreads * Taps::kRows;
    const int outputs = band.height * band.width.number, step = static_cast<int>(blockDim.x) / Taps::kThreads;
    const bool of_float = array.dtype == CARAFEPP_FLOAT32;
    const Widen16 widened{array.dtype == CARAFEPP_FLOAT16};
    const bool sigmoids = normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
    const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
#pragma unroll 1
    for (int before = 0; before < outputs; before += step) {
        const int output = before + thread / Taps::kThreads, y = band.width.quotient(output),
                  column = output - y * band.width.number;
        const bool exists = y < band.height && column < band.columns_count;
        const int x = exists ? band.columns[column].in_memory : 0;
        const int64_t place = exists ? band.rows[y].from + band.columns[x].from : 0;
        const auto has = [&](int t) { return exists && (K % Taps::kRows == 0 || first_row + t / K < K); };
        float taps[Taps::kCount];  // those that do not exist change no sum
        const float* from_float = at_stride(static_cast<const float*>(array.data) + place, tap, first_row * K);
#pragma unroll
        for (int t = 0; t < Taps::kCount; t++)
            taps[t] = of_float && has(t) ? load_input(at_stride(from_float, tap, t)) : -INFINITY;
        float* const staged = to + (output - column + x) * kOfOutput<K> + first_row * kRowOfTaps<K> +
                              ((band.columns[x].source - K / 2) & (kSources - 1));
        const auto store = [&]() __attribute__((always_inline)) {
#pragma unroll
            for (int t = 0; t < Taps::kCount; t++) {
                if (has(t)) staged[t / K * kRowOfTaps<K> + t % K] = taps[t];
            }
        };
        if (!of_float || sigmoids) {  // by way of shared memory, as loops there are short
            if (of_float) store();
            const Bits16* from = at_stride(static_cast<const Bits16*>(array.data) + place, tap, first_row * K);
            float* row = staged;
#pragma unroll 1
            for (int t = 0; t < Taps::kCount && has(t); t += K, row += kRowOfTaps<K>) {
#pragma unroll 1
                for (int b = 0; b < K; b++, from += tap) {
                    if (!of_float) row[b] = widened(load_input(from));
                    if (sigmoids) row[b] = normalizer == CARAFEPP_SIGMOID ? sigmoid(row[b]) : log_sigmoid(row[b]);
                }
            }
            if (!divides) continue;
#pragma unroll
            for (int t = 0; t < Taps::kCount; t++) taps[t] = has(t) ? staged[t / K * kRowOfTaps<K> + t % K] : -INFINITY;
        }
        if (divides) normalize_registers(CARAFEPP_SOFTMAX, Taps(), taps);
        store();
    }
}

// The operands that a thread multiplies next, in a row of outputs.
struct NextOutput {
    const float* masks;
    const float4* grads;
    int number;
};

// Adds the products of outputs centred on column X of sources, and on later ones. Source 0 of the unit is column K - 1,
// less than half a window further than it is. Outputs of column x end with number ends[x].
template <int K, int X = 0>
__device__ __forceinline__ void add_outputs(NextOutput next, const int* ends, int depth, int lanes,
                                            float4 (&sums)[kSources][kVectorsOfThread]) {
    constexpr int kBegin = X < K ? 0 : X - (K - 1), kEnd = X < kSources ? X + 1 : kSources;
    constexpr int kPlace = X < K ? (K - 1 - X + 3) / 4 : 0;  // the vector of a row of taps
    const int end = ends[X];
#pragma unroll 1
    for (; next.number < end; next.number++, next.masks += kOfOutput<K>, next.grads += depth) {
        const float4 masks = reinterpret_cast<const float4*>(next.masks)[kPlace];
        float4 values[kVectorsOfThread];
#pragma unroll
        for (int v = 0; v < kVectorsOfThread; v++) values[v] = next.grads[v * lanes];
        const float weights[] = {masks.x, masks.y, masks.z, masks.w};
#pragma unroll
        for (int s = kBegin; s < kEnd; s++) {
#pragma unroll
            for (int v = 0; v < kVectorsOfThread; v++) add_products(weights[s], values[v], sums[s][v]);
        }
    }
    if constexpr (X + 1 < K + kSources - 1) add_outputs<K, X + 1>(next, ends, depth, lanes, sums);
}

// `Vectors`: four channels of a pixel are a vector in memory.
template <int K, bool Vectors>
__global__ void __launch_bounds__(kThreadsOfUnits, 2) grad_features_units_kernel(Arguments arguments, UnitsPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& array = p.from_logits ? p.logits : p.masks;
    constexpr int kRadius = K / 2;
    const int lanes = plan.lanes, vectors = lanes * kVectorsOfThread, depth = plan.depth, width = plan.width.number;
    BandLine* const rows = shared_memory<BandLine>();
    BandLine* const columns = rows + plan.most_rows;
    float4* const grads = reinterpret_cast<float4*>(columns + plan.most_columns);
    float* const masks = reinterpret_cast<float*>(grads + plan.band * width * depth);
    // The first output of the windows that touch a source, and further ones.
    int* const first_rows = reinterpret_cast<int*>(masks + plan.band * width * kOfOutput<K>);
    int* const first_columns = first_rows + plan.height + K + 1;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % lanes,
              unit = thread / lanes;
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
                  left = static_cast<int>(tile.remainder) * plan.unit_columns * kSources;
        const int out_top = plan.rows.first(top - kRadius), out_left = plan.columns.first(left - kRadius);
        const int out_rows = plan.rows.first(top + plan.height + K - 1 - kRadius) - out_top,
                  out_columns = plan.columns.first(left + plan.unit_columns * kSources + K - 1 - kRadius) - out_left;
        const int64_t up = p.from_logits ? p.factor.up : 1;
        find_lines(p, plan.rows, out_top, out_rows, array.stride_h, up * array.stride_c, false, rows,
                   n * array.stride_n + int64_t{plan.tap} * (group * K * K));
        find_lines(p, plan.columns, out_left, out_columns, array.stride_w, array.stride_c,
                   p.from_logits && array.stride_w < array.stride_c, columns);
#pragma unroll 1
        for (int d = thread; d <= plan.height + K; d += threads)
            first_rows[d] = plan.rows.first(top + d - kRadius) - out_top;
#pragma unroll 1
        for (int d = thread; d <= plan.unit_columns * kSources + K; d += threads)
            first_columns[d] = plan.columns.first(left + d - kRadius) - out_left;
        __syncthreads();

        const int i = top + unit_row, j = left + unit_column * kSources;
        const bool computes = unit_row < plan.height && i < grad_features.h && j < grad_features.w &&
                              lane * kVector < channels;
        const int begin_row = computes ? first_rows[unit_row] : 0, end_row = computes ? first_rows[unit_row + K] : 0;
        const int* const begins = first_columns + (computes ? unit_column * kSources : 0);
        int64_t first_grad = n * p.grad_output.stride_n + c * p.grad_output.stride_c +
                             out_top * p.grad_output.stride_h + out_left * p.grad_output.stride_w;
        const int64_t to = n * grad_features.stride_n + (c + lane * kVector) * grad_features.stride_c +
                           i * grad_features.stride_h + j * grad_features.stride_w;
        float4 sums[kSources][kVectorsOfThread] = {};
#pragma unroll 1
        for (int first = 0; first < out_rows && out_columns > 0; first += plan.band) {
            const Band band{rows + first, min(plan.band, out_rows - first), columns, out_columns, plan.width};
            copy_band<Vectors>(p.grad_output, first_grad, channels, band, plan.copy, grads);
            first_grad += plan.band * p.grad_output.stride_h;
            stage_rows_of_taps<K>(array, p.from_logits ? p.normalizer : CARAFEPP_NONE, plan.tap, band, masks);
            wait_for_copies();
            __syncthreads();
            const int end = min(end_row, first + band.height);
#pragma unroll 1
            for (int y = max(begin_row, first); y < end; y++) {
                const int a = i - rows[y].source + kRadius, begin = begins[0], output = (y - first) * width + begin;
                add_outputs<K>(
                    {masks + output * kOfOutput<K> + a * kRowOfTaps<K>, grads + output * depth + lane, begin},
                    begins + 1, depth, lanes, sums);
            }
            __syncthreads();
        }
        if (!computes) continue;
        const int own = static_cast<int>(min(grad_features.w - j, int64_t{kSources}));
        with_storage(grad_features.dtype, [&](auto storage) {
            using T = decltype(storage);
            store_unit<Vectors>(sums, own, channels - lane * kVector, lanes * kVector, plan.whole_units, grad_features,
                                static_cast<T*>(grad_features.data) + to);
        });
    }
}

// Why this kernel does not take a problem that grad_features_tiles does.
inline const char* not_for_units(const Problem& p) {
    if (p.kernel_size != 3 && p.kernel_size != 5 && p.kernel_size != 7) return "kernel_size is not 3, 5 or 7";
    if (p.features.c / p.groups < kVectorsOfThread * kVector) return "channels of a group are few";
    const int64_t tap = taps_apart(p, p.from_logits ? p.logits : p.masks);
    return std::abs(tap) < INT32_MAX / 64 ? nullptr : "taps are too far apart";
}

template <bool Vectors>
void grad_features_units(const Problem& p, const Array& grad_features, const UnitsPlan& plan) {
    const auto kernel = p.kernel_size == 3   ? grad_features_units_kernel<3, Vectors>
                        : p.kernel_size == 5 ? grad_features_units_kernel<5, Vectors>
                                             : grad_features_units_kernel<7, Vectors>;
    launch(kernel, plan.items, plan.threads, plan.shared_bytes, p, grad_features, plan);
}

}  // namespace carafepp::cuda
