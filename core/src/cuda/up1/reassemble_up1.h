// SPDX-License-Identifier: Apache-2.0
// The forward for up = down = 1 and, transposed, the gradient of features. A thread has a quad in a vector of channels.
// The gradient is a forward over grad_output, with the masks that a source has in the outputs around it.
#pragma once

#include "cuda/up1/up1.h"

namespace carafepp::cuda {

// Stages the masks of the tile's outputs. Taps beyond a border may stay: there features are 0, and a softmax is not
// finite in all taps or none. Others are cleared, as 0 * Inf is NaN.
// Transposed, the masks that the tile's sources have in the outputs around them. Taps are reversed: source s is in the
// window of output s + K/2 - a by tap a, which is staged as K - 1 - a.
template <int K, bool Adjacent, bool Transposed>
__device__ __forceinline__ void stage_masks(const Problem& p, const Up1Plan& plan, const TileOfItem& tile, float* masks,
                                            float* of_warp) {
    if (Transposed) {
#pragma unroll 4
        for (int k = static_cast<int>(threadIdx.x); k < plan.masks() / kQuad; k += static_cast<int>(blockDim.x))
            reinterpret_cast<float4*>(masks)[k] = make_float4(0, 0, 0, 0);
        __syncthreads();
    }
    const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
    constexpr int kAround = Transposed ? K / 2 : 0;
    const int top = tile.top - (Transposed ? static_cast<int>(p.offset_h) : 0),
              left = tile.left - (Transposed ? static_cast<int>(p.offset_w) : 0);
    const unsigned rows = static_cast<unsigned>(plan.rows), columns = static_cast<unsigned>(plan.quads * kQuad);
    const Rectangle outputs(max(top - kAround, 0), min(top + plan.rows + kAround, static_cast<int>(p.out_h)),
                            max(left - kAround, 0),
                            min(left + plan.quads * kQuad + kAround, static_cast<int>(p.out_w)));
    const TapsInMemory<const float> memory(p, p.from_logits ? p.logits : p.masks, tile, outputs);
    for_each_pixel(outputs, [&](int y, int x, bool exists) __attribute__((always_inline)) {
        TapsOfPixel<K> own;
        load_taps<K, Adjacent>(memory, memory.place(y, x, exists), of_warp, own);
        if (!exists) return;
        const float scale = own.to_multiples(normalizer, own.largest());
        // The pixel that tap (0, 0) is staged for. Pixels left of the tile, and above it, are large without a sign.
        const int row = y + outputs.top - top - kAround, column = x + outputs.left - left - kAround;
        const int row_of_quads = plan.quads * K * kQuad;
        float* const to = masks + row * row_of_quads + (Transposed ? (K - 1) * plan.apart() : 0);
        const int step = Transposed ? row_of_quads - plan.apart() : plan.apart();  // from a row of taps to the next
#pragma unroll
        for (int b = 0; b < K; b++) {
            const unsigned at = static_cast<unsigned>(column + (Transposed ? b : 0));
            if (Transposed && at >= columns) continue;
            float* const of_column = to + plan.place<K>(0, at) + (Transposed ? K - 1 - b : b) * kQuad;
#pragma unroll
            for (int a = 0; a < K; a++) {
                if (Transposed && static_cast<unsigned>(row + a) >= rows) continue;
                of_column[a * step] = own.taps[a * K + b] * scale;
            }
        }
        if (Transposed || (normalizer != CARAFEPP_NONE && normalizer != CARAFEPP_SIGMOID)) return;
        float nothing = 0;
        own.each([&](float tap, int) { nothing += tap * 0; });
        if (nothing == 0) return;
#pragma unroll 1
        for (int t = 0; t < K * K; t++) {
            if (!tap_inside<K>(p, tile.top + y + static_cast<int>(p.offset_h),
                               tile.left + x + static_cast<int>(p.offset_w), t))
                to[t / K * step + plan.place<K>(0, static_cast<unsigned>(x)) + t % K * kQuad] = 0;
        }
    });
}

template <int K, bool Vectors, bool Transposed>
__global__ void __launch_bounds__(kMostQuads * kMostRows * kMostVectors, K == 7 && !Vectors ? 2 : 3)
    reassemble_up1_kernel(Arguments arguments, Up1Plan plan) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;
    const Array& sliced = Transposed ? p.grad_output : p.features;
    float* const masks = shared_memory<float>();
    float* const slice = masks + plan.masks();
    const int offset_h = static_cast<int>(Transposed ? -p.offset_h : p.offset_h),
              offset_w = static_cast<int>(Transposed ? -p.offset_w : p.offset_w);
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        stage_masks<K, Vectors, Transposed>(p, plan, tile, masks, slice + thread_computed_late() / 32 * 32 * K * K);
        if (Vectors) __syncthreads();  // the slice takes the place of taps in memory
#pragma unroll 1
        for (int before = 0; before < tile.channels; before += plan.vectors() * kVector) {
            stage_slice<Vectors, Vectors ? 5 : 2>(plan, sliced, tile.n, tile.c + before, tile.channels - before,
                                                  tile.top + offset_h - K / 2, tile.left + offset_w - kQuad,
                                                  plan.halo_rows(), slice);
            __syncthreads();
            const int thread = thread_computed_late(), quad = thread & ((1 << plan.quad_bits) - 1);
            const int vector = thread >> plan.quad_bits & (plan.vectors() - 1);
            const int row = thread >> (plan.quad_bits + plan.vector_bits);
            const int i = tile.top + row, j = tile.left + quad * kQuad;
            const bool exists = row < plan.rows && quad < plan.quads && i < result.h;
            const int columns = exists ? static_cast<int>(result.w) - j : 0;
            const int channels = tile.channels - before - vector * kVector;
            if (columns > 0 && channels > 0) {
                float sums[kVector][kQuad] = {};
                const float* own_masks = masks + (row * plan.quads + quad) * K * kQuad;
                const float* own_rows = slice + vector * plan.vector(plan.halo_rows()) + row * kRow + quad * kQuad;
#pragma unroll 1
                for (int a = 0; a < K; a++, own_masks += plan.apart(), own_rows += kRow) {
                    float weights[K][kQuad];
#pragma unroll
                    for (int b = 0; b < K; b++) load_staged(own_masks + b * kQuad, weights[b]);
#pragma unroll
                    for (int c = 0; c < kVector; c++) {
                        const RowAround around(own_rows + c * kPitch);
#pragma unroll
                        for (int b = 0; b < K; b++) {
#pragma unroll
                            for (int q = 0; q < kQuad; q++) sums[c][q] += weights[b][q] * around.at<K>(q, b);
                        }
                    }
                }
                float* const to = element<float>(result, tile.n, tile.c + before + vector * kVector, i, j);
                if constexpr (Vectors) {
#pragma unroll
                    for (int q = 0; q < kQuad; q++) {
                        if (q < columns)
                            store_channels(make_float4(sums[0][q], sums[1][q], sums[2][q], sums[3][q]),
                                           to + q * result.stride_w);
                    }
                } else {
#pragma unroll
                    for (int c = 0; c < kVector; c++) {
                        if (c >= channels) continue;
                        if (plan.whole_result) {
                            store_row<true>(sums[c], columns, 1, to + c * result.stride_c);
                        } else {
                            store_row<false>(sums[c], columns, result.stride_w, to + c * result.stride_c);
                        }
                    }
                }
            }
            __syncthreads();
        }
    }
}

