// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits for down x2 with adjacent columns. The warps of a block have the same pairs of
// outputs, one below the other, a lane one pair, and a part of the channels each: contract both windows with their
// gradients, all sums in registers; add the warps' sums, always in the same order, so that two of the warps hold one
// output of each pair; carry that through the normaliser, whose masks are computed anew, and write it.
#include "cuda/down2.h"
#include "cuda/grad_masks.h"

namespace carafepp::cuda {
namespace {

// sums[output][tap] += grad_output * features, over `channels`. Unless `Inside`, taps beyond a border have no feature.
template <int K, bool Inside, class T>
__device__ __forceinline__ void contract(const Problem& p, int64_t n, int64_t c, int64_t channels, int out_i, int out_j,
                                         float (&sums)[kPair][K * K]) {
    if (channels <= 0) return;  // perhaps there is no array
    const T* windows = windows_at<K, T>(p, n, c, out_i, out_j);
    const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);
    const bool two_rows = out_i + 1 < p.out_h;
#pragma unroll 1
    for (; channels > 0; channels--, windows += p.features.stride_c, grads += p.grad_output.stride_c) {
        const float grad[kPair] = {widen(grads[0]), two_rows ? widen(grads[p.grad_output.stride_h]) : 0.0f};
        for_each_tap_of_pair<K, Inside>(p, windows, out_i, out_j,
                                        [&](int o, int t, float feature) { sums[o][t] += grad[o] * feature; });
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3) grad_masks_down2_nchw_kernel(Arguments arguments, int64_t tiles) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;
    float* const shared = shared_memory<float>();  // [warp][tap][lane], of one output
    const int lane = static_cast<int>(threadIdx.x) % kSources, warp = static_cast<int>(threadIdx.x) / kSources;
    const int64_t channels_in_group = p.features.c / p.groups, share = (channels_in_group + kWarps - 1) / kWarps;
    const int64_t items = grad_masks.n * p.groups * tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Output pair = output_at(tile.remainder * kSources + lane, grad_masks.w);
        const int out_i = static_cast<int>(pair.i) * kPair, out_j = static_cast<int>(pair.j);
        const bool exists = out_i < p.out_h && out_j < p.out_w;

        float sums[kPair][K * K] = {};
        const int64_t first = warp * share, c = group * channels_in_group + first;
        const int64_t channels = min(share, channels_in_group - first);
        if (exists && windows_inside<K>(p, out_i, out_j)) {
            contract<K, true, T>(p, n, c, channels, out_i, out_j, sums);
        } else if (exists) {
            contract<K, false, T>(p, n, c, channels, out_i, out_j, sums);
        }

        float grad[K * K];  // of output `warp`
        sum_of_warps<K>(sums, shared, grad);
        const Output output{out_i + warp, out_j};
        if (warp < kPair && output.i < grad_masks.h)
            write_output<K, T>(p, n, group, output, (out_i + warp) * kDown, out_j * kDown, 1, grad, grad_masks);
    }
}

template <int K>
void run(const Problem& p, const Array& grad_masks) {
    const int64_t tiles = ceil_div(ceil_div(grad_masks.h, kPair) * grad_masks.w, kSources);
    with_floats(p, [&](auto feature) {
        launch(grad_masks_down2_nchw_kernel<K, decltype(feature)>, grad_masks.n * p.groups * tiles, kBlock,
               kBlock * K * K * int64_t{sizeof(float)}, p, grad_masks, tiles);
    });
}

}  // namespace

const char* cannot_run_grad_masks_down2_nchw(const Problem& p, const Array&) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (!p.grad_output.empty() && p.grad_output.stride_w != 1) return "columns are not adjacent";
    return not_for_columns(p.features);
}

void grad_masks_down2_nchw(const Problem& p, const Array& grad_masks) {
    p.kernel_size == 3 ? run<3>(p, grad_masks) : run<5>(p, grad_masks);
}

}  // namespace carafepp::cuda
