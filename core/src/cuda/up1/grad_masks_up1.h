// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up = down = 1. A thread has a row of taps of a quad, with all sums in registers
// through all channels. Then those that have the taps of a pixel carry them through the normaliser.
#pragma once

#include "cuda/up1/up1.h"

namespace carafepp::cuda {

constexpr int kMostRowsOfSums = 5;  // of a tile: more threads would have too few registers

// The slice of grad_output is behind that of features. In the end, gradients of masks are where these were.
struct GradMasksUp1Plan : Up1Plan {
    GradMasksUp1Plan(const Problem& p, const Array& grad_masks)
        : Up1Plan(p, grad_masks, p.features, kMostRowsOfSums, 0) {
        whole = whole && not_for_columns(p.grad_output, kQuad) == nullptr;
    }
    int64_t bytes() const { return std::max(slice(halo_rows()) + slice(rows), masks()) * int64_t{sizeof(float)}; }
};

// The quad of a thread, and its row of taps. It takes few instructions to find, and registers to keep.
template <int K>
struct QuadOfThread {
    int row, quad, a;
    bool exists;

    __device__ __forceinline__ explicit QuadOfThread(const GradMasksUp1Plan& plan) {
        const int thread = thread_computed_late();
        quad = thread & ((1 << plan.quad_bits) - 1);
        row = (thread >> plan.quad_bits) / K;
        a = (thread >> plan.quad_bits) % K;
        exists = row < plan.rows && quad < plan.quads;
    }
};

// Turns masks into the derivatives of the normaliser: a gradient becomes taps[k] * (gradient - mean). Returns the mean.
// The gradient of tap (a, b) is grads[a * apart + b * step].
template <int K, bool Column, class M, class Taps>
__device__ __forceinline__ float derivatives(const Problem& p, const TapsOfPixel<K, Column>& own, const M* logits,
                                             bool exists, const float* grads, int apart, int step, Taps& taps) {
    if (p.normalizer == CARAFEPP_SIGMOID) {
        own.map([](int, int, float mask) { return mask * (1 - mask); }, taps);
        return 0;
    }
    float mean = 0;
    own.each_tap([&](int k, int a, int b, bool has) {
        if (exists && has) mean += taps[k] * grads[a * apart + b * step];
    });
    mean = own.over_threads(mean, [](float a, float b) { return a + b; });
    if (p.normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        own.map([&](int a, int b, float mask) {
            if (!exists || a >= K || b >= K) return mask;
            return mask * sigmoid(-widen(load_input(logits + (a * K + b) * p.logits.stride_c)));
        }, taps);
    }
    return mean;
}

// Writes the gradients of a tile, whose sums are staged as masks are.
template <int K, bool Column>
__device__ __forceinline__ void finish(const Problem& p, const Array& result, const GradMasksUp1Plan& plan,
                                       const TileOfItem& tile, const float* grads) {
    const bool normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
    const Rectangle outputs(tile.top, min(tile.top + plan.rows, static_cast<int>(result.h)), tile.left,
                            min(tile.left + plan.quads * kQuad, static_cast<int>(result.w)));
    const TapsInMemory<const float> logits(p, p.logits, tile, outputs);
    const TapsInMemory<float> memory(p, result, tile, outputs);
    using Own = TapsOfPixel<K, Column>;
    for_each_pixel<Own>(outputs, [&](int y, int x, bool exists) __attribute__((always_inline)) {
        const Own own;
        const float* const from = grads + plan.place<K>(y, static_cast<unsigned>(x));
        typename Own::Taps taps;
        own.each([&](int k, int) { taps[k] = 1; });
        float mean = 0;
        if (normalized) {
            const bool computed = exists && tile.top + y < p.out_h &&
                                  tile.left + x < p.out_w;  // not left out by a crop
            own.load(p, logits(y, x), computed, taps);
            mean = derivatives<K>(p, own, logits(y, x), computed, from, plan.apart(), kQuad, taps);
            if (!computed) {
                own.each([&](int k, int) { taps[k] = 0; });
                mean = 0;
            }
        }
        if (!exists) return;
        own.each_tap([&](int k, int a, int b, bool has) {
            if (has) taps[k] *= from[a * plan.apart() + b * kQuad] - mean;
        });
        own.each_in_memory(memory(y, x), result.stride_c,
                           [&](float* tap, int k, bool has) __attribute__((always_inline)) {
            if (has) *tap = taps[k];
        });
    });
}

template <int K>
constexpr int kMostThreadsOfSums = (kMostQuads * kMostRowsOfSums * K + 31) / 32 * 32;  // whole warps

template <int K, bool Vectors>
__global__ void __launch_bounds__(kMostThreadsOfSums<K>, 2)
    grad_masks_up1_kernel(Arguments arguments, GradMasksUp1Plan plan) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;
    float* const features = shared_memory<float>();
    float* const grad_output = features + plan.slice(plan.halo_rows());
    float* const grads = features;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        float sums[K][kQuad] = {};
#pragma unroll 1
        for (int before = 0; before < tile.channels; before += plan.vectors() * kVector) {
            stage_slice<Vectors, 2>(plan, p.features, tile.n, tile.c + before, tile.channels - before,
                                    tile.top + static_cast<int>(p.offset_h) - K / 2,
                                    tile.left + static_cast<int>(p.offset_w) - kQuad, plan.halo_rows(), features);
            stage_slice<Vectors, 2>(plan, p.grad_output, tile.n, tile.c + before, tile.channels - before, tile.top,
                                    tile.left - kQuad, plan.rows, grad_output);
            __syncthreads();
            const QuadOfThread<K> own(plan);
            if (own.exists) {
                const float* own_grads = grad_output + own.row * kRow + (own.quad + 1) * kQuad;
                const float* own_rows = features + (own.row + own.a) * kRow + own.quad * kQuad;
#pragma unroll 1
                for (int vector = 0; vector < plan.vectors(); vector++) {
#pragma unroll
                    for (int c = 0; c < kVector; c++) {
                        float grad[kQuad];
                        load_staged(own_grads + c * kPitch, grad);
                        const RowAround around(own_rows + c * kPitch);
#pragma unroll
                        for (int b = 0; b < K; b++) {
#pragma unroll
                            for (int q = 0; q < kQuad; q++) sums[b][q] += grad[q] * around.at<K>(q, b);
                        }
                    }
                    own_grads += plan.vector(plan.rows);
                    own_rows += plan.vector(plan.halo_rows());
                }
            }
            __syncthreads();
        }
        const QuadOfThread<K> own(plan);
        if (own.exists) {
            float* const to = grads + own.a * plan.apart() + (own.row * plan.quads + own.quad) * K * kQuad;
            float nothing = 0;
#pragma unroll
            for (int b = 0; b < K; b++) {
#pragma unroll
                for (int q = 0; q < kQuad; q++) nothing += sums[b][q] * 0;
                reinterpret_cast<float4*>(to)[b] = make_float4(sums[b][0], sums[b][1], sums[b][2], sums[b][3]);
            }
            // A tap beyond a border or the crop met zeros: its sum is 0, or NaN.
#pragma unroll 1
            for (int k = 0; nothing != 0 && k < K * kQuad; k++) {
                const int i = tile.top + own.row, j = tile.left + own.quad * kQuad + k % kQuad;
                if (i >= p.out_h || j >= p.out_w ||
                    !tap_inside<K>(p, i + static_cast<int>(p.offset_h), j + static_cast<int>(p.offset_w),
                                   own.a * K + k / kQuad))
                    to[k] = 0;
            }
        }
        __syncthreads();
        finish<K, Vectors>(p, result, plan, tile, grads);
        __syncthreads();
    }
}

