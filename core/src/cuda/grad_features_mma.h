// SPDX-License-Identifier: Apache-2.0
// How the gradients of features on tensor cores cut a call into items: a block has some strips beside each other, each
// a tile wide, and as many chunks of channels as it has warps for; with few channels more strips.
#pragma once

#include "cuda/grad_features_up2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {

constexpr int kChannels = 64;          // of a warp
constexpr int kWarps = kThreads / 32;  // of a block

// What a warp has of an item: a tile with its corner at (top, left) in some channels, fewer than one where it has none.
struct TileOfWarp {
    int64_t n, group;
    int first;  // column of the block
    int left, top, strip;
    int64_t in_group;  // its first channel
    int channels;
};

template <int kTileColumns, int kTileRows>
struct Cut {
    int strips;                    // of a block
    int64_t panels, runs, chunks;  // of strips in a row, of rows in an image, of channels in a group
    int64_t items;

    explicit Cut(const Problem& p) {
        const int64_t channels = p.features.c / p.groups;
        strips = channels > 2 * kChannels ? 2 : channels > kChannels ? 4 : 8;
        panels = ceil_div(p.features.w, strips * kTileColumns);
        runs = ceil_div(p.features.h, kTileRows);
        chunks = ceil_div(channels, kWarps / strips * kChannels);
        items = p.features.n * p.groups * runs * panels * chunks;
    }

    __device__ TileOfWarp tile(const Problem& p, int64_t item, int warp) const {
        const Quotient chunk = divide(item, chunks), panel = divide(chunk.quotient, panels),
                       run = divide(panel.quotient, runs), image = divide(run.quotient, p.groups);
        TileOfWarp at;
        at.n = image.quotient;
        at.group = image.remainder;
        at.strip = warp % strips;
        at.first = static_cast<int>(panel.remainder) * strips * kTileColumns;
        at.left = at.first + at.strip * kTileColumns;
        at.top = static_cast<int>(run.remainder) * kTileRows;
        at.in_group = (chunk.remainder * (kWarps / strips) + warp / strips) * kChannels;
        at.channels = static_cast<int>(min(p.features.c / p.groups - at.in_group, int64_t{kChannels}));
        return at;
    }
};

}  // namespace carafepp::cuda
