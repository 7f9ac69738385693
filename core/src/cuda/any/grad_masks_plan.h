// SPDX-License-Identifier: Apache-2.0
// The plan of the gradient of masks or logits for any factor: which tile of outputs a block has.
#pragma once

#include <cstdlib>
#include <iterator>
#include <numeric>

#include "cuda/any/grad_masks_finish.h"
#include "cuda/columns.h"

namespace carafepp::cuda {

constexpr int kMostVectors = 8;                           // of a slice
constexpr int kPixels = 4;                                // that a thread loads together
constexpr int kThreadsOfTile = 384;                       // at most: they have the registers of a multiprocessor
constexpr int kSharedBytesOfMultiprocessor = 224 * 1024;  // of the device that tiles are chosen for

// Rows of quads are centred on sources that `o * down / up` tells, for row o. A pattern is this quotient as a number,
// or kAnySources. If features are shared by many rows, a thread has two quads of outputs, and half of the channels.
constexpr int kAnySources = 0;
CARAFEPP_HOST_DEVICE constexpr int pattern_of(int up, int down) { return up * 8 + down; }
constexpr int kPatterns[] = {pattern_of(4, 1), pattern_of(3, 1), pattern_of(3, 2), pattern_of(2, 1),
                             pattern_of(1, 1), pattern_of(1, 2), pattern_of(1, 3)};

// A pattern for threads with some taps: registers have kMostSums.
CARAFEPP_HOST_DEVICE constexpr bool is_paired(int pattern, int taps) {
    const int up = pattern / 8;
    return up > 1 && (up % 4 != 0 || taps < 7);
}
CARAFEPP_HOST_DEVICE constexpr int rows_of_quad(int pattern, int taps) {
    const int up = pattern / 8;
    return up > 1 && (up % 3 == 0 || (up == 2 && taps == 7)) ? 3 : kQuad;
}
constexpr int kMostSums = 6 * 7;

// A pixel of features or grad_output, or a pair of neighbours in a row: where its first channel is, its place in a
// slice, and elements from channel to channel.
struct alignas(16) StagedPixel {
    int64_t from;
    int to, stride_c;
};

// Rows of outputs are in quads, of which a thread has one. Where a source has many rows it has quads of its own, and
// some of their rows may be absent.
struct GradMasksTilesPlan {
    Outputs rows, columns;  // of masks, or of the sub-pixels of logits
    Divisor kernel_size;
    OutputsOfTile tile;
    int pattern;
    bool paired;          // two threads share two quads: each multiplies both, with half of the channels
    Divisor own_rows;     // of a quad
    int quads_of_source;  // or 0 if quads follow each other
    int own_taps;         // of a thread
    Divisor segments;     // threads with a column of taps
    int channels;         // of a group
    int itemsize;         // of features, in bytes
    int slices, vectors;  // vectors of a slice
    int all_vectors;      // of a group
    int quads;            // of a tile: rows
    int halo_rows;
    int halo_columns;
    Divisor runs_of_halo, runs_of_tile;  // in a row
    int run;                             // columns of a staged pixel: 1, or 2 for pairs
    int pixels_of_halo, pixels;          // in all
    // A slice has columns of features, `halo_pitch` apart, then of grad_output. Odd distances: neighbours are in
    // different banks.
    int halo_pitch, grads_at, pitch, plane;  // plane: from vector to vector
    int threads;
    bool normalized;  // gradients go through the normaliser
    uint32_t row_tiles, column_tiles, groups;
    int64_t items;
    int64_t places_bytes, shared_bytes;

