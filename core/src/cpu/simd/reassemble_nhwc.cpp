// SPDX-License-Identifier: Apache-2.0
//
// The forward with adjacent channels, compiled once for each instruction set. A vector holds channels of one pixel; the
// outputs that are centred on one source pixel (up*up of them for up >= down) read the same window, so that each vector
// of features that is loaded serves all of them; where one output is centred on a pixel, two neighbours share what
// their windows have in common. Stage the masks of a tile, contract the taps of one source pixel for a block of
// channels, write out.
#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/masks_nhwc.h"
#include "cpu/simd/nhwc_staging.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/shared_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// One source pixel, its window and the outputs centred on it. Or a pair of outputs, each centred on a pixel of its own:
// `window` is then the union of their windows, of which the second begins `shift` columns behind the first.
template <class T>
struct Site {
    using A = Accumulator<T>;

    PixelWindow<const T> window;
    int kernel_size, shift;
    int64_t tap_stride;
    static constexpr int kMost = kMaxFactor * kMaxFactor;
    const A* weights[kMost];  // of each output, of the taps in `window`, row by row, `tap_stride` apart
    T* outputs[kMost];
    int count = 0;
    bool streaming;  // past the caches
    PixelsAhead<T> ahead;
};

// The columns of a row of a window up to `end`, which are taps of the outputs [kFirst, kLast): from column `b` on,
// where `x` is.
template <int kFirst, int kLast, bool kTail, int P, int NV, class T>
CARAFEPP_INLINE void add_taps(const T*& x, int64_t pixel_stride, int& b, int end, int tail,
                              const Accumulator<T>* const (&weights)[P], int64_t tap_stride,
                              Vector<Accumulator<T>> (&sums)[P][NV]) {
    for (; b < end; b++, x += pixel_stride) {
        Vector<Accumulator<T>> features[NV];
        read_channels<NV, kTail>(x, tail, features);
#pragma GCC unroll 4
        for (int o = kFirst; o < kLast; o++) {
            const Vector<Accumulator<T>> weight = splat(weights[o][b * tap_stride]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) sums[o][v] += weight * features[v];
        }
    }
}

// `P` outputs from `first` on, or a pair with a window each; `NV` vectors of channels from `c` on.
template <int P, bool kPair, int NV, bool kTail, class T>
CARAFEPP_INLINE void contract(const Site<T>& site, int first, int64_t c, int tail) {
    using A = Accumulator<T>;
    Vector<A> sums[P][NV] = {};
    const PixelWindow<const T>& window = site.window;
    for (int a = window.a_begin; a < window.a_end; a++) {
        if (a - window.a_begin < site.ahead.rows) fetch_row<NV>(site.ahead, a - window.a_begin, c);
        const A* weights[P];
#pragma GCC unroll 4
        for (int o = 0; o < P; o++) weights[o] = site.weights[first + o] + a * site.kernel_size * site.tap_stride;
        int b = window.b_begin;
        const T* x = window.pixel(a, b) + c;
        if constexpr (kPair) {
            add_taps<0, 1, kTail>(x, window.pixel_stride, b, std::min(site.shift, window.b_end), tail, weights,
                                  site.tap_stride, sums);
            add_taps<0, 2, kTail>(x, window.pixel_stride, b, std::min(site.kernel_size, window.b_end), tail, weights,
                                  site.tap_stride, sums);
        }
        add_taps<kPair ? 1 : 0, P, kTail>(x, window.pixel_stride, b, window.b_end, tail, weights, site.tap_stride,
                                          sums);
    }
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) write_channels<NV, kTail>(sums[o], site.outputs[first + o] + c, tail, site.streaming);
}

