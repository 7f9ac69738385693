// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up = down = 1 on tensor cores. A product has the sums of a run of outputs in a
// row of taps. Then a thread carries those of a pixel through the normaliser.
#pragma once

#include "cuda/up1/grad_masks_up1.h"
#include "cuda/up1/up1_mma.h"

namespace carafepp::cuda {

constexpr int kMostRowsOfSumsOfMma = 4;  // of a tile

// Floats from output to output. A warp stores to different banks at once, or to the same one twice.
template <int K>
constexpr int kApartSums = K == 7 ? 53 : K * K;

// In shared memory: a slice of features, one of grad_output, and the sums. In the end, taps of a pixel are where slices
// were.
struct GradMasksUp1MmaPlan : Up1MmaPlan {
    GradMasksUp1MmaPlan(const Problem& p, const Array& grad_masks)
        : Up1MmaPlan(p, grad_masks, p.features, kMostRowsOfSumsOfMma, elements_of_row(p), false) {
        columns_at_once = std::min(columns_at_once, columns_of(p, p.grad_output));
    }

    static_assert(kMostRowsOfSumsOfMma * TapsOfWarp<7>::kElements <= (2 * kMostRowsOfSumsOfMma + 6) * kRowOfSlice,
                  "as many warps have pixels as rows");

private:
    static int elements_of_row(const Problem& p) {
        const int apart = p.kernel_size == 5 ? kApartSums<5> : kApartSums<7>;
        return kRowOfSlice + kMostRuns * kRun * apart * 2;  // floats are two
    }
};

// A lane loads this for a run of outputs, and has its sums there. Tap b of output r is in pixel r + kShift + b of 16.
template <int K, bool Vectors, class T>
struct LaneOfSums {
    const T *features, *grads;
    float* sums;
    int taps[2];    // of two outputs
    bool early[2];  // in the first eight pixels

    __device__ __forceinline__ LaneOfSums(const T* all_features, const T* all_grads, float* all_sums, int run) {
        const int lane = thread_computed_late() % 32, matrix = lane / 8, line = lane % 8, own = lane / 4,
                  pair = lane % 4 * 2;
        const auto place = [&](int pixels, int channels) {
            return Vectors ? ((run + pixels) * kRun + line) * kOfSlice + (channels ^ line / 4) * kWide
                           : (channels * kWide + line) * kPitch + (run + pixels) * kRun;
        };
        features = all_features + place(matrix % 2, matrix / 2);
        grads = all_grads + place(0, matrix % 2);
        sums = all_sums + (run * kRun + pair) * kApartSums<K>;
#pragma unroll
        for (int q = 0; q < 2; q++) {
            taps[q] = (own - pair - q - kShift<K>)&(kRun - 1);
            early[q] = own >= pair + q;
        }
    }

