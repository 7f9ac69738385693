// SPDX-License-Identifier: Apache-2.0
// How kernels for a factor of 2 or 1/2 divide their work. An item is a tile of one image and group, in all or some of
// the group's channels. A block goes through the channels of an item a slice at a time. A last round of few items
// leaves multiprocessors idle. Shares of the slices of all tiles leave none.
#pragma once

#include "cuda/platform.h"

namespace carafepp::cuda {

struct Tiles {
    int rows, columns;         // of a tile
    int before;                // columns of the first tile that are left of the image
    int64_t tile_rows, tiles;  // of an image, of a row
    int64_t channels;          // of an item
    int64_t channel_blocks;    // of a group
    int64_t items;

    // Items have fewer slices, but two at least, if there are less than `enough` items.
    Tiles(const Problem& p, int64_t height, int64_t width, int rows, int columns, int channels_of_slice, int64_t enough,
          int before = 0)
        : rows(rows), columns(columns), before(before) {
        tile_rows = ceil_div(height, rows);
        tiles = ceil_div(width + before, columns);
        const int64_t of_channels = p.features.n * p.groups * tile_rows * tiles,
                      all = std::max<int64_t>(ceil_div(p.features.c / p.groups, channels_of_slice), 1);
        int64_t slices = all;
        while (slices > 2 && of_channels * ceil_div(all, slices) < enough) slices = ceil_div(slices, 2);
        channels = slices * channels_of_slice;
        channel_blocks = ceil_div(all, slices);
        items = of_channels * channel_blocks;
    }
};

// Gives the items of tiles as many channels that the busiest multiprocessor is done first. An item stages its masks,
// which takes as long as some slices. A multiprocessor with fewer items than `at_once` is partly idle.
inline Tiles with_even_items(Tiles tiles, int channels_of_slice, int64_t slices_to_stage, int64_t at_once = 2) {
    constexpr int64_t kMostBlocks = 32;
    const int64_t all = ceil_div(tiles.channels * tiles.channel_blocks, int64_t{channels_of_slice}),
                  of_channels = tiles.items / tiles.channel_blocks;
    int64_t least = INT64_MAX;
    for (int64_t blocks = 1; blocks <= std::clamp<int64_t>(all / 2, 1, kMostBlocks); blocks++) {
        const int64_t slices = ceil_div(all, blocks), items = of_channels * ceil_div(all, slices),
                      cost = std::max<int64_t>(ceil_div(items, kMultiprocessors), at_once) * (slices + slices_to_stage);
        if (cost >= least) continue;
        least = cost;
        tiles.channels = slices * channels_of_slice;
        tiles.channel_blocks = ceil_div(all, slices);
        tiles.items = items;
    }
    return tiles;
}

struct TileOfItem {
    int64_t n, group, c;  // the first channel
    int top, left;
    int channels;

    __device__ __forceinline__ TileOfItem(const Problem& p, const Tiles& plan, int64_t item) {
        const Quotient channel_block = divide(item, computed_late(plan.channel_blocks)),
                       tile = divide(channel_block.quotient, computed_late(plan.tiles)),
                       tile_row = divide(tile.quotient, computed_late(plan.tile_rows)),
                       image = divide(tile_row.quotient, computed_late(p.groups));
        n = image.quotient;
        group = image.remainder;
        top = static_cast<int>(tile_row.remainder) * plan.rows;
        left = static_cast<int>(tile.remainder) * plan.columns - plan.before;
        const int64_t channels_in_group = p.features.c / p.groups, first = channel_block.remainder * plan.channels;
        c = group * channels_in_group + first;
        channels = static_cast<int>(min(channels_in_group - first, plan.channels));
    }
};

// Tiles in all channels, shared by the blocks of a grid. A share may begin and end with any slice of a tile. So all
// blocks are done at once, but more of them stage masks of a tile. If that takes longer, shares are whole tiles.
struct SharedTiles : Tiles {
    uint32_t channels_of_part, parts_of_tile;  // a part is a slice, or the whole tile
    int64_t parts, blocks;

    // The device runs `at_once` blocks.
    SharedTiles(const Tiles& tiles, int channels_of_slice, int64_t at_once) : Tiles(tiles) {
        constexpr int64_t kToStage = 1, kFewest = 2;  // slices: to stage masks takes as long; of a share
        const int64_t slices = channels / channels_of_slice, of_share = ceil_div(items * slices, at_once);
        const bool whole = ceil_div(items, at_once) * (slices + kToStage) <=
                           of_share + kToStage * (ceil_div(of_share, slices) + 1);
        channels_of_part = static_cast<uint32_t>(whole ? channels : channels_of_slice);
        parts_of_tile = static_cast<uint32_t>(whole ? 1 : slices);
        parts = items * parts_of_tile;
        blocks = std::clamp<int64_t>(whole ? items : parts / kFewest, std::min<int64_t>(items, 1), at_once);
    }
};

// The tiles of a block's share, one after the other. It keeps their count alone, which a uniform register has.
class TilesOfBlock {
public:
    __device__ __forceinline__ bool exist(const SharedTiles& plan) const {
        const uint32_t of_tile = parts_of_tile(plan), first = begin_of(plan, blockIdx.x);
        return max(first, (first / of_tile + count_) * of_tile) < begin_of(plan, blockIdx.x + 1);
    }

    // The next tile, in the channels of the share.
    __device__ __forceinline__ TileOfItem take(const Problem& p, const SharedTiles& plan) {
        const uint32_t of_tile = parts_of_tile(plan), first = begin_of(plan, blockIdx.x),
                       number = first / of_tile + count_++, begin = max(first, number * of_tile) - number * of_tile,
                       end = min(begin_of(plan, blockIdx.x + 1), (number + 1) * of_tile) - number * of_tile;
        TileOfItem tile(p, plan, number);
        tile.c += begin * plan.channels_of_part;
        tile.channels = min(tile.channels, static_cast<int>(end * plan.channels_of_part)) -
                        static_cast<int>(begin * plan.channels_of_part);
        return tile;
    }

private:
    static __device__ __forceinline__ uint32_t parts_of_tile(const SharedTiles& plan) {
        return static_cast<uint32_t>(computed_late(plan.parts_of_tile));
    }
    // The first part of a block's share.
    static __device__ __forceinline__ uint32_t begin_of(const SharedTiles& plan, uint32_t block) {
        const auto all = static_cast<uint32_t>(computed_late(plan.parts)), of_block = all / gridDim.x;
        return block * of_block + min(block, all % gridDim.x);
    }

    uint32_t count_ = 0;
};

}  // namespace carafepp::cuda
