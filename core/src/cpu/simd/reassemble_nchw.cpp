// SPDX-License-Identifier: Apache-2.0
//
// The forward with adjacent columns, compiled once for each instruction set. A vector holds the same output (row of a
// band, phase) of neighbouring cells; it needs the masks as they are staged. For a block of bands: stage the masks of
// all tiles, then for a few channels at a time contract the taps of one tile, and write out its rows with their phases
// interleaved.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/bands.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"

namespace carafepp {
namespace {

constexpr int64_t kStagedElements = 64 * 1024;  // of masks in a block of bands: in float 256 KiB, of a level 2 cache
constexpr int64_t kBlockBands = 4;  // rows of features are read again by the next band, soon enough to be in level 1
constexpr int64_t kBlockChannels = 16;  // so that the rows of features of a tile stay there too

// Lanes [begin, end).
struct Lanes {
    int begin, end;
};

// One tile of one band: where the windows of its first cell begin (perhaps outside), and which tap rows are inside.
template <class T>
struct Window {
    const T* corner;  // column 0 of the window of phase 0
    int64_t channel_stride, row_stride;
    int a_begin, a_end, kernel_size;
    int64_t first_column;  // of the corner, in its row
    int64_t width;
};

// `P` outputs that read the same windows, `NC` channels: sums go to [output][channel][lane]. `Inside`: no window leaves
// the row.
template <int Down, int P, int NC, bool Inside, class T>
__attribute__((noinline)) void contract(const Window<T>& window, int64_t offset, const Accumulator<T>* const* weights,
                                        int64_t tap_stride, Accumulator<T>* const* sums_of) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    Lanes there[kMaxKernelSize];  // of the columns that each tap loads
    if constexpr (!Inside) {
        for (int b = 0; b < window.kernel_size; b++) {
            const int64_t first = window.first_column + offset + b;
            there[b] = {static_cast<int>(std::clamp<int64_t>(-first, 0, Down * L)),
                        static_cast<int>(std::clamp<int64_t>(window.width - first, 0, Down * L))};
        }
    }
    Vector<A> sums[P][NC] = {};
    for (int a = window.a_begin; a < window.a_end; a++) {
        const T* row = window.corner + offset + a * window.row_stride;
        int64_t tap = a * window.kernel_size * tap_stride;
        for (int b = 0; b < window.kernel_size; b++, tap += tap_stride) {
            Vector<A> weight[P];
#pragma GCC unroll 4
            for (int o = 0; o < P; o++) weight[o] = load(weights[o] + tap);
#pragma GCC unroll 8
            for (int c = 0; c < NC; c++) {
                const T* const from = row + b + c * window.channel_stride;
                const Vector<A> features = Inside ? load_every<Down>(from)
                                                  : load_every<Down>(from, there[b].begin, there[b].end);
#pragma GCC unroll 4
                for (int o = 0; o < P; o++) sums[o][c] += weight[o] * features;
            }
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < P; o++) {
#pragma GCC unroll 8
        for (int c = 0; c < NC; c++) store(sums[o][c], sums_of[o] + c * L);
    }
}

// One row of outputs of `count` columns from the staged [phase][lane], whose phases lie `phase_stride` apart.
template <class T>
CARAFEPP_INLINE void write_row(const Accumulator<T>* staged, int64_t phase_stride, int64_t phases, int64_t count,
                               T* to) {
    using A = Accumulator<T>;
    constexpr int L = kLanes<A>;
    if (phases == 1) {
        store_part(load(staged), to, count);
    } else if (phases == 2) {
        const Vector<A> even = load(staged), odd = load(staged + phase_stride);
        store_part(shuffle<AlternatingLow, A>(even, odd), to, count);
        store_part(shuffle<AlternatingHigh, A>(even, odd), to + L, count - L);
    } else {
        for (int64_t phase = 0; phase < phases; phase++) {
            const A* lanes = staged + phase * phase_stride;
            for (int64_t column = phase; column < count; column += phases) to[column] = narrow<T>(*lanes++);
        }
    }
}

template <class T, class M>
struct ReassembleNchw {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;
    static constexpr int kChannels = kVectorRegisters == 32 ? 4 : 2;  // at once, with four outputs each
    static constexpr int kMostChannels = 8;                           // with one output each

