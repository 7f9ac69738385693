// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"

namespace carafepp::cuda {

Availability availability() {
    return {CARAFEPP_NOT_IMPLEMENTED,
            "carafepp was built without CUDA. Build it where nvcc is on the PATH, or copy the arrays to the CPU"};
}

const char* description() { return " (built without CUDA)"; }

// Never reached: availability() is asked first.
CurrentDevice::CurrentDevice(int) { throw Failure{availability().reason}; }
CurrentDevice::~CurrentDevice() = default;
void reassemble(const Problem&) { throw Failure{availability().reason}; }
void grad_features(const Problem&) { throw Failure{availability().reason}; }
void grad_masks(const Problem&) { throw Failure{availability().reason}; }
void normalize_masks(const Problem&) { throw Failure{availability().reason}; }
const char* not_for_grad_features_down2_nchw(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_features_down2_nhwc(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_features_nchw(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_features_nchw_mma(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_features_nhwc(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_features_nhwc_mma(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_masks_down2_nchw(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_masks_down2_nhwc(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_masks_nchw(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_masks_nchw_mma(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_masks_nhwc(const Problem&) { return "built without CUDA"; }
const char* not_for_grad_masks_nhwc_mma(const Problem&) { return "built without CUDA"; }
const char* not_for_reassemble_down2_nchw(const Problem&) { return "built without CUDA"; }
const char* not_for_reassemble_down2_nhwc(const Problem&) { return "built without CUDA"; }
const char* not_for_reassemble_nchw(const Problem&) { return "built without CUDA"; }
const char* not_for_reassemble_nchw_mma(const Problem&) { return "built without CUDA"; }
const char* not_for_reassemble_nhwc(const Problem&) { return "built without CUDA"; }
const char* not_for_reassemble_nhwc_mma(const Problem&) { return "built without CUDA"; }
void grad_features_down2_nchw(const Problem&) { throw Failure{availability().reason}; }
void grad_features_down2_nhwc(const Problem&) { throw Failure{availability().reason}; }
void grad_features_nchw(const Problem&) { throw Failure{availability().reason}; }
void grad_features_nchw_mma(const Problem&) { throw Failure{availability().reason}; }
void grad_features_nhwc(const Problem&) { throw Failure{availability().reason}; }
void grad_features_nhwc_mma(const Problem&) { throw Failure{availability().reason}; }
void grad_masks_down2_nchw(const Problem&) { throw Failure{availability().reason}; }
void grad_masks_down2_nhwc(const Problem&) { throw Failure{availability().reason}; }
void grad_masks_nchw(const Problem&) { throw Failure{availability().reason}; }
void grad_masks_nchw_mma(const Problem&) { throw Failure{availability().reason}; }
void grad_masks_nhwc(const Problem&) { throw Failure{availability().reason}; }
void grad_masks_nhwc_mma(const Problem&) { throw Failure{availability().reason}; }
void reassemble_down2_nchw(const Problem&) { throw Failure{availability().reason}; }
void reassemble_down2_nhwc(const Problem&) { throw Failure{availability().reason}; }
void reassemble_nchw(const Problem&) { throw Failure{availability().reason}; }
void reassemble_nchw_mma(const Problem&) { throw Failure{availability().reason}; }
void reassemble_nhwc(const Problem&) { throw Failure{availability().reason}; }
void reassemble_nhwc_mma(const Problem&) { throw Failure{availability().reason}; }

}  // namespace carafepp::cuda
