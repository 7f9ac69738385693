// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that core/src/cuda uses, for builds that emulate kernels. emulation.h is the language; here are the
// functions of the runtime. runtime.cpp defines them for emulated devices. test_device.cpp defines them itself, and so
// chooses the runtime's answers.
#pragma once

#include <algorithm>
#include <functional>

#include "../emulation.h"

using std::max, std::min;

#define CUDART_VERSION 13000

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
};

enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaDeviceProp {
    char name[256];
    int major, minor;
};

struct cudaFuncAttributes {
    int ptxVersion;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

// Allows a kernel that much dynamic shared memory, and tells how much it has.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

size_t shared_bytes_of(const void* kernel);

// `thread` is a std::function that runs one thread: C++ cannot call a kernel by its address alone.
cudaError_t cudaLaunchKernel(const void* thread, dim3 grid, dim3 block, void** parameters, size_t shared_bytes,
                             cudaStream_t stream);

template <class... Parameters, size_t... k>
void run_thread(void (*kernel)(Parameters...), void** parameters, std::index_sequence<k...>) {
    kernel(*static_cast<Parameters*>(parameters[k])...);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** parameters,
                             size_t shared_bytes, cudaStream_t stream) {
    carafepp::emulation::check_parameters<Parameters...>();
    if (shared_bytes > shared_bytes_of(reinterpret_cast<const void*>(kernel))) return cudaErrorInvalidValue;
    const std::function<void()> thread = [=] {
        run_thread(kernel, parameters, std::index_sequence_for<Parameters...>());
    };
    return cudaLaunchKernel(&thread, grid, block, parameters, shared_bytes, stream);
}
