// SPDX-License-Identifier: Apache-2.0
// The entry points. Each call is checked once; then a kernel of its device's registry is chosen, and runs.
#include <cstdio>
#include <cstring>
#include <new>
#include <string>

#include "call.h"
#include "cpu/parallel.h"
#include "cpu/processor.h"
#include "cuda/cuda.h"
#include "environment.h"
#include "kernel.h"

namespace carafepp {
namespace {

const Registry& registry_of(carafepp_device device) { return device == CARAFEPP_CUDA ? cuda::kernels : cpu::kernels; }

// The results of each function, in the order of its signature; kResults where there is none.
constexpr Result kResultsOf[7][2] = {
    {kResults, kResults},
    {kReassemble, kResults},
    {kGradFeatures, kGradMasks},
    {kReassembleWithLogits, kResults},
    {kGradFeatures, kGradLogits},
    {kNormalizeMasks, kResults},
    {kNormalizeMasksBackward, kResults},
};

// The kernels for a result of a call, or NULL.
const Kernel* list_of(carafepp_device device, carafepp_function function, int k) {
    const Result result = kResultsOf[function][k];
    return result == kResults ? nullptr : registry_of(device).of[result];
}

// The kernels of both gradients, or NULL.
const KernelOfBoth* list_of_both(carafepp_device device, carafepp_function function) {
    return kResultsOf[function][1] == kResults ? nullptr : registry_of(device).of_both;
}

[[noreturn]] void fail(carafepp_status status, carafepp_function function, const std::string& sentence) {
    throw Error{status, std::string("[") + function_name(function) + "] " + sentence};
}

template <class Entry>
const Entry* find(const Entry* list, const char* name) {
    for (; list != nullptr && list->name != nullptr; list++) {
        if (std::strcmp(list->name, name) == 0) return list;
    }
    return nullptr;
}

[[noreturn]] void fail_forced(carafepp_function function, const char* name, const char* reason) {
    fail(CARAFEPP_NOT_IMPLEMENTED, function, std::string("implementation ") + name + " declines: " + reason + ".");
}

// A forced name counts for the list that it stands in. The other results of a call choose as always.
void check_forced(carafepp_function function, const char* name, const Registry& registry) {
    if (name == nullptr) return;
    for (const Kernel* list : registry.of) {
        if (find(list, name)) return;
    }
    if (find(registry.of_both, name)) return;
    fail(CARAFEPP_VALUE_ERROR, function,
         std::string("implementation must be a name of the list of implementations; got ") + name + ".");
}

// The forced kernel, or the first of a list that can run a problem and is not slower than a later one; or NULL.
// `results` are one, or two for a kernel of both gradients.
template <class Entry, class... Results>
const Entry* choose(carafepp_function function, const Entry* list, const char* forced_name, const Problem& problem,
                    const Results&... results) {
    const Entry* forced = forced_name ? find(list, forced_name) : nullptr;
    std::string log;
    const bool wanted = environment().log;
    const auto skip = [&](const Entry& kernel, const char* why, const char* reason) {
        if (reason != nullptr && wanted) log += std::string("; ") + kernel.name + why + reason;
        return reason != nullptr;
    };
    const Entry* chosen = forced ? forced : list;
    if (forced != nullptr) {
        if (const char* reason = forced->cannot_run(problem, results...)) fail_forced(function, forced->name, reason);
    } else {
        while (chosen->name != nullptr && (skip(*chosen, " declines: ", chosen->cannot_run(problem, results...)) ||
                                           skip(*chosen, " is slower: ", chosen->slower(problem, results...)))) {
            chosen++;
        }
    }
    if (wanted) {
        std::fprintf(stderr, "carafepp: [%s] %s%s%s\n", function_name(function),
                     chosen->name ? chosen->name : "no kernel of both gradients", forced ? " (forced)" : "",
                     log.c_str());
    }
    return chosen->name ? chosen : nullptr;
}

// Why kernels of both gradients cannot run, or NULL.
constexpr const char* kOneNotWanted = "it computes both gradients, and one is not wanted";

// The kernel of both gradients that runs a call, or NULL.
const KernelOfBoth* choose_of_both(carafepp_function function, const Call& call) {
    const carafepp_device device = call.problem.device;
    const KernelOfBoth* const list = list_of_both(device, function);
    const char* const name = call.params.implementation;
    if (list == nullptr) return nullptr;
    if (name != nullptr && (find(list_of(device, function, 0), name) || find(list_of(device, function, 1), name)))
        return nullptr;
    if (!call.wanted[0] || !call.wanted[1]) {
        if (name != nullptr && find(list, name)) fail_forced(function, name, kOneNotWanted);
        return nullptr;
    }
    const bool forced = name != nullptr && find(list, name);
    if (!forced && (call.results[0].empty() || call.results[1].empty())) return nullptr;  // the other has zeros
    return choose(function, list, name, call.problem, call.results[0], call.results[1]);
}

Call check(carafepp_function function, const carafepp_params* params, const carafepp_tensor* const* tensors,
           bool results_required) {
    Call call = check_call(function, params, tensors, results_required);
    if (call.problem.device == CARAFEPP_CUDA) {
        const cuda::Availability cuda = cuda::availability();
        if (cuda.status != CARAFEPP_OK)
            fail(cuda.status, function, "CUDA arrays cannot be computed on: " + cuda.reason + ".");
    }
    check_forced(function, call.params.implementation, registry_of(call.problem.device));
    if (!environment().wrong.empty()) fail(CARAFEPP_VALUE_ERROR, function, environment().wrong);
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
    on_device(function, call.problem, [&] {
        if (const KernelOfBoth* both = choose_of_both(function, call))
            return both->run(call.problem, call.results[0], call.results[1]);
        const Kernel* chosen[2] = {};  // before any runs, since a choice may fail
        for (int k = 0; k < 2; k++) {
            const Kernel* list = list_of(call.problem.device, function, k);
            if (call.wanted[k])
                chosen[k] = choose(function, list, call.params.implementation, call.problem, call.results[k]);
        }
        const auto run_both = chosen[0] != nullptr ? chosen[0]->run_both : nullptr;
        if (run_both != nullptr && chosen[1] != nullptr && chosen[1]->run_both == run_both &&
            !call.results[0].empty() && !call.results[1].empty() &&
            run_both(call.problem, call.results[0], call.results[1])) {
            return;
        }
        for (int k = 0; k < 2; k++) {
            if (chosen[k] != nullptr && !call.results[k].empty()) chosen[k]->run(call.problem, call.results[k]);
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
    std::string text;

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
            processor().avx2 ? " avx2" : "",
            processor().fma ? " fma" : "",
            processor().avx512f ? " avx512f" : "",
            processor().avx512bw ? " avx512bw" : "",
        };
#elif defined(__aarch64__)
        const char* target = "aarch64";
        const char* features[] = {" neon", "", "", "", ""};
#else
        const char* target = "generic";
        const char* features[] = {" unknown", "", "", "", ""};
#endif
        text = std::string("version: ") + CARAFEPP_VERSION + "\ncompiler: " + compiler + "\nbuilt for: " + target +
               "\nthis processor has:";
        for (const char* feature : features) text += feature;
        text += std::string("\nCUDA: ") + cuda::description();
        if (!environment().wrong.empty()) text += "\ncalls fail: " + environment().wrong;
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
        const auto declines = [&](const auto& kernel, const auto&... results) {
            const char* reason = kernel.cannot_run(call.problem, results...);
            const bool asked = call.params.flags & CARAFEPP_FASTEST;
            return reason == nullptr && asked ? kernel.slower(call.problem, results...) : reason;
        };
        on_device(function, call.problem, [&] {
            const KernelOfBoth* both = list_of_both(call.problem.device, function);
            for (; both != nullptr && both->name != nullptr; both++) {
                visit(user, both->name,
                      call.wanted[0] != call.wanted[1] ? kOneNotWanted
                                                       : declines(*both, call.results[0], call.results[1]));
            }
            for (int k = 0; k < 2; k++) {
                const Kernel* kernel = list_of(call.problem.device, function, k);
                for (; kernel != nullptr && kernel->name != nullptr; kernel++)
                    visit(user, kernel->name, declines(*kernel, call.results[k]));
            }
        });
    });
}

const char* carafepp_last_error(void) { return last_error; }

const char* carafepp_version(void) { return CARAFEPP_VERSION; }

int carafepp_abi_version(void) { return 1; }

const char* carafepp_config(void) {
    const char* text = "";
    guarded([&] {
        static const Config config;
        text = config.text.c_str();
    });
    return text;
}

const char* carafepp_devices(void) {
    static thread_local std::string text;
    const carafepp_status status = guarded([] { text = cuda::devices(); });
    return status == CARAFEPP_OK ? text.c_str() : "";
}

void carafepp_set_num_threads(int threads) { set_num_threads(threads); }

int carafepp_get_num_threads(void) {
    int threads = 1;
    guarded([&] { threads = get_num_threads(); });  // which reads the environment
    return threads;
}
