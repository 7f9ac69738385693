// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up = down = 1 on tensor cores with adjacent channels.
#include "cuda/up1/reassemble_up1_mma.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_up1_nhwc_mma(const Problem& p, const Array& grad_features) {
    return not_for_reassemble_up1_mma<true, true>(p, grad_features);
}

void grad_features_up1_nhwc_mma(const Problem& p, const Array& grad_features) {
    reassemble_up1_mma<true, true>(p, grad_features);
}

}  // namespace carafepp::cuda
