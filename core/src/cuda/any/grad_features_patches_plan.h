// SPDX-License-Identifier: Apache-2.0
// The plan of the gradient of features for any factor on tensor cores: which tile a block has, and where all is in its
// shared memory.
#pragma once

#include "cuda/any/bands.h"
#include "cuda/mma.h"

namespace carafepp::cuda {

constexpr int kPatchRows = 2, kPatchColumns = 4, kPatch = kPatchRows * kPatchColumns;  // sources
constexpr int kStep = 16;                                                              // outputs of a product
constexpr int kChannelsOfMma = 16;
constexpr int kMostThreads = 512;
constexpr int kApart = 4 * kPatch;      // elements between matrices: they begin in other banks
constexpr int kBeyond = INT32_MIN / 4;  // the place of sources beyond a tile
// Bytes of shared memory that a block asks for, if there are: of half the threads, and of more.
constexpr int64_t kBytesOfHalf = 99 * 1024;
constexpr int64_t kBytesOfMany[] = {200 * 1024, 160 * 1024, kBytesOfHalf};

constexpr int kBytesOfTile = 80;  // of a TileOfPatches

// As many products along channels as a warp of a group of so many channels has, and as many rows of patches.
inline int products_along_channels(int64_t channels_of_group) { return channels_of_group > 2 * kChannelsOfMma ? 4 : 1; }
CARAFEPP_HOST_DEVICE constexpr int patches_of_warp(int products) { return products == 4 ? 2 : 8; }

// A row or a column of outputs. The sums of `from` of both tell where an output's masks or logits are, and those of
// `to` where its rows of matrices are.
struct OutputLine {
    int64_t from;
    int to;
    int source;     // from the first one on that an output touching the tile is centred on
    int in_memory;  // of columns: the number of the one that stands here in the order of memory
};

struct GradPatchesPlan {
    Outputs rows, columns;
    int patch_rows = 1, patch_columns = 1;  // of a tile
    int parts = 1, row_parts = 1;           // warps along channels, and along rows of patches
    int channels;                           // of a slice
    int window;                             // columns of outputs that touch a patch, at most
    int most_rows, most_columns;            // of outputs that touch a tile
    int pitch = 1;                          // pixels from row to row of a band
    int pixel, channel;                     // elements from pixel to pixel, and from channel to channel, in a band
    int band = 1, bands = 1;                // rows of a band, bands of which masks are staged at once
    int steps;                              // of a band
    int slots;                              // rows of patches that such bands touch
    int matrix;                             // elements from patch to patch
    Divisor across;                         // columns of a tile
    Divisor group, mask_rows;               // columns and rows of outputs that neighbouring threads have masks of
    int64_t tap;                            // elements from tap to tap of masks or logits
    int columns_at_once;                    // that are stored
    bool phases_adjacent;                   // outputs of a source are neighbours in memory
    int copied_at_once;                     // columns of grad_output, if channels are not adjacent
    int aligned_window;                     // columns of whole vectors that have the outputs of a patch
    int sources;                            // rows of a tile
    int of_column, of_band;                 // elements of the matrices of a column of patches, and of a band
    int buffer;                             // elements of a band of grad_output
    int vectors, copiers;                   // of an output, and threads that copy one of each
    Divisor chunks_in_row;                  // `copied_at_once` columns each
    int chunks;                             // of a band and a channel
    Divisor copied_across, copied_lines;    // chunks and channels that the block copies at once
    Divisor stored_in_row;                  // `columns_at_once` each
    Divisor rows_of_tile;
    int plane;  // elements from channel to channel of results
    // Bytes of shared memory before
    int grads, rows_of_outputs, columns_of_outputs, row_terms, column_terms, tile, firsts, offsets, steps_of_pairs,
        places;
    int64_t shared_bytes, most_bytes;
    int64_t slices, row_tiles, column_tiles;  // of a group, of an image
    int64_t items;

