// SPDX-License-Identifier: Apache-2.0
// The forward for any factor with features of 16 bits, on tensor cores. A block has a tile of patches of 16 outputs.
// Once it stages their masks as matrices. It goes through the channels a slice at a time. It stages the slice's
// features with their halo, channels adjacent. A warp multiplies a patch's matrix by its window, 16 channels at a time.
// A step of a product has any 16 pixels of a window, since each tells its own address. If rows of outputs are whole
// vectors of eight, two lanes exchange outputs of two patches, and each stores eight. A zero of a matrix makes NaN of
// an infinite feature. Sums that are not finite are computed again, tap by tap.
#pragma once

#include "cuda/any/stage_bands.h"
#include "cuda/any/stage_pixels.h"
#include "cuda/positions.h"

namespace carafepp::cuda {

constexpr int kWarps = kBlock / 32;
constexpr int kQuad = 4, kQuads = kPatch / kQuad;  // neighbouring outputs of a patch
constexpr int kStep = 16;                          // pixels of a product
constexpr int kChannelsOfMma = 16;
constexpr int kMostPatches = 16;
constexpr int64_t kFewestItems = 3;  // of a multiprocessor, which keep it busy

// The patches that a warp has one after the other. Two are stored together where channels are not adjacent.
CARAFEPP_HOST_DEVICE constexpr int neighbours(bool vectors) { return vectors ? 1 : 2; }

struct Size {
    int rows, columns;

    CARAFEPP_HOST_DEVICE int count() const { return rows * columns; }
};

// Four outputs, of which the first `there` exist.
struct Quad {
    int64_t to;
    int there;
    int padding;
};

struct PatchesPlan {
    Outputs rows, columns;
    Size patch;           // outputs
    Size tile;            // patches
    Size window;          // pixels
    Size halo;            // pixels of a tile
    int pitch;            // pixels from row to row of a halo
    int steps = 0;        // of a window
    int apart;            // elements from output to output of a matrix
    int matrix;           // from patch to patch: neighbours begin in other banks
    int channels;         // of a slice
    int pixel;            // elements from pixel to pixel
    int buffers;          // of slices
    int columns_at_once;  // that are stored: 8 are of two lanes
    bool pairs;           // of columns are loaded
    int64_t row_tiles, column_tiles;
    int64_t slices;          // of an item
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    PatchesPlan(const Problem& p, const Array& output, bool vectors)
        : rows(p.factor, p.offset_h, p.out_h), columns(p.factor, p.offset_w, p.out_w) {
        for (columns_at_once = 2 * kQuad; columns_at_once > 1; columns_at_once /= 2) {
            if (not_for_columns(output, columns_at_once) == nullptr) break;
        }
        pairs = !vectors && not_for_columns(p.features) == nullptr;
        choose_patch(p, vectors);
        choose_tile(p, vectors);
    }

private:
    // The shape with the fewest steps. Where columns are adjacent, a patch of fewer rows is stored by fewer accesses.
    void choose_patch(const Problem& p, bool vectors) {
        constexpr int kCostOfStep = 16, kCostOfStore = 36;  // cycles, about
        const int beside = static_cast<int>(p.kernel_size) - 1;
        const int most = columns_at_once;
        int64_t least = INT64_MAX;
        for (const int height : {4, 2, 1}) {
            const Size shape{height, kPatch / height};
            const Size read{most_sources(p.factor, shape.rows - 1, shape.rows) + 1 + beside,
                            most_sources(p.factor, shape.columns - 1, shape.columns) + 1 + beside};
            const int64_t needed = ceil_div(int64_t{read.rows} * read.columns, kStep);
            const int stored = std::min(most, shape.columns >= 2 * kQuad ? 2 * kQuad : kQuad);
            const int64_t cost = ceil_div(p.out_h, shape.rows) * ceil_div(p.out_w, shape.columns) *
                                 (kCostOfStep * needed +
                                  (vectors ? 1 : height) * (stored > kQuad ? kCostOfStore / 2 : kCostOfStore));
            if (cost >= least) continue;
            least = cost;
            columns_at_once = stored;
            patch = shape;
            window = read;
            steps = static_cast<int>(std::min<int64_t>(needed, INT16_MAX));
        }
        apart = steps * kStep + kWide;  // an odd number of vectors: neighbours begin in other banks
        matrix = kPatch * apart + kWide;
    }

