// SPDX-License-Identifier: Apache-2.0
// The gradient of masks or logits for any factor with features of 16 bits, on tensor cores. A block has a tile of
// patches of 4 x 4 outputs of a group. It goes through the channels a slice at a time: in shared memory are features
// with their halo, and gradients, both with adjacent channels. Where these are vectors in memory, the next slice
// arrives meanwhile. A warp multiplies pixels of a patch's window by the gradients of its outputs, summed over
// channels. Any 16 pixels are the rows of a product, since each tells its own address. All sums stay in registers until
// the last slice. Those of an output and the pixels of its own window are gradients of masks. They meet in shared
// memory, where eight threads carry those of an output through the normaliser.
#pragma once

#include "cuda/any/grad_masks_finish.h"
#include "cuda/any/stage_pixels.h"

namespace carafepp::cuda {

constexpr int kPatch = 4;             // rows and columns of outputs
constexpr int kEight = 2 * kPatch;    // outputs of a product: two rows of a patch
constexpr int kPixelsOfProduct = 16;  // and channels
constexpr int kMostProducts = 4;      // of a warp, for each eight
constexpr int kMostWarps = 8;         // of a block

// A pixel's number in a tile goes along rows of the halo. Behind the halo are outputs, in eights: two rows of four.
struct GradMasksMmaPlan {
    Outputs rows, columns;  // of masks, or of the sub-pixels of logits
    OutputsOfTile outputs;
    uint32_t row_tiles, column_tiles, groups;
    int64_t items = 0;
    Divisor patches_in_row;  // of a tile
    int patches;
    Divisor parts;  // warps of a patch
    int products;   // of a warp
    int window_rows;
    Divisor window_columns;
    int halo_rows, halo_columns;
    Divisor pitch;                     // pixels from row to row of a halo
    bool feature_pairs, output_pairs;  // of columns are loaded
    int channels_of_group;
    int channels, pixel;  // of a slice; elements from pixel to pixel
    int slice;            // elements
    int threads = 32;
    bool normalized;  // gradients go through the normaliser
    int64_t places_bytes, shared_bytes;

    GradMasksMmaPlan(const Problem& p, bool vectors)
        : rows(p.factor, p.offset_h, p.from_logits ? p.logits.h * p.factor.up : p.out_h),
          columns(p.factor, p.offset_w, p.from_logits ? p.logits.w * p.factor.up : p.out_w),
          outputs{kPatch,     Divisor(1), columns.count, Divisor(p.from_logits ? static_cast<int>(p.factor.up) : 1),
                  Divisor(1), Divisor(1), Divisor(1),    0,
                  0},
          groups(static_cast<uint32_t>(p.groups)),
          patches_in_row(1),
          patches(1),
          parts(1),
          window_columns(1),
          pitch(1),
          feature_pairs(!vectors && not_for_columns(p.features) == nullptr),
          output_pairs(!vectors && not_for_columns(p.grad_output) == nullptr),
          channels_of_group(static_cast<int>(p.features.c / p.groups)),
          normalized(p.from_logits && p.normalizer != CARAFEPP_NONE) {
        window_rows = most_sources(p.factor, kPatch - 1, kPatch) + static_cast<int>(p.kernel_size);
        const auto products_of = [&](int across) { return ceil_div(int64_t{window_rows} * across, kPixelsOfProduct); };
        const int64_t all = products_of(window_rows);
        // An even number suits an even pitch: see measure().
        const int even = window_rows + window_rows % 2;
        window_columns = Divisor(feature_pairs && products_of(even) == all ? even : window_rows);
        shared_bytes = INT64_MAX;
        if (all > kMostProducts * kMostWarps) return;
        parts = Divisor(static_cast<int>(ceil_div(all, kMostProducts)));
        products = static_cast<int>(ceil_div(all, parts.number));
        choose_tile(p, vectors);
    }

private:
    // The tile and the slices that take the least time and fit in shared memory.
    void choose_tile(const Problem& p, bool vectors) {
        GradMasksMmaPlan best = *this;
        double least = INFINITY;
        for (channels = 4 * kPixelsOfProduct; channels >= kPixelsOfProduct; channels /= 2) {
            if (channels > kPixelsOfProduct && channels >= 2 * channels_of_group) continue;
            for (int patch_rows = 1; patch_rows * parts.number <= kMostWarps; patch_rows++) {
                for (int across = 1; patch_rows * across * parts.number <= kMostWarps; across++) {
                    measure(p, vectors, patch_rows, across);
                    if (shared_bytes > kMostSharedBytes) continue;
                    const double cost = cycles(p, vectors);
                    if (cost >= least) continue;
                    least = cost;
                    best = *this;
                }
            }
        }
        *this = best;
    }

