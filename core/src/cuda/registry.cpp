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
template <const char* (*cannot_run)(const Problem&, const Array&)>
const char* cannot_run_here(const Problem& problem, const Array& result) {
    return environment().only_generic ? "CARAFEPP_CUDA_KERNELS allows generic kernels only"
                                      : cannot_run(problem, result);
}

// An entry of a kernel for one factor.
#define CARAFEPP_CUDA_ENTRY(name, kernel) {name "_cuda", cannot_run_here<cannot_run_##kernel>, never_slower, kernel}

// The list of a result: its kernels for each factor and layout, and the generic one.
#define CARAFEPP_CUDA_LIST(result, kernel)                                  \
    {                                                                       \
        CARAFEPP_CUDA_ENTRY(result "_up2_nhwc_mma", kernel##_nhwc_mma),     \
            CARAFEPP_CUDA_ENTRY(result "_up2_nhwc", kernel##_nhwc),         \
            CARAFEPP_CUDA_ENTRY(result "_up2_nchw_mma", kernel##_nchw_mma), \
            CARAFEPP_CUDA_ENTRY(result "_up2_nchw", kernel##_nchw),         \
            CARAFEPP_CUDA_ENTRY(result "_down2_nhwc", kernel##_down2_nhwc), \
            CARAFEPP_CUDA_ENTRY(result "_down2_nchw", kernel##_down2_nchw), \
            {result "_any_cuda", runs_all, never_slower, kernel}, {}        \
    }

constexpr Kernel kOfReassemble[] = CARAFEPP_CUDA_LIST("reassemble", reassemble);
constexpr Kernel kOfReassembleWithLogits[] = CARAFEPP_CUDA_LIST("reassemble_with_logits", reassemble);
constexpr Kernel kOfGradFeatures[] = CARAFEPP_CUDA_LIST("grad_features", grad_features);
constexpr Kernel kOfGradMasks[] = CARAFEPP_CUDA_LIST("grad_masks", grad_masks);
constexpr Kernel kOfGradLogits[] = CARAFEPP_CUDA_LIST("grad_logits", grad_masks);
constexpr Kernel kOfNormalizeMasks[] = {{"normalize_masks_any_cuda", runs_all, never_slower, normalize_masks}, {}};
constexpr Kernel kOfNormalizeMasksBackward[] = {
    {"normalize_masks_backward_any_cuda", runs_all, never_slower, normalize_masks_backward}, {}};

}  // namespace

const Registry kernels = {
    kOfReassemble, kOfReassembleWithLogits, kOfGradFeatures,           kOfGradMasks,
    kOfGradLogits, kOfNormalizeMasks,       kOfNormalizeMasksBackward,
};

const char* wrong_environment() { return *environment().wrong ? environment().wrong : nullptr; }

}  // namespace carafepp::cuda
