// SPDX-License-Identifier: Apache-2.0
// The forward for few channels of a group. A thread has the masks of a unit in registers, normalises them there, and
// sums its outputs. All of them read one window, from shared memory.
#include "cuda/few/few_channels.h"

namespace carafepp::cuda {
namespace {

struct ReassembleFewPlan : FewPlan {
    StagedFeatures features;
    bool pixels;  // the outputs of a quad are adjacent vectors in all channels; else they are one in each

    ReassembleFewPlan(const Problem& p, const Array& output, int own)
        : FewPlan(p, ceil_div(p.out_h, p.factor.up), ceil_div(p.out_w, p.factor.up), own, 512),
          features(p, *this),
          pixels(pixels_in_quads(p, output)) {}

    // Are all channels of four neighbouring pixels aligned vectors?
    static bool pixels_in_quads(const Problem& p, const Array& output) {
        return output.stride_c == 1 && output.stride_w == p.features.c && p.groups == 1 &&
               (output.stride_n | output.stride_h | output.w) % kVector == 0 &&
               reinterpret_cast<uintptr_t>(output.data) % static_cast<uintptr_t>(kVector * itemsize(output.dtype)) == 0;
    }
};

// Stores four neighbouring pixels of C channels, that are adjacent.
template <int C, class T>
__device__ __forceinline__ void store_pixels(const float (&sums)[kFew][kVector], T* to) {
    const auto at = [&](int k) { return sums[k % C][k / C]; };
#pragma unroll
    for (int k = 0; k < C * kVector; k += kVector)
        store_channels(make_float4(at(k), at(k + 1), at(k + 2), at(k + 3)), to + k);
}

template <int K, int P, class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_few_kernel(Arguments arguments, ReassembleFewPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;          // [N, C, H', W']
    float* const features = shared_memory<float>();  // [channel][row][column]
    const int width = plan.features.width;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        plan.features.stage<T>(p, tile, features);
#pragma unroll 1
        for (int number = thread_computed_late(); number < plan.units; number += kThreads) {
            const Unit unit = Unit::of<P>(plan, tile, number);
            if (unit.out_i >= p.out_h || unit.out_j >= p.out_w) continue;
            float taps[P][K * K], scales[P];
            load_windows<T, K>(p, plan.quads, tile, unit, taps);
#pragma unroll
            for (int q = 0; q < P; q++) scales[q] = normalize_window<K, P>(normalizer_of(p), taps[q]);
            if (normalizer_of(p) != CARAFEPP_SOFTMAX) {  // its masks are finite or all NaN, and features there are 0
#pragma unroll
                for (auto& of_output : taps) clear_outside<K>(p, unit, of_output);
            }
            const float* window = features + unit.row * width + unit.column;
            float sums[kFew][P] = {};
#pragma unroll
            for (int c = 0; c < kFew; c++, window += plan.features.plane) {
                if (c >= tile.channels) break;
#pragma unroll
                for (int t = 0; t < K * K; t++) {
                    const float feature = window[t / K * width + t % K];
#pragma unroll
                    for (int q = 0; q < P; q++) sums[c][q] += taps[q][t] * feature;
                }
#pragma unroll
                for (int q = 0; q < P; q++) sums[c][q] *= scales[q];
            }
            T* to = element<T>(output, tile.n, tile.c, unit.out_i, unit.out_j);
            if constexpr (P == kVector) {
                if (plan.pixels) {
                    if (tile.channels == 1) store_pixels<1>(sums, to);
                    if (tile.channels == 2) store_pixels<2>(sums, to);
                    if (tile.channels == 3) store_pixels<3>(sums, to);
                    if (tile.channels == 4) store_pixels<4>(sums, to);
                    continue;
                }
            }
#pragma unroll
            for (int c = 0; c < kFew; c++, to += output.stride_c) {
                if (c < tile.channels) store_row<P == kVector>(sums[c], 1, 1, to);
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_few(const Problem& p, const Array& output) { return not_for_few_channels(p, output); }

void reassemble_few(const Problem& p, const Array& output) {
    const bool quads = may_be_quads(p) &&
                       (!not_for_columns(output, kVector) || ReassembleFewPlan::pixels_in_quads(p, output));
    with_units(p, quads, [&](auto k, auto own, auto feature) {
        const ReassembleFewPlan plan(p, output, own);
        launch(reassemble_few_kernel<k, own, decltype(feature)>, plan.items, kThreads, plan.features.bytes, p, output,
               plan);
    });
}

}  // namespace carafepp::cuda