    void measure(const Problem& p, bool vectors, int patch_rows, int across) {
        const int k = static_cast<int>(p.kernel_size), up = outputs.cell.number;
        const int width = across * kPatch;
        patches_in_row = Divisor(across);
        patches = patch_rows * across;
        threads = patches * parts.number * 32;
        outputs.rows = patch_rows * kPatch;
        outputs.columns = Divisor(width);
        outputs.rows_of_cell = Divisor(outputs.rows % up == 0 ? up : 1);
        outputs.columns_of_cell = Divisor(width % up == 0 ? up : 1);
        outputs.cells_in_row = Divisor(width / outputs.columns_of_cell.number);
        // Rows of a cell begin in different banks, and so do eight taps of four outputs.
        outputs.pitch = width + (!vectors ? 1 : outputs.rows_of_cell.number > 1 && width % 16 == 0 ? 8 : 0);
        outputs.room = static_cast<int>(ceil_div(outputs.rows * outputs.pitch, 8)) * 8 + 4;
        row_tiles = static_cast<uint32_t>(ceil_div(rows.count, outputs.rows));
        column_tiles = static_cast<uint32_t>(ceil_div(columns.count, width));
        items = p.features.n * p.groups * row_tiles * column_tiles;
        halo_rows = most_sources(p.factor, outputs.rows - kPatch, outputs.rows) + window_rows;
        halo_columns = most_sources(p.factor, width - kPatch, width) + window_rows;
        // Halos begin with an even column where two columns are loaded at once.
        const bool even_tiles = width * p.factor.down % (2 * p.factor.up) == 0;
        if (feature_pairs && !(even_tiles && (p.offset_w - k / 2) % 2 == 0)) halo_columns++;
        // If rows are as far apart as those of a window, modulo 8, eight pixels of a product are in different banks.
        constexpr int kMostMore = 3;
        const int more = ((window_columns.number - halo_columns) % 8 + 8) % 8;
        int apart = halo_columns + (more <= kMostMore ? more : 0);
        if (feature_pairs) apart += apart % 2;
        pitch = Divisor(apart);
        pixel = channels + kWide;  // an odd number of vectors
        const int64_t pixels = int64_t{halo_rows} * apart + outputs.count();
        slice = static_cast<int>(pixels * pixel);
        places_bytes = std::max(ceil_div(pixels, 2) * 2 * int64_t{sizeof(int64_t)},
                                outputs.count() * int64_t{sizeof(OutputPlace)});
        const int64_t finished = (normalized ? 2 : 1) * p.taps() * outputs.room * int64_t{sizeof(float)};
        shared_bytes = outputs.rows * int64_t{sizeof(Slot)} + width * int64_t{sizeof(int)} + places_bytes +
                       std::max((vectors && channels_of_group > channels ? 2 : 1) * int64_t{slice} *
                                    int64_t{sizeof(uint16_t)},
                                finished);
    }

