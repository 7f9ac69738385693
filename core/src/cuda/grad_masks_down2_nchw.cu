// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for down x2 with adjacent columns. All warps of a block have the same pairs of
// outputs, one below the other. A lane has one pair, a warp a part of the channels. A thread contracts both windows
// with their gradients, with all sums in registers. Then the warps' sums are added, always in the same order. Each of
// two warps holds one output of the pair. It carries that through the normaliser and writes it.
#include "cuda/down2.h"
#include "cuda/grad_masks.h"

namespace carafepp::cuda {
namespace {

static_assert(kWarps >= kPair, "a warp for each output of a pair");

// sums[output][tap] += grad_output * features, over `channels`. Unless `Inside`, taps beyond a border have no feature.
template <int K, bool Inside, class T>
__device__ __forceinline__ void sum_pair(const Problem& p, int64_t n, int64_t c, int64_t channels, int out_i, int out_j,
                                         float (&sums)[kPair][K * K]) {
    if (channels <= 0) return;  // perhaps there is no array
    const T* windows = windows_at<K, T>(p, n, c, out_i, out_j);
    const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);  // [C, H', W']
    const bool two_rows = out_i + 1 < p.out_h;
#pragma unroll 1
    for (; channels > 0; channels--, windows += p.features.stride_c, grads += p.grad_output.stride_c) {
        const float grad[kPair] = {widen(grads[0]), two_rows ? widen(grads[p.grad_output.stride_h]) : 0.0f};
        for_each_tap_of_pair<K, Inside>(p, windows, out_i, out_j,
                                        [&](int o, int t, float feature) { sums[o][t] += grad[o] * feature; });
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3) grad_masks_down2_nchw_kernel(Arguments arguments, TilePlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;    // of the shape of masks or logits
    float* const shared = shared_memory<float>();  // [warp][tap][lane], of one output
    const int lane = static_cast<int>(threadIdx.x) % kSourcesOfBlock,
              warp = static_cast<int>(threadIdx.x) / kSourcesOfBlock;
    const int64_t channels_in_group = p.features.c / p.groups, share = (channels_in_group + kWarps - 1) / kWarps;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Pixel pair = pixel_at(tile.remainder * kSourcesOfBlock + lane, grad_masks.w);
        const int out_i = static_cast<int>(pair.i) * kPair, out_j = static_cast<int>(pair.j);
        const bool exists = out_i < p.out_h && out_j < p.out_w;

        float sums[kPair][K * K] = {};
        const int64_t first = warp * share, c = group * channels_in_group + first;
        const int64_t channels = min(share, channels_in_group - first);
        if (exists && windows_inside<K>(p, out_i, out_j)) {
            sum_pair<K, true, T>(p, n, c, channels, out_i, out_j, sums);
        } else if (exists) {
            sum_pair<K, false, T>(p, n, c, channels, out_i, out_j, sums);
        }

        float grad[K * K];  // of output `warp`
        sum_of_warps<K>(sums, shared, grad);
        const Pixel output{out_i + warp, out_j};
        if (warp < kPair && output.i < grad_masks.h)
            write_output<K, T>(p, n, group, output, (out_i + warp) * kDown, out_j * kDown, 1, grad, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_down2_nchw(const Problem& p, const Array&) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (!p.grad_output.empty() && p.grad_output.stride_w != 1) return "columns are not adjacent";
    return not_for_columns(p.features);
}

void grad_masks_down2_nchw(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const int64_t tiles = ceil_div(ceil_div(grad_masks.h, kPair) * grad_masks.w, kSourcesOfBlock);
        const TilePlan plan{tiles, grad_masks.n * p.groups * tiles};
        launch(grad_masks_down2_nchw_kernel<k, decltype(feature)>, plan.items, kBlock,
               kBlock * k * k * int64_t{sizeof(float)}, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
