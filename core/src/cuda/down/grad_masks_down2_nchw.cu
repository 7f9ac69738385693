// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for down x2 with adjacent columns. A block has a tile of 4 x 28 outputs. A thread has
// an output and the one below it, in some channels of each slice: more threads share a pair where rows are short. It
// contracts both windows with their gradients, with all sums in registers. Then the sums of the threads of a pair are
// added, always in the same order.
#include "cuda/down/grad_masks_down2.h"

namespace carafepp::cuda {
namespace {

// A slice: features and gradients as [channel][row][column], of as many channels as two slices fit.
constexpr int kChannels = 6;
template <int K>
struct PlaceOfFeature {
    static constexpr int kChannel = kHeight<K> * kWidth, kElements = kChannels * kChannel;
    __device__ __forceinline__ int operator()(int channel, int row, int column) const {
        return channel * kChannel + row * kWidth + column;
    }
};
struct PlaceOfGrad {
    static constexpr int kChannel = kTileRows * kMostColumns, kElements = kChannels * kChannel;
    __device__ __forceinline__ int operator()(int channel, int row, int column) const {
        return channel * kChannel + row * kMostColumns + column;
    }
};
template <int K>
constexpr int kSlice = PlaceOfFeature<K>::kElements + PlaceOfGrad::kElements;

template <int K>
__global__ void __launch_bounds__(kBlock, 4) grad_masks_down2_nchw_kernel(Arguments arguments, ColumnsDown2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    float* const staged = shared_memory<float>();
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int thread = thread_computed_late();
        const int columns = static_cast<int>(min(int64_t{plan.tiles.columns}, grad_masks.w - tile.left));
        // In half a warp are pairs of one row, or of few: others are in the same banks.
        const int apart = columns > 16 ? 32 : columns > 8 ? 16 : 8;
        const int units = grad_masks.h - tile.top > kPair ? 2 * apart : apart, sharers = kBlock / units;
        const int unit = thread % units, row = unit / apart * kPair, column = unit % apart;
        const int first = column < columns ? thread / units : kChannels;
        float sums[kPair][K * K] = {};
        CopiesOfTile<K, kChannels, kBlock, float, PlaceOfFeature<K>, PlaceOfGrad> copies(p, plan, tile);
        int slice = 0;  // the first element
        copies.copy(tile.channels, staged, staged + PlaceOfFeature<K>::kElements);
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            wait_for_copies();
            __syncthreads();
            float* const next = staged + (kSlice<K> - slice);
            copies.copy(channels - kChannels, next, next + PlaceOfFeature<K>::kElements);
            const float* windows = staged + slice +
                                   PlaceOfFeature<K>()(first, row * kDown, column * kDown + kBefore - 2);
            const float* grads = staged + slice + PlaceOfFeature<K>::kElements + PlaceOfGrad()(first, row, column);
#pragma unroll 1
            for (int q = first; q < min(channels, kChannels); q += sharers) {
                const float grad[kPair] = {grads[0], grads[kMostColumns]};
#pragma unroll
                for (int y = 0; y < K + kDown; y++) {
                    float feature[K + 1];  // from an even column on
#pragma unroll
                    for (int x = 0; x < K + 1; x += 2) {
                        const float2 two = staged_columns(windows + y * kWidth + x);
                        feature[x] = two.x, feature[x + 1] = two.y;
                    }
#pragma unroll
                    for (int o = 0; o < kPair; o++) {
                        const int a = y - kDown * o;
                        if (a < 0 || a >= K) continue;
#pragma unroll
                        for (int b = 0; b < K; b++) sums[o][a * K + b] += grad[o] * feature[b + 2 - K / 2];
                    }
                }
                windows += sharers * PlaceOfFeature<K>::kChannel;
                grads += sharers * PlaceOfGrad::kChannel;
            }
            slice = kSlice<K> - slice;
        }
        __syncthreads();
        float* const own = staged + (row * kMostColumns + column) * K * K;  // [output][tap]
#pragma unroll 1
        for (int sharer = 0; sharer < min(sharers, kChannels); sharer++) {
            if (first == sharer) {
#pragma unroll
                for (int o = 0; o < kPair; o++) {
#pragma unroll
                    for (int t = 0; t < K * K; t++) {
                        float& sum = own[o * kMostColumns * K * K + t];
                        sum = sharer == 0 ? sums[o][t] : sum + sums[o][t];
                    }
                }
            }
            __syncthreads();
        }
        finish_tile<K, kMostColumns, kBlock, float>(p, tile, columns, staged, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_down2_nchw(const Problem& p, const Array&) {
    if (const char* reason = not_for_columns_down2(p)) return reason;
    return p.features.dtype != CARAFEPP_FLOAT32 ? "features are not float32" : nullptr;
}

void grad_masks_down2_nchw(const Problem& p, const Array& grad_masks) {
    const ColumnsDown2Plan plan(p, grad_masks);
    const auto launch_for = [&](auto k) {
        const int64_t bytes = std::max<int64_t>(2 * kSlice<k> * sizeof(float), kBytesOfSums<k, kMostColumns>);
        launch(grad_masks_down2_nchw_kernel<k>, plan.tiles.items, kBlock, bytes, p, grad_masks, plan);
    };
    if (p.kernel_size == 3) {
        launch_for(std::integral_constant<int, 3>());
    } else {
        launch_for(std::integral_constant<int, 5>());
    }
}

}  // namespace carafepp::cuda