    // The tile and the slices that take the least time and fit in shared memory.
    void choose_tile(const Problem& p, bool vectors) {
        const int64_t channels_of_group = p.features.c / p.groups;
        const int64_t patch_rows = ceil_div(p.out_h, patch.rows), patch_columns = ceil_div(p.out_w, patch.columns);
        PatchesPlan best = *this;
        best.shared_bytes = INT64_MAX;
        double least = INFINITY;
        for (channels = 2 * kChannelsOfMma; channels >= kChannelsOfMma; channels /= 2) {
            const int64_t all = ceil_div(channels_of_group, channels);
            if (channels > kChannelsOfMma && channels_of_group <= kChannelsOfMma) continue;
            for (int most_rows = 1; most_rows <= kMostPatches; most_rows *= 2) {
                for (int most_columns = 1; most_rows * most_columns <= kMostPatches; most_columns *= 2) {
                    tile = {even_part(patch_rows, most_rows), even_part(patch_columns, most_columns)};
                    row_tiles = ceil_div(patch_rows, tile.rows);
                    column_tiles = ceil_div(patch_columns, tile.columns);
                    measure(p, vectors, channels_of_group);
                    if (shared_bytes > kMostSharedBytes) continue;
                    for (slices = all;; slices = ceil_div(slices, 2)) {
                        channel_blocks = ceil_div(all, slices);
                        items = p.features.n * p.groups * row_tiles * column_tiles * channel_blocks;
                        const int64_t of_multiprocessor = std::max(ceil_div(items, kMultiprocessors), kFewestItems);
                        const double cost = static_cast<double>(of_multiprocessor) * cost_of_item(p, vectors);
                        if (cost < least) {
                            least = cost;
                            best = *this;
                        }
                        if (slices <= 2 || items >= kFewestItems * kMultiprocessors) break;
                    }
                }
            }
        }
        *this = best;
    }

    void measure(const Problem& p, bool vectors, int64_t channels_of_group) {
        const int outputs_across = tile.columns * patch.columns;
        halo.rows = most_sources(p.factor, (tile.rows - 1) * patch.rows, tile.rows * patch.rows) + window.rows;
        halo.columns = most_sources(p.factor, outputs_across - patch.columns, outputs_across) + window.columns;
        // Halos begin with an even column where two columns are loaded at once.
        const bool even_tiles = outputs_across * p.factor.down % (2 * p.factor.up) == 0;
        if (pairs && !(even_tiles && (p.offset_w - p.kernel_size / 2) % 2 == 0)) halo.columns++;
        // If rows are as far apart as those of a window, modulo 8, eight pixels of a step begin in different banks.
        constexpr int kMostMore = 5;
        const int more = ((window.columns - halo.columns) % 8 + 8) % 8;
        pitch = halo.columns + (window.columns % 8 != 0 && more <= kMostMore ? more : 0);
        if (pairs) pitch += pitch % 2;
        pixel = channels + kWide;  // an odd number of vectors, too
        buffers = vectors && channels_of_group > channels ? 2 : 1;
        const int64_t patches = tile.count(), pixels = int64_t{halo.rows} * pitch;
        shared_bytes = patches * (matrix * int64_t{sizeof(uint16_t)} + kPatch * int64_t{sizeof(float)}) +
                       buffers * pixels * pixel * int64_t{sizeof(uint16_t)} +
                       (kTapPlaces + steps * kStep) * int64_t{sizeof(int)} + pixels * int64_t{sizeof(int64_t)} +
                       patches * (kQuads * int64_t{sizeof(Quad)} + int64_t{sizeof(int)}) +
                       (tile.rows * patch.rows + tile.columns * patch.columns) * int64_t{sizeof(Line)};
    }

