// SPDX-License-Identifier: Apache-2.0
// The gradients of features for up x2, in gather form. A block has a tile of the result. It stages the masks of all
// outputs whose windows reach the tile once. Then it goes through the channels a slice at a time: it copies
// grad_output with its halo to where the masks were. Four threads share a quad, 2 x 2 pixels of the result. Each has
// a quarter of the outputs that reach it: of the upper or the lower sources every other row. It keeps their masks in
// registers through all channels, and each gradient that it loads serves up to four pixels. Then threads add their
// sums.
#pragma once

#include "cuda/tiles.h"
#include "cuda/up2/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kBlock = 128;                  // threads
constexpr int kRows = 8, kColumns = 16;      // of a tile
constexpr int kQuad = 2;                     // pixels of an axis
constexpr int kSharers = 4;                  // threads of a quad
constexpr int kBefore = 2;                   // columns of sources before a tile, and as many behind it
constexpr int kReach = kQuad + 2 * kBefore;  // columns of sources before, in and behind a quad
constexpr int kInRow = kColumns + 2 * kBefore, kGradsInRow = kUp * kInRow;  // sources and outputs that reach a tile
static_assert(kRows * kColumns / (kQuad * kQuad) * kSharers == kBlock, "a thread for each part of a quad");
static_assert(kBefore >= 5 / 2);

// The tiles of a problem. To stage an item's masks takes as long as some slices.
inline Tiles tiles_of_quads(const Problem& p, int channels_of_slice, int64_t slices_to_stage, int before = 0) {
    return with_even_items(Tiles(p, p.features.h, p.features.w, kRows, kColumns, channels_of_slice, 0, before),
                           channels_of_slice, slices_to_stage);
}

// Clears the masks of outputs that a crop leaves out, as the gradient is 0 there. Ends with a barrier.
template <int K>
__device__ void clear_cropped_masks(const Problem& p, int i, int first, int rows, float* staged) {
    if (min(int64_t{i + rows}, p.features.h) * kUp <= p.out_h &&
        min(int64_t{first + kInRow}, p.features.w) * kUp <= p.out_w)
        return;
    for (int k = thread_computed_late(); k < rows * kInRow * K * K * kOutputs; k += kBlock) {
        const int output = k % kOutputs, source = k / (K * K * kOutputs);
        if ((i + source / kInRow) * kUp + output / kUp >= p.out_h ||
            (first + source % kInRow) * kUp + output % kUp >= p.out_w)
            staged[k] = 0;
    }
    __syncthreads();
}

// A thread's part of a quad: the outputs of every other row, `parity`, of the sources of a `half`.
struct PartOfQuad {
    int row, column;  // of the quad's first pixel in the tile
    int half, parity;

    // A warp has eight neighbouring quads: in a row or, if it is not `wide`, in two.
    static __device__ __forceinline__ PartOfQuad of_thread(bool wide) {
        constexpr int kInRow = kColumns / kQuad;  // of a tile
        const int thread = thread_computed_late(), quad = thread / kSharers;
        int row = quad / kInRow, column = quad % kInRow;
        if (!wide) {  // two warps have two rows
            row = quad / (2 * kInRow) * 2 + quad / (kInRow / 2) % 2;
            column = quad / kInRow % 2 * (kInRow / 2) + quad % (kInRow / 2);
        }
        return {row * kQuad, column * kQuad, thread / 2 % 2, thread % 2};
    }

    // Units of channels come in pairs. A thread begins with this one of a pair, which it has in the end.
    __device__ __forceinline__ int unit() const { return half ^ parity; }

    // The halves go from the outermost row of sources inwards. This is number y of a tile's halo.
    template <int K>
    __device__ __forceinline__ int source_row(int y) const {
        return row + (half == 0 ? y : K - y);
    }
};

__device__ __forceinline__ void add_products(float weight, float value, float& sum) { sum += weight * value; }

// The masks of a part of a quad, in registers.
template <int K>
struct MasksOfQuad {
    static constexpr int kHalf = (K + 1) / 2;  // rows of sources
    static constexpr int kSourceRows = kRows + K - 1, kGradRows = kUp * kSourceRows;
    static constexpr int kStagedRows = (kSourceRows + 1) / 2;  // at once
    static constexpr int kStaged = kStagedRows * kInRow * K * K * kOutputs;

