// SPDX-License-Identifier: Apache-2.0
// The forward for any factor. A block has a tile of sources, whose masks it stages once. It goes through the channels a
// slice at a time. It stages the slice's features with their halo as floats, four channels of a pixel in a vector. A
// unit is S squares of a column, each of D x D sources with at most P x P outputs. A thread has a unit in one vector of
// channels. It sums all its outputs in registers: a feature serves each of them, and a vector of masks four.
#pragma once

#include "cuda/any/stage_slice.h"
#include "cuda/columns.h"
#include "cuda/positions.h"

namespace carafepp::cuda {

constexpr int64_t kEnoughTiles = 384;  // that keep all multiprocessors busy

// The outputs of a thread: P x P of each of S squares of D x D sources. If D is 1, a source may have fewer.
struct Share {
    int p, d, s;

    explicit Share(const Problem& p) {
        // Two sources have three outputs, so none is absent.
        if (p.factor.up * 2 == p.factor.down * 3 && p.features.dtype == CARAFEPP_FLOAT32) {
            this->p = 3, d = 2, s = 1;
            return;
        }
        d = 1;
        const int64_t most = ceil_div(p.factor.up, p.factor.down);  // outputs of a source along an axis
        this->p = most <= 3 ? static_cast<int>(most) : ceil_div(most, 4) * 4 <= ceil_div(most, 3) * 3 ? 4 : 3;
        s = this->p == 2 ? 2 : p.factor.up == p.factor.down && p.kernel_size >= 3 ? 4 : 1;
    }
};

// Tap (a, b) of an output at source (y, x) of its unit has the number (y + a) * K + x + b. So the masks of a pixel of a
// unit's window are beside each other.
CARAFEPP_HOST_DEVICE constexpr int taps_of(int k, int d, int s) { return (k + s * d - 1) * k + d - 1; }

// Masks of a unit are a float or some vectors, an odd number apart: neighbouring units begin in other banks.
CARAFEPP_HOST_DEVICE constexpr int wide_of(int outputs) { return outputs == 1 ? 1 : 4; }  // floats of a load
CARAFEPP_HOST_DEVICE constexpr int loads_of(int outputs) { return (outputs + 3) / 4; }
CARAFEPP_HOST_DEVICE constexpr int pitch_of(int outputs) { return (loads_of(outputs) | 1) * wide_of(outputs); }

struct TilesPlan {
    Positions rows, columns;
    int parts;                    // of the outputs of a source along an axis
    int unit_rows, unit_columns;  // of a tile
    int vectors;                  // of a slice, a power of 2
    int halo_rows, halo_columns;
    int columns_at_once;  // that are staged: 4 where rows are whole vectors, and halos begin with one
    int apart;            // floats from tap to tap: an odd number of loads, as taps begin in other banks then
    int64_t row_tiles, column_tiles;
    int64_t slices;          // of an item
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;
    bool whole_columns;  // each source has P columns of outputs, which are stored as one vector

