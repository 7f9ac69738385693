// SPDX-License-Identifier: Apache-2.0
// Calls the core with some small problems, each twice: the second call finds its scratch ready. Prints the core's
// configuration, then a line for two calls: problem, layout, result, outputs. For tests/instructions.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "definition.h"

namespace {

struct Tensor {
    std::vector<float> values;
    carafepp_tensor tensor{};

    Tensor(const definition::Shape& shape, bool channels_last) : values(static_cast<size_t>(definition::count(shape))) {
        for (size_t k = 0; k < values.size(); k++) values[k] = static_cast<float>(k % 7) - 3;
        tensor = {values.data(), CARAFEPP_FLOAT32, CARAFEPP_CPU, 0, 4, {}, {}};
        std::copy(shape.begin(), shape.end(), tensor.shape);
        int64_t stride = 1;
        for (const size_t axis : channels_last ? std::vector<size_t>{1, 3, 2, 0} : std::vector<size_t>{3, 2, 1, 0}) {
            tensor.strides[axis] = stride;
            stride *= shape[axis];
        }
    }
};

template <class Call>
void call_twice(const definition::Case& p, const char* layout, const char* result, Call call) {
    for (int k = 0; k < 2; k++) {
        if (call() == CARAFEPP_OK) continue;
        std::fprintf(stderr, "warm_calls: %s\n", carafepp_last_error());
        std::exit(1);
    }
    std::printf("%s %s %s %lld\n", p.name.c_str(), layout, result,
                static_cast<long long>(definition::count(p.output())));
}

void call_all(const definition::Case& p, bool channels_last) {
    const char* const layout = channels_last ? "NHWC" : "NCHW";
    const carafepp_params params = definition::params_of(p.up, p.down, p.kernel_size, p.groups);
    const auto tensor = [&](const definition::Shape& shape) { return Tensor(shape, channels_last); };
    Tensor features = tensor(p.features()), masks = tensor(p.masks()), logits = tensor(p.logits()),
           output = tensor(p.output()), grad_features = tensor(p.features()), grad_masks = tensor(p.masks()),
           grad_logits = tensor(p.logits());
    const carafepp_tensor &x = features.tensor, &m = masks.tensor, &l = logits.tensor, &y = output.tensor;
    call_twice(p, layout, "reassemble", [&] { return carafepp_reassemble(&params, &x, &m, &y, nullptr); });
    call_twice(p, layout, "reassemble_with_logits",
               [&] { return carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr); });
    call_twice(p, layout, "grad_features", [&] {
        return carafepp_reassemble_backward(&params, &y, &x, &m, &grad_features.tensor, nullptr, nullptr);
    });
    call_twice(p, layout, "grad_masks",
               [&] { return carafepp_reassemble_backward(&params, &y, &x, &m, nullptr, &grad_masks.tensor, nullptr); });
    call_twice(p, layout, "grad_logits", [&] {
        return carafepp_reassemble_with_logits_backward(&params, &y, &x, &l, nullptr, &grad_logits.tensor, nullptr);
    });
}

}  // namespace

int main() {
    carafepp_set_num_threads(1);
    std::printf("%s\n", carafepp_config());
    const definition::Case cases[] = {{"up2", 1, 64, 10, 16, 2, 1, 5, 1},
                                      {"down2", 1, 64, 20, 32, 1, 2, 5, 1},
                                      {"involution", 1, 64, 14, 14, 1, 1, 7, 4},
                                      {"convex", 1, 2, 8, 32, 8, 1, 3, 1}};
    for (const definition::Case& p : cases) {
        for (const bool channels_last : {false, true}) call_all(p, channels_last);
    }
}
