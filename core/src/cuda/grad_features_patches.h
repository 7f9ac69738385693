// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor with 16 bits, on tensor cores, in gather form. A patch is 2 x 4 sources, and
// its window the outputs that touch it. A block has a tile of patches in a slice of channels, and a warp some channels
// of a column of patches, whose sums stay in registers. The block goes through the outputs around the tile in bands of
// rows. It stages the masks of some bands as matrices: a row has an output's masks of the eight sources of a patch, 0
// where it has no tap. It stages grad_output a band at a time, channels adjacent, the next one ahead. A step of a
// product has 16 outputs of a band. It serves all patches of the column that they touch. A zero of a matrix makes NaN
// of an infinite gradient. Sums that are not finite are computed again, tap by tap.
#pragma once

#include "cuda/grad_tiles.h"
#include "cuda/mma.h"

namespace carafepp::cuda {

constexpr int kPatchRows = 2, kPatchColumns = 4, kPatch = kPatchRows * kPatchColumns;  // sources
constexpr int kStep = 16;                                                              // outputs of a product
constexpr int kChannelsOfMma = 16;
constexpr int kProducts = 16;  // whose sums a warp has: of patches and of channels
constexpr int kMostThreads = 256;
constexpr int kMostInRegisters = 7;  // kernel_size: taps that some threads have
template <int K>
constexpr int kLanesOfOutput = K == 3   ? 1
                               : K == 5 ? 2
                                        : 4;
constexpr int kApart = 4 * kPatch;           // elements between matrices: they begin in other banks
constexpr int kBeyond = INT32_MIN / 4;      // the place of sources beyond a tile
constexpr int64_t kEnoughBytes = 99 * 1024;  // of shared memory, if there are
constexpr int kMultiprocessors = 132;        // of a large device

constexpr int kBytesOfTile = 80;  // of a TileOfPatches

// As many products along channels as a warp of a group of so many channels has.
inline int products_along_channels(int64_t channels_of_group) { return channels_of_group > 2 * kChannelsOfMma ? 4 : 1; }

// A row or a column of outputs. The sums of `from` of both tell where an output's masks or logits are, and those of
// `to` where its rows of matrices are.
struct OutputLine {
    int64_t from;
    int to;
    int source;        // from the first one on that an output touching the tile is centred on
    int in_memory;     // of columns: the number of the one that stands here in the order of memory
    uint32_t touched;  // of rows: a bit for each row of patches
};

struct GradPatchesPlan {
    Outputs rows, columns;
    int patch_rows = 1, patch_columns = 1;  // of a tile
    int parts = 1;                          // warps along channels
    int channels;                           // of a slice
    int window;                             // columns of outputs that touch a patch, at most
    int most_rows, most_columns;            // of outputs that touch a tile
    int pitch;                              // pixels from row to row of a band
    int pixel;                              // elements from pixel to pixel
    int band = 1, bands = 1;                // rows of a band, bands of which masks are staged at once
    int steps;                              // of a band
    int slots;                              // rows of patches that such bands touch
    int matrix;                             // elements from patch to patch
    Divisor across;                         // columns of a tile
    Divisor group, mask_rows;               // columns and rows of outputs that neighbouring threads have masks of
    int64_t tap;                            // elements from tap to tap of masks or logits
    int columns_at_once;                    // that are stored
    bool phases_adjacent;                   // outputs of a source are neighbours in memory
    bool pairs;                             // of columns are loaded
    int sources;                            // rows of a tile
    int of_column, of_band;                 // elements of the matrices of a column of patches, and of a band
    int buffer;                             // elements of a band of grad_output
    int vectors, copiers;                   // of an output, and threads that copy one of each
    int plane;                              // elements from channel to channel of results
    // Bytes of shared memory before
    int grads, rows_of_outputs, columns_of_outputs, row_terms, column_terms, tile, firsts, offsets, touched, places;
    int64_t shared_bytes, most_bytes;
    int64_t slices, row_tiles, column_tiles;  // of a group, of an image
    int64_t items;

    GradPatchesPlan(const Problem& p, const Array& grad_features, bool vectors)
        : rows(p.factor, p.offset_h, p.out_h),
          columns(p.factor, p.offset_w, p.out_w),
          across(1),
          group(1),
          mask_rows(1) {
        const int64_t of_group = p.features.c / p.groups;
        tap = p.from_logits ? p.logits.stride_c * p.factor.up * p.factor.up : p.masks.stride_c;
        pairs = !vectors && not_for_columns(p.grad_output) == nullptr;
        phases_adjacent = p.from_logits && p.logits.stride_c == 1;
        most_bytes = not_for_shared_memory(kEnoughBytes) == nullptr ? kEnoughBytes : kMostAskedBytes;
        choose_tile(p, vectors, of_group);
        columns_at_once = kWide;
        while (columns_at_once > 1 && (patch_columns * kPatchColumns % columns_at_once != 0 ||
                                       not_for_columns(grad_features, columns_at_once) != nullptr))
            columns_at_once /= 2;
    }

