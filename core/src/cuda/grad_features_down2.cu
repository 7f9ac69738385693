// SPDX-License-Identifier: Apache-2.0
// The gradient of features for down x2 with adjacent channels or columns, in gather form. A quad is 2 x 2 features; it
// holds each tap once, in the windows of a few outputs. A block has a tile of quads and stages the masks of all outputs
// whose windows reach it. A thread keeps the K*K masks of a quad in registers, and contracts them with some channels.
#include "cuda/channels.h"
#include "cuda/down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kFeatures = kDown * kDown;  // of a quad

// The outputs of a row or column whose windows reach a quad. They begin `kBefore` before its own.
template <int K>
struct Reach {
    static constexpr int kBefore = K / 2 / 2, kOutputs = kBefore + 1 + (K / 2 + 1) / 2;
};

// Calls f(feature, t) for each feature of a quad that is tap t of output (x, y). Outputs count from the first that
// reaches it.
template <int K, class F>
__device__ __forceinline__ void for_each_tap_of_quad(int y, int x, F f) {
#pragma unroll
    for (int feature = 0; feature < kFeatures; feature++) {
        const int a = K / 2 + feature / kDown - kDown * (y - Reach<K>::kBefore);
        const int b = K / 2 + feature % kDown - kDown * (x - Reach<K>::kBefore);
        if (a >= 0 && a < K && b >= 0 && b < K) f(feature, a * K + b);
    }
}

// With adjacent channels a thread has four of them at a time.
struct OfChannels {
    using Sum = float4;
    static constexpr int kChannelsOfStep = kVector, kChannelsOfBlock = 128;  // of a thread, of a block
    static constexpr int kUnrolled = 1;                                      // steps in flight
    static constexpr int kColumns = 8, kRows = 4;                            // of a tile
    static constexpr bool kLanesAreQuads = false;                            // else channels of a quad

    template <class T>
    static __device__ __forceinline__ float4 load(const T* from, const Array& array, int y, int x, bool exist) {
        return load_channels(from + y * array.stride_h + x * array.stride_w, exist);
    }
    template <class T>
    static __device__ __forceinline__ void store(const float4 (&sums)[kFeatures], const Array& result, bool right,
                                                 bool below, T* to) {
        store_channels(sums[0], to);
        if (right) store_channels(sums[1], to + result.stride_w);
        if (below) store_channels(sums[2], to + result.stride_h);
        if (right && below) store_channels(sums[3], to + result.stride_h + result.stride_w);
    }
};

// With adjacent columns a thread stores two at once; there is an even number of them.
struct OfColumns {
    using Sum = float;
    static constexpr int kChannelsOfStep = 1, kChannelsOfBlock = 64;
    static constexpr int kUnrolled = 2;
    static constexpr int kColumns = 16, kRows = 8;
    static constexpr bool kLanesAreQuads = true;

    template <class T>
    static __device__ __forceinline__ float load(const T* from, const Array& array, int y, int x, bool exists) {
        return exists ? widen(from[y * array.stride_h + x]) : 0;
    }
    template <class T>
    static __device__ __forceinline__ void store(const float (&sums)[kFeatures], const Array& result, bool, bool below,
                                                 T* to) {
        store_columns(make_float2(sums[0], sums[1]), to);
        if (below) store_columns(make_float2(sums[2], sums[3]), to + result.stride_h);
    }
};

using cuda::add_products;
__device__ __forceinline__ void add_products(float weight, float value, float& sum) { sum += weight * value; }

// The outputs that are staged for a tile.
template <class Layout, int K>
struct Staged {
    static constexpr int kColumns = Layout::kColumns + Reach<K>::kOutputs - 1;
    static constexpr int kOutputs = (Layout::kRows + Reach<K>::kOutputs - 1) * kColumns;
    static constexpr int64_t kBytes = K * K * kOutputs * int64_t{sizeof(float)};
};

template <class Layout>
struct GradFeaturesDown2Plan {
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t channel_blocks;    // of a group
    int64_t items;

    GradFeaturesDown2Plan(const Problem& p, const Array& grad_features) {
        tile_rows = ceil_div(grad_features.h, kDown * Layout::kRows);
        tiles = ceil_div(grad_features.w, kDown * Layout::kColumns);
        channel_blocks = ceil_div(p.features.c / p.groups, Layout::kChannelsOfBlock);
        items = grad_features.n * p.groups * tile_rows * tiles * channel_blocks;
    }
};

