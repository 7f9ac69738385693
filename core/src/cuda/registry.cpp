// SPDX-License-Identifier: Apache-2.0
// The kernels for CUDA.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda.h"
#include "kernel.h"

namespace carafepp::cuda {
namespace {

// The environment variable CARAFEPP_CUDA_KERNELS says which CUDA kernels may run. It is read once.
struct Environment {
    bool only_generic = false;
    char wrong[160] = "";  // why it cannot be followed

    Environment() {
        const char* text = std::getenv("CARAFEPP_CUDA_KERNELS");
        if (text == nullptr || *text == '\0' || std::strcmp(text, "all") == 0) return;
        only_generic = std::strcmp(text, "generic") == 0;
        if (only_generic) return;
        std::snprintf(wrong, sizeof wrong,
                      "the environment variable CARAFEPP_CUDA_KERNELS must be all or generic; got %.64s.", text);
    }
};

const Environment& environment() {
    static const Environment read;
    return read;
}

// A fast kernel runs nothing where the environment leaves only the generic ones.
template <const char* (*cannot_run)(const Problem&)>
const char* cannot_run_here(const Problem& problem) {
    return environment().only_generic ? "CARAFEPP_CUDA_KERNELS allows generic kernels only" : cannot_run(problem);
}

// An entry of a kernel for one factor.
#define CARAFEPP_CUDA_ENTRY(name, kernel) {name "_cuda", cannot_run_here<cannot_run_##kernel>, never_slower, kernel}

constexpr Kernel kReassemble[] = {CARAFEPP_CUDA_ENTRY("reassemble_up2_nhwc_mma", reassemble_nhwc_mma),
                                  CARAFEPP_CUDA_ENTRY("reassemble_up2_nhwc", reassemble_nhwc),
                                  CARAFEPP_CUDA_ENTRY("reassemble_up2_nchw_mma", reassemble_nchw_mma),
                                  CARAFEPP_CUDA_ENTRY("reassemble_up2_nchw", reassemble_nchw),
                                  CARAFEPP_CUDA_ENTRY("reassemble_down2_nhwc", reassemble_down2_nhwc),
                                  CARAFEPP_CUDA_ENTRY("reassemble_down2_nchw", reassemble_down2_nchw),
                                  {"reassemble_any_cuda", runs_all, never_slower, reassemble},
                                  {}};
constexpr Kernel kReassembleWithLogits[] = {
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_up2_nhwc_mma", reassemble_nhwc_mma),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_up2_nhwc", reassemble_nhwc),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_up2_nchw_mma", reassemble_nchw_mma),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_up2_nchw", reassemble_nchw),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_down2_nhwc", reassemble_down2_nhwc),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_down2_nchw", reassemble_down2_nchw),
    {"reassemble_with_logits_any_cuda", runs_all, never_slower, reassemble},
    {}};
constexpr Kernel kGradFeatures[] = {CARAFEPP_CUDA_ENTRY("grad_features_up2_nhwc_mma", grad_features_nhwc_mma),
                                    CARAFEPP_CUDA_ENTRY("grad_features_up2_nhwc", grad_features_nhwc),
                                    CARAFEPP_CUDA_ENTRY("grad_features_up2_nchw_mma", grad_features_nchw_mma),
                                    CARAFEPP_CUDA_ENTRY("grad_features_up2_nchw", grad_features_nchw),
                                    CARAFEPP_CUDA_ENTRY("grad_features_down2_nhwc", grad_features_down2_nhwc),
                                    CARAFEPP_CUDA_ENTRY("grad_features_down2_nchw", grad_features_down2_nchw),
                                    {"grad_features_any_cuda", runs_all, never_slower, grad_features},
                                    {}};
constexpr Kernel kGradMasks[] = {CARAFEPP_CUDA_ENTRY("grad_masks_up2_nhwc_mma", grad_masks_nhwc_mma),
                                 CARAFEPP_CUDA_ENTRY("grad_masks_up2_nhwc", grad_masks_nhwc),
                                 CARAFEPP_CUDA_ENTRY("grad_masks_up2_nchw_mma", grad_masks_nchw_mma),
                                 CARAFEPP_CUDA_ENTRY("grad_masks_up2_nchw", grad_masks_nchw),
                                 CARAFEPP_CUDA_ENTRY("grad_masks_down2_nhwc", grad_masks_down2_nhwc),
                                 CARAFEPP_CUDA_ENTRY("grad_masks_down2_nchw", grad_masks_down2_nchw),
                                 {"grad_masks_any_cuda", runs_all, never_slower, grad_masks},
                                 {}};
constexpr Kernel kGradLogits[] = {CARAFEPP_CUDA_ENTRY("grad_logits_up2_nhwc_mma", grad_masks_nhwc_mma),
                                  CARAFEPP_CUDA_ENTRY("grad_logits_up2_nhwc", grad_masks_nhwc),
                                  CARAFEPP_CUDA_ENTRY("grad_logits_up2_nchw_mma", grad_masks_nchw_mma),
                                  CARAFEPP_CUDA_ENTRY("grad_logits_up2_nchw", grad_masks_nchw),
                                  CARAFEPP_CUDA_ENTRY("grad_logits_down2_nhwc", grad_masks_down2_nhwc),
                                  CARAFEPP_CUDA_ENTRY("grad_logits_down2_nchw", grad_masks_down2_nchw),
                                  {"grad_logits_any_cuda", runs_all, never_slower, grad_masks},
                                  {}};
constexpr Kernel kNormalizeMasks[] = {{"normalize_masks_any_cuda", runs_all, never_slower, normalize_masks}, {}};
constexpr Kernel kNormalizeMasksBackward[] = {{"normalize_masks_backward_any_cuda", runs_all, never_slower, grad_masks},
                                              {}};

}  // namespace

const Registry kernels = {
    {},
    {kReassemble},
    {kGradFeatures, kGradMasks},
    {kReassembleWithLogits},
    {kGradFeatures, kGradLogits},
    {kNormalizeMasks},
    {kNormalizeMasksBackward},
};

const char* wrong_environment() { return *environment().wrong ? environment().wrong : nullptr; }

}  // namespace carafepp::cuda
