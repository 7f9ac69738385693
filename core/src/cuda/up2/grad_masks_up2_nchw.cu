// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent columns. A block has a tile of 4 x 16 sources. It goes
// through the channels a slice at a time. The features of the next slice, with their halo, arrive meanwhile, such that
// a thread reads four channels of a pixel as one vector. Two threads share a source: each has two vectors of a slice,
// and loads the gradients of the four outputs ahead. It contracts the window with them, with all sums in registers.
// Then the two exchange their sums, and each finishes a row of outputs.
#include "cuda/columns.h"
#include "cuda/up2/grad_masks_up2.h"
#include "cuda/up2/tile_up2.h"

namespace carafepp::cuda {
namespace {

// Copies features of a tile with its halo. Four lanes have the channels of a pixel. A lane has two columns of two rows,
// whole sectors, and one of the columns beside the tile.
template <int K, class T>
struct Halo {
    const T *inner[2], *outer;
    bool inner_exist[2][2], outer_exists;
    int channel, to_inner, to_outer, stride_c;

    __device__ __forceinline__ Halo(const Problem& p, const SourcesOfBlock& tile, int thread)
        : channel(thread % kVector) {
        const auto exists = [&](int y, int x) {
            const int i = tile.top - K / 2 + y, j = tile.left - K / 2 + x;
            return y < kTileRows + K - 1 && x < kTileColumns + K - 1 && i >= 0 && i < p.features.h && j >= 0 &&
                   j < p.features.w;
        };
        const auto place = [&](int y, int x) { return (y * kHaloColumns + x) * kVector + channel; };
        int y = thread / 32, x = thread % 32 / kVector + K / 2;
#pragma unroll
        for (int k = 0; k < 4; k++) inner_exist[k / 2][k % 2] = exists(y + k / 2 * kWarps, x + k % 2 * 8);
        inner[0] = element<const T>(p.features, tile.n, tile.c + channel, tile.top - K / 2 + y, tile.left - K / 2 + x);
        const int inner_y = y, inner_x = x;
        to_inner = place(y, x);
        y = thread / 16;
        x = thread / kVector % 4;
        if (x >= K / 2) x += kTileColumns;
        outer_exists = exists(y, x);
        const bool any = outer_exists || inner_exist[0][0] || inner_exist[0][1] || inner_exist[1][0] ||
                         inner_exist[1][1];
        stride_c = any ? static_cast<int>(p.features.stride_c) : 0;
        const int stride_h = any ? static_cast<int>(p.features.stride_h) : 0;
        inner[1] = at_stride(inner[0], stride_h, kWarps);
        outer = at_stride(inner[0], stride_h, y - inner_y) + x - inner_x;
        to_outer = place(y, x);
    }

    // Copies a slice, of which `channels` channels exist; 0 outside, and for other channels.
    __device__ __forceinline__ void copy(int channels, T* slice) {
#pragma unroll
        for (int vector = 0; vector < kVectors; vector++, slice += kVectorsApart) {
            const bool exists = vector * kVector + channel < channels;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                copy_elements<1>(slice + to_inner + (k / 2 * kWarps * kHaloColumns + k % 2 * 8) * kVector,
                                 inner[k / 2] + k % 2 * 8, exists && inner_exist[k / 2][k % 2]);
            }
            copy_elements<1>(slice + to_outer, outer, exists && outer_exists);
            advance(kVector);
        }
    }

    __device__ __forceinline__ void advance(int channels) {
        for (const T** from : {&inner[0], &inner[1], &outer}) *from = at_stride(*from, stride_c, channels);
    }
};

// The gradients of a source's outputs, in this thread's channels of a slice: for each row, its own one first. An
// output that does not exist gets another's gradient: nobody reads its sum.
template <bool Pairs, class T>
struct OwnOutputs {
    const T* first;  // in the first channel
    const T* from;   // in this thread's own row
    int other;       // the other row, from the own one on
    int next;        // column, from the left one on
    int stride_c;
    float grad[kOwnVectors][kVector][kOutputs] = {};

    __device__ __forceinline__ OwnOutputs(const Problem& p, const SourcesOfBlock& tile, int i, int j, int part) {
        const int bottom = static_cast<int>(p.out_h) - 1, right = static_cast<int>(p.out_w) - 1;
        const int row = min(i * kUp + part, bottom), column = min(j * kUp, right / kUp * kUp);
        first = element<const T>(p.grad_output, tile.n, tile.c, row, column);
        other = (min(i * kUp + 1 - part, bottom) - row) * static_cast<int>(p.grad_output.stride_h);
        next = column < right ? 1 : 0;
        stride_c = static_cast<int>(p.grad_output.stride_c);
        from = at_stride(first, stride_c, part * kOwnVectors * kVector);
    }