    // Roughly what the multiprocessor with the most tiles takes: for instructions, wavefronts of the L1 and bytes of
    // the L2, which are partly at once, and for waiting.
    double cycles(const Problem& p, bool vectors) const {
        constexpr double kIssued = 2.4, kBytes = 22, kLatency = 700, kConflicts = 1.25;
        const double slices = static_cast<double>(ceil_div(channels_of_group, channels)), warps = threads / 32,
                     steps = slices * channels / kPixelsOfProduct;
        const double of_halo = halo_rows * pitch.number, of_outputs = outputs.count(), pixels = of_halo + of_outputs,
                     staged = pixels * slices * channels / kWide;  // vectors
        const double taps = static_cast<double>(p.taps()) * of_outputs / 32;
        const int cells = static_cast<int>(ceil_div(outputs.columns.number, outputs.cell.number));
        const double rows_of_slices = slices * channels;  // for each row of pixels
        const auto sectors = [](int columns) { return columns / 16.0 + 1; };
        const double lines = vectors ? pixels * slices : rows_of_slices * 1.3 * (halo_rows + outputs.rows);
        const double of_taps = (normalized ? 2 : 1) * (vectors ? 4 : 32.0 / std::min(cells, 32));  // lines
        const double of_vector = vectors ? 10 : feature_pairs ? 36 : 50;
        const double instructions = staged / 32 * of_vector + warps * (slices * 60 + steps * (5 * products + 6) + 600) +
                                    taps * (normalized ? 45 : 15) + 1500;
        const double wavefronts = lines + kConflicts * (staged / 8 + warps * steps * 4 * (products + 1)) +
                                  taps * (of_taps + (normalized ? 12 : 4));
        const double bytes = 32 * (vectors ? staged / 2 + of_taps * taps * 2
                                           : rows_of_slices * (halo_rows * sectors(halo_columns) +
                                                               outputs.rows * sectors(outputs.columns.number - 1)) +
                                                 of_taps * taps);
        const double resident = std::min<int64_t>(200 * 1024 / (shared_bytes + 1024), 768 / threads);
        const double each = static_cast<double>(ceil_div(items, kMultiprocessors));
        const double issue = instructions / kIssued, transfer = bytes / kBytes;
        return each * (std::max({issue, wavefronts, transfer}) + issue + wavefronts + transfer) / 2 +
               std::ceil(each / resident) * (slices + 3) * kLatency;
    }
};

struct TileOfPatches {
    int n, group;
    int top, left;  // output

