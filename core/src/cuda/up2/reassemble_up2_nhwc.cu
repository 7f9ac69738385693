// SPDX-License-Identifier: Apache-2.0
// The forward for up x2 with adjacent channels. A block has a tile of sources, whose masks it stages once as
// [source][tap][output]. It goes through the channels a slice at a time: it copies the slice's features, with their
// halo, into shared memory and contracts them. A thread has two sources in some vectors of channels. It sums their
// eight outputs in registers: a feature serves both sources, and a vector of masks four outputs.
#include "cuda/channels.h"
#include "cuda/up2/tile_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kSourcesOfThread = 2;  // neighbours in a row
constexpr int kBlocks = 3;           // of a multiprocessor
// The same of 7 x 7 taps: compilers for newer devices than sm_90 need more registers than a third leaves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 900
constexpr int kBlocksOf7 = 2;
#else
constexpr int kBlocksOf7 = kBlocks;
#endif

// A tile's masks and features of kernel size K, and the threads that compute it.
template <int K, class T>
struct Staged {
    static constexpr int kRows = K < 7 ? 8 : 4;                           // of sources: shared memory holds their masks
    static constexpr int kVectors = K < 7 ? 2 : 1;                        // of a thread
    static constexpr int kLanes = kChannelsOfSlice / kVector / kVectors;  // threads along channels
    static constexpr int kThreads = kLanes * kColumns / kSourcesOfThread * kRows;
    static constexpr int kWidth = kColumns + K - 1, kMasks = kRows * kColumns * K * K * kOutputs;
    using Features = Halo<K, kRows, kWidth, kThreads, kVector, T>;

    // Neighbouring pairs of columns have the same channels in different banks.
    static __device__ __forceinline__ int swizzle(int column) { return column / kSourcesOfThread % kVectors * kLanes; }
};

