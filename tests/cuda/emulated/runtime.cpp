// SPDX-License-Identifier: Apache-2.0
// The runtime of emulated devices. Every number is one; it runs code for 9.0 and refuses nothing. A launch returns when
// its kernel has ended.
#include <cuda_runtime.h>

static thread_local int current_device = 0;

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
const char* cudaGetErrorString(cudaError_t) { return "no emulated device fails"; }
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
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return cudaSuccess;
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