    __device__ __forceinline__ TileOfPatches(const GradMasksMmaPlan& plan, uint32_t item) {
        const uint32_t row = item / plan.column_tiles, image_and_group = row / plan.row_tiles;
        left = static_cast<int>(item - row * plan.column_tiles) * plan.outputs.columns.number;
        top = static_cast<int>(row - image_and_group * plan.row_tiles) * plan.outputs.rows;
        n = static_cast<int>(image_and_group / plan.groups);
        group = static_cast<int>(image_and_group - n * plan.groups);
    }
};

// Adds the products of a slice: of 16 pixels each, whose addresses are at `pixels`, and of two eights of outputs.
template <class T>
__device__ __forceinline__ void add_products(const Float16* slice, const int (&pixels)[kMostProducts], int outputs,
                                             int products, int steps, float (&sums)[kMostProducts][2][4]) {
#pragma unroll 1
    for (int step = 0; step < steps; step++, slice += kPixelsOfProduct) {
        uint32_t grads[4];
        load_matrices<false>(slice + outputs, grads);
#pragma unroll
        for (int product = 0; product < kMostProducts; product++) {
            if (product >= products) break;
            uint32_t features[4];
            load_matrices<false>(slice + pixels[product], features);
            multiply_add<T>(sums[product][0], features, {grads[0], grads[1]});
            multiply_add<T>(sums[product][1], features, {grads[2], grads[3]});
        }
    }
}

__device__ __forceinline__ void finish_over_normalizers(SoftmaxGradient& gradient) {
    const auto add = [](float a, float b) { return a + b; };
    gradient.scale = over_normalizers(gradient.scale, add);
    gradient.mean = over_normalizers(gradient.mean, add);
    gradient.finish();
}

// Carries gradients of masks through a softmax: eight neighbouring threads those of an output. A thread has every
// eighth tap, `Own` at most, at first + i * step in shared memory; `count` of them exist.
template <int Own>
__device__ __forceinline__ void through_softmax(const float* logits, float* grads, int first, int step, int count) {
    float masks[Own], own_grads[Own], largest = -INFINITY;
    SoftmaxGradient gradient;
#pragma unroll
    for (int i = 0; i < Own; i++) {
        masks[i] = i < count ? logits[first + i * step] : -INFINITY;
        own_grads[i] = i < count ? grads[first + i * step] : 0;
        largest = fmaxf(largest, masks[i]);
    }
    largest = over_normalizers(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < Own; i++) {
        masks[i] = SoftmaxGradient::power(masks[i], largest);
        gradient.add(masks[i], own_grads[i]);
    }
    finish_over_normalizers(gradient);
#pragma unroll
    for (int i = 0; i < Own; i++) {
        if (i < count) grads[first + i * step] = gradient(masks[i], own_grads[i]);
    }
}

// The same for any number of taps.
template <>
__device__ __forceinline__ void through_softmax<0>(const float* logits, float* grads, int first, int step, int count) {
    float largest = -INFINITY;
#pragma unroll 1
    for (int i = 0; i < count; i++) largest = fmaxf(largest, logits[first + i * step]);
    largest = over_normalizers(largest, [](float a, float b) { return fmaxf(a, b); });
    const auto mask = [&](int i) { return SoftmaxGradient::power(logits[first + i * step], largest); };
    SoftmaxGradient gradient;
#pragma unroll 1
    for (int i = 0; i < count; i++) gradient.add(mask(i), grads[first + i * step]);
    finish_over_normalizers(gradient);
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        float& grad = grads[first + i * step];
        grad = gradient(mask(i), grad);
    }
}

// Carries gradients of masks through the normaliser. Gradients and logits are in shared memory, as OutputsOfTile says.
// Gradients of outputs that a crop leaves out, that is of rows and columns from `there` on, stay 0, whatever the logits
// are.
__device__ __forceinline__ void through_normalizer(carafepp_normalizer normalizer, int taps,
                                                   const OutputsOfTile& outputs, int2 there, float* logits,
                                                   float* grads) {
    const int thread = thread_computed_late(), lane = thread % kNormalizers, all = outputs.count();
    const int at_once = static_cast<int>(blockDim.x) / kNormalizers, step = kNormalizers * outputs.room;
    const int most = (taps + kNormalizers - 1) / kNormalizers;
#pragma unroll 1
    for (int before = 0; before < all; before += at_once) {
        const int number = before + thread / kNormalizers;  // all lanes of a warp sum, some for no output
        const int y = outputs.columns.quotient(number), x = number - y * outputs.columns.number;
        const int first = min(y, outputs.rows - 1) * outputs.pitch + x + lane * outputs.room;
        const int count = x < there.x && y < there.y ? (taps - lane + kNormalizers - 1) / kNormalizers : 0;
        // f(logit, gradient) for each. What is rare is not unrolled.
        const auto each = [&](auto f) {
#pragma unroll 1
            for (int i = 0; i < count; i++) f(logits[first + i * step], grads[first + i * step]);
        };
        if (normalizer == CARAFEPP_SIGMOID) {
            each([](float logit, float& grad) {
                const float mask = sigmoid(logit);
                grad *= mask * (1 - mask);
            });
            continue;
        }
        const bool sigmoids = normalizer == CARAFEPP_SIGMOID_NORMALIZED;
        if (sigmoids) each([](float& logit, float) { logit = log_sigmoid(logit); });
        if (most == 2) {
            through_softmax<2>(logits, grads, first, step, count);
        } else if (most == 4) {
            through_softmax<4>(logits, grads, first, step, count);
        } else if (most == 7) {
            through_softmax<7>(logits, grads, first, step, count);
        } else {
            through_softmax<0>(logits, grads, first, step, count);
        }
        if (sigmoids) each([](float log_of_sigmoid, float& grad) { grad *= -expm1f(log_of_sigmoid); });  // of -logit
    }
}