template <bool Vectors, bool Transposed>
const char* not_for_reassemble_up1(const Problem& p, const Array& result) {
    if (const char* reason = not_for_up1_of_floats(p)) return reason;
    if (const char* reason = not_for_taps(p.from_logits ? p.logits : p.masks, Vectors)) return reason;
    const Array& sliced = Transposed ? p.grad_output : p.features;
    if constexpr (!Vectors) return sliced.stride_w != 1 || result.stride_w != 1 ? "columns are not adjacent" : nullptr;
    // Masks that many channels share are staged rarely.
    if (p.features.c / p.groups > kMostChannels) return "channels of a group are many";
    if (const char* reason = not_for_vectors(p, sliced)) return reason;
    if (const char* reason = not_for_vectors(p, result)) return reason;
    return not_for_slice(sliced);
}

template <bool Vectors, bool Transposed>
void reassemble_up1(const Problem& p, const Array& result) {
    const Up1Plan plan(p, result, Transposed ? p.grad_output : p.features, kMostRows, kEnoughTiles, Vectors);
    const auto run = [&](auto kernel) {
        launch(kernel, plan.tiles.items, plan.threads(plan.vectors()), plan.bytes(), p, result, plan);
    };
    switch (p.kernel_size) {
        case 3: return run(reassemble_up1_kernel<3, Vectors, Transposed>);
        case 5: return run(reassemble_up1_kernel<5, Vectors, Transposed>);
        default: return run(reassemble_up1_kernel<7, Vectors, Transposed>);
    }
}

}  // namespace carafepp::cuda
