// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels: see grad_features_up2.h.
#include "cuda/up2/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

struct GradFeaturesUp2NhwcPlan {
    Strips strips;
};

// Gradients of a slice: [row][column][channel]. A thread has two vectors of channels, `kApart` from each other.
class AdjacentChannels {
public:
    __device__ __forceinline__ AdjacentChannels(const Array& grad_features, const TileOfItem& tile,
                                                const PartOfStrip& own, int columns)
        : columns_(columns),
          channels_(tile.channels - channel(own)),
          stride_w_(grad_features.stride_w),
          stride_h_(grad_features.stride_h),
          to_(element<float>(grad_features, tile.n, tile.c + channel(own), tile.top, tile.left + own.column)) {}

    // A thread copies its vectors of every seventh column; 0 where there is no output.
    static __device__ __forceinline__ void copy_row(const Problem& p, const TileOfItem& tile, const PartOfStrip& own,
                                                    const GradFeaturesUp2NhwcPlan&, int row, float* grads) {
        const Array& array = p.grad_output;
        const int c = channel(own), i = row * kUp, group = own.column / kPixels;
        const int j = (tile.left - kBefore) * kUp + group;
        const int channels = tile.channels - c, below = i + 1 < p.out_h ? channels : 0;
        const float* pixel = element<const float>(array, tile.n, tile.c + c, i, j);
        float* to = grads + group * kChannels + own.lane * kVector;
#pragma unroll 2
        for (int x = group; x < kGradsInRow; x += kColumnGroups) {
            const bool exists = static_cast<unsigned>(j + x - group) < static_cast<unsigned>(p.out_w);
#pragma unroll
            for (int k = 0; k < kUp * kVectors; k++) {
                const int r = k / kVectors, v = k % kVectors * kApart;
                copy_async<kVector * sizeof(float)>(to + r * kGradsInRow * kChannels + v,
                                                    pixel + r * array.stride_h + v,
                                                    exists && v < (r == 0 ? channels : below));
            }
            pixel += kColumnGroups * array.stride_w;
            to += kColumnGroups * kChannels;
        }
    }

    // The place of a thread's first gradient in its slice.
    static __device__ __forceinline__ int place(const PartOfStrip& own) {
        return own.column * kUp * kChannels + own.lane * kVector;
    }

    static __device__ __forceinline__ void load(const float* own, int pair,
                                                float (&grads)[kOwnChannels][kOfPair][kOutputs]) {
#pragma unroll
        for (int k = 0; k < kOfPair * kOutputs * kVectors; k++) {
            const int v = k % kVectors, output = k / kVectors % kOutputs, x = k / (kVectors * kOutputs);
            const int column = (pair * kOfPair + x) * kUp + output % kUp;
            const float4 four = staged_channels(own + (output / kUp * kGradsInRow + column) * kChannels + v * kApart);
            grads[v * kVector][x][output] = four.x;
            grads[v * kVector + 1][x][output] = four.y;
            grads[v * kVector + 2][x][output] = four.z;
            grads[v * kVector + 3][x][output] = four.w;
        }
    }

    __device__ __forceinline__ void store(const float (&sums)[kPixels][kOwnChannels], const GradFeaturesUp2NhwcPlan&) {
        float* pixel = to_;
#pragma unroll
        for (int q = 0; q < kPixels; q++, pixel += stride_w_) {
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                const float* const four = sums[q] + v * kVector;
                if (q < columns_ && v * kApart < channels_)
                    store_channels(make_float4(four[0], four[1], four[2], four[3]), pixel + v * kApart);
            }
        }
        to_ += stride_h_;
    }

private:
    static constexpr int kVectors = kOwnChannels / kVector, kApart = kLanes * kVector;

    // The first one of a thread in its block.
    static __device__ __forceinline__ int channel(const PartOfStrip& own) {
        return own.slice * kChannels + own.lane * kVector;
    }

    int columns_, channels_;  // that exist, from the thread's first one on
    int64_t stride_w_, stride_h_;
    float* to_;  // the next row of pixels
};

template <int K>
__global__ void __launch_bounds__(kMostSlices* kThreadsOfSlice)
    grad_features_up2_nhwc_kernel(Arguments arguments, const __grid_constant__ GradFeaturesUp2NhwcPlan plan) {
    sum_strips<K, true, AdjacentChannels>(arguments, plan);
}

}  // namespace

const char* cannot_run_grad_features_up2_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, grad_features);
}

const char* slower_grad_features_up2_nhwc(const Problem& p, const Array&) { return slower_by_strips(p); }

void grad_features_up2_nhwc(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto) {
        launch_strips<true>(grad_features_up2_nhwc_kernel<k>, p, grad_features,
                            GradFeaturesUp2NhwcPlan{Strips::of<k>(p)});
    });
}

}  // namespace carafepp::cuda
