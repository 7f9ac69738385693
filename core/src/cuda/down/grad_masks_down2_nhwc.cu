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

template <int K>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) grad_masks_down2_nhwc_kernel(Arguments arguments, Tiles plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    using S = SliceOfPixels<K, float>;
    constexpr int kUnits = kPairs * S::kColumns, kEven = (S::kWidth + 1) / 2;
    static_assert(kUnits * kThreadsOfPair <= kBlock, "the threads have all outputs");
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        const int thread = thread_computed_late(), lane = thread % kThreadsOfPair;
        const bool has_unit = thread / kThreadsOfPair < kUnits;
        const int unit = has_unit ? thread / kThreadsOfPair : 0;
        const int row = unit / S::kColumns * kPair, column = unit % S::kColumns;
        const int own_grads = (row * S::kColumns + column) * S::kChannels + lane * kVector;
        const int own_features = (row * kDown * S::kWidth + column) * S::kChannels + lane * kVector;
        float sums[kPair][kSums<K>] = {};
        float4 grad[kPair];
        // Even columns are in front of odd ones, so that those of neighbouring outputs are adjacent: in other banks.
        for_each_slice_of_pixels<K, float>(p, tile, [](int x) { return x < kEven ? 2 * x : 2 * (x - kEven) + 1; },
                                           [&](const float* grads) {
#pragma unroll
            for (int o = 0; o < kPair; o++)
                grad[o] = staged_channels(grads + own_grads + o * S::kColumns * S::kChannels);
        }, [&](const float* features) {
#pragma unroll
            for (int y = 0; y < K + kDown; y++) {
#pragma unroll
                for (int b = 0; b < K; b++) {
                    const float4 feature = staged_channels(features + own_features +
                                                           (y * S::kWidth + b % 2 * kEven + b / 2) * S::kChannels);
#pragma unroll
                    for (int o = 0; o < kPair; o++) {
                        const int a = y - kDown * o;
                        if (a >= 0 && a < K) add_product(grad[o], feature, sums[o][a * K + b]);
                    }
                }
            }
        });
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
        using S = SliceOfPixels<k, float>;
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
