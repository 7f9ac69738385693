// SPDX-License-Identifier: Apache-2.0
// The entry points. Each call is checked once, then goes to the first implementation in a list that accepts the
// problem.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "cpu/parallel.h"
#include "cpu/reference.h"
#include "cpu/simd/kernels.h"
#include "cuda/cuda.h"
#include "problem.h"

namespace carafepp {
namespace {

struct Implementation {
    const char* name;
    const char* (*declines)(const Problem&);  // the reason, or NULL
    void (*run)(const Problem&);
};

const char* takes_all(const Problem&) { return nullptr; }

// Accepts what a kernel accepts, where the processor has its instruction set. Numbers beyond these, which arrays
// without elements may have, would overflow in the kernels' arithmetic.
template <const char* (*unavailable)(), const char* (*not_for)(const Problem&)>
const char* takes(const Problem& problem) {
    constexpr int64_t most = int64_t{1} << 36;
    if (std::max(problem.factor.up, problem.factor.down) > 1024) return "up or down is more than 1024";
    if (std::max(problem.features.h, problem.features.w) > most) return "a map is higher or wider than 2^36";
    const char* reason = unavailable();
    return reason ? reason : not_for(problem);
}

#define CARAFEPP_ENTRY(name, isa, kernel) {name "_" #isa, takes<isa::unavailable, not_for_##kernel>, isa::kernel}

// The entries of a kernel: one for each instruction set of the processor that this is built for.
#if defined(__x86_64__)
#define CARAFEPP_ENTRIES(name, kernel) \
    CARAFEPP_ENTRY(name, avx512, kernel), CARAFEPP_ENTRY(name, avx2, kernel), CARAFEPP_ENTRY(name, sse2, kernel)
#elif defined(__aarch64__)
#define CARAFEPP_ENTRIES(name, kernel) CARAFEPP_ENTRY(name, neon, kernel)
#else
#define CARAFEPP_ENTRIES(name, kernel) CARAFEPP_ENTRY(name, generic, kernel)
#endif

// Best first, the reference last. Each list ends with an entry without a name.
constexpr Implementation kReassemble[] = {CARAFEPP_ENTRIES("reassemble_nhwc", reassemble_nhwc),
                                          CARAFEPP_ENTRIES("reassemble_nchw", reassemble_nchw),
                                          CARAFEPP_ENTRIES("reassemble_any", reassemble_any),
                                          {"reassemble_any_ref", takes_all, reference::reassemble},
                                          {}};
constexpr Implementation kReassembleWithLogits[] = {
    CARAFEPP_ENTRIES("reassemble_with_logits_nhwc", reassemble_nhwc),
    CARAFEPP_ENTRIES("reassemble_with_logits_nchw", reassemble_nchw),
    CARAFEPP_ENTRIES("reassemble_with_logits_any", reassemble_any),
    {"reassemble_with_logits_any_ref", takes_all, reference::reassemble},
    {}};
constexpr Implementation kGradFeatures[] = {CARAFEPP_ENTRIES("grad_features_nhwc", grad_features_nhwc),
                                            CARAFEPP_ENTRIES("grad_features_nchw", grad_features_nchw),
                                            CARAFEPP_ENTRIES("grad_features_any", grad_features_any),
                                            {"grad_features_any_ref", takes_all, reference::grad_features},
                                            {}};
constexpr Implementation kGradMasks[] = {CARAFEPP_ENTRIES("grad_masks_nhwc", grad_masks_nhwc),
                                         CARAFEPP_ENTRIES("grad_masks_nchw", grad_masks_nchw),
                                         CARAFEPP_ENTRIES("grad_masks_any", grad_masks_any),
                                         {"grad_masks_any_ref", takes_all, reference::grad_masks},
                                         {}};
constexpr Implementation kGradLogits[] = {CARAFEPP_ENTRIES("grad_logits_nhwc", grad_masks_nhwc),
                                          CARAFEPP_ENTRIES("grad_logits_nchw", grad_masks_nchw),
                                          CARAFEPP_ENTRIES("grad_logits_any", grad_masks_any),
                                          {"grad_logits_any_ref", takes_all, reference::grad_masks},
                                          {}};
constexpr Implementation kNormalizeMasks[] = {CARAFEPP_ENTRIES("normalize_masks_any", normalize_masks),
                                              {"normalize_masks_any_ref", takes_all, reference::normalize_masks},
                                              {}};
constexpr Implementation kNormalizeMasksBackward[] = {
    CARAFEPP_ENTRIES("normalize_masks_backward_any", normalize_masks_backward),
    {"normalize_masks_backward_any_ref", takes_all, reference::grad_masks},
    {}};

// The environment variable CARAFEPP_CUDA_KERNELS says which CUDA kernels may run. It is read once.
struct CudaKernels {
    bool only_generic = false;
    char wrong[160] = "";  // why it cannot be followed