    GradPatchesPlan(const Problem& p, const Array& grad_features, bool vectors)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          across(1),
          group(1),
          mask_rows(1),
          chunks_in_row(1),
          copied_across(1),
          copied_lines(1),
          stored_in_row(1),
          rows_of_tile(1) {
        const int64_t of_group = p.features.c / p.groups;
        tap = taps_apart(p, p.from_logits ? p.logits : p.masks);
        copied_at_once = kWide;
        while (copied_at_once > 1 && not_for_columns(p.grad_output, copied_at_once) != nullptr) copied_at_once /= 2;
        aligned_window = most_of_window(p);
        phases_adjacent = p.from_logits && p.logits.stride_c == 1;
        most_bytes = kMostAskedBytes;
        for (int64_t bytes : kBytesOfMany) {
            if (not_for_shared_memory(bytes) == nullptr) most_bytes = std::max(most_bytes, bytes);
        }
        choose_tile(p, vectors, of_group);
        columns_at_once = kWide;
        while (columns_at_once > 1 && (patch_columns * kPatchColumns % columns_at_once != 0 ||
                                       not_for_columns(grad_features, columns_at_once) != nullptr))
            columns_at_once /= 2;
        stored_in_row = Divisor(static_cast<int>(ceil_div(patch_columns * kPatchColumns, columns_at_once)));
    }

    // The first column of a band, in shared memory, that a column of patches multiplies.
    template <class Tile>
    __device__ __forceinline__ int first_of_patch(const Tile& tile, int column, int radius) const {
        const int first = columns.first(tile.left + column * kPatchColumns - radius);
        return (channel == 1 ? first : first / kWide * kWide) - tile.copied_left;
    }

    int warps() const { return patch_columns * parts * row_parts; }
    CARAFEPP_HOST_DEVICE int pairs() const { return (patch_rows + 1) / 2; }  // of rows of patches
    int threads() const { return warps() * 32; }

private:
    void choose_tile(const Problem& p, bool vectors, int64_t of_group) {
        constexpr int kMostRows = 16;  // of patches
        const int products = products_along_channels(of_group), of_warp = products * kChannelsOfMma;
        const int64_t all_rows = ceil_div(p.features.h, kPatchRows),
                      all_columns = ceil_div(p.features.w, kPatchColumns);
        GradPatchesPlan best = *this;
        best.shared_bytes = INT64_MAX;
        double least = INFINITY;
        int tried = 0;
        for (const int most_columns_of_tile : {8, 6, 4, 3, 2, 1}) {
            patch_columns = even_part(all_columns, most_columns_of_tile);
            if (patch_columns == tried) continue;
            tried = patch_columns;
            for (parts = 1; parts * patch_columns * 32 <= kMostThreads; parts *= 2) {
                if (parts > 1 && parts / 2 * of_warp >= of_group) break;
                channels = parts * of_warp;
                int rows_tried = 0;
                for (int most = kMostRows; most > 0; most /= 2) {
                    patch_rows = even_part(all_rows, most);
                    if (patch_rows == rows_tried) continue;
                    rows_tried = patch_rows;
                    row_parts = static_cast<int>(ceil_div(patch_rows, patches_of_warp(products)));
                    if (threads() > kMostThreads || !choose_bands(p, vectors)) continue;
                    slices = ceil_div(of_group, channels);
                    row_tiles = ceil_div(all_rows, patch_rows);
                    column_tiles = ceil_div(all_columns, patch_columns);
                    items = p.features.n * p.groups * row_tiles * column_tiles * slices;
                    const double cost = cost_of(p, vectors, of_group);
                    if (cost < least) least = cost, best = *this;
                }
            }
        }
        *this = best;
    }

