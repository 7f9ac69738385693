// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor and strides with 16 bits, on tensor cores. It is fast where columns
// are adjacent.
#include "cuda/any/grad_masks_mma.h"

namespace carafepp::cuda {

const char* cannot_run_grad_masks_nchw_mma(const Problem& p, const Array&) { return not_for_grad_masks_mma<false>(p); }

void grad_masks_nchw_mma(const Problem& p, const Array& grad_masks) { grad_masks_mma<false>(p, grad_masks); }

}  // namespace carafepp::cuda
