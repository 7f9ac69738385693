// SPDX-License-Identifier: Apache-2.0
// The gradient of features for up x2 with adjacent channels: see grad_features_up2.h. A thread has eight channels at a
// time, as two vectors. In the end it has one of them, of a row of its quad. From sm_90 on a slice is copied as one
// box, where a tensor map can describe it.
#include "cuda/tensor_map.h"
#include "cuda/up2/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kVectors = 4, kChannels = kVectors * kVector;  // of a slice
constexpr int kVectorsOfThread = 2;                          // at a time
// Gradients of a slice: [row][column][channel]. One more column moves neighbouring rows to different banks.
constexpr int kStagedInRow = kGradsInRow + 1, kRow = kStagedInRow * kChannels;
static_assert(kRow / kVector % 8 == 4);

template <int K>
constexpr int kSlice = MasksOfQuad<K>::kGradRows * kRow;
// A slice, in whose place masks are before, and a barrier.
template <int K, class T>
constexpr int64_t kBytes = std::max(MasksOfQuad<K>::kStaged * int64_t{sizeof(float)}, kSlice<K>* int64_t{sizeof(T)}) +
                           int64_t{sizeof(uint64_t)};

// Copies a slice, of which `channels` channels exist; 0 where there is no output. A thread has a vector of every fourth
// row, in every eighth column.
template <int K, class T>
__device__ __forceinline__ void copy_slice(const Problem& p, const TileOfItem& tile, int channels, T* grads) {
    constexpr int kGradRows = MasksOfQuad<K>::kGradRows, kColumnsAtOnce = 8, kCopies = kGradsInRow / kColumnsAtOnce,
                  kRowsAtOnce = kBlock / (kVectors * kColumnsAtOnce);
    static_assert(kGradsInRow % kColumnsAtOnce == 0 && kGradRows % kRowsAtOnce == 0 && kRowsAtOnce >= 5 - 1);
    const int thread = thread_computed_late(), channel = thread % kVectors * kVector;
    const int x = thread / kVectors % kColumnsAtOnce, y = thread / (kVectors * kColumnsAtOnce);
    const int i = (tile.top - K / 2) * kUp + y, j = (tile.left - kBefore) * kUp + x;
    const int end = static_cast<int>(p.out_h) - i;  // of rows
    const unsigned width = channel < channels ? static_cast<unsigned>(p.out_w) : 0;
    bool columns[kCopies];  // that exist
#pragma unroll
    for (int k = 0; k < kCopies; k++) columns[k] = static_cast<unsigned>(j + k * kColumnsAtOnce) < width;
    const T* from = element<const T>(p.grad_output, tile.n, tile.c + tile.channels - channels + channel, i, j);
    grads += y * kRow + x * kChannels + channel;
#pragma unroll 2
    for (int row = 0; row < kGradRows; row += kRowsAtOnce, from += kRowsAtOnce * p.grad_output.stride_h) {
        const bool exists = row < end && (row > 0 || i >= 0);  // of K - 1 rows some may not
        const T* pixel = from;
#pragma unroll
        for (int k = 0; k < kCopies; k++, pixel += kColumnsAtOnce * p.grad_output.stride_w) {
            copy_async<kVector * sizeof(T)>(grads + row * kRow + k * kColumnsAtOnce * kChannels, pixel,
                                            exists && columns[k]);
        }
    }
}

struct GradFeaturesUp2NhwcPlan {
    Tiles tiles;
    bool wide_warps;      // see PartOfQuad
    bool boxes = false;   // a slice is copied at once
    CUtensorMap slice{};  // of grad_output

    explicit GradFeaturesUp2NhwcPlan(const Problem& p)
        : tiles(tiles_of_quads(p, kChannels, 3)), wide_warps(columns_of_warp(p, 32, kColumns / 2) == kColumns) {}
};

