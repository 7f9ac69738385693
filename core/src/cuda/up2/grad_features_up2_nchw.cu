// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent columns: see grad_features_up2.h. In the end a thread has every
// other channel of a slice, of a row of its quad. From sm_90 on a slice is copied as one box, where a tensor map can
// describe it.
#include "cuda/columns.h"
#include "cuda/tensor_map.h"
#include "cuda/up2/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kChannels = 8;  // of a slice
// Gradients of a slice: [channel][row][column]. Neighbouring quads, rows and halves of sources are in different banks.
static_assert(kGradsInRow / kVector % 8 == 2 && kQuad * kUp == kVector);

template <int K>
constexpr int kChannel = MasksOfQuad<K>::kGradRows * kGradsInRow;
template <int K>
constexpr int kSlice = kChannels * kChannel<K>;
// Two slices, in whose place masks are before, and a barrier.
template <int K, class T>
constexpr int64_t kBytes = std::max(MasksOfQuad<K>::kStaged * int64_t{sizeof(float)},
                                    2 * kSlice<K> * int64_t{sizeof(T)}) +
                           int64_t{sizeof(uint64_t)};

struct GradFeaturesUp2NchwPlan {
    Tiles tiles;
    int copied;           // columns of grad_output at once: 4, 2 or 1
    bool pairs;           // both columns of a quad are stored at once
    bool boxes = false;   // a slice is copied at once
    CUtensorMap slice{};  // of grad_output

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

// Stores a thread's results: `columns` of each channel that is one of `channels`.
template <class T>
__device__ __forceinline__ void store_results(const float (&results)[kChannels / 2][kQuad], int columns, int channels,
                                              bool pairs, int64_t stride_c, T* to) {
#pragma unroll
    for (int k = 0; k < kChannels / 2; k++, to += 2 * stride_c) {
        const bool exists = 2 * k < channels;
        if (pairs) {
            if (exists) store_columns(make_float2(results[k][0], results[k][1]), to);
        } else {
            if (exists) to[0] = narrow<T>(results[k][0]);
            if (exists && columns > 1) to[1] = narrow<T>(results[k][1]);
        }
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3)
    grad_features_up2_nchw_kernel(Arguments arguments, const __grid_constant__ GradFeaturesUp2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using Masks = MasksOfQuad<K>;
    T* const slices = shared_memory<T>();
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory<char>() + kBytes<K, T>) - 1;
    const bool boxes = kCopiesBoxes && plan.boxes;
    unsigned phase = 0;
    if (boxes && threadIdx.x == 0) begin_barrier(barrier);
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const PartOfQuad own = PartOfQuad::of_thread(true);
        Masks masks;
        masks.template take<T>(p, tile, own, shared_memory<float>());
        int rows[Masks::kHalf];  // of the outputs that reach the thread
#pragma unroll
        for (int y = 0; y < Masks::kHalf; y++)
            rows[y] = (own.source_row<K>(y) * kUp + own.parity) * kGradsInRow + own.column * kUp;
        const int i = tile.top + own.row + own.half, j = tile.left + own.column;
        const int columns = i < grad_features.h && j >= 0 ? static_cast<int>(min(grad_features.w - j, int64_t{kQuad}))
                                                          : 0;
        T* to = element<T>(grad_features, tile.n, tile.c + own.unit(), i, j);  // [C, H, W]
        const auto copy = [&](int channels, T* grads) {
            const int out_top = (tile.top - K / 2) * kUp, out_left = (tile.left - kBefore) * kUp;
            const int64_t c = tile.c + tile.channels - channels;
            if constexpr (kCopiesBoxes) {
                if (boxes) {
                    if (threadIdx.x != 0) return;
                    expect_bytes(barrier, kSlice<K> * sizeof(T));
                    copy_box(grads, plan.slice, out_left, out_top, static_cast<int>(c), static_cast<int>(tile.n),
                             barrier);
                    return;
                }
            }
            const T* const from = element<const T>(p.grad_output, tile.n, c, out_top, out_left);
            with_columns(plan.copied,
                         [&](auto count) { copy_slice<K, count>(p, from, out_top, out_left, channels, grads); });
        };
        if (boxes) {
            write_before_boxes();
            __syncthreads();
        }
        T *grads = slices, *next = slices + kSlice<K>;
        copy(tile.channels, grads);
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            if (boxes) {
                wait_for_phase(barrier, phase);
                phase ^= 1;
            } else {
                wait_for_copies();
            }
            __syncthreads();
            if (channels > kChannels) copy(channels - kChannels, next);
            if (warp_has(columns > 0)) {
                const T* of_unit[2];  // of each pair of channels, the thread's own one first
#pragma unroll
                for (int u = 0; u < 2; u++) of_unit[u] = grads + (u ^ own.unit()) * kChannel<K>;
                float sums[kChannels][kQuad][kQuad] = {}, results[kChannels / 2][kQuad];
#pragma unroll
                for (int c = 0; c < kChannels; c++) {
#pragma unroll
                    for (int y = 0; y < Masks::kHalf; y++) {
#pragma unroll
                        for (int x = 0; x < kReach; x += kVector / kUp) {
                            const float4 four = staged_channels(of_unit[c % 2] + rows[y] + c / 2 * 2 * kChannel<K> +
                                                                x * kUp);
                            masks.add(y, x, 0, four.x, sums[c]);
                            masks.add(y, x, 1, four.y, sums[c]);
                            masks.add(y, x + 1, 0, four.z, sums[c]);
                            masks.add(y, x + 1, 1, four.w, sums[c]);
                        }
                    }
                }
                add_sums(sums, results);
                store_results(results, columns, columns > 0 ? channels - own.unit() : 0, plan.pairs,
                              grad_features.stride_c, to);
            }
            to += kChannels * grad_features.stride_c;
            T* const read = grads;
            grads = next;
            next = read;
        }
        __syncthreads();
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
        const auto kernel = grad_features_up2_nchw_kernel<k, T>;
        GradFeaturesUp2NchwPlan plan(p, grad_features);
        plan.boxes = is_compiled_for(90, kernel) &&
                     describe_boxes_of_columns(p.grad_output, kGradsInRow, MasksOfQuad<k>::kGradRows, kChannels,
                                               &plan.slice);
        launch(kernel, plan.tiles.items, kBlock, kBytes<k, T>, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
