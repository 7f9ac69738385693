// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace carafepp {

namespace {

// Each includes the one before it. There are no kernels for sse2: the reference runs.
#if defined(__x86_64__)
constexpr const char* kIsas[] = {"sse2", "avx2", "avx512"};
#define CARAFEPP_ISAS "sse2, avx2 or avx512"
#elif defined(__aarch64__)
constexpr const char* kIsas[] = {"neon"};
#define CARAFEPP_ISAS "neon"
#else
constexpr const char* kIsas[] = {"generic"};
#define CARAFEPP_ISAS "generic"
#endif
constexpr int kIsaCount = sizeof kIsas / sizeof *kIsas;

// Up to which one kernels may run.
struct Limit {
    int isa = kIsaCount - 1;
    char reason[64] = "";  // why those above it may not
    char wrong[160] = "";

    Limit() {
        const char* text = std::getenv("CARAFEPP_ISA");
        if (text == nullptr || *text == '\0') return;
        for (isa = 0; isa < kIsaCount && std::strcmp(text, kIsas[isa]) != 0; isa++) {
        }
        if (isa < kIsaCount) {
            std::snprintf(reason, sizeof reason, "CARAFEPP_ISA allows no more than %s", text);
        } else {
            std::snprintf(wrong, sizeof wrong,
                          "the environment variable CARAFEPP_ISA must be " CARAFEPP_ISAS "; got %.64s.", text);
        }
    }
};

const Limit& limit() {
    static const Limit of_environment;
    return of_environment;
}

[[maybe_unused]] const char* beyond_limit(int isa) { return isa > limit().isa ? limit().reason : nullptr; }

}  // namespace

const char* wrong_isa_limit() { return *limit().wrong ? limit().wrong : nullptr; }

#if defined(__x86_64__)

const char* avx2::unavailable() {
    // No processor has AVX2 without F16C, which clang 14 has no name for.
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has ? beyond_limit(1) : "this processor has no AVX2 with FMA";
}

const char* avx512::unavailable() {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has ? beyond_limit(2) : "this processor has no AVX-512 (F, BW, DQ, VL)";
}

#elif defined(__aarch64__)

const char* neon::unavailable() { return nullptr; }

#else

const char* generic::unavailable() { return nullptr; }

#endif

// Small tables of phases, and the masks of a tile in 512 KiB.
static const char* too_large_for_tiles(const Problem& p) {
    if (p.factor.up > kMaxFactor) return "up is more than 16";
    const int64_t lanes = 16, band_rows = ceil_div(p.factor.up, p.factor.down);
    if (p.taps() * p.factor.up * band_rows * lanes > 128 * 1024) return "the masks of a tile take more than 512 KiB";
    return nullptr;
}

// ---- channels in lanes ----

static const char* cannot_run_reassemble_in_pixels(const Problem& p) {
    if (p.features.c / p.groups < 4) return "too few channels in a group to fill vectors";
    return too_large_for_tiles(p);
}

const char* cannot_run_reassemble_nhwc(const Problem& p, const Array& output) {
    if (p.features.stride_c != 1) return "channels of features are not adjacent";
    if (!output.empty() && output.stride_c != 1) return "channels of the output are not adjacent";
    return cannot_run_reassemble_in_pixels(p);
}

static const char* cannot_run_grad_masks_in_pixels(const Problem& p) {
    if (p.taps() * p.factor.up * p.factor.up * 16 > 96 * 1024) return "the sums of a tile take more than 384 KiB";
    if (p.features.c / p.groups < 4) return "too few channels in a group to fill vectors";
    return too_large_for_tiles(p);
}

const char* cannot_run_grad_masks_nhwc(const Problem& p, const Array&) {
    if (p.features.stride_c != 1) return "channels of features are not adjacent";
    if (p.grad_output.stride_c != 1) return "channels of grad_output are not adjacent";
    return cannot_run_grad_masks_in_pixels(p);
}

static const char* cannot_run_grad_features_in_pixels(const Problem& p) {
    if (p.kernel_size == 1) return "kernel_size is 1";
    if (p.features.c / p.groups < 4) return "too few channels in a group to make up for staging masks";
    if (p.factor.up > kMaxFactor) return "up is more than 16";
    // The window of a block of 3x4 pixels, and what of a cell it may cut; beside it a vector of cells being staged.
    const int64_t rows = ceil_div(p.kernel_size + 2, p.factor.down) + 1;
    const int64_t columns = ceil_div(p.kernel_size + 3, p.factor.down) + 1;
    const int64_t size = p.features.dtype == CARAFEPP_FLOAT64 ? 8 : 4;
    if ((rows * columns * size + 64) * p.factor.up * p.factor.up * p.taps() > 1024 * 1024)
        return "the masks of the outputs that touch a few pixels take more than 1 MiB";
    return nullptr;
}

const char* cannot_run_grad_features_nhwc(const Problem& p, const Array& grad_features) {
    if (!grad_features.empty() && grad_features.stride_c != 1) return "channels of grad_features are not adjacent";
    if (p.grad_output.stride_c != 1) return "channels of grad_output are not adjacent";
    return cannot_run_grad_features_in_pixels(p);
}

// ---- an image at a time ----

// Of scratch memory for its features and output, in pixels.
constexpr int64_t kImageBytes = 1024 * 1024;

static int64_t bytes_of_channel(const Problem& p) {
    // An array without elements may have any shape: in numbers that do not overflow.
    const double pixels = static_cast<double>(p.features.h) * static_cast<double>(p.features.w) +
                          static_cast<double>(p.out_h) * static_cast<double>(p.out_w);
    return static_cast<int64_t>(std::min(pixels * (p.features.dtype == CARAFEPP_FLOAT64 ? 8 : 4), 1e15));
}

