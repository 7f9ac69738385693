// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for any strides, factor and kernel size, in gather form. A block has some neighbouring
// sources of a row in some channels, a thread one source in one channel. For each row of outputs that reads the row of
// sources, and some columns of it at a time: stage the masks of these outputs (of the one row of taps that reaches the
// sources; all taps, if they come from logits), contract them with grad_output. Write out.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

struct Cut {
    int sources, channels;  // of a block: kThreads together
    int64_t outputs;        // staged at a time
    int64_t tiles, chunks;  // of sources in a row, of channels in a group
    bool channels_adjacent;
};

// The outputs of a row or column whose windows hold a source.
struct Range {
    int64_t begin, end;
};
__device__ __forceinline__ Range outputs_of(const Problem& p, int64_t first_source, int64_t end_source,
                                            int64_t outputs) {
    const int64_t begin = p.factor.first_output(first_source - p.radius());
    const int64_t end = p.factor.first_output(end_source + p.radius());
    return {max(begin, int64_t{0}), min(end, outputs)};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;
    using A = Accumulator<T>;
    const int64_t k = p.kernel_size, channels_in_group = p.features.c / p.groups;
    const int64_t staged_taps = p.from_logits ? p.taps() : k;
    A* const masks = shared_memory<A>();
    int* const sources = reinterpret_cast<int*>(masks +
                                                staged_taps * cut.outputs);  // of outputs, from the tile's first
    const int lane = static_cast<int>(threadIdx.x);
    const int source = cut.channels_adjacent ? lane / cut.channels : lane % cut.sources;
    const int channel = cut.channels_adjacent ? lane % cut.channels : lane / cut.sources;
    const int64_t items = grad_features.n * p.groups * cut.chunks * grad_features.h * cut.tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, cut.tiles), row = divide(tile.quotient, grad_features.h),
                       chunk = divide(row.quotient, cut.chunks), image = divide(chunk.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = row.remainder;
        const int64_t first = tile.remainder * cut.sources, j = first + source;
        const int64_t in_group = chunk.remainder * cut.channels + channel, c = group * channels_in_group + in_group;
        const bool exists = j < grad_features.w && in_group < channels_in_group;
        const Range rows = outputs_of(p, i, i + 1, p.out_h);
        const Range columns = outputs_of(p, first, min(first + cut.sources, grad_features.w), p.out_w);
        A sum = 0;
        for (int64_t out_i = rows.begin; out_i < rows.end; out_i++) {
            const int64_t a = i - p.factor.source(out_i) + p.radius();
            for (int64_t begin = columns.begin; begin < columns.end; begin += cut.outputs) {
                const int64_t outputs = min(cut.outputs, columns.end - begin), number = out_i * p.out_w + begin;
                for (int64_t q = threadIdx.x; q < outputs; q += kThreads)
                    sources[q] = static_cast<int>(p.factor.source(begin + q) - first);
                if (p.from_logits) {
                    stage_masks<T>(p, n, group, number, outputs, p.out_w, masks, cut.outputs);
                } else {
                    load_masks<T>(p, p.masks, n, group, a * k, k, number, outputs, p.out_w, masks, cut.outputs);
                    __syncthreads();
                }
                if (exists) {
                    const A* const weights = masks + (p.from_logits ? a * k : 0) * cut.outputs;
                    const T* const grads = element<const T>(p.grad_output, n, c, out_i, begin);
                    for (int64_t q = 0; q < outputs; q++) {
                        const int64_t b = source - sources[q] + p.radius();
                        if (b < 0 || b >= k) continue;
                        sum += weights[b * cut.outputs + q] * widen(grads[q * p.grad_output.stride_w]);
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
        using A = Accumulator<T>;
        const int64_t staged_taps = p.from_logits ? p.taps() : p.kernel_size;
        Cut cut;
        cut.channels_adjacent = grad_features.stride_c < grad_features.stride_w;
        cut.sources = cut.channels_adjacent ? 8 : 32;
        cut.channels = kThreads / cut.sources;
        cut.outputs = outputs_in_shared<A>(staged_taps + 1, 1, 128);
        cut.tiles = ceil_div(grad_features.w, cut.sources);
        cut.chunks = ceil_div(p.features.c / p.groups, cut.channels);
        launch(grad_features_kernel<T>, grad_features.n * p.groups * cut.chunks * grad_features.h * cut.tiles, kThreads,
               (staged_taps + 1) * cut.outputs * int64_t{sizeof(A)}, p, grad_features, cut);
    });
}

}  // namespace carafepp::cuda
