// SPDX-License-Identifier: Apache-2.0
#include "isas.h"

#include <string>

#include "environment.h"

namespace carafepp {
namespace {

struct Entry {
    bool supported;
    const char* unsupported;
};

#define CARAFEPP_ENTRY(isa, supported, unsupported, a, b) {supported, unsupported},
const Entry kEntries[] = {CARAFEPP_ISAS(CARAFEPP_ENTRY, , )};

}  // namespace

const char* unavailable(Isa isa) {
    const Entry& entry = kEntries[static_cast<int>(isa)];
    if (!entry.supported) return entry.unsupported;
    const int best = environment().isa;
    static const std::string beyond = std::string("CARAFEPP_ISA allows no more than ") + kIsaNames[best];
    return static_cast<int>(isa) < best ? beyond.c_str() : nullptr;
}

}  // namespace carafepp