// `Vectors`: eight channels are a vector in memory.
template <bool Vectors>
__global__ void __launch_bounds__(kMostWarps * 32, Vectors ? 3 : 2)
    grad_masks_mma_kernel(Arguments arguments, GradMasksMmaPlan plan) {
    using T = Float16;  // or bfloat16: only products differ
    const Problem& p = arguments.problem;
    const OutputsOfTile& outputs = plan.outputs;
    const int k = static_cast<int>(p.kernel_size), radius = k / 2, threads = static_cast<int>(blockDim.x);
    const int height_in = static_cast<int>(p.features.h), width_in = static_cast<int>(p.features.w),
              height_out = static_cast<int>(p.out_h), width_out = static_cast<int>(p.out_w);
    const int halo = plan.halo_rows * plan.pitch.number, eights_in_row = plan.patches_in_row.number;
    Slot* const slots = shared_memory<Slot>();
    int* const sources = reinterpret_cast<int*>(slots + outputs.rows);  // of columns
    OutputPlace* const places = reinterpret_cast<OutputPlace*>(sources + outputs.columns.number);
    int64_t* const pixels = reinterpret_cast<int64_t*>(places);  // of a tile, while there are channels
    T* const staged = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(places) + plan.places_bytes);
    float* const grads = reinterpret_cast<float*>(staged);  // of masks, when the channels are done
    float* const logits = grads + k * k * outputs.room;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const int thread = thread_computed_late(), lane = thread % 32, warp = same_in_warp(thread / 32);
        const TileOfPatches tile(plan, static_cast<uint32_t>(item));
        const int top = plan.rows.source(tile.top) - radius;
        int left = plan.columns.source(tile.left) - radius;
        if (plan.feature_pairs) left -= left & 1;
#pragma unroll 1
        for (int y = thread; y < outputs.rows; y += threads) {
            const int row = tile.top + y, cell = row / outputs.cell.number;
            slots[y] = {row < plan.rows.count ? row : -1, plan.rows.source(row), cell,
                        row - cell * outputs.cell.number};
        }
#pragma unroll 1
        for (int x = threads - 1 - thread; x < outputs.columns.number; x += threads)
            sources[x] = plan.columns.source(tile.left + x);
#pragma unroll 1
        for (int pixel = thread; pixel < halo; pixel += threads) {
            const int y = plan.pitch.quotient(pixel), x = pixel - y * plan.pitch.number, i = top + y, j = left + x;
            const bool exists = i >= 0 && i < height_in && j >= 0 && j < width_in && x < plan.halo_columns;
            pixels[pixel] = exists ? i * p.features.stride_h + j * p.features.stride_w : kNowhere;
        }
#pragma unroll 1
        for (int output = thread; output < outputs.count(); output += threads) {
            const int eight = output / kEight, line = plan.patches_in_row.quotient(eight);
            const int row = tile.top + line * 2 + output / kPatch % 2,
                      column = tile.left + (eight - line * eights_in_row) * kPatch + output % kPatch;
            const bool exists = row < height_out && column < width_out;
            pixels[halo + output] = exists ? row * p.grad_output.stride_h + column * p.grad_output.stride_w : kNowhere;
        }
        __syncthreads();

        // The warp's patch, its window, and the pixels that it multiplies.
        const int patch = plan.parts.quotient(warp), patch_row = plan.patches_in_row.quotient(patch),
                  patch_column = patch - patch_row * eights_in_row;
        const int window_top = slots[patch_row * kPatch].source - radius,
                  window_left = sources[patch_column * kPatch] - radius;
        const int first_pixel = (warp - patch * plan.parts.number) * plan.products * kPixelsOfProduct;
        const auto pixel_of_window = [&](int number) {
            const int y = plan.window_columns.quotient(number);
            return make_int2(number - y * plan.window_columns.number, y);
        };
        int of_pixels[kMostProducts];
