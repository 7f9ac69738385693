// SPDX-License-Identifier: Apache-2.0
// The normaliser by itself: a block stages the masks of some outputs and writes them.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

struct NormalizeMasksPlan {
    int64_t outputs;  // of a block
    int64_t tiles;    // of an image
    int64_t items;
    int64_t shared_bytes;

    NormalizeMasksPlan(const Problem& p, const Array& masks, int64_t accumulator_bytes) {
        outputs = outputs_in_shared(p.taps() * accumulator_bytes, 128);
        tiles = ceil_div(p.out_h * p.out_w, outputs);
        items = masks.n * p.groups * tiles;
        shared_bytes = outputs * (p.taps() * accumulator_bytes + kBytesOfPlace);
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) normalize_masks_kernel(Arguments arguments, NormalizeMasksPlan plan) {
    const Problem& p = arguments.problem;
    const Array& masks = arguments.result;  // [N, groups * K * K, H', W']
    using A = Accumulator<T>;
    int64_t* const places = shared_memory<int64_t>();               // of outputs
    A* const staged = reinterpret_cast<A*>(places + plan.outputs);  // [tap][output]
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, first = tile.remainder * plan.outputs;
        const int64_t outputs = min(plan.outputs, p.out_h * p.out_w - first);
        stage_masks<T>(p, n, group, first, outputs, p.out_w, places, staged, plan.outputs);
        find_outputs(masks, 1, first, outputs, p.out_w, places);
        store_masks<T>(p, masks, n, group, 1, outputs, places, staged, plan.outputs);
        __syncthreads();
    }
}

}  // namespace

void normalize_masks(const Problem& p, const Array& masks) {
    with_types(p, [&](auto storage, auto) {
        using T = typename decltype(storage)::type;
        const NormalizeMasksPlan plan(p, masks, sizeof(Accumulator<T>));
        launch(normalize_masks_kernel<T>, plan.items, kThreads, plan.shared_bytes, p, masks, plan);
    });
}

}  // namespace carafepp::cuda
