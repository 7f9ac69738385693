// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent columns of 16 bits, on tensor cores. A block has a tile of
// 4 x 16 sources, and a warp four neighbouring columns of it. Their windows have rows of eight pixels. It multiplies
// the gradients of the 16 outputs of a row of sources by each row of pixels, summed over channels. The features of the
// next slice of channels, with their halo, and the gradients arrive meanwhile. Each warp has copies of its own pixels,
// aligned for the instruction that transposes them. A band of the products is the gradient of masks. Each thread
// carries that of two outputs through the normaliser.
#include "cuda/up2/grad_masks_up2.h"
#include "cuda/up2/mma_up2.h"
#include "cuda/up2/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kChannels = 16;  // of a slice
constexpr int kOfMatrix = 8;   // rows, and columns
constexpr int kBefore = 2;     // columns of a halo
constexpr int kColumnsOfWarp = kTileColumns / kWarps;
static_assert(kColumnsOfWarp + 2 * kBefore == kOfMatrix, "windows of 5 x 5 taps");
static_assert(kColumnsOfWarp * kUp == kOfMatrix, "a matrix has a row of a warp's outputs");

// A slice in shared memory: features and gradients, both as [row][warp][channel][column]. Eight columns of a channel
// are a row of a matrix. Places of two warps are in different banks.
constexpr int kPlace = kChannels * kOfMatrix + 16, kRow = kWarps * kPlace;  // elements, of a warp and of all
constexpr int kPixels = kHaloRows * kRow, kElements = kPixels + kOutputRows * kRow;

// Copies the columns of a row, in all channels of a slice. Four lanes have the pairs of columns of a matrix's row.
template <int K, class T>
struct Copies {
    static constexpr int kPairs = kOfMatrix / 2, kAtOnce = kBlock / (kPairs * kWarps);  // channels
    const T *features, *grads;
    int features_apart, grads_apart;  // from row to row
    int top, height;                  // of the features' first row, and of their columns, 0 if they do not exist
    int rows;                         // of outputs that exist
    int channel, to;

    __device__ __forceinline__ Copies(const Problem& p, const SourcesOfBlock& tile, int thread) {
        const int x = thread % kPairs * 2, warp = thread / kPairs % kWarps;
        channel = thread / (kPairs * kWarps);
        to = warp * kPlace + channel * kOfMatrix + x;
        const int j = tile.left + warp * kColumnsOfWarp - kBefore + x,
                  out_j = (tile.left + warp * kColumnsOfWarp) * kUp + x;
        top = tile.top - K / 2;
        height = j >= 0 && j < p.features.w ? static_cast<int>(p.features.h) : 0;
        rows = out_j < p.out_w ? static_cast<int>(p.out_h) - tile.top * kUp : 0;
        features = element<const T>(p.features, tile.n, tile.c + channel, top, j);
        grads = element<const T>(p.grad_output, tile.n, tile.c + channel, tile.top * kUp, out_j);
        features_apart = static_cast<int>(p.features.stride_h);
        grads_apart = static_cast<int>(p.grad_output.stride_h);
    }

    // Copies the next `channels` channels; 0 for others.
    __device__ __forceinline__ void copy(const Problem& p, int channels, T* slice) {
        const int of_features = static_cast<int>(p.features.stride_c),
                  of_grads = static_cast<int>(p.grad_output.stride_c);
#pragma unroll
        for (int q = 0; q < kChannels; q += kAtOnce) {
            const bool exists = channel + q < channels;
            T* const place = slice + to + q * kOfMatrix;
            const T *const feature = at_stride(features, of_features, q), *const grad = at_stride(grads, of_grads, q);
#pragma unroll
            for (int y = 0; y < kTileRows + K - 1; y++) {
                copy_elements<2>(place + y * kRow, at_stride(feature, features_apart, y),
                                 top + y >= 0 && top + y < (exists ? height : 0));
            }
#pragma unroll
            for (int r = 0; r < kOutputRows; r++)
                copy_elements<2>(place + kPixels + r * kRow, at_stride(grad, grads_apart, r), exists && r < rows);
        }
        features = at_stride(features, of_features, channels);
        grads = at_stride(grads, of_grads, channels);
    }
};

// Blocks of a multiprocessor. Compilers for other devices than sm_90 need more registers than a fourth leaves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif

// In the products of mma.m16n8k16 rows are outputs, the upper ones first, and columns are pixels. The sum is over
// channels.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, kBlocks)
    grad_masks_up2_nchw_mma_kernel(Arguments arguments, SourcesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    T* const staged = shared_memory<T>();        // two slices
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), warp = thread / 32, lane = thread % 32;
        const SourcesOfBlock tile(plan, item);
        float sums[kTileRows][K][4] = {};
        if (plan.channels > 0 && p.out_h > 0 && p.out_w > 0) {  // or there may be no arrays
            Copies<K, T> copies(p, tile, thread);
            const int channels = static_cast<int>(computed_late(plan.channels));
            int left = (channels - 1) / kChannels;                                          // slices
            copies.copy(p, (channels - 1) % kChannels + 1, staged + left % 2 * kElements);  // so that others are whole
            // A lane tells where a row of one of four matrices is: two rows, and both halves of the channels.
            const int of_lane = warp * kPlace + lane / 16 * kRow + lane % 16 * kOfMatrix;
#pragma unroll 1
            for (; left >= 0; left--) {
                wait_for_copies();
                __syncthreads();
                const T* const slice = staged + left % 2 * kElements + of_lane;
                if (left > 0) copies.copy(p, kChannels, staged + (left - 1) % 2 * kElements);
                uint32_t outputs[kTileRows][4];
#pragma unroll
                for (int s = 0; s < kTileRows; s++) {
                    uint32_t words[4];  // of the upper row's halves, then of the lower one's
                    load_matrices(slice + kPixels + s * kUp * kRow, words);
                    outputs[s][0] = words[0];
                    outputs[s][1] = words[2];
                    outputs[s][2] = words[1];
                    outputs[s][3] = words[3];
                }
#pragma unroll
                for (int y = 0; y < kTileRows + K - 1; y += 2) {
                    uint32_t pixels[4];
                    load_matrices(slice + y * kRow, pixels);
                    add_two_rows<T>(outputs, pixels, y, sums);
                }
            }
        }
        __syncthreads();
        float2* const pairs = reinterpret_cast<float2*>(staged);
        stage_band<K, kBefore - K / 2>(sums, thread, pairs);
        __syncthreads();
        const SourcesOfBlock again(plan, computed_late(item));
        float grad[kUp][K * K];
        load_pairs<K>(pairs + thread, grad);
        const int source = thread % kSourcesOfTile;
        finish_two_outputs<K, T>(p,
                                 OwnOutputsPlace{again.n, again.group, again.top + source / kTileColumns,
                                                 again.left + source % kTileColumns, thread / kSourcesOfTile},
                                 grad, pairs + thread, grad_masks);
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nchw_mma(const Problem& p, const Array& grad_masks) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.features, &p.grad_output})) return reason;
    if (const char* reason = not_for_source_tiles(p, grad_masks)) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_up2_nchw_mma_kernel<5, BFloat16>);
}

void grad_masks_up2_nchw_mma(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const int64_t bytes = std::max<int64_t>(2 * kElements * sizeof(feature), kBytesOfPairs<k>);
        const SourcesPlan plan(p);
        launch(grad_masks_up2_nchw_mma_kernel<k, decltype(feature)>, plan.items, kBlock, bytes, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
