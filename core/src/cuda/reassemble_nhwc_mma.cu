// SPDX-License-Identifier: Apache-2.0
//
// The forward for up x2 with adjacent channels of 16 bits, on tensor cores. A warp has four neighbouring sources of a
// row, whose windows together are K rows of at most eight pixels. For each of these rows it multiplies the masks of the
// 16 outputs, a band matrix that is built once from those staged, with the features of the eight pixels, 64 channels at
// a time. What of the band is 0 would make NaN of an infinite feature: where a sum is not finite it is computed anew,
// tap by tap.
#include "cuda/mma.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSources = 4;                                // of a warp
constexpr int kChannels = 64;                              // of a warp at a time
constexpr int kSourcesOfBlock = kThreads / 32 * kSources;  // neighbours in a row

struct Cut {
    int64_t tiles;  // of sources in a row
};

// The fragments of PTX's mma.m16n8k8: of the products, rows are outputs (those of the upper row first), columns
// channels, and what is summed over pixels; lane / 4 is `row` here, lane % 4 is `pair`.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_nhwc_mma_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;
    constexpr int kTaps = K * K;
    float* const staged = shared_memory<float>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, loaded = channel_of_column(row);
    const int64_t channels_in_group = p.features.c / p.groups;
    const float scale = scale_of_masks<T>(p);
    const int64_t items = output.n * p.groups * p.features.h * cut.tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, cut.tiles), source_row = divide(tile.quotient, p.features.h),
                       image = divide(source_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = source_row.remainder;
        const int64_t first = tile.remainder * kSourcesOfBlock, j = first + warp * kSources;
        stage_sources<K, T>(p, n, group, i, first, kSourcesOfBlock, staged);
        clear_outside<K>(p, first, kSourcesOfBlock, staged);
        if (j < p.features.w) {
            const int source = row / kUp;  // of this lane's outputs
            const float* const weights = staged + (warp * kSources + source) * kTaps * kOutputs + row % kUp;
            uint32_t band[K][2];
#pragma unroll
            for (int a = 0; a < K; a++) {
#pragma unroll
                for (int r = 0; r < kUp; r++)
                    band[a][r] = pair_of_band<K, T>(weights + r * kUp, a, 2 * pair - source, scale);
            }
            // Two pixels of the first row in this lane's first channels.
            const int64_t x = j + 2 * pair - K / 2;
            const bool in_windows = 2 * pair < kSources + K - 1;
            const bool even_exists = in_windows && x >= 0 && x < p.features.w;
            const bool odd_exists = in_windows && x + 1 >= 0 && x + 1 < p.features.w;
            const T* features = element<const T>(p.features, n, group * channels_in_group + loaded, i - K / 2, x);
#pragma unroll 1
            for (int64_t first_channel = 0; first_channel < channels_in_group;
                 first_channel += kChannels, features += kChannels) {
                const int64_t c = group * channels_in_group + first_channel;
                const int channels = static_cast<int>(min(channels_in_group - first_channel, int64_t{kChannels}));
                float sums[kWide][4] = {};
                const T* pixels = features;
#pragma unroll
                for (int a = 0; a < K; a++, pixels += p.features.stride_h) {
                    if (i + a < K / 2 || i + a >= p.features.h + K / 2) continue;
                    multiply_add<T>(sums, band[a], load_words(pixels, even_exists && loaded < channels),
                                    load_words(pixels + p.features.stride_w, odd_exists && loaded < channels));
                }
                // The four pieces of a lane's sums: of two rows of outputs, each eight channels twice.
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

template <int K>
void run(const Problem& p, const Array& output) {
    const Cut cut{ceil_div(p.features.w, kSourcesOfBlock)};
    with_halves(p, [&](auto feature) {
        launch(reassemble_nhwc_mma_kernel<K, decltype(feature)>, output.n * p.groups * p.features.h * cut.tiles,
               kThreads, kSourcesOfBlock * K * K * kBytesOfTap, p, output, cut);
    });
}

}  // namespace

const char* cannot_run_reassemble_nhwc_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &output})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return p.features.dtype == CARAFEPP_BFLOAT16 ? not_compiled_for_bfloat16(reassemble_nhwc_mma_kernel<5, BFloat16>)
                                                 : nullptr;
}

void reassemble_nhwc_mma(const Problem& p, const Array& output) {
    p.kernel_size == 3 ? run<3>(p, output) : run<5>(p, output);
}

}  // namespace carafepp::cuda
