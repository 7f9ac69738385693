// SPDX-License-Identifier: Apache-2.0
// The extensions of this processor that kernels compute with.
#pragma once

namespace carafepp {

// Extensions of x86-64 that the kernels use. All are false on other processors.
struct Processor {
    bool avx2, fma, f16c;
    bool avx512f, avx512bw, avx512dq, avx512vl;

    bool runs_avx2() const { return avx2 && fma && f16c; }
    bool runs_avx512() const { return avx512f && avx512bw && avx512dq && avx512vl; }
};

// An extension counts if the processor has it and the operating system saves its registers.
const Processor& processor();

}  // namespace carafepp
