// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up = down = 1 with adjacent columns.
#include "cuda/up1/reassemble_up1.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_up1_nchw(const Problem& p, const Array& grad_features) {
    return not_for_reassemble_up1<false, true>(p, grad_features);
}

void grad_features_up1_nchw(const Problem& p, const Array& grad_features) {
    reassemble_up1<false, true>(p, grad_features);
}

}  // namespace carafepp::cuda
