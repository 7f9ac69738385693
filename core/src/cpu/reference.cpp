// SPDX-License-Identifier: Apache-2.0
//
// Every function works on one row of outputs at a time, grad_features on one row of sources. It stages the masks of a
// tile (copies them, or normalises logits), contracts the taps, and writes the result. Staging converts to the type of
// the sums and removes the strides, so one contraction serves every dtype and layout.
//
// Staged rows of outputs are sorted by phase, and those of sources by residue (cpu/geometry.h). The bounds of the inner
// loops leave out taps beyond a border.
#include "reference.h"

#include <algorithm>
#include <vector>

#include "cpu/geometry.h"
#include "dtypes.h"
#include "normalizer.h"
#include "parallel.h"
#include "scratch.h"

namespace carafepp::reference {
namespace {

constexpr int64_t kTileElements = 32 * 1024;  // staged masks or sums; 128 KiB of float
constexpr double kCostOfExp = 20;             // multiply-adds

// Staged rows of the same cells.
template <class A>
struct Staged {
    A* data;
    Range cells;
    A* at(int64_t row, int64_t cell) const { return data + row * cells.size() + (cell - cells.begin); }
};

template <class T, class A>
void load(const T* from, int64_t stride, int64_t count, A* to) {
    if (stride == 1) {
        for (int64_t q = 0; q < count; q++) to[q] = widen(from[q]);
    } else {
        for (int64_t q = 0; q < count; q++) to[q] = widen(from[q * stride]);
    }
}

template <class A, class T>
void store(const A* from, int64_t count, T* to, int64_t stride) {
    if (stride == 1) {
        for (int64_t q = 0; q < count; q++) to[q] = narrow<T>(from[q]);
    } else {
        for (int64_t q = 0; q < count; q++) to[q * stride] = narrow<T>(from[q]);
    }
}

template <class A>
void multiply_add(const A* __restrict a, const A* __restrict b, int64_t count, A* __restrict sum) {
    for (int64_t q = 0; q < count; q++) sum[q] += a[q] * b[q];
}

// The residues that some tap reads, each of which is a staged row of sources.
struct StagedResidues {
    std::vector<int64_t> residues;
    std::vector<int64_t> rows;  // [phase][b]; the row of a tap

    StagedResidues(const Columns& columns) {
        for (const Columns::Tap& tap : columns.table) residues.push_back(tap.residue);
        std::sort(residues.begin(), residues.end());
        residues.erase(std::unique(residues.begin(), residues.end()), residues.end());
        for (const Columns::Tap& tap : columns.table)
            rows.push_back(std::lower_bound(residues.begin(), residues.end(), tap.residue) - residues.begin());
    }
};

// One problem: T stores features and outputs, M masks and logits; sums are kept in A.
template <class T, class M>
class Reference {
public:
    using A = Accumulator<T>;

    Reference(const Problem& problem, int64_t phases)
        : p_(problem),
          taps_(problem.taps()),
          images_(problem.from_logits ? problem.logits.n : problem.masks.n),
          channels_(problem.features.c / problem.groups),
          columns_(problem, phases),
          staged_(columns_) {}

    void reassemble(const Array& output) const {
        const int64_t cells = tile_of_masks(taps_);
        const int64_t row_size = columns_.phases * cells, masks_size = taps_ * row_size,
                      sources_size = staged_sources(cells);
        const double cost = p_.cost() + cost_of_normalizing();
        for_each_tile(p_.out_h, columns_.cells, cells, cost, masks_size + 3 * row_size + sources_size,
                      [&](const Tile& tile, A* scratch) {
            A* const sources_memory = scratch + masks_size;
            const Staged<A> sums{sources_memory + sources_size, tile.cells};
            const Staged<A> masks = stage_masks(tile, tile.row, tile.cells, 0, taps_, scratch,
                                                sums.at(columns_.phases, tile.cells.begin));
            for (int64_t c = tile.group * channels_; c < (tile.group + 1) * channels_; c++) {
                std::fill_n(sums.data, columns_.phases * tile.cells.size(), A{0});
                for_each_tap_row(tile.row, [&](int64_t a, int64_t i) {
                    const Staged<A> sources = stage_sources(tile.n, c, i, tile.cells, sources_memory);
                    for_each_tap(tile.cells, [&](int64_t phase, int64_t b, const Columns::Tap& tap, Range q) {
                        const int64_t t = a * p_.kernel_size + b;
                        multiply_add(masks.at(t * columns_.phases + phase, q.begin),
                                     sources.at(staged_row(phase, b), q.begin + tap.shift), q.size(),
                                     sums.at(phase, q.begin));
                    });
                });
                write_outputs<T>(sums, 0, tile.n, c, tile.row, output);
            }
        });
    }