template <int K, class T>
__global__ void __launch_bounds__(Staged<K, T>::kThreads, K < 7 ? kBlocks : kBlocksOf7)
    reassemble_up2_nhwc_kernel(Arguments arguments, SharedTiles plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Staged<K, T>;
    constexpr int kTaps = K * K, kPixel = kChannelsOfSlice;
    float* const masks = shared_memory<float>();                  // [row][column][tap][output]
    T* const features = reinterpret_cast<T*>(masks + S::kMasks);  // [row][column][channel]
    for (TilesOfBlock tiles; tiles.exist(plan);) {
        const int thread = thread_computed_late();
        const int lane = thread % S::kLanes, pair = thread / S::kLanes;
        const int row = pair / (kColumns / kSourcesOfThread),
                  column = pair % (kColumns / kSourcesOfThread) * kSourcesOfThread;
        const TileOfItem tile = tiles.take(p, plan);
        const int i = tile.top + row, j = tile.left + column;
        typename S::Features halo(p, tile, S::swizzle);
        halo.copy(p.features, tile.channels, features);
        stage_sources<K, T, S::kThreads>(p, tile.n, tile.group, tile.top, tile.left, kColumns, masks, S::kRows);
        clear_staged_outside<K, S::kThreads>(p, tile.left, kColumns, masks, S::kRows);
        const int out_rows = static_cast<int>(min(int64_t{kUp}, p.out_h - i * kUp));  // that exist
        const int a_begin = max(K / 2 - i, 0);
        const int a_end = out_rows > 0 ? min(K, static_cast<int>(p.features.h) + K / 2 - i) : 0;
        const float4* const first_weights = reinterpret_cast<const float4*>(masks) + (row * kColumns + column) * kTaps +
                                            a_begin * K;
        const T* first_pixels[S::kVectors];  // this thread's vectors in its first two columns, and in every other two
#pragma unroll
        for (int v = 0; v < S::kVectors; v++) {
            first_pixels[v] = features + ((row + a_begin) * S::kWidth + column) * kPixel +
                              (lane ^ S::swizzle(column + v * kSourcesOfThread)) * kVector;
        }
        T* to = element<T>(output, tile.n, tile.c + lane * kVector, int64_t{i} * kUp, int64_t{j} * kUp);  // [H', W', C]
        const int out_columns = static_cast<int>(min(int64_t{kSourcesOfThread * kUp}, p.out_w - j * kUp));
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannelsOfSlice) {
            wait_for_copies();
            __syncthreads();
            float4 sums[kSourcesOfThread][kOutputs][S::kVectors];
            const float4* weights = first_weights;
            const T* pixels[S::kVectors];
#pragma unroll
            for (int v = 0; v < S::kVectors; v++) pixels[v] = first_pixels[v];
            const auto add_row = [&](auto is_first) {  // the first row of taps begins the sums
#pragma unroll
                for (int x = 0; x < K + kSourcesOfThread - 1; x++) {
                    float4 feature[S::kVectors];
#pragma unroll
                    for (int v = 0; v < S::kVectors; v++) {
                        feature[v] = staged_channels(pixels[(v + x / kSourcesOfThread) % S::kVectors] + x * kPixel);
                    }
#pragma unroll
                    for (int s = 0; s < kSourcesOfThread; s++) {
                        if (x - s < 0 || x - s >= K) continue;
                        const float4 weight = weights[s * kTaps + x - s];
#pragma unroll
                        for (int v = 0; v < S::kVectors; v++) {
                            if (decltype(is_first)::value && x == s) {
#pragma unroll
                                for (auto& of_output : sums[s]) of_output[v] = make_float4(0, 0, 0, 0);
                            }
                            add_products(weight.x, feature[v], sums[s][0][v]);
                            add_products(weight.y, feature[v], sums[s][1][v]);
                            add_products(weight.z, feature[v], sums[s][2][v]);
                            add_products(weight.w, feature[v], sums[s][3][v]);
                        }
                    }
                }
                weights += K;
#pragma unroll
                for (int v = 0; v < S::kVectors; v++) pixels[v] += S::kWidth * kPixel;
            };
            if (a_begin < a_end) add_row(std::true_type());
#pragma unroll 1
            for (int a = a_begin + 1; a < a_end; a++) add_row(std::false_type());
            __syncthreads();
            if (channels > kChannelsOfSlice) halo.copy(p.features, channels - kChannelsOfSlice, features);
            const auto store = [&](int own_channels) {  // that exist, from this thread's first one on
#pragma unroll
                for (int r = 0; r < kUp; r++) {
                    if (r >= out_rows) break;
                    T* pixel = to + r * output.stride_h;
#pragma unroll
                    for (int q = 0; q < kSourcesOfThread * kUp; q++, pixel += output.stride_w) {
                        if (q >= out_columns) break;
#pragma unroll
                        for (int v = 0; v < S::kVectors; v++) {
                            const int channel = v * S::kLanes * kVector;
                            if (channel < own_channels)
                                store_channels(sums[q / kUp][r * kUp + q % kUp][v], pixel + channel);
                        }
                    }
                }
            };
            if (channels >= kChannelsOfSlice) {
                store(kChannelsOfSlice);
            } else {
                store(channels - lane * kVector);
            }
            to += kChannelsOfSlice;
        }
    }
}

}  // namespace

const char* cannot_run_reassemble_up2_nhwc(const Problem& p, const Array& output) {
    const bool floats = p.features.dtype == CARAFEPP_FLOAT32;  // tensor cores are faster at 7 x 7 products of 16 bits
    if (const char* reason = not_for_up2(p, floats ? 7 : 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    if (const char* reason = not_for_vectors(p, output)) return reason;
    return tiles_too_many(p);
}

void reassemble_up2_nhwc(const Problem& p, const Array& output) {
    with_kernel_size<sizeof(float), 3, 5, 7>(p, [&](auto k, auto feature) {
        using S = Staged<k, decltype(feature)>;
        if constexpr (k <= 5 || sizeof(feature) == sizeof(float)) {
            const SharedTiles plan = tiles_of_up2(p, S::kRows, kColumns, kBlocks);
            launch(reassemble_up2_nhwc_kernel<k, decltype(feature)>, plan.blocks, S::kThreads,
                   S::kMasks * int64_t{sizeof(float)} + S::Features::kElements * int64_t{sizeof(feature)}, p, output,
                   plan);
        }
    });
}

}  // namespace carafepp::cuda
