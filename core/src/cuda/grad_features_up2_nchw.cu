// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns: see grad_features_up2.h. In the end a
// thread has every other channel of a slice, of a row of its quad.
#include "cuda/columns.h"
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kChannels = 8;  // of a slice
// Gradients of a slice: [channel][row][column]. Neighbouring quads, rows and halves of sources are in different banks.
static_assert(kGradsInRow / kVector % 8 == 2 && kQuad * kUp == kVector);

template <int K>
constexpr int kChannel = MasksOfQuad<K>::kGradRows * kGradsInRow;
template <int K, class T>
constexpr int64_t kBytes = std::max(MasksOfQuad<K>::kStaged * int64_t{sizeof(float)},
                                    kChannels* kChannel<K>* int64_t{sizeof(T)});

struct GradFeaturesUp2NchwPlan {
    Tiles tiles;
    int copied;  // columns of grad_output at once: 4, 2 or 1
    bool pairs;  // both columns of a quad are stored at once

    GradFeaturesUp2NchwPlan(const Problem& p, const Array& grad_features)
        : tiles(tiles_of_quads(p, kChannels, 5, columns_before(p))),
          copied(not_for_columns(p.grad_output, 4) == nullptr ? 4
                 : not_for_columns(p.grad_output) == nullptr  ? 2
                                                              : 1),
          pairs(not_for_columns(grad_features) == nullptr) {}

    // Columns of the first tile left of the result: so rows of a tile's gradients begin with a whole sector. None if
    // that takes more tiles.
    static int columns_before(const Problem& p) {
        const int64_t width = p.features.w;
        return ceil_div(width + kBefore, kColumns) == ceil_div(width, kColumns) ? kBefore : 0;
    }
};

// Copies `Count` columns at once: of 2 bytes not by themselves.
template <int Count, class T>
__device__ __forceinline__ void copy_columns(T* to, const T* from, bool exist) {
    if constexpr (Count * sizeof(T) >= 4) {
        copy_async<Count * sizeof(T)>(to, from, exist);
    } else {
        *to = exist ? load_input(from) : T{};
    }
}

// Copies a slice, of which `channels` channels exist, from output (i, j) on: `Count` columns at once, 0 where there is
// no output.
template <int K, int Count, class T>
__device__ __forceinline__ void copy_slice(const Problem& p, const T* from, int i, int j, int channels, T* grads) {
    constexpr int kVectorsInRow = kGradsInRow / Count, kVectors = kChannel<K> / Count;
    const Array& grad_output = p.grad_output;
#pragma unroll 1
    for (int k = thread_computed_late(); k < kVectors; k += kBlock) {
        const int y = k / kVectorsInRow, x = k % kVectorsInRow * Count;
        const bool exist = static_cast<unsigned>(i + y) < static_cast<unsigned>(p.out_h) &&
                           static_cast<unsigned>(j + x) < static_cast<unsigned>(p.out_w);
        const int end = exist ? channels : 0;
        const T* const columns = at_stride(from, static_cast<int>(grad_output.stride_h), y) + x;
#pragma unroll
        for (int c = 0; c < kChannels; c++) {
            copy_columns<Count>(grads + k * Count + c * kChannel<K>,
                                at_stride(columns, static_cast<int>(grad_output.stride_c), c), c < end);
        }
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3)
    grad_features_up2_nchw_kernel(Arguments arguments, GradFeaturesUp2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using Masks = MasksOfQuad<K>;
    T* const grads = shared_memory<T>();  // of a slice; before them, masks
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const PartOfQuad own = PartOfQuad::of_thread(true);
        Masks masks;
        masks.template take<T>(p, tile, own, shared_memory<float>());
        const T* rows[Masks::kHalf];  // of the outputs that reach the thread
#pragma unroll
        for (int y = 0; y < Masks::kHalf; y++)
            rows[y] = grads + (own.source_row<K>(y) * kUp + own.parity) * kGradsInRow + own.column * kUp;
        const int i = tile.top + own.row + own.half, j = tile.left + own.column;
        const int columns = i < grad_features.h && j >= 0 ? static_cast<int>(min(grad_features.w - j, int64_t{kQuad}))
                                                          : 0;
        const int out_top = (tile.top - K / 2) * kUp, out_left = (tile.left - kBefore) * kUp;
        const T* from = element<const T>(p.grad_output, tile.n, tile.c, out_top, out_left);
        T* to = element<T>(grad_features, tile.n, tile.c + own.parity, i, j);  // [C, H, W]
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            if (plan.copied == 4) {
                copy_slice<K, 4>(p, from, out_top, out_left, channels, grads);
            } else if (plan.copied == 2) {
                copy_slice<K, 2>(p, from, out_top, out_left, channels, grads);
            } else {
                copy_slice<K, 1>(p, from, out_top, out_left, channels, grads);
            }
            from += kChannels * p.grad_output.stride_c;
            wait_for_copies();
            __syncthreads();
            if (warp_has(columns > 0)) {
                float sums[kChannels][kQuad][kQuad] = {}, results[kChannels / 2][kQuad];
#pragma unroll
                for (int c = 0; c < kChannels; c++) {
#pragma unroll
                    for (int y = 0; y < Masks::kHalf; y++) {
#pragma unroll
                        for (int x = 0; x < kReach; x += kVector / kUp) {
                            const float4 four = staged_channels(rows[y] + c * kChannel<K> + x * kUp);
                            masks.add(y, x, 0, four.x, sums[c]);
                            masks.add(y, x, 1, four.y, sums[c]);
                            masks.add(y, x + 1, 0, four.z, sums[c]);
                            masks.add(y, x + 1, 1, four.w, sums[c]);
                        }
                    }
                }
                add_sums(own, sums, results);
                const int there = columns > 0 ? channels - own.parity : 0;  // channels, from the thread's first one on
                T* channel = to;
#pragma unroll
                for (int c = 0; c < kChannels; c += 2, channel += 2 * grad_features.stride_c) {
                    if (c >= there) continue;
                    if (plan.pairs) {
                        store_columns(make_float2(results[c / 2][0], results[c / 2][1]), channel);
                    } else {
                        channel[0] = narrow<T>(results[c / 2][0]);
                        if (columns > 1) channel[1] = narrow<T>(results[c / 2][1]);
                    }
                }
            }
            to += kChannels * grad_features.stride_c;
            __syncthreads();
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    if (std::abs(p.grad_output.stride_h) > INT32_MAX || std::abs(p.grad_output.stride_c) > INT32_MAX)
        return "rows or channels are too far apart";
    return not_for_columns_of_up2(p, p.grad_output, grad_features);
}

void grad_features_up2_nchw(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const GradFeaturesUp2NchwPlan plan(p, grad_features);
        launch(grad_features_up2_nchw_kernel<k, T>, plan.tiles.items, kBlock, kBytes<k, T>, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
