// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent channels. A block has a tile of 8 x 4 sources. It goes
// through the channels a slice at a time, and the features of the next slice, with their halo, arrive meanwhile. Four
// threads share a source: each has every fourth vector of channels. It contracts the window with the gradients of the
// four outputs, with all sums in registers. Then the four exchange their sums, and each finishes one output.
#include "cuda/grad_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kLanes = kOutputs;         // threads of a source
constexpr int kStep = kLanes * kVector;  // channels of all of them at once
constexpr int kSteps = kChannelsOfSlice / kStep;
static_assert(kSteps == 2, "shared memory has the outputs of two");

template <int K, class T>
using Features = Halo<K, kRowsOfTile, kColumns + K - 1, kBlock, kVector, T>;

// So that the threads that read together do so in different banks: columns that begin in the same ones have other
// halves of a slice first.
template <class T>
__device__ __forceinline__ int swizzle(int column) {
    return column / (sizeof(float) / sizeof(T)) % 2 * kLanes;
}

// The gradients of a source's outputs in shared memory, for two steps: [step][output][thread][channel]. A thread copies
// those that it reads.
constexpr int kOutputsOfStep = kOutputs * kBlock * kVector;

template <class T>
struct OwnOutputs {
    const T* from;
    bool exist[kOutputs];

    __device__ __forceinline__ OwnOutputs(const Problem& p, const TileOfBlock& tile, int out_i, int out_j, int channel)
        : from(element<const T>(p.grad_output, tile.n, tile.c + channel, out_i, out_j)) {
#pragma unroll
        for (int o = 0; o < kOutputs; o++) exist[o] = out_i + o / kUp < p.out_h && out_j + o % kUp < p.out_w;
    }

    // Copies the channels of the next step; 0 where there are none.
    __device__ __forceinline__ void copy(const Array& array, bool channels_exist, T* to) {
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
            copy_async<kVector * sizeof(T)>(to + o * kBlock * kVector,
                                            from + o / kUp * array.stride_h + o % kUp * array.stride_w,
                                            channels_exist && exist[o]);
        }
        from += kStep;
    }
};

__device__ __forceinline__ float product(float4 a, float4 b, float sum) {
    sum += a.x * b.x;
    sum += a.y * b.y;
    sum += a.z * b.z;
    sum += a.w * b.w;
    return sum;
}

// grad = the sums of output `lane`, of the four threads of a source.
template <int K>
__device__ __forceinline__ void exchange_sums(const float (&sums)[kOutputs][K * K], int lane, float (&grad)[K * K]) {
    const auto add = [](bool second, int distance, float a, float b) {
        return (second ? b : a) + __shfl_xor_sync(0xffffffffu, second ? a : b, distance);
    };
#pragma unroll
    for (int t = 0; t < K * K; t++) {
        const bool lower = lane / kUp, right = lane % kUp;
        grad[t] = add(right, 1, add(lower, kUp, sums[0][t], sums[2][t]), add(lower, kUp, sums[1][t], sums[3][t]));
    }
}

// Conversions of halves take registers that a third block would miss.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == sizeof(float) ? 3 : 2)
    grad_masks_up2_nhwc_kernel(Arguments arguments, TileUp2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    using F = Features<K, T>;
    constexpr int kWidth = kColumns + K - 1;
    T* const features = shared_memory<T>();  // two slices of [row][column][channel]
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), lane = thread % kLanes, source = thread / kLanes;
        const int row = source / kColumns, column = source % kColumns;
        const TileOfBlock tile(p, plan, item, kRowsOfTile);
        T* const grads = features + 2 * F::kElements + thread * kVector;
        float sums[kOutputs][K * K] = {};
        if (tile.channels > 0) {  // or there may be no arrays
            F halo(p, tile, swizzle<T>);
            halo.copy(p.features, tile.channels, features);
            OwnOutputs<T> outputs(p, tile, (tile.top + row) * kUp, (tile.left + column) * kUp, lane * kVector);
            outputs.copy(p.grad_output, lane * kVector < tile.channels, grads);
            bool second = false;  // of the slices in shared memory
#pragma unroll 1
            for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
                wait_for_copies();
                __syncthreads();
                const T* const pixels = features + second * F::kElements + (row * kWidth + column) * kChannelsOfSlice;
                second = !second;
                if (channels > kChannelsOfSlice)
                    halo.copy(p.features, channels - kChannelsOfSlice, features + second * F::kElements);
#pragma unroll 1
                for (int step = 0; step < kSteps && step * kStep < channels; step++) {
                    if (step > 0) wait_for_copies();
                    outputs.copy(p.grad_output, (step + 1) * kStep + lane * kVector < channels,
                                 grads + (step + 1) % kSteps * kOutputsOfStep);
                    float4 output[kOutputs];
#pragma unroll
                    for (int o = 0; o < kOutputs; o++)
                        output[o] = staged_channels(grads + step * kOutputsOfStep + o * kBlock * kVector);
                    const int vector = step * kLanes + lane;
#pragma unroll
                    for (int b = 0; b < K; b++) {
                        const T* pixel = pixels + b * kChannelsOfSlice + (vector ^ swizzle<T>(column + b)) * kVector;
#pragma unroll
                        for (int a = 0; a < K; a++, pixel += kWidth * kChannelsOfSlice) {
                            const float4 feature = staged_channels(pixel);
#pragma unroll
                            for (int o = 0; o < kOutputs; o++)
                                sums[o][a * K + b] = product(output[o], feature, sums[o][a * K + b]);
                        }
                    }
                }
            }
        }
        float grad[K * K];
        exchange_sums<K>(sums, lane, grad);
        finish_outputs<K, kColumns, T>(p, tile.n, tile.group, tile.top, tile.left, grad,
                                       reinterpret_cast<float*>(features), grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nhwc(const Problem& p, const Array&) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, p.grad_output);
}

void grad_masks_up2_nhwc(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const TileUp2Plan plan(p, kRowsOfTile, 0);
        launch(grad_masks_up2_nhwc_kernel<k, T>, plan.items, kBlock,
               bytes_of_stages_or_lines<k>((Features<k, T>::kElements + kOutputsOfStep) * int64_t{sizeof(T)}), p,
               grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
