// SPDX-License-Identifier: Apache-2.0
// The plan of the gradients of features on tensor cores. Each warp of a block has a tile, in 64 channels. Some warps
// stand beside each other in a row; the others have the next channels. Fewer channels leave more warps for the row.
#pragma once

#include "cuda/grad_features_up2.h"
#include "cuda/mma.h"

namespace carafepp::cuda {

constexpr int kChannelsOfWarp = 64;
constexpr int kWarps = kThreads / 32;  // of a block

// The part of an item that a warp has: a tile in some channels.
struct TileOfWarp {
    int64_t n, group;
    int first;         // column of the block
    int left, top;     // corner of the tile
    int warp_in_row;   // number of the tile in the block
    int64_t in_group;  // first channel
    int channels;      // none or fewer if the warp has no tile
};

template <int kTileColumns, int kTileRows>
struct GradFeaturesMmaPlan {
    int warps_in_row;            // of a block; the others have the next channels
    int64_t block_rows, blocks;  // of an image, of a row
    int64_t channel_blocks;      // of a group
    int64_t items;

    explicit GradFeaturesMmaPlan(const Problem& p) {
        const int64_t channels = p.features.c / p.groups;
        warps_in_row = channels > 2 * kChannelsOfWarp ? 2 : channels > kChannelsOfWarp ? 4 : 8;
        block_rows = ceil_div(p.features.h, kTileRows);
        blocks = ceil_div(p.features.w, warps_in_row * kTileColumns);
        channel_blocks = ceil_div(channels, kWarps / warps_in_row * kChannelsOfWarp);
        items = p.features.n * p.groups * block_rows * blocks * channel_blocks;
    }

    __device__ TileOfWarp tile(const Problem& p, int64_t item, int warp) const {
        const Quotient channel_block = divide(item, channel_blocks), block = divide(channel_block.quotient, blocks),
                       block_row = divide(block.quotient, block_rows), image = divide(block_row.quotient, p.groups);
        TileOfWarp at;
        at.n = image.quotient;
        at.group = image.remainder;
        at.warp_in_row = warp % warps_in_row;
        at.first = static_cast<int>(block.remainder) * warps_in_row * kTileColumns;
        at.left = at.first + at.warp_in_row * kTileColumns;
        at.top = static_cast<int>(block_row.remainder) * kTileRows;
        at.in_group = (channel_block.remainder * (kWarps / warps_in_row) + warp / warps_in_row) * kChannelsOfWarp;
        at.channels = static_cast<int>(min(p.features.c / p.groups - at.in_group, int64_t{kChannelsOfWarp}));
        return at;
    }
};

}  // namespace carafepp::cuda
