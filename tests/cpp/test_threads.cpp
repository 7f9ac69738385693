// SPDX-License-Identifier: Apache-2.0
// Concurrent callers and the thread pool behind them. ThreadSanitizer (the preset tsan) sees a race even if the
// results are right. The first test must be the first call of the process, by all threads at once.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "carafepp/carafepp.h"

namespace {

constexpr int kCallers = 4, kRepeats = 10;
constexpr int64_t kChannels = 32, kSize = 12, kTaps = 9, kUp = 2;  // enough work for the pool

carafepp_tensor tensor_of(const std::vector<float>& values, int64_t c, int64_t size) {
    carafepp_tensor tensor{};
    tensor.data = const_cast<float*>(values.data());
    tensor.dtype = CARAFEPP_FLOAT32;
    tensor.device = CARAFEPP_CPU;
    tensor.ndim = 4;
    const int64_t shape[] = {1, c, size, size};
    int64_t stride = 1;
    for (int k = 3; k >= 0; k--) {
        tensor.shape[k] = shape[k];
        tensor.strides[k] = stride;
        stride *= shape[k];
    }
    return tensor;
}

carafepp_params up2() {
    carafepp_params params{};
    params.struct_size = sizeof params;
    params.up = kUp;
    params.down = 1;
    params.kernel_size = 3;
    params.groups = 1;
    return params;
}

struct Inputs {
    std::vector<float> features = numbers(kChannels * kSize * kSize);
    std::vector<float> logits = numbers(kTaps * kUp * kUp * kSize * kSize);
    std::vector<float> grad_output = numbers(kChannels * kUp * kSize * kUp * kSize);

    static std::vector<float> numbers(int64_t count) {
        std::vector<float> values(static_cast<size_t>(count));
        for (size_t k = 0; k < values.size(); k++) values[k] = static_cast<float>(k * 37 % 101) / 50 - 1;
        return values;
    }
};

// Output and both gradients, one after the other.
std::vector<float> results(const Inputs& in, const char* implementation = nullptr) {
    carafepp_params params = up2();
    params.implementation = implementation;
    std::vector<float> output(in.grad_output.size()), grad_features(in.features.size()), grad_logits(in.logits.size());
    const carafepp_tensor x = tensor_of(in.features, kChannels, kSize);
    const carafepp_tensor l = tensor_of(in.logits, kTaps * kUp * kUp, kSize);
    const carafepp_tensor d = tensor_of(in.grad_output, kChannels, kUp * kSize);
    const carafepp_tensor y = tensor_of(output, kChannels, kUp * kSize);
    const carafepp_tensor gx = tensor_of(grad_features, kChannels, kSize);
    const carafepp_tensor gl = tensor_of(grad_logits, kTaps * kUp * kUp, kSize);
    if (carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr) != CARAFEPP_OK) return {};
    if (carafepp_reassemble_with_logits_backward(&params, &d, &x, &l, &gx, &gl, nullptr) != CARAFEPP_OK) return {};
    output.insert(output.end(), grad_features.begin(), grad_features.end());
    output.insert(output.end(), grad_logits.begin(), grad_logits.end());
    return output;
}

// f(0), f(1), ... each in a thread of its own, all beginning at once.
template <class F>
void at_once(F f) {
    std::atomic<int> waiting{kCallers};
    std::vector<std::thread> callers;
    for (int k = 0; k < kCallers; k++) {
        callers.emplace_back([&, k] {
            waiting--;
            while (waiting > 0) std::this_thread::yield();
            f(k);
        });
    }
    for (std::thread& caller : callers) caller.join();
}

TEST_CASE("the first calls come all at once") {
    const Inputs inputs;
    std::vector<std::vector<float>> all(kCallers);
    at_once([&](int k) { all[static_cast<size_t>(k)] = results(inputs); });
    CHECK(!all[0].empty());
    for (const std::vector<float>& one : all) CHECK(one == all[0]);
}

TEST_CASE("callers that share the pool get the same bits") {
    const Inputs inputs;
    for (const char* name : {"", "reassemble_with_logits_any_ref", "grad_features_any_ref", "grad_logits_any_ref"}) {
        const char* const implementation = *name ? name : nullptr;
        carafepp_set_num_threads(1);
        const std::vector<float> expected = results(inputs, implementation);
        CHECK(!expected.empty());
        carafepp_set_num_threads(3);
        std::atomic<int> equal{0};
        at_once([&](int) {
            for (int repeat = 0; repeat < kRepeats; repeat++) equal += results(inputs, implementation) == expected;
        });
        CHECK(equal == kRepeats * kCallers);
    }
}

TEST_CASE("the number of threads changes while others compute") {
    const Inputs inputs;
    const std::vector<float> expected = results(inputs);
    std::atomic<int> equal{0};
    at_once([&](int k) {
        for (int repeat = 0; repeat < kRepeats; repeat++) {
            carafepp_set_num_threads(1 + (k + repeat) % 5);
            equal += results(inputs) == expected;
        }
    });
    CHECK(equal == kRepeats * kCallers);
}

TEST_CASE("each thread has its own last error") {
    const Inputs inputs;
    const std::vector<float> expected = results(inputs);
    std::atomic<int> right{0};
    at_once([&](int k) {
        for (int repeat = 0; repeat < kRepeats; repeat++) {
            carafepp_params params = up2();
            params.kernel_size = 100 + 2 * k;
            const carafepp_tensor x = tensor_of(inputs.features, kChannels, kSize);
            int64_t shape[4];
            const bool failed = carafepp_output_shape(&params, CARAFEPP_REASSEMBLE_WITH_LOGITS, &x, shape) ==
                                CARAFEPP_VALUE_ERROR;
            const bool computed = k % 2 == 0 || results(inputs) == expected;
            const std::string sentence = carafepp_last_error(), number = "got " + std::to_string(100 + 2 * k) + ".";
            right += failed && computed && sentence.find(number) != std::string::npos;
        }
    });
    CHECK(right == kRepeats * kCallers);
}

}  // namespace
