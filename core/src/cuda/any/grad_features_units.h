// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor and a kernel_size from 3 to 19. A block has a tile of sources in a slice of
// channels. A thread has a unit: four sources of a row in some vectors of channels, whose sums stay in registers. The
// block goes through the outputs whose windows touch the tile, in bands of rows. It stages their masks, and grad_output
// with four channels of a pixel in a vector. Masks that lead from an output to the sources of a unit are one vector,
// too. So an output costs a thread of four vectors five loads, and 64 products where its window has all four sources.
// Each column of sources that outputs are centred on has a loop of its own, which knows the sources that such outputs
// touch.
#pragma once

#include "cuda/any/grad_output.h"

namespace carafepp::cuda {

constexpr int kSources = 4;           // of a unit
constexpr int kThreadsOfUnits = 256;  // at most
constexpr int kMostLanesOfUnit = 16;  // threads of a unit
constexpr int kMostWindow = 19;       // kernel_size: a warp has the taps of an output

// A multiprocessor: warps of this kernel, instructions in a cycle, cycles that a warp waits for loads while others do
// not work, and the shared memory that it takes for a block, beyond what the block has.
constexpr int kWarpsAtOnce = 16, kBytesOfBlock = 1024;
constexpr double kIssued = 2.4, kArrival = 200;

// Kernels are compiled for a kernel_size of 3, 5 and 7, in 16 channels of a group or more: a thread has four vectors of
// them. K = 0 stands for all others.
template <int K>
constexpr int kVectorsOfThread = K == 0 ? 2 : 4;
inline bool has_own_kernel(const Problem& p) {
    return (p.kernel_size == 3 || p.kernel_size == 5 || p.kernel_size == 7) &&
           p.features.c / p.groups >= kVectorsOfThread<3> * kVector;
}

// The masks of an output in shared memory: rows of taps, each tap at the place that its source has in a unit.
CARAFEPP_HOST_DEVICE constexpr int row_of_taps(int k) { return (k + kSources - 1 + 3) / 4 * 4; }
// Neighbours begin in other banks.
CARAFEPP_HOST_DEVICE constexpr int taps_of_output(int k) { return k * row_of_taps(k) | 4; }

struct UnitsPlan {
    Outputs rows, columns;
    int lanes, threads;
    int height, unit_columns;     // rows of sources and units in a row, of a tile
    int most_rows, most_columns;  // of outputs whose windows touch a tile; columns in vectors that are copied at once
    int band;                     // rows that are staged at once
    Divisor width;                // of a row of a band
    int depth;                    // vectors from pixel to pixel: odd, as pixels begin in other banks then
    int tap;                      // elements from tap to tap of masks or logits
    Divisor kernel_size;
    int at_once;  // columns of grad_output that are copied as one
    CopyPlan copy;
    bool whole_units;  // four columns are stored at once
    int64_t row_tiles, column_tiles;
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t bytes_at_once;  // of shared memory, that a multiprocessor gives to blocks
    int64_t shared_bytes;
    double cost;  // INFINITY before a tile is found

    UnitsPlan(const Problem& p, bool channels_adjacent, const Array& grad_features) : UnitsPlan(p, channels_adjacent) {
        const int of_thread = has_own_kernel(p) ? kVectorsOfThread<3> : kVectorsOfThread<0>;
        const int64_t all = std::max<int64_t>(ceil_div(p.features.c / p.groups, kVector), 1);
        int tried = kMostLanesOfUnit;
        while (tried > 1 && tried / 2 * of_thread >= all) tried /= 2;
        whole_units = not_for_columns(grad_features, kSources) == nullptr;
        UnitsPlan best = *this;
        for (int most = tried; tried > 0 && (tried >= most / 4 || best.cost == INFINITY); tried /= 2) {
            lanes = tried;
            depth = lanes * of_thread | 1;
            channel_blocks = ceil_div(all, lanes * of_thread);
            try_tiles(p, channels_adjacent, of_thread, best);
        }
        *this = best;
        const int vectors = lanes * of_thread;
        threads = std::max(static_cast<int>(ceil_div(height * unit_columns * lanes, 32)) * 32, vectors);
        copy = CopyPlan(threads, vectors, at_once, most_columns, depth);
    }

