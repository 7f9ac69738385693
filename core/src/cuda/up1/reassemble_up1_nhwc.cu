// SPDX-License-Identifier: Apache-2.0
// The forward for up = down = 1 with adjacent channels.
#include "cuda/up1/reassemble_up1.h"

namespace carafepp::cuda {

const char* cannot_run_reassemble_up1_nhwc(const Problem& p, const Array& output) {
    return not_for_reassemble_up1<true, false>(p, output);
}

void reassemble_up1_nhwc(const Problem& p, const Array& output) { reassemble_up1<true, false>(p, output); }

}  // namespace carafepp::cuda
