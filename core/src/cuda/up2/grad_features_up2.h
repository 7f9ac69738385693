// SPDX-License-Identifier: Apache-2.0
// The gradients of features for up x2, in gather form. A block goes down a strip, 14 columns of the result, in many
// channels. A row of sources at a time, it stages grad_output and masks. A thread has two pixels of a row of the result
// in eight channels, of the K rows that a row of sources reaches: each gradient that it loads serves up to 2 * K
// pixels, each mask eight channels. Then the uppermost of these rows is finished, and a new one takes its registers.
// While a row is summed, gradients and logits of the next one arrive. From sm_90 on gradients come as boxes, where a
// tensor map can describe them.
#pragma once

#include "cuda/tensor_map.h"
#include "cuda/tiles.h"
#include "cuda/up2/stage_masks_up2.h"

namespace carafepp::cuda {

constexpr int kPixels = 2, kColumnGroups = 7;      // of a thread, in a row; threads along columns
constexpr int kColumns = kPixels * kColumnGroups;  // of a strip
constexpr int kLanes = 8, kOwnChannels = 8;        // threads along channels; channels of a thread
constexpr int kChannels = kLanes * kOwnChannels;   // of a slice
constexpr int kThreadsOfSlice = kLanes * kColumnGroups, kMostSlices = 4;  // of a block
constexpr int kBefore = 2;  // columns of sources before a strip, and as many behind it
constexpr int kInRow = kColumns + 2 * kBefore, kGradsInRow = kUp * kInRow;  // sources and outputs that reach a strip
constexpr int kSlice = kUp * kGradsInRow * kChannels;                       // gradients of a row of sources
constexpr int kOfPair = 2;  // sources of which gradients are loaded at once
static_assert(kBefore >= 5 / 2 && (kPixels + 2 * kBefore) % kOfPair == 0);

template <int K>
constexpr int kMasks = kInRow * K * K * kOutputs;  // of a row of sources

// How rows of strips are spread over blocks.
struct Strips {
    Tiles tiles;
    int slices;            // of a block
    int64_t shared_bytes;  // two buffers of gradients and of masks, and a barrier for each buffer
    bool boxes = false;    // a slice of a row is copied at once
    CUtensorMap slice{};   // of grad_output

    template <int K>
    static Strips of(const Problem& p) {
        constexpr auto bytes = [](int slices) {
            return 2 * (slices * kSlice + kMasks<K>)*int64_t{sizeof(float)} + 2 * int64_t{sizeof(uint64_t)};
        };
        static_assert(bytes(1) <= kMostAskedBytes);
        const int64_t all = std::max<int64_t>(ceil_div(p.features.c / p.groups, int64_t{kChannels}), 1);
        int most = kMostSlices;
        while (most > 1 && not_for_shared_memory(bytes(most)) != nullptr) most--;
        const int slices = even_part(all, most);
        Tiles tiles(p, p.features.h, p.features.w, rows_of_strip(p, slices, ceil_div(all, int64_t{slices})), kColumns,
                    kChannels, 0);
        tiles.channels = slices * kChannels;
        tiles.channel_blocks = ceil_div(all, int64_t{slices});
        tiles.items *= tiles.channel_blocks;
        return {tiles, slices, bytes(slices)};
    }

private:
    // As many rows that the busiest multiprocessor is done first. To begin a strip takes as long as some rows. A
    // multiprocessor with less than all the slices that it has room for is partly idle.
    static int rows_of_strip(const Problem& p, int slices, int64_t channel_blocks) {
        constexpr int64_t kRowsToBegin = 3, kFewestRows = 2, kEach = 16;  // few numbers of parts are tried
        const int64_t height = std::max<int64_t>(p.features.h, 1), at_once = kMostSlices / slices,
                      strips = p.features.n * p.groups * channel_blocks * ceil_div(p.features.w, int64_t{kColumns});
        int64_t least = INT64_MAX, best = height;
        for (int64_t parts = 1; parts <= ceil_div(height, kFewestRows); parts += ceil_div(parts, kEach)) {
            const int64_t rows = ceil_div(height, parts), items = strips * ceil_div(height, rows),
                          cost = std::max(ceil_div(items, kMultiprocessors), at_once) * (rows + kRowsToBegin);
            if (cost < least) best = rows;
            least = std::min(cost, least);
        }
        return static_cast<int>(best);
    }
};

// Why a kernel for any factor is faster: threads of channels that a group does not have are idle.
inline const char* slower_by_strips(const Problem& p) {
    const int64_t channels = p.features.c / p.groups, of_slices = ceil_div(channels, int64_t{kChannels}) * kChannels;
    return 3 * channels < 2 * of_slices ? "a group has few of the channels of its slices" : nullptr;
}

// A thread's part of a strip.
struct PartOfStrip {
    int slice, column, lane;

