"""Seed bugs in the CUDA kernels, one at a time: test_kernels must notice each.

The sources that include the changed file are compiled again, by a build's compile_commands.json.
Their objects are linked before that build's library. Needs a build with CARAFEPP_CUDA=EMULATED.

    cmake --preset dev -B build/emulated -DCARAFEPP_CUDA=EMULATED
    cmake --build build/emulated --target test_kernels
    python tests/cuda/mutants.py [--build build/emulated] [--jobs N] [NAME ...]
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = "core/src/cuda"
LONGEST = 600  # seconds for one run


@dataclass(frozen=True)
class Mutant:
    """One bug: `text`, which stands once in the file, becomes `replacement`.

    `sanitizer` is "address" or "thread" if nothing else can notice the bug.
    """

    name: str
    file: str
    text: str
    replacement: str
    sanitizer: str = ""


MUTANTS = [
    Mutant(
        "features and grad_output of a slice are read before they arrive",
        "grad_masks_tiles.h",
        "wait_for_copies();\n            __syncthreads();\n            float4* const to",
        "__syncthreads();\n            float4* const to",
    ),
    Mutant(
        "logits of a tile are read before they arrive",
        "grad_masks_finish.h",
        "wait_for_copies();\n        __syncthreads();\n        through_",
        "__syncthreads();\n        through_",
    ),
    Mutant(
        "gradients of taps beyond a border are kept for any factor",
        "grad_masks_tiles.h",
        "if ((there & 1 << tap) == 0) sums",
        "if (there == 0) sums",
    ),
    Mutant(
        "the halo of an output is a row short",
        "grad_masks_plan.h",
        "halo_rows = row_sources + std::max(segments.number * own_taps, k) - 1;",
        "halo_rows = row_sources + std::max(segments.number * own_taps, k) - 2;",
    ),
    Mutant(
        "the next slice takes the place of the one that is read",
        "grad_masks_tiles.h",
        "buffer = plan.vectors * plan.plane - buffer;",
        "buffer = 0;",
    ),
    Mutant(
        "neighbouring outputs share a source",
        "grad_masks_tiles.h",
        "y - o * kDown / kUp;",
        "y - o * kDown;",
    ),
    Mutant(
        "the second column of a pair takes the place of the first",
        "grad_masks_tiles.h",
        "to[places[k] + apart] =",
        "to[places[k]] =",
    ),
    Mutant(
        "pairs of columns begin where their tile does",
        "grad_masks_tiles.h",
        "source - (source & 1)",
        "source",
    ),
    Mutant(
        "channels that do not exist are products of those behind them",
        "grad_masks_tiles.h",
        "return v < there ? widen(",
        "return true ? widen(",
    ),
    Mutant(
        "products go through vectors of the slice before",
        "grad_masks_tiles.h",
        "min(plan.vectors, plan.all_vectors - (number - 1) * plan.vectors)",
        "plan.vectors",
    ),
    Mutant(
        "a thread adds what the other thread of two quads has not told",
        "grad_masks_tiles.h",
        "    __syncthreads();\n    each(Constant<0>(), [&](float& sum,",
        "    each(Constant<0>(), [&](float& sum,",
    ),
    Mutant(
        "threads of two quads tell where slices are still read",
        "grad_masks_tiles.h",
        "    __syncthreads();  // slices are read\n",
        "",
    ),
    Mutant(
        "the second thread of two quads has a vector behind the last one",
        "grad_masks_tiles.h",
        "int left = vectors - share;",
        "int left = vectors;",
    ),
    Mutant(
        "both threads of two quads keep the first",
        "grad_masks_tiles.h",
        "            each(rows, keep);",
        "            each(Constant<0>(), keep);",
    ),
    Mutant(
        "a thread sums before all threads of an output have told",
        "grad_masks_finish.h",
        "    __syncthreads();\n    each_part([&](int o, float2 told) {\n        grad",
        "    each_part([&](int o, float2 told) {\n        grad",
    ),
    Mutant(
        "sums take the place of maxima that are still read",
        "grad_masks_finish.h",
        "    __syncthreads();\n    if (taps.count > 0) {",
        "    if (taps.count > 0) {",
    ),
    Mutant(
        "a crop's outputs have gradients of logits",
        "grad_masks_finish.h",
        "at.slots[own.row + o].row >= height_out)\n",
        "false)\n",
    ),
    Mutant(
        "a patch's gradients of a band are read before they arrive",
        "grad_features_patches.h",
        "                wait_for_copies();\n                __syncthreads();",
        "                __syncthreads();",
    ),
    Mutant(
        "patches leave out the last step of a band that touches them",
        "grad_features_patches.h",
        "end = (y * plan.window + plan.window - 1) / kStep + 1;",
        "end = (y * plan.window + plan.window - 1) / kStep;",
    ),
    Mutant(
        "an infinite gradient reaches a whole patch",
        "grad_features_patches.h",
        "        if (zeros != 0) {",
        "        if (false) {",
    ),
    Mutant(
        "masks of sources beyond a tile are staged",
        "grad_features_patches_stage.h",
        "        if (place >= 0) room.matrices()[place] = mask;",
        "        room.matrices()[max(place, 0)] = mask;",
    ),
    Mutant(
        "masks of a band are read before they are there",
        "grad_features_units.h",
        "            wait_for_copies();\n            __syncthreads();",
        "            wait_for_copies();",
    ),
    Mutant(
        "a unit's next band is staged too early",
        "grad_features_units.h",
        "            }\n            __syncthreads();\n        }",
        "            }\n        }",
    ),
    Mutant(
        "a unit reads the masks of its neighbour",
        "grad_features_units.h",
        "(k - 1 - x + 3) / 4",
        "(k - 1 - x) / 4",
    ),
    Mutant(
        "taps stand at the places of the wrong sources",
        "grad_features_units.h",
        "source - k / 2) &",
        "source - k / 2 + 1) &",
    ),
    Mutant(
        "the last column of outputs of a unit is left out",
        "grad_features_units.h",
        "add_column<3, 4>(next, ends[k + 2],",
        "add_column<3, 4>(next, ends[k + 1],",
    ),
    Mutant(
        "an output's threads normalise apart",
        "grad_features_units.h",
        "distance < threads;",
        "distance < threads / 2;",
    ),
    Mutant(
        "grad_output of a band is read before it arrives",
        "grad_features_units.h",
        "            wait_for_copies();\n            __syncthreads();",
        "            __syncthreads();",
    ),
    Mutant(
        "a source has one row of outputs of its neighbour",
        "grad_features_units.h",
        "end_row = computes ? first_rows[unit_row + k] : 0;",
        "end_row = computes ? first_rows[unit_row + k + 1] : 0;",
    ),
    Mutant(
        "the last channels of a pixel are not copied",
        "grad_output.h",
        "channel < there, widened,",
        "channel + 1 < there, widened,",
    ),
    Mutant(
        "vectors beyond a pixel are copied to the next one",
        "grad_output.h",
        "if (v * kStep >= there) break;",
        "if (false) break;",
    ),
    Mutant(
        "columns before those of a tile are not counted",
        "grad_features_units.h",
        "(first ? 0 : at_once - 1)",
        "0",
    ),
    Mutant(
        "a tap beyond the last one is staged",
        "grad_features_units.h",
        "return lane + t * together < kernel_size",
        "return lane + t * together <= kernel_size",
    ),
    Mutant(
        "columns of sub-pixels are copied to the next phase",
        "bands.h",
        "min(own, count % pitch)",
        "own",
        sanitizer="address",
    ),
    Mutant(
        "the features of a tile for any factor are read before they arrive",
        "reassemble_tiles.h",
        "            wait_for_copies();\n            __syncthreads();",
        "            __syncthreads();",
    ),
    Mutant(
        "the next slice for any factor is copied too early",
        "reassemble_tiles.h",
        "            to += channels_of_slice * output.stride_c;\n            __syncthreads();",
        "            to += channels_of_slice * output.stride_c;",
    ),
    Mutant(
        "the halo for any factor is a column short",
        "reassemble_tiles.h",
        "halo_columns = columns.sources(across) + k - 1;",
        "halo_columns = columns.sources(across) + k - 2;",
    ),
    Mutant(
        "the first rows of features meet one source too many",
        "reassemble_tiles.h",
        "for (int s = 1; s < kSources; s++) add_row(0, s);",
        "for (int s = 1; s < kSources; s++) add_row(0, s + 1);",
    ),
    Mutant(
        "the first column of features meets both sources of three outputs",
        "reassemble_tiles.h",
        "for (int s = 1; s < D; s++) add_column(0, s);",
        "for (int s = 1; s < D; s++) add_column(0, s + 1);",
    ),
    Mutant(
        "halos of whole vectors of columns begin between two",
        "reassemble_tiles.h",
        "if (fours) left -= left & 3;",
        "",
    ),
    Mutant(
        "halos of whole vectors of columns have no room for those before",
        "reassemble_tiles.h",
        "halo_columns = (before + halo_columns + 3) / 4 * 4;",
        "halo_columns = (halo_columns + 3) / 4 * 4;",
    ),
    Mutant(
        "masks beyond a border are kept for any factor",
        "stage_lines.h",
        "if (!inside) clear_outside(row, column, 0, 1, to);",
        "if (false) clear_outside(row, column, 0, 1, to);",
    ),
    Mutant(
        "the features of patches are read before they arrive",
        "reassemble_mma.h",
        "            wait_for_copies();\n            __syncthreads();\n            const T*",
        "            __syncthreads();\n            const T*",
    ),
    Mutant(
        "the next slice of patches is copied over the one in use",
        "reassemble_mma.h",
        "                second = !second;\n",
        "",
    ),
    Mutant(
        "the next slice of patches is transposed too early",
        "reassemble_mma.h",
        "            if (!Vectors) __syncthreads();\n",
        "",
    ),
    Mutant(
        "the matrices of patches keep what was in memory",
        "reassemble_mma.h",
        "v < patches * (plan.matrix / kWide + kQuads)",
        "v < kQuads",
    ),
    Mutant(
        "the halo of patches is a row short",
        "reassemble_mma.h",
        "tile.rows * patch.rows) + window.rows;",
        "tile.rows * patch.rows) + window.rows - 1;",
    ),
    Mutant(
        "windows of patches always begin with a new source",
        "positions.h",
        "aligned ? numerator",
        "true ? numerator",
    ),
    Mutant(
        "pairs of columns begin anywhere",
        "reassemble_mma.h",
        "if (plan.pairs) left -= left & 1;",
        "",
    ),
    Mutant(
        "products beyond a slice are stored",
        "reassemble_mma.h",
        "const int there = min(channels, plan.channels);",
        "const int there = 2 * kChannelsOfMma;",
    ),
    Mutant(
        "two lanes keep the outputs of the same patch",
        "reassemble_mma.h",
        "const uint2 kept = odd ? words[q] : before[q],",
        "const uint2 kept = words[q],",
    ),
    Mutant(
        "infinite features spread in a patch",
        "reassemble_mma.h",
        "                            add_zeros<T>(words[q], zeros);\n",
        "",
    ),
    Mutant(
        "features and gradients of patches are read before they arrive",
        "grad_masks_mma.h",
        "            wait_for_copies();\n            __syncthreads();\n            const T*",
        "            __syncthreads();\n            const T*",
    ),
    Mutant(
        "the next slice of gradients of masks is copied over the one in use",
        "grad_masks_mma.h",
        "                buffer = plan.slice - buffer;\n",
        "",
    ),
    Mutant(
        "the next slice of gradients of masks is transposed too early",
        "grad_masks_mma.h",
        "            if (!Vectors) __syncthreads();\n",
        "",
    ),
    Mutant(
        "the halo of patches of gradients is a row short",
        "grad_masks_mma.h",
        "outputs.rows - kPatch, outputs.rows) + window_rows;",
        "outputs.rows - kPatch, outputs.rows) + window_rows - 1;",
    ),
    Mutant(
        "products of a patch with pixels beyond a border are gradients",
        "grad_masks_mma.h",
        "if (!exists || !computed)",
        "if (!computed)",
    ),
    Mutant(
        "outputs that a crop leaves out have gradients of masks",
        "grad_masks_mma.h",
        "x < there.x && y < there.y ?",
        "y < there.y ?",
    ),
    Mutant(
        "logits of patches are read before they arrive",
        "grad_masks_mma.h",
        "            wait_for_copies();\n            __syncthreads();\n            const int2",
        "            const int2",
    ),
    Mutant(
        "a vector without channels has those of the last one",
        "stage_pixels.h",
        "place != kNowhere && channels > 0;\n            const T* const",
        "place != kNowhere;\n            const T* const",
    ),
    Mutant(
        "masks of patches beyond a border are kept",
        "stage_bands.h",
        "1 / sum);\n            if (!inside) clear_outside(row, column, 0, 1);",
        "1 / sum);",
    ),
    Mutant(
        "adjacent taps of patches are cleared before other threads have stored them",
        "stage_bands.h",
        "            __syncwarp();  // a thread clears taps of others\n",
        "",
    ),
    Mutant(
        "the last of adjacent taps is counted by all threads",
        "stage_bands.h",
        "sum = lane == 0 ? last : 0;",
        "sum = last;",
    ),
    Mutant(
        "a source has one output too many",
        "positions.h",
        "return min(first_output<Several>(position + 1), count);",
        "return min(first_output<Several>(position + 1) + 1, count);",
    ),
    Mutant(
        "taps that an output does not have count as logits of 0",
        "stage_lines.h",
        "t < count ? widen(load_input(from + t)) : -INFINITY;",
        "t < count ? widen(load_input(from + t)) : 0;",
    ),
    Mutant(
        "taps are cleared before other threads have stored them",
        "stage_lines.h",
        "            __syncwarp();  // a thread clears taps of others\n",
        "",
    ),
    Mutant(
        "the last tap of an output is not staged",
        "stage_lines.h",
        "for (; count > 0; count--) f(",
        "for (; count > 1; count--) f(",
    ),
    Mutant(
        "a column beyond the right border is kept for any factor",
        "stage_lines.h",
        "b >= max(static_cast<int>(p.features.w) - x, 0)",
        "b > max(static_cast<int>(p.features.w) - x, 0)",
    ),
    Mutant(
        "tiles for any factor ignore the padding",
        "positions.h",
        "* down / up) + offset;",
        "* down / up);",
    ),
    Mutant(
        "masks are read before all are staged",
        "masks.h",
        "pitch) {\n    __syncthreads();\n    if (!p.from_logits) return;",
        "pitch) {\n    if (!p.from_logits) return;",
    ),
    Mutant(
        "a thread normalises taps of the next output",
        "masks.h",
        "end = q < outputs ? p.taps() * pitch : 0;",
        "end = q <= outputs ? p.taps() * pitch : 0;",
        sanitizer="address",
    ),
    Mutant(
        "a source's outputs end too early",
        "grad_features.cu",
        "q < own_end; q++",
        "q + 1 < own_end; q++",
    ),
    Mutant(
        "the last row of taps is left out",
        "reassemble.cu",
        "a < min(k, p.features.h - top)",
        "a < min(k - 1, p.features.h - top)",
    ),
    Mutant(
        "outputs ignore the padding of columns",
        "reassemble.cu",
        "left = p.columns().source(pixel.j)",
        "left = p.factor.source(pixel.j)",
    ),
    Mutant(
        "the gradient of masks ignores the padding of rows",
        "grad_masks.cu",
        "p.rows().source(output.i)",
        "p.factor.source(output.i)",
    ),
    Mutant(
        "a tile of sources ignores the padding of columns",
        "grad_features.cu",
        "p.columns().source(begin + q)",
        "p.factor.source(begin + q)",
    ),
    Mutant(
        "kernels for up x2 take any padding",
        "up2.h",
        "if (p.offset_h != 0 || p.offset_w != 0) return kLittlePadding;",
        "",
    ),
    Mutant(
        "masks are staged before their outputs are found",
        "masks.h",
        "column.remainder) * array.stride_c;\n    }\n    __syncthreads();",
        "column.remainder) * array.stride_c;\n    }",
    ),
    Mutant(
        "shared memory is a byte short",
        "normalize_masks.cu",
        "shared_bytes = outputs * (p.taps() * accumulator_bytes + kBytesOfPlace);",
        "shared_bytes = outputs * (p.taps() * accumulator_bytes + kBytesOfPlace) - 1;",
    ),
    Mutant(
        "the last output of a window's columns is left out",
        "grad_features.cu",
        "axis.first_output(end_source + radius)",
        "axis.first_output(end_source + radius - 1)",
    ),
    Mutant(
        "the masks of the next outputs come too early",
        "grad_features.cu",
        "                }\n                __syncthreads();\n            }",
        "                }\n            }",
    ),
    Mutant(
        "a tap beyond a border has a gradient",
        "grad_masks.cu",
        "j >= p.features.w) return 0;",
        "j > p.features.w) return 0;",
        sanitizer="address",
    ),
    Mutant(
        "a crop is not looked at",
        "grad_masks.cu",
        "if (output.i < p.out_h && output.j < p.out_w) {",
        "if (output.i < p.out_h && output.j <= p.out_w) {",
    ),
    Mutant(
        "a thread has channels of another's",
        "grad_masks_up2_nchw.cu",
        "from = at_stride(first, stride_c, part * kOwnVectors * kVector);",
        "from = at_stride(first, stride_c, part * kVector);",
    ),
    Mutant(
        "gradients are loaded beyond the last channel",
        "grad_masks_up2_nchw.cu",
        "from = end ? first : at_stride(from, stride_c, channels);",
        "from = at_stride(from, stride_c, channels);",
        sanitizer="address",
    ),
    Mutant(
        "a channel of another group is copied, beside the last",
        "grad_masks_up2_nchw.cu",
        "halo.copy(c + thread % Halo::kLanes < channels, slice);",
        "halo.copy(c + thread % Halo::kLanes <= channels, slice);",
        sanitizer="address",
    ),
    Mutant(
        "the halo of a tile begins a column too late",
        "grad_masks_up2.h",
        "x = number % kWidth - K / 2;",
        "x = number % kWidth - K / 2 + 1;",
    ),
    Mutant(
        "a thread of 7 x 7 taps has the other's rows",
        "grad_masks_up2.h",
        "window + part * (K - Part::kRows) * kRow",
        "window",
    ),
    Mutant(
        "both threads add the products of the middle row in all channels",
        "grad_masks_up2.h",
        "if (v < kOwnVectors)",
        "if (v < Part::kVectors)",
    ),
    Mutant(
        "an infinite gradient of a tile meets a tap beyond a border",
        "grad_masks_up2.h",
        "if (!window_inside<K>(p, at.i, at.j)) clear",
        "if (at.i < 0) clear",
    ),
    Mutant(
        "the last column of a crop is written past",
        "reassemble_up2_nchw.cu",
        "if (x < out_columns)",
        "if (x <= out_columns)",
    ),
    Mutant(
        "columns are contracted before they arrive",
        "reassemble_up2_nchw.cu",
        "                wait_for_copies();\n                __syncthreads();",
        "                __syncthreads();",
    ),
    Mutant(
        "a box is read before it arrives",
        "reassemble_up2_nchw.cu",
        "                wait_for_phase(barrier, phase);\n",
        "",
    ),
    Mutant(
        "the phase of a box is that of the one before",
        "reassemble_up2_nchw.cu",
        "                phase ^= 1;\n",
        "",
    ),
    Mutant(
        "a box arrives over another that is still read",
        "reassemble_up2_nchw.cu",
        "            sync_warps_of_block();\n            if (channels > kChannelsOfSlice)",
        "            if (channels > kChannelsOfSlice)",
    ),
    Mutant(
        "a box has a row less than its halo",
        "reassemble_up2_nchw.cu",
        "kWidth, S::kBoxRows,",
        "kWidth, S::kBoxRows - 1,",
    ),
    Mutant(
        "fewer bytes of a box are expected",
        "reassemble_up2_nchw.cu",
        "expect_bytes(barrier, S::Features::kElements * sizeof(T));",
        "expect_bytes(barrier, S::Features::kElements);",
    ),
    Mutant(
        "a box begins a column too late",
        "reassemble_up2_nchw.cu",
        "tile.left - S::kBefore, tile.top",
        "tile.left - S::kBefore + 1, tile.top",
    ),
    Mutant(
        "the border of a box is not filled",
        "reassemble_up2_nchw.cu",
        "tile.left - S::kBefore, tile.top",
        "max(tile.left - S::kBefore, 0), tile.top",
    ),
    Mutant(
        "a copied row below the last is not 0",
        "tile_up2.h",
        "y >= 0 && y < p.features.h) << k",
        "y >= 0 && y <= p.features.h) << k",
        sanitizer="address",
    ),
    Mutant(
        "the last channel of a slice is not copied",
        "tile_up2.h",
        "q < there);",
        "q + 1 < there);",
    ),
    Mutant(
        "threads without a column copy logits",
        "stage_masks_up2.h",
        "if (first >= at_once) return;",
        "",
    ),
    Mutant(
        "four columns are stored at once where rows are not aligned",
        "reassemble_up2_nchw.cu",
        "not_for_columns(output, kSourcesOfThread * kUp) == nullptr)",
        "output.w % 4 == 0)",
    ),
    Mutant(
        "four columns are stored at once where a row has fewer",
        "reassemble_up2_nchw.cu",
        "not_for_columns(output, kSourcesOfThread * kUp) == nullptr)",
        "true)",
    ),
    Mutant(
        "an infinite mask meets a tap beyond a border",
        "stage_masks_up2.h",
        "if (j >= 0 && j < p.features.w) continue;",
        "if (j >= -1 && j < p.features.w) continue;",
    ),
    Mutant(
        "logits are normalised before all are staged",
        "stage_masks_up2.h",
        "float* staged) {\n    wait_for_copies();\n    __syncthreads();",
        "float* staged) {\n    wait_for_copies();",
    ),
    Mutant(
        "logits are normalised before they arrive",
        "stage_masks_up2.h",
        "float* staged) {\n    wait_for_copies();",
        "float* staged) {",
    ),
    Mutant(
        "a walk over a grid skips a row",
        "masks.h",
        "inner_ -= inner_size_;\n            outer_++;",
        "inner_ -= inner_size_;\n            outer_ += 2;",
    ),
    Mutant(
        "a copy goes beyond its grid",
        "masks.h",
        "to[load] = walk.in_grid() ? element.to : -1;",
        "to[load] = element.to;",
    ),
    Mutant(
        "sub-pixels change places",
        "reassemble_up2_nhwc.cu",
        "add_products(weight.y, feature[v], sums[s][1][v]);",
        "add_products(weight.y, feature[v], sums[s][2][v]);",
    ),
    Mutant(
        "a source beyond the end of a row is written",
        "reassemble_up2_nhwc.cu",
        "if (q >= out_columns) break;",
        "if (q > out_columns) break;",
    ),
    Mutant(
        "features are contracted before they arrive",
        "reassemble_up2_nhwc.cu",
        "            wait_for_copies();\n            __syncthreads();",
        "            __syncthreads();",
    ),
    Mutant(
        "features of the next slice arrive over others that are still read",
        "reassemble_up2_nhwc.cu",
        "            __syncthreads();\n            if (channels > kChannelsOfSlice)",
        "            if (channels > kChannelsOfSlice)",
    ),
    Mutant(
        "the next slice arrives in the place of the one that is contracted",
        "reassemble_up2_nhwc_mma.cu",
        "            second = !second;\n",
        "",
    ),
    Mutant(
        "a warp with one row of sources does nothing",
        "reassemble_up2_nhwc_mma.cu",
        "has_sources = i < p.features.h",
        "has_sources = i + 1 < p.features.h",
    ),
    Mutant(
        "a copied halo is short of a column",
        "tile_up2.h",
        "x < kColumns + K - 1) {",
        "x < kColumns + K - 2) {",
    ),
    Mutant(
        "a copied halo is not 0 beyond the border",
        "tile_up2.h",
        "j >= 0 && j < p.features.w &&",
        "j >= 0 && j <= p.features.w &&",
    ),
    Mutant(
        "a channel of another group is written, beside the last",
        "grad_features_up2_nchw.cu",
        "if (k * kLanes >= channels_) break;",
        "if (k * kLanes > channels_) break;",
    ),
    Mutant(
        "a vector of another group is written, beside the last",
        "grad_features_up2_nhwc.cu",
        "if (q < columns_ && v * kApart < channels_)",
        "if (q < columns_ && v * kApart <= channels_)",
    ),
    Mutant(
        "the next row of gradients takes the place of the one that is read",
        "grad_features_up2.h",
        "if (more) copy(row + 1, buffer ^ 1);",
        "if (more) copy(row + 1, buffer);",
    ),
    Mutant(
        "a row of gradients arrives over one that is still read",
        "grad_features_up2.h",
        "if (boxes) wait_for_phase(barriers + buffer, phase);\n            __syncthreads();",
        "if (boxes) wait_for_phase(barriers + buffer, phase);",
    ),
    Mutant(
        "gradients of a box are read before they arrive",
        "grad_features_up2.h",
        "wait_for_phase(barriers + buffer, phase);",
        "wait_for_phase(barriers + buffer, phase ^ 1);",
    ),
    Mutant(
        "logits of the next row become masks before they arrive",
        "grad_features_up2.h",
        "                    wait_for_copies();\n                    __syncthreads();",
        "                    __syncthreads();",
    ),
    Mutant(
        "logits of the next row become masks before other threads have copied them",
        "grad_features_up2.h",
        "                    wait_for_copies();\n                    __syncthreads();",
        "                    wait_for_copies();",
    ),
    Mutant(
        "the last rows of a strip are not stored",
        "grad_features_up2.h",
        "for (int row = max(first, last); row < end; row++)",
        "for (int row = max(first, last); row < end - 1; row++)",
    ),
    Mutant(
        "a strip has no rows of sources above it",
        "grad_features_up2.h",
        "first = max(tile.top - K / 2, 0)",
        "first = max(tile.top, 0)",
    ),
    Mutant(
        "the first row of a strip is not wanted",
        "grad_features_up2.h",
        "above = max(tile.top + K / 2 - row, 0)",
        "above = max(tile.top + K / 2 - row + 1, 0)",
    ),
    Mutant(
        "a sum goes on from that of its own row of taps",
        "grad_features_up2.h",
        "of[a][q][c] = a + 1 < K ? of[(a + 1) % K][q][c] : 0;\n                        of",
        "of[a][q][c] = a + 1 < K ? of[a][q][c] : 0;\n                        of",
    ),
    Mutant(
        "a tap reaches the wrong column",
        "grad_features_up2.h",
        "b = q - x + kBefore + K / 2;",
        "b = x - q - kBefore + K / 2;",
    ),
    Mutant(
        "the mask of an output that a crop leaves out is not a number",
        "grad_features_up2.h",
        "row * kUp + sub_pixel / kUp < p.out_h &&",
        "true &&",
    ),
    Mutant(
        "the last source of a row has no logits",
        "grad_features_up2.h",
        "static_cast<unsigned>(source - begin_) < count_;",
        "static_cast<unsigned>(source - begin_) + 1 < count_;",
    ),
    Mutant(
        "the last columns of a halo are not copied",
        "grad_features_up2_nhwc.cu",
        "x < kGradsInRow; x +=",
        "x < kGradsInRow - 1; x +=",
    ),
    Mutant(
        "columns beyond the border are copied",
        "grad_features_up2_nchw.cu",
        "static_cast<unsigned>(j + x) < static_cast<unsigned>(p.out_w) && r < rows",
        "static_cast<unsigned>(j + x) <= static_cast<unsigned>(p.out_w) && r < rows",
    ),
    Mutant(
        "a warp is idle whose first row is the last one",
        "grad_masks_up2.h",
        "tile.top + first_row >= p.features.h",
        "tile.top + first_row + 1 >= p.features.h",
    ),
    Mutant(
        "features of a slice are read before other threads have copied them",
        "grad_masks_up2_nhwc.cu",
        "                wait_for_copies();\n                __syncthreads();",
        "                wait_for_copies();",
    ),
    Mutant(
        "gradients of the next slice arrive in the place of those that are read",
        "grad_masks_up2_nhwc.cu",
        "                __syncthreads();  // the next gradients take the place of these\n",
        "",
    ),
    Mutant(
        "gradients of channels beyond the last are copied",
        "grad_masks_up2_nhwc.cu",
        "const bool has_some = vector * kVector < channels;",
        "const bool has_some = vector * kVector <= channels;",
        sanitizer="address",
    ),
    Mutant(
        "a tile is short of a column of its halo",
        "grad_masks_up2.h",
        "outer_x < kTileColumns + K - 1 &&",
        "outer_x < kTileColumns + K - 2 &&",
    ),
    Mutant(
        "a halo has a column beyond the border",
        "grad_masks_up2.h",
        "j >= 0 &&\n                                  j < p.features.w;",
        "j >= 0 &&\n                                  j <= p.features.w;",
        sanitizer="address",
    ),
    Mutant(
        "threads that exchange sums keep the same ones",
        "grad_masks_up2.h",
        "pairs + (thread ^ kSourcesOfTile);",
        "pairs + thread;",
    ),
    Mutant(
        "sums are exchanged over features that are still read",
        "grad_masks_up2.h",
        "(thread ^ kSourcesOfTile);\n    __syncthreads();",
        "(thread ^ kSourcesOfTile);",
    ),
    Mutant(
        "sums are read before the other thread gives them",
        "grad_masks_up2.h",
        "sums[1][t]);\n    }\n    __syncthreads();",
        "sums[1][t]);\n    }",
    ),
    Mutant(
        "a band leads to the source beside its own",
        "grad_masks_up2.h",
        "column = row / kUp;  // of four sources",
        "column = row % kUp;  // of four sources",
    ),
    Mutant(
        "logits are copied over sums that are still read",
        "grad_masks_up2.h",
        "takes_part && at.exists(p);\n    __syncthreads();",
        "takes_part && at.exists(p);",
    ),
    Mutant(
        "logits are read before they arrive",
        "grad_masks_up2.h",
        "        wait_for_copies();\n",
        "",
    ),
    Mutant(
        "the sigmoid before a softmax has the sign of its logit",
        "grad_masks.h",
        "return -expm1f(log_of_sigmoid);",
        "return 1 + expm1f(log_of_sigmoid);",
    ),
    Mutant(
        "lines are stored before other threads have written them",
        "grad_masks_up2.h",
        "kOutputs + q] = 0;\n        }\n    }\n    __syncthreads();",
        "kOutputs + q] = 0;\n        }\n    }",
    ),
    Mutant(
        "a zero of the band makes NaN of an infinite feature",
        "reassemble_up2_nchw_mma.cu",
        "number = zeros == 0 ? kSums : 0",
        "number = kSums",
    ),
    Mutant(
        "a zero of the band makes NaN of an infinite feature's neighbours",
        "reassemble_up2_nhwc_mma.cu",
        "number = zeros == 0 ? kSums : 0",
        "number = kSums",
    ),
    Mutant(
        "vectors of a pixel are copied in another order than they are loaded in",
        "tile_up2.h",
        "(vector ^ swizzle(x)) * Vector",
        "vector * Vector",
    ),
    Mutant(
        "channels are stored in another order than they are loaded in",
        "slice_of_channels.h",
        "(to ^ (first + k / 2 * kWide))",
        "(to + first + k / 2 * kWide)",
    ),
    Mutant(
        "rows of outputs change places",
        "reassemble_up2_nhwc_mma.cu",
        "[q + k] + r % kUp * 2;",
        "[q + k] + 2 - r % kUp * 2;",
    ),
    Mutant(
        "two rows of pixels change places",
        "reassemble_up2_nhwc_mma.cu",
        "y = own_row + lane / kPixels % 2;",
        "y = own_row + 1 - lane / kPixels % 2;",
    ),
    Mutant(
        "odd sources have the masks of even ones",
        "reassemble_up2_nchw_mma.cu",
        "row / kUp * kSourcesOfLane + s;",
        "row / kUp * kSourcesOfLane;",
    ),
    Mutant(
        "windows of 3 x 3 begin a pixel too early",
        "reassemble_up2_nchw_mma.cu",
        "2 * pair - source - (kBefore - K / 2);",
        "2 * pair - source - (kBefore - 2);",
    ),
    Mutant(
        "columns of the next slice arrive in the place of the one that is contracted",
        "reassemble_up2_nchw_mma.cu",
        "            second = !second;\n",
        "",
    ),
    Mutant(
        "a channel of another group is written",
        "reassemble_up2_nchw_mma.cu",
        "half * 8 < exist)",
        "half * 8 <= exist)",
    ),
    Mutant(
        "the second eight pixels of a row are the first ones",
        "reassemble_up2_nchw_mma.cu",
        "lane / kChannelsOfMma * 8;",
        "0;",
    ),
    Mutant(
        "the second eight pixels of a band are the first ones",
        "reassemble_up2_nchw_mma.cu",
        "band[s][r][a][0] = upper ? 0 : taps;",
        "band[s][r][a][0] = taps;",
    ),
    Mutant(
        "the last row of a tile has no sources",
        "reassemble_up2_nchw_mma.cu",
        "own_row < rows &&",
        "own_row + 1 < rows &&",
    ),
    Mutant(
        "threads without sources store those of the next tile",
        "reassemble_up2_nchw.cu",
        "own.row < S::kRows && j >= 0",
        "j >= 0",
    ),
    Mutant(
        "columns left of the image are stored",
        "reassemble_up2_nchw.cu",
        "own.row < S::kRows && j >= 0",
        "own.row < S::kRows",
    ),
    Mutant(
        "the slices that blocks do not share evenly are left out",
        "tiles.h",
        "block * of_block + min(block, all % gridDim.x)",
        "block * of_block",
    ),
    Mutant(
        "a share begins with the first channels of its tile",
        "tiles.h",
        "tile.c += begin * plan.channels_of_part;",
        "",
    ),
    Mutant(
        "both rows of a half have the masks of the upper one",
        "grad_features_up2_mma.h",
        "const int a = y - s + K - 1;",
        "const int a = 2 * y - s + K - 1;",
    ),
    Mutant(
        "the last sources that reach a tile are left out",
        "grad_features_up2_mma.h",
        "y < kOfWarp + K - 1; y++",
        "y < kOfWarp + K - 2; y++",
    ),
    Mutant(
        "gradients arrive over masks that other warps still read",
        "grad_features_up2_mma.h",
        "PixelsOfWarp<Tile>());\n        __syncthreads();",
        "PixelsOfWarp<Tile>());",
    ),
    Mutant(
        "gradients are multiplied before others have copied them",
        "grad_features_up2_mma.h",
        "            wait_for_copies();\n            __syncthreads();",
        "            wait_for_copies();",
    ),
    Mutant(
        "the next slice arrives over the one that tensor cores multiply",
        "grad_features_up2_mma.h",
        "next = buffers + (Slice::kBuffers - 1) * Slice::kGrads;",
        "next = buffers;",
    ),
    Mutant(
        "a tile left of the result is written",
        "grad_features_up2_nchw_mma.cu",
        "row < p.features.h && column >= 0 &&",
        "row < p.features.h &&",
    ),
    Mutant(
        "channels of another group are summed up",
        "grad_masks_up2_nhwc_mma.cu",
        "const bool has_some = pair * kWide < channels;",
        "const bool has_some = pair * kWide <= channels;",
        sanitizer="address",
    ),
    Mutant(
        "a slice arrives in the place of the one that is multiplied",
        "grad_masks_up2_nhwc_mma.cu",
        "staged + kGrads + (left - 1) % 2 * kPixels",
        "staged + kGrads + left % 2 * kPixels",
    ),
    Mutant(
        "sums are written over features that are still read",
        "grad_masks_up2_nhwc_mma.cu",
        "        __syncthreads();\n        float2* const pairs",
        "        float2* const pairs",
    ),
    Mutant(
        "rows of outputs change places with halves of the channels",
        "grad_masks_up2_nchw_mma.cu",
        "outputs[s][1] = words[2];",
        "outputs[s][1] = words[1];",
    ),
    Mutant(
        "the lower of two rows of pixels is the upper one",
        "mma_up2.h",
        "const int a = y + of - s;",
        "const int a = y - s;",
    ),
    Mutant(
        "a slice arrives in the place of the one that is transposed",
        "grad_masks_up2_nchw_mma.cu",
        "staged + (left - 1) % 2 * kElements",
        "staged + left % 2 * kElements",
    ),
    Mutant(
        "gradients of masks are read before all are there",
        "grad_masks_up2_nhwc_mma.cu",
        "(sums, thread, pairs);\n        __syncthreads();",
        "(sums, thread, pairs);",
    ),
    Mutant(
        "a mask leads to a pixel beside its own",
        "grad_features_up2_mma.h",
        "(half * kRowsOfHalf + s) * Tile",
        "(half + s) * Tile",
    ),
    Mutant(
        "the next gradients arrive over those that are multiplied",
        "grad_features_up2_mma.h",
        "multiply_slice<K>(slice, bands, grads, unscale, results);\n            __syncthreads();",
        "multiply_slice<K>(slice, bands, grads, unscale, results);",
    ),
    Mutant(
        "an infinite gradient spreads beyond its window",
        "grad_features_up2_mma.h",
        "if (!slice.finite) compute_again",
        "if (slice.finite) compute_again",
    ),
    Mutant(
        "masks of the next tile are staged over results that are still read",
        "grad_features_up2_mma.h",
        "plan, item, slice);\n        __syncthreads();\n    }",
        "plan, item, slice);\n    }",
    ),
    Mutant(
        "an infinite mask meets a tap beyond the end of a row",
        "tile_down2.h",
        "b < columns_begin || b >= columns_end;",
        "b < columns_begin;",
    ),
    Mutant(
        "an output that a crop leaves out has a gradient",
        "tile_down2.h",
        "pixel.y < array.w;",
        "pixel.y <= array.w;",
    ),
    Mutant(
        "a tile has columns beyond the end of a row",
        "tile_down2.h",
        "j + x < end;",
        "j + x <= end;",
    ),
    Mutant(
        "features of a cell change places",
        "tile_down2.h",
        "K / 2 + feature / kDown",
        "K / 2 + feature % kDown",
    ),
    Mutant(
        "features arrive over masks that are still read",
        "reassemble_down2_nchw.cu",
        "            __syncthreads();\n            if (plan.fours) {\n                copy_rows",
        "            if (plan.fours) {\n                copy_rows",
    ),
    Mutant(
        "an output below a crop is written",
        "reassemble_down2_nchw.cu",
        "below = out_i + 1 < p.out_h",
        "below = out_i < p.out_h",
    ),
    Mutant(
        "features take the place of masks that are still read",
        "reassemble_down2_nchw_mma.cu",
        "            __syncthreads();\n            if (plan.fours) {",
        "            if (plan.fours) {",
    ),
    Mutant(
        "columns are multiplied before they arrive, downsampling",
        "reassemble_down2_nchw_mma.cu",
        "            wait_for_copies();\n",
        "",
    ),
    Mutant(
        "the lower half of a tile has the features of the upper one",
        "reassemble_down2_nchw_mma.cu",
        "features + own.half * H::kFeatures",
        "features",
    ),
    Mutant(
        "a lane stores the columns of its neighbour",
        "reassemble_down2_nchw_mma.cu",
        "pair % 2 * kOfProduct + pair / 2 * 4;",
        "pair / 2 * kOfProduct + pair % 2 * 4;",
    ),
    Mutant(
        "an infinite feature makes NaN of outputs that do not read it, columns adjacent",
        "reassemble_down2_nchw_mma.cu",
        "finite = finite && zeros == 0;",
        "finite = finite || zeros == 0;",
    ),
    Mutant(
        "an infinite mask meets a tap beyond a border, up1",
        "reassemble_up1.h",
        "        if (nothing == 0) return;",
        "        if (nothing == 0 || nothing != 0) return;",
    ),
    Mutant(
        "a mask of a source is that of the output on its other side",
        "reassemble_up1.h",
        "(Transposed ? K - 1 - b : b) * kQuad",
        "b * kQuad",
    ),
    Mutant(
        "taps in the last eight of 16 pixels meet the first eight",
        "reassemble_up1_mma.h",
        "{words[k] & first, words[k] & ~first}",
        "{words[k], words[k] & ~first}",
    ),
    Mutant(
        "outputs around a tile's sources that do not exist have masks",
        "reassemble_up1_mma.h",
        "k < plan.rows * plan.of_row / kWide;",
        "k < 0;",
    ),
    Mutant(
        "an infinite pixel makes NaN of its neighbours, up1",
        "reassemble_up1_mma.h",
        "if (!__any_sync(0xffffffffu, !(zero == 0))) continue;",
        "if (__any_sync(0xffffffffu, 1)) continue;",
    ),
    Mutant(
        "a run's results are stored before all lanes have put theirs",
        "reassemble_up1_mma.h",
        "                    __syncwarp();\n                    if (there > 0)",
        "                    if (there > 0)",
    ),
    Mutant(
        "taps of a warp are read before they arrive",
        "up1_mma.h",
        "        wait_for_copies();\n        __syncwarp();",
        "        __syncwarp();",
    ),
    Mutant(
        "the second slice takes the place of the first one's sums",
        "grad_masks_up1_mma.h",
        "if (!First) sum += *own;",
        "",
    ),
    Mutant(
        "an infinite gradient meets a tap beyond a border, up1 on tensor cores",
        "grad_masks_up1_mma.h",
        "if (!__any_sync(0xffffffffu, !(zero == 0))) continue;",
        "if (__any_sync(0xffffffffu, 1)) continue;",
    ),
    Mutant(
        "sums are written over a slice that is still read",
        "grad_masks_up1.h",
        "            __syncthreads();\n        }\n        const QuadOfThread<K> own(plan);",
        "        }\n        const QuadOfThread<K> own(plan);",
    ),
    Mutant(
        "an infinite gradient meets a tap beyond a border, up1",
        "grad_masks_up1.h",
        "k = 0; nothing != 0 && k < K * kQuad;",
        "k = 0; false && k < K * kQuad;",
    ),
    Mutant(
        "masks around a tile are read before they are staged",
        "grad_features_down.h",
        "    }\n    __syncthreads();\n}",
        "    }\n}",
    ),
    Mutant(
        "sources before the first output are not written",
        "grad_features_down_nhwc.cu",
        "offset > 0 ? 0 : 1",
        "1",
    ),
    Mutant(
        "a cell has gradients of outputs below the last ones",
        "grad_features_down_nhwc.cu",
        "top + y + 1 < p.out_h",
        "top + y + 1 <= p.out_h",
    ),
    Mutant(
        "a unit has a row below the features",
        "grad_features_down_nchw.cu",
        "if (y < rows)",
        "if (y <= rows)",
    ),
    Mutant(
        "an infinite gradient makes NaN of sources beside its window",
        "grad_features_down_nchw.cu",
        "if (zeros == 0) continue;",
        "if (zeros == 0 || item >= 0) continue;",
    ),
    Mutant(
        "the next slice arrives over gradients that are still read",
        "grad_features_down2_nhwc.cu",
        "            __syncthreads();\n            from += kChannels;",
        "            from += kChannels;",
    ),
    Mutant(
        "rows of the next slice arrive over others that are still read",
        "grad_features_down2_nchw.cu",
        "            }\n            __syncthreads();\n        }\n    }",
        "            }\n        }\n    }",
    ),
    Mutant(
        "an infinite gradient meets a tap beyond a border",
        "grad_masks_down2.h",
        "clear_taps_outside<K>(p, i * kDown, j * kDown, taps);",
        "clear_taps_outside<K>(p, i * kDown + K, j * kDown, taps);",
    ),
    Mutant(
        "an output that a crop leaves out meets an infinite feature",
        "grad_masks_down2.h",
        "own[t] = computed ? grad[0][t] : 0;",
        "own[t] = grad[0][t];",
    ),
    Mutant(
        "sums are normalised before all are there",
        "grad_masks_down2.h",
        "    __syncthreads();\n    const int output = thread_computed_late();",
        "    const int output = thread_computed_late();",
    ),
    Mutant(
        "a tile writes outputs of the next one",
        "grad_masks_down2.h",
        "row < rows && column < there};",
        "row < rows && column <= there};",
    ),
    Mutant(
        "pixels of both slices are in one place",
        "grad_masks_down2_nhwc.cu",
        "features + (S::kFeatures - slice));",
        "features + slice);",
    ),
    Mutant(
        "the next gradients arrive over those that are loaded",
        "grad_masks_down2_nhwc.cu",
        "            __syncthreads();  // the next gradients take the place of these\n",
        "",
    ),
    Mutant(
        "channels of the last slice that do not exist are not 0",
        "grad_masks_down2.h",
        "channel < channels ? rows_ : 0;",
        "rows_;",
        sanitizer="address",
    ),
    Mutant(
        "the lower output of a pair has the products of the upper one's window",
        "grad_masks_down2.h",
        "if (lower ? y >= kDown : y < K)",
        "if (y < K)",
    ),
    Mutant(
        "matrices of one channel go to two places",
        "grad_masks_down2_nchw_mma.cu",
        "(eight * kChannels + (channel ^ eight)) * kOfMatrix + column % kOfMatrix;",
        "(eight * kChannels + (channel | eight)) * kOfMatrix + column % kOfMatrix;",
    ),
    Mutant(
        "gradients of the next slice arrive before all are loaded",
        "grad_masks_down2_nchw_mma.cu",
        "            __syncthreads();  // the next gradients take the place of these\n",
        "",
    ),
    Mutant(
        "a thread starts from the sums of another tile",
        "grad_masks_down2_nchw.cu",
        "sum = sharer == 0 ? sums[o][t] : sum + sums[o][t];",
        "sum += sums[o][t];",
    ),
    Mutant(
        "features of the next slice arrive over those that are contracted",
        "grad_masks_down2_nchw.cu",
        "staged + (kSlice<K> - slice);",
        "staged + slice;",
    ),
    Mutant(
        "even columns are in the place of odd ones",
        "grad_masks_down2_nhwc.cu",
        "b % 2 * S::kEven + b / 2",
        "(1 - b % 2) * S::kEven + b / 2",
    ),
    Mutant(
        "sums of another tap are added up",
        "grad_masks_down2_nhwc.cu",
        "others = odd ? sums[2 * k] : sums[2 * k + 1];",
        "others = odd ? sums[2 * k + 1] : sums[2 * k];",
    ),
    Mutant(
        "slices of both gradients are multiplied before they arrive",
        "backward_up2_nhwc_mma.cu",
        "                wait_for_copies();\n",
        "",
    ),
    Mutant(
        "the next slice arrives over the one that is multiplied",
        "backward_up2_nhwc_mma.cu",
        "slices + (k + 1) % 2 * kOfSlice",
        "slices + k % 2 * kOfSlice",
    ),
    Mutant(
        "the first slice arrives over masks that are still read",
        "backward_up2_nhwc_mma.cu",
        "T* const masks = slices + kOfSlice;",
        "T* const masks = slices;",
    ),
    Mutant(
        "bands are staged over a slice that is still multiplied",
        "backward_up2_nhwc_mma.cu",
        "            sync_warps_of_block();\n            stage_band<K, kBeforeTile - K / 2>"
        "(products.sums, thread_of_role() % kBlock, pairs_of_thread<K>(slices));\n",
        "            stage_band<K, kBeforeTile - K / 2>"
        "(products.sums, thread_of_role() % kBlock, pairs_of_thread<K>(slices));\n"
        "            sync_warps_of_block();\n",
    ),
    Mutant(
        "both halves of a tile are the upper one",
        "backward_up2_nhwc_mma.cu",
        "again.top + half * kTileRows",
        "again.top",
    ),
    Mutant(
        "a warp stores results that its other lanes have not put",
        "backward_up2_nhwc_mma.cu",
        "                __syncwarp();\n                slice.store",
        "                slice.store",
    ),
    Mutant(
        "the windows of both gradients begin a row late",
        "backward_up2_nhwc_mma.cu",
        "Features<K>::place(own.row + matrix / 2,",
        "Features<K>::place(own.row + 1 + matrix / 2,",
    ),
    Mutant(
        "the last column of a slice with its halo is not copied",
        "slice_of_channels.h",
        "column < columns - unused &&",
        "column < columns - unused - 1 &&",
    ),
    Mutant(
        "a slice has columns beyond the border",
        "slice_of_channels.h",
        "j >= 0 && j < array.w;",
        "j >= 0 && j <= array.w;",
        sanitizer="address",
    ),
    Mutant(
        "masks beyond a crop are those of a quad",
        "few_channels.h",
        "min(P - 1, static_cast<int>(p.out_w) - 1 - unit.out_j)",
        "P - 1",
    ),
    Mutant(
        "taps of few channels are not cleared beyond borders",
        "few_channels.h",
        "if (!window_inside<K>(p, i, j)) clear",
        "if (i < -K) clear",
    ),
    Mutant(
        "the next tile of few channels comes before the last is read",
        "reassemble_few.cu",
        "        }\n        __syncthreads();\n    }\n",
        "        }\n    }\n",
    ),
    Mutant(
        "sums of few channels are not divided by those of the softmax",
        "reassemble_few.cu",
        "sums[c][q] *= scales[q];",
        "sums[c][q] *= 1;",
    ),
    Mutant(
        "logits of few channels beyond a crop get a gradient",
        "grad_masks_few.cu",
        "if (!p.from_logits || q < there) continue;",
        "continue;",
    ),
    Mutant(
        "few channels add what a crop leaves out",
        "grad_features_few.cu",
        "if (there < P) {",
        "if (there < 0) {",
    ),
    Mutant(
        "sums of few channels are gathered before all are there",
        "grad_features_few.cu",
        "        __syncthreads();\n#pragma unroll 1\n",
        "#pragma unroll 1\n",
    ),
    Mutant(
        "one thread of a source of few channels is heard",
        "grad_features_few.cu",
        "slot < plan.slots; slot++",
        "slot < 1; slot++",
    ),
]


class Build:
    """The commands of a build, and objects of the unchanged kernels for each sanitizer."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.work = work
        self.library = folder / "libcarafepp.a"
        self.commands = {}
        for entry in json.loads((folder / "compile_commands.json").read_text()):
            path = Path(entry["file"]).relative_to(ROOT).as_posix()
            if re.search(r"/(carafepp|test_kernels)\.dir/", entry["command"]):
                self.commands[path] = shlex.split(entry["command"])
        if f"{KERNELS}/generic/reassemble.cu" not in self.commands or not self.library.exists():
            sys.exit(f"{folder} is no build with CARAFEPP_CUDA=EMULATED; see --help")
        self.unchanged: dict[str, dict[str, Path]] = {}

    def compile(self, path: str, sources: Path, sanitizer: str, folder: Path) -> Path:
        """Compile one source of the tree in `sources` to an object in `folder`."""
        target = folder / (Path(path).name + ".o")
        command = [
            argument.replace(f"{ROOT}/core/src", f"{sources}/core/src")
            for argument in self.commands[path]
        ]
        command[command.index("-o") + 1] = str(target)
        if sanitizer:
            command += [f"-fsanitize={sanitizer}", "-O1"]
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path} does not compile:\n{done.stderr}")
        return target

    def prepare(self, sanitizer: str) -> None:
        """Make the objects that all mutants share: with a sanitizer of all kernels."""
        folder = self.work / ("unchanged_" + sanitizer)
        folder.mkdir()
        kernels = [path for path in self.commands if path.startswith(KERNELS)]
        needed = ["tests/cuda/test_kernels.cpp", *(kernels if sanitizer else [])]
        with ThreadPoolExecutor() as pool:
            objects = pool.map(lambda path: self.compile(path, ROOT, sanitizer, folder), needed)
            self.unchanged[sanitizer] = dict(zip(needed, objects, strict=True))

    def link(self, changed: dict[str, Path], sanitizer: str, folder: Path) -> Path:
        """Link test_kernels. The objects replace those of the same name in the library."""
        program = folder / "test_kernels"
        objects = {**self.unchanged[sanitizer], **changed}.values()
        command = [self.commands["tests/cuda/test_kernels.cpp"][0], "-o", str(program)]
        command += [*map(str, objects), str(self.library), "-lpthread"]
        if sanitizer:
            command += [f"-fsanitize={sanitizer}"]
        subprocess.run(command, check=True)
        return program