    // Adds the products of a row of outputs in 16 channels to their sums, or stores them if they are the `First` ones.
    // Returns 0 if they are finite.
    template <bool First>
    __device__ __forceinline__ float add(int row) const {
        uint32_t outputs[4];  // the last two are the first two again
        load_matrices<!Vectors>(grads + row * kRowOfSlice, outputs);
        const T* const pixels = features + row * kRowOfSlice;
        float* const to = sums + row * kMostRuns * kRun * kApartSums<K>;
        float zero = 0;
#pragma unroll
        for (int a = 0; a < K; a++) {
            uint32_t values[4];
            load_matrices<!Vectors>(pixels + a * kRowOfSlice, values);
            float products[4] = {};
            multiply_add<T>(products, values, {outputs[0], outputs[1]});
#pragma unroll
            for (int q = 0; q < 2; q++) {
                if (taps[q] >= K) continue;
                float sum = early[q] ? products[q] : products[q + 2];
                float* const own = to + taps[q] + (q * kApartSums<K> + a * K);
                if (!First) sum += *own;
                *own = sum;
                zero += sum * 0;
            }
        }
        return zero;
    }
};

template <int K, bool Vectors, class T>
__global__ void __launch_bounds__(kThreads, K == 7 || Vectors ? 2 : 3)
    grad_masks_up1_mma_kernel(Arguments arguments, GradMasksUp1MmaPlan plan) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;
    T* const features = shared_memory<T>();
    T* const grads = features + plan.slice();
    float* const sums = reinterpret_cast<float*>(grads + plan.rows * kRowOfSlice);
    const int warp = same_in_warp(thread_computed_late() / 32);
    T* const of_warp = features + warp * TapsOfWarp<K>::kElements;  // in the end
    const int run = warp & (plan.runs() - 1), step = kWarpsOfUp1 >> plan.run_bits;
    const bool normalized = p.from_logits && p.normalizer != CARAFEPP_NONE;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
#pragma unroll 1
        for (int before = 0; before == 0 || before < tile.channels; before += kOfSlice) {
            const int channels = tile.channels - before;
            copy_slice<Vectors>(
                plan, p.features, tile.n, tile.c + before, channels, tile.top + static_cast<int>(p.offset_h) - K / 2,
                tile.left + static_cast<int>(p.offset_w) - kBeforeRun, plan.halo_rows(), plan.runs() + 1, features);
            copy_slice<Vectors>(plan, p.grad_output, tile.n, tile.c + before, channels, tile.top, tile.left, plan.rows,
                                plan.runs(), grads);
            wait_for_copies();
            __syncthreads();
            const LaneOfSums<K, Vectors, T> own(features, grads, sums, run);
#pragma unroll 1
            for (int row = warp >> plan.run_bits; row < plan.rows; row += step) {
                const float zero = before == 0 ? own.template add<true>(row) : own.template add<false>(row);
                if (!__any_sync(0xffffffffu, !(zero == 0))) continue;
                // A tap beyond a border met zeros: its sum is 0, or NaN.
                __syncwarp();
                float* const of_run = sums + (row * kMostRuns + run) * kRun * kApartSums<K>;
#pragma unroll 1
                for (int number = thread_computed_late() % 32; number < kRun * K * K; number += 32) {
                    const int output = number / (K * K), t = number % (K * K);
                    if (!tap_inside<K>(p, tile.top + row + static_cast<int>(p.offset_h),
                                       tile.left + run * kRun + output + static_cast<int>(p.offset_w), t))
                        of_run[output * kApartSums<K> + t] = 0;
                }
            }
            __syncthreads();
        }
        const Rectangle outputs(tile.top, min(tile.top + plan.rows, static_cast<int>(result.h)), tile.left,
                                min(tile.left + plan.runs() * kRun, static_cast<int>(result.w)));
        const TapsInMemory<const T> logits(p, p.logits, tile, outputs);
        const TapsInMemory<T> memory(p, result, tile, outputs);
        for_each_pixel(outputs, [&](int y, int x, bool exists) __attribute__((always_inline)) {
            const bool computed = exists && tile.top + y < p.out_h &&
                                  tile.left + x < p.out_w;  // not left out by a crop
            const auto grad = [from = sums + (y * kMostRuns * kRun + x) * kApartSums<K>](int t) { return from[t]; };
            TapsOfPixel<K> own;
            const int place = logits.place(y, x, computed);
            float largest = 0;
            if (normalized) largest = load_taps<K, Vectors>(plan, logits, place, of_warp, own);
            if (!computed) {
                own.each([](float& tap, int) { tap = 0; });
            } else if (normalized) {
                through_normalizer(p, logits, place, largest, grad, own);
            } else {
                own.each([&](float& tap, int t) { tap = grad(t); });
            }
            store_taps<K, Vectors>(memory, memory.place(y, x, exists), of_warp, own);
        });
        __syncthreads();
    }
}

template <bool Vectors>
const char* not_for_grad_masks_up1_mma(const Problem& p, const Array& grad_masks) {
    if (const char* reason = not_for_up1_mma(p)) return reason;
    if (const char* reason = not_for_taps_of_mma(p, grad_masks, Vectors)) return reason;
    if (p.from_logits) {
        if (const char* reason = not_for_taps_of_mma(p, p.logits, Vectors)) return reason;
    }
    for (const Array* array : {&p.features, &p.grad_output}) {
        if (const char* reason = not_for_pixels_of_mma(p, *array, Vectors)) return reason;
    }
    if (const char* reason = not_for_shared_memory(GradMasksUp1MmaPlan(p, grad_masks).bytes())) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_up1_mma_kernel<5, Vectors, BFloat16>);
}

template <bool Vectors>
void grad_masks_up1_mma(const Problem& p, const Array& grad_masks) {
    const GradMasksUp1MmaPlan plan(p, grad_masks);
    with_kernel_of_up1_mma(p, [&](auto k, auto type) {
        launch(grad_masks_up1_mma_kernel<decltype(k)::value, Vectors, decltype(type)>, plan.tiles.items, kThreads,
               plan.bytes(), p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
