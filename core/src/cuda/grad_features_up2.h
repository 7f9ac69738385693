// SPDX-License-Identifier: Apache-2.0
// The gradients of features for up x2, in gather form. A block goes down the rows of some columns of sources; a thread
// has four channels of two columns. It sums in registers for all K rows that the windows of a row of sources reach. The
// uppermost of them is then complete. Masks are staged for several rows at once, so that all threads normalise them.
#pragma once

#include "cuda/channels.h"
#include "cuda/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kColumnsOfThread = 2;
constexpr int kFewestRows = 4;          // that a block goes down
constexpr int64_t kEnoughBlocks = 256;  // that keep all multiprocessors busy

struct GradFeaturesUp2Plan {
    int lanes, columns;        // of a block: threads along channels, columns of sources
    int rows, staged_rows;     // of a block, those whose masks are staged at once
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t channel_blocks;    // of a group
    int64_t items;
    int64_t shared_bytes;

    GradFeaturesUp2Plan(const Problem& p, int k, int most_lanes, int most_rows) {
        const int64_t channels = p.features.c / p.groups;
        const Lanes block(channels, kColumnsOfThread, k * k * kBytesOfTap, k - 1, most_lanes);
        lanes = block.lanes;
        columns = block.columns;
        tiles = ceil_div(p.features.w, columns);
        channel_blocks = ceil_div(channels, lanes * kVector);
        const int64_t of_row = p.features.n * p.groups * tiles * channel_blocks;
        rows = most_rows;
        while (rows > kFewestRows && of_row * ceil_div(p.features.h, rows) < kEnoughBlocks) rows--;
        tile_rows = ceil_div(p.features.h, rows);
        items = of_row * tile_rows;
        const int fit = static_cast<int>(kSharedBytes / block.shared_bytes), all = rows + k - 1;
        staged_rows = static_cast<int>(ceil_div(all, ceil_div(all, fit)));
        shared_bytes = staged_rows * block.shared_bytes;
    }
};

// The part of an item that a thread has: two columns in four channels.
struct ColumnsOfThread {
    int64_t n, group;
    int64_t in_group, c;  // first channel, of the group and of all
    int top, first, own;  // row and column of the block, column in the block
    int channels;         // none if the thread has no columns

