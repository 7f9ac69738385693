// SPDX-License-Identifier: Apache-2.0
// Counts the memory accesses of a CUDA kernel. tests/cuda/traffic.py makes a table of the counts.
//
//     traffic PASS WEIGHTS DTYPE LAYOUT N C H W UP DOWN K GROUPS BLOCKS
//
// PASS is forward, grad_features, grad_weights or backward (both gradients), WEIGHTS masks or logits. It runs BLOCKS
// blocks of the best kernel, spread evenly over the grid. It prints one line of JSON: the counts of these blocks.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "carafepp/carafepp.h"
#include "emulation.h"
#include "trace.h"

namespace {

using carafepp::trace::Counts;
using carafepp::trace::kL1Kilobytes;
using carafepp::trace::trace;

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "traffic: %s\n", message.c_str());
    std::exit(1);
}

// Memory that is 0 and takes no room until it is written.
void* reserve(size_t bytes) {
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                              0);
    if (memory == MAP_FAILED) fail("no memory for an array");
    return memory;
}

carafepp_tensor make_tensor(const char* name, carafepp_dtype dtype, bool channels_last,
                            const std::vector<int64_t>& shape) {
    carafepp_tensor tensor{};
    tensor.dtype = dtype;
    tensor.device = CARAFEPP_CUDA;
    tensor.ndim = 4;
    std::copy(shape.begin(), shape.end(), tensor.shape);
    int64_t stride = 1;
    for (const int axis : channels_last ? std::vector<int>{1, 3, 2, 0} : std::vector<int>{3, 2, 1, 0}) {
        tensor.strides[axis] = stride;
        stride *= shape[static_cast<size_t>(axis)];
    }
    const size_t bytes = static_cast<size_t>(stride * (dtype & 0xff) / 8);
    tensor.data = reserve(bytes);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data);
    trace().arrays.push_back({name, begin, begin + bytes, {}});
    return tensor;
}

void call(carafepp_status status) {
    if (status != CARAFEPP_OK) fail(carafepp_last_error());
}

// The first implementation of a result that can run.
std::string best(const carafepp_params& params, carafepp_function function,
                 const std::vector<const carafepp_tensor*>& tensors, const std::string& result) {
    struct Search {
        std::string prefix, found;
    } search{result, ""};
    const auto visit = [](void* user, const char* name, const char* declines) {
        Search& of = *static_cast<Search*>(user);
        if (of.found.empty() && declines == nullptr && std::string(name).rfind(of.prefix, 0) == 0) of.found = name;
    };
    call(carafepp_list_implementations(&params, function, tensors.data(), visit, &search));
    if (search.found.empty()) fail("no kernel for " + result);
    return search.found;
}

void print(const char* name, int64_t value, const char* end = ", ") {
    std::printf("\"%s\": %lld%s", name, static_cast<long long>(value), end);
}

void print(const carafepp::trace::Array& array) {
    const Counts& of = array.counts;
    std::printf("\"%s\": {", array.name);
    print("bytes", static_cast<int64_t>(array.end - array.begin));
    print("loads", of.loads);
    print("stores", of.stores);
    print("lanes", of.lanes);
    print("loaded_bytes", of.loaded_bytes);
    print("stored_bytes", of.stored_bytes);
    print("load_lines", of.load_lines);
    print("store_lines", of.store_lines);
    print("load_sectors", of.load_sectors);
    print("store_sectors", of.store_sectors);
    std::printf("\"l2_sectors\": {");
    for (size_t k = 0; k < std::size(kL1Kilobytes); k++) {
        print(std::to_string(kL1Kilobytes[k]).c_str(), of.l2_sectors[k], k + 1 < std::size(kL1Kilobytes) ? ", " : "}}");
    }
}