    // The most columns from the vector of a patch's first output to that of its last one.
    int most_of_window(const Problem& p) const {
        constexpr int64_t kMostTried = 64;
        const int64_t up = columns.up, down = columns.down, k = p.kernel_size;
        const int most = columns.most(kPatchColumns + static_cast<int>(k) - 1);
        if (2 * down > kMostTried) return static_cast<int>(ceil_div(most + kWide - 1, kWide)) * kWide;
        // Patches whose windows begin alike follow each other at this distance.
        const int64_t period = 2 * down, behind = ceil_div(columns.offset + k, kWide * down) * kWide * down;
        int64_t columns_of_window = kWide;
        for (int64_t patch = 0; patch < period; patch++) {
            const int64_t source = patch * kPatchColumns - k / 2 - columns.offset + behind;
            const int64_t first = ceil_div(source * up, down),
                          end = ceil_div((source + kPatchColumns + k - 1) * up, down);
            columns_of_window = std::max(columns_of_window, ceil_div(end, kWide) * kWide - first / kWide * kWide);
        }
        return static_cast<int>(columns_of_window);
    }

    void measure(const Problem& p, bool adjacent) {
        const int k = static_cast<int>(p.kernel_size), in_row = patch_columns * kPatchColumns;
        sources = patch_rows * kPatchRows;
        across = Divisor(in_row);
        window = adjacent ? std::max(columns.most(kPatchColumns + k - 1), 1) : aligned_window;
        most_rows = std::max(rows.most(sources + k - 1), 1);
        most_columns = std::max(columns.most(in_row + k - 1), 1);
        group = Divisor(phases_adjacent ? std::min(static_cast<int>(rows.up), most_columns) : most_columns);
        mask_rows = Divisor(band * bands);
        // Columns from the first one of a tile to the first one of its last patch.
        const int before = columns.most(in_row - kPatchColumns);
        vectors = channels / kWide;
        copiers = threads() / vectors;
        if (adjacent) {
            // Rows are as far apart as those of a window, modulo 8, so eight outputs of a step begin in different
            // banks.
            pitch = before + window;
            if (window % 8 != 0) pitch += ((window - pitch) % 8 + 8) % 8;
            pixel = channels + kWide;  // an odd number of vectors, too
            channel = 1;
            buffer = band * pitch * pixel;
        } else {
            pitch = (before + kWide - 1) / kWide * kWide + window;
            pixel = 1;
            channel = (band * pitch / kWide | 1) *
                      kWide;  // an odd number of vectors: eight channels are in different banks
            buffer = channels * channel;
            chunks_in_row = Divisor(pitch / copied_at_once);
            chunks = band * pitch / copied_at_once;
            copied_across = Divisor(std::min(chunks, threads()));
            copied_lines = Divisor(threads() / copied_across.number);
        }
        rows_of_tile = Divisor(sources);
        plane = sources * in_row + kWide;
        steps = static_cast<int>(ceil_div(band * window, kStep));
        matrix = steps * kStep * kPatch + kApart;
        const int64_t reached = ceil_div((band - 1) * int64_t{rows.down}, rows.up) + k;  // rows of sources of a band
        slots = 2 * static_cast<int>(std::min(ceil_div(patch_rows, 2), (reached + 2) / (2 * kPatchRows) + 1));
        of_column = slots * matrix;
        of_band = patch_columns * of_column;
        int64_t bytes = int64_t{bands} * of_band * int64_t{sizeof(uint16_t)};
        const auto take = [&](int64_t count, size_t size) {
            const int64_t before = bytes;
            bytes = std::min<int64_t>(bytes + count * static_cast<int64_t>(size), INT32_MAX);
            return static_cast<int>(std::min<int64_t>(before, INT32_MAX));
        };
        grads = take(int64_t{2} * buffer, sizeof(uint16_t));
        bytes = std::max(bytes, (adjacent ? int64_t{sources} * in_row * pixel : int64_t{channels} * plane) *
                                    int64_t{sizeof(uint16_t)});
        tile = take(kBytesOfTile, 1);
        rows_of_outputs = take(most_rows, sizeof(OutputLine));
        columns_of_outputs = take(most_columns, sizeof(OutputLine));
        row_terms = take(sources + 2 * (k - 1), sizeof(int));
        column_terms = take(in_row + 2 * (k - 1), sizeof(int));
        firsts = take(patch_columns, sizeof(int));
        offsets = take(steps * kStep, sizeof(int));
        steps_of_pairs = take(bands * pairs(), sizeof(int));
        if (adjacent) places = take(band * pitch, sizeof(int));
        shared_bytes = bytes;
    }