    void grad_features(const Array& grad_features) const {
        // Tiles hold sources here, and sums are [channel of a block][residue][cell]. At least 32 channels share staged
        // masks.
        const int64_t residues = std::min(columns_.down, columns_.width);
        const int64_t source_cells = ceil_div(columns_.width, columns_.down);
        const int64_t staged_taps = p_.from_logits ? taps_ : p_.kernel_size;
        const int64_t cells = std::clamp<int64_t>(std::min(kTileElements / 32 / residues, tile_of_masks(staged_taps)),
                                                  1, source_cells);
        const int64_t sums_size = residues * cells;
        const int64_t block = std::clamp<int64_t>(kTileElements / sums_size, 1, channels_);
        const int64_t blocks = ceil_div(channels_, block);
        const int64_t row_size = columns_.phases * std::min(cells + columns_.halo() + 1, columns_.cells);
        const int64_t masks_size = staged_taps * row_size;
        const double cost = p_.cost() + cost_of_normalizing() * static_cast<double>(p_.kernel_size * blocks);
        for_each_tile(p_.features.h, source_cells, cells, cost, masks_size + 3 * row_size + block * sums_size,
                      [&](const Tile& tile, A* scratch) {
            A* const grads_memory = scratch + masks_size;
            const Range outputs = cells_reading(tile.cells);
            const Range rows = outputs_of(p_, {tile.row, tile.row + 1});
            for (int64_t first = tile.group * channels_; first < (tile.group + 1) * channels_; first += block) {
                const Range channels = {first, std::min(first + block, (tile.group + 1) * channels_)};
                A* const sums_memory = grads_memory + 3 * row_size;
                std::fill_n(sums_memory, block * sums_size, A{0});
                for (int64_t out_i = rows.begin; out_i < rows.end && outputs.size() > 0; out_i++) {
                    const int64_t a = tile.row - p_.rows().source(out_i) + p_.radius();
                    const Staged<A> masks = stage_masks(tile, out_i, outputs, a * p_.kernel_size, p_.kernel_size,
                                                        scratch, grads_memory);
                    for (int64_t c = channels.begin; c < channels.end; c++) {
                        const Staged<A> grads = stage_outputs(p_.grad_output, tile.n, c, out_i, outputs, grads_memory);
                        const Staged<A> sums{sums_memory + (c - first) * sums_size, tile.cells};
                        for_each_tap(outputs, [&](int64_t phase, int64_t b, const Columns::Tap& tap, Range reached) {
                            const Range q = {std::max(reached.begin, tile.cells.begin - tap.shift),
                                             std::min(reached.end, tile.cells.end - tap.shift)};
                            multiply_add(masks.at(b * columns_.phases + phase, q.begin), grads.at(phase, q.begin),
                                         q.size(), sums.at(tap.residue, q.begin + tap.shift));
                        });
                    }
                }
                for (int64_t c = channels.begin; c < channels.end; c++) {
                    const Staged<A> sums{sums_memory + (c - first) * sums_size, tile.cells};
                    for (int64_t residue = 0; residue < residues; residue++) {
                        const int64_t end = std::min(tile.cells.end, columns_.sources(residue));
                        store(
                            sums.at(residue, tile.cells.begin), end - tile.cells.begin,
                            element<T>(grad_features, tile.n, c, tile.row, tile.cells.begin * columns_.down + residue),
                            grad_features.stride_w * columns_.down);
                    }
                }
            }
        });
    }

    void grad_masks(const Array& grad_masks) const {
        store_gradient(grad_masks, [&](const Tile& tile, const Staged<A>& grad, A* sources_memory, A* outputs_memory) {
            contract_channels(tile, grad, sources_memory, outputs_memory);
        });
    }

    void normalize_masks_backward(const Array& grad_logits) const {
        store_gradient(grad_logits, [&](const Tile& tile, const Staged<A>& grad, A*, A*) {
            stage_taps(p_.grad_masks, tile, tile.row, tile.cells, 0, taps_, grad.data);
        });
    }

    void normalize_masks(const Array& masks) const {
        const int64_t cells = tile_of_masks(taps_), row_size = columns_.phases * cells, masks_size = taps_ * row_size;
        for_each_tile(p_.out_h, columns_.cells, cells, cost_of_normalizing(), masks_size + 2 * row_size,
                      [&](const Tile& tile, A* scratch) {
            const Staged<A> staged = stage_masks(tile, tile.row, tile.cells, 0, taps_, scratch, scratch + masks_size);
            for (int64_t t = 0; t < taps_; t++)
                write_outputs<M>(staged, t * columns_.phases, tile.n, tile.group * taps_ + t, tile.row, masks);
        });
    }

private:
    struct Tile {
        int64_t n, group, row;
        Range cells;
    };

