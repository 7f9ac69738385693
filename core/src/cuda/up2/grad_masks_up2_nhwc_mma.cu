// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent channels of 16 bits, on tensor cores. A block has a tile of
// 4 x 16 sources, and a warp four neighbouring columns of it. Their windows have rows of at most eight pixels. It
// multiplies the gradients of the 16 outputs of a row of sources by each row of pixels, summed over channels. The
// features of the next slice of channels, with their halo, and the gradients arrive meanwhile. A band of the products
// is the gradient of masks. Each thread carries that of two outputs through the normaliser, and adjacent channels leave
// together by way of shared memory.
#include "cuda/up2/grad_masks_up2.h"
#include "cuda/up2/mma_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kChannels = 4 * kWide;  // of a slice
constexpr int kColumnsOfWarp = kTileColumns / kWarps;
static_assert(kColumnsOfWarp + 5 - 1 <= 8, "a product has eight pixels");

// Elements of shared memory: features of a slice, as [row][column][channel], and gradients, as [row][thread][channel].
constexpr int kPixels = kHaloRows * kHaloColumns * kChannels, kGrads = kOutputRows * kBlock * kWide;

// Blocks of a multiprocessor. Before sm_80 copies pass registers, which a third block would miss.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 3;
#endif

// In the products of mma.m16n8k16 rows are outputs, the upper ones first, and columns are pixels. The sum is over
// channels, in any order: each lane has eight adjacent ones, for two products.
template <int K, class T>
__global__ void __launch_bounds__(kBlock, kBlocks)
    grad_masks_up2_nhwc_mma_kernel(Arguments arguments, SourcesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    T* const staged = shared_memory<T>();        // gradients, then features of two slices
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), warp = thread / 32, row = thread % 32 / 4, pair = thread % 4;
        const SourcesOfBlock tile(plan, item);
        float sums[kTileRows][K][4] = {};
        if (plan.channels > 0 && p.out_h > 0 && p.out_w > 0) {  // or there may be no arrays
            HaloOfVectors<K, kWide, kChannels, kWide, T> halo(p, tile, thread);
            const int out_i = tile.top * kUp, out_j = (tile.left + warp * kColumnsOfWarp) * kUp + row;
            const T* grads = element<const T>(p.grad_output, tile.n, tile.c + pair * kWide, out_i, out_j);
            const int rows = out_j < p.out_w ? static_cast<int>(p.out_h) - out_i : 0;  // that exist
            const int grads_apart = rows > 0 ? static_cast<int>(p.grad_output.stride_h) : 0;
            T* const own = staged + thread * kWide;  // a thread copies those that it reads
            const auto copy = [&](int channels, T* features) {
                const bool has_some = pair * kWide < channels;
                halo.copy(channels, has_some, features);
#pragma unroll
                for (int r = 0; r < kOutputRows; r++)
                    copy_async<kWide * sizeof(T)>(own + r * kBlock * kWide, at_stride(grads, grads_apart, r),
                                                  has_some && r < rows);
                grads += channels;
            };
            const int channels = static_cast<int>(computed_late(plan.channels));
            int left = (channels - 1) / kChannels;                                       // slices
            copy((channels - 1) % kChannels + 1, staged + kGrads + left % 2 * kPixels);  // so that others are whole
#pragma unroll 1
            for (; left >= 0; left--) {
                wait_for_copies();
                __syncthreads();
                const T* pixels = staged + kGrads + left % 2 * kPixels + (warp * kColumnsOfWarp + row) * kChannels +
                                  pair * kWide;
                uint4 outputs[kOutputRows];
#pragma unroll
                for (int r = 0; r < kOutputRows; r++)
                    outputs[r] = *reinterpret_cast<const uint4*>(own + r * kBlock * kWide);
                __syncwarp();  // before copies take their place
                if (left > 0) copy(kChannels, staged + kGrads + (left - 1) % 2 * kPixels);
#pragma unroll
                for (int y = 0; y < kTileRows + K - 1; y++, pixels += kHaloColumns * kChannels) {
                    const uint4 of_pixel = *reinterpret_cast<const uint4*>(pixels);
#pragma unroll
                    for (int s = 0; s < kTileRows; s++) {
                        if (y - s < 0 || y - s >= K) continue;
                        const uint4 upper = outputs[s * kUp], lower = outputs[s * kUp + 1];
                        multiply_add<T>(sums[s][y - s], {upper.x, lower.x, upper.y, lower.y}, {of_pixel.x, of_pixel.y});
                        multiply_add<T>(sums[s][y - s], {upper.z, lower.z, upper.w, lower.w}, {of_pixel.z, of_pixel.w});
                    }
                }
            }
        }
        __syncthreads();
        float2* const pairs = reinterpret_cast<float2*>(staged);
        stage_band<K, 0>(sums, thread, pairs);
        __syncthreads();
        const SourcesOfBlock again(plan, computed_late(item));
        const int own = thread_computed_late(), source = own % kSourcesOfTile;
        float grad[kUp][K * K];
        load_pairs<K>(pairs + own, grad);
        finish_by_lines<K, T>(p,
                              OwnOutputsPlace{again.n, again.group, again.top + source / kTileColumns,
                                              again.left + source % kTileColumns, own / kSourcesOfTile},
                              again, grad, reinterpret_cast<float*>(pairs), grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nhwc_mma(const Problem& p, const Array& grad_masks) {
    if (const char* reason = not_for_channels_of_mma(p, {&p.features, &p.grad_output})) return reason;
    if (const char* reason = not_for_source_tiles(p, grad_masks)) return reason;
    return not_compiled_for_bfloat16(p, grad_masks_up2_nhwc_mma_kernel<5, BFloat16>);
}

void grad_masks_up2_nhwc_mma(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(Float16), 3, 5>(p, [&](auto k, auto feature) {
        const SourcesPlan plan(p);
        const int64_t bytes = std::max<int64_t>((kGrads + 2 * kPixels) * sizeof(feature), kBytesOfPairs<k>);
        launch(grad_masks_up2_nhwc_mma_kernel<k, decltype(feature)>, plan.items, kBlock, bytes, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
