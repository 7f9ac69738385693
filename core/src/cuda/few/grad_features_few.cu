// SPDX-License-Identifier: Apache-2.0
// The gradient of features for few channels of a group. A block has a tile of features, and of the sources around it
// that windows are centred on. For each of these, tap and channel, it sums the products of the source's outputs: masks
// pass through registers once. Some threads share a source, and each keeps sums of its own. Then a thread gathers the
// sums of the sources whose windows hold a feature, always in the same order.
#include "cuda/few/few_channels.h"

namespace carafepp::cuda {
namespace {

constexpr int64_t kEnoughBlocks = 120;  // for the largest devices

template <int K>
constexpr int kMostChannels = K == 3 ? kFew : 2;  // so that sums fit into registers

struct GradFeaturesFewPlan : Tiles {
    int height, width;                                          // sources of an image
    bool neighbouring_sources;                                  // else neighbouring units
    bool quads;                                                 // weights of a unit are a vector
    int slots;                                                  // threads of a source
    SmallDivisor up, columns_of_tile, columns_around, sources;  // of a tile, with those around it
    int parts;                                                  // units of a source
    int plane;                                                  // sums of a slot
    int64_t bytes;

    GradFeaturesFewPlan(const Problem& p, const Array& grad_features, int own)
        : Tiles(tiles_of(p, grad_features)),
          height(static_cast<int>(ceil_div(p.out_h, p.factor.up))),
          width(static_cast<int>(ceil_div(p.out_w, p.factor.up))),
          neighbouring_sources(p.from_logits && p.logits.stride_w <= p.logits.stride_c),
          quads(own == kVector && in_quads(p, weights_of(p))),
          slots(1),
          up(p.factor.up),
          columns_of_tile(columns),
          columns_around(columns + p.kernel_size - 1),
          sources((rows + p.kernel_size - 1) * columns_around.divisor),
          parts(static_cast<int>(p.factor.up * p.factor.up / own)),
          plane(static_cast<int>(p.taps() * (p.features.c / p.groups)) * sources.divisor) {
        const int64_t bytes_of_slot = plane * int64_t{sizeof(float)};
        while (slots < 4 && slots * 2 <= parts && 2 * slots * bytes_of_slot <= kMostSharedBytes) slots *= 2;
        bytes = slots * bytes_of_slot;
    }

private:
    static Tiles tiles_of(const Problem& p, const Array& grad_features) {
        const int64_t of_row = ceil_div(grad_features.w, p.kernel_size == 3 ? 32 : 12);
        const int columns = static_cast<int>(ceil_div(grad_features.w, of_row));
        const auto tiles = [&](int rows) { return Tiles(p, grad_features.h, grad_features.w, rows, columns, kFew, 0); };
        const int64_t around = p.kernel_size - 1, bytes_of_source = p.taps() * (p.features.c / p.groups) * 4;
        int rows = p.kernel_size == 3 ? 8 : 12;
        while (rows > 1 && (rows + around) * (columns + around) * bytes_of_source > kMostSharedBytes) rows--;
        while (rows > 2 && tiles(rows).items < kEnoughBlocks) rows--;
        return tiles(rows);
    }
};

// Adds the products of the outputs of a unit.
template <int K, int P, class T, int Channels>
__device__ __forceinline__ void add_unit(const Problem& p, const GradFeaturesFewPlan& plan, const TileOfItem& tile,
                                         const Unit& unit, float (&sums)[Channels][K * K]) {
    const int there = unit.out_i < p.out_h ? static_cast<int>(p.out_w) - unit.out_j : 0;  // outputs
    if (there <= 0) return;
    float taps[P][K * K], scales[P];
    load_windows<T, K>(p, plan.quads, tile, unit, taps);
#pragma unroll
    for (int q = 0; q < P; q++) scales[q] = normalize_window<K, P>(normalizer_of(p), taps[q]);
    if (there < P) {  // what a crop leaves out may be no number
#pragma unroll
        for (int q = 0; q < P; q++) {
#pragma unroll
            for (int t = 0; t < K * K; t++) taps[q][t] = q < there ? taps[q][t] : 0.0f;
        }
    }
    const T* from = element<const T>(p.grad_output, tile.n, tile.c, unit.out_i, unit.out_j);
#pragma unroll
    for (int c = 0; c < Channels; c++, from += p.grad_output.stride_c) {
        if (c >= tile.channels) break;
#pragma unroll
        for (int q = 0; q < P; q++) {
            const float grad = q < there ? widen(from[q * p.grad_output.stride_w]) * scales[q] : 0.0f;
#pragma unroll
            for (int t = 0; t < K * K; t++) sums[c][t] += taps[q][t] * grad;
        }
    }
}

template <int K, int P, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_few_kernel(Arguments arguments, GradFeaturesFewPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    constexpr int kTaps = K * K, kChannels = kMostChannels<K>;
    float* const staged = shared_memory<float>();  // [slot][channel][tap][source]
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const TileOfItem tile(p, plan, item);
        const int sources = plan.sources.divisor;
#pragma unroll 1
        for (int number = thread_computed_late(); number < sources * plan.slots; number += kThreads) {
            const int before = plan.sources.quotient(number);
            const int source = plan.neighbouring_sources ? number - before * sources : number / plan.slots;
            const int slot = plan.neighbouring_sources ? before : number % plan.slots;
            const int row = plan.columns_around.quotient(source);
            Unit unit;
            unit.row = row;
            unit.column = source - row * plan.columns_around.divisor;
            unit.i = tile.top + unit.row - K / 2 - static_cast<int>(p.offset_h);
            unit.j = tile.left + unit.column - K / 2 - static_cast<int>(p.offset_w);
            float sums[kChannels][kTaps] = {};
            if (unit.i >= 0 && unit.j >= 0 && unit.i < plan.height && unit.j < plan.width) {
#pragma unroll 1
                for (int part = slot; part < plan.parts; part += plan.slots) {
                    unit.find_outputs<P>(plan.up, part);
                    add_unit<K, P, T>(p, plan, tile, unit, sums);
                }
            }
            float* to = staged + slot * plan.plane + source;
#pragma unroll
            for (int c = 0; c < kChannels; c++) {
                if (c >= tile.channels) break;
#pragma unroll
                for (int t = 0; t < kTaps; t++, to += sources) *to = sums[c][t];
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int number = thread_computed_late(); number < plan.rows * plan.columns; number += kThreads) {
            const int row = plan.columns_of_tile.quotient(number), column = number - row * plan.columns;
            const int y = tile.top + row, x = tile.left + column;
            if (y >= grad_features.h || x >= grad_features.w) continue;
            // The source whose first tap is here; that of tap (a, b) is a rows and b columns before it.
            const float* from = staged + (row + K - 1) * plan.columns_around.divisor + column + K - 1;
            T* to = element<T>(grad_features, tile.n, tile.c, y, x);
#pragma unroll 1
            for (int c = 0; c < tile.channels; c++, to += grad_features.stride_c) {
                float sum = 0;
#pragma unroll
                for (int t = 0; t < kTaps; t++, from += sources) {
                    const float* of_tap = from - t / K * plan.columns_around.divisor - t % K;
#pragma unroll 1
                    for (int slot = 0; slot < plan.slots; slot++, of_tap += plan.plane) sum += *of_tap;
                }
                *to = narrow<T>(sum);
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_grad_features_few(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_few_channels(p, grad_features)) return reason;
    if (p.kernel_size == 5 && p.features.c / p.groups > kMostChannels<5>) return "a group has more than 2 channels";
    return nullptr;
}

void grad_features_few(const Problem& p, const Array& grad_features) {
    with_units(p, may_be_quads(p), [&](auto k, auto own, auto feature) {
        const GradFeaturesFewPlan plan(p, grad_features, own);
        launch(grad_features_few_kernel<k, own, decltype(feature)>, plan.items, kThreads, plan.bytes, p, grad_features,
               plan);
    });
}

}  // namespace carafepp::cuda
