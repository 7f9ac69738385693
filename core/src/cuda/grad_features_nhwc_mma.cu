// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for up x2 with adjacent channels of 16 bits, on tensor cores, in gather form. A warp has a
// tile of 4 x 4 pixels of the result in 64 channels. Of each row of sources whose windows reach them: stage the masks
// of its outputs; multiply those that lead from an output to a pixel, a band matrix, with grad_output, four sources of
// one row of outputs at a time. What of the band is 0 would make NaN of an infinite gradient: where a sum is not finite
// it is computed anew, tap by tap.
#include "cuda/grad_features_mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kTile = 4;  // columns, and rows, of a tile
using TileCut = Cut<kTile, kTile>;

// The fragments of PTX's mma.m16n8k8: of the products, rows are pixels of a tile, columns channels, and what is summed
// over are the two outputs in a row of four sources; lane / 4 is `row` here, lane % 4 is `pair`.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_nhwc_mma_kernel(Arguments arguments, TileCut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;
    constexpr int kTaps = K * K, kRadius = K / 2, kReach = kTile + K - 1;  // sources of a row that reach a tile
    float* const staged = shared_memory<float>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, loaded = channel_of_column(row);
    const int64_t channels_in_group = p.features.c / p.groups;
    const int height = static_cast<int>(p.features.h), sources = cut.strips * kTile + K - 1;
    const float scale = scale_of_masks<T>(p);
    for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
        const TileOfWarp tile = cut.tile(p, item, warp);
        const int64_t n = tile.n, group = tile.group;
        const int first = tile.first, left = tile.left, strip = tile.strip, channels = tile.channels;
        const int top = tile.top, bottom = min(top + kTile, height);
        const int64_t c = group * channels_in_group + tile.in_group;
        const bool exists = channels > 0 && left < p.features.w;
        float sums[kWide][4] = {};
        for (int i = max(top - kRadius, 0); i < min(bottom + kRadius, height); i++) {
            if (i * kUp >= p.out_h || p.out_w == 0) break;
            stage_sources<K, T>(p, n, group, i, first - kRadius, sources, staged);
            clear_cropped<K>(p, i, first - kRadius, sources, staged);
#pragma unroll 1
            for (int step = 0; step < kUp * 2 && exists; step++) {
                const int r = step / 2, out_i = i * kUp + r;  // row of outputs
                const int source = step % 2 * 4 + pair;       // of this lane's outputs
                const int out_j = (left - kRadius + source) * kUp;
                const auto grads = [&](int q) {
                    const bool there = source < kReach && out_i < p.out_h && out_j + q >= 0 && out_j + q < p.out_w &&
                                       loaded < channels;
                    return load_words(element<const T>(p.grad_output, n, c + loaded, out_i, out_j + q), there);
                };
                const Words even = grads(0), odd = grads(1);
                const float* const masks = staged + (strip * kTile + source) * kTaps * kOutputs + r * kUp;
                const int b = row % kTile - source + K - 1;  // the tap that leads to this lane's column of a tile
                uint32_t band[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int a = top + row / kTile + half * 2 - i + kRadius;
                    const bool leads = a >= 0 && a < K && b >= 0 && b < K;
                    const float* const weight = masks + (a * K + b) * kOutputs;
                    band[half] = leads ? pair_of<T>(scale * weight[0], scale * weight[1]) : 0;
                }
                multiply_add<T>(sums, band, even, odd);
            }
            __syncthreads();
        }
        if (!exists) continue;
        // Where pixel and channels of a lane's sums are.
        struct Place {
            int y, x, channel;
        };
        const auto place = [&](int number) {
            return Place{top + row / kTile + number / 2 * 2, left + row % kTile,
                         channel_of_column(2 * pair + number % 2)};
        };
        unsigned not_finite = 0;
#pragma unroll
        for (int number = 0; number < 4; number++) {
            const Place at = place(number);
            if (at.y >= height || at.x >= p.features.w || at.channel >= channels) continue;
            T* const to = element<T>(grad_features, n, c + at.channel, at.y, at.x);
            if (!store_sums<T>(sums, number, 1 / scale, to)) not_finite |= 1u << number;
        }
#pragma unroll 1
        for (int number = 0; not_finite >> number != 0; number++) {
            const Place at = place(number);
            for (int q = 0; q < kWide && (not_finite >> number & 1) != 0; q++) {
                *element<T>(grad_features, n, c + at.channel + q, at.y,
                            at.x) = narrow<T>(feature_tap_by_tap<T>(p, n, group, c + at.channel + q, at.y, at.x));
            }
        }
    }
}

template <int K>
void run(const Problem& p, const Array& grad_features) {
    const TileCut cut(p);
    with_halves(p, [&](auto feature) {
        launch(grad_features_nhwc_mma_kernel<K, decltype(feature)>, cut.items, kThreads,
               (cut.strips * kTile + K - 1) * K * K * kBytesOfTap, p, grad_features, cut);
    });
}

}  // namespace

const char* cannot_run_grad_features_nhwc_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return p.features.dtype == CARAFEPP_BFLOAT16 ? not_compiled_for_bfloat16(grad_features_nhwc_mma_kernel<5, BFloat16>)
                                                 : nullptr;
}

void grad_features_nhwc_mma(const Problem& p, const Array& grad_features) {
    p.kernel_size == 3 ? run<3>(p, grad_features) : run<5>(p, grad_features);
}

}  // namespace carafepp::cuda
