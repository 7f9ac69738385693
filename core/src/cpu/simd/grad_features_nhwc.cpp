// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features with adjacent channels, compiled once for each instruction set. A block of source pixels is
// computed at once from all outputs whose windows touch it: each vector of grad_output that is loaded serves every
// pixel of the block that the output's window holds. For a panel of columns, going down: stage the masks of the next
// outputs, pack the weights of a block in the order of their use, contract, write out.
#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/shared_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kPanelBytes = 768 *
                                1024;  // of grad_output that the blocks of a panel's row share, in the level 2 cache
constexpr int64_t kRingBytes = 1024 * 1024;  // of staged masks
constexpr int64_t kChunkRows = 24;           // of sources that one item goes down; each begins with staging a window

constexpr int kRows = kVectorRegisters == 32 ? 3 : 2;     // of a block
constexpr int kColumns = kVectorRegisters == 32 ? 4 : 3;  // of a block
constexpr int kBlock = kRows * kColumns;
constexpr int kVectors = 2;  // of channels, of each pixel of a block

// Calls f(begin, end) of a range, the sources of a block of `Most` that a window holds, both known to the compiler. A
// window is at least as wide as a block less one, so that one end or the other is the block's: the range is numbered by
// the other one.
template <int Most, int Range = 2 * Most - 2, class F>
CARAFEPP_INLINE void with_range(int range, F f) {
    if constexpr (Range > 0) {
        if (range != Range) {
            with_range<Most, Range - 1>(range, f);
            return;
        }
    }
    constexpr int kBegin = Range < Most ? 0 : Range - Most + 1, kEnd = Range < Most ? Range + 1 : Most;
    f(std::integral_constant<int, kBegin>(), std::integral_constant<int, kEnd>());
}

// Neighbouring outputs of one row whose windows hold the same columns of a block.
struct Run {
    int range, count;
};

// One row of outputs whose windows touch a block: its first, and the weights [output][row][column of the block].
template <class T>
struct OutputRow {
    const T* grads;
    const Accumulator<T>* weights;
    int range;  // of the block's rows
};

// All outputs whose windows touch a block.
template <class T>
struct Outputs {
    const OutputRow<T>* rows;
    const Run* runs;
    int row_count, run_count;
    int64_t pixel_stride;

    // Of the rows that the block below is the first to need: as many pixels as it has columns of its own.
    const T* ahead;
    int64_t ahead_stride;
    int ahead_rows, ahead_pixels;
};

// A block of pixels of the result, of which some may be beyond its borders.
template <class T>
struct Pixels {
    T* first;
    int64_t row_stride, pixel_stride;
    int rows, columns;
    bool streaming;  // past the caches
};

// `NV` vectors of channels from `c` on, or the first `tail` lanes of one.
template <int NV, bool kTail, class T>
__attribute__((noinline)) void contract(const Outputs<T>& outputs, const Pixels<T>& pixels, int64_t c, int tail) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    Vector<A> sums[kRows][kColumns][NV] = {};
    for (const OutputRow<T>* row = outputs.rows; row < outputs.rows + outputs.row_count; row++) {
        if (row - outputs.rows < outputs.ahead_rows) {
            const T* ahead = outputs.ahead + (row - outputs.rows) * outputs.ahead_stride + c;
            for (int q = 0; q < outputs.ahead_pixels; q++, ahead += outputs.pixel_stride) {
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) __builtin_prefetch(ahead + v * L, 0, 2);
            }
        }
        const T* grads = row->grads + c;
        const A* weights = row->weights;
        with_range<kRows>(row->range, [&](auto r_begin, auto r_end) __attribute__((always_inline)) {
            for (const Run* run = outputs.runs; run < outputs.runs + outputs.run_count; run++) {
                with_range<kColumns>(run->range, [&](auto q_begin, auto q_end) __attribute__((always_inline)) {
                    int left = run->count;
                    do {
                        Vector<A> grad[NV];
                        read_channels<NV, kTail>(grads, tail, grad);
                        // The next channels of this pixel are the next ones wanted.
                        if constexpr (NV == kVectors) {
#pragma GCC unroll 4
                            for (int v = 0; v < NV; v++) __builtin_prefetch(grads + (NV + v) * L);
                        }
#pragma GCC unroll 4
                        for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
                            for (int q = 0; q < kColumns; q++) {
                                if (r < r_begin || r >= r_end || q < q_begin || q >= q_end) continue;
                                const Vector<A> weight = splat(weights[r * kColumns + q]);
#pragma GCC unroll 4
                                for (int v = 0; v < NV; v++) sums[r][q][v] += weight * grad[v];
                            }
                        }
                        grads += outputs.pixel_stride;
                        weights += kBlock;
                    } while (--left > 0);
                });
            }
        });
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
        for (int q = 0; q < kColumns; q++) {
            if (r >= pixels.rows || q >= pixels.columns) continue;
            write_channels<NV, kTail>(sums[r][q], pixels.first + r * pixels.row_stride + q * pixels.pixel_stride + c,
                                      tail, pixels.streaming);
        }
    }
}

