// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent channels of float32. A block has a tile of outputs, whose masks it stages once.
// It goes through the channels a slice at a time: it copies the slice's features, with their halo, into shared memory
// and contracts them. A thread has some neighbouring outputs in four channels: a feature serves all windows that hold
// it, and a vector of masks all channels.
#include "cuda/down/tile_down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = 8, kColumns = 8;  // outputs of a tile
constexpr int kOutputs = kRows * kColumns;

constexpr int kOwnRows = 4;  // of a thread, in one column
constexpr int kChannels = kChannelsOfPixel<float>, kVectors = kChannels / kVector;
constexpr int kBlock = kOutputs / kOwnRows * kVectors;  // threads

// How threads share a tile of kernel size K.
template <int K>
struct Shares {
    // The features of a tile: even columns first, then odd ones. So those of different threads are adjacent: in other
    // banks.
    static constexpr int kHeight = kDown * (kRows - 1) + K, kEven = (kDown * (kColumns - 1) + K + 1) / kDown,
                         kWidth = kDown * kEven, kPixels = kHeight * kWidth;
    using MasksOfTile = Masks<K, kRows, kColumns, kOutputs + 4>;  // taps begin in other banks
    static constexpr int64_t kBytes = MasksOfTile::kElements * int64_t{sizeof(float)} +
                                      kPixels * int64_t{kBytesOfPixel} + kPixels * int64_t{sizeof(int)};

    // The place of an output's masks: those of a thread's column are adjacent.
    static __device__ __forceinline__ int place(int row, int column) {
        return (row / kOwnRows * kColumns + column) * kOwnRows + row % kOwnRows;
    }
};

// Neighbouring masks.
__device__ __forceinline__ void load_masks_of(const float* from, float (&masks)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    masks[0] = four.x, masks[1] = four.y, masks[2] = four.z, masks[3] = four.w;
}

template <int K>
__global__ void __launch_bounds__(kBlock, 512 / kBlock) reassemble_down2_nhwc_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Shares<K>;
    using M = typename S::MasksOfTile;
    float* const masks = shared_memory<float>();   // [tap][output]
    float* const features = masks + M::kElements;  // [pixel][channel]
    int* const places = reinterpret_cast<int*>(features + S::kPixels * kChannels);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        const int top = tile.top * kDown - K / 2, left = tile.left * kDown - K / 2;
        find_pixels<S::kPixels, kBlock, float>(p.features, [&](int q) {
            const int x = q % S::kWidth;
            return make_int2(top + q / S::kWidth, left + x % S::kEven * kDown + x / S::kEven);
        }, places);
        __syncthreads();
        const float* from = element<const float>(p.features, tile.n, tile.c, 0, 0);
        copy_pixels<S::kPixels, kBlock>(from, places, tile.channels, features);
        M::template stage<kBlock, float>(p, tile.n, tile.group, tile.top, tile.left, masks, S::place);
        M::template clear_outside<kBlock>(p, tile.top, tile.left, masks, S::place);

        const int thread = thread_computed_late(), channel = thread % kVectors * kVector;
        const int columns = static_cast<int>(min(int64_t{kColumns}, p.out_w - tile.left));
        const int row = thread / kVectors / columns * kOwnRows, column = thread / kVectors % columns;
        const int out_i = tile.top + row;
        const bool has_outputs = row < kRows && out_i < p.out_h;
        float* to = element<float>(output, tile.n, tile.c + channel, out_i, tile.left + column);  // [H', W', C]
        const float* const own_masks = masks + row * kColumns + column * kOwnRows;
        const float* const own_features = features + (row * kDown * S::kWidth + column) * kChannels + channel;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels, to += kChannels) {
            wait_for_copies();
            __syncthreads();
            float4 sums[kOwnRows] = {};
            if (has_outputs) {
#pragma unroll
                for (int b = 0; b < K; b++) {
                    const float* const pixels = own_features + (b % kDown * S::kEven + b / kDown) * kChannels;
                    float weights[K][kOwnRows];
#pragma unroll
                    for (int a = 0; a < K; a++) load_masks_of(own_masks + (a * K + b) * M::kApart, weights[a]);
#pragma unroll
                    for (int y = 0; y < kDown * (kOwnRows - 1) + K; y++) {
                        const float4 feature = staged_channels(pixels + y * S::kWidth * kChannels);
#pragma unroll
                        for (int r = 0; r < kOwnRows; r++) {
                            const int a = y - kDown * r;
                            if (a >= 0 && a < K) add_products(weights[a][r], feature, sums[r]);
                        }
                    }
                }
            }
            __syncthreads();
            from += kChannels;
            copy_pixels<S::kPixels, kBlock>(from, places, channels - kChannels, features);
            if (!has_outputs || channel >= channels) continue;
#pragma unroll
            for (int r = 0; r < kOwnRows; r++) {
                if (out_i + r >= p.out_h) continue;
                store_channels(sums[r], to + r * output.stride_h);
            }
        }
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";
    if (const char* reason = not_for_pixels(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_down2_nhwc(const Problem& p, const Array& output) {
    const Tiles plan(p, p.out_h, p.out_w, kRows, kColumns, kChannels, kEnoughItems);
    const auto launch_for = [&](auto k) {
        launch(reassemble_down2_nhwc_kernel<k>, plan.items, kBlock, Shares<k>::kBytes, p, output, plan);
    };
    if (p.kernel_size == 3) {
        launch_for(std::integral_constant<int, 3>());
    } else {
        launch_for(std::integral_constant<int, 5>());
    }
}

}  // namespace carafepp::cuda
