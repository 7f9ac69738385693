// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels. A thread loads grad_output as vectors of channels, each
// for all rows and columns that its windows reach.
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kMostLanes = 64, kMostRows = 10;

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_features_up2_nhwc_kernel(Arguments arguments, GradFeaturesUp2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& grad_output = p.grad_output;
    constexpr int kAtOnce = sizeof(T) == 4 ? 2 : 1;  // sources whose gradients are in registers
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late();
        const ColumnsOfThread at(p, plan, item, thread % plan.lanes, thread / plan.lanes);
        const int j = at.first + at.own, out_left = (j - K / 2) * kUp;
        const T* const all_grads = element<const T>(grad_output, at.n, at.c, 0, out_left);  // [H', W', C]
        T* const to = element<T>(grad_features, at.n, at.c, 0, j);                          // [H, W, C]
        const unsigned columns = outputs_that_exist<K>(p, out_left);
        const auto load = [&](int i, int x, auto& grads) {
            const T* row = all_grads + i * kUp * grad_output.stride_h + x * kUp * grad_output.stride_w;
#pragma unroll
            for (int r = 0; r < kUp; r++, row += grad_output.stride_h) {
                const T* pixel = row;
                const unsigned exist = i * kUp + r < p.out_h ? columns : 0;
#pragma unroll
                for (int q = 0; q < kAtOnce * kUp; q++, pixel += grad_output.stride_w) {
                    grads[q / kUp][r * kUp + q % kUp] = load_channels(pixel, exist >> (x * kUp + q) & 1);
                }
            }
        };
        go_down<K, kAtOnce, T>(p, plan, item, at, load, [&](int i, const float4(&sum)[kColumnsOfThread]) {
            T* pixel = to + i * grad_features.stride_h;
#pragma unroll
            for (int s = 0; s < kColumnsOfThread; s++, pixel += grad_features.stride_w) {
                if (j + s < p.features.w) store_channels(sum[s], pixel);
            }
        });
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, grad_features);
}

void grad_features_up2_nhwc(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const GradFeaturesUp2Plan plan(p, k, kMostLanes, kMostRows);
        launch(grad_features_up2_nhwc_kernel<k, decltype(feature)>, plan.items, kThreads, plan.shared_bytes, p,
               grad_features, plan);
    });
}

}  // namespace carafepp::cuda