    static __device__ __forceinline__ PartOfStrip of_thread() {
        const int thread = thread_computed_late();
        return {thread / kThreadsOfSlice, thread / kLanes % kColumnGroups * kPixels, thread % kLanes};
    }
};

// Copies masks or logits of rows of sources, to [source][tap][output]. The threads of the first slice do. A thread has
// a vector of logits of some sources, or some channels of one, and its place in the first row.
template <int K>
class CopiesOfMasks {
public:
    __device__ __forceinline__ CopiesOfMasks(const Problem& p, const TileOfItem& tile)
        : left_(tile.left - kBefore), vectors_(in_vectors<float>(p.logits)) {
        const int thread = thread_computed_late(), lanes = vectors_ ? kTaps : kInRow;
        const int lane = thread % lanes, other = thread / lanes;
        source_ = vectors_ ? other : lane;
        channel_ = vectors_ ? lane * kVector : other;
        if (other >= kThreadsOfSlice / lanes) source_ = kInRow;  // none
        const int64_t end = p.features.w - left_;
        begin_ = max(-left_, 0);
        count_ = static_cast<unsigned>(min(int64_t{kInRow}, end) - begin_);
        from_ = element<const float>(p.logits, tile.n, tile.group * kLogits + channel_, 0, left_ + source_);
    }

    __device__ __forceinline__ void copy(const Problem& p, const TileOfItem& tile, int row, float* masks) const {
        if (!p.from_logits) {
            if (thread_computed_late() < kThreadsOfSlice)
                copy_sources<K, kThreadsOfSlice, float>(p, tile.n, tile.group, row, left_, 1, kInRow, masks);
            return;
        }
        if (source_ >= kInRow) return;
        const float* from = from_ + row * p.logits.stride_h;
        float* to = masks + source_ * kLogits + channel_;
        if (vectors_) {
            constexpr int kAtOnce = kThreadsOfSlice / kTaps;
            static_assert(kInRow % kAtOnce == 0);
#pragma unroll 3
            for (int x = 0; x < kInRow; x += kAtOnce, from += kAtOnce * p.logits.stride_w, to += kAtOnce * kLogits)
                copy_async<kVector * sizeof(float)>(to, from, exists(source_ + x));
        } else {
            constexpr int kAtOnce = kThreadsOfSlice / kInRow;
            constexpr int kWhole = kLogits / kAtOnce;
            const bool exist = exists(source_);
#pragma unroll(kWhole / 3)
            for (int k = 0; k < kWhole; k++, from += kAtOnce * p.logits.stride_c, to += kAtOnce)
                copy_async<sizeof(float)>(to, from, exist);
            if (channel_ < kLogits % kAtOnce) copy_async<sizeof(float)>(to, from, exist);
        }
    }

private:
    static constexpr int kTaps = K * K, kLogits = kTaps * kOutputs;  // of a source

    __device__ __forceinline__ bool exists(int source) const { return static_cast<unsigned>(source - begin_) < count_; }