    GradMasksTilesPlan(const Problem& p, bool vectors_in_memory)
        : rows(p.factor, p.offset_h, p.from_logits ? p.logits.h * p.factor.up : p.out_h),
          columns(p.factor, p.offset_w, p.from_logits ? p.logits.w * p.factor.up : p.out_w),
          kernel_size(static_cast<int>(p.kernel_size)),
          tile{kQuad,      Divisor(1), columns.count, Divisor(p.from_logits ? static_cast<int>(p.factor.up) : 1),
               Divisor(1), Divisor(1), Divisor(1),    0,
               0},
          own_rows(kQuad),
          own_taps(0),
          segments(1),
          channels(static_cast<int>(p.features.c / p.groups)),
          itemsize(static_cast<int>(carafepp::itemsize(p.features.dtype))),
          runs_of_halo(1),
          runs_of_tile(1),
          run(1) {
        const int k = kernel_size.number;
        const bool pairs = !vectors_in_memory && p.features.dtype == CARAFEPP_FLOAT32 && channels % kVector == 0 &&
                           not_for_columns(p.features) == nullptr && not_for_columns(p.grad_output) == nullptr;
        if (pairs) run = 2;
        for (int taps : {7, 5, 3}) {
            const int segments_of_taps = static_cast<int>(ceil_div(k, taps));
            if (own_taps != 0 && segments_of_taps * taps >= segments.number * own_taps) continue;
            if (k * segments_of_taps > kThreadsOfTile) continue;
            own_taps = taps;
            segments = Divisor(segments_of_taps);
        }
        choose_pattern();
        normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
        all_vectors = static_cast<int>(ceil_div(channels, kVector));
        double least = INFINITY;
        const int fewest = paired ? 2 : 1;
        vectors = 1;
        quads = fewest;
        measure(p, 1);
        GradMasksTilesPlan best = *this;  // if none fits
        for (vectors = kMostVectors; vectors > 0; vectors /= 2) {
            if (vectors > 1 && vectors >= 2 * all_vectors) continue;
            int tried = 0;
            for (int most_columns : {64, 48, 32, 24, 20, 18, 16, 12, 10, 8, 6, 4, 2, 1}) {
                for (quads = fewest; quads * k * segments.number <= kThreadsOfTile; quads += fewest) {
                    measure(p, most_columns);
                    if (quads == fewest && tile.columns.number == tried) break;
                    if (threads > kThreadsOfTile || shared_bytes > kMostSharedBytes) break;
                    const double cost = cycles(vectors_in_memory);
                    if (cost >= least) continue;
                    least = cost;
                    best = *this;
                }
                tried = tile.columns.number;
                if (most_columns <= 4 && least < INFINITY) break;
            }
        }
        *this = best;
        slices = static_cast<int>(ceil_div(all_vectors, vectors));
    }

private:
    // Quads of a source cost absent rows, and any sources many loads.
    void choose_pattern() {
        constexpr double kMostAbsent = 1.4;
        const int common = static_cast<int>(std::gcd(rows.up, rows.down));
        const int up = static_cast<int>(rows.up) / common, down = static_cast<int>(rows.down) / common;
        pattern = kAnySources;
        quads_of_source = 0;
        if (up <= 4 && down <= 4) {
            const int wanted = pattern_of(up, down);
            if (std::find(std::begin(kPatterns), std::end(kPatterns), wanted) != std::end(kPatterns)) pattern = wanted;
        } else if (up > down) {
            const int most = static_cast<int>(ceil_div(up, down));
            const auto quads_with = [&](int of_quad) {  // one, or whole pairs
                const int quads_of_most = static_cast<int>(ceil_div(most, of_quad));
                return quads_of_most == 1 || !is_paired(pattern_of(of_quad, 1), own_taps) ? quads_of_most
                                                                                          : (quads_of_most + 1) / 2 * 2;
            };
            const int of_quad = 3 * quads_with(3) < 4 * quads_with(4) ? 3 : 4, wanted = quads_with(of_quad);
            if (of_quad * wanted * down <= kMostAbsent * up) {
                quads_of_source = wanted;
                pattern = pattern_of(of_quad, 1);
                if (wanted > 1 && is_paired(pattern, own_taps)) pattern = pattern_of(2 * of_quad, 1);
            }
        }
        paired = is_paired(pattern, own_taps);
        if (paired && 2 * kernel_size.number * segments.number > kThreadsOfTile) {  // two quads are too many
            pattern = kAnySources;
            quads_of_source = 0;
            paired = false;
        }
        own_rows = Divisor(rows_of_quad(pattern, own_taps));
    }

    // The most features from the first to the last source of some outputs. `aligned`: the first output is the first one
    // of its source, after those of whole sources.
    static int sources_of(const Outputs& axis, int outputs, bool aligned) {
        const int64_t apart = (outputs - 1) * int64_t{axis.down};
        return static_cast<int>(aligned ? apart / axis.up : ceil_div(apart, axis.up)) + 1;
    }

