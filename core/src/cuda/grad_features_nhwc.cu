// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor with adjacent channels.
#include "cuda/grad_features_tiles.h"
#include "cuda/grad_features_units.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_grad_features_tiles(p)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, grad_features);
}

void grad_features_nhwc(const Problem& p, const Array& grad_features) {
    if (not_for_units(p) == nullptr) {
        const UnitsPlan plan(p, true, grad_features);
        if (plan.cost < INFINITY) return grad_features_units<true>(p, grad_features, plan);
    }
    grad_features_tiles<true>(p, grad_features);
}

}  // namespace carafepp::cuda
