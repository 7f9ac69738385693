// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns of 16 bits, on tensor cores. A warp has four neighbouring sources of two
// rows, with windows of K + 1 rows of at most eight pixels. Once it builds a band matrix from the staged masks. Then it
// multiplies each row of pixels by the matrix, 16 channels at a time. A row serves both rows of sources. A zero of the
// band makes NaN of an infinite feature. Sums that are not finite are computed again, tap by tap.
#include "cuda/mma.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kWarps = kThreads / 32;               // of a block
constexpr int kColumnsOfWarp = 4, kRowsOfWarp = 2;  // sources
constexpr int kSourcesOfBlock = kWarps * kColumnsOfWarp * kRowsOfWarp;
constexpr int kChannelsOfMma = 16, kChannelsOfWarp = 8 * kChannelsOfMma;
constexpr int kBefore = 2;  // pixels before the first source, from which on a warp loads
static_assert(kBefore % 2 == 0 && kBefore >= 5 / 2, "loads are of pairs of columns and reach all taps");
static_assert(kBefore + kColumnsOfWarp + 5 / 2 <= 8, "a product has eight pixels");

struct ReassembleUp2NchwMmaPlan {
    int warps_in_row;            // of a block; the others have the rows below
    int64_t block_rows, blocks;  // of an image, of a row
    int64_t channel_blocks;      // of a group
    int64_t items;

    ReassembleUp2NchwMmaPlan(const Problem& p, const Array& output) {
        warps_in_row = kWarps;  // or fewer, if rows are short
        while (warps_in_row > 1 && warps_in_row / 2 * kColumnsOfWarp >= p.features.w) warps_in_row /= 2;
        const int width = warps_in_row * kColumnsOfWarp;
        block_rows = ceil_div(p.features.h, kSourcesOfBlock / width);
        blocks = ceil_div(p.features.w, width);
        channel_blocks = ceil_div(p.features.c / p.groups, kChannelsOfWarp);
        items = output.n * p.groups * block_rows * blocks * channel_blocks;
    }
};

// In the products of mma.m16n8k8 rows are channels, columns are neighbouring outputs; the sum is over pixels.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    reassemble_up2_nchw_mma_kernel(Arguments arguments, ReassembleUp2NchwMmaPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    constexpr int kOfSource = K * K * kOutputs;
    float* const staged = shared_memory<float>();  // [source][tap][output]
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, width = plan.warps_in_row * kColumnsOfWarp,
              height = kSourcesOfBlock / width;
    const int own_row = warp / plan.warps_in_row * kRowsOfWarp, own_column = warp % plan.warps_in_row * kColumnsOfWarp;
    const int64_t channels_in_group = p.features.c / p.groups;
    const float scale = scale_of_masks<T>(p);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       block_column = divide(channel_block.quotient, plan.blocks),
                       block_row = divide(block_column.quotient, plan.block_rows),
                       image = divide(block_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int top = static_cast<int>(block_row.remainder) * height,
                  left = static_cast<int>(block_column.remainder) * width;
        for (int k = 0; k < height && top + k < p.features.h; k++) {
            float* const of_row = staged + k * width * kOfSource;
            stage_sources<K, T>(p, n, group, top + k, left, width, of_row);
            clear_staged_outside<K>(p, left, width, of_row);
        }
        const int i = top + own_row, j = left + own_column;
        if (i < p.features.h && j < p.features.w) {
            // The masks of the first output of a source.
            const auto masks_of = [&](int s, int source) {
                return staged + ((own_row + s) * width + own_column + source) * kOfSource;
            };
            uint32_t band[kRowsOfWarp][K][kUp];  // to this lane's output of each row
            const int source = row / kUp;        // of that output
#pragma unroll
            for (int s = 0; s < kRowsOfWarp; s++) {
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
            const int64_t in_group = channel_block.remainder * kChannelsOfWarp;
            const int channels = static_cast<int>(min(channels_in_group - in_group, int64_t{kChannelsOfWarp}));
            const int64_t c = group * channels_in_group + in_group + row;          // and, with the next eight, c + 8
            const T* features = element<const T>(p.features, n, c, i - K / 2, x);  // [C, H, W]
#pragma unroll 1
            for (int first = 0; first < channels;
                 first += kChannelsOfMma, features += kChannelsOfMma * p.features.stride_c) {
                float sums[kRowsOfWarp][kUp][4] = {};
                const T* pixels = features;
#pragma unroll
                for (int y = 0; y < K + kRowsOfWarp - 1; y++, pixels += p.features.stride_h) {
                    if (i + y < K / 2 || i + y >= p.features.h + K / 2) continue;
                    const bool exist = x >= 0 && x < p.features.w;
                    const uint32_t words[] = {
                        load_word(pixels, exist && first + row < channels),
                        load_word(pixels + 8 * p.features.stride_c, exist && first + row + 8 < channels)};
#pragma unroll
                    for (int s = 0; s < kRowsOfWarp; s++) {
                        if (y - s < 0 || y - s >= K) continue;
#pragma unroll
                        for (int r = 0; r < kUp; r++) multiply_add<T>(sums[s][r], words, band[s][y - s][r]);
                    }
                }
                // A lane's stores: two rows of outputs for each row of sources, two channels for each of these.
                struct Store {
                    int s, r, channel;
                };
                const auto store_at = [&](int number) {
                    return Store{number / (2 * kUp), number / 2 % kUp, first + number % 2 * 8};
                };
                unsigned not_finite = 0;
#pragma unroll
                for (int number = 0; number < 2 * kUp * kRowsOfWarp; number++) {
                    const Store at = store_at(number);
                    const int64_t out_i = int64_t{i + at.s} * kUp + at.r;
                    if (out_i >= p.out_h || out_j >= p.out_w || at.channel + row >= channels) continue;
                    const float* const of = sums[at.s][at.r] + number % 2 * 2;
                    T* const to = element<T>(output, n, c + at.channel, out_i, out_j);
                    if (!store_sums<T>(of, 1 / scale, to)) not_finite |= 1u << number;
                }
#pragma unroll 1
                for (int number = 0; not_finite >> number != 0; number++) {
                    const Store at = store_at(number);
                    for (int q = 0; q < kUp && (not_finite >> number & 1) != 0; q++) {
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

}  // namespace

const char* cannot_run_reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &output})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up2_nchw_mma_kernel<5, BFloat16>);
}

void reassemble_up2_nchw_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const ReassembleUp2NchwMmaPlan plan(p, output);
        launch(reassemble_up2_nchw_mma_kernel<k, decltype(feature)>, plan.items, kThreads,
               kSourcesOfBlock * k * k * kBytesOfTap, p, output, plan);
    });
}

}  // namespace carafepp::cuda
