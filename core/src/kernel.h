// SPDX-License-Identifier: Apache-2.0
// A kernel, and the lists of them that each backend exports.
#pragma once

#include "problem.h"

namespace carafepp {

struct Kernel {
    const char* name;
    const char* (*cannot_run)(const Problem&);  // the reason, or NULL
    const char* (*slower)(const Problem&);      // why a later kernel of the list is faster, or NULL
    void (*run)(const Problem&);
};

// The kernels for each result of each function, in the order of its signature: faster ones first, last one that runs
// every problem. A list ends with an entry without a name; of results that a function does not have it is NULL.
using Registry = const Kernel* const[7][2];

inline const char* runs_all(const Problem&) { return nullptr; }
inline const char* never_slower(const Problem&) { return nullptr; }

namespace cpu {
extern const Registry kernels;
}
namespace cuda {
extern const Registry kernels;  // empty in a build without CUDA
}

}  // namespace carafepp
