// SPDX-License-Identifier: Apache-2.0
// Both gradients of up x2 in one pass, with adjacent channels of 16 bits, on tensor cores. A block has a tile of 8 x 16
// sources, and goes through all channels of a group a slice at a time. Half of its warps have 4 x 4 sources each, and
// compute the gradient of features as grad_features_up2_mma.h does. The others have the same sources, and sum the
// gradient of masks as grad_masks_up2_nhwc_mma.cu does. So grad_output, which is most of what is read, comes once.
// These warps also copy the next slice of it, and of features with their halo, meanwhile.
#include "cuda/up2/grad_masks_up2.h"
#include "cuda/up2/slice_of_channels.h"

namespace carafepp::cuda {
namespace {

template <int K, class T>
using Slice = SliceOfChannels<K, T, kTileColumns>;

// The features of a slice, with their halo.
template <int K>
using Features = StagedPixels<TileShape<K, kTileColumns>::kSourceRows, TileShape<K, kTileColumns>::kSourceColumns>;

constexpr int kThreadsOfRole = TileShape<5, kTileColumns>::kThreads, kThreadsOfBlock = 2 * kThreadsOfRole;
static_assert(kThreadsOfRole == 2 * kBlock, "the tile is two tiles of grad_masks_up2.h");

[[maybe_unused]] __device__ __forceinline__ int thread_of_role() { return thread_computed_late() % kThreadsOfRole; }
[[maybe_unused]] __device__ __forceinline__ bool is_of_masks() { return thread_computed_late() >= kThreadsOfRole; }

// Shared memory: the results of a slice, then two slices of gradients and features.
template <int K, class T>
constexpr int kElementsOfSlice = Slice<K, T>::kGrads + Features<K>::kElements;
template <int K, class T>
constexpr int kElementsOfBlock = Slice<K, T>::kResults + 2 * kElementsOfSlice<K, T>;
template <int K, class T>
constexpr bool kFits = TileShape<K, kTileColumns>::kSources * K * K * kOutputs <= kElementsOfSlice<K, T> &&
                       2 * kBytesOfPairs<K> <= int64_t{sizeof(T)} * 2 * kElementsOfSlice<K, T>;

struct BackwardPlan {
    Tiles tiles;
    Array grad_masks;  // of the shape of masks or logits
};

constexpr int64_t kEnoughTiles = 64;  // that two kernels do not gain by blocks for some of the channels

// Tiles with all channels of a group in each item.
Tiles tiles_of(const Problem& p) {
    return Tiles(p, p.features.h, p.features.w, TileShape<5, kTileColumns>::kRows, kTileColumns, kChannelsOfSlice, 0);
}

// Copies slices of gradients and features. A thread has a column of either.
template <int K, class T>
struct CopiedSlices {
    using Grads = typename Slice<K, T>::Grads;
    static constexpr int kFirstOfGrads = kThreadsOfRole - Grads::kThreads;
    static_assert(kFirstOfGrads % 32 == 0 && Features<K>::kThreads <= kFirstOfGrads);

    CopiedColumn<T> column;

    __device__ __forceinline__ CopiedSlices(const Problem& p, const TileOfItem& tile)
        : CopiedSlices(p, tile, thread_of_role(), thread_of_role() >= kFirstOfGrads ? kUp : 1) {}
    __device__ __forceinline__ CopiedSlices(const Problem& p, const TileOfItem& tile, int thread, int up)
        : column(up == kUp ? p.grad_output : p.features, tile, (tile.top - K / 2) * up, (tile.left - kBeforeTile) * up,
                 Features<K>::kColumns * up, (kBeforeTile - K / 2) * up, up == kUp ? thread - kFirstOfGrads : thread) {}

    __device__ __forceinline__ void copy(const Problem& p, int channels, T* slice) {
        const int thread = thread_of_role();
        if (thread >= kFirstOfGrads) {
            column.template copy<Grads>(p.grad_output, channels, thread - kFirstOfGrads, slice);
        } else if (thread < Features<K>::kThreads) {
            column.template copy<Features<K>>(p.features, channels, thread, slice + Grads::kElements);
        }
    }
};

// The products of a warp's outputs and the rows of their windows. In those of mma.m16n8k16 rows are outputs, the upper
// ones of a row of sources first, and columns are pixels. The sum is over channels.
template <int K, class T>
struct ProductsOfWindows {
    using Grads = typename Slice<K, T>::Grads;
    static_assert((kTileRows + K - 1) % 2 == 0, "matrices of two rows of pixels are loaded at once");

    float sums[kTileRows][K][4] = {};
    int outputs, pixels;  // where the lane's row of the matrices is

    __device__ __forceinline__ ProductsOfWindows() {
        const PixelsOfWarp<TileShape<K, kTileColumns>> own(thread_of_role());
        const int matrix = own.lane / 8, row = own.lane % 8;
        outputs = Grads::place((own.row + K / 2) * kUp + matrix % 2, (own.column + kBeforeTile) * kUp + row,
                               matrix / 2);
        pixels = Grads::kElements + Features<K>::place(own.row + matrix / 2, own.column + row, matrix % 2);
    }

