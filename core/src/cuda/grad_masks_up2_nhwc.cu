// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent channels. A block has a tile of 8 x 4 sources. It transposes
// features and gradients into shared memory, 16 channels at a time, so that pixels are adjacent. A thread contracts the
// window of a source with its four outputs, with all sums in registers. Then the warps' sums are added and carried
// through the normaliser. Adjacent taps leave together by way of shared memory.
#include "cuda/channels.h"
#include "cuda/grad_masks_up2.h"

namespace carafepp::cuda {
namespace {

constexpr int kColumns = 8, kRows = kSourcesOfBlock / kColumns;  // of a tile
static_assert(kWarps == kOutputs, "each warp gets one of the outputs of a source");
constexpr int kChannelsStaged = 16;                          // staged at a time
constexpr int kChannelsOfWarp = kChannelsStaged / kOutputs;  // of these, of a warp

// The layout of staged features and gradients. Rows, outputs and channels are so far apart that neither the transposing
// nor the contracting threads meet in a bank.
template <int K>
struct Staged {
    static constexpr int kColumns = cuda::kColumns + K - 1, kRows = cuda::kRows + K - 1;
    static constexpr int kRow = 24, kChannel = kRow * kRows + 2;
    static constexpr int kOutput = kSourcesOfBlock + 4, kGradChannel = kOutput * kOutputs + 2;
    static constexpr int kGrads = kChannelsStaged * kChannel, kSize = kGrads + kChannelsStaged * kGradChannel;

    static constexpr int64_t bytes() {
        const int sums = kBlock * K * K, lines = kSourcesOfBlock * Lines<K>::kSize;
        return std::max({kSize, sums, lines}) * int64_t{sizeof(float)};
    }
};

struct GradMasksUp2NhwcPlan {
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t items;

    GradMasksUp2NhwcPlan(const Problem& p, const Array& grad_masks) {
        tile_rows = ceil_div(p.features.h, kRows);
        tiles = ceil_div(p.features.w, kColumns);
        items = grad_masks.n * p.groups * tile_rows * tiles;
    }
};

// Calls f(row, column, channel) for each pixel and every fourth channel, spread over the threads of a block.
template <class F>
__device__ __forceinline__ void for_each_vector(int rows, int columns, F f) {
    constexpr int kVectors = kChannelsStaged / kVector;
    for (int k = static_cast<int>(threadIdx.x); k < rows * columns * kVectors; k += kBlock) {
        const int pixel = k / kVectors;
        f(pixel / columns, pixel % columns, k % kVectors * kVector);
    }
}

__device__ __forceinline__ void store_apart(float4 value, float* to, int channel) {
    to[0] = value.x;
    to[channel] = value.y;
    to[2 * channel] = value.z;
    to[3 * channel] = value.w;
}

// Stages the tile with its corner at source (i, j), with 0 outside the arrays. Ends with a barrier.
template <int K, class T>
__device__ void stage(const Problem& p, int64_t n, int64_t c, int64_t channels, int i, int j, float* staged) {
    using S = Staged<K>;
    for_each_vector(S::kRows, S::kColumns, [&](int row, int column, int channel) {
        const int y = i + row - K / 2, x = j + column - K / 2;
        const bool exists = channel < channels && y >= 0 && y < p.features.h && x >= 0 && x < p.features.w;
        store_apart(load_channels(element<const T>(p.features, n, c + channel, y, x), exists),
                    staged + channel * S::kChannel + row * S::kRow + column, S::kChannel);
    });
    for_each_vector(kRows * kUp, kColumns * kUp, [&](int row, int column, int channel) {
        const int out_i = i * kUp + row, out_j = j * kUp + column;
        const bool exists = channel < channels && out_i < p.out_h && out_j < p.out_w;
        const int source = row / kUp * kColumns + column / kUp, output = row % kUp * kUp + column % kUp;
        store_apart(load_channels(element<const T>(p.grad_output, n, c + channel, out_i, out_j), exists),
                    staged + S::kGrads + channel * S::kGradChannel + output * S::kOutput + source, S::kGradChannel);
    });
    __syncthreads();
}

// sums[output][tap] += grad_output * features, over the channels that are staged for this warp.
template <int K>
__device__ __forceinline__ void sum_staged(const float* staged, int lane, int warp, float (&sums)[kOutputs][K * K]) {
    using S = Staged<K>;
    const float* window = staged + warp * kChannelsOfWarp * S::kChannel + lane / kColumns * S::kRow + lane % kColumns;
    const float* grads = staged + S::kGrads + warp * kChannelsOfWarp * S::kGradChannel + lane;
#pragma unroll 1
    for (int c = 0; c < kChannelsOfWarp; c++, window += S::kChannel, grads += S::kGradChannel) {
        float grad[kOutputs];
#pragma unroll
        for (int o = 0; o < kOutputs; o++) grad[o] = grads[o * S::kOutput];
#pragma unroll
        for (int t = 0; t < K * K; t++) {
            const float feature = window[t / K * S::kRow + t % K];
#pragma unroll
            for (int o = 0; o < kOutputs; o++) sums[o][t] += grad[o] * feature;
        }
    }
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 3)
    grad_masks_up2_nhwc_kernel(Arguments arguments, GradMasksUp2NhwcPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    constexpr int kTaps = K * K;
    float* const shared = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x) % kSourcesOfBlock,
              warp = static_cast<int>(threadIdx.x) / kSourcesOfBlock;
    const int64_t channels_in_group = p.features.c / p.groups;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), tile_row = divide(tile.quotient, plan.tile_rows),
                       image = divide(tile_row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int i = static_cast<int>(tile_row.remainder) * kRows, j = static_cast<int>(tile.remainder) * kColumns;

        float sums[kOutputs][kTaps] = {};
        for (int64_t c = 0; c < channels_in_group; c += kChannelsStaged) {
            stage<K, T>(p, n, group * channels_in_group + c, channels_in_group - c, i, j, shared);
            sum_staged<K>(shared, lane, warp, sums);
            __syncthreads();
        }
        float grad[kTaps];  // of output `warp`
        sum_of_warps<K>(sums, shared, grad);

        const int own_i = i + lane / kColumns, own_j = j + lane % kColumns;
        const bool computed = own_i * kUp + warp / kUp < p.out_h && own_j * kUp + warp % kUp < p.out_w;
        if (computed) clear_taps_outside<K>(p, own_i, own_j, grad);  // whatever the gradient there
        if (p.from_logits) {
            load_lines<K, kColumns, kBlock, T>(p, n, group, i, j, shared);
            __syncthreads();
        }
        float* const line = shared + lane * Lines<K>::kSize + Lines<K>::index(p, 0, warp);
        const int step = Lines<K>::index(p, 1, 0);
        if (computed && p.from_logits) through_normalizer<K>(line, kOutputs, p.normalizer, grad);
#pragma unroll
        for (int t = 0; t < kTaps; t++) line[t * step] = computed ? grad[t] : 0;  // where a crop leaves it out
        __syncthreads();
        store_lines<K, kColumns, kBlock, T>(p, n, group, i, j, shared, grad_masks);
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nhwc(const Problem& p, const Array&) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.features)) return reason;
    return not_for_vectors(p, p.grad_output);
}

void grad_masks_up2_nhwc(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        const GradMasksUp2NhwcPlan plan(p, grad_masks);
        launch(grad_masks_up2_nhwc_kernel<k, decltype(feature)>, plan.items, kBlock, Staged<k>::bytes(), p, grad_masks,
               plan);
    });
}

}  // namespace carafepp::cuda
