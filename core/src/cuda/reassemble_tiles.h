// SPDX-License-Identifier: Apache-2.0
// The forward for any factor. A block has a tile of sources, whose masks it stages once. It goes through the channels a
// slice at a time. It stages the slice's features with their halo as floats, four channels of a pixel in a vector. A
// unit is S sources of a column, with at most P x P outputs each. A thread has a unit in one vector of channels. It
// sums all its outputs in registers: a feature serves each of them, and a vector of masks four.
#pragma once

#include "cuda/columns.h"
#include "cuda/positions.h"
#include "cuda/stage_slice.h"

namespace carafepp::cuda {

constexpr int64_t kEnoughTiles = 384;  // that keep all multiprocessors busy

// The outputs of a thread: P x P of each of S sources.
struct Share {
    int p, s;

    explicit Share(const Problem& p) {
        const int64_t most = ceil_div(p.factor.up, p.factor.down);  // outputs of a source along an axis
        this->p = most <= 3 ? static_cast<int>(most) : ceil_div(most, 4) * 4 <= ceil_div(most, 3) * 3 ? 4 : 3;
        s = this->p == 2 ? 2 : p.factor.up == p.factor.down && p.kernel_size >= 3 ? 4 : 1;
    }
};

// Vectors of masks of a unit, at an odd distance: neighbouring units begin in other banks.
CARAFEPP_HOST_DEVICE constexpr int quads_of(int outputs) { return (outputs + 3) / 4; }
CARAFEPP_HOST_DEVICE constexpr int pitch_of(int outputs) { return quads_of(outputs) | 1; }

struct TilesPlan {
    Positions rows, columns;
    int parts;                    // of the outputs of a source along an axis
    int unit_rows, unit_columns;  // of a tile
    int vectors;                  // of a slice, a power of 2
    int halo_rows, halo_columns;
    int apart;  // floats from tap to tap: an odd number of vectors, as taps begin in other banks then
    int64_t row_tiles, column_tiles;
    int64_t slices;          // of an item
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;
    bool whole_columns;  // each source has P columns of outputs, which are stored as one vector

    TilesPlan(const Problem& p, const Array& output, Share share)
        : rows(p.factor, p.offset_h, p.out_h), columns(p.factor, p.offset_w, p.out_w) {
        const int64_t all = std::max<int64_t>(ceil_div(p.features.c / p.groups, kVector), 1);
        // A crop may leave fewer outputs than a source has.
        const int64_t outputs = std::min(ceil_div(p.factor.up, p.factor.down), std::max(p.out_h, p.out_w));
        parts = static_cast<int>(ceil_div(outputs, share.p));
        for (vectors = 1; vectors < 8 && vectors < all;) vectors *= 2;
        unit_columns = even_part(columns.count(), share.p == 1 ? 16 : 8);
        unit_rows = even_part(static_cast<int>(ceil_div(rows.count(), share.s)),
                              std::max(kBlock / (vectors * unit_columns), 1));
        measure(p, share);
        while (shared_bytes > kMostSharedBytes && (unit_rows > 1 || vectors > 1 || unit_columns > 1)) {
            if (unit_rows > 1) {
                unit_rows--;
            } else {
                (vectors > 4 || unit_columns == 1 ? vectors : unit_columns) /= 2;
            }
            measure(p, share);
        }
        row_tiles = ceil_div(rows.count(), unit_rows * share.s);
        column_tiles = ceil_div(columns.count(), unit_columns);
        const int64_t tiles = p.features.n * p.groups * row_tiles * column_tiles * parts * parts;
        const int64_t all_slices = ceil_div(all, vectors);
        slices = all_slices;
        while (slices > 2 && tiles * ceil_div(all_slices, slices) < kEnoughTiles) slices = ceil_div(slices, 2);
        channel_blocks = ceil_div(all_slices, slices);
        items = tiles * channel_blocks;
        whole_columns = p.factor.down == 1 && p.factor.up % share.p == 0 && not_for_columns(output, share.p) == nullptr;
    }

private:
    void measure(const Problem& p, Share share) {
        const int outputs = share.s * share.p * share.p, k = static_cast<int>(p.kernel_size);
        halo_rows = rows.sources(unit_rows * share.s) + k - 1;
        halo_columns = columns.sources(unit_columns) + k - 1;
        const int64_t pixels = int64_t{halo_rows} * halo_columns;
        apart = (unit_rows * unit_columns * pitch_of(outputs) | 1) * 4;
        shared_bytes = (k + share.s - 1) * k * int64_t{sizeof(float)} * apart +
                       pixels * (vectors * int64_t{sizeof(float4)} + int64_t{sizeof(int64_t)}) +
                       (unit_rows * share.s + unit_columns) * share.p * int64_t{sizeof(Line)};
    }
};

// A tile of one part of the outputs, in some channels.
struct Tile {
    int64_t n, group, c;  // the first channel
    int channels;
    int top, left;         // positions
    int first_r, first_q;  // outputs of a source

