// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor and strides, with columns in lanes: it is fast where they are adjacent.
#include "cuda/grad_features_tiles.h"
#include "cuda/grad_features_units.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_nchw(const Problem& p, const Array&) {
    if (const char* reason = not_for_grad_features_tiles(p)) return reason;
    return p.grad_output.stride_c == static_cast<int>(p.grad_output.stride_c) ? nullptr : "channels are too far apart";
}

void grad_features_nchw(const Problem& p, const Array& grad_features) {
    if (not_for_units(p) == nullptr) {
        const UnitsPlan plan(p, false, grad_features);
        if (plan.cost < INFINITY) return grad_features_units<false>(p, grad_features, plan);
    }
    grad_features_tiles<false>(p, grad_features);
}

}  // namespace carafepp::cuda
