// SPDX-License-Identifier: Apache-2.0
// The gradient of features for down x2 with adjacent channels of 16 bits, in gather form. A block has a tile of quads.
// It stages the masks of all outputs whose windows reach it once. It goes through the channels a slice at a time: it
// copies the slice's gradients of these outputs into shared memory. A thread keeps the K*K masks of a quad in
// registers, and contracts them with some channels.
#include "cuda/down/tile_down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kBlock = 256;             // threads
constexpr int kRows = 8, kColumns = 8;  // quads of a tile
constexpr int kSharers = kBytesOfPixel / kBytesOfCopy;
static_assert(kRows * kColumns * kSharers == kBlock, "a thread for each quad and copy");

// The outputs that reach a tile: their masks [tap][output], and their gradients [output][channel].
template <int K>
struct Tile {
    static constexpr int kHeight = kRows + Reach<K>::kOutputs - 1, kWidth = kColumns + Reach<K>::kOutputs - 1,
                         kOutputs = kHeight * kWidth;
    using MasksOfTile = Masks<K, kHeight, kWidth, (kOutputs + 3) / 4 * 4>;
    static constexpr int64_t kBytes = MasksOfTile::kElements * int64_t{sizeof(float)} +
                                      kOutputs * int64_t{kBytesOfPixel + sizeof(int)};
};

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 2) grad_features_down2_nhwc_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using S = Tile<K>;
    using M = typename S::MasksOfTile;
    using R = Reach<K>;
    constexpr int kChannels = kChannelsOfPixel<T>;
    float* const masks = shared_memory<float>();                  // [tap][output]
    T* const grads = reinterpret_cast<T*>(masks + M::kElements);  // [output][channel]
    int* const places = reinterpret_cast<int*>(grads + S::kOutputs * kChannels);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        const int top = tile.top - R::kBefore, left = tile.left - R::kBefore;
        find_pixels<S::kOutputs, kBlock, T>(
            p.grad_output, [&](int q) { return make_int2(top + q / S::kWidth, left + q % S::kWidth); }, places);
        __syncthreads();
        const T* from = element<const T>(p.grad_output, tile.n, tile.c, 0, 0);
        copy_pixels<S::kOutputs, kBlock>(from, places, tile.channels, grads);
        M::template stage<kBlock, T>(p, tile.n, tile.group, top, left, masks,
                                     [](int row, int column) { return row * S::kWidth + column; });

        const int thread = thread_computed_late(), quad = thread / kSharers;
        const int channel = thread % kSharers * kChannelsOfCopy<T>;
        const int columns = min(kColumns, static_cast<int>(grad_features.w - tile.left * kDown + 1) / kDown);
        const int row = quad / columns, column = quad % columns;
        const int i = (tile.top + row) * kDown, j = (tile.left + column) * kDown;
        const bool has_quad = row < kRows && i < grad_features.h;
        float weights[K * K];
        if (has_quad) {
#pragma unroll
            for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
                for (int x = 0; x < R::kOutputs; x++) {
                    const float* const of_output = masks + (row + y) * S::kWidth + column + x;
                    for_each_tap_of_quad<K>(y, x, [&](int, int t) { weights[t] = of_output[t * M::kApart]; });
                }
            }
        }
        const bool below = i + 1 < grad_features.h, right = j + 1 < grad_features.w;
        T* to = element<T>(grad_features, tile.n, tile.c + channel, i, j);  // [H, W, C]
        const T* const own_grads = grads + (row * S::kWidth + column) * kChannels + channel;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels, to += kChannels) {
            wait_for_copies();
            __syncthreads();
            float4 sums[kFeatures][kVectorsOfWords<T>] = {};
            if (has_quad) {
#pragma unroll
                for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
                    for (int x = 0; x < R::kOutputs; x++) {
                        float4 grad[kVectorsOfWords<T>];
                        widen_words<T>(*reinterpret_cast<const uint4*>(own_grads + (y * S::kWidth + x) * kChannels),
                                       grad);
                        for_each_tap_of_quad<K>(y, x, [&](int feature, int t) {
#pragma unroll
                            for (int v = 0; v < kVectorsOfWords<T>; v++)
                                add_products(weights[t], grad[v], sums[feature][v]);
                        });
                    }
                }
            }
            __syncthreads();
            from += kChannels;
            copy_pixels<S::kOutputs, kBlock>(from, places, channels - kChannels, grads);
            if (!has_quad || channel >= channels) continue;
            store_words(sums[0], to);
            if (right) store_words(sums[1], to + grad_features.stride_w);
            if (below) store_words(sums[2], to + grad_features.stride_h);
            if (below && right) store_words(sums[3], to + grad_features.stride_h + grad_features.stride_w);
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_down2_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (p.features.dtype == CARAFEPP_FLOAT32) return "features are float32";  // kernels for any factor are faster
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_pixels(p, p.grad_output)) return reason;
    return not_for_pixels(p, grad_features);
}

void grad_features_down2_nhwc(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const Tiles plan(p, ceil_div(grad_features.h, kDown), ceil_div(grad_features.w, kDown), kRows, kColumns,
                         kChannelsOfPixel<T>, kEnoughItems);
        launch(grad_features_down2_nhwc_kernel<k, T>, plan.items, kBlock, Tile<k>::kBytes, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
