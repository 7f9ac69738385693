// SPDX-License-Identifier: Apache-2.0
#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#endif

namespace carafepp {
namespace {

#if defined(__x86_64__)
// Registers that the operating system saves when it switches threads, one bit for each kind: XCR0.
uint32_t saved_registers() {
    uint32_t low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

Processor ask() {
    constexpr uint32_t kAvx = 0x06, kAvx512 = 0xe6;  // bits of XCR0: xmm and ymm; also k, zmm and zmm16 to 31
    Processor has{};
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return has;
    const uint32_t saved = saved_registers();
    const bool avx = (ecx & bit_AVX) && (saved & kAvx) == kAvx;
    has.fma = avx && (ecx & bit_FMA);
    has.f16c = avx && (ecx & bit_F16C);
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return has;
    const bool avx512 = avx && (saved & kAvx512) == kAvx512;
    has.avx2 = avx && (ebx & bit_AVX2);
    has.avx512f = avx512 && (ebx & bit_AVX512F);
    has.avx512bw = avx512 && (ebx & bit_AVX512BW);
    has.avx512dq = avx512 && (ebx & bit_AVX512DQ);
    has.avx512vl = avx512 && (ebx & bit_AVX512VL);
    return has;
}
#else
Processor ask() { return {}; }
#endif

}  // namespace

const Processor& processor() {
    static const Processor has = ask();
    return has;
}

}  // namespace carafepp
