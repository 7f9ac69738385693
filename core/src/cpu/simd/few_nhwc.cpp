// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/few_nhwc.h"

namespace carafepp::CARAFEPP_ISA {

template <class A>
void ChannelCells<A>::load(const Array& array, int64_t n, int64_t row, int64_t column, int first, int count,
                           A* tile) const {
    with_type_of<A>(array.dtype, [&](auto type) {
        using M = typename decltype(type)::type;
        const int size = static_cast<int>(taps * outputs);
        load_channels<M>(element<const M>(array, n, first * size, row, column), size, count, size,
                         adjacent_channels(tile, L));
    });
}

template <class A>
void ChannelCells<A>::store(const A* tile, int64_t n, int64_t row, int64_t column, int first, int count,
                            const Array& array) const {
    with_type_of<A>(array.dtype, [&](auto type) {
        using M = typename decltype(type)::type;
        const int size = static_cast<int>(taps * outputs);
        store_channels<M>(adjacent_channels(tile, L), count, size, element<M>(array, n, first * size, row, column),
                          size);
    });
}

template struct ChannelCells<float>;
template struct ChannelCells<double>;

}  // namespace carafepp::CARAFEPP_ISA