    // Cycles of a multiprocessor, about.
    double cost_of_item(const Problem& p, bool vectors) const {
        constexpr double kOfItem = 1500, kOfSlice = 100, kOfMask = 0.4, kBytes = 22;  // from the L2 in a cycle
        const int64_t sectors = vectors ? int64_t{halo.count()} * channels / 16
                                        : int64_t{halo.rows} * (halo.columns / 16 + 1) * channels;
        const double turns = static_cast<double>(ceil_div(tile.count(), kWarps * neighbours(vectors)) *
                                                 neighbours(vectors)),
                     of_patch = (channels / kChannelsOfMma) * (10 * steps + 30);
        return kOfItem + tile.count() * kPatch * static_cast<double>(p.taps()) * kOfMask +
               static_cast<double>(slices) *
                   (kOfSlice + static_cast<double>(sectors) * 32 / kBytes + turns * of_patch * 1.7);
    }
};

// A tile in some channels.
struct TileOfPatches {
    int64_t n, group, c;  // the first channel
    int channels;
    int top, left;  // output

    __device__ __forceinline__ TileOfPatches(const Problem& p, const PatchesPlan& plan, uint32_t item) {
        const auto take = [&](int64_t count) {
            const auto divisor = static_cast<uint32_t>(count);
            const uint32_t number = item % divisor;
            item /= divisor;
            return static_cast<int>(number);
        };
        const int channel_block = take(plan.channel_blocks);
        left = take(plan.column_tiles) * plan.tile.columns * plan.patch.columns;
        top = take(plan.row_tiles) * plan.tile.rows * plan.patch.rows;
        group = take(p.groups);
        n = item;
        const int64_t channels_in_group = p.features.c / p.groups, first = channel_block * plan.slices * plan.channels;
        c = group * channels_in_group + first;
        channels = static_cast<int>(min(channels_in_group - first, plan.slices * plan.channels));
    }
};

// Finds the rows and columns of outputs of a tile: see line_of_patch.
__device__ __forceinline__ void find_lines(const Problem& p, const PatchesPlan& plan, const TileOfPatches& tile,
                                           Line* rows, Line* columns) {
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int up = p.from_logits ? static_cast<int>(p.factor.up) : 1;
    // The place behind all matrices of patches before counts as that of a pixel.
    const auto find = [&](const Outputs& axis, int output, int first_of_patch, int64_t stride, int64_t stride_of_phase,
                          int patch, int number, int pixels) {
        Line line;
        line.from = output < axis.count ? output / up * stride + output % up * stride_of_phase : kNowhere;
        line.source = axis.source(output);
        line.to = line_of_patch(patch * kPatch + number,
                                patch * kWide + (line.source - axis.source(first_of_patch)) * pixels);
        return line;
    };
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int line = thread; line < plan.tile.rows * plan.patch.rows; line += kBlock) {
        const int within = line % plan.patch.rows;
        rows[line] = find(plan.rows, tile.top + line, tile.top + line - within, array.stride_h, up * array.stride_c,
                          line / plan.patch.rows * plan.tile.columns, within * plan.patch.columns / 2,
                          plan.window.columns);
    }
#pragma unroll 1
    for (int line = kBlock - 1 - thread; line < plan.tile.columns * plan.patch.columns; line += kBlock) {
        const int within = line % plan.patch.columns;
        columns[line] = find(plan.columns, tile.left + line, tile.left + line - within, array.stride_w, array.stride_c,
                             line / plan.patch.columns, within / 4 * 2 + within % 4 / 2 * 8 + within % 2, 1);
    }
}

// Adds a step's products with two matrices `b`.
template <class T>
__device__ __forceinline__ void multiply_step(const uint32_t (&a)[4], const uint32_t (&b)[4], float (&sums)[2][4]) {
    multiply_add<T>(sums[0], a, {b[0], b[1]});
    multiply_add<T>(sums[1], a, {b[2], b[3]});
}

// Stores neighbouring outputs of four channels, of which `channels` exist, eight channels apart; `there` outputs exist.
// `at_once` are stored in an access.
template <class T>
__device__ __forceinline__ void store_quads(const uint2 (&words)[4], int there, int at_once, int channels,
                                            const Array& output, T* to) {
    const int64_t step = 8 * output.stride_c;
    if (at_once == kQuad) {
#pragma unroll
        for (int q = 0; q < 4; q++, to += step) {
            if (there > 0 && q * 8 < channels) __stcs(reinterpret_cast<uint2*>(to), words[q]);
        }
        return;
    }
#pragma unroll 1
    for (int first = 0; first < there; first += at_once, to += at_once * output.stride_w) {
        T* at = to;
#pragma unroll
        for (int q = 0; q < 4; q++, at += step) {
            const uint32_t word = first < 2 ? words[q].x : words[q].y;
            if (q * 8 >= channels) break;
            if (at_once == 2) {
                store_word(word, at);
            } else {
                *at = T{static_cast<uint16_t>(word >> first % 2 * 16)};
            }
        }
    }
}

