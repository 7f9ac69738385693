// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits for down x2 with adjacent channels. Eight threads have an output and the one below
// it, and of every 32 channels four each: contract both windows with their gradients, all sums in registers; add the
// threads' sums, always in the same order, so that each thread holds every eighth tap; carry those through the
// normaliser, whose masks are computed anew, and write them.
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
__device__ __forceinline__ void contract(const Problem& p, int64_t n, int64_t c, int64_t channels, int out_i, int out_j,
                                         float (&sums)[kPair][kSums<K>]) {
    const int top = out_i * kDown - K / 2, left = out_j * kDown - K / 2, last = static_cast<int>(p.features.w) - 1;
    const T* windows = element<const T>(p.features, n, c, top, left);
    const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);
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

// Adds up the sums of eight threads, so that thread `lane` of them has those of taps lane, lane + 8 .. in front. All
// lanes of a warp call it.
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
__global__ void __launch_bounds__(kBlock, 3) grad_masks_down2_nhwc_kernel(Arguments arguments, int64_t tiles) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;
    const int lane = static_cast<int>(threadIdx.x) % kThreadsOfPair;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = grad_masks.n * p.groups * tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Output pair = output_at(tile.remainder * kPairs + threadIdx.x / kThreadsOfPair, grad_masks.w);
        const int out_i = static_cast<int>(pair.i) * kPair, out_j = static_cast<int>(pair.j);

        float sums[kPair][kSums<K>] = {};
        const int64_t first = lane * kVector;
        if (out_i < p.out_h && out_j < p.out_w && first < channels_in_group)  // or there may be no arrays
            contract<K, T>(p, n, group * channels_in_group + first, channels_in_group - first, out_i, out_j, sums);

#pragma unroll
        for (int o = 0; o < kPair; o++) {
            const Output output{out_i + o, out_j};
            const int taps = output.i < grad_masks.h ? K * K : 0;
            const bool computed = output.i < p.out_h && output.j < p.out_w;  // or a crop leaves it out
            add_up(lane, sums[o]);
            for_each_own_tap<K>(lane, taps, [&](int k, int) { sums[o][k] = computed ? sums[o][k] : 0; });
            if (p.from_logits)
                through_normalizer_together<K, T>(p, n, group, output, lane, computed ? taps : 0, sums[o]);
            for_each_own_tap<K>(lane, taps, [&](int k, int tap) {
                mask_element<T>(grad_masks, n, group * K * K + tap, output.i, output.j).store(0, sums[o][k]);
            });
        }
    }
}

template <int K>
void run(const Problem& p, const Array& grad_masks) {
    const int64_t tiles = ceil_div(ceil_div(grad_masks.h, kPair) * grad_masks.w, kPairs);
    with_floats(p, [&](auto feature) {
        launch(grad_masks_down2_nhwc_kernel<K, decltype(feature)>, grad_masks.n * p.groups * tiles, kBlock, 0, p,
               grad_masks, tiles);
    });
}

}  // namespace

const char* cannot_run_grad_masks_down2_nhwc(const Problem& p, const Array&) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, p.grad_output);
}

void grad_masks_down2_nhwc(const Problem& p, const Array& grad_masks) {
    p.kernel_size == 3 ? run<3>(p, grad_masks) : run<5>(p, grad_masks);
}

}  // namespace carafepp::cuda
