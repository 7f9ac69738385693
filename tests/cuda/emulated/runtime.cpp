// SPDX-License-Identifier: Apache-2.0
// The runtime of emulated devices. Every number is one; it runs code for 9.0. It refuses launches with more shared
// memory than their kernel has. A launch returns when its kernel has ended.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>

#include "../boxes.h"

static thread_local int current_device = 0;

// The shared memory of kernels that have more than others.
static std::mutex mutex;
static std::map<const void*, size_t> most_shared_bytes;

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(cudaError_t) { return "too much shared memory"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {"emulated", 9, 0};
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
             : attribute == cudaDevAttrMultiProcessorCount ? 132
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

// Refuses what the driver does.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t axes, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    using carafepp::emulation::TensorMap;
    const int64_t itemsize = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 4;
    if (axes != TensorMap::kAxes || reinterpret_cast<uintptr_t>(data) % 16 != 0 || box[0] * itemsize % 16 != 0)
        return CUDA_ERROR_INVALID_VALUE;
    TensorMap tensor{static_cast<const char*>(data), {}, {itemsize}, {}};
    for (int axis = 0; axis < TensorMap::kAxes; axis++) {
        if (sizes[axis] == 0 || sizes[axis] > cuuint64_t{1} << 32 || box[axis] == 0 || box[axis] > 256 ||
            element_strides[axis] != 1)
            return CUDA_ERROR_INVALID_VALUE;
        if (axis > 0 && (strides[axis - 1] % 16 != 0 || strides[axis - 1] >= cuuint64_t{1} << 40))
            return CUDA_ERROR_INVALID_VALUE;
        tensor.sizes[axis] = static_cast<int64_t>(sizes[axis]);
        if (axis > 0) tensor.strides[axis] = static_cast<int64_t>(strides[axis - 1]);
        tensor.box[axis] = box[axis];
    }
    static_assert(sizeof tensor <= sizeof *map);
    std::memcpy(map, &tensor, sizeof tensor);
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* thread, dim3 grid, dim3 block, void**, size_t shared_bytes, cudaStream_t) {
    using carafepp::emulation::run, carafepp::emulation::settings;
    grid.x = std::min(grid.x, static_cast<unsigned>(settings().most_blocks));
    run(grid, block, shared_bytes, [](const void* call) { (*static_cast<const std::function<void()>*>(call))(); },
        thread);
    return cudaSuccess;
}