    // Is there shared memory for one unit of one thread?
    static bool fits(const Problem& p, bool channels_adjacent) {
        UnitsPlan plan(p, channels_adjacent);
        plan.depth = kVectorsOfThread<3> | 1;
        return plan.measure(1, 1, 1);
    }

private:
    UnitsPlan(const Problem& p, bool channels_adjacent)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          width(1),
          tap(static_cast<int>(taps_apart(p, p.from_logits ? p.logits : p.masks))),
          kernel_size(static_cast<int>(p.kernel_size)),
          at_once(channels_adjacent || p.grad_output.dtype != CARAFEPP_FLOAT32 ? 1 : columns_at_once(p.grad_output)),
          copy(1, 1, 1, 1, 1),
          bytes_at_once(most_shared_bytes() + kBytesOfBlock),
          cost(INFINITY) {}

    // Tiles of `tile_height` rows of `units`, in bands as high as a multiprocessor has room for in `blocks`. False if
    // none fits.
    bool measure(int tile_height, int units, int blocks) {
        const int k = kernel_size.number;
        height = tile_height;
        unit_columns = units;
        most_rows = std::max(rows.most(height + k - 1), 1);
        most_columns = std::max(columns.most(unit_columns * kSources + k - 1), 1);
        // A tile's outputs begin with the first column of a vector, or with columns of one that precede them.
        const bool first = columns.down == 1 && columns.up % static_cast<uint32_t>(at_once) == 0;
        most_columns = static_cast<int>(ceil_div(most_columns + (first ? 0 : at_once - 1), at_once)) * at_once;
        const int64_t lines = (most_rows + most_columns) * int64_t{sizeof(BandLine)} +
                              (height + unit_columns * kSources + 2 * (k + 1)) * int64_t{sizeof(int)};
        const int64_t row = most_columns *
                            (depth * int64_t{sizeof(float4)} + taps_of_output(k) * int64_t{sizeof(float)});
        const int64_t most = std::min<int64_t>((bytes_at_once / blocks - kBytesOfBlock - lines) / row, most_rows);
        if (most < 1) return false;
        band = even_part(most_rows, most);
        shared_bytes = lines + band * row;
        return true;
    }

    // About how many cycles the multiprocessor takes that has the most tiles. Blocks work while others wait.
    double cycles(bool channels_adjacent, int of_thread) const {
        const int k = kernel_size.number;
        const int64_t warps = ceil_div(height * unit_columns * lanes, 32), bands = ceil_div(most_rows, band);
        // Rows of outputs that a warp goes through, as its units may be in several rows of sources.
        const double visits = rows.most(k + (32 / lanes - 1) / unit_columns),
                     outputs = visits * columns.most(kSources + k - 1);
        // Outputs whose masks are staged, and copies of a warp.
        const int at_once_in_warp = channels_adjacent ? 1 : at_once == 1 ? 32 : 8 * at_once;
        const double staged = double(most_rows) * most_columns,
                     copied = double(bands) * ceil_div(band * most_columns, at_once_in_warp) * at_once_in_warp * lanes *
                              of_thread / 32;
        const double products = kVector * of_thread * double(kSources) * k / (k + kSources - 1),
                     of_copy = channels_adjacent ? 6
                               : at_once == 4    ? 5
                               : at_once == 2    ? 8
                                                 : 14;
        const double instructions = warps * (500 + 100.0 * bands + visits * (k + kSources) * 6 +
                                             outputs * (products + 14)) +
                                    staged * k * k / 2 + copied * of_copy;
        const double accesses = warps * (200 + outputs * (4 * of_thread + 1)) +
                                copied * (channels_adjacent || at_once == 4 ? 8 : 12) + staged * k * k / 4;
        const double issue = instructions / kIssued,
                     work = std::max(issue, accesses) +
                            std::min(issue, accesses) / 4;  // they overlap for the most part
        // Copies that pass registers arrive a few at a time.
        const double arrivals = channels_adjacent ? 1
                                                  : 1 + std::ceil(copied / bands / warps / std::min(2 * at_once, 4));
        const int64_t blocks = std::max<int64_t>(ceil_div(items, kMultiprocessors), 1),
                      resident = std::min(
                          {kWarpsAtOnce / warps, bytes_at_once / (shared_bytes + kBytesOfBlock), blocks});
        return work * blocks + kArrival * bands * arrivals * ceil_div(blocks, resident) / resident;
    }

