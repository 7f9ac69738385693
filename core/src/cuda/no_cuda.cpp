// SPDX-License-Identifier: Apache-2.0
// A build without CUDA: no device is available, so nothing else of this is reached.
#include "cuda.h"
#include "kernel.h"

namespace carafepp::cuda {

const Registry kernels = {};

Availability availability() {
    return {CARAFEPP_NOT_IMPLEMENTED,
            "carafepp was built without CUDA. Build it where nvcc is on the PATH, or copy the arrays to the CPU"};
}

const char* description() { return "not built"; }
std::string devices() { return ""; }

CurrentDevice::CurrentDevice(int) {}
CurrentDevice::~CurrentDevice() = default;

}  // namespace carafepp::cuda
