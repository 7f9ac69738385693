// SPDX-License-Identifier: Apache-2.0
// Counts the memory accesses of emulated CUDA kernels, warp by warp.
//
// Kernels compiled with -fsanitize=thread call a function before each access. trace.cpp has these functions, instead of
// ThreadSanitizer. Accesses of 32 lanes are one of a warp if they are at the same place in the code, for the same time.
// If a condition lets some lanes skip an access, the times of later ones differ. Copies of cp.async and instructions of
// tensor cores are not among them. Rows of boxes that are copied count as loads that pass by the L1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace carafepp::trace {

constexpr int kL1Kilobytes[] = {16, 32, 64, 128};  // for one block
constexpr size_t kL1Sizes = sizeof kL1Kilobytes / sizeof *kL1Kilobytes;

// Counts of one array, or of the shared memory. A line has 128 bytes, a sector 32.
struct Counts {
    int64_t loads = 0, stores = 0;               // of warps
    int64_t lanes = 0;                           // that took part in them
    int64_t loaded_bytes = 0, stored_bytes = 0;  // different ones in an access of a warp
    int64_t load_lines = 0, store_lines = 0;
    int64_t load_sectors = 0, store_sectors = 0;
    int64_t l2_sectors[kL1Sizes] = {};  // loads that an L1 of each size misses; it is empty when a block begins
    int64_t wavefronts = 0, fewest_wavefronts = 0;  // of shared memory; the fewest that its bytes allow
};

struct Array {
    const char* name;
    uintptr_t begin, end;
    Counts counts;
};

struct Trace {
    std::vector<Array> arrays;  // in global memory; put them here before a launch
    Counts shared;
    int64_t blocks = 0;
    std::map<std::pair<const void*, const char*>, int64_t> places;  // code, "LDG", "STG", "LDS" or "STS": of warps
};

Trace& trace();

void finish();  // counts the last block; call it after a launch

}  // namespace carafepp::trace