    // [row of sources][row of the quad, the half's own one first][column of the quad][column of taps][output]
    float of[kHalf][kQuad][kQuad][K][kUp];

    // Stages the masks of a tile and takes those of the thread. Ends with a barrier.
    template <class T>
    __device__ __forceinline__ void take(const Problem& p, const TileOfItem& tile, const PartOfQuad& own,
                                         float* staged) {
#pragma unroll
        for (int k = 0; k < static_cast<int>(sizeof of / sizeof(float)); k++) (&of[0][0][0][0][0])[k] = 0;
        const int top = tile.top - K / 2, left = tile.left - kBefore;
#pragma unroll 1
        for (int end = kStagedRows; end < kSourceRows + kStagedRows; end += kStagedRows) {
            const int first = max(end - kStagedRows, -top);  // row of the halo
            const int rows = end - first;
            stage_sources<K, T, kBlock, 1>(p, tile.n, tile.group, top + first, left, kInRow, staged, rows);
            clear_cropped_masks<K>(p, top + first, left, rows, staged);
#pragma unroll
            for (int y = 0; y < kHalf; y++) {
                const int row = own.source_row<K>(y) - first;
                if (row < 0 || row >= rows) continue;
                const float* const of_row = staged + (row * kInRow + own.column) * K * K * kOutputs + own.parity * kUp;
#pragma unroll
                for (int o = 0; o < kQuad; o++) {
                    const int a = (own.half == 0 ? K - 1 - y : y) + (own.half == 0 ? o : -o);
                    for_each_pair(y, o, [&](int q, int x, int b) {
                        const float2 pair = *reinterpret_cast<const float2*>(of_row + ((x * K + a) * K + b) * kOutputs);
                        of[y][o][q][b][0] = pair.x;
                        of[y][o][q][b][1] = pair.y;
                    });
                }
            }
            __syncthreads();
        }
    }

    // Adds the products of the gradients of an output: of column s of source x, in row y of sources.
    template <class V>
    __device__ __forceinline__ void add(int y, int x, int s, V grad, V (&sums)[kQuad][kQuad]) const {
#pragma unroll
        for (int o = 0; o < kQuad; o++) {
            for_each_pair(y, o, [&](int q, int source, int b) {
                if (source == x) add_products(of[y][o][q][b][s], grad, sums[o][q]);
            });
        }
    }

private:
    // Calls f(q, x, b) for the sources x of row y whose tap b in a row is pixel q of row o of the quad.
    template <class F>
    static __device__ __forceinline__ void for_each_pair(int y, int o, F f) {
        if (o > y) return;
#pragma unroll
        for (int q = 0; q < kQuad; q++) {
#pragma unroll
            for (int b = 0; b < K; b++) f(q, q + kBefore + K / 2 - b, b);
        }
    }
};

// value of the thread whose number differs in a bit.
__device__ __forceinline__ float of_other(float value, int bit) { return __shfl_xor_sync(0xffffffffu, value, bit); }
__device__ __forceinline__ float4 of_other(float4 value, int bit) {
    return make_float4(of_other(value.x, bit), of_other(value.y, bit), of_other(value.z, bit), of_other(value.w, bit));
}
__device__ __forceinline__ float sum_of(float a, float b) { return a + b; }
__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Has any thread of a warp something to store? After a vote the compiler knows that the warp does not part.
__device__ __forceinline__ bool warp_has(bool some) { return __any_sync(0xffffffffu, some) != 0; }

// Adds the sums of the four threads of a quad. A thread has sums[unit][row, its half's own first][column] of pairs of
// units, its own first. It gets its own row and unit of each.
template <int Units, class V>
__device__ __forceinline__ void add_sums(const V (&sums)[Units][kQuad][kQuad], V (&results)[Units / 2][kQuad]) {
    constexpr int kOtherParity = 1, kOtherHalf = 2;  // bits of a thread's number
#pragma unroll
    for (int u = 0; u < Units; u += 2) {
#pragma unroll
        for (int q = 0; q < kQuad; q++) {
            const V mine = sum_of(sums[u][0][q], of_other(sums[u + 1][1][q], kOtherHalf));
            const V others = sum_of(sums[u + 1][0][q], of_other(sums[u][1][q], kOtherHalf));
            results[u / 2][q] = sum_of(mine, of_other(others, kOtherParity));
        }
    }
}

}  // namespace carafepp::cuda
