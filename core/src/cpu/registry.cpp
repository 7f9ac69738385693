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
template <Isa isa, const char* (*cannot_run)(const Problem&, const Array&)>
const char* cannot_run_here(const Problem& problem, const Array& result) {
    constexpr int64_t most = int64_t{1} << 36;
    if (std::max(problem.factor.up, problem.factor.down) > 1024) return "up or down is more than 1024";
    if (std::max(problem.features.h, problem.features.w) > most) return "a map is higher or wider than 2^36";
    const char* reason = unavailable(isa);
    return reason ? reason : cannot_run(problem, result);
}

// The entries of a kernel, one for each instruction set.
#define CARAFEPP_ENTRY(isa, supported, unsupported, name, kernel) \
    {name "_" #isa, cannot_run_here<Isa::isa, cannot_run_##kernel>, slower_##kernel, isa::kernel},
#define CARAFEPP_ENTRIES(name, kernel) CARAFEPP_ISAS(CARAFEPP_ENTRY, name, kernel)

// The kernel for runs is preferred for more problems where registers are few.
template <Isa isa>
const char* slower_runs(const Problem& problem, const Array& output) {
    return slower_reassemble_runs_any(problem, output, isa);
}
#define CARAFEPP_RUNS(isa, supported, unsupported, name, kernel) \
    {name "_" #isa, cannot_run_here<Isa::isa, cannot_run_##kernel>, slower_runs<Isa::isa>, isa::kernel},

// The same for few channels, whose kernels may compute both gradients of a backward together.
#define CARAFEPP_FEW_NCHW(isa, supported, unsupported, name, kernel) \
    {name "_" #isa, cannot_run_here<Isa::isa, cannot_run_##kernel>, slower_##kernel, isa::kernel, isa::grads_few_nchw},
#define CARAFEPP_FEW_NHWC(isa, supported, unsupported, name, kernel) \
    {name "_" #isa, cannot_run_here<Isa::isa, cannot_run_##kernel>, slower_##kernel, isa::kernel, isa::grads_few_nhwc},

// clang-format off
// The list of a result: entries of its own, its kernel for each layout, and the reference.
#define CARAFEPP_LIST(result, kernel, first)                            \
    {                                                                   \
        first                                                           \
        CARAFEPP_ISAS(CARAFEPP_FEW_NCHW, result "_few_nchw", kernel##_few_nchw) \
        CARAFEPP_ISAS(CARAFEPP_FEW_NHWC, result "_few_nhwc", kernel##_few_nhwc) \
        CARAFEPP_ENTRIES(result "_nhwc", kernel##_nhwc)                 \
        CARAFEPP_ENTRIES(result "_nchw", kernel##_nchw)                 \
        CARAFEPP_ENTRIES(result "_any", kernel##_any)                   \
        {result "_any_ref", runs_all, never_slower, reference::kernel}, \
        {}                                                              \
    }

// The list of a normaliser, whose kernel takes any layout.
#define CARAFEPP_NORMALIZER_LIST(result)                                \
    {                                                                   \
        CARAFEPP_ENTRIES(#result "_any", result)                        \
        {#result "_any_ref", runs_all, never_slower, reference::result}, \
        {}                                                              \
    }
// clang-format on

constexpr Kernel kOfReassemble[] = CARAFEPP_LIST(
    "reassemble", reassemble, CARAFEPP_ISAS(CARAFEPP_RUNS, "reassemble_runs_any", reassemble_runs_any));
constexpr Kernel kOfReassembleWithLogits[] = CARAFEPP_LIST(
    "reassemble_with_logits", reassemble,
    CARAFEPP_ISAS(CARAFEPP_RUNS, "reassemble_with_logits_runs_any", reassemble_runs_any));
constexpr Kernel kOfGradFeatures[] = CARAFEPP_LIST("grad_features", grad_features, );
constexpr Kernel kOfGradMasks[] = CARAFEPP_LIST("grad_masks", grad_masks, );
constexpr Kernel kOfGradLogits[] = CARAFEPP_LIST("grad_logits", grad_masks, );
constexpr Kernel kOfNormalizeMasks[] = CARAFEPP_NORMALIZER_LIST(normalize_masks);
constexpr Kernel kOfNormalizeMasksBackward[] = CARAFEPP_NORMALIZER_LIST(normalize_masks_backward);

}  // namespace

const Registry kernels = {
    {kOfReassemble, kOfReassembleWithLogits, kOfGradFeatures, kOfGradMasks, kOfGradLogits, kOfNormalizeMasks,
     kOfNormalizeMasksBackward},
    nullptr,
};

}  // namespace carafepp::cpu