// The shared memory of a block.
template <class T>
struct Room {
    T* bands;        // [output][pixel of a window]
    float* factors;  // of outputs
    T* features;     // of each buffer: [row][column][channel]
    int* taps;       // of each the pixel of a window, from the first tap on
    int* offsets;    // of the pixels of a window
    int64_t* pixels;
    Quad* quads;
    Line *rows, *columns;  // of outputs
    int* corners;          // of the patches' windows, or -1

    __device__ __forceinline__ explicit Room(const PatchesPlan& plan) {
        const int patches = plan.tile.count(), pixels_of_halo = plan.halo.rows * plan.pitch;
        bands = shared_memory<T>();
        factors = reinterpret_cast<float*>(bands + patches * plan.matrix);
        features = reinterpret_cast<T*>(factors + patches * kPatch);
        taps = reinterpret_cast<int*>(features + plan.buffers * pixels_of_halo * plan.pixel);
        offsets = taps + kTapPlaces;
        pixels = reinterpret_cast<int64_t*>(offsets + plan.steps * kStep);
        quads = reinterpret_cast<Quad*>(pixels + pixels_of_halo);
        rows = reinterpret_cast<Line*>(quads + patches * kQuads);
        columns = rows + plan.tile.rows * plan.patch.rows;
        corners = reinterpret_cast<int*>(columns + plan.tile.columns * plan.patch.columns);
    }
};

// The first output of a quad.
__device__ __forceinline__ Pixel output_of_quad(const PatchesPlan& plan, const TileOfPatches& tile, int quad) {
    const int patch = quad / kQuads, first = quad % kQuads * kQuad;
    const int row = patch / plan.tile.columns, column = patch - row * plan.tile.columns;
    return {tile.top + row * plan.patch.rows + first / plan.patch.columns,
            tile.left + column * plan.patch.columns + first % plan.patch.columns};
}

// An output in one channel without tensor cores. A mask that is 0 in 16 bits may be more.
template <class T>
__device__ float output_tap_by_tap(const Problem& p, const PatchesPlan& plan, int64_t n, int64_t group, int64_t c,
                                   Pixel output, const T* band, float factor, const int* taps) {
    const int k = static_cast<int>(p.kernel_size), i = static_cast<int>(output.i), j = static_cast<int>(output.j);
    const int y = plan.rows.source(i), x = plan.columns.source(j);
    band += (y - plan.rows.source(i - i % plan.patch.rows)) * plan.window.columns + x -
            plan.columns.source(j - j % plan.patch.columns);
    float sum = 0;
#pragma unroll 1
    for (int t = 0; t < k * k; t++) {
        const int row = y - k / 2 + t / k, column = x - k / 2 + t % k;
        if (row < 0 || row >= p.features.h || column < 0 || column >= p.features.w) continue;
        float mask = widen(band[taps[t]]) * factor;
        if (mask == 0) mask = mask_of<T>(p, n, group, t, output);
        sum += mask * widen(*element<const T>(p.features, n, c, row, column));
    }
    return sum;
}

