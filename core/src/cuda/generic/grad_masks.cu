// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any strides, factor and kernel size. A block has some outputs of a group. A
// thread contracts the channels for one tap of one output at a time, or loads a given gradient. Then a thread carries
// the taps of one output through the normaliser, and the block writes them.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

struct GradMasksPlan {
    bool given;              // the gradient of masks is an input; else it is contracted
    int64_t height, width;   // of the plane: of masks, or of the sub-pixels of logits
    int64_t outputs, tiles;  // of a block, of the plane
    int64_t items;
    int64_t shared_bytes;

    GradMasksPlan(const Problem& p, const Array& grad_masks, bool given, int64_t accumulator_bytes) : given(given) {
        height = p.from_logits ? p.logits.h * p.factor.up : p.out_h;
        width = p.from_logits ? p.logits.w * p.factor.up : p.out_w;
        const int64_t staged = p.from_logits ? 3 : 1;  // gradients; masks and logits
        const int64_t bytes_of_output = staged * p.taps() * accumulator_bytes;
        outputs = outputs_in_shared(bytes_of_output, 64);
        tiles = ceil_div(height * width, outputs);
        items = grad_masks.n * p.groups * tiles;
        shared_bytes = outputs * (bytes_of_output + kBytesOfPlace);
    }
};

// 0 for a tap beyond the border, whatever the gradient there.
template <class T>
__device__ Accumulator<T> grad_of_mask(const Problem& p, int64_t n, int64_t group, Pixel output, int64_t a, int64_t b) {
    const int64_t i = p.rows().source(output.i) + a - p.radius(), j = p.columns().source(output.j) + b - p.radius();
    if (i < 0 || j < 0 || i >= p.features.h || j >= p.features.w) return 0;
    const int64_t channels = p.features.c / p.groups;
    if (channels == 0) return 0;  // perhaps there is no array
    const T* grad = element<const T>(p.grad_output, n, group * channels, output.i, output.j);
    const T* feature = element<const T>(p.features, n, group * channels, i, j);
    Accumulator<T> sum = 0;
    for (int64_t c = 0; c < channels; c++)
        sum += widen(grad[c * p.grad_output.stride_c]) * widen(feature[c * p.features.stride_c]);
    return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) grad_masks_kernel(Arguments arguments, GradMasksPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    using A = Accumulator<T>;
    const int64_t tile_size = p.taps() * plan.outputs;
    int64_t* const places = shared_memory<int64_t>();              // of outputs
    A* const grads = reinterpret_cast<A*>(places + plan.outputs);  // [tap][output]
    const int64_t up = p.from_logits ? p.factor.up : 1;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient tile = divide(item, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, first = tile.remainder * plan.outputs;
        const int64_t outputs = min(plan.outputs, plan.height * plan.width - first);

        Walk<kThreads> walk(static_cast<int>(p.taps()), static_cast<int>(outputs),
                            grad_masks.stride_w <= grad_masks.stride_c);
        for (; walk.in_grid(); walk.advance()) {
            const int64_t t = walk.row(), q = walk.column();
            const Pixel output = pixel_at(first + q, plan.width);
            A grad = 0;  // of a sub-pixel that a crop leaves out
            if (output.i < p.out_h && output.j < p.out_w) {
                const Quotient tap = divide(t, p.kernel_size);
                grad = plan.given ? A(mask_element<T>(p.grad_masks, n, group * p.taps() + t, output.i, output.j)[0])
                                  : A(grad_of_mask<T>(p, n, group, output, tap.quotient, tap.remainder));
            }
            grads[t * plan.outputs + q] = grad;
        }
        if (p.from_logits) {
            A* const masks = grads + tile_size;
            A* const logits = masks + tile_size;
            find_outputs(p.logits, up, first, outputs, plan.width, places);
            load_masks<T>(p, p.logits, n, group, 0, p.taps(), outputs, places, logits, plan.outputs);
            __syncthreads();
            for (int64_t q = threadIdx.x; q < outputs; q += kThreads) {
                const Pixel output = pixel_at(first + q, plan.width);
                if (output.i >= p.out_h || output.j >= p.out_w) continue;
                for (int64_t t = 0; t < p.taps(); t++) masks[t * plan.outputs + q] = logits[t * plan.outputs + q];
                A scratch[2];
                normalize(p.normalizer, masks + q, p.taps(), plan.outputs, 1, scratch);
                normalize_backward(p.normalizer, grads + q, masks + q, logits + q, p.taps(), plan.outputs, 1, scratch);
            }
        }
        __syncthreads();
        find_outputs(grad_masks, up, first, outputs, plan.width, places);
        store_masks<T>(p, grad_masks, n, group, up * up, outputs, places, grads, plan.outputs);
        __syncthreads();
    }
}

void launch_for(const Problem& p, const Array& grad_masks, bool given) {
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        const GradMasksPlan plan(p, grad_masks, given, sizeof(Accumulator<T>));
        launch(grad_masks_kernel<T>, plan.items, kThreads, plan.shared_bytes, p, grad_masks, plan);
    });
}

}  // namespace

void grad_masks(const Problem& p, const Array& grad_masks) { launch_for(p, grad_masks, false); }

void normalize_masks_backward(const Problem& p, const Array& grad_logits) { launch_for(p, grad_logits, true); }

}  // namespace carafepp::cuda
