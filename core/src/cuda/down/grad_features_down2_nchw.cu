// SPDX-License-Identifier: Apache-2.0
// The gradient of features for down x2 with adjacent columns, in gather form. A block has a tile of quads. It stages
// the masks of all outputs whose windows reach it once. It goes through the channels a slice at a time: it copies the
// slice's gradients of these outputs into shared memory. A thread has two quads of a row in some channels. It keeps
// their masks in registers through all channels.
#include "cuda/down/tile_down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kBlock = 256;                  // threads
constexpr int kRows = 4, kMostColumns = 28;  // quads of a tile
constexpr int kOwn = 2;                      // quads of a thread
constexpr int kAligned = 4;                  // columns: tiles begin at multiples
constexpr int kWidth = kBefore + kMostColumns + kAligned;
static_assert(kOwn == 2 && kRows * (kMostColumns / kOwn) <= kBlock && kMostColumns % kAligned == 0,
              "a thread for each unit");

// The outputs that reach a tile: their masks [tap][row][column], and their gradients [channel][row][column].
template <int K, class T>
struct Tile {
    static constexpr int kHeight = kRows + Reach<K>::kOutputs - 1, kColumns = kMostColumns + Reach<K>::kOutputs - 1;
    static constexpr int kChannels = 64 / sizeof(T), kChannel = kHeight * kWidth;  // of a slice, elements of a channel
    using MasksOfTile = Masks<K, kHeight, kColumns, (kHeight * kColumns + 3) / 4 * 4>;
    static constexpr int64_t kBytes = MasksOfTile::kElements * int64_t{sizeof(float)} +
                                      kChannels * kChannel * int64_t{sizeof(T)};
};

struct GradFeaturesDown2NchwPlan {
    Tiles tiles;
    int copied;  // columns of grad_output at once: 4, 2 or 1
    bool fours;  // columns of features are stored four at once, or else two

    GradFeaturesDown2NchwPlan(const Problem& p, const Array& grad_features, int channels_of_slice)
        : tiles(p, ceil_div(grad_features.h, kDown), ceil_div(grad_features.w, kDown), kRows,
                even_columns(ceil_div(grad_features.w, kDown), kMostColumns, kAligned), channels_of_slice,
                kEnoughItems),
          copied(columns_at_once(p.grad_output)),
          fours(not_for_columns(grad_features, 4) == nullptr) {}
};

// The gradients of outputs that reach a unit, of whose quads the first begins a pair of columns.
template <class T>
__device__ __forceinline__ void load_floats(const T* from, float (&grads)[3]) {  // K = 3
    const float2 pair = staged_columns(from);
    grads[0] = pair.x, grads[1] = pair.y, grads[2] = widen(from[2]);
}
template <class T>
__device__ __forceinline__ void load_floats(const T* from, float (&grads)[4]) {  // K = 5
    const float2 pair = staged_columns(from + 1);
    grads[0] = widen(from[0]), grads[1] = pair.x, grads[2] = pair.y, grads[3] = widen(from[3]);
}

