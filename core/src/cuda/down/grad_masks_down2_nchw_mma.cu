// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for down x2 with adjacent columns of 16 bits, on tensor cores. A block has a tile of
// 4 x 28 outputs, and a warp four neighbouring columns of it. It multiplies the pixels of a row of their windows by the
// gradients of the outputs of two rows, summed over channels. A band of the products is the gradient of masks.
#include "cuda/down/grad_masks_down2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kThreadsOfTile = 256;
constexpr int kChannels = 16;  // of a slice
constexpr int kOfMatrix = 8;   // rows, and columns
static_assert(kThreadsOfTile / 32 * kColumnsOfWarp >= kMostColumns, "the warps have all outputs");
static_assert(kBefore + kDown * (kColumnsOfWarp - 1) + 2 < 2 * kOfMatrix, "two matrices have a warp's windows");

// Eight columns of a channel are a row of a matrix. Places of rows that are copied together are in different banks, and
// those of rows that are loaded together.
struct PlaceOfPixel {  // [row][eight columns][channel][column]
    static constexpr int kEights = kWidth / kOfMatrix, kRow = kEights * kChannels * kOfMatrix;
    __device__ __forceinline__ int operator()(int channel, int row, int column) const {
        const int eight = column / kOfMatrix;
        return row * kRow + (eight * kChannels + (channel ^ eight)) * kOfMatrix + column % kOfMatrix;
    }
};
struct PlaceOfOutput {  // [pair of rows][four columns][channel][row][column]
    static constexpr int kFours = kMostColumns / kColumnsOfWarp, kRows = kFours * kChannels * kOfMatrix;
    __device__ __forceinline__ int operator()(int channel, int row, int column) const {
        const int four = column / kColumnsOfWarp;
        return row / kPair * kRows + (four * kChannels + (channel ^ four)) * kOfMatrix + row % kPair * kColumnsOfWarp +
               column % kColumnsOfWarp;
    }
};

// Blocks of a multiprocessor. Before sm_80 copies pass registers, which a second block would miss.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif

template <int K>
constexpr int kPixels = kHeight<K> * PlaceOfPixel::kRow;  // elements of a slice

// In the products of mma.m16n8k16 rows are pixels, and columns are outputs. The sum is over channels.
template <int K, class T>
__global__ void __launch_bounds__(kThreadsOfTile, kBlocks)
    grad_masks_down2_nchw_mma_kernel(Arguments arguments, ColumnsDown2Plan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    T* const staged = shared_memory<T>();        // two slices of features, then gradients
    T* const grads = staged + 2 * kPixels<K>;
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int lane = thread_computed_late() % 32, warp = thread_computed_late() / 32;
        // A lane tells where a row of one of four matrices is: both halves of the pixels, or both pairs of outputs, of
        // the lower channels, and of the upper ones.
        const int channel = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
        const int of_pixels = PlaceOfPixel()(channel, 0, (warp % PlaceOfOutput::kFours + half) * kOfMatrix);
        const int of_outputs = PlaceOfOutput()(channel, half * kPair, warp % PlaceOfOutput::kFours * kColumnsOfWarp);
        Band<K> sums = {};
        CopiesOfTile<K, kChannels, kThreadsOfTile, T, PlaceOfPixel, PlaceOfOutput> copies(p, plan, tile);
        int slice = 0;  // the first element
        copies.copy(tile.channels, staged, grads);
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            wait_for_copies();
            __syncthreads();
            uint32_t words[4];
            load_matrices(grads + of_outputs, words);
            const uint32_t outputs[kPairs][2] = {{words[0], words[2]}, {words[1], words[3]}};
            __syncthreads();  // the next gradients take the place of these
            copies.copy(channels - kChannels, staged + (kPixels<K> - slice), grads);
            __syncwarp();  // lanes diverge in copies
#pragma unroll
            for (int y = 0; y < kHeight<K>; y++) {
                uint32_t pixels[4];
                load_matrices(staged + slice + of_pixels + y * PlaceOfPixel::kRow, pixels);
                add_row<K, T>(y, pixels, outputs, sums);
            }
            slice = kPixels<K> - slice;
        }
        __syncthreads();
        float* const band = reinterpret_cast<float*>(staged);
        stage_band<K, kMostColumns, kBefore - K / 2>(sums, warp * kColumnsOfWarp, band);
        finish_tile<K, kMostColumns, kThreadsOfTile, T>(p, tile, plan.tiles.columns, band, grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_down2_nchw_mma(const Problem& p, const Array&) {
    if (const char* reason = not_for_columns_down2(p)) return reason;
    if (const char* reason = not_of_16_bits(p)) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_down2_nchw_mma_kernel<5, BFloat16>);
}

void grad_masks_down2_nchw_mma(const Problem& p, const Array& grad_masks) {
    const ColumnsDown2Plan plan(p, grad_masks);
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        constexpr int64_t kGrads = kPairs * PlaceOfOutput::kRows;
        const int64_t bytes = std::max<int64_t>((2 * kPixels<k> + kGrads) * sizeof(feature),
                                                kBytesOfSums<k, kMostColumns>);
        launch(grad_masks_down2_nchw_mma_kernel<k, decltype(feature)>, plan.tiles.items, kThreadsOfTile, bytes, p,
               grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
