// SPDX-License-Identifier: Apache-2.0
// The kernels for the CPU.
#include <algorithm>

#include "kernel.h"
#include "reference.h"
#include "simd/kernels.h"

namespace carafepp::cpu {
namespace {

// A kernel runs where the processor has its instruction set. Numbers beyond these, which arrays without elements may
// have, would overflow in the kernels' arithmetic.
template <const char* (*unavailable)(), const char* (*cannot_run)(const Problem&)>
const char* cannot_run_here(const Problem& problem) {
    constexpr int64_t most = int64_t{1} << 36;
    if (std::max(problem.factor.up, problem.factor.down) > 1024) return "up or down is more than 1024";
    if (std::max(problem.features.h, problem.features.w) > most) return "a map is higher or wider than 2^36";
    const char* reason = unavailable();
    return reason ? reason : cannot_run(problem);
}

#define CARAFEPP_ENTRY(name, isa, kernel, slower) \
    {name "_" #isa, cannot_run_here<isa::unavailable, cannot_run_##kernel>, slower, isa::kernel}

// The entries of a kernel: one for each instruction set of the processor that this is built for.
#if defined(__x86_64__)
#define CARAFEPP_ENTRIES_OF(name, kernel, slower)                                             \
    CARAFEPP_ENTRY(name, avx512, kernel, slower), CARAFEPP_ENTRY(name, avx2, kernel, slower), \
        CARAFEPP_ENTRY(name, sse2, kernel, slower)
#elif defined(__aarch64__)
#define CARAFEPP_ENTRIES_OF(name, kernel, slower) CARAFEPP_ENTRY(name, neon, kernel, slower)
#else
#define CARAFEPP_ENTRIES_OF(name, kernel, slower) CARAFEPP_ENTRY(name, generic, kernel, slower)
#endif
#define CARAFEPP_ENTRIES(name, kernel) CARAFEPP_ENTRIES_OF(name, kernel, never_slower)
#define CARAFEPP_NCHW_ENTRIES(name, kernel) CARAFEPP_ENTRIES_OF(name, kernel, slower_##kernel)

constexpr Kernel kReassemble[] = {CARAFEPP_ENTRIES("reassemble_nhwc", reassemble_nhwc),
                                  CARAFEPP_NCHW_ENTRIES("reassemble_nchw", reassemble_nchw),
                                  CARAFEPP_ENTRIES("reassemble_any", reassemble_any),
                                  {"reassemble_any_ref", runs_all, never_slower, reference::reassemble},
                                  {}};
constexpr Kernel kReassembleWithLogits[] = {
    CARAFEPP_ENTRIES("reassemble_with_logits_nhwc", reassemble_nhwc),
    CARAFEPP_NCHW_ENTRIES("reassemble_with_logits_nchw", reassemble_nchw),
    CARAFEPP_ENTRIES("reassemble_with_logits_any", reassemble_any),
    {"reassemble_with_logits_any_ref", runs_all, never_slower, reference::reassemble},
    {}};
constexpr Kernel kGradFeatures[] = {CARAFEPP_ENTRIES("grad_features_nhwc", grad_features_nhwc),
                                    CARAFEPP_NCHW_ENTRIES("grad_features_nchw", grad_features_nchw),
                                    CARAFEPP_ENTRIES("grad_features_any", grad_features_any),
                                    {"grad_features_any_ref", runs_all, never_slower, reference::grad_features},
                                    {}};
constexpr Kernel kGradMasks[] = {CARAFEPP_ENTRIES("grad_masks_nhwc", grad_masks_nhwc),
                                 CARAFEPP_NCHW_ENTRIES("grad_masks_nchw", grad_masks_nchw),
                                 CARAFEPP_ENTRIES("grad_masks_any", grad_masks_any),
                                 {"grad_masks_any_ref", runs_all, never_slower, reference::grad_masks},
                                 {}};
constexpr Kernel kGradLogits[] = {CARAFEPP_ENTRIES("grad_logits_nhwc", grad_masks_nhwc),
                                  CARAFEPP_NCHW_ENTRIES("grad_logits_nchw", grad_masks_nchw),
                                  CARAFEPP_ENTRIES("grad_logits_any", grad_masks_any),
                                  {"grad_logits_any_ref", runs_all, never_slower, reference::grad_masks},
                                  {}};
constexpr Kernel kNormalizeMasks[] = {CARAFEPP_ENTRIES("normalize_masks_any", normalize_masks),
                                      {"normalize_masks_any_ref", runs_all, never_slower, reference::normalize_masks},
                                      {}};
constexpr Kernel kNormalizeMasksBackward[] = {
    CARAFEPP_ENTRIES("normalize_masks_backward_any", normalize_masks_backward),
    {"normalize_masks_backward_any_ref", runs_all, never_slower, reference::grad_masks},
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

}  // namespace carafepp::cpu