    const Problem& p;
    const MaskTiles<M> masks{p, std::min(p.factor.up, p.out_w)};
    const int64_t phases = masks.phases;
    const Phases columns{p.factor, phases};
    const int64_t channels = p.features.c / p.groups;
    const int64_t band_rows = ceil_div(p.factor.up, p.factor.down);
    const int64_t band_size = band_rows * masks.row_size(L);  // of one tile

    void run() const {
        const int64_t cells = ceil_div(p.out_w, p.factor.up), tiles = ceil_div(cells, L),
                      bands = bands_in(p.factor, p.out_h);
        const int64_t panel = std::clamp<int64_t>(kStagedElements / band_size, 1, tiles),
                      panels = ceil_div(tiles, panel);
        const int64_t block = std::clamp<int64_t>(kStagedElements / (band_size * panel), 1, kBlockBands);
        const int64_t blocks = ceil_div(bands, block);
        const int64_t masks_size = block * panel * band_size;
        const int64_t scratch_size = masks_size + (2 + band_rows * kMostChannels) * phases * L;
        const int64_t items = p.result.n * p.groups * blocks * panels;
        const int threads = threads_for(items, p.multiply_adds() / kLanes<A>);
        A* const scratch = static_cast<A*>(scratch_bytes(threads * scratch_size * int64_t{sizeof(A)}));
        parallel_for(items, threads, [&](int64_t item, int worker) noexcept {
            Block b;
            b.staged = scratch + worker * scratch_size;
            b.sums = b.staged + masks_size;
            b.first_tile = item % panels * panel;
            b.tiles = std::min(panel, tiles - b.first_tile);
            b.first_band = item / panels % blocks * block;
            b.bands = std::min(block, bands - b.first_band);
            for (int64_t k = 0; k < b.bands; k++) b.rows[k] = band_of(p.factor, b.first_band + k, p.out_h);
            b.group = item / panels / blocks % p.groups;
            b.n = item / panels / blocks / p.groups;
            stage(b, cells);
            for (int64_t c = 0; c < channels; c += kBlockChannels) {
                const int64_t end = std::min(c + kBlockChannels, channels);
                for (int64_t tile = 0; tile < b.tiles; tile++) contract_tile(b, tile, c, end);
            }
        });
    }

    // What one item is: some bands of some tiles, all channels of a group.
    struct Block {
        int64_t n, group, first_tile, tiles, first_band, bands;
        Band rows[kBlockBands];
        A* staged;  // [band][tile][row of the band][tap][phase][lane]
        A* sums;    // [row of the band][phase][channel][lane]
    };

    A* staged(const Block& b, int64_t band, int64_t tile) const {
        return b.staged + (band * b.tiles + tile) * band_size;
    }

    void stage(const Block& b, int64_t cells) const {
        for (int64_t band = 0; band < b.bands; band++) {
            const Band& rows = b.rows[band];
            for (int64_t tile = 0; tile < b.tiles; tile++) {
                const int64_t cell = (b.first_tile + tile) * L;
                const int count = static_cast<int>(std::min<int64_t>(L, cells - cell));
                for (int64_t row = rows.begin; row < rows.end; row++) {
                    A* const to = staged(b, band, tile) + (row - rows.begin) * masks.row_size(L);
                    masks.stage(b.n, b.group, {row, row + 1}, cell, count, L, to);
                    clear_outside(cell, to);
                }
            }
        }
    }

    // Weights of taps beyond a border, where features are loaded as 0: 0 * 0 even where the weight is Inf.
    void clear_outside(int64_t cell, A* row) const {
        const int64_t k = p.kernel_size, down = p.factor.down, left = cell * down - p.radius();
        const int64_t farthest = columns.groups[columns.count - 1].offset + k - 1;
        if (left >= 0 && left + farthest + (L - 1) * down < p.features.w) return;
        for (int g = 0; g < columns.count; g++) {
            for (int64_t b = 0; b < k; b++) {
                const int64_t column = left + columns.groups[g].offset + b;  // of the first lane
                const int64_t begin = std::clamp<int64_t>(ceil_div(-column, down), 0, L);
                const int64_t end = std::clamp<int64_t>(ceil_div(p.features.w - column, down), begin, L);
                for (int64_t a = 0; a < k; a++) {
                    for (int phase = columns.groups[g].begin; phase < columns.groups[g].end; phase++) {
                        A* const lanes = row + ((a * k + b) * phases + phase) * L;
                        std::fill(lanes, lanes + begin, A{0});
                        std::fill(lanes + end, lanes + L, A{0});
                    }
                }
            }
        }
    }

