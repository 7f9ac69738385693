// SPDX-License-Identifier: Apache-2.0
// The reference implementation: every problem, any strides, the last entry of each list.
#pragma once

#include "problem.h"

namespace carafepp::reference {

void reassemble(const Problem& problem);     // masks given or normalised from logits
void grad_features(const Problem& problem);  // likewise
void grad_masks(
    const Problem& problem);  // contracted from grad_output and features, or given; then to grad_logits, from logits
void normalize_masks(const Problem& problem);

}  // namespace carafepp::reference
