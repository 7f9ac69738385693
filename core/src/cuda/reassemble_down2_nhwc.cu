// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent channels. A block has a tile of outputs, whose masks it stages once. It goes
// through the channels a slice at a time: it copies the slice's features, with their halo, into shared memory and
// contracts them. A thread has some neighbouring outputs in four channels: a feature serves all windows that hold it,
// and a vector of masks all channels.
#include "cuda/tile_down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = 8, kColumns = 8;  // outputs of a tile
constexpr int kOutputs = kRows * kColumns;

// How threads share a tile of kernel size K.
template <int K, class T>
struct Shares {
    static constexpr int kChannels = kChannelsOfPixel<T>, kVectors = kChannels / kVector;
    // Outputs of a thread. Features of 16 bits serve more of them, as they must be widened.
    static constexpr int kOwnRows = 4, kOwnColumns = sizeof(T) == 2 ? 2 : 1;
    static constexpr int kBlock = kOutputs / (kOwnRows * kOwnColumns) * kVectors;  // threads
    // The features of a tile. Columns at the same place of different threads are adjacent: in other banks.
    static constexpr int kStep = kDown * kOwnColumns, kHeight = kDown * (kRows - 1) + K,
                         kOfStep = (kDown * (kColumns - 1) + K + kStep - 1) / kStep, kWidth = kStep * kOfStep,
                         kPixels = kHeight * kWidth;
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

template <int K, class T>
__global__ void __launch_bounds__(Shares<K, T>::kBlock, 512 / Shares<K, T>::kBlock)
    reassemble_down2_nhwc_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Shares<K, T>;
    using M = typename S::MasksOfTile;
    float* const masks = shared_memory<float>();                     // [tap][output]
    T* const features = reinterpret_cast<T*>(masks + M::kElements);  // [pixel][channel]
    int* const places = reinterpret_cast<int*>(features + S::kPixels * S::kChannels);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        const int top = tile.top * kDown - K / 2, left = tile.left * kDown - K / 2;
        find_pixels<S::kPixels, S::kBlock, T>(p.features, [&](int q) {
            const int x = q % S::kWidth;
            return make_int2(top + q / S::kWidth, left + x % S::kOfStep * S::kStep + x / S::kOfStep);
        }, places);
        __syncthreads();
        const T* from = element<const T>(p.features, tile.n, tile.c, 0, 0);
        copy_pixels<S::kPixels, S::kBlock>(from, places, tile.channels, features);
        M::template stage<S::kBlock, T>(p, tile.n, tile.group, tile.top, tile.left, masks, S::place);
        M::template clear_outside<S::kBlock>(p, tile.top, tile.left, masks, S::place);

        const int thread = thread_computed_late(), channel = thread % S::kVectors * kVector;
        const int columns = static_cast<int>(min(int64_t{kColumns}, p.out_w - tile.left));
        const int unit = thread / S::kVectors, units_in_row = (columns + S::kOwnColumns - 1) / S::kOwnColumns;
        const int row = unit / units_in_row * S::kOwnRows, column = unit % units_in_row * S::kOwnColumns;
        const int out_i = tile.top + row;
        const bool has_outputs = row < kRows && out_i < p.out_h;
        T* to = element<T>(output, tile.n, tile.c + channel, out_i, tile.left + column);  // [H', W', C]
        const float* const own_masks = masks + row * kColumns + column * S::kOwnRows;
        const T* const own_features = features + (row * kDown * S::kWidth + column / S::kOwnColumns) * S::kChannels +
                                      channel;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= S::kChannels, to += S::kChannels) {
            wait_for_copies();
            __syncthreads();
            float4 sums[S::kOwnRows][S::kOwnColumns] = {};
            if (has_outputs) {
#pragma unroll
                for (int x = 0; x < kDown * (S::kOwnColumns - 1) + K; x++) {
                    const T* const pixels = own_features + (x % S::kStep * S::kOfStep + x / S::kStep) * S::kChannels;
                    float weights[S::kOwnColumns][K][S::kOwnRows];
#pragma unroll
                    for (int s = 0; s < S::kOwnColumns; s++) {
                        const int b = x - kDown * s;
                        if (b < 0 || b >= K) continue;
#pragma unroll
                        for (int a = 0; a < K; a++)
                            load_masks_of(own_masks + (a * K + b) * M::kApart + s * S::kOwnRows, weights[s][a]);
                    }
#pragma unroll
                    for (int y = 0; y < kDown * (S::kOwnRows - 1) + K; y++) {
                        const float4 feature = staged_channels(pixels + y * S::kWidth * S::kChannels);
#pragma unroll
                        for (int r = 0; r < S::kOwnRows; r++) {
                            const int a = y - kDown * r;
                            if (a < 0 || a >= K) continue;
#pragma unroll
                            for (int s = 0; s < S::kOwnColumns; s++) {
                                if (x >= kDown * s && x < kDown * s + K)
                                    add_products(weights[s][a][r], feature, sums[r][s]);
                            }
                        }
                    }
                }
            }
            __syncthreads();
            from += S::kChannels;
            copy_pixels<S::kPixels, S::kBlock>(from, places, channels - S::kChannels, features);
            if (!has_outputs || channel >= channels) continue;
#pragma unroll
            for (int r = 0; r < S::kOwnRows; r++) {
                if (out_i + r >= p.out_h) continue;
                T* const pixel = to + r * output.stride_h;
#pragma unroll
                for (int s = 0; s < S::kOwnColumns; s++) {
                    if (column + s < columns) store_channels(sums[r][s], pixel + s * output.stride_w);
                }
            }
        }
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_for_pixels(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_down2_nhwc(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const Tiles plan(p, p.out_h, p.out_w, kRows, kColumns, kChannelsOfPixel<T>, kEnoughItems);
        launch(reassemble_down2_nhwc_kernel<k, T>, plan.items, Shares<k, T>::kBlock, Shares<k, T>::kBytes, p, output,
               plan);
    });
}

}  // namespace carafepp::cuda
