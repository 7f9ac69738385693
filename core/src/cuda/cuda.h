// SPDX-License-Identifier: Apache-2.0
// CUDA's devices and kernels. A build without CUDA has no kernels, and the rest from no_cuda.cpp.
#pragma once

#include <string>

#include "problem.h"

namespace carafepp::cuda {

// CARAFEPP_OK, or the status and the reason: CUDA is not built, or finds no driver or device.
struct Availability {
    carafepp_status status;
    std::string reason;
};
Availability availability();

// The build, as the end of carafepp_config's line "devices: cpu".
const char* description();

// Why the value of the environment variable CARAFEPP_CUDA_KERNELS is wrong, or NULL. It says which kernels may run.
const char* wrong_environment();

// A refusal of CUDA, with its name and text.
struct Failure {
    std::string text;
};

// Makes a device current, and at its end the caller's again.
class CurrentDevice {
public:
    explicit CurrentDevice(int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice&) = delete;

private:
    [[maybe_unused]] int callers_ = 0, device_ = 0;  // not in no_cuda.cpp
};

// Each queues one kernel on problem.stream of the current device, for any strides. They throw Failure. grad_masks
// stands for grad_logits where problem.from_logits.
void reassemble(const Problem& problem, const Array& output);            // masks given or normalised from logits
void grad_features(const Problem& problem, const Array& grad_features);  // likewise
void grad_masks(const Problem& problem, const Array& grad_masks);        // likewise
void normalize_masks(const Problem& problem, const Array& masks);
void normalize_masks_backward(const Problem& problem, const Array& grad_logits);

// The same, of the problems that cannot_run_... gives no reason against.
const char* cannot_run_grad_features_down2_nchw(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_features_down2_nhwc(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_features_nchw(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_features_nchw_mma(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_features_nhwc(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_features_nhwc_mma(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_masks_down2_nchw(const Problem& problem, const Array& grad_masks);
const char* cannot_run_grad_masks_down2_nhwc(const Problem& problem, const Array& grad_masks);
const char* cannot_run_grad_masks_nchw(const Problem& problem, const Array& grad_masks);
const char* cannot_run_grad_masks_nchw_mma(const Problem& problem, const Array& grad_masks);
const char* cannot_run_grad_masks_nhwc(const Problem& problem, const Array& grad_masks);
const char* cannot_run_grad_masks_nhwc_mma(const Problem& problem, const Array& grad_masks);
const char* cannot_run_reassemble_down2_nchw(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_down2_nhwc(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_nchw(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_nchw_mma(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_nhwc(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_nhwc_mma(const Problem& problem, const Array& output);
void grad_features_down2_nchw(const Problem& problem, const Array& grad_features);
void grad_features_down2_nhwc(const Problem& problem, const Array& grad_features);
void grad_features_nchw(const Problem& problem, const Array& grad_features);
void grad_features_nchw_mma(const Problem& problem, const Array& grad_features);
void grad_features_nhwc(const Problem& problem, const Array& grad_features);
void grad_features_nhwc_mma(const Problem& problem, const Array& grad_features);
void grad_masks_down2_nchw(const Problem& problem, const Array& grad_masks);
void grad_masks_down2_nhwc(const Problem& problem, const Array& grad_masks);
void grad_masks_nchw(const Problem& problem, const Array& grad_masks);
void grad_masks_nchw_mma(const Problem& problem, const Array& grad_masks);
void grad_masks_nhwc(const Problem& problem, const Array& grad_masks);
void grad_masks_nhwc_mma(const Problem& problem, const Array& grad_masks);
void reassemble_down2_nchw(const Problem& problem, const Array& output);
void reassemble_down2_nhwc(const Problem& problem, const Array& output);
void reassemble_nchw(const Problem& problem, const Array& output);
void reassemble_nchw_mma(const Problem& problem, const Array& output);
void reassemble_nhwc(const Problem& problem, const Array& output);
void reassemble_nhwc_mma(const Problem& problem, const Array& output);

}  // namespace carafepp::cuda
