// SPDX-License-Identifier: Apache-2.0
//
// on_a_stream: CARAFE++ in a GPU pipeline without a framework. The program queues copies and CARAFE++ on its own
// stream. The library allocates nothing and waits for nothing. Equal logits give averages, which are easy to check.

#include <carafepp/carafepp.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void check(carafepp_status status) {
    if (status != CARAFEPP_OK) throw std::runtime_error(carafepp_last_error());
}

struct Free {
    void operator()(void* data) const { cudaFree(data); }
};

// A contiguous float32 tensor on the current device.
struct Tensor {
    std::unique_ptr<void, Free> memory;
    carafepp_tensor view{};
    size_t bytes = sizeof(float);

    Tensor(int64_t n, int64_t c, int64_t h, int64_t w) {
        view = {nullptr, CARAFEPP_FLOAT32, CARAFEPP_CUDA, 0, 4, {n, c, h, w}, {c * h * w, h * w, w, 1}};
        for (const int64_t size : {n, c, h, w}) bytes *= static_cast<size_t>(size);
        void* data = nullptr;
        check(cudaGetDevice(&view.device_index));
        check(cudaMalloc(&data, bytes));
        memory.reset(data);
        view.data = data;
    }
};

void run() {
    constexpr int64_t n = 2, c = 64, h = 50, w = 76;
    carafepp_params params{};
    params.struct_size = sizeof params;
    params.up = 2;
    params.down = 1;
    params.kernel_size = 5;
    params.groups = 1;
    params.normalizer = CARAFEPP_SOFTMAX;

    const Tensor features(n, c, h, w), logits(n, 5 * 5 * 2 * 2, h, w), output(n, c, 2 * h, 2 * w);
    std::vector<float> input(features.bytes / sizeof(float), 3), result(output.bytes / sizeof(float));

    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaMemcpyAsync(features.view.data, input.data(), features.bytes, cudaMemcpyHostToDevice, stream));
    check(cudaMemsetAsync(logits.view.data, 0, logits.bytes, stream));
    check(carafepp_reassemble_with_logits(&params, &features.view, &logits.view, &output.view, stream));
    check(cudaMemcpyAsync(result.data(), output.view.data, output.bytes, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    check(cudaStreamDestroy(stream));

    const float middle = result[h * (2 * w) + w];  // first channel, far from the border
    if (std::fabs(middle - 3) > 1e-5f) throw std::runtime_error("an average of threes is " + std::to_string(middle));
    std::printf("%zu numbers on a stream by carafepp %s\n", result.size(), carafepp_version());
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("no GPU here: nothing was run");
        return 0;
    }
    try {
        run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "on_a_stream: %s\n", error.what());
        return 1;
    }
    return 0;
}
