// SPDX-License-Identifier: Apache-2.0
// A program loads the DLL, calls it on several threads, and lets it go. The threads wait on, so their code must stay.
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <vector>

#include "carafepp/carafepp.h"

int main() {
    const HMODULE library = LoadLibraryA("carafepp.dll");
    if (library == nullptr) return 1;
#define FUNCTION(name) reinterpret_cast<decltype(&name)>(reinterpret_cast<void*>(GetProcAddress(library, #name)))
    const auto reassemble = FUNCTION(carafepp_reassemble);
    const auto set_num_threads = FUNCTION(carafepp_set_num_threads);

    constexpr int64_t kChannels = 64, kSize = 128, kTaps = 9;
    std::vector<float> features(kChannels * kSize * kSize, 1), masks(kTaps * kSize * kSize, 1), output(features.size());
    const auto tensor = [](std::vector<float>& values, int64_t c) {
        return carafepp_tensor{values.data(),
                               CARAFEPP_FLOAT32,
                               CARAFEPP_CPU,
                               0,
                               4,
                               {1, c, kSize, kSize},
                               {c * kSize * kSize, kSize * kSize, kSize, 1}};
    };
    const carafepp_tensor x = tensor(features, kChannels), m = tensor(masks, kTaps), y = tensor(output, kChannels);
    carafepp_params params{};
    params.struct_size = sizeof params;
    params.up = params.down = params.groups = 1;
    params.kernel_size = 3;
    set_num_threads(4);
    if (reassemble(&params, &x, &m, &y, nullptr) != CARAFEPP_OK || output[kSize + 1] != kTaps) return 2;

    if (!FreeLibrary(library)) return 3;
    Sleep(50);
    return GetModuleHandleA("carafepp.dll") != nullptr ? 0 : 4;
}