    void contract_tile(const Block& b, int64_t tile, int64_t c, int64_t end) const {
        const bool one_output_a_window = p.factor.up <= p.factor.down;
        for (; one_output_a_window && c + kMostChannels <= end; c += kMostChannels)
            contract_bands<kMostChannels>(b, tile, c);
        for (; c + kChannels <= end; c += kChannels) contract_bands<kChannels>(b, tile, c);
        for (; c < end; c++) contract_bands<1>(b, tile, c);
    }

    template <int NC>
    void contract_bands(const Block& b, int64_t tile, int64_t c) const {
        const Factor& factor = p.factor;
        const int64_t cell = (b.first_tile + tile) * L, channel = b.group * channels + c;
        for (int64_t band = 0; band < b.bands; band++) {
            const Band& rows = b.rows[band];
            const int64_t top = rows.source - p.radius(), left = cell * factor.down - p.radius();
            Window<T> window;
            window.corner = element<const T>(p.features, b.n, channel, top, left);
            window.channel_stride = p.features.stride_c;
            window.row_stride = p.features.stride_h;
            window.kernel_size = static_cast<int>(p.kernel_size);
            window.a_begin = static_cast<int>(std::max<int64_t>(-top, 0));
            window.a_end = static_cast<int>(std::min(p.kernel_size, p.features.h - top));
            window.first_column = left;
            window.width = p.features.w;
            contract_phases<NC>(b, window, staged(b, band, tile), rows);
            for (int64_t row = rows.begin; row < rows.end; row++) {
                for (int64_t k = 0; k < NC; k++) {
                    write_row(b.sums + ((row - rows.begin) * phases * NC + k) * L, NC * L, phases,
                              std::min<int64_t>(phases * L, p.out_w - cell * factor.up),
                              element<T>(p.result, b.n, channel + k, row, cell * factor.up));
                }
            }
        }
    }

    // All outputs of a tile, up to four of those that read the same windows at a time.
    template <int NC>
    void contract_phases(const Block& b, const Window<T>& window, const A* tile, Band rows) const {
        const A* weights[4];
        A* sums[4];
        for (int g = 0; g < columns.count; g++) {
            const Phases::Group& group = columns.groups[g];
            int count = 0;
            for (int64_t row = 0; row < rows.end - rows.begin; row++) {
                for (int phase = group.begin; phase < group.end; phase++) {
                    weights[count] = tile + row * masks.row_size(L) + phase * L;
                    sums[count] = b.sums + (row * phases + phase) * NC * L;
                    count++;
                    if constexpr (NC <= kChannels) {
                        if (count == 4) {
                            contract_outputs<4, NC>(window, group.offset, weights, sums);
                            count = 0;
                        }
                    }
                }
            }
            if constexpr (NC <= kChannels) {
                if (count == 3) contract_outputs<3, NC>(window, group.offset, weights, sums);
                if (count == 2) contract_outputs<2, NC>(window, group.offset, weights, sums);
            }
            if (count == 1) contract_outputs<1, NC>(window, group.offset, weights, sums);
        }
    }

    template <int P, int NC>
    void contract_outputs(const Window<T>& window, int64_t offset, const A* const* weights, A* const* sums) const {
        const int64_t first = window.first_column + offset, stride = phases * L;
        const bool inside = first >= 0 && first + p.kernel_size - 1 + p.factor.down * L <= p.features.w;
        if (p.factor.down == 1) {
            inside ? contract<1, P, NC, true>(window, offset, weights, stride, sums)
                   : contract<1, P, NC, false>(window, offset, weights, stride, sums);
        } else {
            inside ? contract<2, P, NC, true>(window, offset, weights, stride, sums)
                   : contract<2, P, NC, false>(window, offset, weights, stride, sums);
        }
    }
};

}  // namespace

namespace CARAFEPP_ISA {

void reassemble_nchw(const Problem& problem) {
    with_types(problem, [&](auto features, auto masks) {
        ReassembleNchw<typename decltype(features)::type, typename decltype(masks)::type>{problem}.run();
    });
}

}  // namespace CARAFEPP_ISA
}  // namespace carafepp