    CudaKernels() {
        const char* text = std::getenv("CARAFEPP_CUDA_KERNELS");
        if (text == nullptr || *text == '\0' || std::strcmp(text, "all") == 0) return;
        only_generic = std::strcmp(text, "generic") == 0;
        if (only_generic) return;
        std::snprintf(wrong, sizeof wrong,
                      "the environment variable CARAFEPP_CUDA_KERNELS must be all or generic; got %.64s.", text);
    }
};

const CudaKernels& cuda_kernels() {
    static const CudaKernels of_environment;
    return of_environment;
}

// A fast kernel takes nothing where the environment leaves only the generic ones.
template <const char* (*not_for)(const Problem&)>
const char* takes_fast(const Problem& problem) {
    return cuda_kernels().only_generic ? "CARAFEPP_CUDA_KERNELS allows generic kernels only" : not_for(problem);
}

#define CARAFEPP_CUDA_ENTRY(name, kernel) {name "_cuda", takes_fast<cuda::not_for_##kernel>, cuda::kernel}

constexpr Implementation kCudaReassemble[] = {CARAFEPP_CUDA_ENTRY("reassemble_nhwc_mma", reassemble_nhwc_mma),
                                              CARAFEPP_CUDA_ENTRY("reassemble_nhwc", reassemble_nhwc),
                                              CARAFEPP_CUDA_ENTRY("reassemble_nchw_mma", reassemble_nchw_mma),
                                              CARAFEPP_CUDA_ENTRY("reassemble_nchw", reassemble_nchw),
                                              CARAFEPP_CUDA_ENTRY("reassemble_down2_nhwc", reassemble_down2_nhwc),
                                              CARAFEPP_CUDA_ENTRY("reassemble_down2_nchw", reassemble_down2_nchw),
                                              {"reassemble_any_cuda", takes_all, cuda::reassemble},
                                              {}};
constexpr Implementation kCudaReassembleWithLogits[] = {
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_nhwc_mma", reassemble_nhwc_mma),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_nhwc", reassemble_nhwc),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_nchw_mma", reassemble_nchw_mma),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_nchw", reassemble_nchw),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_down2_nhwc", reassemble_down2_nhwc),
    CARAFEPP_CUDA_ENTRY("reassemble_with_logits_down2_nchw", reassemble_down2_nchw),
    {"reassemble_with_logits_any_cuda", takes_all, cuda::reassemble},
    {}};
constexpr Implementation kCudaGradFeatures[] = {
    CARAFEPP_CUDA_ENTRY("grad_features_nhwc_mma", grad_features_nhwc_mma),
    CARAFEPP_CUDA_ENTRY("grad_features_nhwc", grad_features_nhwc),
    CARAFEPP_CUDA_ENTRY("grad_features_nchw_mma", grad_features_nchw_mma),
    CARAFEPP_CUDA_ENTRY("grad_features_nchw", grad_features_nchw),
    CARAFEPP_CUDA_ENTRY("grad_features_down2_nhwc", grad_features_down2_nhwc),
    CARAFEPP_CUDA_ENTRY("grad_features_down2_nchw", grad_features_down2_nchw),
    {"grad_features_any_cuda", takes_all, cuda::grad_features},
    {}};
