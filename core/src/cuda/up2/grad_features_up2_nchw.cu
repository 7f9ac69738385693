// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns: see grad_features_up2.h.
#include "cuda/columns.h"
#include "cuda/up2/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

struct GradFeaturesUp2NchwPlan {
    Strips strips;
    int copied;  // columns of grad_output at once: 4, 2 or 1
    bool pairs;  // both pixels of a thread are stored at once
};

// Gradients of a slice: [row][channel][column]. A thread has every eighth channel. Neighbouring channels are in
// different banks.
static_assert(kGradsInRow / kVector % 2 == 1 && kOfPair * kUp == kVector);

class AdjacentColumns {
public:
    __device__ __forceinline__ AdjacentColumns(const Array& grad_features, const TileOfItem& tile,
                                               const PartOfStrip& own, int columns)
        : columns_(columns),
          channels_(columns > 0 ? tile.channels - channel(own) : 0),
          stride_c_(static_cast<int>(grad_features.stride_c)),
          stride_h_(grad_features.stride_h),
          to_(element<float>(grad_features, tile.n, tile.c + channel(own), tile.top, tile.left + own.column)) {}

    // 0 where there is no output.
    static __device__ __forceinline__ void copy_row(const Problem& p, const TileOfItem& tile, const PartOfStrip& own,
                                                    const GradFeaturesUp2NchwPlan& plan, int row, float* grads) {
        const int c = own.slice * kChannels, j = (tile.left - kBefore) * kUp;
        const float* const from = element<const float>(p.grad_output, tile.n, tile.c + c, row * kUp, j);
        const int rows = static_cast<int>(min(int64_t{kUp}, p.out_h - row * kUp));
        with_columns(plan.copied, [&](auto count) { copy_row<count>(p, from, j, rows, tile.channels - c, grads); });
    }

    // The place of a thread's first gradient in its slice.
    static __device__ __forceinline__ int place(const PartOfStrip& own) {
        return own.lane * kGradsInRow + own.column * kUp;
    }

    static __device__ __forceinline__ void load(const float* own, int pair,
                                                float (&grads)[kOwnChannels][kOfPair][kOutputs]) {
#pragma unroll
        for (int k = 0; k < kOwnChannels * kUp; k++) {
            const int c = k / kUp, r = k % kUp;
            const float4 four = staged_channels(own + (r * kChannels + c * kLanes) * kGradsInRow + pair * kVector);
            grads[c][0][r * kUp] = four.x;
            grads[c][0][r * kUp + 1] = four.y;
            grads[c][1][r * kUp] = four.z;
            grads[c][1][r * kUp + 1] = four.w;
        }
    }

    __device__ __forceinline__ void store(const float (&sums)[kPixels][kOwnChannels],
                                          const GradFeaturesUp2NchwPlan& plan) {
#pragma unroll
        for (int k = 0; k < kOwnChannels; k++) {
            if (k * kLanes >= channels_) break;
            float* const pixels = at_stride(to_, stride_c_, k * kLanes);
            if (plan.pairs) {
                store_columns(make_float2(sums[0][k], sums[1][k]), pixels);
            } else {
                pixels[0] = sums[0][k];
                if (columns_ > 1) pixels[1] = sums[1][k];
            }
        }
        to_ += stride_h_;
    }

private:
    // Copies rows of a slice, of which `channels` channels exist: `Count` columns at once.
    template <int Count>
    static __device__ __forceinline__ void copy_row(const Problem& p, const float* from, int j, int rows, int channels,
                                                    float* grads) {
        constexpr int kVectorsInRow = kGradsInRow / Count, kOfChannel = kUp * kVectorsInRow;
        const int stride_c = static_cast<int>(p.grad_output.stride_c);
#pragma unroll 1
        for (int k = thread_computed_late() % kThreadsOfSlice; k < kOfChannel * kLanes; k += kThreadsOfSlice) {
            const int x = k % kVectorsInRow * Count, r = k / kVectorsInRow % kUp, channel = k / kOfChannel;
            const bool exist = static_cast<unsigned>(j + x) < static_cast<unsigned>(p.out_w) && r < rows;
            const int left = exist ? channels - channel : 0;
            const float* const columns = at_stride(from + r * p.grad_output.stride_h + x, stride_c, channel);
            float* const to = grads + (r * kChannels + channel) * kGradsInRow + x;
#pragma unroll
            for (int q = 0; q < kChannels; q += kLanes)
                copy_async<Count * sizeof(float)>(to + q * kGradsInRow, at_stride(columns, stride_c, q), q < left);
        }
    }

    // The first one of a thread in its block.
    static __device__ __forceinline__ int channel(const PartOfStrip& own) { return own.slice * kChannels + own.lane; }

    int columns_, channels_;  // that exist, from the thread's first one on
    int stride_c_;
    int64_t stride_h_;
    float* to_;  // the next row of pixels
};

template <int K>
__global__ void __launch_bounds__(kMostSlices* kThreadsOfSlice)
    grad_features_up2_nchw_kernel(Arguments arguments, const __grid_constant__ GradFeaturesUp2NchwPlan plan) {
    sum_strips<K, false, AdjacentColumns>(arguments, plan);
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";
    if (p.grad_output.empty()) return "there is no output";
    for (int64_t stride : {p.grad_output.stride_c, grad_features.stride_c}) {
        if (std::abs(stride) > INT32_MAX) return "channels are too far apart";
    }
    return not_for_columns_of_up2(p, p.grad_output, grad_features);
}

const char* slower_grad_features_up2_nchw(const Problem& p, const Array&) { return slower_by_strips(p); }

void grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    const int copied = columns_at_once(p.grad_output);
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto) {
        launch_strips<false>(
            grad_features_up2_nchw_kernel<k>, p, grad_features,
            GradFeaturesUp2NchwPlan{Strips::of<k>(p), copied, not_for_columns(grad_features) == nullptr});
    });
}

}  // namespace carafepp::cuda