#pragma unroll
        for (int product = 0; product < kMostProducts; product++) {
            const int2 at = pixel_of_window(first_pixel + product * kPixelsOfProduct + lane % 16);
            const int pixel = (window_top - top + at.y) * plan.pitch.number + window_left - left + at.x;
            of_pixels[product] = (at.y < plan.window_rows ? pixel : 0) * plan.pixel + lane / 16 * kWide;
        }
        const int eight = (patch_row * 2 + lane / 16) * eights_in_row + patch_column,
                  of_outputs = (halo + eight * kEight + lane % 8) * plan.pixel + lane / 8 % 2 * kWide;

        const int vectors = plan.channels / kWide, stagers = threads / vectors;
        const int vector = Vectors ? thread % vectors : thread / stagers,
                  own_pixel = Vectors ? thread / vectors : thread % stagers;
        const int64_t first_channel = int64_t{tile.group} * plan.channels_of_group + vector * kWide;
        const T* from_features = element<const T>(p.features, tile.n, first_channel, 0, 0);
        const T* from_outputs = element<const T>(p.grad_output, tile.n, first_channel, 0, 0);
        const auto stage_next = [&](int channels, T* to) {
            const int there = channels - vector * kWide;
            to += vector * kWide;
            const auto stage = [&](const Array& array, const T* from, bool pairs, const int64_t* at, int count, T* to) {
                if (Vectors) {
                    copy_pixels(from, at, count, own_pixel, stagers, there, to, plan.pixel);
                } else if (pairs) {
                    transpose_pixels<2>(from, static_cast<int>(array.stride_c), at, count, own_pixel, stagers, there,
                                        to, plan.pixel);
                } else {
                    transpose_pixels<1>(from, static_cast<int>(array.stride_c), at, count, own_pixel, stagers, there,
                                        to, plan.pixel);
                }
            };
            stage(p.features, from_features, plan.feature_pairs, pixels, halo, to);
            stage(p.grad_output, from_outputs, plan.output_pairs, pixels + halo, outputs.count(),
                  to + halo * plan.pixel);
            from_features += plan.channels * p.features.stride_c;
            from_outputs += plan.channels * p.grad_output.stride_c;
        };
        float sums[kMostProducts][2][4] = {};
        const bool empty = height_out == 0 || width_out == 0;  // there may be no arrays
        int buffer = 0;                                        // the first element of the slice that is multiplied
        if (Vectors && !empty) stage_next(plan.channels_of_group, staged);
#pragma unroll 1
        for (int channels = empty ? 0 : plan.channels_of_group; channels > 0; channels -= plan.channels) {
            if (!Vectors) stage_next(channels, staged);
            wait_for_copies();
            __syncthreads();
            const T* const slice = staged + buffer;
            if (Vectors && channels > plan.channels) {
                buffer = plan.slice - buffer;
                stage_next(channels - plan.channels, staged + buffer);
            }
            __syncwarp();  // lanes diverge in copies
            const int steps = (min(channels, plan.channels) + kPixelsOfProduct - 1) / kPixelsOfProduct;
            if (p.features.dtype == CARAFEPP_FLOAT16) {
                add_products<Float16>(slice, of_pixels, of_outputs, plan.products, steps, sums);
            } else {
                add_products<BFloat16>(slice, of_pixels, of_outputs, plan.products, steps, sums);
            }
            if (!Vectors) __syncthreads();
        }
        __syncthreads();  // what follows takes the place of slices

        // A lane has sums of two columns in two rows of outputs. Their windows begin at `from` of the patch's window.
        const int first_row = patch_row * kPatch + lane % 4 / 2, first_column = patch_column * kPatch + lane % 2 * 2;
        const bool whole = tile.top + outputs.rows <= height_out && tile.left + outputs.columns.number <= width_out;
        const bool inside = top >= 0 && top + plan.halo_rows <= height_in && left >= 0 &&
                            left + plan.halo_columns <= width_in;
        int2 from[2];
        int own[2][2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            from[r] = make_int2(sources[first_column + r] - radius - window_left,
                                slots[first_row + 2 * r].source - radius - window_top);
        }