constexpr Implementation kCudaGradMasks[] = {CARAFEPP_CUDA_ENTRY("grad_masks_nhwc_mma", grad_masks_nhwc_mma),
                                             CARAFEPP_CUDA_ENTRY("grad_masks_nhwc", grad_masks_nhwc),
                                             CARAFEPP_CUDA_ENTRY("grad_masks_nchw_mma", grad_masks_nchw_mma),
                                             CARAFEPP_CUDA_ENTRY("grad_masks_nchw", grad_masks_nchw),
                                             CARAFEPP_CUDA_ENTRY("grad_masks_down2_nhwc", grad_masks_down2_nhwc),
                                             CARAFEPP_CUDA_ENTRY("grad_masks_down2_nchw", grad_masks_down2_nchw),
                                             {"grad_masks_any_cuda", takes_all, cuda::grad_masks},
                                             {}};
constexpr Implementation kCudaGradLogits[] = {CARAFEPP_CUDA_ENTRY("grad_logits_nhwc_mma", grad_masks_nhwc_mma),
                                              CARAFEPP_CUDA_ENTRY("grad_logits_nhwc", grad_masks_nhwc),
                                              CARAFEPP_CUDA_ENTRY("grad_logits_nchw_mma", grad_masks_nchw_mma),
                                              CARAFEPP_CUDA_ENTRY("grad_logits_nchw", grad_masks_nchw),
                                              CARAFEPP_CUDA_ENTRY("grad_logits_down2_nhwc", grad_masks_down2_nhwc),
                                              CARAFEPP_CUDA_ENTRY("grad_logits_down2_nchw", grad_masks_down2_nchw),
                                              {"grad_logits_any_cuda", takes_all, cuda::grad_masks},
                                              {}};
constexpr Implementation kCudaNormalizeMasks[] = {{"normalize_masks_any_cuda", takes_all, cuda::normalize_masks}, {}};
constexpr Implementation kCudaNormalizeMasksBackward[] = {
    {"normalize_masks_backward_any_cuda", takes_all, cuda::grad_masks}, {}};

// The list for each result of each function, in the order of the signature, on each device.
using Lists = const Implementation* const[7][2];
constexpr Lists kCpuLists = {
    {},
    {kReassemble},
    {kGradFeatures, kGradMasks},
    {kReassembleWithLogits},
    {kGradFeatures, kGradLogits},
    {kNormalizeMasks},
    {kNormalizeMasksBackward},
};
constexpr Lists kCudaLists = {
    {},
    {kCudaReassemble},
    {kCudaGradFeatures, kCudaGradMasks},
    {kCudaReassembleWithLogits},
    {kCudaGradFeatures, kCudaGradLogits},
    {kCudaNormalizeMasks},
    {kCudaNormalizeMasksBackward},
};

const Lists& lists_of(carafepp_device device) { return device == CARAFEPP_CUDA ? kCudaLists : kCpuLists; }

bool log_choices() {
    static const bool wanted = [] {
        const char* level = std::getenv("CARAFEPP_LOG");
        return level != nullptr && std::strcmp(level, "debug") == 0;
    }();
    return wanted;
}

[[noreturn]] void fail(carafepp_status status, carafepp_function function, const std::string& sentence) {
    throw Error{status, std::string("[") + function_name(function) + "] " + sentence};
}

const Implementation* find(const Implementation* list, const char* name) {
    for (; list != nullptr && list->name != nullptr; list++) {
        if (std::strcmp(list->name, name) == 0) return list;
    }
    return nullptr;
}

// A forced name counts for the list that it stands in; the other results of a call, and other functions, choose as
// always.
void check_forced(carafepp_function function, const char* name, const Lists& lists) {
    if (name == nullptr) return;
    for (const auto& of_function : lists) {
        if (find(of_function[0], name) || find(of_function[1], name)) return;
    }
    fail(CARAFEPP_VALUE_ERROR, function,
         std::string("implementation must be a name that carafepp_list_implementations gives; got ") + name + ".");
}

const Implementation& choose(carafepp_function function, const Implementation* list, const char* forced_name,
                             const Problem& problem) {
    const Implementation* forced = forced_name ? find(list, forced_name) : nullptr;
    if (forced != nullptr && forced->declines(problem) != nullptr) {
        fail(CARAFEPP_NOT_IMPLEMENTED, function,
             std::string("implementation ") + forced->name + " declines: " + forced->declines(problem) + ".");
    }
    const Implementation* entry = forced ? forced : list;
    std::string log;
    while (const char* reason = entry->declines(problem)) {
        if (log_choices()) log += std::string("; ") + entry->name + " declines: " + reason;
        entry++;
    }
    if (log_choices()) {
        std::fprintf(stderr, "carafepp: [%s] %s%s%s\n", function_name(function), entry->name, forced ? " (forced)" : "",
                     log.c_str());
    }
    return *entry;
}

