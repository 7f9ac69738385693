// SPDX-License-Identifier: Apache-2.0
#include "isas.h"

#include <string>

#include "environment.h"

namespace carafepp {
namespace {

struct Entry {
    const char* name;
    bool supported;
    const char* unsupported;
};

#define CARAFEPP_ENTRY(isa, supported, unsupported, a, b) {#isa, supported, unsupported},
const Entry kEntries[] = {
    CARAFEPP_ISAS(CARAFEPP_ENTRY, , )
#if defined(__x86_64__)
        {"sse2", true, ""},  // has no kernels: as a cap it leaves the reference
#endif
};

}  // namespace

const char* unavailable(Isa isa) {
    const Entry& entry = kEntries[static_cast<int>(isa)];
    if (!entry.supported) return entry.unsupported;
    const int best = environment().isa;
    static const std::string beyond = std::string("CARAFEPP_ISA allows no more than ") + kEntries[best].name;
    return static_cast<int>(isa) < best ? beyond.c_str() : nullptr;
}

}  // namespace carafepp
