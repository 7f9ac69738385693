// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels of 16 bits, on tensor cores: see grad_features_up2_mma.h.
// A tile has 16 columns.
#include "cuda/up2/slice_of_channels.h"

namespace carafepp::cuda {
namespace {

template <int K, class T>
__global__ void __launch_bounds__(256, 2) grad_features_up2_nhwc_mma_kernel(Arguments arguments, Tiles plan) {
    compute_grad_features<K, T, SliceOfChannels<K, T, 16>>(arguments.problem, arguments.result, plan);
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_channels_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    if (const char* reason = not_for_shared_memory(kBytesOfBlock<SliceOfChannels<5, Float16, 16>, 5>)) return reason;
    return not_compiled_for_bfloat16(p, grad_features_up2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_features_up2_nhwc_mma(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        launch_grad_features<SliceOfChannels<k, T, 16>, k>(grad_features_up2_nhwc_mma_kernel<k, T>, p, grad_features,
                                                           0);
    });
}

}  // namespace carafepp::cuda
