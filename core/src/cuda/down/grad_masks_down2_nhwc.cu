// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for down x2 with adjacent channels. A block has a tile of 4 x 14 outputs. Four
// threads have an output and the one below it, and each has four channels of a slice. A thread contracts both windows
// with their gradients, with all sums in registers. Then the threads' sums are added, always in the same order.
#include "cuda/down/grad_masks_down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kThreadsOfPair = kBytesOfPixel / kBytesOfCopy;
// Blocks that the shared memory of a multiprocessor has room for. More of them would have fewer registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksAtOnce = 3;
#else
constexpr int kBlocksAtOnce = 4;
#endif

template <int K>
constexpr int kOwn = (K * K + kThreadsOfPair - 1) / kThreadsOfPair;  // taps of a thread at the end
template <int K>
constexpr int kSums = kOwn<K> * kThreadsOfPair;  // of an output: its taps, and some that stay 0

__device__ __forceinline__ void add_product(float4 a, float4 b, float& sum) {
    sum += a.x * b.x;
    sum += a.y * b.y;
    sum += a.z * b.z;
    sum += a.w * b.w;
}

// Adds up the sums of the threads of a pair. Thread `lane` of them then has those of taps lane, lane + 4 and so on, in
// front. All lanes of a warp call it.
template <int Distance = 1, int Count>
__device__ __forceinline__ void add_up(int lane, float (&sums)[Count]) {
    const bool odd = (lane & Distance) != 0;
#pragma unroll
    for (int k = 0; k < Count / Distance / 2; k++) {
        const float own = odd ? sums[2 * k + 1] : sums[2 * k], others = odd ? sums[2 * k] : sums[2 * k + 1];
        sums[k] = own + __shfl_xor_sync(0xffffffffu, others, Distance);
    }
    if constexpr (2 * Distance < kThreadsOfPair) add_up<2 * Distance>(lane, sums);
}

// A slice has 16 channels of each pixel: [pixel][channel] of features, twice, and of gradients. The pixels of a tile
// with its halo are kWidth in a row. Even columns are in front of odd ones, so that those of neighbouring outputs are
// adjacent: in other banks.
template <int K>
struct Slice {
    static constexpr int kColumns = 14, kOutputs = kTileRows * kColumns;
    static constexpr int kHeight = kDown * (kTileRows - 1) + K, kWidth = kDown * (kColumns - 1) + K,
                         kPixels = kHeight * kWidth, kEven = (kWidth + 1) / 2;
    static constexpr int kChannels = kChannelsOfPixel<float>, kFeatures = kPixels * kChannels;
    static constexpr int64_t kBytes = std::max(
        (2 * kPixels + kOutputs) * int64_t{kBytesOfPixel} + (kPixels + kOutputs) * int64_t{sizeof(int)},
        kBytesOfSums<K, kColumns>);
};

template <int K>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) grad_masks_down2_nhwc_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    using S = Slice<K>;
    constexpr int kUnits = kPairs * S::kColumns;
    static_assert(kUnits * kThreadsOfPair <= kBlock, "the threads have all outputs");
    float* const features = shared_memory<float>();
    float* const grads = features + 2 * S::kFeatures;
    int* const places = reinterpret_cast<int*>(grads + S::kOutputs * S::kChannels);
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        find_pixels<S::kPixels, kBlock, float>(p.features, [&](int q) {
            const int x = q % S::kWidth, column = x < S::kEven ? 2 * x : 2 * (x - S::kEven) + 1;
            return make_int2(tile.top * kDown - K / 2 + q / S::kWidth, tile.left * kDown - K / 2 + column);
        }, places);
        find_pixels<S::kOutputs, kBlock, float>(p.grad_output, [&](int q) {
            return make_int2(tile.top + q / S::kColumns, tile.left + q % S::kColumns);
        }, places + S::kPixels);
        __syncthreads();
        const float* from_features = element<const float>(p.features, tile.n, tile.c, 0, 0);
        const float* from_grads = element<const float>(p.grad_output, tile.n, tile.c, 0, 0);
        const auto copy = [&](int channels, float* slice) {
            copy_pixels<S::kPixels, kBlock>(from_features, places, channels, slice);
            copy_pixels<S::kOutputs, kBlock>(from_grads, places + S::kPixels, channels, grads);
            from_features += S::kChannels;
            from_grads += S::kChannels;
        };
        int slice = 0;  // the first element
        copy(tile.channels, features);
        const int thread = thread_computed_late(), lane = thread % kThreadsOfPair;
        const bool has_unit = thread / kThreadsOfPair < kUnits;
        const int unit = has_unit ? thread / kThreadsOfPair : 0;
        const int row = unit / S::kColumns * kPair, column = unit % S::kColumns;
        const int own_grads = (row * S::kColumns + column) * S::kChannels + lane * kVector;
        const int own_features = (row * kDown * S::kWidth + column) * S::kChannels + lane * kVector;
        float sums[kPair][kSums<K>] = {};
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= S::kChannels) {
            wait_for_copies();
            __syncthreads();
            float4 grad[kPair];
#pragma unroll
            for (int o = 0; o < kPair; o++)
                grad[o] = staged_channels(grads + own_grads + o * S::kColumns * S::kChannels);
            __syncthreads();  // the next gradients take the place of these
            copy(channels - S::kChannels, features + (S::kFeatures - slice));
#pragma unroll
            for (int y = 0; y < K + kDown; y++) {
#pragma unroll
                for (int b = 0; b < K; b++) {
                    const float4 feature = staged_channels(features + slice + own_features +
                                                           (y * S::kWidth + b % 2 * S::kEven + b / 2) * S::kChannels);
#pragma unroll
                    for (int o = 0; o < kPair; o++) {
                        const int a = y - kDown * o;
                        if (a >= 0 && a < K) add_product(grad[o], feature, sums[o][a * K + b]);
                    }
                }
            }
            slice = S::kFeatures - slice;
        }
        __syncthreads();
        float* const staged = shared_memory<float>();  // [output][tap]
#pragma unroll
        for (int o = 0; o < kPair; o++) {
            add_up(lane, sums[o]);
#pragma unroll
            for (int k = 0; k < kOwn<K>; k++) {
                const int tap = k * kThreadsOfPair + lane;
                if (has_unit && tap < K * K) staged[((row + o) * S::kColumns + column) * K * K + tap] = sums[o][k];
            }
        }
        finish_tile<K, S::kColumns, kBlock, float>(p, tile, plan.columns, staged, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_down2_nhwc(const Problem& p, const Array&) {
    if (const char* reason = not_for_grad_masks_down2(p)) return reason;
    if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";
    if (const char* reason = not_for_pixels(p, p.features)) return reason;
    return not_for_pixels(p, p.grad_output);
}

void grad_masks_down2_nhwc(const Problem& p, const Array& grad_masks) {
    const auto launch_for = [&](auto k) {
        using S = Slice<k>;
        const Tiles plan = tiles_in_all_channels(p, grad_masks, S::kColumns, 1);
        launch(grad_masks_down2_nhwc_kernel<k>, plan.items, kBlock, S::kBytes, p, grad_masks, plan);
    };
    if (p.kernel_size == 3) {
        launch_for(std::integral_constant<int, 3>());
    } else {
        launch_for(std::integral_constant<int, 5>());
    }
}

}  // namespace carafepp::cuda