    // A tile of `quads` and of `most_columns` columns or somewhat less, such that the last one is not much smaller.
    void measure(const Problem& p, int most_columns) {
        const int k = kernel_size.number, of_quad = own_rows.number, up = tile.cell.number;
        const int whole = up * run <= most_columns ? static_cast<int>(std::lcm(up, run)) : run;  // cells and runs
        if (whole > most_columns) most_columns = whole;
        const int64_t tiles = std::max<int64_t>(ceil_div(columns.count, most_columns / whole * whole), 1);
        tile.columns = Divisor(static_cast<int>(std::max<int64_t>(ceil_div(ceil_div(columns.count, tiles), whole), 1)) *
                               whole);
        const int width = tile.columns.number;
        const int row_sources = quads_of_source == 0 ? sources_of(rows, quads * of_quad, aligned(rows, quads * of_quad))
                                : quads % quads_of_source == 0 ? quads / quads_of_source
                                                               : (quads + quads_of_source - 2) / quads_of_source + 1;
        halo_rows = row_sources + std::max(segments.number * own_taps, k) - 1;
        halo_columns = sources_of(columns, width, aligned(columns, width)) + k - 1;
        if (run == 2) halo_columns = (halo_columns + 2) / 2 * 2;     // it may begin with an odd column
        if (int64_t{halo_rows} * halo_columns > kMostSharedBytes) {  // bytes: products of these fit in an int
            shared_bytes = INT64_MAX;
            return;
        }
        // Pairs are in pairs of rows, of which one may be absent.
        const auto whole_rows_of = [&](int count) { return static_cast<int>(ceil_div(count, run)) * run; };
        runs_of_halo = Divisor(halo_columns / run);
        runs_of_tile = Divisor(width / run);
        pixels_of_halo = whole_rows_of(halo_rows) * runs_of_halo.number;
        pixels = pixels_of_halo + whole_rows_of(quads * of_quad) * runs_of_tile.number;
        halo_pitch = whole_rows_of(halo_rows) | 1;
        pitch = whole_rows_of(quads * of_quad) | 1;
        if (run == 2) halo_pitch = pitch = std::max(halo_pitch, pitch);
        grads_at = halo_pitch * halo_columns;
        tile.rows = quads * kQuad;
        const int rows_of_cell = slots_of_cell(up);
        const bool whole_rows = up > 1 && rows_of_cell > 0;
        tile.rows_of_cell = Divisor(whole_rows ? rows_of_cell : 1);
        tile.columns_of_cell = Divisor(width % up == 0 ? up : 1);
        tile.cells_in_row = Divisor(width / tile.columns_of_cell.number);
        tile.pitch = width + (whole_rows ? 8 : 0);  // rows of a cell begin in different banks
        threads = static_cast<int>(ceil_div(width * k * segments.number * quads, 32)) * 32;
        places_bytes = std::max(pixels * int64_t{sizeof(StagedPixel)}, tile.count() * int64_t{sizeof(OutputPlace)});
        // Threads that copy neighbouring vectors of a pixel do so to different banks.
        plane = static_cast<int>(ceil_div(grads_at + pitch * width, 8)) * 8 + 8 / vectors % 8;
        const int64_t staged = int64_t{2} * vectors * plane * int64_t{sizeof(float4)};
        const int64_t told = paired ? kQuad * own_taps * threads * int64_t{sizeof(float)} : 0;
        // So do taps of a row, and neighbouring outputs, of the threads of a warp: if that much memory is there.
        const int of_warp = static_cast<int>(ceil_div(32, k)) | 1, least_room = tile.rows * tile.pitch;
        for (int room : {least_room + ((of_warp - least_room) % 32 + 32) % 32, least_room | 1}) {
            tile.room = room;
            const int64_t finished = k * (k * int64_t{sizeof(float)} + segments.number * int64_t{sizeof(float2)}) *
                                     room;
            shared_bytes = tile.rows * int64_t{sizeof(Slot)} + places_bytes + std::max({staged, finished, told});
            if (shared_bytes <= kMostSharedBytes) break;
        }
        const int64_t all_sources = (rows.count - 1) * int64_t{rows.down} / rows.up + 1;
        const int64_t all_quads = quads_of_source == 0 ? ceil_div(rows.count, of_quad) : all_sources * quads_of_source;
        row_tiles = rows.count == 0 ? 0 : static_cast<uint32_t>(ceil_div(all_quads, quads));
        column_tiles = static_cast<uint32_t>(ceil_div(columns.count, width));
        groups = static_cast<uint32_t>(p.groups);
        items = p.features.n * p.groups * row_tiles * column_tiles;
    }

