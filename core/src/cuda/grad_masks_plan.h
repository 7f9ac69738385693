// SPDX-License-Identifier: Apache-2.0
// The plan of the gradient of masks or logits for any factor: which tile of outputs a block has.
#pragma once

#include "cuda/grad_masks_finish.h"

namespace carafepp::cuda {

constexpr int kMostVectors = 4;        // of a slice
constexpr int kMostColumns = 64;       // of a tile
constexpr int kThreadsOfTile = 256;    // at most
constexpr int kMultiprocessors = 132;  // of the device that tiles are chosen for

// Rows of outputs are in slots, of which a thread has four, a quad. A source with several rows has two slots, or whole
// quads; some stay empty if it has fewer rows.
struct GradMasksTilesPlan {
    Outputs rows, columns;  // of masks, or of the sub-pixels of logits
    Divisor kernel_size;
    OutputsOfTile tile;
    int slots;            // of a source, or 0 if each row has its own source
    int sources;          // neighbouring ones of a quad, or 0 for any four
    int own_taps;         // of a thread
    Divisor segments;     // threads with a column of taps
    int channels;         // of a group
    int itemsize;         // of features, in bytes
    int slices, vectors;  // vectors of a slice
    int quads;            // of a tile: rows
    int halo_rows;
    Divisor halo_columns;
    int plane;  // pixels from vector to vector of a slice
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
          own_taps(0),
          segments(1),
          channels(static_cast<int>(p.features.c / p.groups)),
          itemsize(static_cast<int>(carafepp::itemsize(p.features.dtype))),
          halo_columns(1) {
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
                    if (quads == 1 && tile.columns.number == tried) break;
                    if (threads > kThreadsOfTile || shared_bytes > kMostSharedBytes) break;
                    const double cost = cycles(vectors_in_memory);
                    if (cost >= least) continue;
                    least = cost;
                    best_columns = most_columns;
                    best_quads = quads;
                    best_vectors = vectors;
                }
                tried = tile.columns.number;
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
        tile.columns = Divisor(static_cast<int>(std::max<int64_t>(ceil_div(ceil_div(columns.count, tiles), whole), 1)) *
                               whole);
        tile.rows = quads * kQuad;
        const int outputs = tile.count();
        const int row_sources = slots == 0                     ? sources_of(rows, tile.rows)
                                : slots == 2                   ? 2 * quads
                                : quads % quads_of_source == 0 ? quads / quads_of_source
                                                               : (quads + quads_of_source - 2) / quads_of_source + 1;
        halo_rows = row_sources + std::max(segments.number * own_taps, k) - 1;
        halo_columns = Divisor(sources_of(columns, tile.columns.number) + k - 1);
        const int pixels = halo_rows * halo_columns.number + outputs;
        // Threads that copy neighbouring vectors of a pixel do so to different banks.
        plane = static_cast<int>(ceil_div(pixels, 8)) * 8 + 8 / vectors % 8;
        const bool whole_rows = up > 1 && slots > 0 && tile.rows % slots == 0;
        tile.rows_of_cell = Divisor(whole_rows ? slots : 1);
        tile.columns_of_cell = Divisor(whole);
        tile.cells_in_row = Divisor(tile.columns.number / whole);
        tile.pitch = tile.columns.number + (whole_rows ? 8 : 0);  // rows of a cell begin in different banks
        tile.room = tile.rows * tile.pitch | 1;                   // and so do taps
        threads = static_cast<int>(ceil_div(tile.columns.number * k * segments.number * quads, 32)) * 32;
        const int64_t staged = int64_t{2} * vectors * plane * int64_t{sizeof(float4)},
                      finished = k * (k * int64_t{sizeof(float)} + segments.number * int64_t{sizeof(float2)}) *
                                 tile.room;
        places_bytes = std::max(ceil_div(pixels, 2) * 2 * int64_t{sizeof(int64_t)},
                                outputs * int64_t{sizeof(OutputPlace)});
        shared_bytes = tile.rows * int64_t{sizeof(Slot)} + places_bytes + std::max(staged, finished);
        const int64_t all_quads = slots == 0 ? ceil_div(rows.count, kQuad)
                                             : ceil_div((((rows.count - 1) * int64_t{rows.down}) / rows.up + 1) * slots,
                                                        kQuad);
        row_tiles = rows.count == 0 ? 0 : static_cast<uint32_t>(ceil_div(all_quads, quads));
        column_tiles = static_cast<uint32_t>(ceil_div(columns.count, tile.columns.number));
        groups = static_cast<uint32_t>(p.groups);
        items = p.features.n * p.groups * row_tiles * column_tiles;
    }

    // Roughly what the multiprocessor with the most tiles takes, for instructions and for accesses.
    double cycles(bool vectors_in_memory) const {
        const double all = static_cast<double>(ceil_div(channels, vectors * kVector)) * vectors, warps = threads / 32;
        const double outputs = quads * kQuad * tile.columns.number, taps = kernel_size.number * kernel_size.number;
        const double pixels = (outputs + halo_rows * halo_columns.number) / 32;
        const int loads = sources > 0 ? own_taps + sources - 1 + kQuad : kQuad * (own_taps + 1);
        const double instructions = all * (warps * (kQuad * kVector * own_taps + 2 * loads + 20) +
                                           pixels * (vectors_in_memory ? 10 : 30)) +
                                    outputs * taps + 1000 * warps;
        const double accesses = all * (warps * 4 * loads + pixels * (vectors_in_memory ? 32 / vectors + 4 : 24)) +
                                outputs * taps / 32 *
                                    (6 + 2 * (vectors_in_memory ? 4 : 32 / std::min(tile.cells_in_row.number, 32)));
        const double issue = instructions / 2.4, longer = std::max(issue, accesses),
                     shorter = std::min(issue, accesses);
        return static_cast<double>(ceil_div(items, kMultiprocessors)) * (longer + shorter / 2);  // partly at once
    }
};

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

}  // namespace carafepp::cuda
