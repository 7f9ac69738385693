// SPDX-License-Identifier: Apache-2.0
#include <atomic>

#include "cuda/platform.h"

namespace carafepp::cuda {

#if defined(CARAFEPP_EMULATION)

Availability availability() { return {CARAFEPP_OK, ""}; }
const char* description() { return ", cuda (emulated)"; }
CurrentDevice::CurrentDevice(int) {}
CurrentDevice::~CurrentDevice() = default;

#else

std::string text_of(cudaError_t error) {
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

static void check(cudaError_t error) {
    if (error != cudaSuccess) throw Failure{text_of(error)};
}

// Asked until there is a device: then there always is.
Availability availability() {
    static std::atomic<bool> found{false};
    if (found) return {CARAFEPP_OK, ""};
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) {
        cudaGetLastError();  // or a caller would find it and think it its own
        return {CARAFEPP_RUNTIME_ERROR, "CUDA finds no device here (" + text_of(error) + ")"};
    }
    if (devices == 0) return {CARAFEPP_RUNTIME_ERROR, "this machine has no CUDA device"};
    found = true;
    return {CARAFEPP_OK, ""};
}

const char* description() { return ", cuda (" CARAFEPP_CUDA_BUILD ")"; }

CurrentDevice::CurrentDevice(int device) {
    check(cudaGetDevice(&callers_));
    if (device != callers_) check(cudaSetDevice(device));
    device_ = device;
}

CurrentDevice::~CurrentDevice() {
    if (device_ != callers_) cudaSetDevice(callers_);
}

#endif

}  // namespace carafepp::cuda