Call check(carafepp_function function, const carafepp_params* params, const carafepp_tensor* const* tensors,
           bool results_required) {
    Call call = check_call(function, params, tensors, results_required);
    check_forced(function, call.params.implementation, lists_of(call.problem.device));
    if (call.problem.device == CARAFEPP_CUDA) {
        const cuda::Availability cuda = cuda::availability();
        if (cuda.status != CARAFEPP_OK)
            fail(cuda.status, function, "CUDA arrays cannot be computed on: " + cuda.reason + ".");
        if (*cuda_kernels().wrong) fail(CARAFEPP_VALUE_ERROR, function, cuda_kernels().wrong);
    }
    if (call.problem.device == CARAFEPP_CPU && wrong_isa_limit()) {
        fail(CARAFEPP_VALUE_ERROR, function, wrong_isa_limit());
    }
    return call;
}

// Calls f() with the device of a problem as the current one.
template <class F>
void on_device(carafepp_function function, const Problem& problem, F f) {
    if (problem.device != CARAFEPP_CUDA) return f();
    try {
        const cuda::CurrentDevice device(problem.device_index);
        f();
    } catch (const cuda::Failure& failure) {
        fail(CARAFEPP_RUNTIME_ERROR, function, "CUDA failed: " + failure.text + ".");
    }
}

void run(carafepp_function function, const carafepp_params* params, const carafepp_tensor* const* tensors,
         void* stream) {
    Call call = check(function, params, tensors, true);
    call.problem.stream = stream;
    const auto& lists = lists_of(call.problem.device)[function];
    on_device(function, call.problem, [&] {
        const Implementation* chosen[2] = {};  // before any runs, since a choice may fail
        for (int k = 0; k < 2; k++) {
            call.problem.result = call.results[k];
            if (call.wanted[k]) chosen[k] = &choose(function, lists[k], call.params.implementation, call.problem);
        }
        for (int k = 0; k < 2; k++) {
            call.problem.result = call.results[k];
            if (chosen[k] != nullptr) chosen[k]->run(call.problem);
        }
    });
}

// ---- the C boundary ----

thread_local char last_error[2048] = "";

carafepp_status report(carafepp_status status, const char* sentence) {
    std::snprintf(last_error, sizeof last_error, "%s", sentence);
    return status;
}

// Turns what f throws into a status and a sentence.
template <class F>
carafepp_status guarded(F f) {
    try {
        f();
        return CARAFEPP_OK;
    } catch (const Error& error) {
        return report(error.status, error.message.c_str());
    } catch (const std::bad_alloc&) {
        return report(CARAFEPP_MEMORY_ERROR, "[carafepp] out of memory for scratch space.");
    } catch (const std::exception& error) {
        return report(CARAFEPP_RUNTIME_ERROR, error.what());
    } catch (...) {
        return report(CARAFEPP_RUNTIME_ERROR, "[carafepp] a caller's function threw.");
    }
}

template <class... Tensors>
carafepp_status call(carafepp_function function, void* stream, const carafepp_params* params,
                     const Tensors*... tensors) {
    return guarded([&] {
        const carafepp_tensor* const all[] = {tensors...};
        run(function, params, all, stream);
    });
}

struct Config {
    char text[512];