    // Tries tiles; `best` becomes the one with which the multiprocessor that has the most of them is ready first.
    void try_tiles(const Problem& p, bool channels_adjacent, int of_thread, UnitsPlan& best) {
        const int most_units = kThreadsOfUnits / lanes;
        const int all_units = static_cast<int>(std::max<int64_t>(ceil_div(p.features.w, kSources), 1));
        for (int tried = 0, in_row = std::min(all_units, most_units); in_row > 0; in_row -= (in_row + 3) / 4) {
            const int even_row = even_part(all_units, in_row);
            if (even_row == tried) continue;
            tried = even_row;
            for (int h = std::max<int>(std::min<int>(most_units / even_row, p.features.h), 1); h > 0;
                 h -= (h + 3) / 4) {
                for (int blocks = 1; blocks <= 2; blocks++) {
                    if (!measure(h, even_row, blocks)) continue;
                    row_tiles = ceil_div(p.features.h, height);
                    column_tiles = ceil_div(all_units, unit_columns);
                    items = p.features.n * p.groups * channel_blocks * row_tiles * column_tiles;
                    cost = cycles(channels_adjacent, of_thread);
                    if (cost >= best.cost) continue;
                    width = Divisor(most_columns);
                    best = *this;
                }
            }
        }
    }
};

// The taps of an output that a thread has in registers: rows of them, three or, of seven, two.
template <int K>
struct TapsInThread {
    static constexpr int kThreads = K == 3   ? 1
                                    : K == 5 ? 2
                                             : 4,
                         kRows = (K + kThreads - 1) / kThreads, kCount = kRows * K, kStep = 1;
    int first_row;

    __device__ __forceinline__ TapsInThread(const UnitsPlan&, int thread) : first_row(thread % kThreads * kRows) {}
    __device__ __forceinline__ int threads() const { return kThreads; }
    __device__ __forceinline__ int first() const { return first_row * K; }
    __device__ __forceinline__ int step() const { return 1; }
    __device__ __forceinline__ bool has(int t) const { return K % kRows == 0 || first_row + t / K < K; }
    __device__ __forceinline__ int place(int t) const { return (first_row + t / K) * row_of_taps(K) + t % K; }
};

// For any kernel_size, every so many taps.
template <>
struct TapsInThread<0> {
    static constexpr int kCount = 12;
    static_assert(kCount * 32 >= kMostWindow * kMostWindow, "a warp has all taps of an output");
    Divisor kernel_size;
    int together, lane;

    __device__ __forceinline__ TapsInThread(const UnitsPlan& plan, int thread)
        : kernel_size(plan.kernel_size), together(1) {
        while (kCount * together < kernel_size.number * kernel_size.number) together *= 2;
        lane = thread & (together - 1);
    }
    __device__ __forceinline__ int threads() const { return together; }
    __device__ __forceinline__ int first() const { return lane; }
    __device__ __forceinline__ int step() const { return together; }
    __device__ __forceinline__ bool has(int t) const {
        return lane + t * together < kernel_size.number * kernel_size.number;
    }
    __device__ __forceinline__ int place(int t) const {
        const int tap = lane + t * together, row = kernel_size.quotient(tap);
        return row * row_of_taps(kernel_size.number) + tap - row * kernel_size.number;
    }
};

// For normalize_registers.
template <int K>
struct TapsToNormalize {
    int threads;

    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int t = 0; t < TapsInThread<K>::kCount; t++) f(t, t);
    }
    template <class F>
    __device__ __forceinline__ float over_threads(float value, F f) const {
#pragma unroll
        for (int distance = 1; distance < threads; distance *= 2)
            value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
        return value;
    }
};

// Stages masks of a band as to[output][row of taps]. All lanes of a warp call it, as they reduce.
template <int K>
__device__ __forceinline__ void stage_rows_of_taps(const Array& array, carafepp_normalizer normalizer,
                                                   const UnitsPlan& plan, const Band& band, float* to) {
    using Taps = TapsInThread<K>;
    const int thread = thread_computed_late(), k = K > 0 ? K : plan.kernel_size.number, tap = plan.tap;
    const Taps own(plan, thread);
    const int outputs = band.height * band.width.number;
    const bool of_float = array.dtype == CARAFEPP_FLOAT32;
    const Widen16 widened{array.dtype == CARAFEPP_FLOAT16};
    const bool sigmoids = normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
    const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
#pragma unroll 1
    for (int before = 0; before < outputs; before += static_cast<int>(blockDim.x) / own.threads()) {
        const int output = before + thread / own.threads(), y = band.width.quotient(output),
                  column = output - y * band.width.number;
        const bool exists = y < band.height && column < band.columns_count;
        const int x = exists ? band.columns[column].in_memory : 0;
        const int64_t place = band.rows[exists ? y : 0].from + band.columns[x].from;
        float taps[Taps::kCount];  // those that do not exist change no sum
        const float* from_float = at_stride(static_cast<const float*>(array.data) + place, tap, own.first());
#pragma unroll
        for (int t = 0; t < Taps::kCount; t++)
            taps[t] = of_float && own.has(t) ? load_input(at_stride(from_float, tap, t * own.step())) : -INFINITY;
        float* const staged = to + (output - column + x) * taps_of_output(k) +
                              ((band.columns[x].source - k / 2) & (kSources - 1));
        const auto store = [&]() __attribute__((always_inline)) {
#pragma unroll
            for (int t = 0; t < Taps::kCount; t++) {
                if (exists && own.has(t)) staged[own.place(t)] = taps[t];
            }
        };
        if (!of_float || sigmoids) {  // by way of shared memory, as loops there are short
            if (of_float) store();
            const Bits16* from = at_stride(static_cast<const Bits16*>(array.data) + place, tap, own.first());
#pragma unroll 1
            for (int t = 0; t < Taps::kCount && exists && own.has(t); t++, from = at_stride(from, tap, own.step())) {
                float* const mask = staged + own.place(t);
                if (!of_float) *mask = widened(load_input(from));
                if (sigmoids) *mask = normalizer == CARAFEPP_SIGMOID ? sigmoid(*mask) : log_sigmoid(*mask);
            }
            if (!divides) continue;
#pragma unroll
            for (int t = 0; t < Taps::kCount; t++) taps[t] = exists && own.has(t) ? staged[own.place(t)] : -INFINITY;
        }
        if (divides) normalize_registers(CARAFEPP_SOFTMAX, TapsToNormalize<K>{own.threads()}, taps);
        store();
    }
}

