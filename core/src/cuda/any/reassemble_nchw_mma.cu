// SPDX-License-Identifier: Apache-2.0
// The forward for any factor and strides with 16 bits, on tensor cores. It is fast where columns are adjacent.
#include "cuda/any/reassemble_mma.h"

namespace carafepp::cuda {

const char* cannot_run_reassemble_nchw_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_patches(p, output, false)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_mma_kernel<false, BFloat16>);
}

void reassemble_nchw_mma(const Problem& p, const Array& output) { reassemble_mma<false>(p, output); }

}  // namespace carafepp::cuda
