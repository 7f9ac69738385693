// SPDX-License-Identifier: Apache-2.0
// definition.h for tests/test_definition.py, which compiles it and calls it by ctypes.
#include "definition.h"

using namespace definition;

extern "C" int number_of_cases() { return static_cast<int>(std::size(kCases)); }
extern "C" const char* name_of_case(int number) { return kCases[number].name.c_str(); }

// Inputs: features, masks, logits, grad_output, grad_masks. Results, each with the magnitudes of its terms: output,
// grad_features, grad_masks, the normalised masks, grad_logits.
extern "C" void compute(int number, int normalizer, const double* const inputs[5], double* const results[5],
                        double* const magnitudes[5]) {
    const Case& p = kCases[number];
    const auto input = [&](int k, const Shape& shape) { return Numbers(inputs[k], inputs[k] + count(shape)); };
    const Numbers x = input(0, p.features()), m = input(1, p.masks()), l = input(2, p.logits());
    const Numbers d = input(3, p.output());
    Sums grad(p.masks());
    for (size_t k = 0; k < grad.value.size(); k++) grad.add(k, inputs[4][k], 1);
    const auto chosen = static_cast<carafepp_normalizer>(normalizer);
    const Sums sums[] = {reassemble(p, x, m), grad_features(p, d, m), grad_masks(p, d, x),
                         normalize_masks(p, l, chosen), normalize_masks_backward(p, grad, l, chosen)};
    for (int k = 0; k < 5; k++) {
        std::copy(sums[k].value.begin(), sums[k].value.end(), results[k]);
        std::copy(sums[k].magnitude.begin(), sums[k].magnitude.end(), magnitudes[k]);
    }
}
