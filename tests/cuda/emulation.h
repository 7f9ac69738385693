// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host. A build with tests/cuda/emulated first on its include path compiles their sources as
// C++, unchanged: <cuda_runtime.h> there includes this.
//
// Every CUDA thread of a block is a fibre, and blocks run one after the other. A launch returns when its kernel has
// ended. Launches of several host threads wait for each other. It reports these mistakes on stderr and aborts:
//
//     - a launch beyond the limits
//     - a __syncthreads() that not all threads of a block reach at the same line
//     - a warp collective whose lanes differ in line or mask
//     - threads that wait for each other
//     - copies and vector accesses that are not aligned
//     - a store into the margins of the shared memory
//
// Shared memory has exactly the size asked for and is filled with NaN before each block. AddressSanitizer sees its
// ends; ThreadSanitizer sees every CUDA thread as a thread of its own, ordered by barriers alone. So it reports races
// in shared and in global memory. It must not see emulation.cpp itself (-fno-sanitize=thread).
//
// It cannot show speed, limits of registers, bank conflicts, a weak order of memory accesses or streams. Nor does it
// show the accuracy of a device's own functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CARAFEPP_VECTOR_OF_2(name, type)    \
    struct alignas(2 * sizeof(type)) name { \
        type x, y;                          \
    };                                      \
    constexpr name make_##name(type x, type y) { return {x, y}; }
#define CARAFEPP_VECTOR_OF_4(name, type)    \
    struct alignas(4 * sizeof(type)) name { \
        type x, y, z, w;                    \
    };                                      \
    constexpr name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

CARAFEPP_VECTOR_OF_2(float2, float)
CARAFEPP_VECTOR_OF_2(double2, double)
CARAFEPP_VECTOR_OF_2(int2, int)
CARAFEPP_VECTOR_OF_2(uint2, unsigned)
CARAFEPP_VECTOR_OF_4(float4, float)
CARAFEPP_VECTOR_OF_4(int4, int)
CARAFEPP_VECTOR_OF_4(uint4, unsigned)

using cudaStream_t = struct CUstream_st*;

constexpr int warpSize = 32;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace carafepp::emulation {

// ---- the machine ----

enum class Order { kForward, kReverse, kRandom };

// Read when a kernel is launched.
struct Settings {
    Order order = Order::kForward;        // of blocks, and of threads: the first that can run does
    uint64_t seed = 0;                    // of the random order, which changes at each barrier
    bool deferred_copies = false;         // copy_async: data arrive when waited for, or else at once
    int64_t most_blocks = INT32_MAX;      // of a grid launched by cudaLaunchKernel; blocks go on to further items
    int64_t most_blocks_run = INT64_MAX;  // of a grid: a sample, spread evenly; results are not complete
};
Settings& settings();

// CUDA threads that have run so far.
uint64_t threads_run();

// Instructions of tensor cores that warps have run so far.
uint64_t mmas_run();

// Bytes that threads have copied asynchronously so far, and in how many groups.
uint64_t bytes_copied();
uint64_t groups_copied();

constexpr size_t kMostSharedBytes = 227 * 1024;  // of a block

// Shared memory of the running block, aligned to 128 bytes as kernels ask for it, and its size.
void* shared_memory();
size_t shared_bytes();

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* kernel);

template <class... Parameters>
constexpr void check_parameters() {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied as bytes");
    static_assert((size_t{0} + ... + sizeof(Parameters)) <= 4096, "kernel parameters are at most 4 KiB");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
    check_parameters<Parameters...>();
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    const auto thread = [&] { std::apply(kernel, values); };
    run(grid, block, shared_bytes, [](const void* f) { (*static_cast<decltype(&thread)>(f))(); }, &thread);
}

// The line where a kernel waits. As a default argument it is the line of the call.
struct Place {
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

void sync_block(Place place);
void sync_warp(unsigned mask, Place place);

enum class Shuffle { kFrom, kXor, kDown, kUp };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Place place);

template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, int operand, int width, Place place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffle(kind, mask, bits, operand, width, place);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

[[noreturn]] void misaligned(const volatile void* address, size_t alignment, Place place);

template <class T>
__forceinline__ void check_aligned(const T* address, Place place) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) misaligned(address, sizeof(T), place);
}

// ---- copies from global to shared memory (cp.async) ----

// Copies `bytes` (4, 8 or 16), those from `bytes_read` on as 0. Arrives like its group.
void copy_async(void* shared, const void* global, size_t bytes, size_t bytes_read, Place place = Place::here());

// The copies of this thread since the last commit become a group.
void commit_copies();

// Waits until at most `groups_left` groups of this thread have not arrived; copies in no group are not waited for.
void wait_for_copies(int groups_left);

// ---- tensor cores (mma.sync.aligned.row.col, f32 sums) ----

enum class MmaType { kFloat16, kBFloat16 };

// ldmatrix.x4, of matrices of 8 x 8 elements of 16 bits in shared memory. Lane 8 * m + r tells where row r of matrix m
// is. The word m of a lane has columns 2 * (lane % 4) and the next of row lane / 4, or with .trans rows 2 * (lane % 4)
// and the next of column lane / 4. All 32 lanes take part.
void load_matrices(bool transposed, const void* row, uint32_t (&words)[4], Place place);

// sums[16][8] += a[16][k] * b[k][8] for k = 8 or 16, in the fragments of the PTX manual: `a` has k/4 registers of two
// elements, `b` k/8. All 32 lanes take part.
void mma(MmaType type, int k, float* sums, const uint32_t* a, const uint32_t* b, Place place);

inline void mma_m16n8k8(MmaType type, float (&sums)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                        Place place = Place::here()) {
    mma(type, 8, sums, a, b, place);
}

inline void mma_m16n8k16(MmaType type, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Place place = Place::here()) {
    mma(type, 16, sums, a, b, place);
}

}  // namespace carafepp::emulation

// ---- functions of the language ----

inline void __syncthreads(carafepp::emulation::Place place = carafepp::emulation::Place::here()) {
    carafepp::emulation::sync_block(place);
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       carafepp::emulation::Place place = carafepp::emulation::Place::here()) {
    carafepp::emulation::sync_warp(mask, place);
}

#define CARAFEPP_SHUFFLE(name, kind)                                                            \
    template <class T>                                                                          \
    T name(unsigned mask, T value, int operand, int width = warpSize,                           \
           carafepp::emulation::Place place = carafepp::emulation::Place::here()) {             \
        using carafepp::emulation::Shuffle;                                                     \
        return carafepp::emulation::shuffle(Shuffle::kind, mask, value, operand, width, place); \
    }

CARAFEPP_SHUFFLE(__shfl_sync, kFrom)
CARAFEPP_SHUFFLE(__shfl_xor_sync, kXor)
CARAFEPP_SHUFFLE(__shfl_down_sync, kDown)
CARAFEPP_SHUFFLE(__shfl_up_sync, kUp)

inline int __any_sync(unsigned mask, int predicate,
                      carafepp::emulation::Place place = carafepp::emulation::Place::here()) {
    for (int distance = 1; distance < warpSize; distance *= 2)
        predicate |= __shfl_xor_sync(mask, predicate, distance, warpSize, place);
    return predicate;
}

template <class T>
__forceinline__ T __ldg(const T* address, carafepp::emulation::Place place = carafepp::emulation::Place::here()) {
    carafepp::emulation::check_aligned(address, place);
    return *address;
}

template <class T>
__forceinline__ void __stcs(T* address, T value,
                            carafepp::emulation::Place place = carafepp::emulation::Place::here()) {
    carafepp::emulation::check_aligned(address, place);
    *address = value;
}
