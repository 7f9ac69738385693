// SPDX-License-Identifier: Apache-2.0
// A kernel, and the lists of them that each backend exports.
#pragma once

#include "problem.h"

namespace carafepp {

struct Kernel {
    const char* name;
    const char* (*cannot_run)(const Problem&, const Array& result);  // the reason, or NULL
    const char* (*slower)(const Problem&, const Array& result);  // why a later kernel of the list is faster, or NULL
    void (*run)(const Problem&, const Array& result);            // which has elements

    // Computes both gradients of a backward where that is faster, and returns true; or NULL. It is the same function
    // in the entries of both.
    bool (*run_both)(const Problem&, const Array& grad_features, const Array& grad_masks) = nullptr;
};

// A kernel that computes both gradients of a backward. Its `slower` says why two kernels are faster, or NULL.
struct KernelOfBoth {
    const char* name;
    const char* (*cannot_run)(const Problem&, const Array& grad_features, const Array& grad_masks);
    const char* (*slower)(const Problem&, const Array& grad_features, const Array& grad_masks);
    void (*run)(const Problem&, const Array& grad_features, const Array& grad_masks);  // which have elements
};

// The results that kernels compute. With logits, an output has names of its own but the same kernels. `cannot_run` and
// `slower` may get a result without memory.
enum Result {
    kReassemble,
    kReassembleWithLogits,
    kGradFeatures,
    kGradMasks,
    kGradLogits,
    kNormalizeMasks,
    kNormalizeMasksBackward,
    kResults,
};

// The kernels for each result: faster ones first, last one that runs every problem. Those of both gradients come before
// them, where both are wanted. A list ends with an entry without a name.
struct Registry {
    const Kernel* of[kResults];
    const KernelOfBoth* of_both;  // or NULL
};

inline const char* runs_all(const Problem&, const Array&) { return nullptr; }
inline const char* never_slower(const Problem&, const Array&) { return nullptr; }

namespace cpu {
extern const Registry kernels;
}
namespace cuda {
extern const Registry kernels;  // empty in a build without CUDA
}

}  // namespace carafepp