    int left_, begin_, source_, channel_;
    unsigned count_;  // of sources that exist, from begin_ on
    bool vectors_;
    const float* from_;
};

// Turns logits of a row of sources, which all threads see, into masks: those of an output in a thread, the last thread
// first. They are 0 where a crop leaves the output out, as the gradient is 0 there.
template <int K>
__device__ __forceinline__ void finish_masks(const Problem& p, const TileOfItem& tile, int row, float* masks) {
    if (!p.from_logits) return;
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int output = threads - 1 - thread_computed_late(); output < kInRow * kOutputs; output += threads) {
        const int source = output / kOutputs, sub_pixel = output % kOutputs;
        float* const of_output = masks + source * K * K * kOutputs + sub_pixel;
        const bool exists = row * kUp + sub_pixel / kUp < p.out_h &&
                            (tile.left - kBefore + source) * kUp + sub_pixel % kUp < p.out_w;
        if (p.normalizer != CARAFEPP_SOFTMAX || !exists) {
#pragma unroll 1
            for (int t = 0; t < K * K; t++) {
                float& logit = of_output[t * kOutputs];
                logit = !exists                                       ? 0
                        : p.normalizer == CARAFEPP_SIGMOID            ? sigmoid(logit)
                        : p.normalizer == CARAFEPP_SIGMOID_NORMALIZED ? log_sigmoid(logit)
                                                                      : logit;
            }
        }
        if (!exists || p.normalizer == CARAFEPP_SIGMOID || p.normalizer == CARAFEPP_NONE) continue;
        float taps[K * K];
        load_each(of_output, kOutputs, taps);
        normalize_registers(CARAFEPP_SOFTMAX, TapsOfThread<K>(), taps);
#pragma unroll
        for (int t = 0; t < K * K; t++) of_output[t * kOutputs] = taps[t];
    }
}

// The sums of the rows that a row of sources reaches: of[a] of the one whose row of taps a it is. Rows that are not
// wanted keep what their registers have.
template <int K>
struct SumsOfRows {
    float of[K][kPixels][kOwnChannels] = {};

    // Adds the products of a pair of sources in the `wanted` rows, bit a of row of taps a. Masks are those of the
    // thread's first source and of others behind it. A row's first product goes on from its sum of the last row of
    // sources, which is that of the next row of taps.
    __device__ __forceinline__ void add(int pair, const float (&grads)[kOwnChannels][kOfPair][kOutputs],
                                        const float4* masks, unsigned wanted) {
#pragma unroll
        for (int a = 0; a < K; a++) {
            if ((wanted & 1u << a) == 0) continue;
#pragma unroll
            for (int k = 0; k < kOfPair * kPixels; k++) {
                const int x = pair * kOfPair + k / kPixels, q = k % kPixels, b = q - x + kBefore + K / 2;
                if (b < 0 || b >= K) continue;
                const float4 mask = masks[(x * K + a) * K + b];
                const float of_output[kOutputs] = {mask.x, mask.y, mask.z, mask.w};
#pragma unroll
                for (int o = 0; o < kOutputs; o++) {
#pragma unroll
                    for (int c = 0; c < kOwnChannels; c++) {
                        if (b == K - 1 && o == 0) of[a][q][c] = a + 1 < K ? of[(a + 1) % K][q][c] : 0;
                        of[a][q][c] += of_output[o] * grads[c][k / kPixels][o];
                    }
                }
            }
        }
    }

    // Goes on to a row without sources.
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int a = 0; a < K; a++) {
#pragma unroll
            for (int k = 0; k < kPixels * kOwnChannels; k++) {
                const int q = k / kOwnChannels, c = k % kOwnChannels;
                of[a][q][c] = a + 1 < K ? of[(a + 1) % K][q][c] : 0;
            }
        }
    }
};

// Has any thread of a warp something to store? After a vote the compiler knows that the warp does not part.
__device__ __forceinline__ bool warp_has(bool some) { return __any_sync(0xffffffffu, some) != 0; }

