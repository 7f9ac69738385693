// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns. For each row of sources, a block stages the masks of its
// outputs as [source][tap][output]. It transposes both rows of grad_output into shared memory, channels adjacent, and
// adds the products. The uppermost row is then complete. It is written by way of shared memory, so that neighbouring
// threads have neighbouring columns.
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kLanes = 16, kChannelsOfBlock = kLanes * kVector;        // of a block: threads along channels
constexpr int kColumnsOfBlock = kThreads / kLanes * kColumnsOfThread;  // columns of sources of a block

// The staged part of a row of sources: the tile, and the halo whose windows reach into it.
template <int K>
struct Staged {
    static constexpr int kSources = kColumnsOfBlock + K - 1, kMasks = kSources * K * K * kOutputs;
    static constexpr int kOutputColumns = kSources * kUp;
    static constexpr int kPixel = kChannelsOfBlock + 4;  // so that neighbouring pixels are written to different banks
    static constexpr int kRow = kColumnsOfBlock + 1;     // of a channel of the result, likewise
    static_assert(kChannelsOfBlock * kRow <= kOutputColumns * kPixel, "results take the place of gradients");
    static constexpr int64_t kBytes = (kMasks + kOutputColumns * kPixel) * int64_t{sizeof(float)};
};

struct GradFeaturesUp2NchwPlan {
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t channel_blocks;    // of a group
    int64_t items;

    GradFeaturesUp2NchwPlan(const Problem& p, const Array& grad_features) {
        tile_rows = ceil_div(p.features.h, kRowsOfBlock);
        tiles = ceil_div(p.features.w, kColumnsOfBlock);
        channel_blocks = ceil_div(p.features.c / p.groups, kChannelsOfBlock);
        items = grad_features.n * p.groups * tile_rows * tiles * channel_blocks;
    }
};

// grads[column][channel] = grad_output of row out_i, columns out_left and on; 0 where there is none. Ends with a
// barrier.
template <int K, class T>
__device__ void stage_gradients(const Problem& p, int64_t n, int64_t c, int64_t channels, int out_i, int out_left,
                                float* grads) {
    using S = Staged<K>;
    const T* const from = element<const T>(p.grad_output, n, c, out_i, out_left);  // [C, H', W']
    for (int k = static_cast<int>(threadIdx.x); k < S::kOutputColumns * kLanes; k += kThreads) {
        const int column = k % S::kOutputColumns, channel = k / S::kOutputColumns * kVector, out_j = out_left + column;
        const bool inside = out_i < p.out_h && out_j >= 0 && out_j < p.out_w;
        const T* const own = from + channel * p.grad_output.stride_c + column;
        const auto grad = [&](int q) {
            return inside && channel + q < channels ? widen(own[q * p.grad_output.stride_c]) : 0.0f;
        };
        *reinterpret_cast<float4*>(grads + column * S::kPixel + channel) = make_float4(grad(0), grad(1), grad(2),
                                                                                       grad(3));
    }
    __syncthreads();
}

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_features_up2_nchw_kernel(Arguments arguments, GradFeaturesUp2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    constexpr int kRadius = K / 2;
    using S = Staged<K>;
    float* const masks = shared_memory<float>();  // [source][tap][output]
    float* const grads = masks + S::kMasks;       // [column][channel]
    const int channel = static_cast<int>(threadIdx.x) % kLanes * kVector,
              own = static_cast<int>(threadIdx.x) / kLanes * kColumnsOfThread;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles),
                       tile_row = divide(tile.quotient, plan.tile_rows), image = divide(tile_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int first = static_cast<int>(tile.remainder) * kColumnsOfBlock, j = first + own;
        const int64_t in_group = channel_block.remainder * kChannelsOfBlock, c = group * channels_in_group + in_group;
        const int channels = static_cast<int>(min(channels_in_group - in_group, int64_t{kChannelsOfBlock}));
        const bool exists = channel < channels && j < p.features.w;
        const auto add = [&](int i, float4(&sums)[K][kColumnsOfThread]) {
            stage_sources<K, T>(p, n, group, i, first - kRadius, S::kSources, masks);
            clear_cropped_masks<K>(p, i, first - kRadius, S::kSources, masks);
            for (int row = 0; row < kUp; row++) {
                stage_gradients<K, T>(p, n, c, channels, i * kUp + row, (first - kRadius) * kUp, grads);
                if (exists) {
                    const float2* const weights = reinterpret_cast<const float2*>(masks) + own * K * K * kUp + row;
                    const float* const pixels = grads + own * kUp * S::kPixel + channel;
                    const auto load = [&](int x, int q) {
                        return *reinterpret_cast<const float4*>(pixels + (x * kUp + q) * S::kPixel);
                    };
                    add_outputs<K>(weights, kUp, load, sums);
                }
                __syncthreads();
            }
        };
        go_down<K>(p, static_cast<int>(tile_row.remainder) * kRowsOfBlock, add,
                   [&](int i, const float4(&sum)[kColumnsOfThread]) {
            float* const own_rows = grads + channel * S::kRow + own;
#pragma unroll
            for (int s = 0; s < kColumnsOfThread; s++) {
                own_rows[s] = sum[s].x;
                own_rows[S::kRow + s] = sum[s].y;
                own_rows[2 * S::kRow + s] = sum[s].z;
                own_rows[3 * S::kRow + s] = sum[s].w;
            }
            __syncthreads();
            const int column = static_cast<int>(threadIdx.x) % kColumnsOfBlock;
            int q = static_cast<int>(threadIdx.x) / kColumnsOfBlock;
            T* to = element<T>(grad_features, n, c + q, i, first + column);
            for (; q < channels && first + column < p.features.w; q += kThreads / kColumnsOfBlock) {
                *to = narrow<T>(grads[q * S::kRow + column]);
                to += kThreads / kColumnsOfBlock * grad_features.stride_c;
            }
            __syncthreads();
        });
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    return not_for_columns_of_up2(p, p.grad_output, grad_features);
}

void grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const GradFeaturesUp2NchwPlan plan(p, grad_features);
        launch(grad_features_up2_nchw_kernel<k, decltype(feature)>, plan.items, kThreads, Staged<k>::kBytes, p,
               grad_features, plan);
    });
}

}  // namespace carafepp::cuda
