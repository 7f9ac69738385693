// SPDX-License-Identifier: Apache-2.0
//
// The forward for up x2 with adjacent channels. A block has some neighbouring sources of a row and some channels, a
// thread 16 bytes of channels of two sources, whose eight outputs it sums in registers: stage the masks of the sources'
// outputs as [source][tap][output], contract the taps (each feature that is loaded serves both sources, each vector of
// weights that is read from shared memory four outputs), write out.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

constexpr int kUp = 2, kOutputs = kUp * kUp;  // of a source
constexpr int kSources = 2;                   // of a thread
constexpr int kVector = 4;                    // channels of a thread: 16 bytes
constexpr int kNormalizers = 8;               // threads that normalise the taps of an output together

struct Cut {
    int lanes, sources;     // of a block: threads along channels, sources along a row
    int64_t tiles, chunks;  // of sources in a row, of channels in a group
};

// Of the threads that normalise an output together.
template <class F>
__device__ __forceinline__ float over_taps(float value, F f) {
#pragma unroll
    for (int distance = 1; distance < kNormalizers; distance *= 2)
        value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// Logits that are staged, `outputs` of them, to masks. All threads of a block call it.
template <int K>
__device__ void normalize_staged(carafepp_normalizer normalizer, float* staged, int outputs) {
    constexpr int kTaps = K * K, kOwn = (kTaps + kNormalizers - 1) / kNormalizers;
    const int lane = static_cast<int>(threadIdx.x) % kNormalizers;
    for (int first = 0; first < outputs; first += kThreads / kNormalizers) {
        const int output = first + static_cast<int>(threadIdx.x) / kNormalizers;
        const bool exists = output < outputs;
        float* const taps = staged + output / kOutputs * kTaps * kOutputs + output % kOutputs;
        float own[kOwn] = {}, largest = -INFINITY;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int tap = k * kNormalizers + lane;
            if (!exists || tap >= kTaps) continue;
            const float logit = taps[tap * kOutputs];
            own[k] = normalizer == CARAFEPP_SIGMOID              ? sigmoid(logit)
                     : normalizer == CARAFEPP_SIGMOID_NORMALIZED ? log_sigmoid(logit)
                                                                 : logit;
            largest = own[k] > largest ? own[k] : largest;
        }
        float scale = 1;
        if (normalizer == CARAFEPP_SOFTMAX || normalizer == CARAFEPP_SIGMOID_NORMALIZED) {
            largest = over_taps(largest, [](float a, float b) { return a > b ? a : b; });
            float sum = 0;
#pragma unroll
            for (int k = 0; k < kOwn; k++) {
                if (!exists || k * kNormalizers + lane >= kTaps) continue;
                own[k] = expf(own[k] - largest);
                sum += own[k];
            }
            scale = 1 / over_taps(sum, [](float a, float b) { return a + b; });
        }
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            const int tap = k * kNormalizers + lane;
            if (exists && tap < kTaps) taps[tap * kOutputs] = own[k] * scale;
        }
    }
}

// The masks of the outputs of sources (i, first ..), those of taps beyond a border 0: features are read as 0 there, and
// 0 * 0 is 0 even where a mask is Inf. Ends with a barrier.
template <int K>
__device__ void stage(const Problem& p, int64_t n, int64_t group, int64_t i, int64_t first, int sources,
                      float* staged) {
    constexpr int kTaps = K * K;
    const Array& array = p.from_logits ? p.logits : p.masks;
    for_each_mask(array, kTaps, sources * kOutputs, [&](int64_t tap, int64_t k) {
        const int64_t source = k / kOutputs, output = k % kOutputs;
        const Output at{i * kUp + output / kUp, (first + source) * kUp + output % kUp};
        float weight = 0;
        if (first + source < p.features.w && (p.from_logits || (at.i < p.out_h && at.j < p.out_w)))
            weight = *mask_at<const float>(p, array, n, group, tap, at);
        staged[(source * kTaps + tap) * kOutputs + output] = weight;
    });
    __syncthreads();
    if (p.from_logits) {
        normalize_staged<K>(p.normalizer, staged, sources * kOutputs);
        __syncthreads();
    }
    if (first >= K / 2 && first + sources + K / 2 <= p.features.w) return;
    for (int k = static_cast<int>(threadIdx.x); k < sources * kTaps; k += kThreads) {
        const int64_t j = first + k / kTaps + k % K - K / 2;
        if (j >= 0 && j < p.features.w) continue;
        reinterpret_cast<float4*>(staged)[k] = make_float4(0, 0, 0, 0);
    }
    __syncthreads();
}

