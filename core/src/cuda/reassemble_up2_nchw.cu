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
constexpr int kRowsOfWarp = 4, kChannelsAtOnce = 32 / (kRowsOfWarp * kPairsInRow);  // of a warp

// A tile's masks, and its features as [channel][row][column]. Neighbouring channels are in different banks.
template <int K, class T>
struct Staged {
    static constexpr int kMasks = kRows * kColumns * K * K * kOutputs;
    static constexpr int kChannel = 144;
    static_assert(kChannel >= (kRows + K - 1) * kWidth && kChannel % 32 == 16);
    static constexpr int64_t kBytes = kMasks * int64_t{sizeof(float)} +
                                      kChannelsOfSlice * kChannel * int64_t{sizeof(T)};
    template <int Count>
    using Features = HaloOfColumns<K, kRows, kBlock, kChannel, Count, T>;
};

struct ReassembleUp2NchwPlan {
    Tiles tiles;
    bool pairs;  // of columns are copied at once

    explicit ReassembleUp2NchwPlan(const Problem& p)
        : tiles(tiles_of_up2(p, kRows)), pairs(not_for_columns(p.features) == nullptr) {}
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
    using S = Staged<K, T>;
    constexpr int kTaps = K * K;
    float* const masks = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(masks + S::kMasks);  // [channel][row][column]
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        // A quarter of a warp has a row in two channels, which have the same masks. Half of it has a row and the one
        // after the next: their features, and those of two channels, are in different banks.
        const int thread = thread_computed_late(), warp = thread / 32, lane = thread % 32;
        const int row = warp % (kRows / kRowsOfWarp) * kRowsOfWarp + lane / (2 * kPairsInRow) % 2 * 2 + lane / 16;
        const int column = lane % kPairsInRow * kSourcesOfThread;
        const int own = warp / (kRows / kRowsOfWarp) * (kChannelsAtOnce * kChannelsOfThread) +
                        lane / kPairsInRow % kChannelsAtOnce;  // channel, and every other one
        const TileOfItem tile(p, plan.tiles, item);
        const int i = tile.top + row, j = tile.left + column;
        typename S::template Features<2> pairs(p, tile);
        const auto copy = [&](int channels) {
            if (plan.pairs) {
                pairs.copy(p.features, channels, features);
            } else {
                typename S::template Features<1> columns(p, tile);
                columns.from += (tile.channels - channels) * p.features.stride_c;
                columns.copy(p.features, channels, features);
            }
        };
        copy(tile.channels);
        stage_sources<K, T, kBlock>(p, tile.n, tile.group, tile.top, tile.left, kColumns, masks, kRows);
        clear_staged_outside<K, kBlock>(p, tile.left, kColumns, masks, kRows);
        const int a_begin = max(K / 2 - i, 0), a_end = min(K, static_cast<int>(p.features.h) + K / 2 - i);
        T* to = element<T>(output, tile.n, tile.c + own, int64_t{i} * kUp, int64_t{j} * kUp);  // [C, H', W']
        const int out_columns = static_cast<int>(
            min(int64_t{kSourcesOfThread * kUp}, p.out_w - j * kUp));  // that exist
        const int out_rows = out_columns > 0 ? static_cast<int>(min(int64_t{kUp}, p.out_h - i * kUp)) : 0;
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
                        const float2 columns = staged_columns(pixels + q * kChannelsAtOnce * S::kChannel + x);
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
#pragma unroll
            for (int r = 0; r < kUp; r++) {
                T* outputs = to + r * output.stride_h;
                const int own_channels = r < out_rows ? channels - own : 0;  // that exist
#pragma unroll
                for (int q = 0; q < kChannelsOfThread; q++, outputs += kChannelsAtOnce * output.stride_c) {
                    const bool exist = q * kChannelsAtOnce < own_channels;
                    if constexpr (Fours) {
                        if (exist) {
                            store_four(make_float2(sums[q][0][r * kUp], sums[q][0][r * kUp + 1]),
                                       make_float2(sums[q][1][r * kUp], sums[q][1][r * kUp + 1]), outputs);
                        }
                    } else {
#pragma unroll
                        for (int x = 0; x < kSourcesOfThread * kUp; x++) {
                            if (exist && x < out_columns) outputs[x] = narrow<T>(sums[q][x / kUp][r * kUp + x % kUp]);
                        }
                    }
                }
            }
            to += kChannelsOfSlice * output.stride_c;
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
               plan.tiles.items, kBlock, Staged<k, T>::kBytes, p, output, plan);
    });
}

}  // namespace carafepp::cuda
