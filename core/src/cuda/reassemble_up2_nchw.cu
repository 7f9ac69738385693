// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns. A block has a tile of sources, whose masks it stages once as
// [source][tap][output]. It goes through the channels a slice at a time: it copies the slice's features, with their
// halo, into shared memory and contracts them. A thread has two sources in some channels. It sums their eight outputs
// in registers: a feature serves both sources, and a vector of masks four outputs and all channels.
#include "cuda/columns.h"
#include "cuda/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kRows = 8;             // of a tile
constexpr int kSourcesOfThread = 2;  // neighbours in a row
constexpr int kPairsInRow = kColumns / kSourcesOfThread, kPairs = kRows * kPairsInRow;
constexpr int kChannelsOfThread = 8, kBlock = kPairs * kChannelsOfSlice / kChannelsOfThread;
static_assert(kPairs == 32, "a warp has all sources in the same channels");

// A tile's features: [channel][row][column].
template <int K>
struct Staged {
    static constexpr int kHeight = kRows + K - 1, kChannel = kHeight * kWidth;
    static constexpr int kMasks = kRows * kColumns * K * K * kOutputs;
};

struct ReassembleUp2NchwPlan {
    TileUp2Plan tiles;
    bool pairs;  // of columns are copied at once

    explicit ReassembleUp2NchwPlan(const Problem& p) : tiles(p, kRows), pairs(not_for_columns(p.features) == nullptr) {}
};

// Two columns in shared memory.
__device__ __forceinline__ float2 staged_columns(const float* from) { return *reinterpret_cast<const float2*>(from); }
template <class T>
__device__ __forceinline__ float2 staged_columns(const T* from) {
    return widen_pair<T>(*reinterpret_cast<const uint32_t*>(from));
}

// Four neighbouring outputs.
__device__ __forceinline__ void store_four(float2 left, float2 right, float* to) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(left.x, left.y, right.x, right.y));
}
template <class T>
__device__ __forceinline__ void store_four(float2 left, float2 right, T* to) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(pair_of<T>(left.x, left.y), pair_of<T>(right.x, right.y)));
}

// `Fours`: outputs are stored four at once.
template <int K, bool Fours, class T>
__global__ void __launch_bounds__(kBlock, 3)
    reassemble_up2_nchw_kernel(Arguments arguments, ReassembleUp2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Staged<K>;
    constexpr int kTaps = K * K;
    float* const masks = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(masks + S::kMasks);  // [channel][row][column]
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const int thread = thread_computed_late(), own = thread / kPairs * kChannelsOfThread;  // channel
        // Rows of the first half of a warp are even ones, whose features are in different banks.
        const int pair = thread % kPairs, row = pair / kPairsInRow % (kRows / 2) * 2 + pair / (kPairs / 2),
                  column = pair % kPairsInRow * kSourcesOfThread;
        const TileOfBlock tile(p, plan.tiles, item, kRows);
        const int i = tile.top + row, j = tile.left + column;
        const T* from = element<const T>(p.features, tile.n, tile.c, tile.top - K / 2, tile.left - kBefore);
        T* to = element<T>(output, tile.n, tile.c + own, int64_t{i} * kUp, int64_t{j} * kUp);  // [C, H', W']
        const auto copy = [&](int channels) {
            if (plan.pairs) {
                copy_rows<K, kRows, kBlock, 2>(p, from, tile, channels, S::kChannel, features);
            } else {
                copy_rows<K, kRows, kBlock, 1>(p, from, tile, channels, S::kChannel, features);
            }
            from += kChannelsOfSlice * p.features.stride_c;
        };
        copy(tile.channels);
        stage_sources<K, T, kBlock>(p, tile.n, tile.group, tile.top, tile.left, kColumns, masks, kRows);
        clear_staged_outside<K, kBlock>(p, tile.left, kColumns, masks, kRows);
        const int a_begin = max(K / 2 - i, 0), a_end = min(K, static_cast<int>(p.features.h) + K / 2 - i);
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            wait_for_copies();
            __syncthreads();
            float sums[kChannelsOfThread][kSourcesOfThread][kOutputs] = {};
            const float4* weights = reinterpret_cast<const float4*>(masks) + (row * kColumns + column) * kTaps +
                                    a_begin * K;
            const T* pixels = features + own * S::kChannel + (row + a_begin) * kWidth + column;
#pragma unroll 1
            for (int a = a_begin; a < a_end; a++, weights += K, pixels += kWidth) {
                float4 weight[kSourcesOfThread][K];
#pragma unroll
                for (int s = 0; s < kSourcesOfThread; s++) {
#pragma unroll
                    for (int b = 0; b < K; b++) weight[s][b] = weights[s * kTaps + b];
                }
#pragma unroll
                for (int q = 0; q < kChannelsOfThread; q++) {
                    float feature[kBefore + kSourcesOfThread + 2];
#pragma unroll
                    for (int x = 0; x < kBefore + kSourcesOfThread + 2; x += 2) {
                        const float2 columns = staged_columns(pixels + q * S::kChannel + x);
                        feature[x] = columns.x;
                        feature[x + 1] = columns.y;
                    }
#pragma unroll
                    for (int s = 0; s < kSourcesOfThread; s++) {
#pragma unroll
                        for (int b = 0; b < K; b++) {
                            const float own_feature = feature[kBefore - K / 2 + s + b];
                            sums[q][s][0] += weight[s][b].x * own_feature;
                            sums[q][s][1] += weight[s][b].y * own_feature;
                            sums[q][s][2] += weight[s][b].z * own_feature;
                            sums[q][s][3] += weight[s][b].w * own_feature;
                        }
                    }
                }
            }
            __syncthreads();
            if (channels > kChannelsOfSlice) copy(channels - kChannelsOfSlice);
            T* channel = to;
            to += kChannelsOfSlice * output.stride_c;
#pragma unroll
            for (int q = 0; q < kChannelsOfThread; q++, channel += output.stride_c) {
#pragma unroll
                for (int r = 0; r < kUp; r++) {
                    if (own + q >= channels || i * kUp + r >= p.out_h) continue;
                    T* const outputs = channel + r * output.stride_h;
                    if constexpr (Fours) {
                        if (j * kUp < p.out_w) {
                            store_four(make_float2(sums[q][0][r * kUp], sums[q][0][r * kUp + 1]),
                                       make_float2(sums[q][1][r * kUp], sums[q][1][r * kUp + 1]), outputs);
                        }
                    } else {
#pragma unroll
                        for (int x = 0; x < kSourcesOfThread * kUp; x++) {
                            if (j * kUp + x < p.out_w) outputs[x] = narrow<T>(sums[q][x / kUp][r * kUp + x % kUp]);
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw(const Problem& p, const Array& output) {
    return not_for_columns_of_up2(p, p.features, output);
}

void reassemble_up2_nchw(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const ReassembleUp2NchwPlan plan(p);
        const bool fours = not_for_columns(output, 4) == nullptr;
        launch(fours ? reassemble_up2_nchw_kernel<k, true, T> : reassemble_up2_nchw_kernel<k, false, T>,
               plan.tiles.items, kBlock,
               Staged<k>::kMasks * int64_t{sizeof(float)} + kChannelsOfSlice * Staged<k>::kChannel * int64_t{sizeof(T)},
               p, output, plan);
    });
}

}  // namespace carafepp::cuda