    TilesPlan(const Problem& p, const Array& output, Share share, bool adjacent_channels)
        : rows(p.factor, p.offset_h, p.out_h), columns(p.factor, p.offset_w, p.out_w) {
        const int64_t all = std::max<int64_t>(ceil_div(p.features.c / p.groups, kVector), 1);
        // A crop may leave fewer outputs than a source has.
        const int64_t outputs = std::min(ceil_div(p.factor.up, p.factor.down), std::max(p.out_h, p.out_w));
        parts = static_cast<int>(ceil_div(outputs, share.p));
        columns_at_once = not_for_columns(p.features, 4) == nullptr ? 4 : 1;
        for (vectors = 1; vectors < 8 && vectors < all;) vectors *= 2;
        // Rows of a tile fill sectors where columns are adjacent. Else a halo is small around a square.
        const int most_columns = !adjacent_channels ? share.p == 1 ? 16 : 8 : share.s * share.d == 1 ? 4 : 8;
        unit_columns = even_part(ceil_div(columns.size(), share.d), most_columns);
        unit_rows = even_part(ceil_div(rows.size(), share.s * share.d), std::max(kBlock / (vectors * unit_columns), 1));
        measure(p, share);
        while (shared_bytes > kMostSharedBytes && (unit_rows > 1 || vectors > 1 || unit_columns > 1)) {
            if (unit_rows > 1) {
                unit_rows--;
            } else {
                (vectors > 4 || unit_columns == 1 ? vectors : unit_columns) /= 2;
            }
            measure(p, share);
        }
        if (shared_bytes > kMostSharedBytes && columns_at_once > 1) {
            columns_at_once = 1;
            measure(p, share);
        }
        row_tiles = ceil_div(rows.size(), unit_rows * share.s * share.d);
        column_tiles = ceil_div(columns.size(), unit_columns * share.d);
        const int64_t tiles = p.features.n * p.groups * row_tiles * column_tiles * parts * parts;
        const int64_t all_slices = ceil_div(all, vectors);
        slices = all_slices;
        while (slices > 2 && tiles * ceil_div(all_slices, slices) < kEnoughTiles) slices = ceil_div(slices, 2);
        channel_blocks = ceil_div(all_slices, slices);
        items = tiles * channel_blocks;
        whole_columns = p.factor.down == 1 && p.factor.up % share.p == 0 && not_for_columns(output, share.p) == nullptr;
    }

    // Pixels from vector to vector, an odd number: so neighbouring threads may store different vectors of a pixel.
    CARAFEPP_HOST_DEVICE int64_t vector_step() const { return int64_t{halo_rows} * halo_columns | 1; }

private:
    void measure(const Problem& p, Share share) {
        const int outputs = share.s * share.p * share.p, k = static_cast<int>(p.kernel_size);
        const int wide = wide_of(outputs), taps = taps_of(k, share.d, share.s);
        halo_rows = rows.sources(unit_rows * share.s * share.d) + k - 1;
        const int across = unit_columns * share.d;
        halo_columns = columns.sources(across) + k - 1;
        if (columns_at_once == 4) {
            const int64_t step = share.p > share.d ? across * p.factor.up : across * p.factor.down;  // of tiles
            const int before = step % (4 * p.factor.up) == 0 ? (columns.offset - k / 2) & 3 : 3;
            halo_columns = (before + halo_columns + 3) / 4 * 4;
        }
        const int64_t pixels = int64_t{halo_rows} * halo_columns;
        apart = (unit_rows * unit_columns * pitch_of(outputs) / wide | 1) * wide;
        shared_bytes = ceil_div(taps * int64_t{apart}, kVector) * int64_t{sizeof(float4)} +
                       vector_step() * vectors * int64_t{sizeof(float4)} + pixels * int64_t{sizeof(int64_t)} +
                       (unit_rows * share.s + unit_columns) * share.p * int64_t{sizeof(Line)};
    }
};

// A tile of one part of the outputs, in some channels.
struct Tile {
    int64_t n, group, c;  // the first channel
    int channels;
    int top, left;         // positions
    int first_r, first_q;  // outputs of a source

