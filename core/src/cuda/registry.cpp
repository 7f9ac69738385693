// SPDX-License-Identifier: Apache-2.0
// The kernels for CUDA. Each queues its work on problem.stream of the current device, and throws Failure. grad_masks
// stands for grad_logits where problem.from_logits.
#include "cuda.h"
#include "environment.h"
#include "kernel.h"

namespace carafepp::cuda {

// Kernels for one factor, faster ones first; then those for any factor. A .cu file defines each, and why it cannot run
// a problem. Kernels in Y also tell why a later one is faster.
#define CARAFEPP_REASSEMBLE_KERNELS(X, Y, result)          \
    X(result "_few_any", reassemble_few)                   \
    X(result "_up2_nhwc_mma", reassemble_up2_nhwc_mma)     \
    X(result "_up2_nhwc", reassemble_up2_nhwc)             \
    X(result "_up2_nchw_mma", reassemble_up2_nchw_mma)     \
    X(result "_up2_nchw", reassemble_up2_nchw)             \
    X(result "_down2_nchw_mma", reassemble_down2_nchw_mma) \
    X(result "_down2_nchw", reassemble_down2_nchw)         \
    X(result "_up1_nhwc_mma", reassemble_up1_nhwc_mma)     \
    X(result "_up1_nhwc", reassemble_up1_nhwc)             \
    X(result "_up1_nchw_mma", reassemble_up1_nchw_mma)     \
    X(result "_up1_nchw", reassemble_up1_nchw)             \
    X(result "_nhwc_mma", reassemble_nhwc_mma)             \
    X(result "_nhwc", reassemble_nhwc)                     \
    X(result "_nchw_mma", reassemble_nchw_mma)             \
    X(result "_nchw", reassemble_nchw)
#define CARAFEPP_GRAD_FEATURES_KERNELS(X, Y, result)      \
    X(result "_few_any", grad_features_few)               \
    X(result "_up2_nhwc_mma", grad_features_up2_nhwc_mma) \
    Y(result "_up2_nhwc", grad_features_up2_nhwc)         \
    X(result "_up2_nchw_mma", grad_features_up2_nchw_mma) \
    Y(result "_up2_nchw", grad_features_up2_nchw)         \
    X(result "_down2_nhwc", grad_features_down2_nhwc)     \
    X(result "_down2_nchw", grad_features_down2_nchw)     \
    X(result "_down_nhwc", grad_features_down_nhwc)       \
    X(result "_down_nchw", grad_features_down_nchw)       \
    X(result "_up1_nhwc_mma", grad_features_up1_nhwc_mma) \
    X(result "_up1_nhwc", grad_features_up1_nhwc)         \
    X(result "_up1_nchw_mma", grad_features_up1_nchw_mma) \
    X(result "_up1_nchw", grad_features_up1_nchw)         \
    X(result "_nhwc_mma", grad_features_nhwc_mma)         \
    X(result "_nhwc", grad_features_nhwc)                 \
    X(result "_nchw_mma", grad_features_nchw_mma)         \
    X(result "_nchw", grad_features_nchw)
#define CARAFEPP_GRAD_MASKS_KERNELS(X, Y, result)          \
    X(result "_few_any", grad_masks_few)                   \
    X(result "_up2_nhwc_mma", grad_masks_up2_nhwc_mma)     \
    X(result "_up2_nhwc", grad_masks_up2_nhwc)             \
    X(result "_up2_nchw_mma", grad_masks_up2_nchw_mma)     \
    X(result "_up2_nchw", grad_masks_up2_nchw)             \
    X(result "_down2_nhwc", grad_masks_down2_nhwc)         \
    X(result "_down2_nchw_mma", grad_masks_down2_nchw_mma) \
    X(result "_down2_nchw", grad_masks_down2_nchw)         \
    X(result "_up1_nhwc_mma", grad_masks_up1_nhwc_mma)     \
    X(result "_up1_nhwc", grad_masks_up1_nhwc)             \
    X(result "_up1_nchw_mma", grad_masks_up1_nchw_mma)     \
    X(result "_up1_nchw", grad_masks_up1_nchw)             \
    X(result "_nhwc_mma", grad_masks_nhwc_mma)             \
    X(result "_nhwc", grad_masks_nhwc)                     \
    X(result "_nchw_mma", grad_masks_nchw_mma)             \
    X(result "_nchw", grad_masks_nchw)

// Kernels that compute both gradients.
#define CARAFEPP_BACKWARD_KERNELS(X) X("backward_up2_nhwc_mma", backward_up2_nhwc_mma)

#define CARAFEPP_DECLARE(name, kernel)                                            \
    const char* cannot_run_##kernel(const Problem& problem, const Array& result); \
    void kernel(const Problem& problem, const Array& result);
#define CARAFEPP_DECLARE_SLOWER(name, kernel) \
    CARAFEPP_DECLARE(name, kernel)            \
    const char* slower_##kernel(const Problem& problem, const Array& result);
CARAFEPP_REASSEMBLE_KERNELS(CARAFEPP_DECLARE, CARAFEPP_DECLARE_SLOWER, )
CARAFEPP_GRAD_FEATURES_KERNELS(CARAFEPP_DECLARE, CARAFEPP_DECLARE_SLOWER, )
CARAFEPP_GRAD_MASKS_KERNELS(CARAFEPP_DECLARE, CARAFEPP_DECLARE_SLOWER, )

#define CARAFEPP_DECLARE_BACKWARD(name, kernel)                                                                   \
    const char* cannot_run_##kernel(const Problem& problem, const Array& grad_features, const Array& grad_masks); \
    const char* slower_##kernel(const Problem& problem, const Array& grad_features, const Array& grad_masks);     \
    void kernel(const Problem& problem, const Array& grad_features, const Array& grad_masks);
CARAFEPP_BACKWARD_KERNELS(CARAFEPP_DECLARE_BACKWARD)

// Generic kernels run every problem.
void reassemble(const Problem& problem, const Array& output);
void grad_features(const Problem& problem, const Array& grad_features);
void grad_masks(const Problem& problem, const Array& grad_masks);
void normalize_masks(const Problem& problem, const Array& masks);
void normalize_masks_backward(const Problem& problem, const Array& grad_logits);

namespace {

// A fast kernel runs nothing where the environment leaves only the generic ones.
template <auto cannot_run, class... Results>
const char* cannot_run_here(const Problem& problem, const Results&... results) {
    return environment().only_generic ? "CARAFEPP_CUDA_KERNELS allows generic kernels only"
                                      : cannot_run(problem, results...);
}

// An entry of a fast kernel.
#define CARAFEPP_ENTRY(name, kernel) {name "_cuda", cannot_run_here<cannot_run_##kernel>, never_slower, kernel},

#define CARAFEPP_ENTRY_SLOWER(name, kernel) \
    {name "_cuda", cannot_run_here<cannot_run_##kernel>, slower_##kernel, kernel},

// clang-format off
// The list of a result: its fast kernels, and the generic one.
#define CARAFEPP_LIST(result, kernel, fast_kernels)             \
    {                                                           \
        fast_kernels(CARAFEPP_ENTRY, CARAFEPP_ENTRY_SLOWER, result) \
        {result "_any_cuda", runs_all, never_slower, kernel},   \
        {}                                                      \
    }
// clang-format on

constexpr Kernel kOfReassemble[] = CARAFEPP_LIST("reassemble", reassemble, CARAFEPP_REASSEMBLE_KERNELS);
constexpr Kernel kOfReassembleWithLogits[] = CARAFEPP_LIST("reassemble_with_logits", reassemble,
                                                           CARAFEPP_REASSEMBLE_KERNELS);
constexpr Kernel kOfGradFeatures[] = CARAFEPP_LIST("grad_features", grad_features, CARAFEPP_GRAD_FEATURES_KERNELS);
constexpr Kernel kOfGradMasks[] = CARAFEPP_LIST("grad_masks", grad_masks, CARAFEPP_GRAD_MASKS_KERNELS);
constexpr Kernel kOfGradLogits[] = CARAFEPP_LIST("grad_logits", grad_masks, CARAFEPP_GRAD_MASKS_KERNELS);
constexpr Kernel kOfNormalizeMasks[] = {{"normalize_masks_any_cuda", runs_all, never_slower, normalize_masks}, {}};
constexpr Kernel kOfNormalizeMasksBackward[] = {
    {"normalize_masks_backward_any_cuda", runs_all, never_slower, normalize_masks_backward}, {}};

constexpr KernelOfBoth kOfBoth[] = {CARAFEPP_BACKWARD_KERNELS(CARAFEPP_ENTRY_SLOWER){}};

}  // namespace

const Registry kernels = {
    {kOfReassemble, kOfReassembleWithLogits, kOfGradFeatures, kOfGradMasks, kOfGradLogits, kOfNormalizeMasks,
     kOfNormalizeMasksBackward},
    kOfBoth,
};

}  // namespace carafepp::cuda