    __device__ __forceinline__ Tile(const Problem& p, const TilesPlan& plan, int64_t item, int p_, int s) {
        const Quotient channel_block = divide(item, computed_late(plan.channel_blocks)),
                       part = divide(channel_block.quotient, plan.parts), part_row = divide(part.quotient, plan.parts),
                       tile = divide(part_row.quotient, computed_late(plan.column_tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.row_tiles)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        n = image.quotient;
        group = image.remainder;
        top = static_cast<int>(tile_row.remainder) * plan.unit_rows * s;
        left = static_cast<int>(tile.remainder) * plan.unit_columns;
        first_r = static_cast<int>(part_row.remainder) * p_;
        first_q = static_cast<int>(part.remainder) * p_;
        const int64_t channels_in_group = p.features.c / p.groups,
                      first = channel_block.remainder * plan.slices * plan.vectors * kVector;
        c = group * channels_in_group + first;
        channels = static_cast<int>(min(channels_in_group - first, plan.slices * plan.vectors * kVector));
    }
};

// Finds the rows and columns of outputs of a tile. Masks are staged as [tap][unit][source][output]. Tap (a, b) of
// source s has the number (a + s) * K + b.
template <int P, int S>
__device__ __forceinline__ void find_lines(const Problem& p, const TilesPlan& plan, const Tile& tile, Line* rows,
                                           Line* columns) {
    constexpr int kPitch = pitch_of(S * P * P) * 4;
    const int apart = static_cast<int>(p.kernel_size) * plan.apart;
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int up = p.from_logits ? static_cast<int>(p.factor.up) : 1;
    const auto find = [&](const Positions& axis, int position, int own, int64_t stride, int64_t stride_of_phase,
                          int to) {
        const int output = axis.first_output<(P > 1)>(position) + own;
        const bool exists = output < axis.end_output<(P > 1)>(position);
        Line line;
        line.from = exists ? output / up * stride + output % up * stride_of_phase : kNowhere;
        line.to = to;
        line.source = axis.source<(P > 1)>(position);
        return line;
    };
#pragma unroll 1
    for (int line = thread_computed_late(); line < plan.unit_rows * S * P; line += kBlock) {
        const int of_unit = line % (S * P);
        rows[line] = find(plan.rows, tile.top + line / P, tile.first_r + line % P, array.stride_h, up * array.stride_c,
                          line / (S * P) * plan.unit_columns * kPitch + of_unit * P + of_unit / P * apart);
    }
#pragma unroll 1
    for (int line = thread_computed_late(); line < plan.unit_columns * P; line += kBlock) {
        columns[line] = find(plan.columns, tile.left + line / P, tile.first_q + line % P, array.stride_w,
                             array.stride_c, line / P * kPitch + line % P);
    }
}

// `Vectors`: a vector of channels is one in memory. `Whole`: the columns of a source are.
template <int P, int S, bool Vectors, bool Whole, class T>
__global__ void __launch_bounds__(kBlock, 4) reassemble_tiles_kernel(Arguments arguments, TilesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    constexpr int kOutputs = S * P * P, kQuads = quads_of(kOutputs), kPitch = pitch_of(kOutputs);
    constexpr bool kSeveral = P > 1;
    const int k = static_cast<int>(p.kernel_size), units = plan.unit_rows * plan.unit_columns;
    const int pixels_of_halo = plan.halo_rows * plan.halo_columns;
    const int apart = plan.apart / 4;                          // vectors
    float4* const masks = shared_memory<float4>();             // [tap][unit][source][output]
    float4* const features = masks + (k + S - 1) * k * apart;  // of pixels and vectors
    int64_t* const pixels = reinterpret_cast<int64_t*>(features + pixels_of_halo * plan.vectors);
    Line* const row_lines = reinterpret_cast<Line*>(pixels + pixels_of_halo);
    Line* const column_lines = row_lines + plan.unit_rows * S * P;
    const int pixel_step = Vectors ? plan.vectors : 1, vector_step = Vectors ? 1 : pixels_of_halo;
    const int thread = static_cast<int>(threadIdx.x);
    const int vector = Vectors ? thread % plan.vectors : thread / units,
              unit = Vectors ? thread / plan.vectors : thread % units;
    const bool has_unit = unit < units && vector < plan.vectors;
    const int stagers = kBlock / plan.vectors;  // of a vector
    const int staged = Vectors ? thread % plan.vectors : thread / stagers,
              first_pixel = Vectors ? thread / plan.vectors : thread % stagers;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Tile tile(p, plan, item, P, S);
        const int top = plan.rows.source<kSeveral>(tile.top), left = plan.columns.source<kSeveral>(tile.left);
#pragma unroll 1
        for (int pixel = thread; pixel < pixels_of_halo; pixel += kBlock) {
            const int i = top - k / 2 + pixel / plan.halo_columns, j = left - k / 2 + pixel % plan.halo_columns;
            const bool exists = i >= 0 && i < p.features.h && j >= 0 && j < p.features.w;
            pixels[pixel] = exists ? i * p.features.stride_h + j * p.features.stride_w : kNowhere;
        }
        find_lines<P, S>(p, plan, tile, row_lines, column_lines);
        __syncthreads();
        const bool inside = top >= k / 2 && top - k / 2 + plan.halo_rows <= p.features.h && left >= k / 2 &&
                            left - k / 2 + plan.halo_columns <= p.features.w;
        stage_lines<T>(p, tile.n, tile.group, row_lines, plan.unit_rows * S * P, column_lines, plan.unit_columns * P,
                       plan.apart, inside, reinterpret_cast<float*>(masks));

        const int row = tile.top + unit / plan.unit_columns * S, column = tile.left + unit % plan.unit_columns;
        const int out_j = plan.columns.first_output<kSeveral>(column) + tile.first_q;
        const int columns_there = has_unit ? plan.columns.end_output<kSeveral>(column) - out_j : 0;
        int out_i[S], rows_there[S];
#pragma unroll
        for (int s = 0; s < S; s++) {
            out_i[s] = plan.rows.first_output<kSeveral>(row + s) + tile.first_r;
            rows_there[s] = plan.rows.end_output<kSeveral>(row + s) - out_i[s];
        }
        const int corner = (plan.rows.source<kSeveral>(row) - top) * plan.halo_columns +
                           plan.columns.source<kSeveral>(column) - left;
        const float4* const own_features = features + corner * pixel_step + vector * vector_step;
        const int row_step = plan.halo_columns * pixel_step;
        const T* from = element<const T>(p.features, tile.n, tile.c + staged * kVector, 0, 0);
        T* to = element<T>(output, tile.n, tile.c + vector * kVector, 0, out_j);
        const int channels_of_slice = plan.vectors * kVector;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= channels_of_slice) {
            stage_slice<Vectors>(from, p.features.stride_c, pixels, pixels_of_halo, first_pixel, stagers,
                                 channels - staged * kVector,
                                 features + first_pixel * pixel_step + staged * vector_step, stagers * pixel_step);
            from += channels_of_slice * p.features.stride_c;
            wait_for_copies();
            __syncthreads();
            const int channels_there = channels - vector * kVector;
            if (columns_there > 0 && channels_there > 0 && rows_there[0] > 0) {
                float4 sums[kOutputs] = {};
#pragma unroll 1
                for (int b = 0; b < k; b++) {
                    const float4* feature_at = own_features + b * pixel_step;
                    const float4* weights = masks + b * apart + unit * kPitch;
                    // A row of features meets a row of taps of each source in [begin, end).
                    const auto add_row = [&](int begin, int end) __attribute__((always_inline)) {
                        const float4 feature = *feature_at;
                        feature_at += row_step;
#pragma unroll
                        for (int quad = 0; quad < kQuads; quad++) {
                            const float4 four = weights[quad];
                            const float weight[] = {four.x, four.y, four.z, four.w};
#pragma unroll
                            for (int o = 0; o < 4; o++) {
                                const int at = quad * 4 + o;
                                if (at >= begin * P * P && at < end * P * P) add_products(weight[o], feature, sums[at]);
                            }
                        }
                        weights += k * apart;
                    };
#pragma unroll
                    for (int s = 1; s < S; s++) add_row(0, s);
#pragma unroll 1
                    for (int a = S - 1; a < k; a++) add_row(0, S);
#pragma unroll
                    for (int s = 1; s < S; s++) add_row(s, S);
                }
#pragma unroll
                for (int s = 0; s < S; s++) {
                    T* row_to = to + out_i[s] * output.stride_h;
#pragma unroll
                    for (int r = 0; r < P; r++, row_to += output.stride_h) {
                        if (r >= rows_there[s]) continue;
                        const float4* const of_row = sums + (s * P + r) * P;
                        if constexpr (Vectors) {
#pragma unroll
                            for (int q = 0; q < P; q++) {
                                if (q < columns_there) store_channels(of_row[q], row_to + q * output.stride_w);
                            }
                        } else {
                            float values[kVector][P];
#pragma unroll
                            for (int q = 0; q < P; q++) {
                                values[0][q] = of_row[q].x, values[1][q] = of_row[q].y;
                                values[2][q] = of_row[q].z, values[3][q] = of_row[q].w;
                            }
#pragma unroll
                            for (int v = 0; v < kVector; v++) {
                                if (v < channels_there)
                                    store_row<Whole>(values[v], columns_there, output.stride_w,
                                                     row_to + v * output.stride_c);
                            }
                        }
                    }
                }
            }
            to += channels_of_slice * output.stride_c;
            __syncthreads();
        }
    }
}

