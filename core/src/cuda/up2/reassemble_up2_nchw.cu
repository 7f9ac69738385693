// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent columns. A block has a tile of sources, whose masks it stages once as
// [source][tap][output]. It goes through the channels a slice at a time: it copies the slice's features, with their
// halo, into shared memory and contracts them. A thread has two sources in some channels. It sums their eight outputs
// in registers: a feature serves both sources, and a vector of masks four outputs and all channels. From sm_90 on a box
// of float32 features is copied at once, where a tensor map can describe it. There small maps, such as those of
// 14 x 14, have wider tiles. Rows of a box begin with a vector, so the first tile has columns that do not exist.
#include "cuda/columns.h"
#include "cuda/tensor_map.h"
#include "cuda/up2/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSourcesOfThread = 2;  // neighbours in a row
constexpr int kChannelsOfThread = 8, kGroups = kChannelsOfSlice / kChannelsOfThread;
constexpr int kMostColumns = 14;    // of a wider tile
constexpr int kChannelsAtOnce = 2;  // of a warp if tiles are not wide

// How columns are copied: singly; in pairs, with outputs stored in fours; or as boxes, with outputs in fours. Wide
// tiles have pairs.
enum Columns { kSingle, kVectors, kBoxes, kSmallMaps };

// Neighbouring channels of a thread are so many apart.
template <int How>
constexpr int kApart = How == kSmallMaps ? kGroups : kChannelsAtOnce;

// Columns that a thread copies at once.
template <int How>
constexpr int kCopied = How == kSingle ? 1 : 2;

// A tile's masks, and its features as [channel][row][column]. Tiles of 7 x 7 taps are flat: a row of their pairs in two
// channels is in all banks.
template <int K, int How, class T>
struct Staged {
    static constexpr int kRows = K < 7 ? 8 : 4;
    static constexpr int kColumnsOfTile = How == kSmallMaps ? kMostColumns : K < 7 ? kColumns : 2 * kColumns;
    static constexpr int kBefore = K < 7 ? 2 : kVector;                    // columns of a halo
    static constexpr int kOutside = How == kBoxes && K < 7 ? kBefore : 0;  // columns of the first tile
    static constexpr int kPairsInRow = kColumnsOfTile / kSourcesOfThread;
    // Registers are given to four warps at once; some threads of wide tiles have no sources, and copy like others.
    static constexpr int kThreads = static_cast<int>(ceil_div(kRows * kPairsInRow * kGroups, 128)) * 128;
    static constexpr int kWidth = K < 7 ? kBefore + kColumnsOfTile + 2 : 24;
    static constexpr int kMasks = kRows * kColumnsOfTile * K * K * kOutputs;
    static constexpr int kBoxRows = K < 7 ? 12 : 10, kChannel = kBoxRows * kWidth;
    static_assert(kBoxRows >= kRows + K - 1 && kChannel % 32 == (How == kSmallMaps ? 24 : 16));
    static_assert(How != kBoxes || ((kBefore + kOutside) % kVector == 0 && kColumnsOfTile % kVector == 0));
    using Features = HaloOfColumns<kRows + K - 1, kWidth, kBefore, kChannel, kThreads, T>;
    static constexpr int kBlocks = How == kSmallMaps || K == 7 ? 2 : How == kBoxes ? 4 : 3;  // of a multiprocessor
    static constexpr int64_t kBytes = kMasks * int64_t{sizeof(float)} + Features::kElements * int64_t{sizeof(T)} +
                                      int64_t{sizeof(uint64_t)};  // and a barrier
};