void print(const std::string& kernel) {
    std::printf("{\"kernel\": \"%s\", ", kernel.c_str());
    print("blocks", gridDim.x);
    print("threads", blockDim.x);
    print("shared_bytes", static_cast<int64_t>(carafepp::emulation::shared_bytes()));
    print("blocks_run", trace().blocks);
    print("bytes_copied", static_cast<int64_t>(carafepp::emulation::bytes_copied()));
    print("groups_copied", static_cast<int64_t>(carafepp::emulation::groups_copied()));
    print("mmas", static_cast<int64_t>(carafepp::emulation::mmas_run()));
    std::printf("\"arrays\": {");
    const char* separator = "";
    for (const auto& array : trace().arrays) {
        std::printf("%s", std::exchange(separator, ", "));
        print(array);
    }
    std::printf("}, \"shared\": {");
    const Counts& shared = trace().shared;
    print("loads", shared.loads);
    print("stores", shared.stores);
    print("wavefronts", shared.wavefronts);
    print("fewest_wavefronts", shared.fewest_wavefronts, "}, \"places\": [");
    separator = "";
    for (const auto& [place, times] : trace().places) {
        Dl_info program;
        dladdr(place.first, &program);
        const ptrdiff_t call = static_cast<const char*>(place.first) - static_cast<const char*>(program.dli_fbase) - 1;
        std::printf("%s[%td, \"%s\", %lld]", std::exchange(separator, ", "), call, place.second,
                    static_cast<long long>(times));
    }
    std::printf("]}\n");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 14) fail("PASS WEIGHTS DTYPE LAYOUT N C H W UP DOWN K GROUPS BLOCKS");
    const std::string pass = arguments[1], weights = arguments[2], dtype_name = arguments[3], layout = arguments[4];
    const auto number = [&](int k) { return std::strtoll(arguments[k], nullptr, 10); };
    const int64_t n = number(5), c = number(6), h = number(7), w = number(8), up = number(9), down = number(10),
                  k = number(11), groups = number(12);
    const bool from_logits = weights == "logits", nhwc = layout == "NHWC";
    const carafepp_dtype dtype = dtype_name == "float32"   ? CARAFEPP_FLOAT32
                                 : dtype_name == "float16" ? CARAFEPP_FLOAT16
                                                           : CARAFEPP_BFLOAT16;
    const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t out_h = ceil(h * up, down), out_w = ceil(w * up, down), taps = groups * k * k;
    const std::vector<int64_t> weights_shape = from_logits ? std::vector<int64_t>{n, taps * up * up, ceil(h, down),
                                                                                  ceil(w, down)}
                                                           : std::vector<int64_t>{n, taps, out_h, out_w};
    carafepp_params params{};
    params.struct_size = sizeof params;
    params.up = static_cast<int32_t>(up);
    params.down = static_cast<int32_t>(down);
    params.kernel_size = static_cast<int32_t>(k);
    params.groups = static_cast<int32_t>(groups);

    const carafepp_tensor features = make_tensor("features", dtype, nhwc, {n, c, h, w});
    const carafepp_tensor masks = make_tensor("weights", dtype, nhwc, weights_shape);
    const carafepp_tensor outputs = make_tensor("outputs", dtype, nhwc, {n, c, out_h, out_w});
    const bool forward = pass == "forward", of_features = pass == "grad_features" || pass == "backward",
               of_weights = pass == "grad_weights" || pass == "backward";
    carafepp_tensor grad_features{}, grad_weights{};
    if (of_features) grad_features = make_tensor("grad_features", dtype, nhwc, {n, c, h, w});
    if (of_weights) grad_weights = make_tensor("grad_weights", dtype, nhwc, weights_shape);
    carafepp::emulation::settings().most_blocks_run = number(13);

    std::string kernel;
    if (forward) {
        const auto function = from_logits ? CARAFEPP_REASSEMBLE_WITH_LOGITS : CARAFEPP_REASSEMBLE;
        kernel = best(params, function, {&features, &masks, &outputs}, "reassemble");
        params.implementation = kernel.c_str();
        call((from_logits ? carafepp_reassemble_with_logits : carafepp_reassemble)(&params, &features, &masks, &outputs,
                                                                                   nullptr));
    } else {
        const auto function = from_logits ? CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD : CARAFEPP_REASSEMBLE_BACKWARD;
        const carafepp_tensor *const to_features = of_features ? &grad_features : nullptr, *const to_weights =
                                                                                               of_weights
                                                                                                   ? &grad_weights
                                                                                                   : nullptr;
        kernel = best(params, function, {&outputs, &features, &masks, to_features, to_weights},
                      pass == "grad_weights" ? "grad_" + weights : pass);
        params.implementation = kernel.c_str();
        call((from_logits ? carafepp_reassemble_with_logits_backward : carafepp_reassemble_backward)(
            &params, &outputs, &features, &masks, to_features, to_weights, nullptr));
    }
    carafepp::trace::finish();
    print(kernel);
}