    __device__ __forceinline__ ColumnsOfThread(const Problem& p, const GradFeaturesUp2Plan& plan, int64_t item,
                                               int lane, int pair) {
        const Quotient channel_block = divide(item, computed_late(plan.channel_blocks)),
                       tile = divide(channel_block.quotient, computed_late(plan.tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.tile_rows)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        n = image.quotient;
        group = image.remainder;
        in_group = (channel_block.remainder * plan.lanes + lane) * kVector;
        c = group * (p.features.c / p.groups) + in_group;
        top = static_cast<int>(tile_row.remainder) * plan.rows;
        first = static_cast<int>(tile.remainder) * plan.columns;
        own = pair * kColumnsOfThread;
        const int64_t left = p.features.c / p.groups - in_group;
        channels = first + own < p.features.w ? static_cast<int>(min(left, int64_t{kVector})) : 0;
    }
};

// Which outputs of a row exist, a bit each: those from column `out_left` on that reach a thread's columns.
template <int K>
__device__ __forceinline__ unsigned outputs_that_exist(const Problem& p, int out_left) {
    unsigned exist = 0;
#pragma unroll
    for (int x = 0; x < kUp * (K + kColumnsOfThread - 1); x++) {
        if (out_left + x >= 0 && out_left + x < p.out_w) exist |= 1u << x;
    }
    return exist;
}

// Clears the masks of outputs that a crop leaves out, as the gradient is 0 there, in a block of kThreads. Ends with a
// barrier.
template <int K>
__device__ void clear_cropped_masks(const Problem& p, int i, int first, int sources, float* staged, int rows = 1) {
    if ((i + rows) * kUp <= p.out_h && (first + sources) * kUp <= p.out_w) return;
    for (int k = static_cast<int>(threadIdx.x); k < rows * sources * K * K * kOutputs; k += kThreads) {
        const int output = k % kOutputs, source = k / (K * K * kOutputs);
        const int row = rows == 1 ? 0 : source / sources, column = source - row * sources;
        if ((i + row) * kUp + output / kUp >= p.out_h || (first + column) * kUp + output % kUp >= p.out_w)
            staged[k] = 0;
    }
    __syncthreads();
}

// sums[a][column] += the products of a row of sources, for the rows a of [a_begin, a_end). `weights` are the masks of
// its first source, K/2 to the left of column 0. load(x, grads) loads the gradients of `AtOnce` sources, from source x
// on.
template <int K, int AtOnce, class Load>
__device__ __forceinline__ void add_row(const float4* weights, int a_begin, int a_end, Load load,
                                        float4 (&sums)[K][kColumnsOfThread]) {
    constexpr int kTaps = K * K;
#pragma unroll
    for (int x = 0; x < K + kColumnsOfThread - 1; x += AtOnce) {
        float4 grads[AtOnce][kOutputs];
        load(x, grads);
#pragma unroll
        for (int a = 0; a < K; a++) {
            if (a < a_begin || a >= a_end) continue;
#pragma unroll
            for (int q = 0; q < AtOnce; q++) {
#pragma unroll
                for (int s = 0; s < kColumnsOfThread; s++) {
                    const int b = s - x - q + K - 1;  // the tap that leads from this source to the column
                    if (b < 0 || b >= K) continue;
                    const float4 weight = weights[(x + q) * kTaps + a * K + b];
                    add_products(weight.x, grads[q][0], sums[a][s]);
                    add_products(weight.y, grads[q][1], sums[a][s]);
                    add_products(weight.z, grads[q][2], sums[a][s]);
                    add_products(weight.w, grads[q][3], sums[a][s]);
                }
            }
        }
    }
}

// Goes down the rows of a block. load(i, x, grads) loads from row i of sources as add_row asks. When a row of results
// is complete, store(row, sums) gets it, with a sum for each column.
template <int K, int AtOnce, class T, class Load, class Store>
__device__ __forceinline__ void go_down(const Problem& p, const GradFeaturesUp2Plan& plan, int64_t item,
                                        const ColumnsOfThread& at, Load load, Store store) {
    constexpr int kTaps = K * K, kRadius = K / 2;
    float* const staged = shared_memory<float>();  // [row][source][tap][output]
    const int height = static_cast<int>(p.features.h), sources = plan.columns + K - 1;
    const int end = min(at.top + plan.rows, height) + kRadius;
    const int grads_end = p.out_w == 0 ? 0 : static_cast<int>(min(ceil_div(p.out_h, kUp), int64_t{min(end, height)}));
    float4 sums[K][kColumnsOfThread] = {};  // of rows i - K / 2 and on
    for (int staged_row = max(at.top - kRadius, 0); staged_row < end; staged_row += plan.staged_rows) {
        if (staged_row < grads_end) {
            const ColumnsOfThread block(p, plan, computed_late(item), 0, 0);
            const int left = block.first - kRadius;
            with_masks<T>(p.from_logits ? p.logits : p.masks, [&](auto mask) {
#pragma unroll 1
                for (int row = 0; row < plan.staged_rows; row++) {
                    copy_sources<K, kThreads, decltype(mask)>(p, block.n, block.group, staged_row + row, left, 1,
                                                              sources, staged + row * sources * kTaps * kOutputs);
                }
            });
            finish_sources<K>(p, plan.staged_rows * sources, staged);
            clear_cropped_masks<K>(p, staged_row, left, sources, staged, plan.staged_rows);
        }
        const float4* weights = reinterpret_cast<const float4*>(staged) + at.own * kTaps;
#pragma unroll 1
        for (int i = staged_row; i < min(staged_row + plan.staged_rows, end); i++, weights += sources * kTaps) {
            if (at.channels > 0) {
                if (i < grads_end) {
                    const int a_begin = max(at.top + kRadius - i, 0), a_end = min(end - i, K);
                    add_row<K, AtOnce>(weights, a_begin, a_end, [&](int x, auto& grads) { load(i, x, grads); }, sums);
                }
                if (i >= at.top + kRadius) store(i - kRadius, sums[0]);
            }
#pragma unroll
            for (int s = 0; s < kColumnsOfThread; s++) {
#pragma unroll
                for (int a = 0; a < K; a++) sums[a][s] = a + 1 < K ? sums[a + 1][s] : make_float4(0, 0, 0, 0);
            }
        }
        __syncthreads();
    }
}

}  // namespace carafepp::cuda
