// SPDX-License-Identifier: Apache-2.0
// The forward for any factor with adjacent channels of 16 bits, on tensor cores.
#include "cuda/any/reassemble_mma.h"

namespace carafepp::cuda {

const char* cannot_run_reassemble_nhwc_mma(const Problem& p, const Array& output) {
    if (const char* reason = not_for_vectors(p, p.features, kWide)) return reason;
    if (const char* reason = not_for_vectors(p, output, kWide)) return reason;
    if (const char* reason = not_for_patches(p, output, true)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_mma_kernel<true, BFloat16>);
}

void reassemble_nhwc_mma(const Problem& p, const Array& output) { reassemble_mma<true>(p, output); }

}  // namespace carafepp::cuda