    int warps() const { return patch_columns * parts; }
    int threads() const { return warps() * 32; }

private:
    // As many of `count` in each part as if `most` were in it: the last one is not much smaller.
    static int even(int64_t count, int64_t most) {
        return static_cast<int>(std::max<int64_t>(ceil_div(count, std::max<int64_t>(ceil_div(count, most), 1)), 1));
    }

    void choose_tile(const Problem& p, bool vectors, int64_t of_group) {
        const int products = products_along_channels(of_group), of_warp = products * kChannelsOfMma;
        const int64_t all_rows = ceil_div(p.features.h, kPatchRows),
                      all_columns = ceil_div(p.features.w, kPatchColumns);
        GradPatchesPlan best = *this;
        best.shared_bytes = INT64_MAX;
        double least = INFINITY;
        int tried = 0;
        for (const int most_columns_of_tile : {8, 6, 4, 3, 2, 1}) {
            patch_columns = even(all_columns, most_columns_of_tile);
            if (patch_columns == tried) continue;
            tried = patch_columns;
            for (parts = 1; parts * patch_columns * 32 <= kMostThreads; parts *= 2) {
                if (parts > 1 && parts / 2 * of_warp >= of_group) break;
                channels = parts * of_warp;
                int rows_tried = 0;
                for (int most = kProducts / products; most > 0; most /= 2) {
                    patch_rows = even(all_rows, most);
                    if (patch_rows == rows_tried) continue;
                    rows_tried = patch_rows;
                    if (!choose_bands(p)) continue;
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

    void measure(const Problem& p) {
        const int k = static_cast<int>(p.kernel_size), in_row = patch_columns * kPatchColumns;
        sources = patch_rows * kPatchRows;
        across = Divisor(in_row);
        window = std::max(columns.most(kPatchColumns + k - 1), 1);
        most_rows = std::max(rows.most(sources + k - 1), 1);
        most_columns = std::max(columns.most(in_row + k - 1), 1);
        group = Divisor(phases_adjacent ? static_cast<int>(rows.up) : most_columns);
        mask_rows = Divisor(band * bands);
        // Rows are as far apart as those of a window, modulo 8, so eight outputs of a step begin in different banks.
        pitch = columns.most(in_row - kPatchColumns) + window + (pairs ? 1 : 0);
        if (window % 8 != 0) pitch += ((window - pitch) % 8 + 8) % 8;
        pitch += pairs ? pitch % 2 : 0;
        pixel = channels + kWide;  // an odd number of vectors, too
        buffer = band * pitch * pixel;
        vectors = channels / kWide;
        copiers = threads() / vectors;
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
        bytes = std::max(
            bytes, std::max(int64_t{sources} * in_row * pixel, int64_t{channels} * plane) * int64_t{sizeof(uint16_t)});
        tile = take(kBytesOfTile, 1);
        rows_of_outputs = take(most_rows, sizeof(OutputLine));
        columns_of_outputs = take(most_columns, sizeof(OutputLine));
        row_terms = take(sources + 2 * (k - 1), sizeof(int));
        column_terms = take(in_row + 2 * (k - 1), sizeof(int));
        firsts = take(patch_columns, sizeof(int));
        offsets = take(steps * kStep, sizeof(int));
        touched = take(bands * steps, sizeof(int));
        places = take(band * pitch, sizeof(int));
        shared_bytes = bytes;
    }

    // Bands of few absent outputs, and as many of masks as fit.
    bool choose_bands(const Problem& p) {
        constexpr int kMostBand = 8;
        const auto fits = [&](int rows_of_band, int bands_of_masks) {
            band = rows_of_band, bands = bands_of_masks;
            measure(p);
            return shared_bytes <= most_bytes;
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
        int most = static_cast<int>(ceil_div(all, best));
        while (!fits(best, most)) most--;
        return fits(best, even(ceil_div(all, best), most));
    }

    // In cycles of a multiprocessor, about.
    double cost_of(const Problem& p, bool vectors, int64_t of_group) const {
        constexpr double kIssued = 2.4, kBytes = 22, kOfItem = 1000;
        const int products = products_along_channels(of_group), k = static_cast<int>(p.kernel_size);
        const double outputs = double(most_rows) * most_columns, taps = outputs * static_cast<double>(p.taps());
        const double sources = double(patch_rows) * patch_columns * kPatch;
        const double bands_of_item = double(ceil_div(most_rows, band));
        const double all_steps = bands_of_item * steps * warps();
        const double touched = double(patch_rows) * (kPatchRows + k - 1) / (patch_rows * kPatchRows + k - 1);
        const double instructions = 1.0 * taps + outputs * channels * (vectors ? 0.07 : 0.12) +
                                    all_steps * (24 + 3 * products + touched * (products + 1)) +
                                    bands_of_item * warps() * 130 + sources * channels * 0.13 + warps() * 600;
        const double wavefronts = 0.3 * taps + outputs * channels * (vectors ? 0.03 : 0.06) +
                                  all_steps * 4 * (products + touched / 2) + sources * channels * 0.06;
        // With adjacent columns rows begin and end within sectors.
        constexpr int kSector = 16;
        const int in_row = patch_columns * kPatchColumns;
        const double read = vectors ? most_columns : most_columns + kSector - 1, stored = vectors ? in_row
                                                                                          : in_row % kSector == 0
                                                                                              ? in_row
                                                                                              : in_row + kSector / 2;
        const double bytes = 2 * (most_rows * read * channels + (vectors ? 1 : 2) * taps +
                                  stored * patch_rows * kPatchRows * channels);
        const double of_item = std::max(instructions / kIssued, wavefronts) + kOfItem;
        return std::max(of_item * static_cast<double>(ceil_div(items, kMultiprocessors)),
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
    int copied_left;  // the first column of bands: an even one if pairs are loaded

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
        copied_left = plan.pairs ? out_left & ~1 : out_left;
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
    // Of each buffer: [row][column][channel]
    __device__ __forceinline__ T* grads() const { return at<T>(plan.grads); }
    __device__ __forceinline__ OutputLine* rows() const { return at<OutputLine>(plan.rows_of_outputs); }
    __device__ __forceinline__ OutputLine* columns() const { return at<OutputLine>(plan.columns_of_outputs); }
    // Of sources: where the masks of one are, with an output's place.
    __device__ __forceinline__ int* row_terms() const { return at<int>(plan.row_terms); }
    __device__ __forceinline__ int* column_terms() const { return at<int>(plan.column_terms); }
    // The first column of outputs of a column of patches, in a band.
    __device__ __forceinline__ int* firsts() const { return at<int>(plan.firsts); }
    // Of the outputs of a column of patches, in a band.
    __device__ __forceinline__ int* offsets() const { return at<int>(plan.offsets); }
    // Of each step, as of rows.
    __device__ __forceinline__ uint32_t* touched() const { return at<uint32_t>(plan.touched); }
    __device__ __forceinline__ TileOfPatches& tile() const { return *at<TileOfPatches>(plan.tile); }
    // Of the outputs of a band in grad_output, or kBeyond.
    __device__ __forceinline__ int* places() const { return at<int>(plan.places); }

private:
    template <class A>
    __device__ __forceinline__ A* at(int bytes) const {
        return reinterpret_cast<A*>(shared_memory<unsigned char>() + bytes);
    }
};

// Stages the masks of some rows of outputs, times `scale`, in matrices that are 0 before. `Row` r has its masks from
// `matrices` on.
template <class T>
struct MatrixStage {
    const Problem& p;
    const GradPatchesPlan& plan;
    const RoomOfPatches<T>& room;
    int first, count;  // rows
    int columns;

    __device__ __forceinline__ void stage(int64_t n, int64_t group) const {
        const Array& array = p.from_logits ? p.logits : p.masks;
        const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
        const int64_t first_element = n * array.stride_n + group * p.taps() * plan.tap;
        const bool plain = normalizer == CARAFEPP_NONE;
        if (p.kernel_size > kMostInRegisters || !(plain || normalizer == CARAFEPP_SOFTMAX)) {
            stage_one_by_one(array, first_element, normalizer);
        } else if (p.kernel_size == 3) {
            stage_in_registers<3>(array, first_element, plain);
        } else if (p.kernel_size == 5) {
            stage_in_registers<5>(array, first_element, plain);
        } else {
            stage_in_registers<7>(array, first_element, plain);
        }
    }

private:
    // An output of a thread.
    struct Own {
        bool exists;
        int64_t from;
        int to;
        int row, column;  // places of the terms of its first tap's row and column
    };
    // Neighbouring outputs have `group` columns in a row, then further rows of them.
    __device__ __forceinline__ Own output(int number) const {
        const int line = plan.group.quotient(number), group = plan.mask_rows.quotient(line),
                  y = line - group * plan.mask_rows.number;
        const int order = number + (group - line) * plan.group.number;
        const bool exists = y < count && order < columns;
        const OutputLine& row = room.rows()[first + (exists ? y : 0)];
        const OutputLine& column = room.columns()[room.columns()[exists ? order : 0].in_memory];
        return {exists, row.from + column.from, exists ? row.to + column.to : kBeyond, row.source,
                column.source + static_cast<int>(room.column_terms() - room.row_terms())};
    }
    __device__ __forceinline__ int numbers() const {
        return static_cast<int>(plan.group.quotient(plan.most_columns + plan.group.number - 1)) *
               plan.mask_rows.number * plan.group.number;
    }

    // Writes a mask, unless its source is beyond the tile.
    __device__ __forceinline__ void put(int place, T mask) const {
        if (place >= 0) room.matrices()[place] = mask;
    }

    // Neighbouring threads, kLanesOfOutput, have each so many rows of an output's taps.
    template <int K>
    __device__ __forceinline__ void stage_in_registers(const Array& array, int64_t first_element, bool plain) const {
        constexpr int kLanes = kLanesOfOutput<K>, kRows = (K + kLanes - 1) / kLanes;
        const int thread = thread_computed_late(), threads = static_cast<int>(blockDim.x), lane = thread % kLanes;
        const int all = numbers(), tap = static_cast<int>(plan.tap);
        const bool of_float = array.dtype == CARAFEPP_FLOAT32, has_last = lane + (kRows - 1) * kLanes < K;
        const int* const terms = room.row_terms();
        first_element += lane * K * plan.tap;
#pragma unroll 1
        for (int before = 0; before < all; before += threads / kLanes) {
            const Own own = output(before + thread / kLanes);
            const int64_t place = first_element + own.from;
            float values[kRows][K];
            if (of_float) {
                const float* const from = static_cast<const float*>(array.data) + place;
#pragma unroll
                for (int t = 0; t < kRows * K; t++)
                    values[t / K][t % K] = t / K < kRows - 1 || has_last
                                               ? load_input(at_stride(from, tap, t / K * kLanes * K + t % K))
                                               : -INFINITY;
            } else {
                const T* const from = static_cast<const T*>(array.data) + place;
#pragma unroll
                for (int t = 0; t < kRows * K; t++)
                    values[t / K][t % K] = t / K < kRows - 1 || has_last
                                               ? widen(load_input(at_stride(from, tap, t / K * kLanes * K + t % K)))
                                               : -INFINITY;
            }
            float factor = scale_of_masks<T>(p);
            if (!plain) {
                float largest = -INFINITY, sum = 0;
#pragma unroll
                for (int t = 0; t < kRows * K; t++) largest = fmaxf(largest, values[t / K][t % K]);
#pragma unroll
                for (int distance = 1; distance < kLanes; distance *= 2)
                    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
#pragma unroll
                for (int t = 0; t < kRows * K; t++) {
                    float& value = values[t / K][t % K];
                    sum += value = power_of_2((value - largest) * kLog2OfE);  // the difference first: they may be huge
                }
#pragma unroll
                for (int distance = 1; distance < kLanes; distance *= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
                factor /= sum;
            }
            int of_row[kRows];
#pragma unroll
            for (int a = 0; a < kRows; a++) {
                of_row[a] = kBeyond;
                if (a < kRows - 1 || has_last) of_row[a] = own.to + terms[own.row + lane + a * kLanes];
            }
#pragma unroll
            for (int b = 0; b < K; b++) {
                const int of_column = terms[own.column + b];
#pragma unroll
                for (int a = 0; a < kRows; a++) put(of_row[a] + of_column, narrow<T>(values[a][b] * factor));
            }
        }
    }

    // A thread has all taps of an output, whatever their number and normaliser.
    __device__ __forceinline__ void stage_one_by_one(const Array& array, int64_t first_element,
                                                     carafepp_normalizer normalizer) const {
        const int k = static_cast<int>(p.kernel_size), all = numbers();
        const bool of_float = array.dtype == CARAFEPP_FLOAT32;
        const bool divides = normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED;
#pragma unroll 1
        for (int number = thread_computed_late(); number < all; number += static_cast<int>(blockDim.x)) {
            const Own own = output(number);
            if (!own.exists) continue;
            float largest = 0, factor = scale_of_masks<T>(p);
            // Three times: for the largest logit, for the sum, and for the masks.
#pragma unroll 1
            for (int time = divides ? 0 : 2; time < 3; time++) {
                int64_t place = first_element + own.from;
                float next = time == 0 ? -INFINITY : 0;
#pragma unroll 1
                for (int a = 0; a < k; a++) {
#pragma unroll 1
                    for (int b = 0; b < k; b++, place += plan.tap) {
                        float value = of_float ? load_input(static_cast<const float*>(array.data) + place)
                                               : widen(load_input(static_cast<const T*>(array.data) + place));
                        if (normalizer == CARAFEPP_SIGMOID) value = sigmoid(value);
                        if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) value = log_sigmoid(value);
                        if (time == 0) {
                            next = fmaxf(next, value);
                            continue;
                        }
                        if (divides) value = power_of_2((value - largest) * kLog2OfE);
                        next += value;
                        if (time == 2)
                            put(own.to + room.row_terms()[own.row + a] + room.row_terms()[own.column + b],
                                narrow<T>(value * factor));
                    }
                }
                if (time == 0) largest = next;
                if (time == 1) factor /= next;
            }
        }
    }
};

// How a block stages grad_output, eight channels of an output in a vector. What does not exist is 0.
template <class T>
struct BandCopy {
    const T* from;  // the first channel of the first output
    int stride_c;
    int channels;       // that exist
    int vectors;        // of the slice
    const int* places;  // of outputs, or kBeyond
    int outputs, pixel;

    // For adjacent channels. They arrive as copies of this thread do.
    __device__ __forceinline__ void copy_vectors(int vector, int first, int step, int end, T* to) const {
        to += first * pixel + vector * kWide;
        if (vector * kWide >= channels) end = 0;
#pragma unroll 2
        for (int output = first; output < outputs; output += step, to += step * pixel) {
            const int place = places[output];
            copy_async<kWide * sizeof(T)>(to, at_stride(from + vector * kWide, 1, place),
                                          output < end && place != kBeyond);
        }
    }

    // `Columns` neighbouring outputs at once, by way of registers; a warp has a vector. Instead of channels that do not
    // exist it stages the last one.
    template <int Columns>
    __device__ __forceinline__ void transpose(int end, T* to) const {
        const int thread = thread_computed_late(), lane = thread % 32, warps = static_cast<int>(blockDim.x) / 32;
        using Word = std::conditional_t<Columns == 2, uint32_t, uint16_t>;
#pragma unroll 1
        for (int vector = thread / 32; vector < vectors; vector += warps) {
            const int there = channels - vector * kWide;
            const T* const of_vector = from + int64_t{vector * kWide} * stride_c;
#pragma unroll 1
            for (int output = lane * Columns; output < outputs; output += 32 * Columns) {
                const int place = places[output];
                const bool exists = output < end && place != kBeyond && there > 0;
                uint32_t words[kWide];
                const T* at = of_vector + (exists ? place : 0);
#pragma unroll
                for (int v = 0; v < kWide; v++) {
                    words[v] = exists ? __ldg(reinterpret_cast<const Word*>(at)) : 0;
                    if (v + 1 < there) at = at_stride(at, stride_c, 1);
                }
#pragma unroll
                for (int k = 0; k < Columns; k++) {
                    // Eight neighbouring threads store to different banks if four of them begin with the second column.
                    const int column = Columns == 2 ? (lane / 4 + k) % 2 : 0;
                    uint32_t of[kWide / 2];
#pragma unroll
                    for (int v = 0; v < kWide; v += 2) {
                        const uint32_t one = words[v], other = words[v + 1];
                        of[v / 2] = column == 0 ? (one & 0xffff) | other << 16 : one >> 16 | (other & 0xffff0000);
                    }
                    *reinterpret_cast<uint4*>(to + (output + column) * pixel + vector * kWide) = make_uint4(
                        of[0], of[1], of[2], of[3]);
                }
            }
        }
    }
};

// An element of the result without tensor cores. A zero of a matrix makes NaN of an infinite gradient; here no zero is
// multiplied.
template <class T>
__device__ float feature_tap_by_tap(const Problem& p, const GradPatchesPlan& plan, int64_t n, int64_t group, int64_t c,
                                    int y, int x) {
    const int k = static_cast<int>(p.kernel_size), radius = k / 2;
    float sum = 0;
#pragma unroll 1
    for (int i = plan.rows.first(y - radius); i < plan.rows.first(y + radius + 1); i++) {
#pragma unroll 1
        for (int j = plan.columns.first(x - radius); j < plan.columns.first(x + radius + 1); j++) {
            const int a = y - plan.rows.source(i) + radius, b = x - plan.columns.source(j) + radius;
            sum += mask_of<T>(p, n, group, a * k + b, {i, j}) * widen(*element<const T>(p.grad_output, n, c, i, j));
        }
    }
    return sum;
}

// Stores a vector of elements of shared memory; see add_zeros.
template <class T>
__device__ __forceinline__ void store_elements(uint32_t word, T* to, uint32_t& zeros) {
    add_zeros<T>(word, zeros);
    store_word(word, to);
}
template <class T>
__device__ __forceinline__ void store_elements(uint2 words, T* to, uint32_t& zeros) {
    for (const uint32_t word : {words.x, words.y}) add_zeros<T>(word, zeros);
    __stcs(reinterpret_cast<uint2*>(to), words);
}
template <class T>
__device__ __forceinline__ void store_elements(uint4 words, T* to, uint32_t& zeros) {
    for (const uint32_t word : {words.x, words.y, words.z, words.w}) add_zeros<T>(word, zeros);
    __stcs(reinterpret_cast<uint4*>(to), words);
}
template <class Vector, class T>
__device__ __forceinline__ void store_vector(const T* from, T* to, uint32_t& zeros) {
    store_elements(*reinterpret_cast<const Vector*>(from), to, zeros);
}

// The first row of patches whose matrices of a band are staged, if the first row of sources that the band touches is
// this one of the tile. It is an even one, as two matrices are loaded at once.
__device__ __forceinline__ int slot_of(int source) { return max(source, 0) / (2 * kPatchRows) * 2; }

// `Vectors`: a vector of channels is one in memory. A warp has `Products` along channels.
template <bool Vectors, int Products, class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    grad_features_patches_mma_kernel(Arguments arguments, GradPatchesPlan plan) {
    constexpr int kPatchesOfWarp = kProducts / Products;
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int k = static_cast<int>(p.kernel_size), radius = k / 2;
    const RoomOfPatches<T> room{plan};
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), part = warp % plan.parts, own_column = warp / plan.parts;
    const int vector = thread % plan.vectors, first_of_thread = thread / plan.vectors;
    for (int t = thread; t < plan.steps * kStep; t += threads) {
        const int y = t / plan.window, x = t - y * plan.window;
        room.offsets()[t] = y < plan.band ? (y * plan.pitch + x) * plan.pixel : 0;
    }
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        if (thread == 0) room.tile() = TileOfPatches(p, plan, static_cast<uint32_t>(item));
        __syncthreads();
        const TileOfPatches& tile = room.tile();
        const int up = p.from_logits ? static_cast<int>(p.factor.up) : 1;
        const bool phases_apart = p.from_logits && array.stride_w < array.stride_c;
#pragma unroll 1
        for (int y = thread; y < tile.out_rows; y += threads) {
            const int output = tile.out_top + y, cell = output / up, of_masks = y % plan.mask_rows.number,
                      of = y % plan.band;
            const int first_slot = slot_of(plan.rows.source(output - of) - tile.top - radius);
            const int source = plan.rows.source(output) - tile.top + radius;
            const int top = max(source - 2 * radius, 0) / kPatchRows,
                      bottom = min(source / kPatchRows, plan.patch_rows - 1);
            room.rows()[y] = {
                cell * array.stride_h + (output - cell * up) * up * array.stride_c,
                of_masks / plan.band * plan.of_band + of * plan.window * kPatch - first_slot * plan.matrix, source, 0,
                (2u << bottom) - (1u << top)};
        }
#pragma unroll 1
        for (int x = thread; x < tile.out_columns; x += threads) {
            const int output = tile.out_left + x, cell = output / up, apart = phases_apart ? up : 1;
            OutputLine& line = room.columns()[x];
            line.from = cell * array.stride_w + (output - cell * up) * array.stride_c;
            line.to = x * kPatch;
            line.source = plan.columns.source(output) - tile.left + radius;
            const int own = x % apart, count = tile.out_columns;
            room.columns()[own * (count / apart) + min(own, count % apart) + x / apart].in_memory = x;
        }
#pragma unroll 1
        for (int s = thread; s < plan.sources + 2 * (k - 1); s += threads) {
            const int y = s - 2 * radius;
            room.row_terms()[s] = y < 0 || y >= plan.sources
                                      ? kBeyond
                                      : y / kPatchRows * plan.matrix + y % kPatchRows * kPatchColumns;
        }
#pragma unroll 1
        for (int s = thread; s < plan.across.number + 2 * (k - 1); s += threads) {
            const int x = s - 2 * radius, column = x / kPatchColumns;
            const int first = plan.columns.first(tile.left + column * kPatchColumns - radius);
            room.column_terms()[s] = x < 0 || x >= plan.across.number
                                         ? kBeyond
                                         : column * plan.of_column - (first - tile.out_left) * kPatch +
                                               x % kPatchColumns;
        }
#pragma unroll 1
        for (int column = thread; column < plan.patch_columns; column += threads)
            room.firsts()[column] = plan.columns.first(tile.left + column * kPatchColumns - radius) - tile.copied_left;

#pragma unroll 1
        for (int number = thread; number < plan.band * plan.pitch; number += threads) {
            const int y = number / plan.pitch, x = number - y * plan.pitch;
            room.places()[number] = tile.copied_left + x < p.out_w
                                        ? static_cast<int>(y * p.grad_output.stride_h + x * p.grad_output.stride_w)
                                        : kBeyond;
        }
        // Stages the band from row `first` on.
        const auto copy_band = [&](int first, T* to) __attribute__((always_inline)) {
            const BandCopy<T> copy{
                static_cast<const T*>(p.grad_output.data) + tile.grads + first * p.grad_output.stride_h,
                static_cast<int>(p.grad_output.stride_c),
                tile.channels,
                plan.vectors,
                room.places(),
                plan.band * plan.pitch,
                plan.pixel};
            const int end = (tile.out_rows - first) * plan.pitch;
            if constexpr (Vectors) {
                copy.copy_vectors(vector, first_of_thread, plan.copiers, end, to);
            } else if (plan.pairs) {
                copy.template transpose<2>(end, to);
            } else {
                copy.template transpose<1>(end, to);
            }
        };
        float sums[kPatchesOfWarp][Products][4] = {};
        bool second = false;  // of the buffers
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < tile.out_rows; first += plan.mask_rows.number) {
            if (first > 0) __syncthreads();  // nobody reads the last masks
            const int count = min(plan.mask_rows.number, tile.out_rows - first);
#pragma unroll 1
            for (int v = thread; v < plan.bands * plan.of_band / kWide; v += threads)
                reinterpret_cast<uint4*>(room.matrices())[v] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
            for (int s = thread; s < plan.bands * plan.steps; s += threads) {
                const int of_masks = s / plan.steps, step = s - of_masks * plan.steps,
                          row = first + of_masks * plan.band;
                const int last = min((step * kStep + kStep - 1) / plan.window, plan.band - 1);
                uint32_t touched = 0;
                for (int y = step * kStep / plan.window; y <= last; y++) {
                    if (row + y < tile.out_rows) touched |= room.rows()[row + y].touched;
                }
                room.touched()[s] = touched;
            }
            __syncthreads();
            MatrixStage<T>{p, plan, room, first, count, tile.out_columns}.stage(tile.n, tile.group);
            // One band ahead of the first.
            int of = first == 0 ? -1 : 0;
#pragma unroll 1
            for (; of < plan.bands && first + of * plan.band < tile.out_rows; of++, second = !second) {
                const int row = first + of * plan.band;
                const int next = row + plan.band;
                wait_for_copies();
                __syncthreads();
                if (next < tile.out_rows) copy_band(next, room.grads() + (second ? 0 : plan.buffer));
                if (of >= 0) {
                    const T* const grads = room.grads() + (second ? plan.buffer : 0) +
                                           room.firsts()[own_column] * plan.pixel + part * Products * kChannelsOfMma +
                                           lane / 8 % 2 * kWide;
                    const int* offset = room.offsets() + lane % 8 + lane / 16 * 8;
                    const uint32_t* touched = room.touched() + of * plan.steps;
                    const int first_slot = slot_of(room.rows()[row].source - 2 * radius);
                    const T* matrix = room.matrices() + of * plan.of_band + own_column * plan.of_column +
                                      (lane / 16 - first_slot) * plan.matrix + lane % 16 * kPatch;
#pragma unroll 1
                    for (int step = 0; step < plan.steps; step++, offset += kStep, matrix += kStep * kPatch) {
                        const uint32_t patches = __shfl_sync(0xffffffffu, touched[step], 0);
                        uint32_t values[Products][4];
#pragma unroll
                        for (int m = 0; m < Products; m++)
                            load_matrices(grads + *offset + m * kChannelsOfMma, values[m]);
#pragma unroll
                        for (int q = 0; q < kPatchesOfWarp; q += 2) {
                            if ((patches >> q & 3) == 0) continue;
                            uint32_t masks[4];
                            load_matrices(matrix + q * plan.matrix, masks);
#pragma unroll
                            for (int of_two = 0; of_two < 2; of_two++) {
                                if ((patches >> (q + of_two) & 1) == 0) continue;
#pragma unroll
                                for (int m = 0; m < Products; m++)
                                    multiply_add<T>(sums[q + of_two][m], values[m],
                                                    {masks[of_two * 2], masks[of_two * 2 + 1]});
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();

        // Sums go to shared memory in the order of the result.
        const float unscale = 1 / scale_of_masks<T>(p);
        const int row = lane / 4, pair = lane % 4;
#pragma unroll
        for (int q = 0; q < kPatchesOfWarp; q++) {
            if (q >= plan.patch_rows) break;
            const int source = (q * kPatchRows + pair / 2) * plan.across.number + own_column * kPatchColumns +
                               pair % 2 * 2;
#pragma unroll
            for (int m = 0; m < Products; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int channel = (part * Products + m) * kChannelsOfMma + half * 8 + row;
                    const float* const sum = sums[q][m] + half * 2;
                    const uint32_t own = pair_of<T>(sum[0] * unscale, sum[1] * unscale);
                    if constexpr (Vectors) {
                        // Lanes of two channels exchange a source: each has both channels of one then.
                        const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 4);
                        const uint32_t word = row % 2 == 0 ? (own & 0xffff) | other << 16
                                                           : other >> 16 | (own & 0xffff0000);
                        *reinterpret_cast<uint32_t*>(room.results() + (source + row % 2) * plan.pixel + channel -
                                                     row % 2) = word;
                    } else {
                        *reinterpret_cast<uint32_t*>(room.results() + channel * plan.plane + source) = own;
                    }
                }
            }
        }
        __syncthreads();
        const int height = static_cast<int>(min(p.features.h - tile.top, int64_t{plan.sources})),
                  columns = static_cast<int>(min(p.features.w - tile.left, int64_t{plan.across.number}));
        T* const to = element<T>(grad_features, tile.n, tile.c, tile.top, tile.left);
        uint32_t zeros = 0;  // while all results are finite
        // Calls f(channel, row, column) for the thread's results: first ones of eight channels, or of some columns.
        const auto for_each_stored = [&](auto f) {
            if constexpr (Vectors) {
                if (vector * kWide >= tile.channels) return;
#pragma unroll 1
                for (int s = first_of_thread; s < height * plan.across.number; s += plan.copiers) {
                    const int y = plan.across.quotient(s), x = s - y * plan.across.number;
                    if (x < columns) f(vector * kWide, y, x);
                }
            } else {
                const int at_once = plan.columns_at_once, in_row = (plan.across.number + at_once - 1) / at_once;
#pragma unroll 1
                for (int s = thread; s < tile.channels * height * in_row; s += threads) {
                    const int line = s / in_row, x = (s - line * in_row) * at_once, c = line / height;
                    if (x < columns) f(c, line - c * height, x);
                }
            }
        };
        for_each_stored([&](int channel, int y, int x) __attribute__((always_inline)) {
            T* const result = to + channel * grad_features.stride_c + y * grad_features.stride_h +
                              x * grad_features.stride_w;
            if constexpr (Vectors) {
                store_vector<uint4>(room.results() + (y * plan.across.number + x) * plan.pixel + channel, result,
                                    zeros);
            } else {
                const T* const values = room.results() + channel * plan.plane + y * plan.across.number + x;
                if (plan.columns_at_once == 8) {
                    store_vector<uint4>(values, result, zeros);
                } else if (plan.columns_at_once == 4) {
                    store_vector<uint2>(values, result, zeros);
                } else if (plan.columns_at_once == 2) {
                    store_vector<uint32_t>(values, result, zeros);
                } else {
                    add_zeros<T>(values->bits, zeros);
                    *result = *values;
                }
            }
        });
        if (zeros != 0) {
            for_each_stored([&](int channel, int y, int x) {
                const int in_channels = Vectors ? kWide : 1, in_row = Vectors ? 1 : plan.columns_at_once;
#pragma unroll 1
                for (int v = 0; v < in_channels * in_row; v++) {
                    const int i = tile.top + y, j = tile.left + x + (Vectors ? 0 : v);
                    const int64_t c = tile.c + channel + (Vectors ? v : 0);
                    T* const stored = element<T>(grad_features, tile.n, c, i, j);
                    if (!(fabsf(widen(*stored)) < INFINITY))
                        *stored = narrow<T>(feature_tap_by_tap<T>(p, plan, tile.n, tile.group, c, i, j));
                }
            });
        }
        __syncthreads();
    }
}

// Why no tile can be planned for a problem.
inline const char* not_for_grad_patches(const Problem& p, const Array& grad_features, bool vectors) {
    if (itemsize(p.features.dtype) != 2) return "features are not of 16 bits";
    if (const char* reason = not_for_bands(p)) return reason;
    if (p.kernel_size < 3) return "kernel_size is less than 3";
    if (p.features.c / p.groups < kWide) return "a group has fewer than 8 channels";
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    const GradPatchesPlan plan(p, grad_features, vectors);
    if (plan.tap != static_cast<int>(plan.tap)) return "masks of an output are too far apart";
    if (p.grad_output.stride_c != static_cast<int>(p.grad_output.stride_c)) return "channels are too far apart";
    for (const int64_t stride : {p.grad_output.stride_h * plan.band, p.grad_output.stride_w * plan.pitch}) {
        if (std::abs(stride) > INT32_MAX / 16) return "outputs are too far from each other";
    }
    return plan.shared_bytes > plan.most_bytes ? "outputs are too far apart"
           : plan.items > UINT32_MAX           ? "tiles are too many"
                                               : nullptr;
}

template <bool Vectors>
void grad_features_patches(const Problem& p, const Array& grad_features) {
    const GradPatchesPlan plan(p, grad_features, Vectors);
    const bool wide = products_along_channels(p.features.c / p.groups) == 4,
               float16 = p.features.dtype == CARAFEPP_FLOAT16;
    const auto kernel = wide      ? float16 ? grad_features_patches_mma_kernel<Vectors, 4, Float16>
                                            : grad_features_patches_mma_kernel<Vectors, 4, BFloat16>
                        : float16 ? grad_features_patches_mma_kernel<Vectors, 1, Float16>
                                  : grad_features_patches_mma_kernel<Vectors, 1, BFloat16>;
    launch(kernel, plan.items, plan.threads(), plan.shared_bytes, p, grad_features, plan);
}

}  // namespace carafepp::cuda