// Computes the strips of a block. A layout copies gradients of a row of sources, loads those of a thread, and stores
// its pixels of a row of the result. In a slice of gradients, channels or columns are innermost.
template <int K, bool ChannelsInnermost, class Layout, class Plan>
__device__ __forceinline__ void sum_strips(const Arguments& arguments, const Plan& plan) {
    constexpr int kPairs = (kPixels + 2 * kBefore) / kOfPair;
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const int of_buffer = plan.strips.slices * kSlice;
    float* const grads = shared_memory<float>();  // [buffer][slice]
    float* const masks = grads + 2 * of_buffer;   // [buffer][source][tap][output]
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(masks + 2 * kMasks<K>);
    const bool boxes = kCopiesBoxes && plan.strips.boxes;
    if (boxes && threadIdx.x == 0) {
        begin_barrier(barriers);
        begin_barrier(barriers + 1);
    }
    __syncthreads();
    int buffer = 0;
    unsigned phase = 0;  // of both buffers
    for (int64_t item = blockIdx.x; item < plan.strips.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.strips.tiles, item);
        const PartOfStrip own = PartOfStrip::of_thread();
        const int bottom = static_cast<int>(min(int64_t{tile.top + plan.strips.tiles.rows}, grad_features.h));
        const int first = max(tile.top - K / 2, 0), end = bottom + K / 2;              // rows of sources
        const int last = min(end, static_cast<int>(ceil_div(p.out_h, int64_t{kUp})));  // behind those that exist
        const CopiesOfMasks<K> copies(p, tile);
        const auto copy = [&](int row, int to) {
            copies.copy(p, tile, row, masks + to * kMasks<K>);
            if (boxes) {
                if (threadIdx.x != 0) return;
                expect_bytes(barriers + to, of_buffer * static_cast<int>(sizeof(float)));
#pragma unroll 1
                for (int slice = 0; slice < plan.strips.slices; slice++) {
                    const int c = static_cast<int>(tile.c) + slice * kChannels, j = (tile.left - kBefore) * kUp;
                    copy_box(grads + to * of_buffer + slice * kSlice, plan.strips.slice, ChannelsInnermost ? c : j,
                             ChannelsInnermost ? j : c, row * kUp, static_cast<int>(tile.n), barriers + to);
                }
                return;
            }
            Layout::copy_row(p, tile, own, plan, row, grads + to * of_buffer + own.slice * kSlice);
        };
        const int columns = static_cast<int>(min(grad_features.w - tile.left - own.column, int64_t{kPixels}));
        Layout layout(grad_features, tile, own, columns);
        const bool has_some = warp_has(columns > 0 && own.slice * kChannels < tile.channels);
        SumsOfRows<K> sums;
        if (first < last) {
            copy(first, buffer);
            wait_for_copies();
            __syncthreads();
            finish_masks<K>(p, tile, first, masks + buffer * kMasks<K>);
        }
#pragma unroll 1
        for (int row = first; row < last; row++) {
            if (boxes) wait_for_phase(barriers + buffer, phase);
            __syncthreads();
            const bool more = row + 1 < last;
            if (more) copy(row + 1, buffer ^ 1);
            const int above = max(tile.top + K / 2 - row, 0), below = max(row + K / 2 + 1 - bottom, 0);
            const unsigned wanted = has_some ? ((1u << K) - 1) >> below & ~0u << above : 0;
            const float* const own_grads = grads + buffer * of_buffer + own.slice * kSlice + Layout::place(own);
            const float4* const own_masks = reinterpret_cast<const float4*>(masks + buffer * kMasks<K>) +
                                            own.column * K * K;
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
                float loaded[kOwnChannels][kOfPair][kOutputs];
                Layout::load(own_grads, pair, loaded);
                sums.add(pair, loaded, own_masks, wanted);
                if (pair == 0 && more) {
                    wait_for_copies();
                    __syncthreads();
                    finish_masks<K>(p, tile, row + 1, masks + (buffer ^ 1) * kMasks<K>);
                }
            }
            if (row - K / 2 >= tile.top) layout.store(sums.of[0], plan);
            phase ^= static_cast<unsigned>(buffer);
            buffer ^= 1;
        }
#pragma unroll 1
        for (int row = max(first, last); row < end; row++) {
            sums.advance();
            if (row - K / 2 >= tile.top) layout.store(sums.of[0], plan);
        }
    }
}

// Launches the strips of a plan. Channels or columns are innermost in a slice, and in its boxes.
template <bool ChannelsInnermost, class Plan>
void launch_strips(void (*kernel)(Arguments, Plan), const Problem& p, const Array& grad_features, Plan plan) {
    Strips& strips = plan.strips;
    const Array& grads = p.grad_output;
    const AxisOfBox channels{grads.c, grads.stride_c, kChannels}, columns{grads.w, grads.stride_w, kGradsInRow};
    strips.boxes = is_compiled_for(90, kernel) && describe_boxes(grads,
                                                                 {ChannelsInnermost ? channels : columns,
                                                                  ChannelsInnermost ? columns : channels,
                                                                  {grads.h, grads.stride_h, kUp},
                                                                  {grads.n, grads.stride_n, 1}},
                                                                 &strips.slice);
    launch(kernel, strips.tiles.items, strips.slices * kThreadsOfSlice, strips.shared_bytes, p, grad_features, plan);
}

}  // namespace carafepp::cuda
