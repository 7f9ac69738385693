// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns of 16 bits, on tensor cores, in gather form. A warp has a
// tile of 2 x 8 pixels of the result in 64 channels. It goes through the rows of sources whose windows reach the tile,
// and the block stages their masks. The masks that lead from outputs to pixels are a band matrix. The warp multiplies
// grad_output by it, 16 channels and four sources of one row of outputs at a time. A zero of the band makes NaN of an
// infinite gradient. Sums that are not finite are computed again, tap by tap.
#include "cuda/grad_features_mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kTileColumns = 8, kTileRows = 2;  // columns and rows of a tile
constexpr int kChannelsOfMma = 16;
using Plan = GradFeaturesMmaPlan<kTileColumns, kTileRows>;

// In the products of mma.m16n8k8 rows are channels, columns are pixels of a row of the tile. The sum is over the two
// outputs in a row of four sources.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_up2_nchw_mma_kernel(Arguments arguments, Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;                                // [N, C, H, W]
    constexpr int kTaps = K * K, kRadius = K / 2, kReach = kTileColumns + K - 1;  // sources of a row that reach a tile
    constexpr int kSteps = (kReach + 3) / 4;                                      // of four of them
    float* const staged = shared_memory<float>();                                 // [source][tap][output]
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int height = static_cast<int>(p.features.h), sources = plan.warps_in_row * kTileColumns + K - 1;
    const float scale = scale_of_masks<T>(p);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfWarp tile = plan.tile(p, item, warp);
        const int64_t n = tile.n, group = tile.group;
        const int first = tile.first, left = tile.left, warp_in_row = tile.warp_in_row, channels = tile.channels;
        const int top = tile.top, bottom = min(top + kTileRows, height);
        const int64_t c = group * channels_in_group + tile.in_group + row;  // and, with the next eight, c + 8
        const bool exists = channels > 0 && left < p.features.w;
        float sums[kChannelsOfWarp / kChannelsOfMma][kTileRows][4] = {};
        for (int i = max(top - kRadius, 0); i < min(bottom + kRadius, height); i++) {
            if (i * kUp >= p.out_h || p.out_w == 0) break;
            stage_sources<K, T>(p, n, group, i, first - kRadius, sources, staged);
            clear_cropped_masks<K>(p, i, first - kRadius, sources, staged);
#pragma unroll 1
            for (int step = 0; step < kUp * kSteps && exists; step++) {
                const int r = step / kSteps, out_i = i * kUp + r;  // row of outputs
                const int source = step % kSteps * 4 + pair;       // of this lane's outputs
                const int out_j = (left - kRadius + source) * kUp;
                const float* const masks = staged + (warp_in_row * kTileColumns + source) * kTaps * kOutputs + r * kUp;
                const int b = row - source + K - 1;  // the tap that leads to this lane's column of a tile
                uint32_t band[kTileRows];
#pragma unroll
                for (int y = 0; y < kTileRows; y++) {
                    const int a = top + y - i + kRadius;
                    const bool leads = a >= 0 && a < K && b >= 0 && b < K;
                    const float* const weight = masks + (a * K + b) * kOutputs;
                    band[y] = leads ? pair_of<T>(scale * weight[0], scale * weight[1]) : 0;
                }
                const bool there = source < kReach && out_i < p.out_h && out_j >= 0 && out_j < p.out_w;
                const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);  // [C, H', W']
#pragma unroll
                for (int q = 0; q < kChannelsOfWarp / kChannelsOfMma;
                     q++, grads += kChannelsOfMma * p.grad_output.stride_c) {
                    const int channel = q * kChannelsOfMma + row;
                    const uint32_t words[] = {
                        load_word(grads, there && channel < channels),
                        load_word(grads + 8 * p.grad_output.stride_c, there && channel + 8 < channels)};
#pragma unroll
                    for (int y = 0; y < kTileRows; y++) multiply_add<T>(sums[q][y], words, band[y]);
                }
            }
            __syncthreads();
        }
        if (!exists) continue;
        // A lane's stores, of two columns each: two of every 16 channels, in both rows.
        constexpr int kStores = kChannelsOfWarp / kChannelsOfMma * 2 * kTileRows;
        const int x = left + 2 * pair;
        struct Store {
            int channel, y;
        };
        const auto store_at = [&](int number) {
            return Store{number / (2 * kTileRows) * kChannelsOfMma + number % 2 * 8, top + number / 2 % kTileRows};
        };
        unsigned not_finite = 0;
#pragma unroll
        for (int number = 0; number < kStores; number++) {
            const Store at = store_at(number);
            if (at.y >= height || x >= p.features.w || at.channel + row >= channels) continue;
            const float* const of = sums[number / (2 * kTileRows)][number / 2 % kTileRows] + number % 2 * 2;
            T* const to = element<T>(grad_features, n, c + at.channel, at.y, x);
            if (!store_sums<T>(of, 1 / scale, to)) not_finite |= 1u << number;
        }
#pragma unroll 1
        for (int number = 0; not_finite >> number != 0; number++) {
            const Store at = store_at(number);
            for (int q = 0; q < 2 && (not_finite >> number & 1) != 0; q++) {
                *element<T>(grad_features, n, c + at.channel, at.y,
                            x + q) = narrow<T>(feature_tap_by_tap<T>(p, n, group, c + at.channel, at.y, x + q));
            }
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return not_compiled_for_bfloat16(p, grad_features_up2_nchw_mma_kernel<5, BFloat16>);
}

void grad_features_up2_nchw_mma(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const Plan plan(p);
        launch(grad_features_up2_nchw_mma_kernel<k, decltype(feature)>, plan.items, kThreads,
               (plan.warps_in_row * kTileColumns + k - 1) * k * k * kBytesOfTap, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
