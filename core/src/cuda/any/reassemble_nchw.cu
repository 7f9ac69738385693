// SPDX-License-Identifier: Apache-2.0
// The forward for any factor and strides, with columns in lanes: it is fast where they are adjacent.
#include "cuda/any/reassemble_tiles.h"

namespace carafepp::cuda {

const char* cannot_run_reassemble_nchw(const Problem& p, const Array& output) {
    return not_for_reassemble_tiles(p, output, false);
}

void reassemble_nchw(const Problem& p, const Array& output) { reassemble_tiles<false>(p, output); }

}  // namespace carafepp::cuda