// The operands that a thread multiplies next, in a row of outputs.
struct NextOutput {
    const float* masks;
    const float4* grads;
    int number;
};

// Elements from output to output, and vectors from one vector of a thread to the next.
struct StepsOfOutput {
    int masks, grads, vectors;
};

// Adds the products of outputs up to number `end`, centred on a column that touches sources [Begin, End) of a unit.
// Their masks are the vector `place` of a row of taps.
template <int Begin, int End, int V>
__device__ __forceinline__ void add_column(NextOutput& next, int end, int place, const StepsOfOutput& step,
                                           float4 (&sums)[kSources][V]) {
#pragma unroll 1
    for (; next.number < end; next.number++, next.masks += step.masks, next.grads += step.grads) {
        const float4 masks = reinterpret_cast<const float4*>(next.masks)[place];
        float4 values[V];
#pragma unroll
        for (int v = 0; v < V; v++) values[v] = next.grads[v * step.vectors];
        const float weights[] = {masks.x, masks.y, masks.z, masks.w};
#pragma unroll
        for (int s = Begin; s < End; s++) {
#pragma unroll
            for (int v = 0; v < V; v++) add_products(weights[s], values[v], sums[s][v]);
        }
    }
}

// The same for all columns of sources. Source 0 of the unit is column k - 1, less than half a window further than it
// is. Outputs of column x end with number ends[x].
template <int K, int V>
__device__ __forceinline__ void add_outputs(NextOutput next, const int* ends, int k, const StepsOfOutput& step,
                                            float4 (&sums)[kSources][V]) {
    const auto place = [=](int x) { return (k - 1 - x + 3) / 4; };
    add_column<0, 1>(next, ends[0], place(0), step, sums);
    add_column<0, 2>(next, ends[1], place(1), step, sums);
    add_column<0, 3>(next, ends[2], place(2), step, sums);
#pragma unroll(K > 0 ? K : 1)
    for (int x = 3; x < k; x++) add_column<0, 4>(next, ends[x], place(x), step, sums);
    add_column<1, 4>(next, ends[k], 0, step, sums);
    add_column<2, 4>(next, ends[k + 1], 0, step, sums);
    add_column<3, 4>(next, ends[k + 2], 0, step, sums);
}

