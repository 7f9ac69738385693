// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for down x2 with adjacent channels or adjacent columns, in gather form. The 2 x 2 features
// of a cell are in K*K windows' places altogether, one of each tap: of a cell a thread has these weights in registers,
// and contracts them with some channels of the few outputs that they belong to. A block has a tile of cells, several
// threads for each: stage the masks of all outputs whose windows reach the tile, pick those of a cell, contract, write
// out.
#include "cuda/channels.h"
#include "cuda/down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kFeatures = kDown * kDown;  // of a cell

// The outputs of a row, or a column, whose windows reach a cell: from `kBefore` before its own on.
template <int K>
struct Reach {
    static constexpr int kBefore = K / 2 / 2, kOutputs = kBefore + 1 + (K / 2 + 1) / 2;
};

// Calls f(feature, t) for each feature of a cell that is tap t of the window of output (x, y) of those that reach it.
template <int K, class F>
__device__ __forceinline__ void for_each_tap_of_cell(int y, int x, F f) {
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
    static constexpr int kAtOnce = kVector, kChannels = 128;  // of a thread, of a block
    static constexpr int kUnrolled = 1;                       // so many times what a thread has at once is in flight
    static constexpr int kColumns = 8, kRows = 4;             // of a tile
    static constexpr bool kLanesAreCells = false;             // or of one cell, in other channels

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

// With adjacent columns it stores two of them at once, of an even number.
struct OfColumns {
    using Sum = float;
    static constexpr int kAtOnce = 1, kChannels = 64;
    static constexpr int kUnrolled = 2;
    static constexpr int kColumns = 16, kRows = 8;
    static constexpr bool kLanesAreCells = true;

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

// What of a tile is staged.
template <class Layout, int K>
struct Staged {
    static constexpr int kColumns = Layout::kColumns + Reach<K>::kOutputs - 1;
    static constexpr int kOutputs = (Layout::kRows + Reach<K>::kOutputs - 1) * kColumns;
    static constexpr int64_t kBytes = K * K * kOutputs * int64_t{sizeof(float)};
};

struct Cut {
    int64_t rows, columns, chunks;  // of tiles in an image, of channels in a group
};

// The masks of the outputs from (top, left) on, as [tap][output]; 0 where there is none. Ends with a barrier.
template <class Layout, int K, class T>
__device__ void stage(const Problem& p, int64_t n, int64_t group, int64_t top, int64_t left, float* staged) {
    using S = Staged<Layout, K>;
    const Array& array = p.from_logits ? p.logits : p.masks;
    for_each_mask(array, K * K, S::kOutputs, [&](int64_t t, int64_t q) {
        const int64_t out_i = top + q / S::kColumns, out_j = left + q % S::kColumns;
        const bool exists = out_i >= 0 && out_i < p.out_h && out_j >= 0 && out_j < p.out_w;
        staged[t * S::kOutputs + q] = exists ? mask_element<T>(array, n, group * K * K + t, out_i, out_j)[0] : 0;
    });
    finish_staging(p, S::kOutputs, staged, S::kOutputs);
}

template <class Layout, int K, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_down2_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;
    using R = Reach<K>;
    using S = Staged<Layout, K>;
    constexpr int kCells = Layout::kRows * Layout::kColumns, kSharers = kThreads / kCells;
    constexpr int kStep = kSharers * Layout::kAtOnce;
    float* const staged = shared_memory<float>();
    const int thread = static_cast<int>(threadIdx.x);
    const int cell = Layout::kLanesAreCells ? thread % kCells : thread / kSharers;
    const int share = Layout::kLanesAreCells ? thread / kCells : thread % kSharers;
    const int row = cell / Layout::kColumns, column = cell % Layout::kColumns;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = grad_features.n * p.groups * cut.rows * cut.columns * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), tile_column = divide(chunk.quotient, cut.columns),
                       tile_row = divide(tile_column.quotient, cut.rows), image = divide(tile_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int top = static_cast<int>(tile_row.remainder) * Layout::kRows - R::kBefore,
                  left = static_cast<int>(tile_column.remainder) * Layout::kColumns - R::kBefore;
        stage<Layout, K, T>(p, n, group, top, left, staged);

        const int out_i = top + row, out_j = left + column;  // the first output that reaches the cell
        const int i = (out_i + R::kBefore) * kDown, j = (out_j + R::kBefore) * kDown;
        if (i < grad_features.h && j < grad_features.w) {
            float weights[K * K];
#pragma unroll
            for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
                for (int x = 0; x < R::kOutputs; x++) {
                    const float* const of_output = staged + (row + y) * S::kColumns + column + x;
                    for_each_tap_of_cell<K>(y, x, [&](int, int t) { weights[t] = of_output[t * S::kOutputs]; });
                }
            }
            bool row_exists[R::kOutputs], column_exists[R::kOutputs];
#pragma unroll
            for (int k = 0; k < R::kOutputs; k++) {
                row_exists[k] = out_i + k >= 0 && out_i + k < p.out_h;
                column_exists[k] = out_j + k >= 0 && out_j + k < p.out_w;
            }
            const int64_t first = chunk.remainder * Layout::kChannels + share * Layout::kAtOnce;
            const int64_t end = min((chunk.remainder + 1) * Layout::kChannels, channels_in_group);
            const T* grads = element<const T>(p.grad_output, n, group * channels_in_group + first, out_i, out_j);
            T* to = element<T>(grad_features, n, group * channels_in_group + first, i, j);
#pragma unroll Layout::kUnrolled
            for (int64_t c = first; c < end; c += kStep) {
                typename Layout::Sum sums[kFeatures] = {};
#pragma unroll
                for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
                    for (int x = 0; x < R::kOutputs; x++) {
                        const bool exists = row_exists[y] && column_exists[x];
                        const typename Layout::Sum grad = Layout::load(grads, p.grad_output, y, x, exists);
                        for_each_tap_of_cell<K>(
                            y, x, [&](int feature, int t) { add_products(weights[t], grad, sums[feature]); });
                    }
                }
                Layout::store(sums, grad_features, j + 1 < grad_features.w, i + 1 < grad_features.h, to);
                grads += kStep * p.grad_output.stride_c;
                to += kStep * grad_features.stride_c;
            }
        }
        __syncthreads();
    }
}

template <class Layout, int K>
void run(const Problem& p, const Array& grad_features) {
    Cut cut;
    cut.rows = ceil_div(grad_features.h, kDown * Layout::kRows);
    cut.columns = ceil_div(grad_features.w, kDown * Layout::kColumns);
    cut.chunks = ceil_div(p.features.c / p.groups, Layout::kChannels);
    with_floats(p, [&](auto feature) {
        launch(grad_features_down2_kernel<Layout, K, decltype(feature)>,
               grad_features.n * p.groups * cut.rows * cut.columns * cut.chunks, kThreads, Staged<Layout, K>::kBytes, p,
               grad_features, cut);
    });
}

template <class Layout>
void run(const Problem& p, const Array& grad_features) {
    p.kernel_size == 3 ? run<Layout, 3>(p, grad_features) : run<Layout, 5>(p, grad_features);
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

void grad_features_down2_nhwc(const Problem& p, const Array& grad_features) { run<OfChannels>(p, grad_features); }

void grad_features_down2_nchw(const Problem& p, const Array& grad_features) { run<OfColumns>(p, grad_features); }

}  // namespace carafepp::cuda