// Why no tile can be planned for a problem.
inline const char* not_for_reassemble_tiles(const Problem& p, const Array& output) {
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    for (int64_t size : {p.features.h, p.features.w, p.out_h, p.out_w}) {
        if (size > kMostSize / std::max(p.factor.up, p.factor.down)) return "rows or columns are too many";
    }
    if (p.out_h == 0 || p.out_w == 0) return nullptr;
    return TilesPlan(p, output, Share(p)).shared_bytes > kMostSharedBytes ? "kernel_size is too large" : nullptr;
}

template <bool Vectors>
void reassemble_tiles(const Problem& p, const Array& output) {
    const Share share(p);
    const TilesPlan plan(p, output, share);
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        if constexpr (sizeof(T) < sizeof(double)) {
            const bool whole = !Vectors && plan.whole_columns;
            const auto kernel = share.p == 4   ? whole ? reassemble_tiles_kernel<4, 1, Vectors, !Vectors, T>
                                                       : reassemble_tiles_kernel<4, 1, Vectors, false, T>
                                : share.p == 3 ? reassemble_tiles_kernel<3, 1, Vectors, false, T>
                                : share.p == 2 ? whole ? reassemble_tiles_kernel<2, 2, Vectors, !Vectors, T>
                                                       : reassemble_tiles_kernel<2, 2, Vectors, false, T>
                                : share.s == 4 ? reassemble_tiles_kernel<1, 4, Vectors, false, T>
                                               : reassemble_tiles_kernel<1, 1, Vectors, false, T>;
            launch(kernel, plan.items, kBlock, plan.shared_bytes, p, output, plan);
        }
    });
}

}  // namespace carafepp::cuda
