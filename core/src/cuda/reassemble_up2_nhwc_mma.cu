// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent channels of 16 bits, on tensor cores. A warp has four neighbouring sources of a
// row, with windows of K rows of at most eight pixels. Once it builds a band matrix from the staged masks of the 16
// outputs. Then it multiplies the matrix by each row of pixels, 64 channels at a time. A zero of the band makes NaN of
// an infinite feature. Sums that are not finite are computed again, tap by tap.
#include "cuda/mma.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSourcesOfWarp = 4;
static_assert(kSourcesOfWarp + 5 - 1 <= 8, "a product has eight pixels");
constexpr int kChannelsOfStep = 64;                              // of a warp at a time
constexpr int kSourcesOfBlock = kThreads / 32 * kSourcesOfWarp;  // neighbours in a row

// In the products of mma.m16n8k8 rows are outputs, the upper ones first, and columns are channels. The sum is
// over pixels.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_up2_nhwc_mma_kernel(Arguments arguments, TilePlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    constexpr int kTaps = K * K;
    float* const staged = shared_memory<float>();  // [source][tap][output]
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, loaded = channel_of_column(row);
    const int64_t channels_in_group = p.features.c / p.groups;
    const float scale = scale_of_masks<T>(p);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), source_row = divide(tile.quotient, p.features.h),
                       image = divide(source_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = source_row.remainder;
        const int64_t first = tile.remainder * kSourcesOfBlock, j = first + warp * kSourcesOfWarp;
        stage_sources<K, T>(p, n, group, i, first, kSourcesOfBlock, staged);
        clear_staged_outside<K>(p, first, kSourcesOfBlock, staged);
        if (j < p.features.w) {
            const int source = row / kUp;  // of this lane's outputs
            const float* const weights = staged + (warp * kSourcesOfWarp + source) * kTaps * kOutputs + row % kUp;
            uint32_t band[K][2];
#pragma unroll
            for (int a = 0; a < K; a++) {
#pragma unroll
                for (int r = 0; r < kUp; r++)
                    band[a][r] = pair_of_band<K, T>(weights + r * kUp, a, 2 * pair - source, scale);
            }
            // Two pixels of the first row in this lane's first channels.
            const int64_t x = j + 2 * pair - K / 2;
            const bool in_windows = 2 * pair < kSourcesOfWarp + K - 1;
            const bool even_exists = in_windows && x >= 0 && x < p.features.w;
            const bool odd_exists = in_windows && x + 1 >= 0 && x + 1 < p.features.w;
            const T* features = element<const T>(p.features, n, group * channels_in_group + loaded, i - K / 2,
                                                 x);  // [H, W, C]
#pragma unroll 1
            for (int64_t first_channel = 0; first_channel < channels_in_group;
                 first_channel += kChannelsOfStep, features += kChannelsOfStep) {
                const int64_t c = group * channels_in_group + first_channel;
                const int channels = static_cast<int>(min(channels_in_group - first_channel, int64_t{kChannelsOfStep}));
                float sums[kWide][4] = {};
                const T* pixels = features;
#pragma unroll
                for (int a = 0; a < K; a++, pixels += p.features.stride_h) {
                    if (i + a < K / 2 || i + a >= p.features.h + K / 2) continue;
                    multiply_add<T>(sums, band[a], load_words(pixels, even_exists && loaded < channels),
                                    load_words(pixels + p.features.stride_w, odd_exists && loaded < channels));
                }
                // A lane's four stores: two of eight channels in both rows of outputs.
                const int64_t out_j = j * kUp + row;
                const auto channel_of = [&](int k) { return channel_of_column(2 * pair + k % 2); };
                unsigned not_finite = 0;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int64_t out_i = i * kUp + k / 2;
                    if (out_i >= p.out_h || out_j >= p.out_w || channel_of(k) >= channels) continue;
                    T* const to = element<T>(output, n, c + channel_of(k), out_i, out_j);
                    if (!store_sums<T>(sums, k, 1 / scale, to)) not_finite |= 1u << k;
                }
#pragma unroll 1
                for (int k = 0; not_finite >> k != 0; k++) {
                    for (int q = 0; q < kWide && (not_finite >> k & 1) != 0; q++) {
                        const int64_t channel = c + channel_of(k) + q;
                        *element<T>(output, n, channel, i * kUp + k / 2, out_j) = narrow<T>(
                            output_tap_by_tap<K, T>(p, n, channel, i, j + source, weights + k / 2 * kUp));
                    }
                }
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nhwc_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &output})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up2_nhwc_mma_kernel<5, BFloat16>);
}

void reassemble_up2_nhwc_mma(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const int64_t tiles = ceil_div(p.features.w, kSourcesOfBlock);  // of a row
        const TilePlan plan{tiles, output.n * p.groups * p.features.h * tiles};
        launch(reassemble_up2_nhwc_mma_kernel<k, decltype(feature)>, plan.items, kThreads,
               kSourcesOfBlock * k * k * kBytesOfTap, p, output, plan);
    });
}

}  // namespace carafepp::cuda