    // Blocks of so many outputs begin with the first output of a source.
    static bool aligned(const Outputs& axis, int outputs) {
        return outputs * int64_t{axis.down} % axis.up == 0 || (axis.down == 1 && axis.up % outputs == 0);
    }

    // The slots of a cell's rows, if a tile has whole ones, or 0.
    int slots_of_cell(int up) const {
        if (quads_of_source > 0)
            return up == static_cast<int>(rows.up) && rows.down == 1 && quads % quads_of_source == 0
                       ? quads_of_source * kQuad
                       : 0;
        if (quads * own_rows.number % up != 0) return 0;
        if (own_rows.number == kQuad) return up;
        return up % own_rows.number == 0 ? up / own_rows.number * kQuad : 0;
    }

    // Roughly what the multiprocessor with the most tiles takes, for instructions and for accesses.
    double cycles(bool vectors_in_memory) const {
        const int shares = paired ? 2 : 1;
        const double warps = threads / 32, own_slices = ceil_div(all_vectors, vectors),
                     all = own_slices * ceil_div(vectors, shares) * shares;
        const double of_quad = own_rows.number, taps = kernel_size.number * kernel_size.number;
        const double finished = quads * of_quad * tile.columns.number * taps / 32;
        const double features = pattern == kAnySources
                                    ? of_quad * own_taps
                                    : own_taps + (shares * own_rows.number - 1) * (pattern % 8) / (pattern / 8);
        const double loads = features / shares + of_quad, copies = all * pixels * run / 32;
        const double rounds = ceil_div(pixels * run * vectors, kPixels * threads);
        const double instructions = all * warps * (of_quad * kVector * own_taps + loads + 5) +
                                    own_slices * warps *
                                        (vectors_in_memory ? 50 + rounds * 57 : 80 + rounds * (run == 2 ? 70 : 120)) +
                                    1000 * warps + 3 * finished;
        // Lines of 128 bytes: a pixel's vectors, or a row in each channel. Rows begin anywhere, also in a warp.
        const auto lines_of_rows = [&](double count, double width) { return count * (1.5 + width / 16); };
        const double lines = vectors_in_memory ? copies * 32 / vectors
                                               : all * kVector *
                                                     (lines_of_rows(halo_rows, halo_columns) +
                                                      lines_of_rows(quads * of_quad, tile.columns.number));
        const double lines_of_masks = tile.columns_of_cell.number == 1 || vectors_in_memory
                                          ? 2
                                          : 1 + 32.0 / std::min(tile.cells_in_row.number, 32);
        const double accesses = all * warps * 4 * loads + copies * 4 + lines + finished * (8 + 2 * lines_of_masks);
        // A warp waits two thirds of its time, and all fill a multiprocessor to 60%.
        const double blocks = static_cast<double>(ceil_div(items, kMultiprocessors)),
                     resident = std::min({blocks, std::floor(kSharedBytesOfMultiprocessor / (shared_bytes + 1024.0)),
                                          static_cast<double>(kThreadsOfTile / threads)});
        const double issue = instructions / std::min(2.4, resident * warps / 3), longer = std::max(issue, accesses),
                     shorter = std::min(issue, accesses);
        return blocks * (longer + shorter / 2);  // partly at once
    }
};

// Why no tile can be planned for a problem.
template <bool Vectors>
const char* not_for_grad_masks_tiles(const Problem& p) {
    if (const char* reason = not_for_tiles(p)) return reason;
    if (p.factor.up > kMostFactor / 2) return "the factor is too large";
    if (p.features.c > INT32_MAX / 8) return "channels are too many";
    for (int64_t stride : {p.features.stride_c, p.grad_output.stride_c}) {
        if (std::abs(stride) > INT32_MAX / 4) return "channels are too far apart";
    }
    const GradMasksTilesPlan plan(p, Vectors);
    const bool fits = plan.shared_bytes <= kMostSharedBytes && plan.threads <= kThreadsOfTile;
    if (!fits) return "kernel_size is too large";
    return plan.items > INT32_MAX ? "tiles are too many" : nullptr;
}

}  // namespace carafepp::cuda