    // Stores the gradient of masks or logits. The gradient of masks comes from gradient_of(tile, grad, sources_memory,
    // outputs_memory), which finds zeros in `grad`. With logits, tiles cover cropped outputs too.
    template <class F>
    void store_gradient(const Array& result, const F& gradient_of) const {
        const int64_t rows = p_.from_logits ? p_.logits.h * p_.factor.up : p_.out_h;
        const int64_t row_cells = p_.from_logits ? p_.logits.w : columns_.cells;
        const int64_t cells = std::min(tile_of_masks(taps_), row_cells);
        const int64_t row_size = columns_.phases * cells, masks_size = taps_ * row_size,
                      sources_size = staged_sources(cells);
        const double cost = p_.cost() + 2 * cost_of_normalizing();
        for_each_tile(rows, row_cells, cells, cost, 3 * masks_size + sources_size + 3 * row_size,
                      [&](const Tile& tile, A* scratch) {
            const Staged<A> grad{scratch, tile.cells};
            A* const sources_memory = scratch + 3 * masks_size;
            A* const spare = sources_memory + sources_size;
            std::fill_n(grad.data, taps_ * columns_.phases * tile.cells.size(), A{0});
            if (tile.row < p_.out_h) {
                gradient_of(tile, grad, sources_memory, spare);
                if (p_.from_logits) to_logits(tile, grad, scratch + masks_size, scratch + 2 * masks_size, spare);
            }
            for (int64_t t = 0; t < taps_; t++) {
                if (p_.from_logits) {
                    write_logits(grad, t, tile, result);
                } else {
                    write_outputs<M>(grad, t * columns_.phases, tile.n, tile.group * taps_ + t, tile.row, result);
                }
            }
        });
    }

    // Calls f(tile, scratch) for all tiles of all rows, on as many threads as the cost is worth.
    template <class F>
    void for_each_tile(int64_t rows, int64_t row_cells, int64_t cells, double cost, int64_t scratch_size,
                       const F& f) const {
        const int64_t tiles = ceil_div(row_cells, cells), items = images_ * p_.groups * rows * tiles;
        const int threads = threads_for(items, cost);
        A* const scratch = static_cast<A*>(scratch_bytes(threads * scratch_size * int64_t{sizeof(A)}));
        parallel_for(items, threads, [&](int64_t item, int worker) noexcept {
            Tile tile;
            tile.cells.begin = item % tiles * cells;
            tile.cells.end = std::min(tile.cells.begin + cells, row_cells);
            tile.row = item / tiles % rows;
            tile.group = item / tiles / rows % p_.groups;
            tile.n = item / tiles / rows / p_.groups;
            f(tile, scratch + worker * scratch_size);
        });
    }

    // Cells of a tile whose masks have so many staged taps.
    int64_t tile_of_masks(int64_t staged_taps) const {
        const int64_t cell_size = std::max<int64_t>(staged_taps * columns_.phases, 1);
        return std::clamp<int64_t>(kTileElements / cell_size, 1, std::max<int64_t>(columns_.cells, 1));
    }

    int64_t staged_sources(int64_t cells) const {
        return static_cast<int64_t>(staged_.residues.size()) *
               std::min(cells + columns_.halo() + 1, ceil_div(columns_.width, columns_.down));
    }

    double cost_of_normalizing() const {
        if (!p_.from_logits) return 0;
        return kCostOfExp * static_cast<double>(p_.logits.n) * static_cast<double>(p_.groups * taps_) *
               static_cast<double>(p_.out_h) * static_cast<double>(p_.out_w);
    }

    // Calls f(a, i) for the tap rows `a` of an output row. Their source rows i are inside the border.
    template <class F>
    void for_each_tap_row(int64_t out_i, F f) const {
        const int64_t top = p_.rows().source(out_i) - p_.radius();
        const Range sources = sources_of(p_, {out_i, out_i + 1});
        for (int64_t i = sources.begin; i < sources.end; i++) f(i - top, i);
    }

    // Calls f(phase, b, tap, range) for every tap. The range has the outputs of `cells` whose source column is inside
    // the border.
    template <class F>
    void for_each_tap(Range cells, F f) const {
        for (int64_t phase = 0; phase < columns_.phases; phase++) {
            const Range outputs = outputs_in(cells, phase);
            for (int64_t b = 0; b < columns_.kernel_size; b++) {
                const Columns::Tap& tap = columns_.tap(phase, b);
                f(phase, b, tap,
                  Range{std::max(outputs.begin, tap.inside.begin), std::min(outputs.end, tap.inside.end)});
            }
        }
    }

