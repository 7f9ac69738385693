// SPDX-License-Identifier: Apache-2.0
#include "isas.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

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
constexpr int kCount = sizeof kEntries / sizeof *kEntries;

// The best instruction set that may run, read from CARAFEPP_ISA.
struct Cap {
    int best = 0;
    char reason[64] = "";  // why better ones may not
    std::string wrong;     // why the variable cannot be followed

    Cap() {
        const char* text = std::getenv("CARAFEPP_ISA");
        if (text == nullptr || *text == '\0') return;
        while (best < kCount && std::strcmp(text, kEntries[best].name) != 0) best++;
        if (best < kCount) {
            std::snprintf(reason, sizeof reason, "CARAFEPP_ISA allows no more than %s", text);
            return;
        }
        std::string names = kEntries[0].name;
        for (int k = 1; k < kCount; k++) names = kEntries[k].name + std::string(k == 1 ? " or " : ", ") + names;
        wrong = "the environment variable CARAFEPP_ISA must be " + names + "; got " + std::string(text).substr(0, 64) +
                ".";
    }
};

const Cap& cap() {
    static const Cap of_environment;
    return of_environment;
}

}  // namespace

const char* unavailable(Isa isa) {
    const Entry& entry = kEntries[static_cast<int>(isa)];
    if (!entry.supported) return entry.unsupported;
    return static_cast<int>(isa) < cap().best ? cap().reason : nullptr;
}

const char* wrong_isa_cap() { return cap().wrong.empty() ? nullptr : cap().wrong.c_str(); }

}  // namespace carafepp
