// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up = down = 1. A thread has a row of taps of a quad, with all sums in registers
// through all channels. Then a thread carries those of a pixel through the normaliser.
#pragma once

#include "cuda/up1/up1.h"

namespace carafepp::cuda {

// Rows of a tile, at most: more threads would have too few registers.
template <int K>
constexpr int kMostRowsOfSums = K == 7 ? 4 : 5;

// The slice of grad_output is behind that of features. In the end, gradients of masks are where these were, and behind
// them adjacent taps.
struct GradMasksUp1Plan : Up1Plan {
    GradMasksUp1Plan(const Problem& p, const Array& grad_masks, bool adjacent_taps)
        : Up1Plan(p, grad_masks, p.features, p.kernel_size == 7 ? kMostRowsOfSums<7> : kMostRowsOfSums<5>, 0,
                  adjacent_taps) {
        whole = whole && not_for_columns(p.grad_output, kQuad) == nullptr;
    }
    int64_t bytes() const {
        const int64_t pixels = adjacent ? ceil_div(rows * quads * kQuad, 32) * 32 : 0;
        return std::max<int64_t>(slice(halo_rows()) + slice(rows), masks() + pixels * kernel_size * kernel_size) *
               int64_t{sizeof(float)};
    }
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

// Turns logits into their gradients; grad(t) is that of a mask.
template <int K, class M, class F>
__device__ __forceinline__ void through_normalizer(const Problem& p, const TapsInMemory<const M>& logits, int place,
                                                   float largest, F grad, TapsOfPixel<K>& own) {
    const float scale = own.to_multiples(p.normalizer, largest);
    if (p.normalizer == CARAFEPP_SIGMOID) {
        own.map([&](float mask, int) { return mask * (1 - mask); });
        own.each([&](float& tap, int t) { tap *= grad(t); });
        return;
    }
    float means[2] = {};  // weighted by multiples of masks
    own.each([&](float tap, int t) { means[t % 2] += tap * (grad(t) * scale); });
    const float mean = (means[0] + means[1]) * scale;
    if (p.normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
        own.map([&](float tap, int t) {
            return tap * sigmoid(-widen(load_input(logits.at(place) + t * p.logits.stride_c)));
        });
    }
    own.each([&](float& tap, int t) { tap *= grad(t) * scale - mean; });
}

// Writes the gradients of a tile, whose sums are staged as masks are.
template <int K, bool Adjacent>
__device__ __forceinline__ void finish(const Problem& p, const Array& result, const GradMasksUp1Plan& plan,
                                       const TileOfItem& tile, float* grads) {
    const bool normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
    const Rectangle outputs(tile.top, min(tile.top + plan.rows, static_cast<int>(result.h)), tile.left,
                            min(tile.left + plan.quads * kQuad, static_cast<int>(result.w)));
    const TapsInMemory<const float> logits(p, p.logits, tile, outputs);
    const TapsInMemory<float> memory(p, result, tile, outputs);
    for_each_pixel(outputs, [&](int y, int x, bool exists) __attribute__((always_inline)) {
        float* const of_warp = grads + plan.masks() + thread_computed_late() / 32 * 32 * K * K;
        const bool computed = exists && tile.top + y < p.out_h && tile.left + x < p.out_w;  // not left out by a crop
        const auto grad = [from = grads + plan.place<K>(y, static_cast<unsigned>(x)), apart = plan.apart()](int t) {
            return from[t / K * apart + t % K * kQuad];
        };
        TapsOfPixel<K> own;
        const int place = logits.place(y, x, computed);
        if (normalized) load_taps<K, Adjacent>(logits, place, of_warp, own);
        if (!computed) {
            own.each([](float& tap, int) { tap = 0; });
        } else if (normalized) {
            through_normalizer(p, logits, place, own.largest(), grad, own);
        } else {
            own.each([&](float& tap, int t) { tap = grad(t); });
        }
        store_taps<K, Adjacent>(memory, memory.place(y, x, exists), of_warp, own);
    });
}

template <int K>
constexpr int kMostThreadsOfSums = (kMostQuads * kMostRowsOfSums<K> * K + 31) / 32 * 32;  // whole warps

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
#pragma unroll 2  // more would have too few registers
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
    const GradMasksUp1Plan plan(p, grad_masks, Vectors);
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
