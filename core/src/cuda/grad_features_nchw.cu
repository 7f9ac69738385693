// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor and strides, with columns in lanes: it is fast where they are adjacent.
#include "cuda/grad_features_tiles.h"

namespace carafepp::cuda {

const char* cannot_run_grad_features_nchw(const Problem& p, const Array&) {
    if (const char* reason = not_for_grad_features_tiles(p)) return reason;
    return p.grad_output.stride_c == static_cast<int>(p.grad_output.stride_c) ? nullptr
                                                                              : "channels are too far from each other";
}

void grad_features_nchw(const Problem& p, const Array& grad_features) { grad_features_tiles<false>(p, grad_features); }

}  // namespace carafepp::cuda
