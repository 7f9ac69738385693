// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace carafepp {

const char* avx2::unavailable() {
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return has ? nullptr : "this processor has no AVX2 with FMA and F16C";
}

const char* avx512::unavailable() {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has ? nullptr : "this processor has no AVX-512 (F, BW, DQ, VL)";
}

const char* not_for_reassemble_nhwc(const Problem& p) {
    if (p.features.stride_c != 1) return "channels of features are not adjacent";
    if (!p.result.empty() && p.result.stride_c != 1) return "channels of the output are not adjacent";
    if (p.features.c / p.groups < 4) return "fewer than 4 channels in a group";
    if (p.factor.up > 8) return "up is more than 8";
    return nullptr;
}

const char* not_for_reassemble_nchw(const Problem& p) {
    if (p.features.stride_w != 1) return "columns of features are not adjacent";
    if (!p.result.empty() && p.result.stride_w != 1) return "columns of the output are not adjacent";
    if (p.factor.up > 8) return "up is more than 8";
    if (p.factor.down > 2) return "every third column or fewer is read";
    if (p.out_w < 4 * p.factor.up) return "fewer than 4 columns";
    return nullptr;
}

}  // namespace carafepp
