// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent columns. All warps of a block have the same sources, a lane
// one source, a warp a part of the channels. A thread contracts the window with the gradients of the four outputs, with
// all sums in registers. Then the warps' sums are added, always in the same order, and each warp holds one output. It
// carries that through the normaliser and writes it.
#include "cuda/grad_masks.h"
#include "cuda/up2.h"

namespace carafepp::cuda {
namespace {

static_assert(kWarps == kOutputs, "each warp gets one of the outputs of a source");

// sums[output][tap] += grad_output * features, over `channels`. Unless `Inside`, taps beyond a border have no feature.
template <int K, bool Inside, class T>
__device__ __forceinline__ void sum_source(const Problem& p, int64_t n, int64_t c, int64_t channels, int i, int j,
                                           float (&sums)[kOutputs][K * K]) {
    if (channels <= 0) return;                                                   // perhaps there is no array
    const T* window = element<const T>(p.features, n, c, i - K / 2, j - K / 2);  // [C, H, W]
    const T* grads = element<const T>(p.grad_output, n, c, int64_t{i} * kUp, int64_t{j} * kUp);  // [C, H', W']
    const bool two_rows = i * kUp + 1 < p.out_h, two_columns = j * kUp + 1 < p.out_w;
#pragma unroll 1
    for (int64_t end = c + channels; c < end; c++, window += p.features.stride_c, grads += p.grad_output.stride_c) {
        const float grad[kOutputs] = {widen(grads[0]), two_columns ? widen(grads[1]) : 0.0f,
                                      two_rows ? widen(grads[p.grad_output.stride_h]) : 0.0f,
                                      two_rows && two_columns ? widen(grads[p.grad_output.stride_h + 1]) : 0.0f};
        for_each_tap<K, Inside>(p, window, i, j, [&](int t, float feature) {
#pragma unroll
            for (int o = 0; o < kOutputs; o++) sums[o][t] += grad[o] * feature;
        });
    }
}

// Conversions of halves take registers that a third block would miss.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == sizeof(float) ? 3 : 2)
    grad_masks_up2_nchw_kernel(Arguments arguments, TilePlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    constexpr int kTaps = K * K;
    float* const shared = shared_memory<float>();  // [warp][tap][lane], of one output
    const int lane = static_cast<int>(threadIdx.x) % kSourcesOfBlock,
              warp = static_cast<int>(threadIdx.x) / kSourcesOfBlock;
    const int64_t channels_in_group = p.features.c / p.groups, share = (channels_in_group + kWarps - 1) / kWarps;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Pixel source = pixel_at(tile.remainder * kSourcesOfBlock + lane, p.features.w);
        const int i = static_cast<int>(source.i), j = static_cast<int>(source.j);
        const bool exists = i < p.features.h && i * kUp < p.out_h && j * kUp < p.out_w;
        const bool inside = window_inside<K>(p, i, j);

        float sums[kOutputs][kTaps] = {};
        const int64_t first = warp * share, c = group * channels_in_group + first;
        const int64_t channels = min(share, channels_in_group - first);
        if (exists && inside) {
            sum_source<K, true, T>(p, n, c, channels, i, j, sums);
        } else if (exists) {
            sum_source<K, false, T>(p, n, c, channels, i, j, sums);
        }

        float grad[kTaps];  // of output `warp`
        sum_of_warps<K>(sums, shared, grad);

        const Pixel output{int64_t{i} * kUp + warp / kUp, int64_t{j} * kUp + warp % kUp};
        if (i < p.features.h) write_output<K, T>(p, n, group, output, i, j, kOutputs, grad, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nchw(const Problem& p, const Array&) {
    return not_for_columns_of_up2(p, p.features, p.grad_output);
}

void grad_masks_up2_nchw(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const int64_t tiles = ceil_div(p.features.h * p.features.w, kSourcesOfBlock);
        const TilePlan plan{tiles, grad_masks.n * p.groups * tiles};
        launch(grad_masks_up2_nchw_kernel<k, decltype(feature)>, plan.items, kBlock,
               kBlock * k * k * int64_t{sizeof(float)}, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
