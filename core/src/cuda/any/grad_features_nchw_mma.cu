// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor with any strides and 16 bits, on tensor cores. It is fast where columns are
// adjacent.
#include "cuda/any/grad_features_patches.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_nchw_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_compiled_for_bfloat16(p, grad_features_patches_mma_kernel<false, 4, BFloat16>))
        return reason;
    return not_for_grad_patches(p, grad_features, false);
}

void grad_features_nchw_mma(const Problem& p, const Array& grad_features) {
    grad_features_patches<false>(p, grad_features);
}

}  // namespace carafepp::cuda
