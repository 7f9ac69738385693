// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor and strides, with columns in lanes: it is fast where they are adjacent.
#include "cuda/any/grad_features_units.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_nchw(const Problem& p, const Array& grad_features) {
    return not_for_units<false>(p, grad_features);
}

void grad_features_nchw(const Problem& p, const Array& grad_features) { grad_features_units<false>(p, grad_features); }

}  // namespace carafepp::cuda
