// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor with adjacent channels of 16 bits, on tensor cores.
#include "cuda/any/grad_features_patches.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_nhwc_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_vectors(p, p.grad_output, kWide)) return reason;
    if (const char* reason = not_for_vectors(p, grad_features, kWide)) return reason;
    if (const char* reason = not_compiled_for_bfloat16(p, grad_features_patches_mma_kernel<true, 4, BFloat16>))
        return reason;
    return not_for_grad_patches(p, grad_features, true);
}

void grad_features_nhwc_mma(const Problem& p, const Array& grad_features) {
    grad_features_patches<true>(p, grad_features);
}

}  // namespace carafepp::cuda
