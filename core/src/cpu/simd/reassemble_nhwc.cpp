// SPDX-License-Identifier: Apache-2.0
//
// The forward with adjacent channels, compiled once for each instruction set. A vector holds channels of one pixel; the
// outputs that are centred on one source pixel (up*up of them for up >= down) read the same window, so that each vector
// of features that is loaded serves all of them: stage the masks of a tile, contract the taps of one source pixel for a
// block of channels, write out.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/bands.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/windows.h"

namespace carafepp {
namespace {

// One source pixel: where its window begins (perhaps outside), which taps of it are inside, and the outputs centred on
// it.
template <class T>
struct Site {
    using A = Accumulator<T>;

    const T* window;
    int64_t row_stride, pixel_stride;
    int a_begin, a_end, b_begin, b_end, kernel_size;
    int64_t tap_stride;    // of the staged masks
    const A* weights[64];  // of each output, at its first tap
    T* outputs[64];
    int count;
};

// `P` outputs from `first` on, `NV` vectors of channels from `c` on.
template <int P, int NV, Store store_as, class T>
CARAFEPP_INLINE void contract(const Site<T>& site, int first, int64_t c, int tail) {
    using A = Accumulator<T>;
    Vector<A> sums[P][NV] = {};
    for (int a = site.a_begin; a < site.a_end; a++) {
        const T* x = site.window + a * site.row_stride + site.b_begin * site.pixel_stride + c;
        int64_t tap = (a * site.kernel_size + site.b_begin) * site.tap_stride;
        for (int b = site.b_begin; b < site.b_end; b++, x += site.pixel_stride, tap += site.tap_stride) {
            Vector<A> features[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) {
                features[v] = store_as == Store::kTail ? load_between(x, 0, tail) : load(x + v * kLanes<A>);
            }
#pragma GCC unroll 4
            for (int o = 0; o < P; o++) {
                const Vector<A> weight = splat(site.weights[first + o][tap]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) sums[o][v] += weight * features[v];
            }
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) {
        T* const y = site.outputs[first + o] + c;
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) write_channels<store_as>(sums[o][v], y + v * kLanes<A>, tail);
    }
}

// All channels of a group, for `P` outputs: blocks of as many vectors as the registers hold sums for, then fewer, then
// a tail.
template <int P, Store store_as, class T>
void contract_channels(const Site<T>& site, int first, int64_t channels) {
    constexpr int L = kLanes<Accumulator<T>>;
    constexpr int kMost = P == 1 ? 8 : kVectorRegisters == 32 ? 4 : 2;
    int64_t c = 0;
    for (; c + kMost * L <= channels; c += kMost * L) contract<P, kMost, store_as>(site, first, c, 0);
    if (kMost > 4 && c + 4 * L <= channels) {
        contract<P, 4, store_as>(site, first, c, 0);
        c += 4 * L;
    }
    if (kMost > 2 && c + 2 * L <= channels) {
        contract<P, 2, store_as>(site, first, c, 0);
        c += 2 * L;
    }
    if (c + L <= channels) {
        contract<P, 1, store_as>(site, first, c, 0);
        c += L;
    }
    if (c < channels) contract<P, 1, Store::kTail>(site, first, c, static_cast<int>(channels - c));
}

template <Store store_as, class T>
void contract_site(const Site<T>& site, int64_t channels) {
    int first = 0;
    for (; first + 4 <= site.count; first += 4) contract_channels<4, store_as>(site, first, channels);
    switch (site.count - first) {
        case 3: contract_channels<3, store_as>(site, first, channels); break;
        case 2: contract_channels<2, store_as>(site, first, channels); break;
        case 1: contract_channels<1, store_as>(site, first, channels); break;
    }
}

template <class T, class M>
struct ReassembleNhwc {
    using A = Accumulator<T>;

    const Problem& p;
    const MaskTiles<M> masks{p, std::min(p.factor.up, p.out_w)};
    const int64_t row_size = masks.row_size(kLanes<A>);
    const Phases phases{p.factor, masks.phases};
    const int64_t cells = ceil_div(p.out_w, p.factor.up);
    const int64_t channels = p.features.c / p.groups;

    void run() const {
        const int64_t bands = bands_in(p.factor, p.out_h);
        const int64_t band_rows = ceil_div(p.factor.up, p.factor.down);
        const int64_t scratch_size = band_rows * row_size;
        const int64_t items = p.result.n * p.groups * bands;
        const int threads = threads_for(items, p.multiply_adds() / kLanes<A>);
        A* const scratch = static_cast<A*>(scratch_bytes(threads * scratch_size * int64_t{sizeof(A)}));
        const bool streaming = streams<T>(p.result, channels);
        parallel_for(items, threads, [&](int64_t item, int worker) noexcept {
            const int64_t n = item / bands / p.groups, group = item / bands % p.groups;
            const Band rows = band_of(p.factor, item % bands, p.out_h);
            A* const tile = scratch + worker * scratch_size;
            for (int64_t cell = 0; cell < cells; cell += kLanes<A>) {
                const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, cells - cell));
                masks.stage(n, group, {rows.begin, rows.end}, cell, count, kLanes<A>, tile);
                for (int lane = 0; lane < count; lane++) contract_cell(n, group, rows, cell, lane, tile, streaming);
            }
            if (streaming) _mm_sfence();
        });
    }

    // All outputs of one cell, window by window.
    void contract_cell(int64_t n, int64_t group, Band rows, int64_t cell, int lane, const A* tile,
                       bool streaming) const {
        const int64_t k = p.kernel_size, r = p.radius(), top = rows.source - r;
        Site<T> site;
        site.row_stride = p.features.stride_h;
        site.pixel_stride = p.features.stride_w;
        site.kernel_size = static_cast<int>(k);
        site.a_begin = static_cast<int>(std::max<int64_t>(-top, 0));
        site.a_end = static_cast<int>(std::min(k, p.features.h - top));
        site.tap_stride = masks.phases * kLanes<A>;
        const int64_t first_column = (cell + lane) * p.factor.up;
        for (int g = 0; g < phases.count; g++) {
            const Phases::Group& columns = phases.groups[g];
            const int64_t left = (cell + lane) * p.factor.down + columns.offset - r;
            const int64_t end = std::min<int64_t>(columns.end, p.out_w - first_column);
            site.window = element<const T>(p.features, n, group * channels, top, left);
            site.b_begin = static_cast<int>(std::max<int64_t>(-left, 0));
            site.b_end = static_cast<int>(std::min(k, p.features.w - left));
            site.count = 0;
            for (int64_t row = rows.begin; row < rows.end; row++) {
                for (int64_t phase = columns.begin; phase < end; phase++) {
                    site.weights[site.count] = tile + (row - rows.begin) * row_size + phase * kLanes<A> + lane;
                    site.outputs[site.count++] = element<T>(p.result, n, group * channels, row, first_column + phase);
                }
            }
            if (streaming) {
                contract_site<kStreamed<T>>(site, channels);
            } else {
                contract_site<Store::kPlain>(site, channels);
            }
        }
    }
};

}  // namespace

namespace CARAFEPP_ISA {

void reassemble_nhwc(const Problem& problem) {
    with_types(problem, [&](auto features, auto masks) {
        ReassembleNhwc<typename decltype(features)::type, typename decltype(masks)::type>{problem}.run();
    });
}

}  // namespace CARAFEPP_ISA
}  // namespace carafepp
