// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels of 16 bits, on tensor cores, in gather form. A warp has a
// tile of 4 x 4 pixels of the result in 64 channels. It goes through the rows of sources whose windows reach the tile,
// and the block stages their masks. The masks that lead from outputs to pixels are a band matrix. The warp multiplies
// it by grad_output, four sources of one row of outputs at a time. A zero of the band makes NaN of an infinite
// gradient. Sums that are not finite are computed again, tap by tap.
#include "cuda/grad_features_mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kTileSize = 4;  // columns, and rows, of a tile
using Plan = GradFeaturesMmaPlan<kTileSize, kTileSize>;

// In the products of mma.m16n8k8 rows are pixels of the tile, columns are channels. The sum is over the two outputs in
// a row of four sources.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_up2_nhwc_mma_kernel(Arguments arguments, Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;                             // [N, C, H, W]
    constexpr int kTaps = K * K, kRadius = K / 2, kReach = kTileSize + K - 1;  // sources of a row that reach a tile
    float* const staged = shared_memory<float>();                              // [source][tap][output]
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4, loaded = channel_of_column(row);
    const int64_t channels_in_group = p.features.c / p.groups;
    const int height = static_cast<int>(p.features.h), sources = plan.warps_in_row * kTileSize + K - 1;
    const float scale = scale_of_masks<T>(p);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfWarp tile = plan.tile(p, item, warp);
        const int64_t n = tile.n, group = tile.group;
        const int first = tile.first, left = tile.left, warp_in_row = tile.warp_in_row, channels = tile.channels;
        const int top = tile.top, bottom = min(top + kTileSize, height);
        const int64_t c = group * channels_in_group + tile.in_group;
        const bool exists = channels > 0 && left < p.features.w;
        float sums[kWide][4] = {};
        for (int i = max(top - kRadius, 0); i < min(bottom + kRadius, height); i++) {
            if (i * kUp >= p.out_h || p.out_w == 0) break;
            stage_sources<K, T>(p, n, group, i, first - kRadius, sources, staged);
            clear_cropped_masks<K>(p, i, first - kRadius, sources, staged);
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
                const float* const masks = staged + (warp_in_row * kTileSize + source) * kTaps * kOutputs + r * kUp;
                const int b = row % kTileSize - source + K - 1;  // the tap that leads to this lane's column of a tile
                uint32_t band[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int a = top + row / kTileSize + half * 2 - i + kRadius;
                    const bool leads = a >= 0 && a < K && b >= 0 && b < K;
                    const float* const weight = masks + (a * K + b) * kOutputs;
                    band[half] = leads ? pair_of<T>(scale * weight[0], scale * weight[1]) : 0;
                }
                multiply_add<T>(sums, band, even, odd);
            }
            __syncthreads();
        }
        if (!exists) continue;
        // A lane's vectors of sums: pixel and first channel.
        struct Store {
            int y, x, channel;
        };
        const auto store_at = [&](int number) {
            return Store{top + row / kTileSize + number / 2 * 2, left + row % kTileSize,
                         channel_of_column(2 * pair + number % 2)};
        };
        unsigned not_finite = 0;
#pragma unroll
        for (int number = 0; number < 4; number++) {
            const Store at = store_at(number);
            if (at.y >= height || at.x >= p.features.w || at.channel >= channels) continue;
            T* const to = element<T>(grad_features, n, c + at.channel, at.y, at.x);
            if (!store_sums<T>(sums, number, 1 / scale, to)) not_finite |= 1u << number;
        }
#pragma unroll 1
        for (int number = 0; not_finite >> number != 0; number++) {
            const Store at = store_at(number);
            for (int q = 0; q < kWide && (not_finite >> number & 1) != 0; q++) {
                *element<T>(grad_features, n, c + at.channel + q, at.y,
                            at.x) = narrow<T>(feature_tap_by_tap<T>(p, n, group, c + at.channel + q, at.y, at.x));
            }
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, grad_features_up2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const Plan plan(p);
        launch(grad_features_up2_nhwc_mma_kernel<k, decltype(feature)>, plan.items, kThreads,
               (plan.warps_in_row * kTileSize + k - 1) * k * k * kBytesOfTap, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
