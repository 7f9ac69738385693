// SPDX-License-Identifier: Apache-2.0
// The runtime of emulated devices. Every number is one; it runs code for 9.0. It refuses launches with more shared
// memory than their kernel has. A launch returns when its kernel has ended.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

static thread_local int current_device = 0;

// The shared memory of kernels that have more than others.
static std::mutex mutex;
static std::map<const void*, size_t> most_shared_bytes;

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(cudaError_t) { return "too much shared memory"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin
                 ? static_cast<int>(carafepp::emulation::kMostSharedBytes)
                 : 0;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    const std::lock_guard lock(mutex);
    most_shared_bytes[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

size_t shared_bytes_of(const void* kernel) {
    const std::lock_guard lock(mutex);
    const auto found = most_shared_bytes.find(kernel);
    return found == most_shared_bytes.end() ? 48 * 1024 : found->second;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* thread, dim3 grid, dim3 block, void**, size_t shared_bytes, cudaStream_t) {
    using carafepp::emulation::run, carafepp::emulation::settings;
    grid.x = std::min(grid.x, static_cast<unsigned>(settings().most_blocks));
    run(grid, block, shared_bytes, [](const void* call) { (*static_cast<const std::function<void()>*>(call))(); },
        thread);
    return cudaSuccess;
}
