// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for down x2 with adjacent channels. Eight threads have an output and the one below
// it, and each has four of every 32 channels. A thread contracts both windows with their gradients, with all sums in
// registers. Then the threads' sums are added, always in the same order, and each thread holds every eighth tap. They
// carry these through the normaliser and write them.
#include "cuda/channels.h"
#include "cuda/down2.h"
#include "cuda/grad_masks.h"

namespace carafepp::cuda {
namespace {

constexpr int kThreadsOfPair = kNormalizers;
constexpr int kPairs = kBlock / kThreadsOfPair;  // of a block

template <int K>
constexpr int kSums = kOwnTaps<K> * kThreadsOfPair;  // of an output: its taps, and some that stay 0

__device__ __forceinline__ void add_product(float4 a, float4 b, float& sum) {
    sum += a.x * b.x;
    sum += a.y * b.y;
    sum += a.z * b.z;
    sum += a.w * b.w;
}

// sums[output][tap] += grad_output * features, over every eighth four of `channels`.
template <int K, class T>
__device__ __forceinline__ void sum_pair_in_lane(const Problem& p, int64_t n, int64_t c, int64_t channels, int out_i,
                                                 int out_j, float (&sums)[kPair][kSums<K>]) {
    const int top = out_i * kDown - K / 2, left = out_j * kDown - K / 2, last = static_cast<int>(p.features.w) - 1;
    const T* windows = element<const T>(p.features, n, c, top, left);      // [H, W, C]
    const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);  // [H', W', C]
    const bool two_rows = out_i + 1 < p.out_h;
#pragma unroll 1
    for (; channels > 0; channels -= kThreadsOfPair * kVector) {
        const float4 grad[kPair] = {load_channels(grads), load_channels(grads + p.grad_output.stride_h, two_rows)};
        const T* row = windows;
#pragma unroll
        for (int y = 0; y < K + kDown * (kPair - 1); y++, row += p.features.stride_h) {
            if (top + y < 0 || top + y >= p.features.h) continue;
#pragma unroll
            for (int b = 0; b < K; b++) {
                if (left + b < 0 || left + b > last) continue;
                const float4 feature = load_channels(row + b * p.features.stride_w);
#pragma unroll
                for (int o = 0; o < kPair; o++) {
                    const int a = y - kDown * o;
                    if (a >= 0 && a < K) add_product(grad[o], feature, sums[o][a * K + b]);
                }
            }
        }
        windows += kThreadsOfPair * kVector;
        grads += kThreadsOfPair * kVector;
    }
}

// Adds up the sums of eight threads. Thread `lane` of them then has those of taps lane, lane + 8 and so on, in front.
// All lanes of a warp call it.
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

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3) grad_masks_down2_nhwc_kernel(Arguments arguments, TilePlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    const int lane = static_cast<int>(threadIdx.x) % kThreadsOfPair;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Pixel pair = pixel_at(tile.remainder * kPairs + threadIdx.x / kThreadsOfPair, grad_masks.w);
        const int out_i = static_cast<int>(pair.i) * kPair, out_j = static_cast<int>(pair.j);

        float sums[kPair][kSums<K>] = {};
        const int64_t first = lane * kVector;
        if (out_i < p.out_h && out_j < p.out_w && first < channels_in_group)  // or there may be no arrays
            sum_pair_in_lane<K, T>(p, n, group * channels_in_group + first, channels_in_group - first, out_i, out_j,
                                   sums);

#pragma unroll
        for (int o = 0; o < kPair; o++) {
            const Pixel output{out_i + o, out_j};
            const TapsOfEight<K> taps{lane, output.i < grad_masks.h ? K * K : 0};
            const bool computed = output.i < p.out_h && output.j < p.out_w;  // or a crop leaves it out
            add_up(lane, sums[o]);
            taps.each([&](int k, int) { sums[o][k] = computed ? sums[o][k] : 0; });
            if (p.from_logits) {
                const TapsOfEight<K> computed_taps{lane, computed ? taps.count : 0};
                through_normalizer<K, T>(p, n, group, output, computed_taps, sums[o]);
            }
            taps.each([&](int k, int tap) {
                mask_element<T>(grad_masks, n, group * K * K + tap, output.i, output.j).store(0, sums[o][k]);
            });
        }
    }
}

}  // namespace

const char* cannot_run_grad_masks_down2_nhwc(const Problem& p, const Array&) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, p.grad_output);
}

void grad_masks_down2_nhwc(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const int64_t tiles = ceil_div(ceil_div(grad_masks.h, kPair) * grad_masks.w, kPairs);
        const TilePlan plan{tiles, grad_masks.n * p.groups * tiles};
        launch(grad_masks_down2_nhwc_kernel<k, decltype(feature)>, plan.items, kBlock, 0, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
