// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for few channels of a group. A thread has those of a unit in registers. It contracts
// their channels, carries them through the normaliser, and stores them where the logits are.
#include "cuda/few/few_channels.h"

namespace carafepp::cuda {
namespace {

struct GradMasksFewPlan : FewPlan {
    StagedFeatures features;
    bool result_in_quads;  // gradients of a unit are a vector

    GradMasksFewPlan(const Problem& p, const Array& grad_masks, int own)
        : FewPlan(p, p.from_logits ? p.logits.h : ceil_div(p.out_h, p.factor.up),
                  p.from_logits ? p.logits.w : ceil_div(p.out_w, p.factor.up), own, 512),
          features(p, *this),
          result_in_quads(own == kVector && in_quads(p, grad_masks)) {}
};

// Carries the gradients of the masks of an output through a softmax, from its logits. clear(grads) clears the taps
// beyond the borders. Only a factor that is no finite number makes that necessary, as features are 0 there.
template <int K, class Clear>
__device__ __forceinline__ void through_softmax(float (&taps)[K * K], float (&grads)[K * K], Clear clear) {
    SoftmaxGradient gradient = softmax_gradient<K>(taps, grads);
    if (!gradient.is_finite()) {
        clear(grads);
        gradient.weigh_again(taps, grads);
    }
#pragma unroll
    for (int t = 0; t < K * K; t++) grads[t] = gradient(taps[t], grads[t]);
}

// The same for any normaliser.
template <int K, int P, class Clear>
__device__ __forceinline__ void through_normalizer(carafepp_normalizer normalizer, float (&taps)[K * K],
                                                   float (&grads)[K * K], Clear clear) {
    if (normalizer == CARAFEPP_SOFTMAX) return through_softmax<K>(taps, grads, clear);
    clear(grads);
    if constexpr (P == 1) {
        if (normalizer == CARAFEPP_SIGMOID || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
            float factors[K * K];  // derivatives of the sigmoid, or of its logarithm
#pragma unroll
            for (int t = 0; t < K * K; t++) factors[t] = taps[t];
            for_each_in_turn(factors, [&](float logit) {
                const float other = sigmoid(-logit);
                return normalizer == CARAFEPP_SIGMOID ? sigmoid(logit) * other : other;
            });
            if (normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
                for_each_in_turn(taps, [](float logit) { return log_sigmoid(logit); });
                through_softmax<K>(taps, grads, [](auto&) {});
            }
#pragma unroll
            for (int t = 0; t < K * K; t++) grads[t] *= factors[t];
        }
    }
}

// Stores gradients of the outputs that have masks; of logits all have.
template <class T, int K, int P>
__device__ __forceinline__ void store_windows(const Problem& p, const GradMasksFewPlan& plan, const TileOfItem& tile,
                                              const Unit& unit, const float (&grads)[P][K * K],
                                              const Array& grad_masks) {
    const WindowPlaces places = WindowPlaces::of<K, P>(p, grad_masks, tile.group, unit);
    with_masks<T>(grad_masks, [&](auto mask) __attribute__((always_inline)) {
        using M = decltype(mask);
        M* const first = element<M>(grad_masks, tile.n, 0, 0, 0) + places.first;
        if (P == kVector && plan.result_in_quads) {
#pragma unroll
            for (int t = 0; t < K * K; t++) {
                store_channels(make_float4(grads[0][t], grads[1 % P][t], grads[2 % P][t], grads[3 % P][t]),
                               at_stride(first, places.step, t));
            }
            return;
        }
#pragma unroll
        for (int q = 0; q < P; q++) {
            if (q > places.last) continue;
            M* const own = at_stride(first, places.step_of_next, q);
#pragma unroll
            for (int t = 0; t < K * K; t++) *at_stride(own, places.step, t) = narrow<M>(grads[q][t]);
        }
    });
}

template <int K, int P, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_masks_few_kernel(Arguments arguments, GradMasksFewPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;      // of the shape of masks or logits
    float* const features = shared_memory<float>();  // [channel][row][column]
    const int width = plan.features.width;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        plan.features.stage<T>(p, tile, features);
#pragma unroll 1
        for (int number = thread_computed_late(); number < plan.units; number += kThreads) {
            const Unit unit = Unit::of<P>(plan, tile, number);
            if (unit.i >= plan.height || unit.j >= plan.width) continue;
            float taps[P][K * K], grads[P][K * K] = {};
            const int there = unit.out_i < p.out_h ? static_cast<int>(p.out_w) - unit.out_j : 0;  // outputs
            if (!p.from_logits && there <= 0) continue;
            if (p.from_logits) load_windows<T, K>(p, plan.quads, tile, unit, taps);
            const float* window = features + unit.row * width + unit.column;
            const T* from = element<const T>(p.grad_output, tile.n, tile.c, unit.out_i, unit.out_j);
#pragma unroll
            for (int c = 0; c < kFew; c++, window += plan.features.plane, from += p.grad_output.stride_c) {
                if (c >= tile.channels) break;
                float of_outputs[P];
#pragma unroll
                for (int q = 0; q < P; q++) {
                    of_outputs[q] = q < there ? widen(from[q * p.grad_output.stride_w]) : 0.0f;
                }
#pragma unroll
                for (int t = 0; t < K * K; t++) {
                    const float feature = window[t / K * width + t % K];
#pragma unroll
                    for (int q = 0; q < P; q++) grads[q][t] += of_outputs[q] * feature;
                }
            }
#pragma unroll
            for (int q = 0; q < P; q++) {
                through_normalizer<K, P>(normalizer_of(p), taps[q], grads[q],
                                         [&](auto& of_output) { clear_outside<K>(p, unit, of_output); });
                if (!p.from_logits || q < there) continue;
#pragma unroll
                for (int t = 0; t < K * K; t++) grads[q][t] = 0;  // whatever the logits
            }
            store_windows<T, K>(p, plan, tile, unit, grads, grad_masks);
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_grad_masks_few(const Problem& p, const Array& grad_masks) {
    return not_for_few_channels(p, grad_masks);
}

void grad_masks_few(const Problem& p, const Array& grad_masks) {
    with_units(p, may_be_quads(p), [&](auto k, auto own, auto feature) {
        const GradMasksFewPlan plan(p, grad_masks, own);
        launch(grad_masks_few_kernel<k, own, decltype(feature)>, plan.items, kThreads, plan.features.bytes, p,
               grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
