// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns. A block has a tile of sources, whose masks it stages once as
// [source][tap][output]. It goes through the channels a slice at a time: it copies the slice's features, with their
// halo, into shared memory and contracts them. A thread has two sources in some channels. It sums their eight outputs
// in registers: a feature serves both sources, and a vector of masks four outputs and all channels. From sm_90 on a box
// of float32 features is copied at once, where a tensor map can describe it.
#include "cuda/columns.h"
#include "cuda/tensor_map.h"
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
    static constexpr int kBoxRows = 12, kChannel = kBoxRows * kWidth;
    static_assert(kBoxRows >= kRows + K - 1 && kChannel % 32 == 16);
    static constexpr int kFeatures = kChannelsOfSlice * kChannel;
    static constexpr int64_t kBytes = kMasks * int64_t{sizeof(float)} + kFeatures * int64_t{sizeof(T)} +
                                      int64_t{sizeof(uint64_t)};  // and a barrier
    template <int Count>
    using Features = HaloOfColumns<K, kRows, kBlock, kChannel, Count, T>;
};

struct ReassembleUp2NchwPlan {
    Tiles tiles;
    CUtensorMap boxes{};  // of the features of a slice

    explicit ReassembleUp2NchwPlan(const Problem& p) : tiles(tiles_of_up2(p, kRows)) {}
};

// How columns are copied: singly; in pairs, with outputs stored in fours; or as boxes, with outputs in fours.
enum Columns { kSingle, kVectors, kBoxes };

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

// sums[channel][source][output] += masks * features, of a row of taps.
template <int K, class T>
__device__ __forceinline__ void add_row(const float4* weights, const T* pixels,
                                        float (&sums)[kChannelsOfThread][kSourcesOfThread][kOutputs]) {
    float4 weight[kSourcesOfThread][K];
#pragma unroll
    for (int s = 0; s < kSourcesOfThread; s++) {
#pragma unroll
        for (int b = 0; b < K; b++) weight[s][b] = weights[s * K * K + b];
    }
#pragma unroll
    for (int q = 0; q < kChannelsOfThread; q++) {
        float feature[kBefore + kSourcesOfThread + 2];
#pragma unroll
        for (int x = 0; x < kBefore + kSourcesOfThread + 2; x += 2) {
            const float2 columns = staged_columns(pixels + q * kChannelsAtOnce * Staged<K, T>::kChannel + x);
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

template <int K, int How, class T>
__device__ __forceinline__ void reassemble_items(const Problem& p, const Array& output,
                                                 const ReassembleUp2NchwPlan& plan) {
    using S = Staged<K, T>;
    constexpr int kTaps = K * K;
    float* const masks = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(masks + S::kMasks);  // [channel][row][column]
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(features + S::kFeatures);
    unsigned phase = 0;
    if constexpr (How == kBoxes) {
        if (threadIdx.x == 0) begin_barrier(barrier);
        __syncthreads();
    }
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
        typename S::template Features<How == kSingle ? 1 : 2> halo(p, tile);
        const auto copy = [&](int channels) {
            if constexpr (How != kBoxes) {
                halo.copy(p.features, channels, features);
            } else if (threadIdx.x == 0) {
                expect_bytes(barrier, S::kFeatures * sizeof(T));
                copy_box(features, plan.boxes, tile.left - kBefore, tile.top - K / 2,
                         static_cast<int>(tile.c) + tile.channels - channels, static_cast<int>(tile.n), barrier);
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
            if constexpr (How == kBoxes) {
                wait_for_phase(barrier, phase);
                phase ^= 1;
            } else {
                wait_for_copies();
                __syncthreads();
            }
            float sums[kChannelsOfThread][kSourcesOfThread][kOutputs] = {};
            const float4* weights = reinterpret_cast<const float4*>(masks) + (row * kColumns + column) * kTaps +
                                    a_begin * K;
            const T* pixels = features + own * S::kChannel + (row + a_begin) * kWidth + column;
            add_row<K>(weights, pixels, sums);  // by itself, so that no sum is set to 0 before
#pragma unroll 1
            for (int a = a_begin + 1; a < a_end; a++) {
                weights += K;
                pixels += kWidth;
                add_row<K>(weights, pixels, sums);
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
                    if constexpr (How != kSingle) {
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

// Devices before sm_90 have no code for boxes.
template <int K, int How, class T>
__global__ void __launch_bounds__(kBlock, 3)
    reassemble_up2_nchw_kernel(Arguments arguments, const __grid_constant__ ReassembleUp2NchwPlan plan) {
    if constexpr (How != kBoxes || kCopiesBoxes) reassemble_items<K, How, T>(arguments.problem, arguments.result, plan);
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw(const Problem& p, const Array& output) {
    return not_for_columns_of_up2(p, p.features, output);
}

void reassemble_up2_nchw(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        using S = Staged<k, T>;
        ReassembleUp2NchwPlan plan(p);
        auto* kernel = reassemble_up2_nchw_kernel<k, kSingle, T>;
        if constexpr (sizeof(T) == sizeof(float)) {  // tensor cores have aligned columns of 16 bits
            if (not_for_columns(p.features) == nullptr && not_for_columns(output, 4) == nullptr) {
                const auto boxes = reassemble_up2_nchw_kernel<k, kBoxes, T>;
                kernel = is_compiled_for(90, boxes) && describe_boxes_of_columns(p.features, kWidth, S::kBoxRows,
                                                                                 kChannelsOfSlice, &plan.boxes)
                             ? boxes
                             : reassemble_up2_nchw_kernel<k, kVectors, T>;
            }
        }
        launch(kernel, plan.tiles.items, kBlock, S::kBytes, p, output, plan);
    });
}

}  // namespace carafepp::cuda