    // Loads a vector, of which `channels` channels exist.
    __device__ __forceinline__ void load(int vector, int channels) {
#pragma unroll
        for (int r = 0; r < kUp; r++) {
            const T* columns = at_stride(r == 0 ? from : from + other, stride_c, vector * kVector);
#pragma unroll
            for (int q = 0; q < kVector; q++, columns = at_stride(columns, stride_c, 1)) {
                if (q >= channels) continue;
                float2 pair;
                if constexpr (Pairs) {
                    pair = load_columns(columns, true);
                } else {
                    pair = make_float2(widen(load_input(columns)), widen(load_input(columns + next)));
                }
                grad[vector][q][r * kUp] = pair.x;
                grad[vector][q][r * kUp + 1] = pair.y;
            }
        }
    }

    __device__ __forceinline__ void advance(int channels) { from = at_stride(from, stride_c, channels); }

    // Nobody needs what is loaded from now on.
    __device__ __forceinline__ void end() {
        from = first;
        stride_c = 0;
    }
};

// `Pairs`: of outputs are loaded at once.
template <int K, bool Pairs, class T>
__global__ void __launch_bounds__(kBlock, 2) grad_masks_up2_nchw_kernel(Arguments arguments, SourcesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    T* const staged = shared_memory<T>();        // features of two slices
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late();
        const OwnSource source(plan, thread);
        const SourcesOfBlock tile(plan, item);
        const int i = tile.top + source.row, j = tile.left + source.column;
        const bool idle = source.idle(p, tile);
        float sums[kOutputs][K * K] = {};                       // of outputs, those of this thread's row first
        if (plan.channels > 0 && p.out_h > 0 && p.out_w > 0) {  // or there may be no arrays
            Halo<K, T> halo(p, tile, thread);
            OwnOutputs<Pairs, T> outputs(p, tile, i, j, source.part);
            const int channels = static_cast<int>(computed_late(plan.channels));
            int left = (channels - 1) / kSlice;             // slices, which have two buffers
            const int first = (channels - 1) % kSlice + 1;  // channels, so that later slices are whole
            int place = 0;                                  // of the slice that is contracted
            halo.copy(first, staged);
            halo.advance(first - kSlice);
#pragma unroll
            for (int v = 0; v < kOwnVectors; v++) outputs.load(v, first - (source.part * kOwnVectors + v) * kVector);
            if (left == 0) outputs.end();
            int step = first;  // to the channels that are loaded next, at the end the last ones once more
#pragma unroll 1
            for (; left >= 0; left--) {
                wait_for_copies();
                __syncthreads();
                const T* window = staged + place + source.window();
                place = kFeatures - place;
                if (left > 0) halo.copy(kSlice, staged + place);
                if (idle) continue;
                outputs.advance(left > 0 ? step : 0);
                step = kSlice;
#pragma unroll
                for (int v = 0; v < kOwnVectors; v++, window += kVectorsApart) {
                    add_window<K>(window, outputs.grad[v], sums);
                    outputs.load(v, kVector);
                    __syncwarp();  // so that these loads are not put off
                }
            }
        }
        float2* const pairs = reinterpret_cast<float2*>(staged);
        float grad[kUp][K * K];
        exchange_sums<K>(sums, thread, pairs, grad);
        finish_two_outputs<K, T>(p, OwnOutputsPlace{tile.n, tile.group, i, j, source.part}, grad, pairs + thread,
                                 grad_masks);
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nchw(const Problem& p, const Array& grad_masks) {
    if (const char* reason = not_for_columns_of_up2(p, p.features, p.grad_output)) return reason;
    return not_for_source_tiles(p, grad_masks);
}

void grad_masks_up2_nchw(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const SourcesPlan plan(p);
        const int64_t bytes = std::max<int64_t>(2 * kFeatures * sizeof(T), kBytesOfPairs<k>);
        if constexpr (sizeof(T) == sizeof(float)) {
            if (not_for_columns(p.grad_output) == nullptr)
                return launch(grad_masks_up2_nchw_kernel<k, true, T>, plan.items, kBlock, bytes, p, grad_masks, plan);
        }
        launch(grad_masks_up2_nchw_kernel<k, false, T>, plan.items, kBlock, bytes, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
