// SPDX-License-Identifier: Apache-2.0
// The instruction sets that kernels are compiled for, and the cap that the environment variable CARAFEPP_ISA sets.
#pragma once

#include "processor.h"

// X(isa, supported, unsupported, a, b) for each instruction set, best first: each includes the next one. `supported`
// asks the processor, `unsupported` is the reason where it says no. CMakeLists.txt has the compiler's flags.
#if defined(__x86_64__)
#define CARAFEPP_ISAS(X, a, b)                                                                  \
    X(avx512, processor().runs_avx512(), "this processor has no AVX-512 (F, BW, DQ, VL)", a, b) \
    X(avx2, processor().runs_avx2(), "this processor has no AVX2 with FMA and F16C", a, b)
#elif defined(__aarch64__)
#define CARAFEPP_ISAS(X, a, b) X(neon, true, "", a, b)
#else
#define CARAFEPP_ISAS(X, a, b) X(generic, true, "", a, b)
#endif

namespace carafepp {

#define CARAFEPP_ENUMERATOR(isa, supported, unsupported, a, b) isa,
enum class Isa { CARAFEPP_ISAS(CARAFEPP_ENUMERATOR, , ) };
#undef CARAFEPP_ENUMERATOR

// The values of CARAFEPP_ISA, best first.
#define CARAFEPP_NAME(isa, supported, unsupported, a, b) #isa,
constexpr const char* kIsaNames[] = {
    CARAFEPP_ISAS(CARAFEPP_NAME, , )
#if defined(__x86_64__)
        "sse2",  // has no kernels: as a cap it leaves the reference
#endif
};
#undef CARAFEPP_NAME

// AVX2 has 16 vector registers, half of what AVX-512 and NEON have.
constexpr bool has_sixteen_registers([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
    return isa == Isa::avx2;
#else
    return false;
#endif
}

// Why kernels of an instruction set cannot run, or NULL.
const char* unavailable(Isa isa);

}  // namespace carafepp