struct ReassembleUp2NchwPlan {
    SharedTiles tiles;
    CUtensorMap boxes;  // of the features of a slice
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

// sums[channel][source][output] += masks * features, of a row of taps.
template <int K, int How, class T>
__device__ __forceinline__ void add_row(const float4* weights, const T* pixels,
                                        float (&sums)[kChannelsOfThread][kSourcesOfThread][kOutputs]) {
    using S = Staged<K, How, T>;
#pragma unroll
    for (int x = 0; x < S::kBefore + kSourcesOfThread + K / 2; x += 2) {
        float2 columns[kChannelsOfThread];
#pragma unroll
        for (int q = 0; q < kChannelsOfThread; q++)
            columns[q] = staged_columns(pixels + q * kApart<How> * S::kChannel + x);
#pragma unroll
        for (int k = 0; k < 2 * kSourcesOfThread; k++) {
            const int s = k % kSourcesOfThread, b = x + k / kSourcesOfThread - s - (S::kBefore - K / 2);
            if (b < 0 || b >= K) continue;
            const float4 weight = weights[s * K * K + b];
#pragma unroll
            for (int q = 0; q < kChannelsOfThread; q++) {
                const float feature = k < kSourcesOfThread ? columns[q].x : columns[q].y;
                sums[q][s][0] += weight.x * feature;
                sums[q][s][1] += weight.y * feature;
                sums[q][s][2] += weight.z * feature;
                sums[q][s][3] += weight.w * feature;
            }
        }
    }
}

// The first source of a thread in its tile, and its first channel in each slice.
struct Own {
    int row, column, channel;
};

template <class S, int How>
__device__ __forceinline__ Own own_of(int thread) {
    constexpr int kPairsInRow = S::kPairsInRow;
    if constexpr (How == kSmallMaps) {
        // Eight neighbouring sources of a warp have four channels, which are in different banks.
        const int pair = thread / kGroups;
        return {pair / kPairsInRow, pair % kPairsInRow * kSourcesOfThread, thread % kGroups};
    } else {
        // Some neighbouring threads have a row in two channels, which have the same masks. Half of a warp has such a
        // row, or one and the one after the next: their features, and those of two channels, are in different banks.
        constexpr int kRowsOfWarp = 32 / (kPairsInRow * kChannelsAtOnce), kWarpsInColumn = S::kRows / kRowsOfWarp;
        const int warp = thread / 32, lane = thread % 32, row = lane / (kPairsInRow * kChannelsAtOnce);
        return {warp % kWarpsInColumn * kRowsOfWarp + (kRowsOfWarp == 4 ? row % 2 * 2 + row / 2 : row),
                lane % kPairsInRow * kSourcesOfThread,
                warp / kWarpsInColumn * (kChannelsAtOnce * kChannelsOfThread) + lane / kPairsInRow % kChannelsAtOnce};
    }
}

template <int K, int How, class T>
__device__ __forceinline__ void reassemble_items(const Problem& p, const Array& output,
                                                 const ReassembleUp2NchwPlan& plan) {
    using S = Staged<K, How, T>;
    constexpr int kTaps = K * K;
    float* const masks = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(masks + S::kMasks);  // [channel][row][column]
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(features + S::Features::kElements);
    unsigned phase = 0;
    if constexpr (How == kBoxes) {
        if (threadIdx.x == 0) begin_barrier(barrier);
        __syncthreads();
    }
    for (TilesOfBlock tiles; tiles.exist(plan.tiles);) {
        const Own own = own_of<S, How>(thread_computed_late());
        const TileOfItem tile = tiles.take(p, plan.tiles);
        const int i = tile.top + own.row, j = tile.left + own.column;
        typename S::Features halo;
        if constexpr (How != kBoxes) halo.template begin<kCopied<How>>(p, tile, K / 2);
        const auto copy = [&](int channels) {
            if constexpr (How != kBoxes) {
                halo.template copy<kCopied<How>>(p.features, channels, features);
            } else if (threadIdx.x == 0) {
                expect_bytes(barrier, S::Features::kElements * sizeof(T));
                copy_box(features, plan.boxes, tile.left - S::kBefore, tile.top - K / 2,
                         static_cast<int>(tile.c) + tile.channels - channels, static_cast<int>(tile.n), barrier);
            }
        };
        copy(tile.channels);
        const int rows = min(S::kRows, static_cast<int>(p.features.h) - tile.top);  // that exist
        stage_sources<K, T, S::kThreads>(p, tile.n, tile.group, tile.top, tile.left, S::kColumnsOfTile, masks, rows);
        clear_staged_outside<K, S::kThreads>(p, tile.left, S::kColumnsOfTile, masks, rows);
        const int a_begin = max(K / 2 - i, 0);
        const float4* const first_weights = reinterpret_cast<const float4*>(masks) +
                                            (own.row * S::kColumnsOfTile + own.column) * kTaps + a_begin * K;
        const T* const first_pixels = features + own.channel * S::kChannel + (own.row + a_begin) * S::kWidth +
                                      own.column;
        // This thread's columns of a row, of the next slice: [C, H', W'].
        T* to = element<T>(output, tile.n, tile.c + own.channel, int64_t{i} * kUp, int64_t{j} * kUp);
        const int channels_apart = static_cast<int>(output.stride_c);
        const int out_columns = static_cast<int>(
            min(int64_t{kSourcesOfThread * kUp}, p.out_w - j * kUp));  // that exist
        const bool has_outputs = own.row < S::kRows && j >= 0 && out_columns > 0;
        const int out_rows = has_outputs ? static_cast<int>(min(int64_t{kUp}, p.out_h - i * kUp)) : 0;
        // Rows of taps that exist, and of outputs, in one register; 0 if there are no outputs.
        const int rows_of_taps = min(K, static_cast<int>(p.features.h) + K / 2 - i) - a_begin;
        const int packed = out_rows > 0 ? rows_of_taps * kUp + out_rows - 1 : 0;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            if constexpr (How == kBoxes) {
                wait_for_phase(barrier, phase);
                phase ^= 1;
            } else {
                wait_for_copies();
                __syncthreads();
            }
            if (!__any_sync(0xffffffffu, packed > 0)) {  // this warp has no outputs
                sync_warps_of_block();
                if (channels > kChannelsOfSlice) copy(channels - kChannelsOfSlice);
                continue;
            }
            float sums[kChannelsOfThread][kSourcesOfThread][kOutputs] = {};
            const float4* weights = first_weights;
            const T* pixels = first_pixels;
            add_row<K, How>(weights, pixels, sums);  // by itself, so that no sum is set to 0 before
#pragma unroll 1
            for (int more = packed / kUp - 1; more > 0; more--) {
                weights += K;
                pixels += S::kWidth;
                add_row<K, How>(weights, pixels, sums);
            }
            sync_warps_of_block();
            if (channels > kChannelsOfSlice) copy(channels - kChannelsOfSlice);
            const auto store = [&](int own_channels) {  // that exist, from this thread's first one on
#pragma unroll
                for (int r = 0; r < kUp; r++) {
                    if (packed == 0 || r > packed % kUp) break;
                    T* const of_row = to + r * output.stride_h;
#pragma unroll
                    for (int q = 0; q < kChannelsOfThread; q++) {
                        T* const outputs = at_stride(of_row, channels_apart, q * kApart<How>);
                        if (q * kApart<How> >= own_channels) break;
                        if constexpr (How != kSingle) {
                            store_four(make_float2(sums[q][0][r * kUp], sums[q][0][r * kUp + 1]),
                                       make_float2(sums[q][1][r * kUp], sums[q][1][r * kUp + 1]), outputs);
                        } else {
#pragma unroll
                            for (int x = 0; x < kSourcesOfThread * kUp; x++) {
                                if (x < out_columns) outputs[x] = narrow<T>(sums[q][x / kUp][r * kUp + x % kUp]);
                            }
                        }
                    }
                }
            };
            if (How != kSingle && channels >= kChannelsOfSlice) {
                store(kChannelsOfSlice);
            } else {
                store(channels - own_of<S, How>(thread_computed_late()).channel);
            }
            to = at_stride(to, channels_apart, kChannelsOfSlice);
        }
    }
}