    // The row of staged sources that a tap reads.
    int64_t staged_row(int64_t phase, int64_t b) const {
        return staged_.rows[static_cast<size_t>(phase * columns_.kernel_size + b)];
    }

    Range outputs_in(Range cells, int64_t phase) const {
        return {cells.begin, std::min(cells.end, columns_.outputs(phase))};
    }

    // The cells of sources that these cells of outputs may read, and the reverse.
    Range cells_read(Range outputs) const {
        return {std::max<int64_t>(outputs.begin + columns_.least_shift, 0),
                std::min(outputs.end + columns_.most_shift, ceil_div(columns_.width, columns_.down))};
    }
    Range cells_reading(Range sources) const {
        return {std::max<int64_t>(sources.begin - columns_.most_shift, 0),
                std::min(sources.end - columns_.least_shift, columns_.cells)};
    }

    // One row of an array of outputs: [phase][cell].
    Staged<A> stage_outputs(const Array& array, int64_t n, int64_t c, int64_t out_i, Range cells, A* to) const {
        const Staged<A> staged{to, cells};
        for (int64_t phase = 0; phase < columns_.phases; phase++) {
            const T* const row = element<const T>(array, n, c, out_i, cells.begin * columns_.up + phase);
            load(row, array.stride_w * columns_.up, outputs_in(cells, phase).size(), staged.at(phase, cells.begin));
        }
        return staged;
    }

    // One row of features, as far as outputs of these cells may read it: [residue that a tap reads][cell].
    Staged<A> stage_sources(int64_t n, int64_t c, int64_t i, Range cells, A* to) const {
        const Staged<A> staged{to, cells_read(cells)};
        const Array& features = p_.features;
        for (size_t row = 0; row < staged_.residues.size(); row++) {
            const int64_t residue = staged_.residues[row];
            const T* const from = element<const T>(features, n, c, i, staged.cells.begin * columns_.down + residue);
            const int64_t count = std::min(staged.cells.end, columns_.sources(residue)) - staged.cells.begin;
            load(from, features.stride_w * columns_.down, count,
                 staged.at(static_cast<int64_t>(row), staged.cells.begin));
        }
        return staged;
    }

    // Taps [first, first + count) of an array of masks: [tap][phase][cell].
    void stage_taps(const Array& array, const Tile& tile, int64_t out_i, Range cells, int64_t first, int64_t count,
                    A* to) const {
        const Staged<A> staged{to, cells};
        for (int64_t t = 0; t < count; t++) {
            for (int64_t phase = 0; phase < columns_.phases; phase++) {
                const int64_t channel = tile.group * taps_ + first + t;
                const M* const row = element<const M>(array, tile.n, channel, out_i, cells.begin * columns_.up + phase);
                load(row, array.stride_w * columns_.up, outputs_in(cells, phase).size(),
                     staged.at(t * columns_.phases + phase, cells.begin));
            }
        }
    }

    M* logits_row(const Array& array, const Tile& tile, int64_t t, int64_t out_i, int64_t phase, int64_t cell) const {
        const int64_t up = columns_.up;
        const int64_t channel = ((tile.group * taps_ + t) * up + out_i % up) * up + phase;
        return element<M>(array, tile.n, channel, out_i / up, cell);
    }

    // All taps of an array of logits: [tap][phase][cell].
    void stage_logits(const Tile& tile, int64_t out_i, Range cells, A* to) const {
        const Staged<A> staged{to, cells};
        for (int64_t t = 0; t < taps_; t++) {
            for (int64_t phase = 0; phase < columns_.phases; phase++) {
                const M* const row = logits_row(p_.logits, tile, t, out_i, phase, cells.begin);
                load(row, p_.logits.stride_w, cells.size(), staged.at(t * columns_.phases + phase, cells.begin));
            }
        }
    }

    // Taps [first, first + count) of the masks: [tap][phase][cell]. A normaliser needs room for all taps.
    Staged<A> stage_masks(const Tile& tile, int64_t out_i, Range cells, int64_t first, int64_t count, A* to,
                          A* spare) const {
        if (!p_.from_logits) {
            stage_taps(p_.masks, tile, out_i, cells, first, count, to);
            return {to, cells};
        }
        stage_logits(tile, out_i, cells, to);
        const int64_t tap_size = columns_.phases * cells.size();
        normalize(p_.normalizer, to, taps_, tap_size, tap_size, spare);
        return {to + first * tap_size, cells};
    }

