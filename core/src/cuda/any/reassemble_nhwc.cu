// SPDX-License-Identifier: Apache-2.0
// The forward for any factor with adjacent channels.
#include "cuda/any/reassemble_tiles.h"

namespace carafepp::cuda {

const char* cannot_run_reassemble_nhwc(const Problem& p, const Array& output) {
    if (const char* reason = not_for_reassemble_tiles(p, output, true)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, output);
}

void reassemble_nhwc(const Problem& p, const Array& output) { reassemble_tiles<true>(p, output); }

}  // namespace carafepp::cuda