// Devices before sm_90 have no code for boxes, nor for wide tiles, for which their registers do not suffice.
template <int K, int How, class T>
__global__ void __launch_bounds__(Staged<K, How, T>::kThreads, Staged<K, How, T>::kBlocks)
    reassemble_up2_nchw_kernel(Arguments arguments, const __grid_constant__ ReassembleUp2NchwPlan plan) {
    if constexpr (How < kBoxes || kCopiesBoxes) reassemble_items<K, How, T>(arguments.problem, arguments.result, plan);
}

template <int K, int How, class T>
void launch_with(const Problem& p, const Array& output, const CUtensorMap& boxes) {
    using S = Staged<K, How, T>;
    static_assert(K == 7 || How == kSmallMaps || S::kBytes <= kMostAskedBytes);  // those ask the device
    const SharedTiles tiles = tiles_of_up2(p, S::kRows, S::kColumnsOfTile, S::kBlocks, S::kOutside);
    launch(reassemble_up2_nchw_kernel<K, How, T>, tiles.blocks, S::kThreads, S::kBytes, p, output,
           ReassembleUp2NchwPlan{tiles, boxes});
}

}  // namespace

const char* cannot_run_reassemble_up2_nchw(const Problem& p, const Array& output) {
    for (const Array* array : {&p.features, &output}) {
        if (const char* reason = channels_too_far_apart(*array)) return reason;
    }
    if (p.kernel_size == 7) {
        if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";  // tensor cores are faster
        if (const char* reason = not_for_columns(p.features)) return reason;
        if (const char* reason = not_for_columns(output, kSourcesOfThread * kUp)) return reason;
        if (const char* reason = not_for_shared_memory(Staged<7, kVectors, float>::kBytes)) return reason;
    }
    if (const char* reason = not_for_columns_of_up2(p, p.features, output, 7)) return reason;
    return tiles_too_many(p);
}

void reassemble_up2_nchw(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5, 7>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        CUtensorMap boxes{};
        if constexpr (sizeof(T) == sizeof(float)) {  // tensor cores have aligned columns of 16 bits
            using S = Staged<k, kBoxes, T>;
            if (not_for_columns(p.features, kCopied<kBoxes>) == nullptr &&
                not_for_columns(output, kSourcesOfThread * kUp) == nullptr) {
                if constexpr (k < 7) {
                    const auto columns = [&](int of_tile) { return ceil_div(p.features.w, of_tile) * of_tile; };
                    if (columns(kMostColumns) < columns(kColumns) &&
                        is_compiled_for(90, reassemble_up2_nchw_kernel<k, kSmallMaps, T>) &&
                        not_for_shared_memory(Staged<k, kSmallMaps, T>::kBytes) == nullptr)
                        return launch_with<k, kSmallMaps, T>(p, output, boxes);
                }
                if (is_compiled_for(90, reassemble_up2_nchw_kernel<k, kBoxes, T>) &&
                    describe_boxes_of_columns(p.features, S::kWidth, S::kBoxRows, kChannelsOfSlice, &boxes))
                    return launch_with<k, kBoxes, T>(p, output, boxes);
                return launch_with<k, kVectors, T>(p, output, boxes);
            }
        }
        if constexpr (k < 7) launch_with<k, kSingle, T>(p, output, boxes);
    });
}

}  // namespace carafepp::cuda