int64_t channels_of_image(const Problem& p) {
    constexpr int64_t kLanes = 16;
    const int64_t channels = p.features.c / p.groups, bytes = std::max<int64_t>(bytes_of_channel(p), 1);
    const int64_t most = std::max<int64_t>(kImageBytes / bytes / kLanes - 1, 1) * kLanes;
    const int64_t parts = std::max<int64_t>(ceil_div(channels, most), 1);
    return ceil_div(ceil_div(channels, parts), kLanes) * kLanes;
}

static const char* unfit_for_images(const Problem& p) {
    constexpr int64_t kFewest = 32;  // the padding among them
    if (kFewest * bytes_of_channel(p) > kImageBytes) return "some channels of an image take more than 1 MiB";
    if (p.taps() * p.factor.up * p.factor.up > 1600) return "the masks of a cell are more than 1600";
    return nullptr;
}

const char* cannot_run_reassemble_any(const Problem& p, const Array&) {
    const char* reason = cannot_run_reassemble_in_pixels(p);
    return reason ? reason : unfit_for_images(p);
}

const char* cannot_run_grad_masks_any(const Problem& p, const Array&) {
    if (const char* reason = cannot_run_grad_masks_in_pixels(p)) return reason;
    if (channels_of_image(p) < p.features.c / p.groups) return "all channels of an image take more than 1 MiB";
    return unfit_for_images(p);
}

const char* cannot_run_grad_features_any(const Problem& p, const Array&) {
    if (const char* reason = cannot_run_grad_features_in_pixels(p)) return reason;
    const int64_t size = p.features.dtype == CARAFEPP_FLOAT64 ? 8 : 4,
                  rows = ceil_div(p.kernel_size + 2, p.factor.down);
    const int64_t cells = ceil_div(p.features.w + p.kernel_size, p.factor.down);
    if ((rows + 1) * (cells + 1) * p.factor.up * p.factor.up * p.taps() * size > 768 * 1024)
        return "the masks of the outputs that touch a few rows take more than 768 KiB";
    return unfit_for_images(p);
}

// ---- columns in lanes ----

const char* cannot_run_reassemble_nchw(const Problem& p, const Array&) {
    if (p.factor.up > kMaxFactor || p.factor.down > kMaxFactor) return "up or down is more than 16";
    if (p.taps() * p.factor.up * 16 > 128 * 1024) return "the masks of a row of a tile take more than 512 KiB";
    return nullptr;
}

static const char* unfit_for_columns(const Problem& p) {
    if (p.factor.up > kMaxFactor || p.factor.down > kMaxFactor) return "up or down is more than 16";
    if (p.out_w < 4 * p.factor.up) return "fewer than 4 columns";
    if (p.kernel_size == 1 && p.grad_output.stride_w != 1) return "kernel_size is 1 and columns are not adjacent";
    return nullptr;
}

const char* cannot_run_grad_features_nchw(const Problem& p, const Array&) {
    // A row of them, or of what of it one source row needs, over the cells that a vector of these needs.
    const int64_t size = p.features.dtype == CARAFEPP_FLOAT64 ? 8 : 4, cells_bytes = 3 * 64 + p.kernel_size * size;
    if ((p.from_logits ? p.taps() : p.kernel_size) * p.factor.up * cells_bytes > 1920 * 1024)
        return "the masks of the outputs that touch a row take more than 1920 KiB";
    return unfit_for_columns(p);
}

const char* cannot_run_grad_masks_nchw(const Problem& p, const Array& grad_masks) {
    const int64_t rows = takes_whole_cells(p, grad_masks) ? p.factor.up : 1;
    if (p.taps() * p.factor.up * rows * 16 > 128 * 1024) return "the sums of a tile take more than 512 KiB";
    return unfit_for_columns(p);
}

// ---- normalisers ----

const char* cannot_run_normalize_masks(const Problem& p, const Array&) {
    if (p.logits.w < 4) return "fewer than 4 columns";
    if (p.taps() * p.factor.up * p.factor.up * 16 > 128 * 1024) return "the masks of a tile take more than 512 KiB";
    return nullptr;
}

const char* cannot_run_normalize_masks_backward(const Problem& p, const Array& grad_logits) {
    return cannot_run_normalize_masks(p, grad_logits);
}

// ---- preference ----

// Rows that leave most of a vector unused are slower than pixels, to which images are transposed first: where there are
// at least so many channels for each column. Full vectors leave nothing unused.
constexpr int64_t kChannelsForColumn = 4, kChannelsForColumnOfFullVectors = 8;
constexpr int64_t kChannelsAtOnce = 128;  // or all of them: fewer are not worth the transposition

static bool better_in_pixels(const Problem& p) {
    const int64_t columns = ceil_div(p.features.w, p.factor.down), channels = p.features.c / p.groups;
    const int64_t for_column = columns % 16 == 0 ? kChannelsForColumnOfFullVectors : kChannelsForColumn;
    return channels >= for_column * columns && channels_of_image(p) >= std::min(channels, kChannelsAtOnce);
}

constexpr const char* kNarrow = "rows so narrow, with so many channels, are better transposed to pixels";

const char* slower_reassemble_nchw(const Problem& p, const Array& output) {
    return better_in_pixels(p) && !cannot_run_reassemble_any(p, output) ? kNarrow : nullptr;
}
const char* slower_grad_features_nchw(const Problem& p, const Array& grad_features) {
    return better_in_pixels(p) && !cannot_run_grad_features_any(p, grad_features) ? kNarrow : nullptr;
}
const char* slower_grad_masks_nchw(const Problem& p, const Array& grad_masks) {
    return better_in_pixels(p) && !cannot_run_grad_masks_any(p, grad_masks) ? kNarrow : nullptr;
}

}  // namespace carafepp
