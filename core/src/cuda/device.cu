// SPDX-License-Identifier: Apache-2.0
#include <atomic>

#include "cuda/cuda.h"
#include "cuda/platform.h"

namespace carafepp::cuda {

static std::string text_of(cudaError_t error) {
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// Says that the current device has no code of a kernel, and how to build it.
static std::string text_without_code(cudaError_t error) {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        return text_of(error);
    }
    const std::string architecture = std::to_string(10 * major + minor);
    return std::string(cudaGetErrorName(error)) + ": carafepp has no code for this device of architecture " +
           architecture +
           "; it was built by " CARAFEPP_CUDA_BUILD
           ". Build it for the device: by pip with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=" +
           architecture + ", by CMake with -DCMAKE_CUDA_ARCHITECTURES=" + architecture;
}

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    const Failure failure{no_code ? text_without_code(error) : text_of(error)};
    cudaGetLastError();  // or a caller would find it and think it its own
    throw failure;
}

void fail(const char* text) { throw Failure{text}; }

// Keeps CUDA's answers for a kernel, by device; 0 is none yet.
struct Architectures {
    static constexpr int kDevices = 64;
    std::atomic<const void*> kernel{nullptr};
    std::atomic<int> of_device[kDevices] = {};
};

// Returns NULL beyond the first kernels and devices: nothing is kept for them.
static std::atomic<int>* kept_architecture(const void* kernel, int device) {
    static Architectures kept[64];
    if (device >= Architectures::kDevices) return nullptr;
    for (Architectures& architectures : kept) {
        const void* owner = architectures.kernel;
        if (owner == nullptr && architectures.kernel.compare_exchange_strong(owner, kernel)) owner = kernel;
        if (owner == kernel) return &architectures.of_device[device];
    }
    return nullptr;
}

int architecture_of(const void* kernel) {
    int device = 0;
    check(cudaGetDevice(&device));
    std::atomic<int>* const kept = kept_architecture(kernel, device);
    if (kept != nullptr && *kept != 0) return *kept;
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
    if (kept != nullptr) *kept = attributes.ptxVersion;
    return attributes.ptxVersion;
}

static int of_current_device(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

int most_shared_bytes() { return of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

int64_t multiprocessors() { return of_current_device(cudaDevAttrMultiProcessorCount); }

const char* not_for_shared_memory(int64_t bytes) {
    return bytes > most_shared_bytes() ? "the device gives a block too little shared memory" : nullptr;
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

const char* description() { return "built (" CARAFEPP_CUDA_BUILD ")"; }

static std::string version_of(int number) {  // 1000 * major + 10 * minor
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string devices() {
    int driver = 0, count = 0;
    cudaError_t error = cudaDriverGetVersion(&driver);
    if (error == cudaSuccess && driver == 0) return "CUDA devices: none, as there is no CUDA driver";
    if (error == cudaSuccess) error = cudaGetDeviceCount(&count);
    std::string names;
    for (int device = 0; device < count && error == cudaSuccess; device++) {
        cudaDeviceProp properties;
        error = cudaGetDeviceProperties(&properties, device);
        if (error != cudaSuccess) break;
        names += std::string(device == 0 ? ": " : ", ") + properties.name + " (" + std::to_string(properties.major) +
                 "." + std::to_string(properties.minor) + ")";
    }
    if (error != cudaSuccess) {
        cudaGetLastError();  // or a caller would find it and think it its own
        names = " (" + text_of(error) + ")";
        count = 0;
    }
    return "CUDA devices: " + (count ? std::to_string(count) : "none") + ", by a driver for CUDA " +
           version_of(driver) + names;
}

CurrentDevice::CurrentDevice(int device) {
    check(cudaGetDevice(&callers_));
    if (device != callers_) check(cudaSetDevice(device));
    device_ = device;
}

CurrentDevice::~CurrentDevice() {
    if (device_ != callers_) cudaSetDevice(callers_);
}

}  // namespace carafepp::cuda
