// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

namespace carafepp {

const char* avx2::unavailable() { return "built for another processor"; }
void avx2::reassemble_nhwc(const Problem&) {}
void avx2::reassemble_nchw(const Problem&) {}
void avx2::grad_features_nhwc(const Problem&) {}
void avx2::grad_masks_nhwc(const Problem&) {}

const char* avx512::unavailable() { return "built for another processor"; }
void avx512::reassemble_nhwc(const Problem&) {}
void avx512::reassemble_nchw(const Problem&) {}
void avx512::grad_features_nhwc(const Problem&) {}
void avx512::grad_masks_nhwc(const Problem&) {}

const char* not_for_reassemble_nhwc(const Problem&) { return nullptr; }
const char* not_for_reassemble_nchw(const Problem&) { return nullptr; }
const char* not_for_grad_features_nhwc(const Problem&) { return nullptr; }
const char* not_for_grad_masks_nhwc(const Problem&) { return nullptr; }

}  // namespace carafepp
