// SPDX-License-Identifier: Apache-2.0
// The reference implementation: every problem, any strides, the last entry of each list.
#pragma once

#include "problem.h"

namespace carafepp::reference {

// Masks are given or, where problem.from_logits, normalised from logits; then grad_masks stands for grad_logits.
void reassemble(const Problem& problem, const Array& output);
void grad_features(const Problem& problem, const Array& grad_features);
void grad_masks(const Problem& problem, const Array& grad_masks);
void normalize_masks(const Problem& problem, const Array& masks);
void normalize_masks_backward(const Problem& problem, const Array& grad_logits);

}  // namespace carafepp::reference