// All channels of a group, for `P` outputs: blocks of as many vectors as the registers hold sums for, then fewer, then
// a tail.
template <int P, bool kPair, class T>
__attribute__((noinline)) void contract_channels(const Site<T>& site, int first, int64_t channels) {
    constexpr int L = kLanes<Accumulator<T>>;
    constexpr int kMost = P == 1 || (kPair && kVectorRegisters == 32) ? 8 : kPair || kVectorRegisters == 32 ? 4 : 2;
    int64_t c = 0;
    for (; c + kMost * L <= channels; c += kMost * L) contract<P, kPair, kMost, false>(site, first, c, 0);
    if (kMost > 4 && c + 4 * L <= channels) {
        contract<P, kPair, 4, false>(site, first, c, 0);
        c += 4 * L;
    }
    if (kMost > 2 && c + 2 * L <= channels) {
        contract<P, kPair, 2, false>(site, first, c, 0);
        c += 2 * L;
    }
    if (c + L <= channels) {
        contract<P, kPair, 1, false>(site, first, c, 0);
        c += L;
    }
    if (c < channels) contract<P, kPair, 1, true>(site, first, c, static_cast<int>(channels - c));
}

template <class T>
void contract_site(const Site<T>& site, int64_t channels) {
    if (site.shift > 0) return contract_channels<2, true>(site, 0, channels);
    int first = 0;
    for (; first + 4 <= site.count; first += 4) contract_channels<4, false>(site, first, channels);
    for (; first + 2 <= site.count; first += 2) contract_channels<2, false>(site, first, channels);
    if (first < site.count) contract_channels<1, false>(site, first, channels);
}

template <class T>
struct ReassembleNhwc {
    using A = Accumulator<T>;
    static constexpr int64_t L = kLanes<A>;  // as many cells are a tile

    static constexpr Result kResult = Result::kOutput;

    const Problem& p;
    const Array& output;
    const int64_t up = p.factor.up, down = p.factor.down, taps = p.taps();
    const MaskTiles<A> masks{p, std::min(up, p.out_w)};
    const Phases phases{p.factor, masks.phases};
    const int64_t cells = ceil_div(p.out_w, up);
    const int64_t channels = p.features.c / p.groups;
    const bool streaming = streams<T>(output, channels);

    const bool in_pairs = up == 1 && down < p.kernel_size;  // one output a cell, whose windows overlap
    const int64_t bands = bands_in(p.factor, p.out_h), band_rows = ceil_div(up, down);
    const int64_t items = output.n * p.groups * bands;
    const int64_t pixels_size = L * ceil_div(band_rows * up * taps, L) * L;
    const int64_t tile_size = band_rows * masks.row_size(L);
    const int64_t scratch_size = pixels_size + tile_size;

    // Where the weight of a tap of output (row, phase) of the q-th cell of a tile is.
    struct Weights {
        const A* first;
        int64_t row_stride, cell_stride, phase_stride, tap_stride;
    };

    void run_item(int64_t item, A* tile) const {
        const int64_t n = item / bands / p.groups, group = item / bands % p.groups;
        const Band rows = band_of(p.factor, item % bands, p.out_h);
        for (int64_t cell = 0; cell < cells; cell += L) {
            const int64_t count = std::min(L, cells - cell);
            const Weights weights = stage(n, group, rows, cell, count, tile, tile + tile_size);
            int64_t q = 0;
            if (in_pairs) {
                for (; q + 2 <= count; q += 2) contract_pair(n, group, rows, cell + q, weights, q);
            }
            for (; q < count; q++) contract_cell(n, group, rows, cell + q, weights, q);
        }
        if (streaming) finish_streams();
    }

