// SPDX-License-Identifier: Apache-2.0
// Kernels whose accesses are known. They are compiled as the traced ones are.
#include "emulation.h"

__global__ void copy(const float* from, int stride, float* to) { to[threadIdx.x] = from[threadIdx.x * stride]; }

__global__ void copy_vectors(const float4* from, float4* to) { to[threadIdx.x] = from[threadIdx.x]; }

// Every block reads all rows of 32 floats, several times.
__global__ void read_again(const float* rows, int count, int times, float* to) {
    float sum = 0;
    for (int time = 0; time < times; time++) {
        for (int row = 0; row < count; row++) sum += rows[row * 32 + threadIdx.x];
    }
    to[threadIdx.x] = sum;
}

__global__ void store_to_shared(int stride) {
    static_cast<float*>(carafepp::emulation::shared_memory())[threadIdx.x * stride] = 1;
}
