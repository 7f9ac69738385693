// SPDX-License-Identifier: Apache-2.0
// The kernels that are compiled once for each instruction set, in a namespace of its name, and what they accept. A
// build for another processor has the same symbols, from no_x86.cpp.
#pragma once

#include "problem.h"

namespace carafepp {

namespace avx2 {
const char* unavailable();  // why this processor cannot run this namespace, or NULL
void reassemble_nhwc(const Problem& problem);
void reassemble_nchw(const Problem& problem);
void grad_features_nhwc(const Problem& problem);
void grad_masks_nhwc(const Problem& problem);
}  // namespace avx2

namespace avx512 {
const char* unavailable();
void reassemble_nhwc(const Problem& problem);
void reassemble_nchw(const Problem& problem);
void grad_features_nhwc(const Problem& problem);
void grad_masks_nhwc(const Problem& problem);
}  // namespace avx512

// Why a problem is not one for the kernel of that name, or NULL.
const char* not_for_reassemble_nhwc(const Problem& problem);
const char* not_for_reassemble_nchw(const Problem& problem);
const char* not_for_grad_features_nhwc(const Problem& problem);
const char* not_for_grad_masks_nhwc(const Problem& problem);

}  // namespace carafepp
