// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any strides, factor and kernel size, in gather form. A block has neighbouring sources of
// a row in some channels, a thread one source in one channel. It goes through the rows of outputs that read these
// sources, some columns at a time. It stages their masks: one row of taps, or all taps of logits. Then each thread adds
// the products with grad_output.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

struct GradFeaturesPlan {
    bool channels_adjacent;
    int sources, channels;   // of a block, kThreads together
    int64_t staged_taps;     // of an output
    int64_t outputs;         // staged at a time
    int64_t tiles;           // of a row of sources
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    GradFeaturesPlan(const Problem& p, const Array& grad_features, int64_t accumulator_bytes) {
        channels_adjacent = grad_features.stride_c < grad_features.stride_w;
        sources = channels_adjacent ? 8 : 32;
        channels = kThreads / sources;
        staged_taps = p.from_logits ? p.taps() : p.kernel_size;
        outputs = outputs_in_shared((staged_taps + 1) * accumulator_bytes, 128);
        tiles = ceil_div(grad_features.w, sources);
        channel_blocks = ceil_div(p.features.c / p.groups, channels);
        items = grad_features.n * p.groups * channel_blocks * grad_features.h * tiles;
        shared_bytes = outputs * ((staged_taps + 1) * accumulator_bytes + kBytesOfPlace);
    }
};

// The outputs of a row or column whose windows hold a source.
struct Range {
    int64_t begin, end;
};
__device__ __forceinline__ Range outputs_of(const Axis& axis, int64_t radius, int64_t first_source, int64_t end_source,
                                            int64_t outputs) {
    const int64_t begin = axis.first_output(first_source - radius), end = axis.first_output(end_source + radius);
    return {max(begin, int64_t{0}), min(end, outputs)};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_kernel(Arguments arguments, GradFeaturesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    using A = Accumulator<T>;
    const int64_t k = p.kernel_size, channels_in_group = p.features.c / p.groups;
    int64_t* const places = shared_memory<int64_t>();              // of outputs
    A* const masks = reinterpret_cast<A*>(places + plan.outputs);  // [tap][output]
    int* const sources = reinterpret_cast<int*>(masks +
                                                plan.staged_taps * plan.outputs);  // of outputs, from the tile's first
    const int lane = static_cast<int>(threadIdx.x);
    const int source = plan.channels_adjacent ? lane / plan.channels : lane % plan.sources;
    const int channel = plan.channels_adjacent ? lane % plan.channels : lane / plan.sources;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), row = divide(tile.quotient, grad_features.h),
                       channel_block = divide(row.quotient, plan.channel_blocks),
                       image = divide(channel_block.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = row.remainder;
        const int64_t first = tile.remainder * plan.sources, j = first + source;
        const int64_t in_group = channel_block.remainder * plan.channels + channel,
                      c = group * channels_in_group + in_group;
        const bool exists = j < grad_features.w && in_group < channels_in_group;
        const Range rows = outputs_of(p.rows(), p.radius(), i, i + 1, p.out_h);
        const Range columns = outputs_of(p.columns(), p.radius(), first, min(first + plan.sources, grad_features.w),
                                         p.out_w);
        const Range own = outputs_of(p.columns(), p.radius(), j, j + 1, p.out_w);  // of this thread's source
        A sum = 0;
        for (int64_t out_i = rows.begin; out_i < rows.end; out_i++) {
            const int64_t a = i - p.rows().source(out_i) + p.radius();
            for (int64_t begin = columns.begin; begin < columns.end; begin += plan.outputs) {
                const int64_t outputs = min(plan.outputs, columns.end - begin), number = out_i * p.out_w + begin;
                for (int64_t q = threadIdx.x; q < outputs; q += kThreads)
                    sources[q] = static_cast<int>(p.columns().source(begin + q) - first);
                if (p.from_logits) {
                    stage_masks<T>(p, n, group, number, outputs, p.out_w, places, masks, plan.outputs);
                } else {
                    find_outputs(p.masks, 1, number, outputs, p.out_w, places);
                    load_masks<T>(p, p.masks, n, group, a * k, k, outputs, places, masks, plan.outputs);
                    __syncthreads();
                }
                if (exists) {
                    const A* const weights = masks + (p.from_logits ? a * k : 0) * plan.outputs;
                    const T* const grads = element<const T>(p.grad_output, n, c, out_i, begin);
                    const int64_t own_end = min(own.end - begin, outputs);
                    for (int64_t q = max(own.begin - begin, int64_t{0}); q < own_end; q++) {
                        const int64_t b = source - sources[q] + p.radius();
                        sum += weights[b * plan.outputs + q] * widen(grads[q * p.grad_output.stride_w]);
                    }
                }
                __syncthreads();
            }
        }
        if (exists) *element<T>(grad_features, n, c, i, j) = narrow<T>(sum);
    }
}

}  // namespace

void grad_features(const Problem& p, const Array& grad_features) {
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        const GradFeaturesPlan plan(p, grad_features, sizeof(Accumulator<T>));
        launch(grad_features_kernel<T>, plan.items, kThreads, plan.shared_bytes, p, grad_features, plan);
    });
}

}  // namespace carafepp::cuda
