// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor. A block has a tile of outputs of a group. A thread has four outputs
// below each other and some taps of a column of their windows, with all sums in registers. The block goes through the
// channels in slices, as vectors of four in shared memory: features with their halo, and grad_output. The next slice
// arrives meanwhile. Outputs of a source share the features that a thread loads, and those of neighbouring sources most
// of them. Then the threads of an output carry its sums through the normaliser together, and write them in the order
// of memory.
#pragma once

#include "cuda/grad_tiles.h"

namespace carafepp::cuda {

constexpr int kQuad = 4;                 // outputs of a thread
constexpr int kMostTaps = 7;             // of a thread
constexpr int kMostVectors = 4;          // of a slice
constexpr int kMostColumns = 64;         // of a tile
constexpr int kThreadsOfTile = 256;      // at most
constexpr int64_t kNowhere = INT64_MIN;  // the place of what does not exist
constexpr int kMultiprocessors = 132;    // of the device that tiles are chosen for

// A row of outputs, or -1, and the source that it is centred on. It is row `phase` of the outputs of a row of cells.
struct Slot {
    int row, source, cell, phase;
};

// The masks or logits of an output begin at `from`, or kNowhere. `own` is its number in shared memory.
struct OutputPlace {
    int64_t from;
    int own;
};

// Rows of outputs are in slots, of which a thread has four, a quad. A source with several rows has two slots, or whole
// quads; some stay empty if it has fewer rows.
struct GradMasksTilesPlan {
    Outputs rows, columns;  // of masks, or of the sub-pixels of logits
    Divisor kernel_size;
    Divisor cell;         // rows and columns of outputs of one: the sub-pixels of logits, or one
    int slots;            // of a source, or 0 if each row has its own source
    int sources;          // neighbouring ones of a quad, or 0 for any four
    int own_taps;         // of a thread
    Divisor segments;     // threads with a column of taps
    int channels;         // of a group
    int itemsize;         // of features, in bytes
    int slices, vectors;  // vectors of a slice
    Divisor width;        // of a tile: columns
    int quads;            // of a tile: rows
    int halo_rows;
    Divisor halo_columns;
    int plane;                                            // pixels from vector to vector of a slice
    Divisor rows_of_cell, columns_of_cell, cells_in_row;  // of a tile, whole ones or 1
    int pitch, room;                                      // from row to row and from tap to tap of finished outputs
    int threads;
    bool normalized;  // gradients go through the normaliser
    uint32_t row_tiles, column_tiles, groups;
    int64_t items;
    int64_t places_bytes, shared_bytes;

    GradMasksTilesPlan(const Problem& p, bool vectors_in_memory)
        : rows(p.factor, p.offset_h, p.from_logits ? p.logits.h * p.factor.up : p.out_h),
          columns(p.factor, p.offset_w, p.from_logits ? p.logits.w * p.factor.up : p.out_w),
          kernel_size(static_cast<int>(p.kernel_size)),
          cell(p.from_logits ? static_cast<int>(p.factor.up) : 1),
          own_taps(0),
          segments(1),
          channels(static_cast<int>(p.features.c / p.groups)),
          itemsize(static_cast<int>(carafepp::itemsize(p.features.dtype))),
          width(1),
          halo_columns(1),
          rows_of_cell(1),
          columns_of_cell(1),
          cells_in_row(1) {
        const int k = kernel_size.number;
        const int64_t most = std::min<int64_t>(ceil_div(p.factor.up, p.factor.down), rows.count);
        const bool several = p.factor.up > p.factor.down;
        slots = !several ? 0 : most <= 2 ? 2 : static_cast<int>(ceil_div(most, kQuad)) * kQuad;
        sources = slots == 2 ? 2 : several ? 1 : p.factor.up == p.factor.down ? kQuad : 0;
        for (int taps : {7, 5, 3}) {
            const int segments_of_taps = static_cast<int>(ceil_div(k, taps));
            if (own_taps != 0 && segments_of_taps * taps >= segments.number * own_taps) continue;
            if (k * segments_of_taps > kThreadsOfTile) continue;
            own_taps = taps;
            segments = Divisor(segments_of_taps);
        }
        normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
        const int64_t all = ceil_div(p.features.c / p.groups, kVector);
        double least = INFINITY;
        int best_columns = 1, best_quads = 1, best_vectors = 1;
        for (vectors = kMostVectors; vectors > 0; vectors /= 2) {
            if (vectors > 1 && vectors >= 2 * all) continue;
            for (int most_columns = kMostColumns, tried = 0; most_columns > 0; most_columns /= 2) {
                for (quads = 1; quads * k * segments.number <= kThreadsOfTile; quads++) {
                    measure(p, most_columns);
                    if (quads == 1 && width.number == tried) break;
                    if (threads > kThreadsOfTile || shared_bytes > kMostSharedBytes) break;
                    const double cost = cycles(vectors_in_memory);
                    if (cost >= least) continue;
                    least = cost;
                    best_columns = most_columns;
                    best_quads = quads;
                    best_vectors = vectors;
                }
                tried = width.number;
                if (most_columns <= 8 && least < INFINITY) break;
            }
            if (vectors <= 2 && least < INFINITY) break;
        }
        quads = best_quads;
        vectors = best_vectors;
        measure(p, best_columns);
        slices = static_cast<int>(ceil_div(channels, vectors * kVector));
    }

private:
    // The most features from the first to the last source of some outputs.
    static int sources_of(const Outputs& axis, int outputs) {
        return static_cast<int>(ceil_div((outputs - 1) * int64_t{axis.down}, axis.up)) + 1;
    }