    Config() {
#if defined(__clang__)
        const char* compiler = "clang " __clang_version__;
#else
        const char* compiler = "gcc " __VERSION__;
#endif
#if defined(__x86_64__)
        const char* target = "x86-64";
        const char* features[] = {
            " sse2",
            __builtin_cpu_supports("avx2") ? " avx2" : "",
            __builtin_cpu_supports("fma") ? " fma" : "",
            __builtin_cpu_supports("avx512f") ? " avx512f" : "",
            __builtin_cpu_supports("avx512bw") ? " avx512bw" : "",
        };
#elif defined(__aarch64__)
        const char* target = "aarch64";
        const char* features[] = {" neon", "", "", "", ""};
#else
        const char* target = "generic";
        const char* features[] = {" unknown", "", "", "", ""};
#endif
        std::snprintf(text, sizeof text,
                      "version: %s\ncompiler: %s\nbuilt for: %s\nthis processor has:%s%s%s%s%s\ndevices: cpu%s",
                      CARAFEPP_VERSION, compiler, target, features[0], features[1], features[2], features[3],
                      features[4], cuda::description());
    }
};

}  // namespace
}  // namespace carafepp

using namespace carafepp;

carafepp_status carafepp_reassemble(const carafepp_params* params, const carafepp_tensor* features,
                                    const carafepp_tensor* masks, const carafepp_tensor* output, void* stream) {
    return call(CARAFEPP_REASSEMBLE, stream, params, features, masks, output);
}

carafepp_status carafepp_reassemble_backward(const carafepp_params* params, const carafepp_tensor* grad_output,
                                             const carafepp_tensor* features, const carafepp_tensor* masks,
                                             const carafepp_tensor* grad_features, const carafepp_tensor* grad_masks,
                                             void* stream) {
    return call(CARAFEPP_REASSEMBLE_BACKWARD, stream, params, grad_output, features, masks, grad_features, grad_masks);
}

carafepp_status carafepp_reassemble_with_logits(const carafepp_params* params, const carafepp_tensor* features,
                                                const carafepp_tensor* logits, const carafepp_tensor* output,
                                                void* stream) {
    return call(CARAFEPP_REASSEMBLE_WITH_LOGITS, stream, params, features, logits, output);
}

carafepp_status carafepp_reassemble_with_logits_backward(const carafepp_params* params,
                                                         const carafepp_tensor* grad_output,
                                                         const carafepp_tensor* features, const carafepp_tensor* logits,
                                                         const carafepp_tensor* grad_features,
                                                         const carafepp_tensor* grad_logits, void* stream) {
    return call(CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD, stream, params, grad_output, features, logits, grad_features,
                grad_logits);
}

carafepp_status carafepp_normalize_masks(const carafepp_params* params, const carafepp_tensor* logits,
                                         const carafepp_tensor* masks, void* stream) {
    return call(CARAFEPP_NORMALIZE_MASKS, stream, params, logits, masks);
}

carafepp_status carafepp_normalize_masks_backward(const carafepp_params* params, const carafepp_tensor* grad_masks,
                                                  const carafepp_tensor* logits, const carafepp_tensor* grad_logits,
                                                  void* stream) {
    return call(CARAFEPP_NORMALIZE_MASKS_BACKWARD, stream, params, grad_masks, logits, grad_logits);
}

carafepp_status carafepp_output_shape(const carafepp_params* params, carafepp_function function,
                                      const carafepp_tensor* input, int64_t* shape) {
    return guarded([&] { output_shape(function, params, input, shape); });
}

carafepp_status carafepp_list_implementations(const carafepp_params* params, carafepp_function function,
                                              const carafepp_tensor* const* tensors, carafepp_visit visit, void* user) {
    return guarded([&] {
        if (tensors == nullptr || visit == nullptr) {
            fail(CARAFEPP_VALUE_ERROR, function, std::string(tensors ? "visit" : "tensors") + " must not be NULL.");
        }
        Call call = check(function, params, tensors, false);
        const auto& lists = lists_of(call.problem.device)[function];
        on_device(function, call.problem, [&] {
            for (int k = 0; k < 2; k++) {
                call.problem.result = call.results[k];
                for (const Implementation* entry = lists[k]; entry != nullptr && entry->name != nullptr; entry++)
                    visit(user, entry->name, entry->declines(call.problem));
            }
        });
    });
}

const char* carafepp_last_error(void) { return last_error; }

const char* carafepp_version(void) { return CARAFEPP_VERSION; }

int carafepp_abi_version(void) { return 1; }

const char* carafepp_config(void) {
    static const Config config;
    return config.text;
}

void carafepp_set_num_threads(int threads) { set_num_threads(threads); }

int carafepp_get_num_threads(void) { return get_num_threads(); }
