// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up = down = 1 with adjacent channels.
#include "cuda/up1/grad_masks_up1.h"

namespace carafepp::cuda {

const char* cannot_run_grad_masks_up1_nhwc(const Problem& p, const Array& grad_masks) {
    return not_for_grad_masks_up1<true>(p, grad_masks);
}

void grad_masks_up1_nhwc(const Problem& p, const Array& grad_masks) { grad_masks_up1<true>(p, grad_masks); }

}  // namespace carafepp::cuda
