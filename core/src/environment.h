// SPDX-License-Identifier: Apache-2.0
// The environment variables that the library follows. They are read once, when a call first needs one.
#pragma once

#include <string>

namespace carafepp {

constexpr int kMaxThreads = 1024;

struct Environment {
    int isa = 0;                // CARAFEPP_ISA: the place of the best that may run among all, best first
    int threads = 0;            // CARAFEPP_NUM_THREADS; 0 if it is not set
    bool only_generic = false;  // CARAFEPP_CUDA_KERNELS=generic
    bool log = false;           // CARAFEPP_LOG=debug
    std::string wrong;          // a sentence for the first value that cannot be followed, or empty
};

const Environment& environment();

}  // namespace carafepp