// `Vectors`: a vector of channels is one in memory. Then rows of products are outputs, and their columns channels; else
// the reverse. So a lane has neighbouring channels, or neighbouring outputs: of the quad `row` / 2, or of `pair`.
template <bool Vectors, class T>
__global__ void __launch_bounds__(kBlock, 4) reassemble_mma_kernel(Arguments arguments, PatchesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    const int k = static_cast<int>(p.kernel_size), patches = plan.tile.count();
    const int pixels_of_halo = plan.halo.rows * plan.pitch, slice = pixels_of_halo * plan.pixel;
    const Room<T> room(plan);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int warp = same_in_warp(thread / 32);
    const int row = lane / 4, pair = lane % 4;
    const int vectors = plan.channels / kWide, stagers = kBlock / vectors;
    const int vector = Vectors ? thread % vectors : thread / stagers;
    // The pixels of eight neighbouring threads, which store vectors to different banks, are `vectors` apart.
    const int together = kWide / vectors, own = thread / vectors;
    const int first_pixel = Vectors ? own / kWide * kWide + own % together * vectors + own % kWide / together
                                    : thread % stagers;
    // The row of both matrices whose place this lane tells, and its half. `a` has rows beside each other first.
    const int matrix_row = Vectors ? lane % 16 : lane % 8 + lane / 16 * 8,
              matrix_half = (Vectors ? lane / 16 : lane / 8 % 2) * kWide;
    const int first_channel = Vectors ? pair * kWide : row;  // that this lane stores
    for (int t = thread; t < plan.steps * kStep; t += kBlock) {
        const int pixel = min(t, plan.window.count() - 1);  // the last one again: in no bank of others
        const int y = pixel / plan.window.columns, x = pixel - y * plan.window.columns;
        room.offsets[t] = (y * plan.pitch + x) * plan.pixel;
    }
    for (int t = thread; t < kTapPlaces; t += kBlock) room.taps[t] = t / k * plan.window.columns + t % k;

    constexpr int kNeighbours = neighbours(Vectors);
    const int turns = ceil_div(patches, kWarps * kNeighbours) * kNeighbours;  // of a warp
    const auto patch_of = [&](int turn) {
        return (turn / kNeighbours * kWarps + warp) * kNeighbours + turn % kNeighbours;
    };

    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfPatches tile(p, plan, static_cast<uint32_t>(item));
        const int top = plan.rows.source(tile.top) - k / 2;
        int left = plan.columns.source(tile.left) - k / 2;
        if (plan.pairs) left -= left & 1;
#pragma unroll 1
        for (int pixel = thread; pixel < pixels_of_halo; pixel += kBlock) {
            const int y = pixel / plan.pitch, x = pixel - y * plan.pitch, i = top + y, j = left + x;
            const bool exists = i >= 0 && i < p.features.h && j >= 0 && j < p.features.w && x < plan.halo.columns;
            room.pixels[pixel] = exists ? i * p.features.stride_h + j * p.features.stride_w : kNowhere;
        }
        find_lines(p, plan, tile, room.rows, room.columns);
#pragma unroll 1
        for (int quad = thread; quad < patches * kQuads; quad += kBlock) {
            const Pixel first = output_of_quad(plan, tile, quad);
            const int i = static_cast<int>(first.i), j = static_cast<int>(first.j);
            const bool exists = i < p.out_h && j < p.out_w;
            room.quads[quad] = {i * output.stride_h + j * output.stride_w,
                                exists ? static_cast<int>(min(p.out_w - j, int64_t{kQuad})) : 0, 0};
            if (quad % kQuads == 0) {
                const int y = plan.rows.source(i) - k / 2 - top, x = plan.columns.source(j) - k / 2 - left;
                room.corners[quad / kQuads] = exists ? (y * plan.pitch + x) * plan.pixel : -1;
            }
        }
        // Matrices and factors, which are behind them.
        for (int v = thread; v < patches * (plan.matrix / kWide + kQuads); v += kBlock)
            reinterpret_cast<uint4*>(room.bands)[v] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        const T* from = element<const T>(p.features, tile.n, tile.c + vector * kWide, 0, 0);
        const auto stage_next = [&](int channels, T* to) {
            const int there = channels - vector * kWide, stride = static_cast<int>(p.features.stride_c);
            to += vector * kWide;
            if (Vectors) {
                copy_pixels(from, room.pixels, pixels_of_halo, first_pixel, stagers, there, to, plan.pixel);
            } else if (plan.pairs) {
                transpose_pixels<2>(from, stride, room.pixels, pixels_of_halo, first_pixel, stagers, there, to,
                                    plan.pixel);
            } else {
                transpose_pixels<1>(from, stride, room.pixels, pixels_of_halo, first_pixel, stagers, there, to,
                                    plan.pixel);
            }
            from += plan.channels * p.features.stride_c;
        };
        if (Vectors) stage_next(tile.channels, room.features);
        const bool inside = top >= 0 && top + plan.halo.rows <= p.features.h && left >= 0 &&
                            left + plan.halo.columns <= p.features.w;
        BandStage<T>{p,
                     room.rows,
                     plan.tile.rows * plan.patch.rows,
                     room.columns,
                     plan.tile.columns * plan.patch.columns,
                     room.taps,
                     plan.window.columns,
                     plan.apart,
                     inside,
                     room.bands,
                     room.factors}
            .stage(tile.n, tile.group);
        T* to_slice = element<T>(output, tile.n, tile.c + first_channel, 0, 0);
        bool second = false;  // of the buffers
        uint32_t zeros = 0;   // while all sums are finite
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= plan.channels) {
            if (!Vectors) stage_next(channels, room.features);
            wait_for_copies();
            __syncthreads();
            const T* const staged = room.features + second * slice;
            if (Vectors && channels > plan.channels) {
                second = !second;
                stage_next(channels - plan.channels, room.features + second * slice);
            }
            const int there = min(channels, plan.channels);
            const bool both = there > kChannelsOfMma;  // products along channels
            uint2 before[4] = {};                      // the words of the patch before
#pragma unroll 1
            for (int turn = 0; turn < turns; turn++) {
                const int patch = patch_of(turn);
                const bool in_tile = patch < patches;
                const int corner = in_tile ? same_in_warp(room.corners[patch]) : -1;
                // Computed late, it makes no second loop.
                const bool alone = Vectors || static_cast<int>(computed_late(plan.columns_at_once)) <= kQuad;
                if (alone && corner < 0) continue;
                const T* band = room.bands + patch * plan.matrix + matrix_row * plan.apart + matrix_half;
                const T* const window = staged + corner + matrix_half;
                const int* offset = room.offsets + matrix_row;
                float sums[2][2][4] = {};  // of each product; of the outputs or channels beside
#pragma unroll 2
                for (int step = corner < 0 ? plan.steps : 0; step < plan.steps;
                     step++, band += kStep, offset += kStep) {
                    uint32_t masks[4], values[4];
                    load_matrices<false>(band, masks);
                    const T* const of_step = window + *offset;
                    load_matrices(of_step, values);
                    multiply_step<T>(Vectors ? masks : values, Vectors ? values : masks, sums[0]);
                    if (both) {
                        load_matrices(of_step + kChannelsOfMma, values);
                        multiply_step<T>(Vectors ? masks : values, Vectors ? values : masks, sums[1]);
                    }
                }
                const float* const factors = room.factors + (in_tile ? patch * kPatch : 0) + (Vectors ? row : 2 * pair);
                if constexpr (Vectors) {
                    const Quad quad = room.quads[patch * kQuads + row / 2];
                    T* to = to_slice + quad.to + row % 2 * output.stride_w;
#pragma unroll
                    for (int half = 0; half < 2; half++, to += 2 * output.stride_w) {  // outputs
                        const float factor = factors[half * 8];
                        uint32_t words[4];
#pragma unroll
                        for (int q = 0; q < 4; q++) {
                            const float* const sum = sums[q / 2][q % 2] + half * 2;
                            words[q] = pair_of<T>(sum[0] * factor, sum[1] * factor);
                            add_zeros<T>(words[q], zeros);
                        }
                        const uint4 vector_of_channels = transpose_words(words, lane);
                        if (half * 2 + row % 2 < quad.there && first_channel < there)
                            __stcs(reinterpret_cast<uint4*>(to), vector_of_channels);
                    }
                } else {
                    const float2 left_factors = *reinterpret_cast<const float2*>(factors),
                                 right_factors = *reinterpret_cast<const float2*>(factors + 8);
                    uint2 words[4];  // of channels
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const float *const first = sums[q / 2][0] + q % 2 * 2, *const second = sums[q / 2][1] +
                                                                                               q % 2 * 2;
                        words[q] = make_uint2(pair_of<T>(first[0] * left_factors.x, first[1] * left_factors.y),
                                              pair_of<T>(second[0] * right_factors.x, second[1] * right_factors.y));
                        add_zeros<T>(words[q].x, zeros);
                        add_zeros<T>(words[q].y, zeros);
                    }
                    if (alone) {
                        const Quad quad = room.quads[patch * kQuads + pair];
                        store_quads(words, quad.there, plan.columns_at_once, there - row, output, to_slice + quad.to);
                    } else if (turn % 2 == 0) {
#pragma unroll
                        for (int q = 0; q < 4; q++) before[q] = words[q];
                    } else {
                        // A lane has a quad of both patches. It exchanges one for its neighbour's of the other.
                        const int odd = pair % 2, own = patch - 1 + odd;
                        const Quad quad = room.quads[own < patches ? own * kQuads + pair - odd : 0];
                        T* to_octet = to_slice + quad.to;
#pragma unroll
                        for (int q = 0; q < 4; q++, to_octet += 8 * output.stride_c) {
                            const uint2 kept = odd ? words[q] : before[q], given = odd ? before[q] : words[q];
                            const uint2 taken{__shfl_xor_sync(0xffffffffu, given.x, 1),
                                              __shfl_xor_sync(0xffffffffu, given.y, 1)};
                            const uint2 left = odd ? taken : kept, right = odd ? kept : taken;
                            if (own < patches && quad.there > 0 && q * 8 < there - row)
                                __stcs(reinterpret_cast<uint4*>(to_octet),
                                       make_uint4(left.x, left.y, right.x, right.y));
                        }
                    }
                }
            }
            to_slice += plan.channels * output.stride_c;
            if (!Vectors) __syncthreads();
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) zeros |= __shfl_xor_sync(0xffffffffu, zeros, distance);
        if (zeros != 0) {  // a lane looks at what others of its warp have stored
            __syncwarp();
            for (int turn = 0; turn < turns; turn++) {
                const int patch = patch_of(turn);
                if (patch >= patches) continue;
#pragma unroll 1
                for (int number = lane; number < kPatch * tile.channels; number += 32) {
                    const int own = number % kPatch, quad = own / kQuad, column = own % kQuad;
                    if (column >= room.quads[patch * kQuads + quad].there) continue;
                    const int64_t c = tile.c + number / kPatch;
                    Pixel pixel = output_of_quad(plan, tile, patch * kQuads + quad);
                    pixel.j += column;
                    T* const stored = element<T>(output, tile.n, c, pixel.i, pixel.j);
                    if (fabsf(widen(*stored)) < INFINITY) continue;
                    const int of_patch = quad * 2 + column / 2 * 8 + column % 2;
                    *stored = narrow<T>(output_tap_by_tap(p, plan, tile.n, tile.group, c, pixel,
                                                          room.bands + patch * plan.matrix + of_patch * plan.apart,
                                                          room.factors[patch * kPatch + of_patch], room.taps));
                }
            }
        }
        __syncthreads();
    }
}

