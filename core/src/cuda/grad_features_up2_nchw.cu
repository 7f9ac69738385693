// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns. Neighbouring threads have neighbouring columns. A thread
// loads outputs of two sources in a row at once, in each of its channels, and stores both columns.
#include "cuda/columns.h"
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kMostLanes = 32, kMostRows = 8;
constexpr int kPairs = 4;  // of columns, of a warp

// Loads `Count` adjacent columns as floats, 0 where there are none.
template <int Count, class T>
__device__ __forceinline__ void load_floats(const T* from, bool exist, float* floats) {
    if constexpr (Count == 4) {
        const float4 four = load_channels(from, exist);
        floats[0] = four.x, floats[1] = four.y, floats[2] = four.z, floats[3] = four.w;
    } else if constexpr (Count == 2) {
        const float2 two = load_columns(from, exist);
        floats[0] = two.x, floats[1] = two.y;
    } else {
        floats[0] = exist ? widen(load_input(from)) : 0.0f;
    }
}

// `Vectors`: the outputs of two sources are aligned, and so are both columns of a thread.
template <int K, bool Vectors, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    grad_features_up2_nchw_kernel(Arguments arguments, GradFeaturesUp2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& grad_output = p.grad_output;
    constexpr int kRadius = K / 2;
    constexpr int kAtOnce = Vectors && kRadius % 2 == 0 ? 2 : 1;  // sources whose gradients are in registers
    constexpr int kColumns = kAtOnce * kUp, kCount = Vectors ? kColumns : 1;  // their columns, those loaded at once
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        // A warp has four pairs of columns, whose masks are in different banks.
        const int thread = thread_computed_late(), pair = thread / kPairs / plan.lanes * kPairs + thread % kPairs;
        const ColumnsOfThread at(p, plan, item, thread / kPairs % plan.lanes, pair);
        const int j = at.first + at.own, out_left = (j - kRadius) * kUp;
        const T* const all_grads = element<const T>(grad_output, at.n, at.c, 0, out_left);  // [C, H', W']
        T* const to = element<T>(grad_features, at.n, at.c, 0, j);                          // [C, H, W]
        const unsigned columns = outputs_that_exist<K>(p, out_left);
        const auto load = [&](int i, int x, auto& grads) {
            const T* row = all_grads + i * kUp * grad_output.stride_h + x * kUp;
#pragma unroll
            for (int r = 0; r < kUp; r++, row += grad_output.stride_h) {
                const unsigned exist = i * kUp + r < p.out_h ? columns >> x * kUp : 0;
                const T* channel = row;
                float floats[kVector][kColumns];
#pragma unroll
                for (int c = 0; c < kVector; c++, channel += grad_output.stride_c) {
#pragma unroll
                    for (int q = 0; q < kColumns; q += kCount)
                        load_floats<kCount>(channel + q, (exist >> q & 1) != 0 && c < at.channels, floats[c] + q);
                }
#pragma unroll
                for (int q = 0; q < kColumns; q++) {
                    grads[q / kUp][r * kUp + q % kUp] = make_float4(floats[0][q], floats[1][q], floats[2][q],
                                                                    floats[3][q]);
                }
            }
        };
        go_down<K, kAtOnce, T>(p, plan, item, at, load, [&](int i, const float4(&sum)[kColumnsOfThread]) {
            T* channel = to + i * grad_features.stride_h;
            const auto store = [&](int c, float left, float right) {
                if (c < at.channels) {
                    if constexpr (Vectors) {
                        store_columns(make_float2(left, right), channel);
                    } else {
                        channel[0] = narrow<T>(left);
                        if (j + 1 < p.features.w) channel[1] = narrow<T>(right);
                    }
                }
                channel += grad_features.stride_c;
            };
            store(0, sum[0].x, sum[1].x);
            store(1, sum[0].y, sum[1].y);
            store(2, sum[0].z, sum[1].z);
            store(3, sum[0].w, sum[1].w);
        });
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    return not_for_columns_of_up2(p, p.grad_output, grad_features);
}

void grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const GradFeaturesUp2Plan plan(p, k, kMostLanes, kMostRows);
        const bool vectors = not_for_columns(p.grad_output, 4) == nullptr && not_for_columns(grad_features) == nullptr;
        launch(vectors ? grad_features_up2_nchw_kernel<k, true, T> : grad_features_up2_nchw_kernel<k, false, T>,
               plan.items, kThreads, plan.shared_bytes, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