    // Bands of few absent outputs, and as many of masks as fit.
    bool choose_bands(const Problem& p, bool adjacent) {
        constexpr int kMostBand = 8;
        const int64_t most = 2 * threads() <= kMostThreads ? std::min(most_bytes, kBytesOfHalf) : most_bytes;
        const auto fits = [&](int rows_of_band, int bands_of_masks) {
            band = rows_of_band, bands = bands_of_masks;
            measure(p, adjacent);
            return shared_bytes <= most;
        };
        if (!fits(1, 1)) return false;
        const int all = most_rows;
        int best = 1;
        double least = INFINITY;
        for (int tried = 1; tried <= std::min(all, kMostBand) && fits(tried, 1); tried++) {
            constexpr double kCostOfBand = 3;  // steps
            const double cost = static_cast<double>(ceil_div(all, tried)) * (steps + kCostOfBand);
            if (cost < least) least = cost, best = tried;
        }
        fits(best, 1);
        const int64_t of_another = of_band * int64_t{sizeof(uint16_t)} + pairs() * int64_t{sizeof(int)};
        int most_bands = static_cast<int>(std::min(ceil_div(all, best), 1 + (most - shared_bytes) / of_another));
        while (!fits(best, most_bands)) most_bands--;
        return fits(best, even_part(ceil_div(all, best), most_bands));
    }

    // Cycles of a multiprocessor, about.
    double cost_of(const Problem& p, bool vectors, int64_t of_group) const {
        constexpr double kIssued = 2.4, kBytes = 22, kOfItem = 1000;
        const int products = products_along_channels(of_group), k = static_cast<int>(p.kernel_size);
        const double outputs = double(most_rows) * most_columns, taps = outputs * static_cast<double>(p.taps());
        const double sources = double(patch_rows) * patch_columns * kPatch;
        const double bands_of_item = double(ceil_div(most_rows, band));
        const double all_steps = bands_of_item * steps * warps();
        // Pairs of rows of patches that a band touches, of all.
        const double touched = std::min(1.0, double(2 * kPatchRows + k - 1) / (patch_rows * kPatchRows + k - 1));
        const double at_once = vectors ? kWide : copied_at_once;
        const double instructions = 0.8 * taps + outputs * channels * (vectors ? 0.3 : 0.2) / at_once +
                                    touched * all_steps * double(ceil_div(pairs(), row_parts)) * (9 + 3 * products) +
                                    bands_of_item * warps() * 100 + sources * channels * 0.13 + warps() * 600;
        const double wavefronts = 0.3 * taps + outputs * channels * 0.24 / at_once +
                                  touched * all_steps * 4 * (products + 1) + sources * channels * 0.06;
        // With adjacent columns rows begin and end within sectors.
        constexpr int kSector = 16;
        const int in_row = patch_columns * kPatchColumns;
        const double read = vectors ? most_columns : most_columns + kSector - 1, stored = vectors ? in_row
                                                                                          : in_row % kSector == 0
                                                                                              ? in_row
                                                                                              : in_row + kSector / 2;
        const double bytes = 2 * (most_rows * read * channels + (vectors ? 1 : 2) * taps +
                                  stored * patch_rows * kPatchRows * channels);
        // Few warps at once issue less.
        constexpr int kEnoughWarps = 16;
        const int64_t turns = std::max<int64_t>(ceil_div(items, kMultiprocessors), 1);
        const int64_t at_once_of_items = std::min<int64_t>(std::max(kEnoughWarps / warps(), 1), turns);
        const double issued = kIssued * std::min(1.0, double(at_once_of_items) * warps() / kEnoughWarps);
        const double of_item = std::max(instructions / issued, wavefronts) + kOfItem;
        return std::max(of_item * static_cast<double>(turns),
                        bytes / kBytes * static_cast<double>(items) / kMultiprocessors);
    }
};

// A tile in a slice of channels, and the outputs that touch it.
struct TileOfPatches {
    int64_t n, group, c;  // the first channel
    int channels;
    int top, left;
    int out_top, out_left, out_rows, out_columns;
    int64_t grads;    // of the first output in grad_output
    int copied_left;  // the first column of bands: of a whole vector unless channels are adjacent