template <class T>
void contract_channels(const Outputs<T>& outputs, const Pixels<T>& pixels, int64_t channels) {
    constexpr int64_t L = kLanes<Accumulator<T>>, kAtOnce = kVectors * L;
    if (channels < kAtOnce) {
        for (int64_t c = 0; c < channels; c += L)
            contract<1, true>(outputs, pixels, c, static_cast<int>(std::min(channels - c, L)));
        return;
    }
    for (int64_t c = 0; c < channels; c += kAtOnce)  // some once more, rather than few at a time
        contract<kVectors, false>(outputs, pixels, std::min(c, channels - kAtOnce), 0);
}

// A call cut into items: a chunk of source rows of a panel of source columns, for one image and group. The masks of the
// outputs of some rows of cells are staged in a ring, pixel by pixel: [row of cells][row][pixel][tap].
template <class T>
struct GradFeaturesNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;
    static constexpr int64_t kMostOutputs = (kColumns + kMaxKernelSize) * kMaxFactor;  // in a row, that touch a block

    static constexpr Result kResult = Result::kGradFeatures;

    const Problem& p;
    const Array& grad_features;
    const int64_t up = p.factor.up, down = p.factor.down, radius = p.radius(), taps = p.taps();
    const int64_t height = p.features.h, width = p.features.w, channels = p.features.c / p.groups;
    const MaskTiles<A> masks{p, std::min(up, p.out_w)};

    const int64_t ring_rows = ceil_div(2 * radius + kRows, down) + 1;  // of cells
    const int64_t block_outputs = outputs_of(2 * radius + kColumns), block_rows = outputs_of(2 * radius + kRows);
    const int64_t panel = panel_columns();
    const int64_t panels = ceil_div(width, panel);
    const int64_t panel_pixels = (ceil_div(panel + 2 * radius, down) + 1) * up;
    const int64_t chunk = ceil_div(ceil_div(height, ceil_div(height, kChunkRows)), kRows) * kRows;
    const int64_t chunks = ceil_div(height, chunk);

    // Packing reads whole rows of a block, also where a window holds less of it.
    const int64_t margin = kRows * p.kernel_size + kColumns;
    const int64_t ring_size = ring_rows * up * panel_pixels * taps;
    const int64_t tile_size = up * masks.row_size(L);
    const int64_t packed_size = block_rows * block_outputs * kBlock;
    const int64_t scratch_size = ceil_div(ring_size + 2 * margin, L) * L + tile_size + packed_size;
    const int64_t items = grad_features.n * p.groups * chunks * panels;

    // A line that is written in two parts, far apart in time, leaves the processor twice.
    const bool streaming = kVectors * L * int64_t{sizeof(T)} >= 64 && streams<T>(grad_features, channels);

    // At most as many outputs are centred on as many neighbouring sources.
    int64_t outputs_of(int64_t sources) const { return ceil_div(sources * up, down) + 1; }

    int64_t panel_columns() const {
        const int64_t pixel_bytes = block_rows * channels * int64_t{sizeof(T)};
        const int64_t pixels = std::min(kPanelBytes / pixel_bytes,
                                        kRingBytes / int64_t{sizeof(A)} / (ring_rows * up * taps));
        const int64_t most = std::max<int64_t>(pixels * down / up - 2 * radius, kColumns);
        return ceil_div(ceil_div(width, ceil_div(width, most)), kColumns) * kColumns;
    }

    struct Item {
        int64_t n, group, left, right, first_cell, end_cell;
        A *ring, *tile, *packed;
    };

    void run_item(int64_t item, A* scratch) const {
        Item at;
        at.left = item % panels * panel;
        at.right = std::min(at.left + panel, width);
        at.n = item / panels / chunks / p.groups;
        at.group = item / panels / chunks % p.groups;
        at.first_cell = first_output_inside(at.left - radius, p.out_w) / up;
        at.end_cell = ceil_div(first_output_inside(at.left + panel + radius, p.out_w), up);
        at.ring = scratch + margin;
        at.tile = at.ring + ceil_div(ring_size + 2 * margin, L) * L - margin;
        at.packed = at.tile + tile_size;
        const int64_t top = item / panels % chunks * chunk, bottom = std::min(top + chunk, height);
        int64_t staged = 0;  // rows of cells before it are
        for (int64_t i = top; i < bottom; i += kRows) {
            const int64_t end = ceil_div(first_output_inside(i + kRows + radius, p.out_h), up);
            staged = std::max(staged, first_output_inside(i - radius, p.out_h) / up);
            for (; staged < end; staged++) stage(at, staged);
            for (int64_t j = at.left; j < at.right; j += kColumns) contract_block(at, i, bottom, j);
        }
        if (streaming) finish_streams();
    }

    int64_t first_output_inside(int64_t source, int64_t outputs) const {
        return source <= 0 ? 0 : std::min(p.factor.first_output(source), outputs);
    }

    A* staged_row(const Item& at, int64_t out_i) const {
        return at.ring + (out_i / up % ring_rows * up + out_i % up) * panel_pixels * taps;
    }

    // The masks of the outputs of one row of cells, into the ring.
    void stage(const Item& at, int64_t cell_row) const {
        const Rows rows{cell_row * up, std::min((cell_row + 1) * up, p.out_h)};
        masks.stage_pixels(at.n, at.group, rows, at.first_cell, at.end_cell - at.first_cell, at.tile,
                           panel_pixels * taps, staged_row(at, rows.begin));
    }

    // The block of source pixels with its corner at (i, j).
    void contract_block(const Item& at, int64_t i, int64_t bottom, int64_t j) const {
        Run runs[2 * kColumns];
        int64_t taps_of[kMostOutputs];  // of the output's window, where the block's first pixel is in its rows
        OutputRow<T> rows[kMostOutputs];
        const int64_t first = first_output_inside(j - radius, p.out_w);
        const int64_t end = first_output_inside(j + kColumns + radius, p.out_w);
        Outputs<T> outputs{};
        outputs.rows = rows;
        outputs.runs = runs;
        outputs.pixel_stride = p.grad_output.stride_w;

        int64_t source = p.factor.source(first), remainder = first * down - source * up;
        for (int64_t q = first; q < end; q++) {
            const int range = range_in_block(source - j, kColumns);
            if (outputs.run_count == 0 || runs[outputs.run_count - 1].range != range)
                runs[outputs.run_count++] = {range, 0};
            runs[outputs.run_count - 1].count++;
            taps_of[q - first] = (q - at.first_cell * up) * taps + j - source + radius;
            for (remainder += down; remainder >= up; remainder -= up) source++;
        }

        A* packed = at.packed;
        const int64_t last_row = first_output_inside(i + kRows + radius, p.out_h);
        for (int64_t row = first_output_inside(i - radius, p.out_h); row < last_row; row++) {
            const int64_t source_row = p.factor.source(row);
            rows[outputs.row_count++] = {element<const T>(p.grad_output, at.n, at.group * channels, row, first), packed,
                                         range_in_block(source_row - i, kRows)};
            const A* const weights = staged_row(at, row) + (i - source_row + radius) * p.kernel_size;
            for (int64_t q = 0; q < end - first; q++, packed += kBlock) {
#pragma GCC unroll 4
                for (int b = 0; b < kRows; b++)
                    std::memcpy(packed + b * kColumns, weights + taps_of[q] + b * p.kernel_size, kColumns * sizeof(A));
            }
        }
        const int64_t next_rows = first_output_inside(i + 2 * kRows + radius, p.out_h);
        const int64_t own = first_output_inside(j + radius, p.out_w);
        outputs.ahead = element<const T>(p.grad_output, at.n, at.group * channels, last_row, own);
        outputs.ahead_stride = p.grad_output.stride_h;
        outputs.ahead_rows = static_cast<int>(next_rows - last_row);
        outputs.ahead_pixels = static_cast<int>(first_output_inside(j + radius + kColumns, p.out_w) - own);
        const Pixels<T> pixels{element<T>(grad_features, at.n, at.group * channels, i, j),
                               grad_features.stride_h,
                               grad_features.stride_w,
                               static_cast<int>(std::min<int64_t>(kRows, bottom - i)),
                               static_cast<int>(std::min<int64_t>(kColumns, width - j)),
                               streaming};
        contract_channels(outputs, pixels, channels);
    }

    // Of a block that begins at 0, what the window of an output centred on `source` holds.
    int range_in_block(int64_t source, int most) const {
        const int64_t begin = source - radius, end = source + radius + 1;
        return static_cast<int>(begin <= 0 ? std::min<int64_t>(end, most) - 1 : most - 1 + begin);
    }
};

}  // namespace

void grad_features_nhwc(const Problem& problem, const Array& grad_features) {
    run<GradFeaturesNhwc>(problem, grad_features);
}

void grad_features_any(const Problem& problem, const Array& grad_features) {
    run_on_images<GradFeaturesNhwc>(problem, grad_features);
}

}  // namespace carafepp::CARAFEPP_ISA
