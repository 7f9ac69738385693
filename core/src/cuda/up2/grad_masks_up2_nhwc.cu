// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent channels. A block has a tile of 4 x 16 sources. It goes
// through the channels a slice at a time. The features of the next slice, with their halo, and the gradients arrive
// meanwhile. Two threads share a source: each has two of the four vectors of a slice. It contracts the window with the
// gradients of the four outputs, with all sums in registers. Then the two exchange their sums, and each finishes a row
// of outputs. Of 7 x 7 taps registers do not hold all sums: see PartOfSource.
#include "cuda/up2/grad_masks_up2.h"

namespace carafepp::cuda {
namespace {

// Gradients of a slice in shared memory: [vector][row][left or right][column of sources][channel]. Those that a thread
// copies are in different banks, and those that neighbouring threads read.
constexpr int kSideOfGrads = kTileColumns * kVector + kVector, kRowOfGrads = kUp * kSideOfGrads;
constexpr int kVectorOfGrads = kOutputRows * kRowOfGrads + 2 * kVector, kGrads = kVectors * kVectorOfGrads;
static_assert(kBlock == kVectors * kTileColumns * kUp, "the threads copy a row of gradients at once");

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 2) grad_masks_up2_nhwc_kernel(Arguments arguments, SourcesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    T* const staged = shared_memory<T>();        // gradients, then features of two slices
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late();
        const OwnSource source(plan, thread);
        const SourcesOfBlock tile(plan, item);
        const bool idle = source.idle(p, tile);
        using Part = PartOfSource<K>;
        float sums[kOutputs][Part::kTaps] = {};                 // of outputs, those of this thread's row first
        if (plan.channels > 0 && p.out_h > 0 && p.out_w > 0) {  // or there may be no arrays
            using Halo = HaloOfTile<K, kVector, T>;
            T* const slices = staged + kGrads;
            Halo halo(p, tile, thread, slices);
            const int vector = thread % kVectors, pixel = thread / kVectors;  // that are copied, of a row of outputs
            const int out_i = tile.top * kUp, out_j = tile.left * kUp + pixel;
            const T* grads = element<const T>(p.grad_output, tile.n, tile.c + vector * kVector, out_i, out_j);
            const int rows = out_j < p.out_w ? static_cast<int>(p.out_h) - out_i : 0;  // that exist
            const int grads_apart = rows > 0 ? static_cast<int>(p.grad_output.stride_h) : 0;
            T* const to = staged + vector * kVectorOfGrads + pixel % kUp * kSideOfGrads + pixel / kUp * kVector;
            const auto copy = [&](int channels, T* features) {
                const bool has_some = vector * kVector < channels;
                halo.copy(has_some, features);
                halo.from += channels;
#pragma unroll
                for (int r = 0; r < kOutputRows; r++)
                    copy_async<kVector * sizeof(T)>(to + r * kRowOfGrads, at_stride(grads, grads_apart, r),
                                                    has_some && r < rows);
                grads += channels;
            };
            const int channels = static_cast<int>(computed_late(plan.channels));
            int left = (channels - 1) / kSlice;         // slices
            int place = 0;                              // of the slice that is contracted
            copy((channels - 1) % kSlice + 1, slices);  // so that later ones are whole
            const T* const own = staged + source.row * kUp * kRowOfGrads + source.column * kVector;
#pragma unroll 1
            for (; left >= 0; left--) {
                wait_for_copies();
                __syncthreads();
                float grad[Part::kVectors][kVector][kOutputs];
#pragma unroll
                for (int v = 0; v < Part::kVectors; v++) {
#pragma unroll
                    for (int o = 0; o < kOutputs; o++) {
                        const float4 output = staged_channels(own + Part::vector(source.part, v) * kVectorOfGrads +
                                                              (o / kUp ^ source.part) * kRowOfGrads +
                                                              o % kUp * kSideOfGrads);
                        grad[v][0][o] = output.x;
                        grad[v][1][o] = output.y;
                        grad[v][2][o] = output.z;
                        grad[v][3][o] = output.w;
                    }
                }
                __syncthreads();  // the next gradients take the place of these
                const T* const window = slices + place + source.window<Halo>();
                place = Halo::kElements - place;
                if (left > 0) copy(kSlice, slices + place);
                if (idle) continue;
#pragma unroll
                for (int v = 0; v < Part::kVectors; v++) add_window<K, Halo>(window, source.part, v, grad[v], sums);
            }
        }
        float2* const pairs = reinterpret_cast<float2*>(staged);
        float grad[kUp][K * K];
        exchange_sums<K>(sums, thread, source.part, pairs, grad);
        const SourcesOfBlock same(plan, computed_late(item));  // as registers do not suffice for it until now
        finish_by_lines<K, T>(
            p, OwnOutputsPlace{same.n, same.group, same.top + source.row, same.left + source.column, source.part}, same,
            grad, reinterpret_cast<float*>(pairs), grad_masks);
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nhwc(const Problem& p, const Array& grad_masks) {
    const bool floats = p.features.dtype == CARAFEPP_FLOAT32;  // tensor cores are faster at 7 x 7 products of 16 bits
    if (const char* reason = not_for_up2(p, floats ? 7 : 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_source_tiles(p, grad_masks);
}

void grad_masks_up2_nhwc(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5, 7>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        if constexpr (k < 7 || sizeof(T) == sizeof(float)) {
            const int64_t slices = kGrads * sizeof(T) + HaloOfTile<k, kVector, T>::kBytes;
            const SourcesPlan plan(p);
            launch(grad_masks_up2_nhwc_kernel<k, T>, plan.items, kBlock, std::max(slices, kBytesOfPairs<k>), p,
                   grad_masks, plan);
        }
    });
}

}  // namespace carafepp::cuda
