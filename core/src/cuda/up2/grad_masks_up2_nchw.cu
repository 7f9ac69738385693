// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for up x2 with adjacent columns. A block has a tile of 4 x 16 sources. It goes
// through the channels a slice at a time. The features of the next slice, with their halo, arrive meanwhile, such that
// a thread reads four channels of a pixel as one vector. Two threads share a source: each has two vectors of a slice,
// and loads the gradients of the four outputs ahead. It contracts the window with them, with all sums in registers.
// Then the two exchange their sums, and each finishes a row of outputs. Of 7 x 7 taps registers do not hold all sums:
// see PartOfSource.
#include "cuda/up2/grad_masks_up2.h"

namespace carafepp::cuda {
namespace {

// The gradients of a source's outputs, in this thread's channels of a slice: for each row, its own one first. An
// output that does not exist gets another's gradient: nobody reads its sum.
template <int K, bool Pairs, class T>
struct OwnOutputs {
    const T* first;  // in the first channel
    const T* from;   // in this thread's own row and first channel of a slice
    int other;       // the other row, from the own one on
    int next;        // column, from the left one on
    int stride_c, part;
    float grad[kOwnVectors][kVector][kOutputs];  // of two vectors

    __device__ __forceinline__ OwnOutputs(const Problem& p, const SourcesOfBlock& tile, int i, int j, int part)
        : part(part) {
        const int bottom = static_cast<int>(p.out_h) - 1, right = static_cast<int>(p.out_w) - 1;
        const int row = min(i * kUp + part, bottom), column = min(j * kUp, right / kUp * kUp);
        first = element<const T>(p.grad_output, tile.n, tile.c, row, column);
        other = (min(i * kUp + 1 - part, bottom) - row) * static_cast<int>(p.grad_output.stride_h);
        next = column < right ? 1 : 0;
        stride_c = static_cast<int>(p.grad_output.stride_c);
        from = at_stride(first, stride_c, part * kOwnVectors * kVector);
    }

    // Loads this thread's vector v of a slice, of which `channels` channels exist; 0 for others.
    __device__ __forceinline__ void load(int v, int channels) {
        const int channel = (PartOfSource<K>::vector(part, v) - part * kOwnVectors) * kVector;  // from the first on
#pragma unroll
        for (int r = 0; r < kUp; r++) {
            const T* columns = at_stride(r == 0 ? from : from + other, stride_c, channel);
#pragma unroll
            for (int q = 0; q < kVector; q++, columns = at_stride(columns, stride_c, 1)) {
                float2 pair = make_float2(0, 0);
                if (q >= channels) {
                } else if constexpr (Pairs) {
                    pair = load_columns(columns, true);
                } else {
                    pair = make_float2(widen(load_input(columns)), widen(load_input(columns + next)));
                }
                grad[v % kOwnVectors][q][r * kUp] = pair.x;
                grad[v % kOwnVectors][q][r * kUp + 1] = pair.y;
            }
        }
    }

