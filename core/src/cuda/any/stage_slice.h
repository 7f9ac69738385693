// SPDX-License-Identifier: Apache-2.0
// Features in shared memory, for any factor: a slice of some vectors of channels, with the halo of a tile.
#pragma once

#include "cuda/any/stage_lines.h"
#include "cuda/channels.h"

namespace carafepp::cuda {

// Stages a vector of channels of pixels from `first` on, of which `channels` channels exist; 0 elsewhere. Floats arrive
// as copies of this thread do.
template <bool Vectors, class T>
__device__ __forceinline__ void stage_slice(const T* from, int64_t stride_c, const int64_t* pixels, int count,
                                            int first, int step, int channels, float4* to, int to_step) {
    constexpr int kInFlight = Vectors ? 4 : 2;
#pragma unroll 1
    for (int pixel = first; pixel < count; pixel += kInFlight * step) {
        float4 values[kInFlight];
#pragma unroll
        for (int load = 0; load < kInFlight; load++) {
            const int at = pixel + load * step;
            if (std::is_same_v<T, float> && at >= count) break;
            const int64_t place = at < count ? pixels[at] : kNowhere;
            const int there = place != kNowhere ? channels : 0;
            const T* const of_pixel = from + (place != kNowhere ? place : 0);
            if constexpr (std::is_same_v<T, float>) {
                copy_four<Vectors>(to + load * to_step, of_pixel, stride_c, there);
            } else {
                values[load] = load_four<Vectors>(of_pixel, stride_c, there);
            }
        }
        if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
            for (int load = 0; load < kInFlight; load++) {
                if (pixel + load * step < count) to[load * to_step] = values[load];
            }
        }
        to += kInFlight * to_step;
    }
}

// The same with four columns of a row at once, which are adjacent in memory. `pixels` has the first of them.
template <class T>
__device__ __forceinline__ void stage_fours(const T* from, int64_t stride_c, const int64_t* pixels, int count,
                                            int first, int step, int channels, float4* to) {
#pragma unroll 1
    for (int four = first; four < count; four += step, to += 4 * step) {
        const int64_t place = pixels[four];
        const int there = place != kNowhere ? channels : 0;
        const T* at = from + (place != kNowhere ? place : 0);
        float4 rows[kVector];  // of channels
#pragma unroll
        for (int v = 0; v < kVector; v++, at += stride_c) rows[v] = load_channels(at, v < there);
        to[0] = make_float4(rows[0].x, rows[1].x, rows[2].x, rows[3].x);
        to[1] = make_float4(rows[0].y, rows[1].y, rows[2].y, rows[3].y);
        to[2] = make_float4(rows[0].z, rows[1].z, rows[2].z, rows[3].z);
        to[3] = make_float4(rows[0].w, rows[1].w, rows[2].w, rows[3].w);
    }
}

}  // namespace carafepp::cuda