    __device__ __forceinline__ Tile(const Problem& p, const TilesPlan& plan, int64_t item, int p_, int d, int s) {
        const Quotient channel_block = divide(item, computed_late(plan.channel_blocks)),
                       part = divide(channel_block.quotient, plan.parts), part_row = divide(part.quotient, plan.parts),
                       tile = divide(part_row.quotient, computed_late(plan.column_tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.row_tiles)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        n = image.quotient;
        group = image.remainder;
        top = static_cast<int>(tile_row.remainder) * plan.unit_rows * s * d;
        left = static_cast<int>(tile.remainder) * plan.unit_columns * d;
        first_r = static_cast<int>(part_row.remainder) * p_;
        first_q = static_cast<int>(part.remainder) * p_;
        const int64_t channels_in_group = p.features.c / p.groups,
                      first = channel_block.remainder * plan.slices * plan.vectors * kVector;
        c = group * channels_in_group + first;
        channels = static_cast<int>(min(channels_in_group - first, plan.slices * plan.vectors * kVector));
    }
};

// Finds the rows and columns of outputs of a tile. Masks are staged as [tap][unit][row][column].
template <int P, int D, int S>
__device__ __forceinline__ void find_lines(const Problem& p, const TilesPlan& plan, const Tile& tile, Line* rows,
                                           Line* columns) {
    constexpr int kPitch = pitch_of(S * P * P);
    const int apart = static_cast<int>(p.kernel_size) * plan.apart;
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int up = p.from_logits ? static_cast<int>(p.factor.up) : 1;
    const auto find = [&](const Positions& axis, int square, int own, int64_t stride, int64_t stride_of_phase, int to) {
        const int output = axis.first_output<(P > D)>(square) + own;
        const bool exists = output < axis.end_output<(P > D)>(square + D - 1);
        Line line;
        line.from = exists ? output / up * stride + output % up * stride_of_phase : kNowhere;
        line.to = to;
        line.source = axis.source<(P > D)>(square + own % P * D / P);
        return line;
    };
#pragma unroll 1
    for (int line = thread_computed_late(); line < plan.unit_rows * S * P; line += kBlock) {
        const int row = line % (S * P), source = row / P * D + row % P * D / P;
        rows[line] = find(plan.rows, tile.top + line / P * D, tile.first_r + line % P, array.stride_h,
                          up * array.stride_c, line / (S * P) * plan.unit_columns * kPitch + row * P + source * apart);
    }
#pragma unroll 1
    for (int line = thread_computed_late(); line < plan.unit_columns * P; line += kBlock) {
        const int column = line % P, source = column * D / P;
        columns[line] = find(plan.columns, tile.left + line / P * D, tile.first_q + column, array.stride_w,
                             array.stride_c, line / P * kPitch + column + source * plan.apart);
    }
}

// `Vectors`: a vector of channels is one in memory. `Whole`: the columns of a source are; tensor cores have such
// columns of 16 bits.
template <int P, int D, int S, bool Vectors, bool Whole, class T>
__global__ void __launch_bounds__(kBlock, 4) reassemble_tiles_kernel(Arguments arguments, TilesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    constexpr int kOutputs = S * P * P, kWide = wide_of(kOutputs);
    constexpr int kSources = S * D;                             // of a column
    constexpr int kAtOnce = kOutputs == 16 ? 1 : 6 - kSources;  // rows of features: all of K = 5 if registers suffice
    constexpr bool kSeveral = P > D;
    const int k = static_cast<int>(p.kernel_size), units = plan.unit_rows * plan.unit_columns;
    const int pixels_of_halo = plan.halo_rows * plan.halo_columns;
    float* const masks = shared_memory<float>();  // [tap][unit][row][column]
    float4* const features =                      // of pixels and vectors
        reinterpret_cast<float4*>(masks) + ceil_div(taps_of(k, D, S) * plan.apart, kVector);
    const int vector_step = Vectors ? 1 : static_cast<int>(plan.vector_step());
    int64_t* const pixels = reinterpret_cast<int64_t*>(features + plan.vector_step() * plan.vectors);
    Line* const row_lines = reinterpret_cast<Line*>(pixels + pixels_of_halo);
    Line* const column_lines = row_lines + plan.unit_rows * S * P;
    const int pixel_step = Vectors ? plan.vectors : 1;
    const int thread = static_cast<int>(threadIdx.x);
    // Two threads have two vectors of a unit where units are an even number of pixels apart: those are in other banks.
    const int beside = Vectors ? plan.vectors : min(D, plan.vectors);
    const int vector = thread / (beside * units) * beside + thread % beside, unit = thread / beside % units;
    const bool has_unit = vector < plan.vectors;
    const int stagers = kBlock / plan.vectors;  // of a vector
    const bool fours = !Vectors && plan.columns_at_once == 4;
    const int staged = Vectors || fours ? thread % plan.vectors : thread / stagers,
              first_pixel = Vectors || fours ? thread / plan.vectors : thread % stagers;
    const int pixels_at_once = fours ? 4 : 1, row_of_pixels = plan.halo_columns / pixels_at_once;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Tile tile(p, plan, item, P, D, S);
        const int top = plan.rows.source<kSeveral>(tile.top) - k / 2;
        int left = plan.columns.source<kSeveral>(tile.left) - k / 2;
        if (fours) left -= left & 3;
#pragma unroll 1
        for (int pixel = thread; pixel < plan.halo_rows * row_of_pixels; pixel += kBlock) {
            const int i = top + pixel / row_of_pixels, j = left + pixel % row_of_pixels * pixels_at_once;
            const bool exists = i >= 0 && i < p.features.h && j >= 0 && j < p.features.w;
            pixels[pixel] = exists ? i * p.features.stride_h + j * p.features.stride_w : kNowhere;
        }
        find_lines<P, D, S>(p, plan, tile, row_lines, column_lines);
        __syncthreads();
        const bool inside = top >= 0 && top + plan.halo_rows <= p.features.h && left >= 0 &&
                            left + plan.halo_columns <= p.features.w;
        stage_lines<T>(p, tile.n, tile.group, row_lines, plan.unit_rows * S * P, column_lines, plan.unit_columns * P,
                       plan.apart, inside, masks);

        const int row = tile.top + unit / plan.unit_columns * kSources,
                  column = tile.left + unit % plan.unit_columns * D;
        const int out_j = plan.columns.first_output<kSeveral>(column) + tile.first_q;
        const int columns_there = has_unit ? plan.columns.end_output<kSeveral>(column + D - 1) - out_j : 0;
        int out_i[S], rows_there[S];
#pragma unroll
        for (int s = 0; s < S; s++) {
            out_i[s] = plan.rows.first_output<kSeveral>(row + s * D) + tile.first_r;
            rows_there[s] = plan.rows.end_output<kSeveral>(row + s * D + D - 1) - out_i[s];
        }
        const int corner = (plan.rows.source<kSeveral>(row) - k / 2 - top) * plan.halo_columns +
                           plan.columns.source<kSeveral>(column) - k / 2 - left;
        const float4* const own_features = features + corner * pixel_step + vector * vector_step;
        const int row_step = plan.halo_columns * pixel_step;
        const T* from = element<const T>(p.features, tile.n, tile.c + staged * kVector, 0, 0);
        T* to = element<T>(output, tile.n, tile.c + vector * kVector, 0, out_j);
        const int channels_of_slice = plan.vectors * kVector;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= channels_of_slice) {
            const int channels_to_stage = channels - staged * kVector;
            float4* const to_staged = features + first_pixel * pixels_at_once * pixel_step + staged * vector_step;
            if (fours) {
                stage_fours(from, p.features.stride_c, pixels, pixels_of_halo / 4, first_pixel, stagers,
                            channels_to_stage, to_staged);
            } else {
                stage_slice<Vectors>(from, p.features.stride_c, pixels, pixels_of_halo, first_pixel, stagers,
                                     channels_to_stage, to_staged, stagers * pixel_step);
            }
            from += channels_of_slice * p.features.stride_c;
            wait_for_copies();
            __syncthreads();
            const int channels_there = channels - vector * kVector;
            if (columns_there > 0 && channels_there > 0 && rows_there[0] > 0) {
                float4 sums[kOutputs] = {};
                const float4* column_at = own_features;
                const float* weights_of_column = masks + unit * pitch_of(kOutputs);
                // A column of features meets the sources in [left, right) of each row.
                const auto add_column = [&](int left, int right) __attribute__((always_inline)) {
                    const float4* feature_at = column_at;
                    const float* weights = weights_of_column;
                    // A row of it meets those in [above, below) of each column.
                    const auto add_row = [&](int above, int below) __attribute__((always_inline)) {
                        const float4 feature = *feature_at;
                        feature_at += row_step;
#pragma unroll
                        for (int load = 0; load < loads_of(kOutputs); load++) {
                            const float4 four = kWide == 4 ? staged_channels(weights + load * 4)
                                                           : make_float4(*weights, 0, 0, 0);
                            const float weight[] = {four.x, four.y, four.z, four.w};
#pragma unroll
                            for (int o = 0; o < kWide; o++) {
                                const int at = load * kWide + o, r = at / P, q = at % P;
                                const int y = r / P * D + r % P * D / P, x = q * D / P;
                                if (at < kOutputs && y >= above && y < below && x >= left && x < right)
                                    add_products(weight[o], feature, sums[at]);
                            }
                        }
                        weights += k * plan.apart;
                    };
#pragma unroll
                    for (int s = 1; s < kSources; s++) add_row(0, s);
                    in_chunks<kAtOnce>(k - kSources + 1, [&](auto rows) __attribute__((always_inline)) {
#pragma unroll
                        for (int a = 0; a < decltype(rows)::value; a++) add_row(0, kSources);
                    });
#pragma unroll
                    for (int s = 1; s < kSources; s++) add_row(s, kSources);
                    column_at += pixel_step;
                    weights_of_column += plan.apart;
                };
#pragma unroll
                for (int s = 1; s < D; s++) add_column(0, s);
#pragma unroll 1
                for (int b = D - 1; b < k; b++) add_column(0, D);
#pragma unroll
                for (int s = 1; s < D; s++) add_column(s, D);
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
inline const char* not_for_reassemble_tiles(const Problem& p, const Array& output, bool adjacent_channels) {
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    for (int64_t size : {p.features.h, p.features.w, p.out_h, p.out_w}) {
        if (size > kMostSize / std::max(p.factor.up, p.factor.down)) return "rows or columns are too many";
    }
    if (p.out_h == 0 || p.out_w == 0) return nullptr;
    const TilesPlan plan(p, output, Share(p), adjacent_channels);
    return plan.shared_bytes > kMostSharedBytes ? "kernel_size is too large" : nullptr;
}

template <bool Vectors>
void reassemble_tiles(const Problem& p, const Array& output) {
    const Share share(p);
    const TilesPlan plan(p, output, share, Vectors);
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        if constexpr (sizeof(T) < sizeof(double)) {
            constexpr bool kFloats = sizeof(T) == sizeof(float), kWhole = kFloats && !Vectors;
            constexpr int kPair = kFloats ? 2 : 1;  // sources of three outputs: see Share
            const bool whole = kWhole && plan.whole_columns;
            const auto kernel = share.p == 4   ? whole ? reassemble_tiles_kernel<4, 1, 1, Vectors, kWhole, T>
                                                       : reassemble_tiles_kernel<4, 1, 1, Vectors, false, T>
                                : share.d == 2 ? reassemble_tiles_kernel<3, kPair, 1, Vectors, false, T>
                                : share.p == 3 ? reassemble_tiles_kernel<3, 1, 1, Vectors, false, T>
                                : share.p == 2 ? whole ? reassemble_tiles_kernel<2, 1, 2, Vectors, kWhole, T>
                                                       : reassemble_tiles_kernel<2, 1, 2, Vectors, false, T>
                                : share.s == 4 ? reassemble_tiles_kernel<1, 1, 4, Vectors, false, T>
                                               : reassemble_tiles_kernel<1, 1, 1, Vectors, false, T>;
            launch(kernel, plan.items, kBlock, plan.shared_bytes, p, output, plan);
        }
    });
}

}  // namespace carafepp::cuda