// Why no patches can be planned for a problem.
inline const char* not_for_patches(const Problem& p, const Array& output, bool vectors) {
    if (itemsize(p.features.dtype) != 2) return "features are not of 16 bits";
    if (p.kernel_size > kMostOfEight) return "kernel_size is more than 7";
    if (p.features.c / p.groups < kWide) return "a group has fewer than 8 channels";
    for (int64_t size : {p.features.h, p.features.w, p.out_h, p.out_w}) {
        if (size > kMostSize / std::max(p.factor.up, p.factor.down)) return "rows or columns are too many";
    }
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    const int64_t tap = taps_apart(p, p.from_logits ? p.logits : p.masks);
    if (tap != static_cast<int>(tap)) return "masks of an output are too far apart";
    if (p.features.stride_c != static_cast<int>(p.features.stride_c)) return "channels are too far apart";
    if (p.out_h == 0 || p.out_w == 0) return nullptr;
    const PatchesPlan plan(p, output, vectors);
    if (plan.shared_bytes > kMostSharedBytes) return "outputs are too far apart";
    return plan.items > UINT32_MAX ? "tiles are too many" : nullptr;
}

template <bool Vectors>
void reassemble_mma(const Problem& p, const Array& output) {
    const PatchesPlan plan(p, output, Vectors);
    const auto kernel = p.features.dtype == CARAFEPP_FLOAT16 ? reassemble_mma_kernel<Vectors, Float16>
                                                             : reassemble_mma_kernel<Vectors, BFloat16>;
    launch(kernel, plan.items, kBlock, plan.shared_bytes, p, output, plan);
}

}  // namespace carafepp::cuda
