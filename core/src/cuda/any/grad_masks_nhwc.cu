// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor with adjacent channels.
#include "cuda/any/grad_masks_tiles.h"

namespace carafepp::cuda {

const char* cannot_run_grad_masks_nhwc(const Problem& p, const Array&) {
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_grad_masks_tiles<true>(p);
}

void grad_masks_nhwc(const Problem& p, const Array& grad_masks) { grad_masks_tiles<true>(p, grad_masks); }

}  // namespace carafepp::cuda