// `Vectors`: four channels of a pixel are a vector in memory.
template <int K, bool Vectors>
__global__ void __launch_bounds__(kThreadsOfUnits, 2) grad_features_units_kernel(Arguments arguments, UnitsPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int k = K > 0 ? K : plan.kernel_size.number, radius = k / 2;
    const int lanes = plan.lanes, vectors = lanes * kVectorsOfThread<K>, depth = plan.depth, width = plan.width.number;
    BandLine* const rows = shared_memory<BandLine>();
    BandLine* const columns = rows + plan.most_rows;
    float4* const grads = reinterpret_cast<float4*>(columns + plan.most_columns);
    float* const masks = reinterpret_cast<float*>(grads + plan.band * width * depth);
    // The first output of the windows that touch a source, and further ones.
    int* const first_rows = reinterpret_cast<int*>(masks + plan.band * width * taps_of_output(k));
    int* const first_columns = first_rows + plan.height + k + 1;
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
        // Columns begin with the first of a vector of grad_output.
        const int out_top = plan.rows.first(top - radius), out_left = plan.columns.first(left - radius) & -plan.at_once;
        const int out_rows = plan.rows.first(top + plan.height + k - 1 - radius) - out_top,
                  out_columns = plan.columns.first(left + plan.unit_columns * kSources + k - 1 - radius) - out_left;
        const int64_t up = p.from_logits ? p.factor.up : 1;
        find_lines(p, plan.rows, out_top, out_rows, array.stride_h, up * array.stride_c, false, rows,
                   n * array.stride_n + int64_t{plan.tap} * (group * k * k));
        find_lines(p, plan.columns, out_left, out_columns, array.stride_w, array.stride_c,
                   p.from_logits && array.stride_w < array.stride_c, columns);
#pragma unroll 1
        for (int d = thread; d <= plan.height + k; d += threads)
            first_rows[d] = plan.rows.first(top + d - radius) - out_top;
#pragma unroll 1
        for (int d = thread; d <= plan.unit_columns * kSources + k; d += threads)
            first_columns[d] = plan.columns.first(left + d - radius) - out_left;
        __syncthreads();

        const int i = top + unit_row, j = left + unit_column * kSources;
        const bool computes = unit_row < plan.height && i < grad_features.h && j < grad_features.w &&
                              lane * kVector < channels;
        const int begin_row = computes ? first_rows[unit_row] : 0, end_row = computes ? first_rows[unit_row + k] : 0;
        const int* const begins = first_columns + (computes ? unit_column * kSources : 0);
        int64_t first_grad = n * p.grad_output.stride_n + c * p.grad_output.stride_c +
                             out_top * p.grad_output.stride_h + out_left * p.grad_output.stride_w;
        float4 sums[kSources][kVectorsOfThread<K>] = {};
#pragma unroll 1
        for (int first = 0; first < out_rows && out_columns > 0; first += plan.band) {
            const Band band{rows + first, min(plan.band, out_rows - first), columns, out_columns, plan.width};
            copy_band<Vectors>(p.grad_output, first_grad, channels, band, plan.copy, grads);
            first_grad += plan.band * p.grad_output.stride_h;
            stage_rows_of_taps<K>(array, p.from_logits ? p.normalizer : CARAFEPP_NONE, plan, band, masks);
            wait_for_copies();
            __syncthreads();
            const int end = min(end_row, first + band.height);
#pragma unroll 1
            for (int y = max(begin_row, first); y < end; y++) {
                const int a = i - rows[y].source + radius, begin = begins[0], output = (y - first) * width + begin;
                add_outputs<K>(
                    {masks + output * taps_of_output(k) + a * row_of_taps(k), grads + output * depth + lane, begin},
                    begins + 1, k, {taps_of_output(k), depth, lanes}, sums);
            }
            __syncthreads();
        }
        if (!computes) continue;
        const int own = static_cast<int>(min(grad_features.w - j, int64_t{kSources}));
        with_storage(grad_features.dtype, [&](auto storage) {
            using T = decltype(storage);
            store_unit<Vectors>(sums, own, channels - lane * kVector, lanes * kVector, plan.whole_units, grad_features,
                                element<T>(grad_features, n, c + lane * kVector, i, j));
        });
    }
}

template <bool Vectors>
const char* not_for_units(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_tiles(p)) return reason;
    if (p.kernel_size < 3) return "kernel_size is less than 3";
    if (p.kernel_size > kMostWindow) return "kernel_size is more than 19";
    const int64_t tap = taps_apart(p, p.from_logits ? p.logits : p.masks);
    if (tap != static_cast<int>(tap)) return "taps are too far apart";
    if constexpr (Vectors) {
        for (const Array* array : {&p.grad_output, &grad_features}) {
            if (const char* reason = not_for_vectors(p, *array)) return reason;
        }
    } else {
        if (p.grad_output.stride_c != static_cast<int>(p.grad_output.stride_c)) return "channels are too far apart";
    }
    return UnitsPlan::fits(p, Vectors) ? nullptr : "the factor is too large";
}

template <bool Vectors>
void grad_features_units(const Problem& p, const Array& grad_features) {
    const UnitsPlan plan(p, Vectors, grad_features);
    const auto kernel = !has_own_kernel(p)   ? grad_features_units_kernel<0, Vectors>
                        : p.kernel_size == 3 ? grad_features_units_kernel<3, Vectors>
                        : p.kernel_size == 5 ? grad_features_units_kernel<5, Vectors>
                                             : grad_features_units_kernel<7, Vectors>;
    launch(kernel, plan.items, plan.threads, plan.shared_bytes, p, grad_features, plan);
}

}  // namespace carafepp::cuda