// The masks of the outputs from (top, left) on, as [tap][output]; 0 where there is none. Ends with a barrier.
template <class Layout, int K, class T>
__device__ void stage(const Problem& p, int64_t n, int64_t group, int64_t top, int64_t left, float* staged) {
    using S = Staged<Layout, K>;
    const Array& array = p.from_logits ? p.logits : p.masks;
    with_masks<T>(array, [&](auto mask) {
        copy_grid<kThreads>(element<const decltype(mask)>(array, n, group * K * K, top, left), K * K, S::kOutputs,
                            array.stride_w <= array.stride_c, [&](int t, int q) {
            const int row = q / S::kColumns, column = q % S::kColumns;
            const int64_t out_i = top + row, out_j = left + column;
            return StagedElement{t * array.stride_c + row * array.stride_h + column * array.stride_w,
                                 t * S::kOutputs + q, out_i >= 0 && out_i < p.out_h && out_j >= 0 && out_j < p.out_w};
        }, staged);
    });
    __syncthreads();
    if (!p.from_logits) return;
    normalize_staged<K>(p.normalizer, staged, S::kOutputs, S::kOutputs, [](int output) { return output; });
    __syncthreads();
}

template <class Layout, int K, class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_features_down2_kernel(Arguments arguments, GradFeaturesDown2Plan<Layout> plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using R = Reach<K>;
    using S = Staged<Layout, K>;
    constexpr int kQuads = Layout::kRows * Layout::kColumns, kSharers = kThreads / kQuads;
    constexpr int kChannelsApart = kSharers * Layout::kChannelsOfStep;
    float* const staged = shared_memory<float>();  // [tap][output]
    const int thread = static_cast<int>(threadIdx.x);
    const int quad = Layout::kLanesAreQuads ? thread % kQuads : thread / kSharers;
    const int sharer = Layout::kLanesAreQuads ? thread / kQuads : thread % kSharers;
    const int row = quad / Layout::kColumns, column = quad % Layout::kColumns;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles),
                       tile_row = divide(tile.quotient, plan.tile_rows), image = divide(tile_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int top = static_cast<int>(tile_row.remainder) * Layout::kRows - R::kBefore,
                  left = static_cast<int>(tile.remainder) * Layout::kColumns - R::kBefore;
        stage<Layout, K, T>(p, n, group, top, left, staged);

        const int out_i = top + row, out_j = left + column;  // the first output that reaches the quad
        const int i = (out_i + R::kBefore) * kDown, j = (out_j + R::kBefore) * kDown;
        if (i < grad_features.h && j < grad_features.w) {
            float weights[K * K];
#pragma unroll
            for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
                for (int x = 0; x < R::kOutputs; x++) {
                    const float* const of_output = staged + (row + y) * S::kColumns + column + x;
                    for_each_tap_of_quad<K>(y, x, [&](int, int t) { weights[t] = of_output[t * S::kOutputs]; });
                }
            }
            bool row_exists[R::kOutputs], column_exists[R::kOutputs];
#pragma unroll
            for (int k = 0; k < R::kOutputs; k++) {
                row_exists[k] = out_i + k >= 0 && out_i + k < p.out_h;
                column_exists[k] = out_j + k >= 0 && out_j + k < p.out_w;
            }
            const int64_t first = channel_block.remainder * Layout::kChannelsOfBlock + sharer * Layout::kChannelsOfStep;
            const int64_t end = min((channel_block.remainder + 1) * Layout::kChannelsOfBlock, channels_in_group);
            const T* grads = element<const T>(p.grad_output, n, group * channels_in_group + first, out_i, out_j);
            T* to = element<T>(grad_features, n, group * channels_in_group + first, i, j);
#pragma unroll Layout::kUnrolled
            for (int64_t c = first; c < end; c += kChannelsApart) {
                typename Layout::Sum sums[kFeatures] = {};
#pragma unroll
                for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
                    for (int x = 0; x < R::kOutputs; x++) {
                        const bool exists = row_exists[y] && column_exists[x];
                        const typename Layout::Sum grad = Layout::load(grads, p.grad_output, y, x, exists);
                        for_each_tap_of_quad<K>(
                            y, x, [&](int feature, int t) { add_products(weights[t], grad, sums[feature]); });
                    }
                }
                Layout::store(sums, grad_features, j + 1 < grad_features.w, i + 1 < grad_features.h, to);
                grads += kChannelsApart * p.grad_output.stride_c;
                to += kChannelsApart * grad_features.stride_c;
            }
        }
        __syncthreads();
    }
}

template <class Layout>
void launch_for(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const GradFeaturesDown2Plan<Layout> plan(p, grad_features);
        launch(grad_features_down2_kernel<Layout, k, decltype(feature)>, plan.items, kThreads,
               Staged<Layout, k>::kBytes, p, grad_features, plan);
    });
}

}  // namespace

const char* cannot_run_grad_features_down2_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, grad_features);
}

const char* cannot_run_grad_features_down2_nchw(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (p.grad_output.empty()) return "there is no output";
    if (p.grad_output.stride_w != 1) return "columns are not adjacent";
    return not_for_columns(grad_features);
}

void grad_features_down2_nhwc(const Problem& p, const Array& grad_features) {
    launch_for<OfChannels>(p, grad_features);
}

void grad_features_down2_nchw(const Problem& p, const Array& grad_features) { launch_for<OfColumns>(p, grad_features); }

}  // namespace carafepp::cuda