    // A tile of `quads` and of `most_columns` columns or somewhat less, such that the last one is not much smaller.
    void measure(const Problem& p, int most_columns) {
        const int k = kernel_size.number, quads_of_source = std::max(slots / kQuad, 1);
        const int up = static_cast<int>(p.from_logits && p.factor.down == 1 ? p.factor.up : 1);
        const int whole = up <= most_columns ? up : 1;  // a tile has whole cells
        const int64_t tiles = std::max<int64_t>(ceil_div(columns.count, most_columns / whole * whole), 1);
        width = Divisor(static_cast<int>(std::max<int64_t>(ceil_div(ceil_div(columns.count, tiles), whole), 1)) *
                        whole);
        const int rows_of_tile = quads * kQuad, outputs = rows_of_tile * width.number;
        const int row_sources = slots == 0                     ? sources_of(rows, rows_of_tile)
                                : slots == 2                   ? 2 * quads
                                : quads % quads_of_source == 0 ? quads / quads_of_source
                                                               : (quads + quads_of_source - 2) / quads_of_source + 1;
        halo_rows = row_sources + std::max(segments.number * own_taps, k) - 1;
        halo_columns = Divisor(sources_of(columns, width.number) + k - 1);
        const int pixels = halo_rows * halo_columns.number + outputs;
        // Threads that copy neighbouring vectors of a pixel do so to different banks.
        plane = static_cast<int>(ceil_div(pixels, 8)) * 8 + 8 / vectors % 8;
        const bool whole_rows = up > 1 && slots > 0 && rows_of_tile % slots == 0;
        rows_of_cell = Divisor(whole_rows ? slots : 1);
        columns_of_cell = Divisor(whole);
        cells_in_row = Divisor(width.number / whole);
        pitch = width.number + (whole_rows ? 8 : 0);  // rows of a cell begin in different banks
        room = rows_of_tile * pitch | 1;              // and so do taps
        threads = static_cast<int>(ceil_div(width.number * k * segments.number * quads, 32)) * 32;
        const int64_t staged = int64_t{2} * vectors * plane * int64_t{sizeof(float4)},
                      finished = k * (k * int64_t{sizeof(float)} + segments.number * int64_t{sizeof(float2)}) * room;
        places_bytes = std::max(ceil_div(pixels, 2) * 2 * int64_t{sizeof(int64_t)},
                                outputs * int64_t{sizeof(OutputPlace)});
        shared_bytes = rows_of_tile * int64_t{sizeof(Slot)} + places_bytes + std::max(staged, finished);
        const int64_t all_quads = slots == 0 ? ceil_div(rows.count, kQuad)
                                             : ceil_div((((rows.count - 1) * int64_t{rows.down}) / rows.up + 1) * slots,
                                                        kQuad);
        row_tiles = rows.count == 0 ? 0 : static_cast<uint32_t>(ceil_div(all_quads, quads));
        column_tiles = static_cast<uint32_t>(ceil_div(columns.count, width.number));
        groups = static_cast<uint32_t>(p.groups);
        items = p.features.n * p.groups * row_tiles * column_tiles;
    }

