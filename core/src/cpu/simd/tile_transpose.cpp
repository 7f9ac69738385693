// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {

template <class M>
void load_channels(const M* from, int64_t cell_stride, int count, int channels, ChannelOrder<Accumulator<M>> order) {
    using A = Accumulator<M>;
    constexpr int L = kLanes<A>;
    alignas(kVectorBytes) A block[L * L];
    for (int q = count; q < L; q++) store(Vector<A>{}, block + q * L);
    for_each_block<L>(channels, [&](int begin, int size) {
        const M* cell = from + begin;
        if (count == L && size == L && order.up == 1) {  // no detour through a block
            transpose_block(cell, cell_stride, order.staged + begin * order.tap_size, order.tap_size);
            return;
        }
        for (int q = 0; q < count; q++, cell += cell_stride) store(load_part(cell, size), block + q * L);
        transpose_block(block, L, block, L);
        order.seek(begin);
        for (int c = 0; c < size; c++) {
            A* const staged = order.next();
            if (staged != nullptr) store(load(block + c * L), staged);
        }
        for (int q = count; q < L; q++) store(Vector<A>{}, block + q * L);
    });
}

template <class M>
void store_channels(ChannelOrder<const Accumulator<M>> order, int count, int channels, M* to, int64_t cell_stride) {
    using A = Accumulator<M>;
    constexpr int L = kLanes<A>;
    alignas(kVectorBytes) A block[L * L];
    for_each_block<L>(channels, [&](int begin, int size) {
        if (count == L && size == L && order.up == 1) {
            transpose_block(order.staged + begin * order.tap_size, order.tap_size, to + begin, cell_stride);
            return;
        }
        order.seek(begin);
        for (int c = 0; c < L; c++) {
            const A* const staged = c < size ? order.next() : nullptr;
            store(staged != nullptr ? load(staged) : Vector<A>{}, block + c * L);
        }
        transpose_block(block, L, block, L);
        M* cell = to + begin;
        for (int q = 0; q < count; q++, cell += cell_stride) store_part(load(block + q * L), cell, size);
    });
}

template void load_channels(const float*, int64_t, int, int, ChannelOrder<float>);
template void store_channels(ChannelOrder<const float>, int, int, float*, int64_t);
template void load_channels(const double*, int64_t, int, int, ChannelOrder<double>);
template void store_channels(ChannelOrder<const double>, int, int, double*, int64_t);
template void load_channels(const Float16*, int64_t, int, int, ChannelOrder<float>);
template void store_channels(ChannelOrder<const float>, int, int, Float16*, int64_t);
template void load_channels(const BFloat16*, int64_t, int, int, ChannelOrder<float>);
template void store_channels(ChannelOrder<const float>, int, int, BFloat16*, int64_t);

}  // namespace carafepp::CARAFEPP_ISA