    __device__ __forceinline__ void add(const T* slice) {
#pragma unroll 1
        for (int first = 0; first < kChannelsOfSlice; first += kChannelsOfMma) {
            uint32_t of_outputs[kTileRows][4];
#pragma unroll
            for (int s = 0; s < kTileRows; s++)
                load_matrices<false>(slice + (outputs ^ first) + s * kUp * Grads::kRow, of_outputs[s]);
#pragma unroll
            for (int y = 0; y < kTileRows + K - 1; y += 2) {
                uint32_t words[4];
                load_matrices<false>(slice + (pixels ^ first) + y * Features<K>::kRow, words);
                add_two_rows<T>(of_outputs, words, y, sums);
            }
        }
    }
};

// The pairs of grad_masks_up2.h, of the half of the tile that a thread has.
template <int K, class T>
__device__ __forceinline__ float2* pairs_of_thread(T* slices) {
    return reinterpret_cast<float2*>(slices) + thread_of_role() / kBlock * (K * K * kPairsApart);
}

// Both loops below have the same barriers. Devices before sm_80 have no room for two slices.
template <int K, class T>
__global__ void __launch_bounds__(kThreadsOfBlock, 1)
    backward_up2_nhwc_mma_kernel(Arguments arguments, BackwardPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // is_compiled_for keeps launches away
#else
    using Tile = typename Slice<K, T>::Tile;
    static_assert(kFits<K, T>, "masks fit into a slice, and pairs into two");
    constexpr int kOfSlice = kElementsOfSlice<K, T>;
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;
    T *const results = shared_memory<T>(), *const slices = results + Slice<K, T>::kResults;
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        CopiedSlices<K, T> copies(p, tile);
        if (is_of_masks()) copies.copy(p, tile.channels, slices);
        T* const masks = slices + kOfSlice;  // where the second slice comes later
        stage_masks_of_tile<K, Tile, kThreadsOfBlock>(p, tile, scale_of_masks<T>(p), masks);
        __syncthreads();
        if (!is_of_masks()) {
            Slice<K, T> slice(p, grad_features, tile);
            const Bands<K, Tile> bands(masks, slice.own);
            const float unscale = 1 / scale_of_masks<T>(p);
#pragma unroll 1
            for (int channels = tile.channels, k = 0; channels > 0; channels -= kChannelsOfSlice, k++) {
                sync_warps_of_block();
                multiply_slice<K>(slice, bands, slices + k % 2 * kOfSlice, unscale, results);
                __syncwarp();
                slice.store(grad_features, channels, results);
                __syncwarp();
            }
            sync_warps_of_block();
            if (!slice.finite) compute_again<T>(p, grad_features, plan.tiles, item, slice);
        } else {
            ProductsOfWindows<K, T> products;
#pragma unroll 1
            for (int channels = tile.channels, k = 0; channels > 0; channels -= kChannelsOfSlice, k++) {
                wait_for_copies();
                sync_warps_of_block();
                if (channels > kChannelsOfSlice)
                    copies.copy(p, channels - kChannelsOfSlice, slices + (k + 1) % 2 * kOfSlice);
                __syncwarp();  // lanes diverge in copies
                products.add(slices + k % 2 * kOfSlice);
            }
            sync_warps_of_block();
            stage_band<K, kBeforeTile - K / 2>(products.sums, thread_of_role() % kBlock, pairs_of_thread<K>(slices));
        }
        __syncthreads();
        const TileOfItem again(p, plan.tiles, computed_late(item));
        const int own = thread_of_role() % kBlock, source = own % kSourcesOfTile, half = thread_of_role() / kBlock;
        const SourcesOfBlock sources(again.n, again.group, again.c, again.top + half * kTileRows, again.left);
        float2* const pairs = pairs_of_thread<K>(slices);
        float grad[kUp][K * K] = {};
        if (is_of_masks()) load_pairs<K>(pairs + own, grad);
        finish_by_lines<K, T>(p,
                              OwnOutputsPlace{sources.n, sources.group, sources.top + source / kTileColumns,
                                              sources.left + source % kTileColumns, own / kSourcesOfTile},
                              sources, grad, reinterpret_cast<float*>(pairs), plan.grad_masks, is_of_masks());
    }
#endif
}

template <int K, class T>
constexpr int64_t kBytes = int64_t{sizeof(T)} * kElementsOfBlock<K, T>;

}  // namespace

const char* cannot_run_backward_up2_nhwc_mma(const Problem& p, const Array& grad_features, const Array& grad_masks) {
    if (p.grad_output.empty()) return "there is no output";
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &p.grad_output, &grad_features})) return reason;
    if (p.kernel_size != 5) return "kernel_size is not 5";
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    if (const char* reason = not_for_source_tiles(p, grad_masks)) return reason;
    if (!is_compiled_for(80, backward_up2_nhwc_mma_kernel<5, Float16>))
        return "the device is older than sm_80, or this build has no code for it";
    return not_for_shared_memory(kBytes<5, Float16>);
}

const char* slower_backward_up2_nhwc_mma(const Problem& p, const Array&, const Array&) {
    return tiles_of(p).items < kEnoughTiles ? "tiles are few, and two kernels have more blocks" : nullptr;
}

void backward_up2_nhwc_mma(const Problem& p, const Array& grad_features, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const BackwardPlan plan{tiles_of(p), grad_masks};
        launch(backward_up2_nhwc_mma_kernel<k, T>, plan.tiles.items, kThreadsOfBlock, kBytes<k, T>, p, grad_features,
               plan);
    });
}

}  // namespace carafepp::cuda