template <int K, class T>
__global__ void __launch_bounds__(kBlock, 2)
    grad_features_down2_nchw_kernel(Arguments arguments, GradFeaturesDown2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using S = Tile<K, T>;
    using M = typename S::MasksOfTile;
    using R = Reach<K>;
    float* const masks = shared_memory<float>();                  // [tap][row][column]
    T* const grads = reinterpret_cast<T*>(masks + M::kElements);  // [channel][row][column]
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int top = tile.top - R::kBefore;
        M::template stage<kBlock, T>(p, tile.n, tile.group, top, tile.left - R::kBefore, masks,
                                     [](int row, int column) { return row * S::kColumns + column; });

        const int thread = thread_computed_late();
        const int width = static_cast<int>(grad_features.w), height = static_cast<int>(grad_features.h);
        const int columns = min(plan.tiles.columns, (width - tile.left * kDown + 1) / kDown);
        const int rows = min(kRows, (height - tile.top * kDown + 1) / kDown);
        const int units_in_row = (columns + kOwn - 1) / kOwn, units = units_in_row * rows, sharers = kBlock / units;
        const int row = thread % units / units_in_row, column = thread % units % units_in_row * kOwn;
        const int first = thread / units < sharers ? thread / units : S::kChannels;
        float weights[kOwn][K * K];
#pragma unroll
        for (int y = 0; y < R::kOutputs; y++) {
#pragma unroll
            for (int x = 0; x < R::kOutputs; x++) {  // of the first quad; the other's outputs are next to them
                const float* const of_output = masks + (row + y) * S::kColumns + column + x;
                for_each_tap_of_quad<K>(y, x, [&](int, int t) {
                    const float* const own = of_output + t * M::kApart;
                    const bool aligned = S::kColumns % kOwn == 0 && x % kOwn == 0;
                    const float2 pair = aligned ? staged_columns(own) : make_float2(own[0], own[1]);
                    weights[0][t] = pair.x, weights[1][t] = pair.y;
                });
            }
        }
        const int i = (tile.top + row) * kDown, j = (tile.left + column) * kDown;
        const bool below = i + 1 < height, right = j + kDown < width;
        const T* from = element<const T>(p.grad_output, tile.n, tile.c, top, tile.left - kBefore);
        T* to = element<T>(grad_features, tile.n, tile.c + first, i, j);  // [C, H, W]
        const T* const own_grads = grads + row * kWidth + column + kBefore - R::kBefore;
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= S::kChannels) {
            const int end = static_cast<int>(p.out_w);
            with_columns(plan.copied, [&](auto count) {
                copy_rows<S::kHeight, kWidth, S::kChannels, kBlock, count>(p.grad_output, from, top,
                                                                           tile.left - kBefore, end, channels, grads);
            });
            from += S::kChannels * p.grad_output.stride_c;
            wait_for_copies();
            __syncthreads();
            T* upper = to;
            T* lower = to + (below ? grad_features.stride_h : 0);  // or the upper row takes its place
            to += S::kChannels * grad_features.stride_c;
#pragma unroll 1
            for (int q = first; q < min(channels, S::kChannels); q += sharers) {
                float sums[kOwn][kFeatures] = {};
#pragma unroll
                for (int y = 0; y < R::kOutputs; y++) {
                    float grad[R::kOutputs + kOwn - 1];
                    load_floats(own_grads + q * S::kChannel + y * kWidth, grad);
#pragma unroll
                    for (int x = 0; x < R::kOutputs + kOwn - 1; x++) {
#pragma unroll
                        for (int own = 0; own < kOwn; own++) {
                            if (x < own || x - own >= R::kOutputs) continue;
                            for_each_tap_of_quad<K>(y, x - own, [&](int feature, int t) {
                                sums[own][feature] += weights[own][t] * grad[x];
                            });
                        }
                    }
                }
                if (plan.fours) {
                    store_channels(make_float4(sums[0][2], sums[0][3], sums[1][2], sums[1][3]), lower);
                    store_channels(make_float4(sums[0][0], sums[0][1], sums[1][0], sums[1][1]), upper);
                } else {
                    store_columns(make_float2(sums[0][2], sums[0][3]), lower);
                    if (right) store_columns(make_float2(sums[1][2], sums[1][3]), lower + kDown);
                    store_columns(make_float2(sums[0][0], sums[0][1]), upper);
                    if (right) store_columns(make_float2(sums[1][0], sums[1][1]), upper + kDown);
                }
                upper += sharers * grad_features.stride_c;
                lower += sharers * grad_features.stride_c;
            }
            __syncthreads();
        }
    }
}

}  // namespace

const char* cannot_run_grad_features_down2_nchw(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (p.grad_output.empty()) return "there is no output";
    if (p.grad_output.stride_w != 1) return "columns are not adjacent";
    return not_for_columns(grad_features);
}

void grad_features_down2_nchw(const Problem& p, const Array& grad_features) {
    with_kernel_size<sizeof(float), 3, 5>(p, [&](auto k, auto feature) {
        using S = Tile<k, decltype(feature)>;
        const GradFeaturesDown2NchwPlan plan(p, grad_features, S::kChannels);
        launch(grad_features_down2_nchw_kernel<k, decltype(feature)>, plan.tiles.items, kBlock, S::kBytes, p,
               grad_features, plan);
    });
}

}  // namespace carafepp::cuda