    // Goes to the next slice. At the end there is none, and nobody needs what is loaded from now on.
    __device__ __forceinline__ void advance(int channels, bool end) {
        from = end ? first : at_stride(from, stride_c, channels);
        stride_c = end ? 0 : stride_c;
    }
};

// `Pairs`: of outputs are loaded at once.
template <int K, bool Pairs, class T>
__global__ void __launch_bounds__(kBlock, 2) grad_masks_up2_nchw_kernel(Arguments arguments, SourcesPlan plan) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;  // of the shape of masks or logits
    T* const staged = shared_memory<T>();        // features of two slices
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late();
        const OwnSource source(plan, thread);
        const SourcesOfBlock tile(plan, item);
        const int i = tile.top + source.row, j = tile.left + source.column;
        const bool idle = source.idle(p, tile);
        using Part = PartOfSource<K>;
        float sums[kOutputs][Part::kTaps] = {};                 // of outputs, those of this thread's row first
        if (plan.channels > 0 && p.out_h > 0 && p.out_w > 0) {  // or there may be no arrays
            using Halo = HaloOfTile<K, 1, T>;
            Halo halo(p, tile, thread, staged);
            OwnOutputs<K, Pairs, T> outputs(p, tile, i, j, source.part);
            const int stride_c = static_cast<int>(p.features.stride_c);
            const auto copy = [&](int channels, T* slice) {
#pragma unroll(K < 7 ? kVectors : 1)
                for (int c = 0; c < kSlice; c += kVector, slice += Halo::kVectorsApart) {
                    halo.copy(c + thread % Halo::kLanes < channels, slice);
                    halo.from = at_stride(halo.from, stride_c, kVector);
                }
            };
            const int channels = static_cast<int>(computed_late(plan.channels));
            int left = (channels - 1) / kSlice;             // slices, which have two buffers
            const int first = (channels - 1) % kSlice + 1;  // channels, so that later slices are whole
            int place = 0;                                  // of the slice that is contracted
            copy(first, staged);
            halo.from = at_stride(halo.from, stride_c, first - kSlice);
#pragma unroll
            for (int v = 0; v < kOwnVectors; v++) outputs.load(v, first - Part::vector(source.part, v) * kVector);
            int step = first;  // to the next slice
#pragma unroll 1
            for (; left >= 0; left--) {
                wait_for_copies();
                __syncthreads();
                const T* const window = staged + place + source.window<Halo>();
                place = Halo::kElements - place;
                if (left > 0) copy(kSlice, staged + place);
                if (idle) continue;
#pragma unroll
                for (int v = 0; v < Part::kVectors; v++) {
                    add_window<K, Halo>(window, source.part, v, outputs.grad[v % kOwnVectors], sums);
                    if (K == 7) __syncwarp();          // nor before, as registers do not suffice
                    const int next = v + kOwnVectors;  // that is loaded
                    if (next == Part::kVectors) outputs.advance(step, left == 0);
                    if (next < Part::kVectors) {
                        outputs.load(next, step - Part::vector(source.part, next) * kVector);
                    } else {
                        outputs.load(next - Part::kVectors, kVector);
                    }
                    __syncwarp();  // so that these loads are not put off
                }
                step = kSlice;
            }
        }
        float2* const pairs = reinterpret_cast<float2*>(staged);
        float grad[kUp][K * K];
        exchange_sums<K>(sums, thread, source.part, pairs, grad);
        finish_two_outputs<K, T>(p, OwnOutputsPlace{tile.n, tile.group, i, j, source.part}, grad, pairs + thread,
                                 grad_masks);
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_grad_masks_up2_nchw(const Problem& p, const Array& grad_masks) {
    const bool floats = p.features.dtype == CARAFEPP_FLOAT32;  // tensor cores are faster at 7 x 7 products of 16 bits
    if (const char* reason = not_for_columns_of_up2(p, p.features, p.grad_output, floats ? 7 : 5)) return reason;
    if (p.kernel_size == 7) {
        if (const char* reason = not_for_columns(p.grad_output)) return reason;
    }
    return not_for_source_tiles(p, grad_masks);
}

void grad_masks_up2_nchw(const Problem& p, const Array& grad_masks) {
    with_kernel_size<sizeof(float), 3, 5, 7>(p, [&](auto k, auto feature) {
        using T = decltype(feature);
        const SourcesPlan plan(p);
        const int64_t bytes = std::max(HaloOfTile<k, 1, T>::kBytes, kBytesOfPairs<k>);
        if constexpr (sizeof(T) == sizeof(float)) {
            if (k == 7 || not_for_columns(p.grad_output) == nullptr)
                return launch(grad_masks_up2_nchw_kernel<k, true, T>, plan.items, kBlock, bytes, p, grad_masks, plan);
        }
        if constexpr (k < 7)
            launch(grad_masks_up2_nchw_kernel<k, false, T>, plan.items, kBlock, bytes, p, grad_masks, plan);
    });
}

}  // namespace carafepp::cuda
