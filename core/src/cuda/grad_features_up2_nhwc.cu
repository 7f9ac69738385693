// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels: see grad_features_up2.h. A thread has eight channels at a
// time, as two vectors. In the end it has one of them, of a row of its quad.
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kVectors = 4, kChannels = kVectors * kVector;  // of a slice
constexpr int kVectorsOfThread = 2;                          // at a time
// Gradients of a slice: [row][group of columns][column][channel]. A vector behind each group moves neighbouring quads,
// rows and halves of sources to different banks.
constexpr int kColumnsOfGroup = 4, kGroup = (kColumnsOfGroup * kVectors + 1) * kVector;
constexpr int kRow = kGradsInRow / kColumnsOfGroup * kGroup;
static_assert(kRow / kVector % 8 == 2 && kQuad * kUp == kColumnsOfGroup && kGradsInRow % kColumnsOfGroup == 0);

__host__ __device__ constexpr int place(int column) {
    return column / kColumnsOfGroup * kGroup + column % kColumnsOfGroup * kChannels;
}

template <int K, class T>
constexpr int64_t kBytes = std::max(MasksOfQuad<K>::kStaged * int64_t{sizeof(float)},
                                    MasksOfQuad<K>::kGradRows * kRow * int64_t{sizeof(T)});

// The vectors that a thread copies: of every fourth row, in every eighth column.
template <int K, class T>
struct CopiesOfThread {
    static constexpr int kRows = MasksOfQuad<K>::kGradRows, kColumnsAtOnce = 8,
                         kRowsAtOnce = kBlock / (kVectors * kColumnsAtOnce);
    static constexpr int kCopiesInRow = kGradsInRow / kColumnsAtOnce;
    static_assert(kGradsInRow % kColumnsAtOnce == 0 && kColumnsAtOnce % kColumnsOfGroup == 0);
    static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce >= 5 - 1);

    const T* from;   // the first one of the next slice
    int end, out_j;  // rows of outputs from its own to the last; its column of outputs

    static __device__ __forceinline__ int channel_of(int thread) { return thread % kVectors * kVector; }
    static __device__ __forceinline__ int column_of(int thread) { return thread / kVectors % kColumnsAtOnce; }
    static __device__ __forceinline__ int row_of(int thread) { return thread / (kVectors * kColumnsAtOnce); }

    __device__ __forceinline__ CopiesOfThread(const Problem& p, const TileOfItem& tile) {
        const int thread = thread_computed_late(), out_i = (tile.top - K / 2) * kUp + row_of(thread);
        out_j = (tile.left - kBefore) * kUp + column_of(thread);
        from = element<const T>(p.grad_output, tile.n, tile.c + channel_of(thread), out_i, out_j);
        end = static_cast<int>(p.out_h) - out_i;
    }

    // Copies the next slice, of which `channels` channels exist; 0 where there is no output.
    __device__ __forceinline__ void copy(const Problem& p, int channels, T* grads) {
        const int thread = thread_computed_late();
        const unsigned width = channel_of(thread) < channels ? static_cast<unsigned>(p.out_w) : 0;
        bool columns[kCopiesInRow];
#pragma unroll
        for (int k = 0; k < kCopiesInRow; k++) columns[k] = static_cast<unsigned>(out_j + k * kColumnsAtOnce) < width;
        T* const to = grads + row_of(thread) * kRow + place(column_of(thread)) + channel_of(thread);
        const T* row = from;
#pragma unroll 2
        for (int y = 0; y < kRows; y += kRowsAtOnce, row += kRowsAtOnce * p.grad_output.stride_h) {
            const bool exists = y < end && (y > 0 || end <= static_cast<int>(p.out_h));  // of K - 1 rows some may not
            const T* pixel = row;
#pragma unroll
            for (int k = 0; k < kCopiesInRow; k++, pixel += kColumnsAtOnce * p.grad_output.stride_w) {
                copy_async<kVector * sizeof(T)>(to + y * kRow + place(k * kColumnsAtOnce), pixel, exists && columns[k]);
            }
        }
        from += kChannels;
    }
};

struct GradFeaturesUp2NhwcPlan {
    Tiles tiles;
    bool wide_warps;  // see PartOfQuad

    explicit GradFeaturesUp2NhwcPlan(const Problem& p)
        : tiles(tiles_of_quads(p, kChannels, 3)), wide_warps(columns_of_warp(p, 32, kColumns / 2) == kColumns) {}
};

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3)
    grad_features_up2_nhwc_kernel(Arguments arguments, GradFeaturesUp2NhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using Masks = MasksOfQuad<K>;
    T* const grads = shared_memory<T>();  // of a slice; before them, masks
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const PartOfQuad own = PartOfQuad::of_thread(plan.wide_warps);
        Masks masks;
        masks.template take<T>(p, tile, own, shared_memory<float>());
        CopiesOfThread<K, T> copies(p, tile);
        const T* rows[Masks::kHalf];  // of the outputs that reach the thread
#pragma unroll
        for (int y = 0; y < Masks::kHalf; y++)
            rows[y] = grads + (own.source_row<K>(y) * kUp + own.parity) * kRow + place(own.column * kUp);
        const int i = tile.top + own.row + own.half, j = tile.left + own.column;
        const int left = i < grad_features.h ? static_cast<int>(min(grad_features.w - j, int64_t{kQuad})) : 0;
        T* to = element<T>(grad_features, tile.n, tile.c + own.parity * kVector, i, j);  // [H, W, C]
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            copies.copy(p, channels, grads);
            wait_for_copies();
            __syncthreads();
            const int end = warp_has(left > 0) ? kChannels : 0;
#pragma unroll 1
            for (int first = 0; first < end; first += kVectorsOfThread * kVector) {
                float4 sums[kVectorsOfThread][kQuad][kQuad] = {}, results[1][kQuad];
#pragma unroll
                for (int y = 0; y < Masks::kHalf; y++) {
#pragma unroll
                    for (int x = kBefore - K / 2; x < kReach - (kBefore - K / 2); x++) {
#pragma unroll
                        for (int s = 0; s < kUp; s++) {
#pragma unroll
                            for (int v = 0; v < kVectorsOfThread; v++) {
                                const float4 grad = staged_channels(rows[y] + first + place(x * kUp + s) + v * kVector);
                                masks.add(y, x, s, grad, sums[v]);
                            }
                        }
                    }
                }
                add_sums(own, sums, results);
                const bool exist = first + own.parity * kVector < channels;
                T* pixel = to + first;
#pragma unroll
                for (int q = 0; q < kQuad; q++, pixel += grad_features.stride_w) {
                    if (exist && q < left) store_channels(results[0][q], pixel);
                }
            }
            to += kChannels;
            __syncthreads();
        }
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
        using T = decltype(feature);
        static_assert(kBytes<k, T> <= kMostAskedBytes);
        const GradFeaturesUp2NhwcPlan plan(p);
        launch(grad_features_up2_nhwc_kernel<k, T>, plan.tiles.items, kBlock, kBytes<k, T>, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