    // grad[t] += sum over the channels of a group of grad_output * features at tap t.
    void contract_channels(const Tile& tile, const Staged<A>& grad, A* sources_memory, A* outputs_memory) const {
        for (int64_t c = tile.group * channels_; c < (tile.group + 1) * channels_; c++) {
            const Staged<A> outputs = stage_outputs(p_.grad_output, tile.n, c, tile.row, tile.cells, outputs_memory);
            for_each_tap_row(tile.row, [&](int64_t a, int64_t i) {
                const Staged<A> sources = stage_sources(tile.n, c, i, tile.cells, sources_memory);
                for_each_tap(tile.cells, [&](int64_t phase, int64_t b, const Columns::Tap& tap, Range q) {
                    const int64_t t = a * p_.kernel_size + b;
                    multiply_add(outputs.at(phase, q.begin), sources.at(staged_row(phase, b), q.begin + tap.shift),
                                 q.size(), grad.at(t * columns_.phases + phase, q.begin));
                });
            });
        }
    }

    // Turns the gradient of the masks of a tile into that of its logits. Cropped outputs give exactly 0.
    void to_logits(const Tile& tile, const Staged<A>& grad, A* logits, A* masks, A* spare) const {
        const int64_t tap_size = columns_.phases * tile.cells.size();
        stage_logits(tile, tile.row, tile.cells, logits);
        std::copy_n(logits, taps_ * tap_size, masks);
        normalize(p_.normalizer, masks, taps_, tap_size, tap_size, spare);
        normalize_backward(p_.normalizer, grad.data, masks, logits, taps_, tap_size, tap_size, spare);
        for (int64_t row = 0; row < taps_ * columns_.phases; row++) {
            const int64_t outputs = outputs_in(tile.cells, row % columns_.phases).size();
            std::fill_n(grad.at(row, tile.cells.begin) + outputs, tile.cells.size() - outputs, A{0});
        }
    }

    // Writes one row of the result from `phases` staged rows.
    template <class Out>
    void write_outputs(const Staged<A>& staged, int64_t first_row, int64_t n, int64_t c, int64_t out_i,
                       const Array& result) const {
        for (int64_t phase = 0; phase < columns_.phases; phase++) {
            Out* const row = element<Out>(result, n, c, out_i, staged.cells.begin * columns_.up + phase);
            store(staged.at(first_row + phase, staged.cells.begin), outputs_in(staged.cells, phase).size(), row,
                  result.stride_w * columns_.up);
        }
    }

    void write_logits(const Staged<A>& staged, int64_t t, const Tile& tile, const Array& grad_logits) const {
        for (int64_t phase = 0; phase < columns_.phases; phase++) {
            store(staged.at(t * columns_.phases + phase, tile.cells.begin), tile.cells.size(),
                  logits_row(grad_logits, tile, t, tile.row, phase, tile.cells.begin), grad_logits.stride_w);
        }
    }

    const Problem& p_;
    const int64_t taps_;
    const int64_t images_;    // N
    const int64_t channels_;  // of a group
    const Columns columns_;
    const StagedResidues staged_;
};

template <class F>
void with_reference(const Problem& problem, int64_t phases, F f) {
    with_types(problem, [&](auto features, auto masks) {
        f(Reference<typename decltype(features)::type, typename decltype(masks)::type>(problem, phases));
    });
}

}  // namespace

void reassemble(const Problem& problem, const Array& output) {
    with_reference(problem, std::min(problem.factor.up, problem.out_w),
                   [&](const auto& reference) { reference.reassemble(output); });
}

void grad_features(const Problem& problem, const Array& grad_features) {
    with_reference(problem, std::min(problem.factor.up, problem.out_w),
                   [&](const auto& reference) { reference.grad_features(grad_features); });
}

void grad_masks(const Problem& problem, const Array& grad_masks) {
    const int64_t phases = problem.from_logits ? problem.factor.up : std::min(problem.factor.up, problem.out_w);
    with_reference(problem, phases, [&](const auto& reference) { reference.grad_masks(grad_masks); });
}

void normalize_masks(const Problem& problem, const Array& masks) {
    with_reference(problem, std::min(problem.factor.up, problem.out_w),
                   [&](const auto& reference) { reference.normalize_masks(masks); });
}

void normalize_masks_backward(const Problem& problem, const Array& grad_logits) {
    with_reference(problem, problem.factor.up,
                   [&](const auto& reference) { reference.normalize_masks_backward(grad_logits); });
}

}  // namespace carafepp::reference
