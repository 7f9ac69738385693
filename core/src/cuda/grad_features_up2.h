// SPDX-License-Identifier: Apache-2.0
// The gradients of features for up x2, in gather form. A block goes down the rows of some columns of sources; a thread
// has four channels of two columns. It sums in registers for all K rows that the windows of a row of sources reach. The
// uppermost of them is then complete.
#pragma once

#include "cuda/channels.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kColumnsOfThread = 2;
constexpr int kRowsOfBlock = 16;  // that a block goes down, with a window more

// Clears the masks of outputs that a crop leaves out, as the gradient is 0 there, in a block of kThreads. Ends with a
// barrier.
template <int K>
__device__ void clear_cropped_masks(const Problem& p, int i, int first, int sources, float* staged) {
    if ((i + 1) * kUp <= p.out_h && (first + sources) * kUp <= p.out_w) return;
    for (int k = static_cast<int>(threadIdx.x); k < sources * K * K * kOutputs; k += kThreads) {
        const int output = k % kOutputs, j = first + k / (K * K * kOutputs);
        if (i * kUp + output / kUp >= p.out_h || j * kUp + output % kUp >= p.out_w) staged[k] = 0;
    }
    __syncthreads();
}

// The products of the outputs of a source that are contracted at once.
__device__ __forceinline__ void add_products(float2 weight, const float4 (&grad)[2], float4& sum) {
    add_products(weight.x, grad[0], sum);
    add_products(weight.y, grad[1], sum);
}
__device__ __forceinline__ void add_products(float4 weight, const float4 (&grad)[4], float4& sum) {
    add_products(weight.x, grad[0], sum);
    add_products(weight.y, grad[1], sum);
    add_products(weight.z, grad[2], sum);
    add_products(weight.w, grad[3], sum);
}

// sums[a][column] += the products of a row of outputs, from the source K/2 to the left of column 0 on. `weights` are
// this source's, `apart` from tap to tap. load(x, output) is the gradient of the x-th source's output.
template <int K, class Weights, class Load>
__device__ __forceinline__ void add_outputs(const Weights* weights, int apart, Load load,
                                            float4 (&sums)[K][kColumnsOfThread]) {
    constexpr int kCount = sizeof(Weights) / sizeof(float);
    weights += (K - 1) * apart;  // of the tap that reaches column 0
#pragma unroll 1
    for (int x = 0; x < K + kColumnsOfThread - 1; x++, weights += (K * K - 1) * apart) {
        float4 grad[kCount];
#pragma unroll
        for (int o = 0; o < kCount; o++) grad[o] = load(x, o);
#pragma unroll
        for (int s = 0; s < kColumnsOfThread; s++) {
            if (x < s || x >= s + K) continue;
#pragma unroll
            for (int a = 0; a < K; a++) add_products(weights[(a * K + s) * apart], grad, sums[a][s]);
        }
    }
}

// Goes down the rows of sources from `top` on. A call add(i, sums) adds the products of row i to all rows that they
// reach. The first of these is then complete, and store(row, sums) gets it, with a sum for each column.
template <int K, class Add, class Store>
__device__ __forceinline__ void go_down(const Problem& p, int top, Add add, Store store) {
    const int height = static_cast<int>(p.features.h), bottom = min(top + kRowsOfBlock, height);
    float4 sums[K][kColumnsOfThread] = {};  // of rows i - K / 2 and on
    for (int i = top - K / 2; i < bottom + K / 2; i++) {
        if (i >= 0 && i < height && i * kUp < p.out_h && p.out_w > 0) add(i, sums);
        if (i - K / 2 >= top) store(i - K / 2, sums[0]);
#pragma unroll
        for (int s = 0; s < kColumnsOfThread; s++) {
#pragma unroll
            for (int a = 0; a < K; a++) sums[a][s] = a + 1 < K ? sums[a + 1][s] : make_float4(0, 0, 0, 0);
        }
    }
}

}  // namespace carafepp::cuda
