// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <algorithm>
#include <initializer_list>

#include "dtypes.h"

namespace carafepp {

// ---- what a kernel cannot run: strides, tables of phases, and 2 MiB of scratch for each thread ----

// Bytes that staged masks take, of one output in each lane of the widest vectors.
static constexpr int64_t in_lanes(int64_t masks) { return masks * 64; }

static int64_t size_of_sum(const Problem& p) { return p.features.dtype == CARAFEPP_FLOAT64 ? 8 : 4; }

static int64_t masks_of_cell(const Problem& p) { return p.taps() * p.factor.up * p.factor.up; }

// Masks of the outputs of a cell that share a row of windows: they are centred on one source row.
static int64_t masks_of_window_rows(const Problem& p) {
    return p.taps() * p.factor.up * ceil_div(p.factor.up, p.factor.down);
}

// The outputs that read a source tile are centred on at most so many rows and columns of sources.
static int64_t rows_around_source_tile(const Problem& p) { return p.kernel_size - 1 + kMostSourceRows; }
static int64_t columns_around_source_tile(const Problem& p) { return p.kernel_size - 1 + kMostSourceColumns; }

// The least scratch of a gradient of features. It holds masks around a source tile, a tile, and the weights of the
// source tile.
static int64_t scratch_of_grad_features(const Problem& p) {
    const int64_t up = p.factor.up, down = p.factor.down;
    const int64_t rows = rows_around_source_tile(p), columns = columns_around_source_tile(p);
    const int64_t cells = std::min(ceil_div(columns, down) + 1, std::max<int64_t>(ceil_div(p.out_w, up), 1));
    const int64_t staged = (ceil_div(rows, down) + 1) * cells * masks_of_cell(p);
    const int64_t weights = (ceil_div(rows * up, down) + 1) * (ceil_div(columns * up, down) + 1) * kMostSourceRows *
                            kMostSourceColumns;
    const int64_t margins = 8 * columns;
    return (staged + weights + margins) * size_of_sum(p) + in_lanes(masks_of_cell(p));
}

// ---- channels in lanes ----

const char* cannot_run_reassemble_nhwc(const Problem& p, const Array& output) {
    if (p.features.stride_c != 1) return "channels of features are not adjacent";
    if (!output.empty() && output.stride_c != 1) return "channels of the output are not adjacent";
    if (p.factor.up > kMaxFactor) return "up is more than 16";
    if (in_lanes(masks_of_window_rows(p)) > kScratchBytes / 2) return "the masks of a tile take more than 1 MiB";
    return nullptr;
}

const char* cannot_run_grad_masks_nhwc(const Problem& p, const Array&) {
    if (p.features.stride_c != 1) return "channels of features are not adjacent";
    if (p.grad_output.stride_c != 1) return "channels of grad_output are not adjacent";
    if (p.factor.up > kMaxFactor) return "up is more than 16";
    // The kernel holds five such arrays.
    if (in_lanes(masks_of_cell(p)) > 384 * 1024) return "the sums of a tile take more than 384 KiB";
    return nullptr;
}

// Source tiles are wider than a window of one tap.
constexpr const char* kOneTap = "kernel_size is 1";

const char* cannot_run_grad_features_nhwc(const Problem& p, const Array& grad_features) {
    if (!grad_features.empty() && grad_features.stride_c != 1) return "channels of grad_features are not adjacent";
    if (p.grad_output.stride_c != 1) return "channels of grad_output are not adjacent";
    if (p.kernel_size == 1) return kOneTap;
    if (p.factor.up > kMaxFactor) return "up is more than 16";
    if (scratch_of_grad_features(p) > kScratchBytes)
        return "the masks of the outputs that touch a few pixels take more than 2 MiB";
    return nullptr;
}

// ---- phases in lanes ----

static bool adjacent(const Array& array) { return array.empty() || array.stride_c == 1; }

bool phases_in_lanes(const Problem& p) {
    const int64_t up = p.factor.up, channels = p.features.c;
    const bool is_float = p.features.dtype == CARAFEPP_FLOAT32 && p.logits.dtype == CARAFEPP_FLOAT32;
    return p.from_logits && p.normalizer == CARAFEPP_SOFTMAX && is_float && adjacent(p.logits) && p.groups == 1 &&
           channels > 0 && channels <= kPhaseChannels && up % 4 == 0 && up <= kMaxFactor && p.factor.down == 1 &&
           masks_of_cell(p) <= 32 * 1024 &&
           in_lanes(p.kernel_size * (p.features.w + 64)) <= 2 * kScratchBytes;  // of four channels, half of it
}

// ---- channels in lanes, one in each group ----

// Why an argument of a function is not: pixels are features or the like, `weights` masks or logits.
static const char* unfit_for_few_nhwc(const Problem& p, std::initializer_list<const Array*> pixels,
                                      const Array& weights) {
    if (p.features.c != p.groups) return "a group has more than one channel, and this is not convex upsampling";
    for (const Array* array : pixels) {
        if (!adjacent(*array)) return "channels are not adjacent";
    }
    if (!adjacent(weights)) return "channels of masks or logits are not adjacent";
    if (p.from_logits && p.factor.up > kMaxFactor) return "up is more than 16";
    if (in_lanes(3 * (p.from_logits ? masks_of_cell(p) : p.taps())) > kScratchBytes)
        return "the masks of a cell take more than 700 KiB";
    return nullptr;
}

static const Array& weights_of(const Problem& p) { return p.from_logits ? p.logits : p.masks; }

const char* cannot_run_reassemble_few_nhwc(const Problem& p, const Array& output) {
    return phases_in_lanes(p) ? nullptr : unfit_for_few_nhwc(p, {&p.features, &output}, weights_of(p));
}

const char* cannot_run_grad_masks_few_nhwc(const Problem& p, const Array& grad_masks) {
    if (!adjacent(grad_masks)) return "channels of the gradient are not adjacent";
    if (phases_in_lanes(p)) return nullptr;
    return unfit_for_few_nhwc(p, {&p.features, &p.grad_output}, p.from_logits ? p.logits : grad_masks);
}

const char* cannot_run_grad_features_few_nhwc(const Problem& p, const Array& grad_features) {
    if (phases_in_lanes(p)) return nullptr;
    if (in_lanes(p.features.w) > kScratchBytes / 4) return "a row of sums takes more than 512 KiB";
    if (in_lanes(p.from_logits ? masks_of_cell(p) : p.taps()) > kScratchBytes / 2)
        return "the masks of a cell take more than 1 MiB";
    return unfit_for_few_nhwc(p, {&p.grad_output, &grad_features}, weights_of(p));
}

// ---- an image at a time: half of the scratch for its features and outputs, half for the kernel ----

static int64_t bytes_of_channel(const Problem& p) {
    // An array without elements may have any shape: in numbers that do not overflow.
    const double pixels = static_cast<double>(p.features.h) * static_cast<double>(p.features.w) +
                          static_cast<double>(p.out_h) * static_cast<double>(p.out_w);
    return static_cast<int64_t>(std::min(pixels * static_cast<double>(size_of_sum(p)), 1e15));
}

int64_t channels_of_image(const Problem& p) {
    constexpr int64_t kLanes = 16;
    const int64_t channels = p.features.c / p.groups, bytes = std::max<int64_t>(bytes_of_channel(p), 1);
    const int64_t most = std::max<int64_t>(kImageBytes / bytes / kLanes - 1, 1) * kLanes;
    const int64_t parts = std::max<int64_t>(ceil_div(channels, most), 1);
    return ceil_div(ceil_div(channels, parts), kLanes) * kLanes;
}

static const char* unfit_for_images(const Problem& p) {
    constexpr int64_t kFewest = 32;  // a vector of channels and one of padding
    if (p.features.c == 0) return "there are no channels";
    if (p.factor.up > kMaxFactor) return "up is more than 16";
    if (kFewest * bytes_of_channel(p) > kImageBytes) return "some channels of an image take more than 1 MiB";
    return nullptr;
}

const char* cannot_run_reassemble_any(const Problem& p, const Array&) {
    if (in_lanes(masks_of_window_rows(p)) > kImageScratchBytes / 2) return "the masks of a tile take more than 512 KiB";
    return unfit_for_images(p);
}

const char* cannot_run_grad_masks_any(const Problem& p, const Array&) {
    // The kernel holds five such arrays.
    if (in_lanes(masks_of_cell(p)) > 192 * 1024) return "the sums of a tile take more than 192 KiB";
    if (channels_of_image(p) < p.features.c / p.groups) return "all channels of an image take more than 1 MiB";
    return unfit_for_images(p);
}

const char* cannot_run_grad_features_any(const Problem& p, const Array&) {
    if (p.kernel_size == 1) return kOneTap;
    if (scratch_of_grad_features(p) > kImageScratchBytes)
        return "the masks of the outputs that touch a few pixels take more than 1 MiB";
    return unfit_for_images(p);
}

// ---- columns in lanes ----

static const char* unfit_for_columns(const Problem& p) {
    return p.factor.up > kMaxFactor || p.factor.down > kMaxFactor ? "up or down is more than 16" : nullptr;
}

const char* cannot_run_reassemble_nchw(const Problem& p, const Array&) {
    if (in_lanes(p.taps() * p.factor.up) > 512 * 1024) return "the masks of a row of a tile take more than 512 KiB";
    return unfit_for_columns(p);
}

const char* cannot_run_grad_features_nchw(const Problem& p, const Array&) {
    // A row of masks, or the tap row of one source row, over the cells that a vector of sources needs.
    const int64_t cells_bytes = 3 * 64 + p.kernel_size * size_of_sum(p);
    if ((p.from_logits ? p.taps() : p.kernel_size) * p.factor.up * cells_bytes > 1920 * 1024)
        return "the masks of the outputs that touch a row take more than 1920 KiB";
    return unfit_for_columns(p);
}

const char* cannot_run_grad_masks_nchw(const Problem& p, const Array& grad_masks) {
    const int64_t rows = takes_whole_cells(p, grad_masks) ? p.factor.up : 1;  // with those of logits, twice
    if (in_lanes(p.taps() * p.factor.up * rows) > 512 * 1024) return "the sums of a tile take more than 512 KiB";
    return unfit_for_columns(p);
}

// ---- runs: channels in lanes, of any layout ----

bool shares_windows(const Problem& p) { return (p.kernel_size == 5 || p.kernel_size == 7) && p.factor.down <= 2; }

bool reads_masks_in_place(const Problem& p) {
    return !p.from_logits && p.kernel_size == 7 && shares_windows(p) && p.features.dtype == CARAFEPP_FLOAT32;
}

const char* cannot_run_reassemble_runs_any(const Problem& p, const Array&) {
    if (p.factor.up > 1 || p.factor.down > kMaxFactor) return "up is more than 1, or down more than 16";
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    if (p.features.c == 0 || p.features.c / p.groups % kRunChannels != 0)
        return "channels of a group are no multiple of 16";
    if (p.out_w < kFewestRunColumns) return "fewer than 4 columns of outputs";
    if (p.taps() * (p.out_w + 32) * size_of_sum(p) > kScratchBytes / 8)
        return "the masks of a row take more than 256 KiB";
    const int64_t columns = p.features.w + p.kernel_size + 8 * p.factor.down;
    if (in_lanes(p.kernel_size * columns + 6 * p.out_w) > kScratchBytes / 4 * 3)
        return "the rows of a window take more than 1536 KiB";
    return nullptr;
}

// ---- few channels in a group ----

// Elements of a row of sources of a group, as its kernels stage it, at most.
static double few_channels_row(const Problem& p) {
    const double cells = static_cast<double>(std::max(ceil_div(p.out_w, p.factor.up), p.logits.w));
    const double columns = static_cast<double>(p.factor.down) * (cells + static_cast<double>(p.kernel_size) + 96);
    return static_cast<double>(p.features.c / p.groups) * (columns + static_cast<double>(p.features.w));
}

// Masks of the shortest slice: two vectors of cells.
static double few_channels_slice(const Problem& p) {
    return static_cast<double>(p.taps() * (p.from_logits ? 1 : p.factor.up) * 32);
}

// The rest of the scratch is for more rows, and for longer slices.
static const char* unfit_for_few_channels(const Problem& p, double least_scratch) {
    return least_scratch * static_cast<double>(size_of_sum(p)) > 1024 * 1024
               ? "a row of sources and the masks of a tile take more than 1 MiB"
               : nullptr;
}

const char* cannot_run_reassemble_few_nchw(const Problem& p, const Array&) {
    if (!p.from_logits) {
        const int64_t k = p.kernel_size, columns = std::min(p.out_w, kFewColumns) + 32 + k * p.factor.up;
        const double sources = static_cast<double>(p.features.c / p.groups) *
                               static_cast<double>((k + 2) * std::min(p.factor.down, k) + 2 + p.factor.down);
        return unfit_for_few_channels(p, (sources + static_cast<double>(k)) * static_cast<double>(columns));
    }
    const int64_t rows = p.factor.down + p.kernel_size;
    const double outputs = static_cast<double>(p.features.c / p.groups) *
                           static_cast<double>(p.out_w + 32 * p.factor.up);
    return unfit_for_few_channels(p, static_cast<double>(rows) * few_channels_row(p) + outputs + few_channels_slice(p));
}

const char* cannot_run_grad_masks_few_nchw(const Problem& p, const Array&) {
    const int64_t rows = p.factor.down + p.kernel_size;
    const double outputs = static_cast<double>(p.features.c / p.groups) * static_cast<double>(32 * p.factor.up);
    return unfit_for_few_channels(
        p, static_cast<double>(rows) * few_channels_row(p) + outputs + 3 * few_channels_slice(p));
}

const char* cannot_run_grad_features_few_nchw(const Problem& p, const Array&) {
    const int64_t window = p.factor.source(p.factor.up - 1) + p.kernel_size;
    const double sums = static_cast<double>(p.features.c / p.groups) *
                        static_cast<double>(32 * (window * window + p.factor.up));
    return unfit_for_few_channels(p, few_channels_row(p) + sums + few_channels_slice(p));
}

// ---- normalisers ----

const char* cannot_run_normalize_masks(const Problem& p, const Array&) {
    if (in_lanes(2 * masks_of_cell(p) + p.taps() * p.factor.up) > kScratchBytes)
        return "the masks and logits of a tile take more than 2 MiB";
    return nullptr;
}

const char* cannot_run_normalize_masks_backward(const Problem& p, const Array& grad_logits) {
    return cannot_run_normalize_masks(p, grad_logits);
}

// ---- preference: all of its constants, and why another kernel is faster ----

constexpr int64_t kFewestChannels = 4;  // of a group
constexpr int64_t kFewChannels = 4;     // of a group, at most
constexpr int64_t kFewestCells = 4;     // of a row
constexpr int64_t kMostMasksOfCell = 1600;

// The most bytes of staged masks: of a tile, around a source tile, around rows of sources.
constexpr int64_t kMasksOfTileBytes = 512 * 1024;
constexpr int64_t kMasksOfSourceTileBytes = 1024 * 1024;
constexpr int64_t kMasksOfRowsBytes = 768 * 1024;

// Short rows leave most of a vector unused. If there are at least so many channels for each column, pixels are faster,
// to which images are transposed first. Full vectors leave nothing unused.
constexpr int64_t kChannelsForColumn = 4, kChannelsForColumnOfFullVectors = 8;
constexpr int64_t kChannelsAtOnce = 128;  // or all of them: fewer are not worth the transposition
constexpr int64_t kFewestChannelsAtOnce = 32, kFewestChannelsOfPixels = 16;  // of a forward with a large down
constexpr int64_t kCellsToDeinterleaveByThree = 21;                          // of a row: by 3 takes the fewest shuffles

constexpr int kFewestDownOfRuns = 3, kFewestStagedColumns = 8;  // with staged masks
constexpr int64_t kMostSharedColumns = 320;  // of features, with staged masks: a block of wider ones has too few rows
constexpr int64_t kMostRunChannels = 256;    // of a group, if its masks are far apart or its features are not

constexpr const char* kManyChannels = "many channels in a group are worth register tiles";
constexpr const char* kColumnsApart = "columns of masks or logits are not adjacent";
constexpr const char* kNoVectors = "too few channels in a group to fill vectors";
constexpr const char* kNoReuse = "too few channels in a group to make up for staging masks";
constexpr const char* kLargeTile = "the masks of a tile take more than 512 KiB";
constexpr const char* kLargeCell = "the masks of a cell are more than 1600";
constexpr const char* kFewCells = "fewer than 4 cells in a row";
constexpr const char* kDeinterleaved = "so many channels are better transposed to pixels than deinterleaved";
constexpr const char* kNarrow = "rows so narrow, with so many channels, are better transposed to pixels";

static bool few_channels(const Problem& p) { return p.features.c / p.groups < kFewestChannels; }

static const char* slower_for_few_channels(const Problem& p, int64_t most_channels) {
    if (p.features.c / p.groups > most_channels) return kManyChannels;
    if ((p.from_logits ? p.logits : p.masks).stride_w != 1) return kColumnsApart;
    return p.out_w < kFewestCells * p.factor.up ? kFewCells : nullptr;
}

const char* slower_reassemble_few_nchw(const Problem& p, const Array&) {
    return slower_for_few_channels(p, kFewChannels);
}

const char* slower_grad_masks_few_nchw(const Problem& p, const Array& grad_masks) {
    if (!grad_masks.empty() && grad_masks.stride_w != 1) return kColumnsApart;
    return slower_for_few_channels(p, kFewChannels);
}

// Each mask is an addition to a sum in memory, which the outputs of a cell share.
const char* slower_grad_features_few_nchw(const Problem& p, const Array&) {
    return slower_for_few_channels(p, p.from_logits && p.factor.up >= 2 * p.factor.down ? kFewChannels : 2);
}

const char* slower_reassemble_nhwc(const Problem& p, const Array&) {
    if (few_channels(p)) return kNoVectors;
    return in_lanes(masks_of_window_rows(p)) > kMasksOfTileBytes ? kLargeTile : nullptr;
}

const char* slower_grad_masks_nhwc(const Problem& p, const Array&) { return few_channels(p) ? kNoVectors : nullptr; }

const char* slower_grad_features_nhwc(const Problem& p, const Array&) {
    if (few_channels(p)) return kNoReuse;
    const int64_t rows = ceil_div(rows_around_source_tile(p), p.factor.down) + 1;
    const int64_t columns = ceil_div(columns_around_source_tile(p), p.factor.down) + 1;
    if ((rows * columns * size_of_sum(p) + 64) * masks_of_cell(p) > kMasksOfSourceTileBytes)
        return "the masks of the outputs that touch a few pixels take more than 1 MiB";
    return nullptr;
}

static const char* slower_for_few_lanes(const Problem& p) {
    return p.groups < kFewestChannels && !phases_in_lanes(p) ? kNoVectors : nullptr;
}

const char* slower_reassemble_few_nhwc(const Problem& p, const Array&) { return slower_for_few_lanes(p); }
const char* slower_grad_masks_few_nhwc(const Problem& p, const Array&) { return slower_for_few_lanes(p); }
const char* slower_grad_features_few_nhwc(const Problem& p, const Array&) { return slower_for_few_lanes(p); }

static const char* slower_on_images(const Problem& p, const char* few) {
    if (few_channels(p)) return few;
    return masks_of_cell(p) > kMostMasksOfCell ? kLargeCell : nullptr;
}

const char* slower_reassemble_any(const Problem& p, const Array&) { return slower_on_images(p, kNoVectors); }

// Columns in lanes are deinterleaved if down is 2, and are loaded again for each tap. With 16 registers few products
// share a load. Transposing to pixels costs less, and converts 16 bits only once.
static bool better_in_sharing_runs(const Problem& p, Isa isa) {
    return has_sixteen_registers(isa) && shares_windows(p) && !adjacent(p.features) &&
           p.features.w <= kMostSharedColumns && (p.factor.down == 2 || itemsize(p.features.dtype) == 2);
}

const char* slower_reassemble_runs_any(const Problem& p, const Array&, Isa isa) {
    if (!reads_masks_in_place(p)) {
        if (better_in_sharing_runs(p, isa)) return nullptr;
        if (p.factor.down < kFewestDownOfRuns) return "down is less than 3 and masks are staged";
        if (adjacent(p.features)) return "channels of features are adjacent, so nothing is transposed";
        return p.out_w < kFewestStagedColumns ? "fewer than 8 columns of outputs, of staged masks" : nullptr;
    }
    const bool cheap = adjacent(p.masks) && !adjacent(p.features);
    if (cheap || p.features.c / p.groups <= kMostRunChannels) return nullptr;
    return "the masks of a group would be read again for every 16 of more than 256 channels";
}

const char* slower_grad_masks_any(const Problem& p, const Array&) { return slower_on_images(p, kNoVectors); }

const char* slower_grad_features_any(const Problem& p, const Array&) {
    const int64_t rows = ceil_div(rows_around_source_tile(p), p.factor.down) + 1;
    const int64_t cells = ceil_div(p.features.w + p.kernel_size, p.factor.down) + 1;
    if (rows * cells * masks_of_cell(p) * size_of_sum(p) > kMasksOfRowsBytes)
        return "the masks of the outputs that touch a few rows take more than 768 KiB";
    return slower_on_images(p, kNoReuse);
}

static int64_t columns_of_cells(const Problem& p) { return ceil_div(p.features.w, p.factor.down); }

// Tells if no lane of a vector is unused. Then the gradient of features is faster without pixels, and so is that of
// masks if down is larger than up.
static bool fills_vectors(const Problem& p) { return columns_of_cells(p) % 16 == 0; }

static bool better_in_pixels(const Problem& p) {
    const int64_t columns = columns_of_cells(p), channels = p.features.c / p.groups;
    const int64_t for_column = fills_vectors(p) ? kChannelsForColumnOfFullVectors : kChannelsForColumn;
    return channels >= for_column * columns && channels_of_image(p) >= std::min(channels, kChannelsAtOnce);
}

// The fewer outputs a row of features has, the less they make up for deinterleaving it. Pixels need none of that.
static bool better_in_pixels_than_deinterleaved(const Problem& p) {
    const int64_t columns = columns_of_cells(p), channels = p.features.c / p.groups;
    if (p.factor.up > 1 || p.factor.down == 1 || fills_vectors(p)) return false;
    const int64_t at_once = p.factor.down == 2 ? kChannelsAtOnce : kFewestChannelsAtOnce;
    return channels >= std::max(kFewestChannelsOfPixels, columns / 2) &&
           channels_of_image(p) >= std::min(channels, at_once);
}

// Tells if a kernel that stages images takes a narrow problem, by its answers to the two questions.
using Question = const char* (*)(const Problem&, const Array& result);
static bool better_on_images(Question cannot_run, Question slower, const Problem& p, const Array& result) {
    return better_in_pixels(p) && !cannot_run(p, result) && !slower(p, result);
}

const char* slower_reassemble_nchw(const Problem& p, const Array& output) {
    if (p.factor.up == 1 && p.factor.down == 3 && columns_of_cells(p) >= kCellsToDeinterleaveByThree) return nullptr;
    if (better_on_images(cannot_run_reassemble_any, slower_reassemble_any, p, output)) return kNarrow;
    const bool in_pixels = better_in_pixels_than_deinterleaved(p) && !cannot_run_reassemble_any(p, output) &&
                           !slower_reassemble_any(p, output);
    return in_pixels ? kDeinterleaved : nullptr;
}

static const char* slower_backward_in_columns(const Problem& p) {
    if (p.out_w < kFewestCells * p.factor.up) return kFewCells;
    if (p.kernel_size == 1 && p.grad_output.stride_w != 1) return "kernel_size is 1 and columns are not adjacent";
    return nullptr;
}

const char* slower_grad_features_nchw(const Problem& p, const Array& grad_features) {
    const bool narrow = !fills_vectors(p) &&
                        better_on_images(cannot_run_grad_features_any, slower_grad_features_any, p, grad_features);
    return narrow ? kNarrow : slower_backward_in_columns(p);
}

const char* slower_grad_masks_nchw(const Problem& p, const Array& grad_masks) {
    const bool narrow = !(fills_vectors(p) && p.factor.down > p.factor.up) &&
                        better_on_images(cannot_run_grad_masks_any, slower_grad_masks_any, p, grad_masks);
    return narrow ? kNarrow : slower_backward_in_columns(p);
}

const char* slower_normalize_masks(const Problem& p, const Array&) {
    if (p.logits.w < kFewestCells) return kFewCells;
    return in_lanes(masks_of_cell(p)) > kMasksOfTileBytes ? kLargeTile : nullptr;
}

const char* slower_normalize_masks_backward(const Problem& p, const Array& grad_logits) {
    return slower_normalize_masks(p, grad_logits);
}

}  // namespace carafepp