__device__ __forceinline__ void add_products(float weight, float4 feature, float4& sum) {
    sum.x += weight * feature.x;
    sum.y += weight * feature.y;
    sum.z += weight * feature.z;
    sum.w += weight * feature.w;
}

template <int K>
__global__ void __launch_bounds__(kThreads, 2) reassemble_nhwc_kernel(Problem p, Cut cut) {
    constexpr int kTaps = K * K;
    float* const staged = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x) % cut.lanes,
              own = static_cast<int>(threadIdx.x) / cut.lanes * kSources;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = p.result.n * p.groups * p.features.h * cut.tiles * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), tile = divide(chunk.quotient, cut.tiles),
                       row = divide(tile.quotient, p.features.h), image = divide(row.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, i = row.remainder;
        const int64_t first = tile.remainder * cut.sources, j = first + own;
        const int64_t in_group = (chunk.remainder * cut.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        stage<K>(p, n, group, i, first, cut.sources, staged);
        if (in_group < channels_in_group && j < p.features.w) {
            float4 sums[kSources][kOutputs] = {};
            const int64_t top = i - K / 2, left = j - K / 2;
            const int a_begin = static_cast<int>(max(-top, int64_t{0}));
            const int a_end = static_cast<int>(min(int64_t{K}, p.features.h - top));
            const float* features = element<const float>(p.features, n, c, top + a_begin, left);
            const float4* weights = reinterpret_cast<const float4*>(staged) + own * kTaps + a_begin * K;
#pragma unroll 1
            for (int a = a_begin; a < a_end; a++, features += p.features.stride_h, weights += K) {
#pragma unroll
                for (int x = 0; x < K + kSources - 1; x++) {
                    const bool inside = left + x >= 0 && left + x < p.features.w;
                    const float4 feature =
                        inside ? __ldg(reinterpret_cast<const float4*>(features + x * p.features.stride_w))
                               : make_float4(0, 0, 0, 0);
#pragma unroll
                    for (int s = 0; s < kSources; s++) {
                        if (x - s < 0 || x - s >= K) continue;
                        const float4 weight = weights[s * kTaps + x - s];
                        add_products(weight.x, feature, sums[s][0]);
                        add_products(weight.y, feature, sums[s][1]);
                        add_products(weight.z, feature, sums[s][2]);
                        add_products(weight.w, feature, sums[s][3]);
                    }
                }
            }
#pragma unroll
            for (int s = 0; s < kSources; s++) {
#pragma unroll
                for (int output = 0; output < kOutputs; output++) {
                    const int64_t out_i = i * kUp + output / kUp, out_j = (j + s) * kUp + output % kUp;
                    if (out_i >= p.out_h || out_j >= p.out_w) continue;
                    __stcs(reinterpret_cast<float4*>(element<float>(p.result, n, c, out_i, out_j)), sums[s][output]);
                }
            }
        }
        __syncthreads();
    }
}

template <int K>
void run(const Problem& p) {
    Cut cut;
    const int64_t vectors = p.features.c / p.groups / kVector;
    cut.lanes = 8;
    while (cut.lanes < 64 && cut.lanes < vectors) cut.lanes *= 2;
    cut.sources = kThreads / cut.lanes * kSources;
    cut.tiles = ceil_div(p.features.w, cut.sources);
    cut.chunks = ceil_div(vectors, cut.lanes);
    launch(reassemble_nhwc_kernel<K>, p.result.n * p.groups * p.features.h * cut.tiles * cut.chunks, kThreads,
           cut.sources * kOutputs * K * K * int64_t{sizeof(float)}, p.stream, p, cut);
}

}  // namespace

const char* not_for_reassemble_nhwc(const Problem& p) {
    if (p.factor.up != kUp || p.factor.down != 1) return "the factor is not 2";
    if (p.kernel_size != 3 && p.kernel_size != 5 && p.kernel_size != 7) return "kernel_size is not 3, 5 or 7";
    if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";
    if (p.features.c / p.groups % kVector != 0) return "channels of a group are not a multiple of 4";
    for (const Array* array : {&p.features, &p.result}) {
        if (array->empty()) continue;
        if (array->stride_c != 1) return "channels are not adjacent";
        for (int64_t stride : {array->stride_n, array->stride_h, array->stride_w}) {
            if (stride % kVector != 0) return "pixels are not 16 bytes, or a multiple, apart";
        }
        if (reinterpret_cast<uintptr_t>(array->data) % 16 != 0) return "an array is not aligned to 16 bytes";
    }
    return nullptr;
}

void reassemble_nhwc(const Problem& p) {
    if (p.result.empty()) return;
    switch (p.kernel_size) {
        case 3: return run<3>(p);
        case 5: return run<5>(p);
        case 7: return run<7>(p);
    }
}

}  // namespace carafepp::cuda
