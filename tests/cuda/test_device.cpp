// SPDX-License-Identifier: Apache-2.0
// device.cu and launch call a runtime whose answers a test sets. The tests count the questions and check the errors.
#define CARAFEPP_CUDA_BUILD "nvcc 13.0, sm 80 90"
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <string>
#include <thread>
#include <vector>

#include "cuda/device.cu"

// ---- the runtime ----

namespace {

int device_count = 100, driver = 13000;
std::atomic<int> questions{0};  // cudaFuncGetAttributes
thread_local int current = 0, devices_set = 0;
thread_local cudaError_t refusal = cudaSuccess;  // the answer to questions and launches
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// Every device runs code for 75 or, if its number is odd, for 90.
int architecture(int device) { return device % 2 ? 90 : 75; }

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorNoKernelImageForDevice ? "cudaErrorNoKernelImageForDevice" : "cudaErrorOther";
}
const char* cudaGetErrorString(cudaError_t) { return "in words"; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count;
    return answer(refusal);
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    *properties = {"GPU", architecture(device) / 10, architecture(device) % 10};
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device >= device_count) return answer(cudaErrorInvalidDevice);
    devices_set++;
    current = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? architecture(device) / 10 : architecture(device) % 10;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    questions++;
    attributes->ptxVersion = architecture(current);
    return answer(refusal);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
size_t shared_bytes_of(const void*) { return 0; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return answer(refusal); }

// ---- the tests ----

namespace {

using namespace carafepp;
using namespace carafepp::cuda;

void kernel(Arguments, int) {}

// A kernel by number: its address is never followed.
const void* kernel_of(int number) {
    static const char addresses[1000] = {};
    return addresses + number;
}

template <class F>
std::string failure_of(F f) {
    try {
        f();
        return "";
    } catch (const Failure& failure) {
        return failure.text;
    }
}

TEST_CASE("a failed question is asked again and leaves no error") {
    refusal = cudaErrorNoDevice;
    const int before = questions;
    for (int k = 0; k < 2; k++) {
        CHECK(failure_of([] { is_compiled_for(80, kernel); }) == "cudaErrorOther: in words");
        CHECK(cudaGetLastError() == cudaSuccess);
    }
    refusal = cudaSuccess;
    CHECK(!is_compiled_for(80, kernel));
    CHECK(is_compiled_for(75, kernel));
    CHECK(questions == before + 3);
}

TEST_CASE("a question is asked once for a kernel and a device") {
    const int before = questions;
    for (int round = 0; round < 3; round++) {
        for (int device = 0; device < 8; device++) {
            const CurrentDevice here(device);
            for (int number = 0; number < 20; number++)
                CHECK(architecture_of(kernel_of(number)) == architecture(device));
        }
    }
    CHECK(questions == before + 8 * 20);
}

TEST_CASE("threads agree") {
    std::atomic<int> wrong{0};
    const int before = questions;
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 8; thread++) {
        threads.emplace_back([&, thread] {
            for (int k = 0; k < 400; k++) {
                const CurrentDevice here((k + thread) % 4);
                wrong += architecture_of(kernel_of(20 + k % 10)) != architecture(current);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
    CHECK(questions >= before + 40);
    CHECK(questions <= before + 8 * 20);
}

TEST_CASE("answers that cannot be kept are asked again") {
    for (int device : {1, device_count - 2}) {
        const CurrentDevice here(device);
        for (int number = 0; number < 1000; number++) CHECK(architecture_of(kernel_of(number)) == architecture(device));
    }
}

TEST_CASE("a device without code is told how to get it") {
    for (const cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction}) {
        refusal = error;
        const std::string text =
            ": carafepp has no code for this device of architecture 75; it was built by nvcc 13.0, sm 80 90. "
            "Build it for the device: by pip with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=75, "
            "by CMake with -DCMAKE_CUDA_ARCHITECTURES=75";
        const std::string failure = failure_of([] { launch(kernel, 1, 32, 0, Problem(), Array(), 1); });
        CHECK(failure == cudaGetErrorName(error) + text);
        CHECK(cudaGetLastError() == cudaSuccess);
        refusal = cudaSuccess;
    }
}

TEST_CASE("another refusal is told by its name") {
    refusal = cudaErrorInvalidDevice;
    CHECK(failure_of([] { launch(kernel, 1, 32, 0, Problem(), Array(), 1); }) == "cudaErrorOther: in words");
    CHECK(cudaGetLastError() == cudaSuccess);
    refusal = cudaSuccess;
}

TEST_CASE("devices are told with their driver, or why there are none") {
    device_count = 2;
    CHECK(devices() == "CUDA devices: 2, by a driver for CUDA 13.0: GPU (7.5), GPU (9.0)");
    device_count = 0;
    driver = 12080;
    CHECK(devices() == "CUDA devices: none, by a driver for CUDA 12.8");
    refusal = cudaErrorNoDevice;
    CHECK(devices() == "CUDA devices: none, by a driver for CUDA 12.8 (cudaErrorOther: in words)");
    CHECK(cudaGetLastError() == cudaSuccess);
    driver = 0;
    CHECK(devices() == "CUDA devices: none, as there is no CUDA driver");
    device_count = 100, driver = 13000, refusal = cudaSuccess;
}

TEST_CASE("the callers device comes back") {
    const int before = devices_set;
    {
        const CurrentDevice here(0);
    }
    CHECK(devices_set == before);
    {
        const CurrentDevice there(3);
        CHECK(current == 3);
    }
    CHECK(current == 0);
    CHECK(devices_set == before + 2);
    CHECK(failure_of([] { const CurrentDevice none(device_count); }) == "cudaErrorOther: in words");
    CHECK(current == 0);
    CHECK(cudaGetLastError() == cudaSuccess);
}

}  // namespace
