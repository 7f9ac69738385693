// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels. For each row of sources, a block stages the masks of its
// outputs as [source][tap][output]. A loaded vector of grad_output serves all rows that the windows reach. The
// uppermost of these rows is then complete, and is written.
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

struct GradFeaturesUp2NhwcPlan {
    int lanes, columns;        // of a block: threads along channels, columns of sources
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t channel_blocks;    // of a group
    int64_t items;
    int64_t shared_bytes;

    GradFeaturesUp2NhwcPlan(const Problem& p, const Array& grad_features, int k) {
        const int64_t channels_in_group = p.features.c / p.groups;
        const Lanes block(channels_in_group, kColumnsOfThread, k * k * kBytesOfTap, k - 1);
        lanes = block.lanes;
        columns = block.columns;
        tile_rows = ceil_div(p.features.h, kRowsOfBlock);
        tiles = ceil_div(p.features.w, columns);
        channel_blocks = ceil_div(channels_in_group, lanes * kVector);
        items = grad_features.n * p.groups * tile_rows * tiles * channel_blocks;
        shared_bytes = block.shared_bytes;
    }
};

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_features_up2_nhwc_kernel(Arguments arguments, GradFeaturesUp2NhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    constexpr int kTaps = K * K, kRadius = K / 2;
    float* const staged = shared_memory<float>();  // [source][tap][output]
    const int lane = static_cast<int>(threadIdx.x) % plan.lanes,
              own = static_cast<int>(threadIdx.x) / plan.lanes * kColumnsOfThread;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles),
                       tile_row = divide(tile.quotient, plan.tile_rows), image = divide(tile_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int first = static_cast<int>(tile.remainder) * plan.columns, j = first + own, left = j - kRadius;
        const int64_t in_group = (channel_block.remainder * plan.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        const bool exists = in_group < channels_in_group && j < p.features.w;
        const auto add = [&](int i, float4(&sums)[K][kColumnsOfThread]) {
            stage_sources<K, T>(p, n, group, i, first - kRadius, plan.columns + K - 1, staged);
            clear_cropped_masks<K>(p, i, first - kRadius, plan.columns + K - 1, staged);
            if (exists) {
                const bool two_rows = i * kUp + 1 < p.out_h;
                const T* const grads = element<const T>(p.grad_output, n, c, i * kUp, left * kUp);  // [H', W', C]
                const auto load = [&](int x, int output) {
                    const int row = output / kUp, column = x * kUp + output % kUp, out_j = left * kUp + column;
                    const bool exist = (row == 0 || two_rows) && out_j >= 0 && out_j < p.out_w;
                    return load_channels(grads + row * p.grad_output.stride_h + column * p.grad_output.stride_w, exist);
                };
                add_outputs<K>(reinterpret_cast<const float4*>(staged) + own * kTaps, 1, load, sums);
            }
            __syncthreads();
        };
        go_down<K>(p, static_cast<int>(tile_row.remainder) * kRowsOfBlock, add,
                   [&](int i, const float4(&sum)[kColumnsOfThread]) {
#pragma unroll
            for (int s = 0; s < kColumnsOfThread; s++) {
                if (exists && j + s < p.features.w) store_channels(sum[s], element<T>(grad_features, n, c, i, j + s));
            }
        });
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, grad_features);
}

void grad_features_up2_nhwc(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const GradFeaturesUp2NhwcPlan plan(p, grad_features, k);
        launch(grad_features_up2_nhwc_kernel<k, decltype(feature)>, plan.items, kThreads, plan.shared_bytes, p,
               grad_features, plan);
    });
}

}  // namespace carafepp::cuda