    // Roughly what the multiprocessor with the most tiles takes, for instructions and for accesses.
    double cycles(bool vectors_in_memory) const {
        const double all = static_cast<double>(ceil_div(channels, vectors * kVector)) * vectors, warps = threads / 32;
        const double outputs = quads * kQuad * width.number, taps = kernel_size.number * kernel_size.number;
        const double pixels = (outputs + halo_rows * halo_columns.number) / 32;
        const int loads = sources > 0 ? own_taps + sources - 1 + kQuad : kQuad * (own_taps + 1);
        const double instructions = all * (warps * (kQuad * kVector * own_taps + 2 * loads + 20) +
                                           pixels * (vectors_in_memory ? 10 : 30)) +
                                    outputs * taps + 1000 * warps;
        const double accesses = all * (warps * 4 * loads + pixels * (vectors_in_memory ? 32 / vectors + 4 : 24)) +
                                outputs * taps / 32 *
                                    (6 + 2 * (vectors_in_memory ? 4 : 32 / std::min(cells_in_row.number, 32)));
        const double issue = instructions / 2.4, longer = std::max(issue, accesses),
                     shorter = std::min(issue, accesses);
        return static_cast<double>(ceil_div(items, kMultiprocessors)) * (longer + shorter / 2);  // partly at once
    }
};

// The slot of a number, from the first row on.
__device__ __forceinline__ Slot slot_of(const GradMasksTilesPlan& plan, int number) {
    int row = number, source = plan.rows.source(number);
    if (plan.slots > 0) {
        source = number / plan.slots;
        row = plan.rows.first(source + plan.rows.offset) + number - source * plan.slots;
        source += plan.rows.offset;
    }
    const int end = plan.slots == 0 ? plan.rows.count : plan.rows.first(source + 1), cell = row / plan.cell.number;
    return {row < end ? row : -1, source, cell, row - cell * plan.cell.number};
}

// Finds the outputs of a tile in an array of the shape of masks or logits, in the order of memory: where channels are
// adjacent, by cells; else by columns of cells, which are apart.
__device__ __forceinline__ void find_places(const GradMasksTilesPlan& plan, const Array& array, const Slot* slots,
                                            int left, OutputPlace* places) {
    const int outputs = kQuad * plan.quads * plan.width.number, up = plan.cell.number;
    const int left_cell = left / up, left_phase = left - left_cell * up;
    const bool by_cells = array.stride_c < array.stride_w;
#pragma unroll 1
    for (int number = static_cast<int>(threadIdx.x); number < outputs; number += static_cast<int>(blockDim.x)) {
        int rest = number, y = 0, x = 0;
        const auto next = [&](const Divisor& count) {
            const int all = rest;
            rest = count.quotient(all);
            return all - rest * count.number;
        };
        if (by_cells) {
            x = next(plan.columns_of_cell);
            y = next(plan.rows_of_cell);
            x += next(plan.cells_in_row) * plan.columns_of_cell.number;
            y += rest * plan.rows_of_cell.number;
        } else {
            x = next(plan.cells_in_row) * plan.columns_of_cell.number;
            x += next(plan.columns_of_cell);
            y = rest;
        }
        const Slot row = slots[y];
        const int j = plan.cell.quotient(left_phase + x), phase = left_phase + x - j * up;
        OutputPlace place;
        place.from = row.row < 0 || left + x >= plan.columns.count
                         ? kNowhere
                         : row.cell * array.stride_h + (left_cell + j) * array.stride_w +
                               (row.phase * up + phase) * array.stride_c;
        place.own = y * plan.pitch + x;
        places[number] = place;
    }
}

// Calls f(from, own, first, step) for taps first, first + step ... of outputs: where the first one is, in memory and in
// shared memory. If taps are adjacent, neighbouring threads have neighbouring taps of an output; else neighbouring
// outputs.
template <class F>
__device__ __forceinline__ void for_each_place(const GradMasksTilesPlan& plan, const OutputPlace* places, int64_t tap,
                                               F f) {
    const int outputs = kQuad * plan.quads * plan.width.number, thread = thread_computed_late();
    const int shift = tap == 1 ? 3 : 0, together = 1 << shift, first = thread & (together - 1);
#pragma unroll 1
    for (int output = thread >> shift; output < outputs; output += static_cast<int>(blockDim.x) >> shift) {
        const OutputPlace place = places[output];
        if (place.from != kNowhere) f(place.from + first * tap, first * plan.room + place.own, first, together);
    }
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
        for (int o = 0; o < kQuad; o++) grad[o] = grad_output[o * plan.width.number];
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

// The sums of a thread, and the same taps in shared memory: output o has its first at o * pitch, and they are `step`
// apart.
struct OwnTaps {
    float* first;
    int count, step, pitch;

    // Calls f(output, sum, element of shared memory) for each. Threads of a warp mostly have as many.
    template <class F>
    __device__ __forceinline__ void each(float (&sums)[kQuad][kMostTaps], F f) const {
        float* at = first;
#pragma unroll
        for (int tap = 0; tap < kMostTaps; tap++, at += step) {
            if (tap >= count) break;
#pragma unroll
            for (int o = 0; o < kQuad; o++) f(o, sums[o][tap], at[o * pitch]);
        }
    }
    // f(element) for each element of shared memory. What is rare is not unrolled.
    template <class F>
    __device__ __forceinline__ void replace(F f) const {
#pragma unroll 1
        for (int at = 0; at < count * kQuad; at++) {
            float& element = first[at / kQuad * step + at % kQuad * pitch];
            element = f(element);
        }
    }
};

// Carries the gradients of masks of a thread's taps, `grads`, through the normaliser. Their logits are in shared
// memory; of a sigmoid, factors of the gradients stay there. The threads of an output are `parts`, and tell each other
// what they sum, as partial[part * room + o * pitch]. All threads of a block call it.
__device__ __forceinline__ void through_normalizer(carafepp_normalizer normalizer, const OwnTaps& taps,
                                                   float (&grads)[kQuad][kMostTaps], int part, int parts, int room,
                                                   float2* partial) {
    if (normalizer == CARAFEPP_SIGMOID) {
        taps.replace([](float logit) {
            const float mask = sigmoid(logit);
            return mask * (1 - mask);
        });
        return;
    }
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) taps.replace([](float logit) { return log_sigmoid(logit); });
    float largest[kQuad] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[kQuad] = {},
          mean[kQuad] = {};  // of the gradients, weighted by masks
    const auto mask = [&](int o, float logit) {
        return power_of_2((logit - largest[o]) * kLog2OfE);  // the difference first: logits may be huge
    };
    const auto tell = [&](int o) -> float2& { return partial[part * room + o * taps.pitch]; };
    // Calls f(output, what a thread told) for each.
    const auto each_part = [&](auto f) {
#pragma unroll 1
        for (int other = 0; other < (taps.count > 0 ? parts : 0); other++) {
#pragma unroll
            for (int o = 0; o < kQuad; o++) f(o, partial[other * room + o * taps.pitch]);
        }
    };
    taps.each(grads, [&](int o, float, float logit) { largest[o] = fmaxf(largest[o], logit); });
    if (taps.count > 0) {
#pragma unroll
        for (int o = 0; o < kQuad; o++) tell(o).x = largest[o];
    }
    __syncthreads();
    each_part([&](int o, float2 told) { largest[o] = fmaxf(largest[o], told.x); });
    taps.each(grads, [&](int o, float grad, float logit) {
        const float unscaled = mask(o, logit);
        sum[o] += unscaled;
        mean[o] += unscaled * grad;
    });
    __syncthreads();
    if (taps.count > 0) {
#pragma unroll
        for (int o = 0; o < kQuad; o++) {
            tell(o) = make_float2(sum[o], mean[o]);
            sum[o] = mean[o] = 0;
        }
    }
    __syncthreads();
    each_part([&](int o, float2 told) {
        sum[o] += told.x;
        mean[o] += told.y;
    });
#pragma unroll
    for (int o = 0; o < kQuad; o++) {
        sum[o] = 1 / sum[o];
        mean[o] *= sum[o] * sum[o];
    }
    taps.each(grads, [&](int o, float& grad, float logit) { grad = mask(o, logit) * (grad * sum[o] - mean[o]); });
    if (normalizer == CARAFEPP_SIGMOID_NORMALIZED)  // the sigmoid of -logit
        taps.replace([](float log_of_sigmoid) { return -expm1f(log_of_sigmoid); });
}

template <bool Vectors>
__global__ void __launch_bounds__(kThreadsOfTile, 2)
    grad_masks_tiles_kernel(Arguments arguments, GradMasksTilesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;  // of the shape of masks or logits
    const int k = plan.kernel_size.number, radius = k / 2, width = plan.width.number;
    const int rows_of_tile = kQuad * plan.quads, outputs = rows_of_tile * width;
    const int halo = plan.halo_rows * plan.halo_columns.number, parts = k * plan.segments.number;
    const int height_in = static_cast<int>(p.features.h), width_in = static_cast<int>(p.features.w),
              height_out = static_cast<int>(p.out_h), width_out = static_cast<int>(p.out_w);
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    Slot* const slots = shared_memory<Slot>();
    OutputPlace* const places = reinterpret_cast<OutputPlace*>(slots + rows_of_tile);
    int64_t* const addresses = reinterpret_cast<int64_t*>(places);  // of pixels, while there are channels
    float4* const staged = reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(places) + plan.places_bytes);
    float2* const partial = reinterpret_cast<float2*>(staged);  // [part][output], when the channels are done
    float* const finished = reinterpret_cast<float*>(partial + parts * plan.room);  // [tap][output]: logits, gradients