def path_of(file: str, root: Path) -> Path:
    """Return the path of a file of the kernels in a tree."""
    return next((root / KERNELS).rglob(file))


def includers(file: str) -> set[str]:
    """Return the kernels' sources that include a file, or the file itself."""
    sources = ROOT / "core/src"
    texts = {
        path.relative_to(sources).as_posix(): path.read_text()
        for path in (ROOT / KERNELS).rglob("*.[ch]*")
    }
    found = {path_of(file, ROOT).relative_to(sources).as_posix()}
    while True:
        more = {n for n, t in texts.items() if any(f'#include "{f}"' in t for f in found)}
        if more <= found:
            return {f"core/src/{name}" for name in found if name.endswith(".cu")}
        found |= more


def first_failure(program: Path) -> str:
    """Return the first failure of the test, or nothing if it passes."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    try:
        done = subprocess.run(
            [program, "--abort-after=1"],
            capture_output=True,
            text=True,
            timeout=LONGEST,
            env=environment,
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"no end within {LONGEST} s, as on a busy machine") from late
    if done.returncode == 0:
        return ""
    said = re.search(r"carafepp emulation: .*|SUMMARY: .*|ERROR: .*", done.stderr + done.stdout)
    return said[0] if said else f"exit status {done.returncode}"


def run(mutant: Mutant, build: Build) -> str:
    """Return the first failure of a mutant, or nothing."""
    with tempfile.TemporaryDirectory(dir=build.work) as name:
        folder = Path(name)
        shutil.copytree(ROOT / "core/src", folder / "core/src")
        file = path_of(mutant.file, folder)
        text = file.read_text()
        if text.count(mutant.text) != 1:
            raise RuntimeError(f"{mutant.file} has its text {text.count(mutant.text)} times")
        file.write_text(text.replace(mutant.text, mutant.replacement))
        changed = {
            path: build.compile(path, folder, mutant.sanitizer, folder)
            for path in includers(mutant.file) & build.commands.keys()
        }
        return first_failure(build.link(changed, mutant.sanitizer, folder))


def main() -> None:
    """Print a line for each mutant; exit with 1 unless each was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build/emulated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--every", type=int, default=1, help="run each N-th of them only")
    parser.add_argument("names", nargs="*", help="a part of the name of the mutants to run")
    asked = parser.parse_args()
    mutants = [m for m in MUTANTS if not asked.names or any(n in m.name for n in asked.names)]
    mutants = mutants[:: asked.every]
    with tempfile.TemporaryDirectory() as work:
        build = Build(asked.build.resolve(), Path(work))
        sanitizers = sorted({mutant.sanitizer for mutant in mutants})
        for sanitizer in sanitizers:
            build.prepare(sanitizer)

        def without_bug(sanitizer: str) -> str:
            folder = build.work / ("without_bug_" + sanitizer)
            folder.mkdir()
            return first_failure(build.link({}, sanitizer, folder))

        def timed(mutant: Mutant) -> bool:
            start = time.monotonic()
            try:
                said = run(mutant, build)
                verdict = "noticed" if said else "NOT NOTICED"
            except RuntimeError as error:
                said, verdict = str(error), "ERROR"
            seconds = time.monotonic() - start
            print(f"{verdict:11}  {seconds:5.1f} s  {mutant.name}: {said[:150]}", flush=True)
            return verdict == "noticed"

        with ThreadPoolExecutor(asked.jobs) as pool:
            failures = pool.map(without_bug, sanitizers)
            noticed = sum(pool.map(timed, mutants))
            for sanitizer, failure in zip(sanitizers, failures, strict=True):
                if failure:
                    sys.exit(f"without any bug, {sanitizer or 'no'} sanitizer: {failure}")
    print(f"{noticed} of {len(mutants)} noticed")
    sys.exit(noticed < len(mutants))


if __name__ == "__main__":
    main()
