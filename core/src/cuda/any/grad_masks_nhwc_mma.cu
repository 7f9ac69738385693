// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor with adjacent channels of 16 bits, on tensor cores.
#include "cuda/any/grad_masks_mma.h"

namespace carafepp::cuda {

const char* cannot_run_grad_masks_nhwc_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_vectors(p, p.features, kWide)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output, kWide)) return reason;
    return not_for_grad_masks_mma<true>(p);
}

void grad_masks_nhwc_mma(const Problem& p, const Array& grad_masks) { grad_masks_mma<true>(p, grad_masks); }

}  // namespace carafepp::cuda