    // This thread's column of outputs and of taps, its first row of taps, and its quad.
    const int line = plan.width.quotient(thread), x = thread - line * width;
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
            const int y = plan.width.quotient(output), row = slots[y].row, column = left + output - y * width;
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
        const int own = own_slot * plan.pitch + x;
        const OwnTaps own_taps{finished + (a * k + b) * plan.room + own, count, k * plan.room, plan.pitch};
        if (plan.normalized) {
            find_places(plan, p.logits, slots, left, places);
            __syncthreads();
            const int64_t tap = taps_apart(p, p.logits), first_tap = n * p.logits.stride_n + group * k * k * tap;
            for_each_place(plan, places, tap,
                           [&](int64_t place, int first, int t, int further) __attribute__((always_inline)) {
                with_storage(p.logits.dtype, [&](auto storage) __attribute__((always_inline)) {
                    using M = decltype(storage);
                    const M* from = static_cast<const M*>(p.logits.data) + first_tap + place;
                    float* to = finished + first;
#pragma unroll 4
                    for (int at = t; at < k * k; at += further, from += further * tap, to += further * plan.room) {
                        if constexpr (std::is_same_v<M, float>) {
                            copy_async<sizeof(float)>(to, from, true);
                        } else {
                            *to = widen(load_input(from));
                        }
                    }
                });
            });
            wait_for_copies();
            __syncthreads();
            through_normalizer(p.normalizer, own_taps, sums, segment * k + b, parts, plan.room, partial + own);
        }
        const bool factors = plan.normalized && p.normalizer != CARAFEPP_SOFTMAX;  // are there
        own_taps.each(sums, [&](int, float grad, float& to) { to = factors ? grad * to : grad; });
        if (slots[rows_of_tile - 1].row >= height_out || slots[rows_of_tile - 1].row < 0 ||
            left + width > width_out) {  // a crop leaves some out
#pragma unroll 1
            for (int at = 0; at < count * kQuad; at++) {
                const int tap = at / kQuad, o = at % kQuad;
                if (column >= width_out || slots[own_slot + o].row >= height_out)
                    own_taps.first[tap * own_taps.step + o * plan.pitch] = 0;
            }
        }
        find_places(plan, result, slots, left, places);
        __syncthreads();
        const int64_t tap = taps_apart(p, result), first_tap = n * result.stride_n + group * k * k * tap;
        for_each_place(plan, places, tap,
                       [&](int64_t place, int first, int t, int further) __attribute__((always_inline)) {
            with_storage(result.dtype, [&](auto storage) __attribute__((always_inline)) {
                using M = decltype(storage);
                M* to = static_cast<M*>(result.data) + first_tap + place;
                const float* from = finished + first;
#pragma unroll 4
                for (int at = t; at < k * k; at += further, to += further * tap, from += further * plan.room)
                    *to = narrow<M>(*from);
            });
        });
        __syncthreads();
    }
}

// Why no tile can be planned for a problem.
template <bool Vectors>
const char* not_for_grad_masks_tiles(const Problem& p) {
    if (const char* reason = not_for_bands(p)) return reason;
    if (p.factor.up > kMostFactor / 2) return "the factor is too large";
    if (p.features.c > INT32_MAX / 2) return "channels are too many";
    const GradMasksTilesPlan plan(p, Vectors);
    if (plan.items > INT32_MAX) return "tiles are too many";
    const bool fits = plan.threads <= kThreadsOfTile && plan.shared_bytes <= kMostSharedBytes;
    return fits ? nullptr : "kernel_size is too large";
}

template <bool Vectors>
void grad_masks_tiles(const Problem& p, const Array& grad_masks) {
    const GradMasksTilesPlan plan(p, Vectors);
    launch(grad_masks_tiles_kernel<Vectors>, plan.items, plan.threads, plan.shared_bytes, p, grad_masks, plan);
}

}  // namespace carafepp::cuda