template <int K, class T>
__global__ void __launch_bounds__(kBlock, kCopiesBoxes ? 3 : 2)  // as many as have shared memory
    grad_features_up2_nhwc_kernel(Arguments arguments, const __grid_constant__ GradFeaturesUp2NhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using Masks = MasksOfQuad<K>;
    T* const grads = shared_memory<T>();
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory<char>() + kBytes<K, T>) - 1;
    const bool boxes = kCopiesBoxes && plan.boxes;
    unsigned phase = 0;
    if (boxes && threadIdx.x == 0) begin_barrier(barrier);
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const PartOfQuad own = PartOfQuad::of_thread(plan.wide_warps);
        Masks masks;
        masks.template take<T>(p, tile, own, shared_memory<float>());
        if (boxes) {
            write_before_boxes();
            __syncthreads();
        }
        // The vectors of neighbouring threads are in different banks: those of two quads are other pairs of a slice,
        // and those of two halves other units of a pair.
        const int own_pair = own.column / kQuad % 2 * kVectorsOfThread * kVector, own_unit = own.unit() * kVector;
        // The outputs that reach the thread in the first row of its half.
        const T* const outermost = grads + (own.source_row<K>(0) * kUp + own.parity) * kRow +
                                   own.column * kUp * kChannels;
        const int inwards = own.half == 0 ? kUp * kRow : -kUp * kRow;  // to the next row
        const int i = tile.top + own.row + own.half, j = tile.left + own.column;
        const int left = i < grad_features.h ? static_cast<int>(min(grad_features.w - j, int64_t{kQuad})) : 0;
        T* to = element<T>(grad_features, tile.n, tile.c + own_unit, i, j);  // [H, W, C]
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            if constexpr (kCopiesBoxes) {
                if (boxes && threadIdx.x == 0) {
                    expect_bytes(barrier, kSlice<K> * sizeof(T));
                    copy_box(grads, plan.slice, static_cast<int>(tile.c) + tile.channels - channels,
                             (tile.left - kBefore) * kUp, (tile.top - K / 2) * kUp, static_cast<int>(tile.n), barrier);
                }
            }
            if (boxes) {
                wait_for_phase(barrier, phase);
                phase ^= 1;
            } else {
                copy_slice<K>(p, tile, channels, grads);
                wait_for_copies();
                __syncthreads();
            }
            const int end = warp_has(left > 0) ? kChannels : 0;
#pragma unroll 1
            for (int first = 0; first < end; first += kVectorsOfThread * kVector) {
                const int pair = first ^ own_pair;
                float4 sums[kVectorsOfThread][kQuad][kQuad] = {}, results[1][kQuad];
                const T* row = outermost + pair;
#pragma unroll
                for (int y = 0; y < Masks::kHalf; y++, row += inwards) {
#pragma unroll
                    for (int x = kBefore - K / 2; x < kReach - (kBefore - K / 2); x++) {
#pragma unroll
                        for (int s = 0; s < kUp; s++) {
#pragma unroll
                            for (int u = 0; u < kVectorsOfThread; u++) {
                                const T* const unit = row + (own_unit ^ u * kVector);
                                masks.add(y, x, s, staged_channels(unit + (x * kUp + s) * kChannels), sums[u]);
                            }
                        }
                    }
                }
                add_sums(sums, results);
                const bool exist = pair + own_unit < channels;
                T* pixel = to + pair;
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
        const auto kernel = grad_features_up2_nhwc_kernel<k, T>;
        const Array& grads = p.grad_output;
        GradFeaturesUp2NhwcPlan plan(p);
        plan.boxes = is_compiled_for(90, kernel) &&
                     describe_boxes(grads,
                                    {{grads.c, grads.stride_c, kChannels},
                                     {grads.w, grads.stride_w, kStagedInRow},
                                     {grads.h, grads.stride_h, MasksOfQuad<k>::kGradRows},
                                     {grads.n, grads.stride_n, 1}},
                                    &plan.slice);
        launch(kernel, plan.tiles.items, kBlock, kBytes<k, T>, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
