// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor and strides, with columns in lanes: it is fast where they are
// adjacent.
#include "cuda/any/grad_masks_tiles.h"

namespace carafepp::cuda {

const char* cannot_run_grad_masks_nchw(const Problem& p, const Array&) { return not_for_grad_masks_tiles<false>(p); }

void grad_masks_nchw(const Problem& p, const Array& grad_masks) { grad_masks_tiles<false>(p, grad_masks); }

}  // namespace carafepp::cuda
