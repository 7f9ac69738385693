// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up = down = 1 on tensor cores with adjacent columns.
#include "cuda/up1/grad_masks_up1_mma.h"

namespace carafepp::cuda {

const char* cannot_run_grad_masks_up1_nchw_mma(const Problem& p, const Array& grad_masks) {
    return not_for_grad_masks_up1_mma<false>(p, grad_masks);
}

void grad_masks_up1_nchw_mma(const Problem& p, const Array& grad_masks) { grad_masks_up1_mma<false>(p, grad_masks); }

}  // namespace carafepp::cuda