    __device__ __forceinline__ TileOfPatches(const Problem& p, const GradPatchesPlan& plan, uint32_t item) {
        const auto take = [&](int64_t count) {
            const auto divisor = static_cast<uint32_t>(count);
            const uint32_t number = item % divisor;
            item /= divisor;
            return static_cast<int>(number);
        };
        const int64_t channels_in_group = p.features.c / p.groups, first = take(plan.slices) * int64_t{plan.channels};
        left = take(plan.column_tiles) * plan.across.number;
        top = take(plan.row_tiles) * plan.sources;
        group = take(p.groups);
        n = item;
        c = group * channels_in_group + first;
        channels = static_cast<int>(min(channels_in_group - first, int64_t{plan.channels}));
        const int radius = static_cast<int>(p.kernel_size) / 2;
        out_top = plan.rows.first(top - radius);
        out_left = plan.columns.first(left - radius);
        out_rows = plan.rows.first(top + plan.sources + radius) - out_top;
        out_columns = plan.columns.first(left + plan.across.number + radius) - out_left;
        if (out_columns == 0) out_rows = 0;
        copied_left = plan.channel == 1 ? out_left : out_left / kWide * kWide;
        grads = n * p.grad_output.stride_n + c * p.grad_output.stride_c + out_top * p.grad_output.stride_h +
                copied_left * p.grad_output.stride_w;
    }
};
static_assert(sizeof(TileOfPatches) <= kBytesOfTile);

// The shared memory of a block.
template <class T>
struct RoomOfPatches {
    const GradPatchesPlan& plan;

    // [band][patch column][slot][output of the band][source of the patch]
    __device__ __forceinline__ T* matrices() const { return shared_memory<T>(); }
    // Instead of these: [source][channel], or the reverse
    __device__ __forceinline__ T* results() const { return shared_memory<T>(); }
    // A buffer has [row][column][channel], or [channel][row][column].
    __device__ __forceinline__ T* grads() const { return at<T>(plan.grads); }
    __device__ __forceinline__ OutputLine* rows() const { return at<OutputLine>(plan.rows_of_outputs); }
    __device__ __forceinline__ OutputLine* columns() const { return at<OutputLine>(plan.columns_of_outputs); }
    // A source's masks begin at its term and an output's place.
    __device__ __forceinline__ int* row_terms() const { return at<int>(plan.row_terms); }
    __device__ __forceinline__ int* column_terms() const { return at<int>(plan.column_terms); }
    // The first column of outputs of a column of patches, in a band.
    __device__ __forceinline__ int* firsts() const { return at<int>(plan.firsts); }
    // Places of the outputs of a column of patches, in a band.
    __device__ __forceinline__ int* offsets() const { return at<int>(plan.offsets); }
    // [band][pair of rows of patches] the steps that touch it: the first one and, from bit 16 on, the end
    __device__ __forceinline__ uint32_t* steps_of_pairs() const { return at<uint32_t>(plan.steps_of_pairs); }
    __device__ __forceinline__ TileOfPatches& tile() const { return *at<TileOfPatches>(plan.tile); }
    // Places of the outputs of a band in grad_output, if channels are adjacent.
    __device__ __forceinline__ int* places() const { return at<int>(plan.places); }

private:
    template <class A>
    __device__ __forceinline__ A* at(int bytes) const {
        return reinterpret_cast<A*>(shared_memory<unsigned char>() + bytes);
    }
};

}  // namespace carafepp::cuda