    // Masks with adjacent channels are read where they are.
    Weights stage(int64_t n, int64_t group, Band rows, int64_t cell, int64_t count, A* tile, A* pixels) const {
        if (!p.from_logits && p.masks.stride_c == 1 && p.masks.dtype == kDtypeOf<A>) {
            return {element<const A>(p.masks, n, group * taps, rows.begin, cell * up), p.masks.stride_h,
                    up * p.masks.stride_w, p.masks.stride_w, 1};
        }
        if (p.from_logits && p.logits.stride_c == 1 && (up == 1 || down == 1) && CellMasks<A>::fits(up * up)) {
            const CellMasks<A> cell_masks{p.normalizer, static_cast<int>(taps * up * up), static_cast<int>(up * up)};
            cell_masks.normalize(p.logits, {n, group * taps * up * up, rows.begin / up, cell}, static_cast<int>(count),
                                 pixels);
            return {pixels, up, cell_masks.size, 1, up * up};
        }
        // Of other strides, transposing takes longer than reading them apart.
        if ((p.from_logits ? p.logits : p.masks).stride_c != 1) {
            masks.stage(n, group, {rows.begin, rows.end}, cell, static_cast<int>(count), L, tile);
            return {tile, masks.row_size(L), 1, L, masks.phases * L};
        }
        const int64_t row_stride = L * up * taps;
        masks.stage_pixels(n, group, {rows.begin, rows.end}, cell, count, tile, row_stride, pixels);
        return {pixels, row_stride, up * taps, taps, 1};
    }

    // Of the rows that the windows of the next band are the first to read: as many pixels as cells have of their own.
    PixelsAhead<T> ahead(int64_t n, int64_t group, int64_t source, int64_t cell, int cell_count) const {
        const int64_t row = source + p.radius() + 1, rows = std::min(ceil_div(down, up), p.features.h - row);
        return {element<const T>(p.features, n, group * channels, row, cell * down), p.features.stride_h,
                p.features.stride_w, static_cast<int>(rows), static_cast<int>(cell_count * down)};
    }

    void place(Site<T>& site, int64_t n, int64_t group, int64_t i, int64_t j, const Weights& weights, int shift) const {
        site.window = window_of<const T>(p, p.features, n, group * channels, i, j, shift);
        site.kernel_size = static_cast<int>(p.kernel_size);
        site.shift = shift;
        site.tap_stride = weights.tap_stride;
        site.streaming = streaming;
    }

    // All outputs of one cell, the q-th of its tile, window by window.
    void contract_cell(int64_t n, int64_t group, Band rows, int64_t cell, const Weights& weights, int64_t q) const {
        for (int g = 0; g < phases.count; g++) {
            const Phases::Group& columns = phases.groups[g];
            Site<T> site;
            place(site, n, group, rows.source, cell * down + columns.offset, weights, 0);
            if (g == 0) site.ahead = ahead(n, group, rows.source, cell, 1);
            for (int64_t row = rows.begin; row < rows.end; row++) {
                for (int64_t phase = columns.begin; phase < std::min<int64_t>(columns.end, p.out_w - cell * up);
                     phase++) {
                    site.weights[site.count] = weights.first + (row - rows.begin) * weights.row_stride +
                                               q * weights.cell_stride + phase * weights.phase_stride;
                    site.outputs[site.count++] = element<T>(output, n, group * channels, row, cell * up + phase);
                }
            }
            contract_site(site, channels);
        }
    }

    // The outputs of two neighbouring cells, which have one each.
    void contract_pair(int64_t n, int64_t group, Band row, int64_t cell, const Weights& weights, int64_t q) const {
        Site<T> site;
        place(site, n, group, row.source, cell * down, weights, static_cast<int>(down));
        site.ahead = ahead(n, group, row.source, cell, 2);
        for (int o = 0; o < 2; o++) {
            site.weights[o] = weights.first + (q + o) * weights.cell_stride - o * down * weights.tap_stride;
            site.outputs[o] = element<T>(output, n, group * channels, row.begin, cell + o);
        }
        contract_site(site, channels);
    }
};

}  // namespace

void reassemble_nhwc(const Problem& problem, const Array& output) { run<ReassembleNhwc>(problem, output); }

void reassemble_any(const Problem& problem, const Array& output) { run_on_images<ReassembleNhwc>(problem, output); }

}  // namespace carafepp::CARAFEPP_ISA
