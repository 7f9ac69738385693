// SPDX-License-Identifier: Apache-2.0
// The counts of accesses, on the small kernels of test_trace_kernels.cpp.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <vector>

#include "emulation.h"
#include "trace.h"

__global__ void copy(const float* from, int stride, float* to);
__global__ void copy_vectors(const float4* from, float4* to);
__global__ void read_again(const float* rows, int count, int times, float* to);
__global__ void store_to_shared(int stride);

namespace {

using namespace carafepp;

// Runs a kernel on arrays that are watched: `from` and `to`.
template <class... Parameters, class... Arguments>
trace::Trace traced(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
    trace::trace().blocks = 0;
    trace::trace().shared = {};
    for (trace::Array& array : trace::trace().arrays) array.counts = {};
    emulation::launch(kernel, blocks, threads, 32 * 1024, nullptr, arguments...);
    trace::finish();
    return trace::trace();
}

struct Watched {
    std::vector<float> from = std::vector<float>(8192), to = std::vector<float>(8192);

    Watched() {
        trace::trace().arrays.clear();
        for (const std::vector<float>* array : {&from, &to}) {
            const auto begin = reinterpret_cast<uintptr_t>(array->data()) / 128 * 128;
            trace::trace().arrays.push_back({"", begin, begin + sizeof(float) * array->size(), {}});
        }
    }
    float* input() { return reinterpret_cast<float*>(trace::trace().arrays[0].begin + 128); }
    float* output() { return reinterpret_cast<float*>(trace::trace().arrays[1].begin + 128); }
};

TEST_CASE("adjacent elements of a warp fill their sectors") {
    Watched arrays;
    const trace::Trace found = traced(copy, 1, 64, arrays.input(), 1, arrays.output());
    const trace::Counts &from = found.arrays[0].counts, &to = found.arrays[1].counts;
    CHECK(from.loads == 2);
    CHECK(from.lanes == 64);
    CHECK(from.load_lines == 2);
    CHECK(from.load_sectors == 8);
    CHECK(from.loaded_bytes == 256);
    CHECK(to.stores == 2);
    CHECK(to.store_sectors == 8);
    CHECK(from.stores + to.loads == 0);
}

TEST_CASE("every other element fills half of them") {
    Watched arrays;
    const trace::Trace found = traced(copy, 1, 32, arrays.input(), 2, arrays.output());
    CHECK(found.arrays[0].counts.load_sectors == 8);
    CHECK(found.arrays[0].counts.loaded_bytes == 128);
}

TEST_CASE("a vector is one access") {
    Watched arrays;
    const trace::Trace found = traced(copy_vectors, 1, 32, reinterpret_cast<const float4*>(arrays.input()),
                                      reinterpret_cast<float4*>(arrays.output()));
    CHECK(found.arrays[0].counts.loads == 1);
    CHECK(found.arrays[0].counts.load_sectors == 16);
    CHECK(found.arrays[0].counts.load_lines == 4);
    CHECK(found.arrays[1].counts.stores == 1);
}

TEST_CASE("an L1 keeps what fits, for one block") {
    Watched arrays;
    const int rows = 20 * 1024 / 128;  // 20 KB: more than the first size
    const trace::Trace found = traced(read_again, 2, 32, arrays.input(), rows, 3, arrays.output());
    const trace::Counts& from = found.arrays[0].counts;
    CHECK(found.blocks == 2);
    CHECK(from.load_sectors == 2 * 3 * rows * 4);
    CHECK(from.l2_sectors[0] == 2 * 3 * rows * 4);
    CHECK(from.l2_sectors[1] == 2 * rows * 4);
}

TEST_CASE("lanes wait for each other at a bank") {
    Watched arrays;
    for (const auto& [stride, wavefronts] : {std::pair(1, 1), {2, 2}, {32, 32}, {33, 1}, {0, 1}}) {
        CAPTURE(stride);
        const trace::Trace found = traced(store_to_shared, 1, 32, stride);
        CHECK(found.shared.stores == 1);
        CHECK(found.shared.wavefronts == wavefronts);
        CHECK(found.shared.fewest_wavefronts == 1);
    }
}

TEST_CASE("a sample of blocks") {
    Watched arrays;
    emulation::settings().most_blocks_run = 3;
    const trace::Trace found = traced(copy, 10, 32, arrays.input(), 1, arrays.output());
    emulation::settings().most_blocks_run = INT64_MAX;
    CHECK(found.blocks == 3);
    CHECK(found.arrays[0].counts.loads == 3);
}

}  // namespace