template <bool Vectors>
const char* not_for_grad_masks_up1(const Problem& p, const Array& grad_masks) {
    if (const char* reason = not_for_up1_of_floats(p)) return reason;
    if (p.features.c / p.groups > kMostChannels) return "channels of a group are many";
    if (p.from_logits) {
        if (const char* reason = not_for_taps(p.logits, Vectors)) return reason;
    }
    if (const char* reason = not_for_taps(grad_masks, Vectors)) return reason;
    if constexpr (!Vectors) {
        return p.features.stride_w != 1 || p.grad_output.stride_w != 1 ? "columns are not adjacent" : nullptr;
    }
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    if (const char* reason = not_for_slice(p.features)) return reason;
    return not_for_slice(p.grad_output);
}

template <bool Vectors>
void grad_masks_up1(const Problem& p, const Array& grad_masks) {
    const GradMasksUp1Plan plan(p, grad_masks);
    const auto run = [&](auto kernel, int k) {
        launch(kernel, plan.tiles.items, plan.threads(k), plan.bytes(), p, grad_masks, plan);
    };
    switch (p.kernel_size) {
        case 3: return run(grad_masks_up1_kernel<3, Vectors>, 3);
        case 5: return run(grad_masks_up1_kernel<5, Vectors>, 5);
        default: return run(grad_masks_up1_kernel<7, Vectors>, 7);
    }
}

}  // namespace carafepp::cuda
