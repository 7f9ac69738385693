// SPDX-License-Identifier: Apache-2.0
//
// The forward for up x2 with adjacent columns of 16 bits, on tensor cores. A warp has four neighbouring sources of two
// rows, whose windows together are K + 1 rows of at most eight pixels. For each of these rows it multiplies the
// features of the eight pixels, 16 channels at a time, with the masks of the outputs, a band matrix that is built once
// from those staged: a row of features that is loaded serves both rows of sources. What of the band is 0 would make NaN
// of an infinite feature: where a sum is not finite it is computed anew, tap by tap.
#include "cuda/mma.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kWarps = kThreads / 32;                 // of a block, in a row or in the rows below
constexpr int kStrip = 4, kRows = 2;                  // sources of a warp
constexpr int kSources = kWarps * kStrip * kRows;     // of a block
constexpr int kAtOnce = 16, kChannels = 8 * kAtOnce;  // of a warp: at a time, and altogether
constexpr int kBefore = 2;                            // pixels that a strip's patch begins before it: an even number

struct Cut {
    int strips;                     // of a block, beside each other
    int64_t columns, rows, chunks;  // of blocks in a row, of rows of blocks in an image, of channels in a group
};

// The fragments of PTX's mma.m16n8k8: of the products, rows are channels, columns outputs beside each other, and what
// is summed over pixels; lane / 4 is `row` here, lane % 4 is `pair`.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_nchw_mma_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;
    constexpr int kOfSource = K * K * kOutputs;
    float* const staged = shared_memory<float>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, width = cut.strips * kStrip, height = kSources / width;
    const int own_row = warp / cut.strips * kRows, own_column = warp % cut.strips * kStrip;
    const int64_t channels_in_group = p.features.c / p.groups;
    const float scale = scale_of_masks<T>(p);
    const int64_t items = output.n * p.groups * cut.rows * cut.columns * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), block_column = divide(chunk.quotient, cut.columns),
                       block_row = divide(block_column.quotient, cut.rows),
                       image = divide(block_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int top = static_cast<int>(block_row.remainder) * height,
                  left = static_cast<int>(block_column.remainder) * width;
        for (int k = 0; k < height && top + k < p.features.h; k++) {
            float* const of_row = staged + k * width * kOfSource;
            stage_sources<K, T>(p, n, group, top + k, left, width, of_row);
            clear_outside<K>(p, left, width, of_row);
        }
        const int i = top + own_row, j = left + own_column;
        if (i < p.features.h && j < p.features.w) {
            // The masks of the first output of a source.
            const auto masks_of = [&](int s, int source) {
                return staged + ((own_row + s) * width + own_column + source) * kOfSource;
            };
            uint32_t band[kRows][K][kUp];  // to this lane's output of each row
            const int source = row / kUp;  // of that output
#pragma unroll
            for (int s = 0; s < kRows; s++) {
#pragma unroll
                for (int a = 0; a < K; a++) {
#pragma unroll
                    for (int r = 0; r < kUp; r++) {
                        band[s][a][r] = i + s < p.features.h
                                            ? pair_of_band<K, T>(masks_of(s, source) + r * kUp + row % kUp, a,
                                                                 2 * pair - source - (kBefore - K / 2), scale)
                                            : 0;
                    }
                }
            }
            const int x = j + 2 * pair - kBefore, out_j = (j + pair) * kUp;
            const int64_t in_group = chunk.remainder * kChannels;
            const int channels = static_cast<int>(min(channels_in_group - in_group, int64_t{kChannels}));
            const int64_t c = group * channels_in_group + in_group + row;  // and, with the next eight, c + 8
            const T* features = element<const T>(p.features, n, c, i - K / 2, x);
#pragma unroll 1
            for (int first = 0; first < channels; first += kAtOnce, features += kAtOnce * p.features.stride_c) {
                float sums[kRows][kUp][4] = {};
                const T* pixels = features;
#pragma unroll
                for (int y = 0; y < K + kRows - 1; y++, pixels += p.features.stride_h) {
                    if (i + y < K / 2 || i + y >= p.features.h + K / 2) continue;
                    const bool exist = x >= 0 && x < p.features.w;
                    const uint32_t words[] = {
                        load_word(pixels, exist && first + row < channels),
                        load_word(pixels + 8 * p.features.stride_c, exist && first + row + 8 < channels)};
#pragma unroll
                    for (int s = 0; s < kRows; s++) {
                        if (y - s < 0 || y - s >= K) continue;
#pragma unroll
                        for (int r = 0; r < kUp; r++) multiply_add<T>(sums[s][r], words, band[s][y - s][r]);
                    }
                }
                // The pieces of a lane's sums: of each row of sources two rows of outputs, of each of these two
                // channels.
                struct Place {
                    int s, r, channel;
                };
                const auto place = [&](int piece) {
                    return Place{piece / (2 * kUp), piece / 2 % kUp, first + piece % 2 * 8};
                };
                unsigned not_finite = 0;
#pragma unroll
                for (int piece = 0; piece < 2 * kUp * kRows; piece++) {
                    const Place at = place(piece);
                    const int64_t out_i = int64_t{i + at.s} * kUp + at.r;
                    if (out_i >= p.out_h || out_j >= p.out_w || at.channel + row >= channels) continue;
                    const float* const of = sums[at.s][at.r] + piece % 2 * 2;
                    T* const to = element<T>(output, n, c + at.channel, out_i, out_j);
                    if (!store_sums<T>(of, 1 / scale, to)) not_finite |= 1u << piece;
                }
#pragma unroll 1
                for (int piece = 0; not_finite >> piece != 0; piece++) {
                    const Place at = place(piece);
                    for (int q = 0; q < kUp && (not_finite >> piece & 1) != 0; q++) {
                        *element<T>(output, n, c + at.channel, int64_t{i + at.s} * kUp + at.r, out_j + q) = narrow<T>(
                            output_tap_by_tap<K, T>(p, n, c + at.channel, i + at.s, j + pair,
                                                    masks_of(at.s, pair) + at.r * kUp + q));
                    }
                }
            }
        }
        __syncthreads();
    }
}

template <int K>
void run(const Problem& p, const Array& output) {
    Cut cut;
    cut.strips = kWarps;  // or fewer, where rows are short
    while (cut.strips > 1 && cut.strips / 2 * kStrip >= p.features.w) cut.strips /= 2;
    cut.columns = ceil_div(p.features.w, cut.strips * kStrip);
    cut.rows = ceil_div(p.features.h, kSources / (cut.strips * kStrip));
    cut.chunks = ceil_div(p.features.c / p.groups, kChannels);
    with_halves(p, [&](auto feature) {
        launch(reassemble_nchw_mma_kernel<K, decltype(feature)>,
               output.n * p.groups * cut.rows * cut.columns * cut.chunks, kThreads, kSources * K * K * kBytesOfTap, p,
               output, cut);
    });
}

}  // namespace

const char* cannot_run_reassemble_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &output})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return p.features.dtype == CARAFEPP_BFLOAT16 ? not_compiled_for_bfloat16(reassemble_nchw_mma_kernel<5, BFloat16>)
                                                 : nullptr;
}

void reassemble_nchw_mma(const Problem& p, const Array& output) {
    p.kernel_size == 3 ? run<3>(p, output) : run<5>(p, output);
}

}  // namespace carafepp::cuda