#pragma unroll
        for (int output = 0; output < 4; output++) {
            const int r = output / 2, c = output % 2;
            own[r][c] = (first_row + 2 * r) * outputs.pitch + first_column + c -
                        (from[r].y * k + from[c].x) * outputs.room;
        }
#pragma unroll
        for (int product = 0; product < kMostProducts; product++) {
            if (product >= plan.products) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int2 at = pixel_of_window(first_pixel + product * kPixelsOfProduct + half * 8 + lane / 4);
                float* const to = grads + (at.y * k + at.x) * outputs.room;
                if (!inside || !whole) {  // a tap beyond a border, or of an output that a crop leaves out, is 0
                    const int i = window_top + at.y, j = window_left + at.x;
                    const bool exists = i >= 0 && i < height_in && j >= 0 && j < width_in;
#pragma unroll
                    for (int output = 0; output < 4; output++) {
                        const int r = output / 2, c = output % 2;
                        const bool computed = tile.top + first_row + 2 * r < height_out &&
                                              tile.left + first_column + c < width_out;
                        if (!exists || !computed) sums[product][r][half * 2 + c] = 0;
                    }
                }
#pragma unroll
                for (int output = 0; output < 4; output++) {
                    const int r = output / 2, c = output % 2;
                    const bool in_rows = static_cast<unsigned>(at.y - from[r].y) < static_cast<unsigned>(k),
                               in_columns = static_cast<unsigned>(at.x - from[c].x) < static_cast<unsigned>(k);
                    if (in_rows && in_columns) to[own[r][c]] = sums[product][r][half * 2 + c];
                }
            }
        }
        const TileInImage in_image{tile.n, tile.group, slots, tile.left};
        if (plan.normalized) {
            load_logits(p, outputs, in_image, places, logits);
            wait_for_copies();
            __syncthreads();
            const int2 there = make_int2(width_out - tile.left, min(height_out - tile.top, outputs.rows));
            through_normalizer(p.normalizer, k * k, outputs, there, logits, grads);
        }
        write_gradients(arguments, outputs, in_image, places, grads);
        __syncthreads();
    }
}

// Why no patches can be planned for a problem.
template <bool Vectors>
const char* not_for_grad_masks_mma(const Problem& p) {
    if (const char* reason = not_of_16_bits(p)) return reason;
    if (const char* reason = not_for_tiles(p)) return reason;
    if (p.features.c / p.groups % kWide != 0) return "channels of a group are not whole vectors";
    if (p.features.c / p.groups == 0) return "a group has no channels";
    for (const Array* array : {&p.features, &p.grad_output}) {
        if (array->stride_c != static_cast<int>(array->stride_c)) return "channels are too far apart";
    }
    if (p.features.c > INT32_MAX / 2) return "channels are too many";
    if (p.factor.up > kMostFactor / 2) return "the factor is too large";
    const GradMasksMmaPlan plan(p, Vectors);
    if (plan.shared_bytes > kMostSharedBytes) return "windows have too many pixels";
    if (plan.items > INT32_MAX) return "tiles are too many";
    return not_compiled_for_bfloat16(p, grad_masks_mma_kernel<Vectors>);
}

template <bool Vectors>
void grad_masks_mma(const Problem& p, const Array& grad_masks) {
    const GradMasksMmaPlan plan(p, Vectors);
    launch(grad_masks_mma_kernel<Vectors>, plan.items, plan.threads, plan.shared_bytes, p, grad_masks, plan);
}

}  // namespace carafepp::cuda
