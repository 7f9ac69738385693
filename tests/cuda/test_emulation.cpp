// SPDX-License-Identifier: Apache-2.0
// Small kernels test the emulator: right ones must give the results of a device, wrong ones must be noticed.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "boxes.h"
#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kUnderAsan = true;
#else
constexpr bool kUnderAsan = false;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr bool kUnderTsan = true;
#else
constexpr bool kUnderTsan = false;
#endif

namespace {

using namespace carafepp::emulation;

const float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
T* shared() {
    return static_cast<T*>(shared_memory());
}

// Every order of threads, with copies at once and deferred.
template <class F>
void for_each_setting(F f) {
    for (const bool deferred : {false, true}) {
        for (const auto& [order, seed] :
             {std::pair(Order::kForward, 0), {Order::kReverse, 0}, {Order::kRandom, 1}, {Order::kRandom, 2}}) {
            settings() = {order, static_cast<uint64_t>(seed), deferred};
            f();
        }
    }
    settings() = {};
}

// ---- blocks and threads ----

__global__ void write_indices(uint64_t* where) {
    const uint64_t block = (uint64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const uint64_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    where[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000000 + thread;
}

TEST_CASE("every thread of every block runs") {
    for_each_setting([] {
        const uint64_t before = threads_run();
        std::vector<uint64_t> where(3 * 2 * 4 * 5 * 7 * 2);
        launch(write_indices, dim3(3, 2, 4), dim3(5, 7, 2), 0, nullptr, where.data());
        for (uint64_t k = 0; k < where.size(); k++) CHECK(where[k] == k / 70 * 1000000 + k % 70);
        CHECK(threads_run() - before == where.size());
    });
}

__global__ void take_numbers(unsigned* next, unsigned* numbers) {
    numbers[blockIdx.x * blockDim.x + threadIdx.x] = (*next)++;
}

TEST_CASE("threads run in the order asked for" * doctest::skip(kUnderTsan)) {  // these threads do race
    const auto numbers = [](Order order, uint64_t seed) {
        settings() = {order, seed, false};
        unsigned next = 0;
        std::vector<unsigned> all(6 * 70);
        launch(take_numbers, 6, 70, 0, nullptr, &next, all.data());
        settings() = {};
        return all;
    };
    std::vector<unsigned> expected(6 * 70);
    for (unsigned k = 0; k < expected.size(); k++) expected[k] = k;
    CHECK(numbers(Order::kForward, 0) == expected);
    std::reverse(expected.begin(), expected.end());
    CHECK(numbers(Order::kReverse, 0) == expected);
    std::vector<unsigned> random = numbers(Order::kRandom, 1);
    CHECK(random == numbers(Order::kRandom, 1));
    CHECK(random != numbers(Order::kRandom, 2));
    std::sort(random.begin(), random.end());
    CHECK(std::equal(random.begin(), random.end(), expected.rbegin()));
}

struct Parameters {
    int64_t numbers[30];
};

__global__ void sum_parameters(Parameters parameters, float factor, double* sum) {
    for (int64_t& number : parameters.numbers) number *= 2;  // each thread has its own copy
    if (threadIdx.x == 31) *sum = factor * static_cast<double>(parameters.numbers[29]);
}

TEST_CASE("parameters are passed by value") {
    Parameters parameters{};
    parameters.numbers[29] = 5;
    double sum = 0;
    launch(sum_parameters, 1, 32, 0, nullptr, parameters, 3, &sum);
    CHECK(sum == 30);
    CHECK(parameters.numbers[29] == 5);
}

// ---- barriers and shared memory ----

// kWithout: the barrier that is dropped.
template <int kWithout>
__global__ void sum_in_shared_memory(const float* values, float* sums) {
    float* const partial = shared<float>();
    partial[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (kWithout != 1) __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

template <int kWithout = 0>
bool sums_are_right() {
    std::vector<float> values(5 * 256), sums(5), expected(5);
    for (size_t k = 0; k < values.size(); k++) {
        values[k] = static_cast<float>(k * 7 % 11);
        expected[k / 256] += values[k];
    }
    launch(sum_in_shared_memory<kWithout>, 5, 256, 256 * sizeof(float), nullptr, values.data(), sums.data());
    return sums == expected;
}

TEST_CASE("a reduction in shared memory") {
    for_each_setting([] { CHECK(sums_are_right()); });
}

__global__ void read_before_writing(float* found) {
    found[blockIdx.x * blockDim.x + threadIdx.x] = shared<float>()[threadIdx.x];
    shared<float>()[threadIdx.x] = 1;
}

TEST_CASE("shared memory is nan at first in each block") {
    std::vector<float> found(4 * 33);
    launch(read_before_writing, 4, 33, 33 * sizeof(float), nullptr, found.data());
    CHECK(std::all_of(found.begin(), found.end(), [](float value) { return std::isnan(value); }));
}

__global__ void rotate_often(unsigned* result) {
    unsigned* const cells = shared<unsigned>();
    cells[threadIdx.x] = threadIdx.x;
    for (unsigned k = 0; k < 6; k++) {
        __syncthreads();
        const unsigned next = cells[(threadIdx.x + 1) % blockDim.x];
        __syncthreads();
        cells[threadIdx.x] = next;
    }
    result[threadIdx.x] = cells[threadIdx.x];
}

TEST_CASE("blocks of every size") {
    for (const unsigned threads : {1u, 31u, 32u, 33u, 64u, 65u, 500u, 1023u, 1024u}) {
        for_each_setting([&] {
            std::vector<unsigned> result(threads);
            launch(rotate_often, 1, threads, threads * sizeof(unsigned), nullptr, result.data());
            for (unsigned k = 0; k < threads; k++) CHECK(result[k] == (k + 6) % threads);
        });
    }
}

TEST_CASE("launches of several host threads take turns") {
    std::vector<std::thread> callers;
    std::vector<int> right(3);
    for (size_t k = 0; k < right.size(); k++) {
        callers.emplace_back([&, k] {
            for (int repeat = 0; repeat < 5; repeat++) right[k] += sums_are_right();
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(right == std::vector<int>(3, 5));
}

// ---- warps ----

struct Shuffled {
    int from, exclusive, down, up;
    double wide;
};

__global__ void shuffle_lanes(int operand, int width, Shuffled* result) {
    const int lane = static_cast<int>(threadIdx.x) % warpSize;
    Shuffled& mine = result[threadIdx.x];
    mine.from = __shfl_sync(0xffffffff, lane, operand, width);
    mine.exclusive = __shfl_xor_sync(0xffffffff, lane, operand, width);
    mine.down = __shfl_down_sync(0xffffffff, lane, operand, width);
    mine.up = __shfl_up_sync(0xffffffff, lane, operand, width);
    mine.wide = __shfl_xor_sync(0xffffffff, lane + 0.1, operand);
}

TEST_CASE("shuffles follow the manual") {
    for_each_setting([] {
        for (const int width : {1, 2, 8, 32}) {
            for (const int operand : {0, 1, 3, 7, 16, 31}) {
                std::vector<Shuffled> result(64);
                launch(shuffle_lanes, 1, 64, 0, nullptr, operand, width, result.data());
                for (int k = 0; k < 64; k++) {
                    const int lane = k % 32, part = lane / width;
                    const Shuffled& r = result[static_cast<size_t>(k)];
                    CHECK(r.from == part * width + operand % width);
                    CHECK(r.exclusive == ((lane ^ operand) / width <= part ? lane ^ operand : lane));
                    CHECK(r.down == ((lane + operand) / width == part ? lane + operand : lane));
                    CHECK(r.up == (lane >= operand && (lane - operand) / width == part ? lane - operand : lane));
                    CHECK(r.wide == (lane ^ operand) + 0.1);
                }
            }
        }
    });
}

// Two halves of a warp take different branches. Nobody waits for lanes that have ended or do not exist.
__global__ void shuffle_in_halves(int* result) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane == 30) return;
    if (lane < 16) {
        result[lane] = __shfl_xor_sync(0x0000ffff, lane, 1);
    } else {
        for (int k = 0; k < 3; k++) result[lane] = __shfl_down_sync(0xffff0000, lane, 1);
    }
}

TEST_CASE("a mask names the lanes that take part") {
    for_each_setting([] {
        std::vector<int> result(40, -7);
        launch(shuffle_in_halves, 1, 32, 0, nullptr, result.data());
        for (int lane = 0; lane < 16; lane++) CHECK(result[static_cast<size_t>(lane)] == (lane ^ 1));
        for (int lane = 16; lane < 29; lane++) CHECK(result[static_cast<size_t>(lane)] == lane + 1);
        CHECK(result[29] == -1);  // of a lane that has ended: all bits set
        CHECK(result[30] == -7);
        CHECK(result[31] == 31);
    });
}

template <bool kSynced>
__global__ void pass_on_in_a_warp(unsigned* result) {
    unsigned* const cells = shared<unsigned>();
    cells[threadIdx.x] = threadIdx.x;
    if (kSynced) __syncwarp();
    result[threadIdx.x] = cells[threadIdx.x ^ 1];
}

TEST_CASE("a warp passes values through shared memory") {
    for_each_setting([] {
        std::vector<unsigned> result(70);
        launch(pass_on_in_a_warp<true>, 1, 70, 70 * sizeof(unsigned), nullptr, result.data());
        for (unsigned k = 0; k < 70; k++) CHECK(result[k] == (k ^ 1));
    });
}

// ---- accesses and copies ----

__global__ void load_and_store(const float4* from, float4* to) { __stcs(to + threadIdx.x, __ldg(from + threadIdx.x)); }

TEST_CASE("vectors are loaded and stored") {
    std::vector<float4> from(40), to(40);
    for (size_t k = 0; k < from.size(); k++) from[k] = make_float4(static_cast<float>(k), 1, 2, 3);
    launch(load_and_store, 1, 40, 0, nullptr, from.data(), to.data());
    for (size_t k = 0; k < from.size(); k++) {
        CHECK(to[k].x == static_cast<float>(k));
        CHECK(to[k].w == 3);
    }
}

__global__ void load_four_matrices(bool transposed, unsigned* result) {
    uint16_t* const elements = shared<uint16_t>();  // [matrix][row][column]
    for (unsigned k = 0; k < 8; k++) elements[8 * threadIdx.x + k] = static_cast<uint16_t>(8 * threadIdx.x + k);
    __syncwarp();
    uint32_t words[4];
    load_matrices(transposed, elements + 8 * threadIdx.x, words, Place::here());
    for (unsigned m = 0; m < 4; m++) result[4 * threadIdx.x + m] = words[m];
}

TEST_CASE("a warp loads matrices, transposed or not") {
    for_each_setting([] {
        for (const bool transposed : {false, true}) {
            std::vector<unsigned> result(128);
            launch(load_four_matrices, 1, 32, 256 * sizeof(uint16_t), nullptr, transposed, result.data());
            for (unsigned lane = 0; lane < 32; lane++) {
                for (unsigned m = 0; m < 4; m++) {
                    const unsigned first = 64 * m + (transposed ? lane % 4 * 16 + lane / 4 : lane * 2);
                    CHECK(result[4 * lane + m] == (first | (first + (transposed ? 8 : 1)) << 16));
                }
            }
        }
    });
}

// Two tiles in turn: the next is on its way while the one before is summed. kGroupsLeft = 1 is right.
template <int kGroupsLeft, bool kBarrier = true>
__global__ void sum_tiles(const float* values, int tiles, float* sums) {
    float* const buffers[] = {shared<float>(), shared<float>() + 4 * blockDim.x};
    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            copy_async(buffers[tile % 2] + 4 * threadIdx.x,
                       values + 4 * (tile * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)), 16, 12);
        }
        commit_copies();
    };
    float sum = 0;
    fetch(0);
    for (int tile = 0; tile < tiles; tile++) {
        fetch(tile + 1);
        wait_for_copies(kGroupsLeft);
        if (kBarrier) __syncthreads();
        const float* const column = buffers[tile % 2] + 4 * ((threadIdx.x + 1) % blockDim.x);
        for (int k = 0; k < 4; k++) sum += column[k];
        __syncthreads();
    }
    sums[threadIdx.x] = sum;
}

template <int kGroupsLeft, bool kBarrier = true>
bool tiles_are_right() {
    const unsigned threads = 48;
    const int tiles = 5;
    std::vector<float4> values(threads * tiles);
    std::vector<float> sums(threads), expected(threads);
    for (unsigned k = 0; k < values.size(); k++) {
        values[k] = make_float4(static_cast<float>(k), 1, 2, kNaN);  // the fourth is not read, but 0
        expected[(k % threads + threads - 1) % threads] += values[k].x + 3;
    }
    launch(sum_tiles<kGroupsLeft, kBarrier>, 1, threads, 2 * 16 * threads, nullptr, &values[0].x, tiles, sums.data());
    return sums == expected;
}

TEST_CASE("copies arrive when they are waited for") {
    for_each_setting([] { CHECK((tiles_are_right<1>())); });
}

// Boxes in turn, into two buffers: the next is on its way while threads read the one before.
struct BoxMistakes {
    bool waits = true, right_phase = true, right_bytes = true, barrier = true;
};
constexpr BoxMistakes kNoMistake;
constexpr unsigned kElementsOfBox = 16;
constexpr int kBoxes = 6, kFirsts[kBoxes][TensorMap::kAxes] = {{0, 0, 0, 0}, {-4, 1, 0, 1}, {4, -1, -1, 0},
                                                               {4, 2, 1, 1}, {4, 0, 0, -1}, {8, 0, 0, 0}};

template <const BoxMistakes& of>
__global__ void read_boxes(const TensorMap map, float* result) {
    char* const memory = static_cast<char*>(shared_memory());
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(memory + 2 * 128);
    const auto fetch = [&](int box) {
        if (threadIdx.x != 0 || box >= kBoxes) return;
        expect_bytes(barriers + box % 2, kElementsOfBox * sizeof(float) - (of.right_bytes ? 0 : 4));
        copy_box(memory + box % 2 * 128, map, kFirsts[box], barriers + box % 2);
    };
    if (threadIdx.x == 0) {
        begin_barrier(barriers);
        begin_barrier(barriers + 1);
    }
    __syncthreads();
    fetch(0);
    for (int box = 0; box < kBoxes; box++) {
        fetch(box + 1);
        if (of.waits) wait_for_phase(barriers + box % 2, of.right_phase ? box / 2 % 2 : 1 - box / 2 % 2);
        result[box * static_cast<int>(kElementsOfBox) + static_cast<int>(threadIdx.x)] = reinterpret_cast<const float*>(
            memory + box % 2 * 128)[threadIdx.x];
        if (of.barrier) __syncthreads();
    }
}

template <const BoxMistakes& of = kNoMistake>
bool boxes_are_right() {
    constexpr int kSizes[] = {8, 3, 2, 2}, kBox[] = {4, 2, 2, 1};
    alignas(16) static float values[8 * 3 * 2 * 2];
    for (size_t k = 0; k < std::size(values); k++) values[k] = static_cast<float>(k + 1);
    TensorMap map{reinterpret_cast<const char*>(values), {8, 3, 2, 2}, {4, 4 * 8, 4 * 24, 4 * 48}, {4, 2, 2, 1}};
    std::vector<float> result(kBoxes * kElementsOfBox, kNaN), expected;
    for (const auto& first : kFirsts) {
        for (int k = 0; k < static_cast<int>(kElementsOfBox); k++) {
            int rest = k, offset = 0, size = 1;
            bool exists = true;
            for (int axis = 0; axis < TensorMap::kAxes; axis++) {
                const int index = first[axis] + rest % kBox[axis];
                rest /= kBox[axis];
                exists = exists && index >= 0 && index < kSizes[axis];
                offset += index * size;
                size *= kSizes[axis];
            }
            expected.push_back(exists ? values[offset] : 0);
        }
    }
    launch(read_boxes<of>, 1, kElementsOfBox, 2 * 128 + 16, nullptr, map, result.data());
    return result == expected;
}

TEST_CASE("boxes arrive when they are waited for") {
    for_each_setting([] { CHECK(boxes_are_right()); });
}

// ---- tensor cores ----

// The fragments as the PTX manual defines them, element by element: row and column of element i of a lane.
struct Fragment {
    int row, column;
};

Fragment a_fragment(int k, int lane, int i) {
    const int group = lane >> 2, thread = lane % 4;
    if (k == 8) return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
    return {i < 2 || (i >= 4 && i < 6) ? group : group + 8, i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8};
}

Fragment b_fragment(int k, int lane, int i) {
    const int group = lane >> 2, thread = lane % 4;
    if (k == 8) return {thread * 2 + i, group};
    return {i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8, group};
}

Fragment c_fragment(int lane, int i) {
    const int group = lane >> 2, thread = lane % 4;
    return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}

template <int k>
__global__ void multiply_matrices(MmaType type, const uint16_t* a, const uint16_t* b, float* sums) {
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t a_registers[k / 4] = {}, b_registers[k / 8] = {};
    float c[4];
    for (int i = 0; i < k / 2; i++) {
        const Fragment at = a_fragment(k, lane, i);
        a_registers[i / 2] |= uint32_t{a[at.row * k + at.column]} << 16 * (i % 2);
    }
    for (int i = 0; i < k / 4; i++) {
        const Fragment at = b_fragment(k, lane, i);
        b_registers[i / 2] |= uint32_t{b[at.row * 8 + at.column]} << 16 * (i % 2);
    }
    for (int i = 0; i < 4; i++) c[i] = sums[c_fragment(lane, i).row * 8 + c_fragment(lane, i).column];
    if constexpr (k == 8) {
        mma_m16n8k8(type, c, a_registers, b_registers);
    } else {
        mma_m16n8k16(type, c, a_registers, b_registers);
    }
    for (int i = 0; i < 4; i++) sums[c_fragment(lane, i).row * 8 + c_fragment(lane, i).column] = c[i];
}

// An integer from -8 to 8 in either type.
uint16_t half_of(int value, MmaType type) {
    if (value == 0) return 0;
    const int exponent = std::ilogb(value), fraction_bits = type == MmaType::kFloat16 ? 10 : 7;
    const int bias = type == MmaType::kFloat16 ? 15 : 127;
    const int fraction = (std::abs(value) << fraction_bits >> exponent) - (1 << fraction_bits);
    return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (exponent + bias) << fraction_bits | fraction);
}

template <int k>
void check_product(MmaType type) {
    std::mt19937 random(static_cast<unsigned>(k));
    const auto draw = [&] { return static_cast<int>(random() % 17) - 8; };
    int a[16][k], b[k][8];
    std::vector<uint16_t> a_bits, b_bits;
    for (auto& row : a) {
        for (int& element : row) a_bits.push_back(half_of(element = draw(), type));
    }
    for (auto& row : b) {
        for (int& element : row) b_bits.push_back(half_of(element = draw(), type));
    }
    std::vector<float> sums(16 * 8), expected(16 * 8);
    for (size_t at = 0; at < sums.size(); at++) {
        expected[at] = sums[at] = static_cast<float>(draw());
        for (int i = 0; i < k; i++) expected[at] += static_cast<float>(a[at / 8][i] * b[i][at % 8]);
    }
    launch(multiply_matrices<k>, 1, 32, 0, nullptr, type, a_bits.data(), b_bits.data(), sums.data());
    CHECK(sums == expected);
}

TEST_CASE("products of matrices follow the manual") {
    for_each_setting([] {
        for (const MmaType type : {MmaType::kFloat16, MmaType::kBFloat16}) {
            check_product<8>(type);
            check_product<16>(type);
        }
    });
}

__global__ void widen_by_mma(MmaType type, uint16_t bits, float* result) {
    const uint32_t one = type == MmaType::kFloat16 ? 0x3c00 : 0x3f80;
    float sums[4] = {};
    mma_m16n8k8(type, sums, {threadIdx.x == 0 ? bits : 0u, 0}, {threadIdx.x == 0 ? one : 0u});
    if (threadIdx.x == 0) *result = sums[0];
}

TEST_CASE("matrices may hold any number") {
    struct Number {
        MmaType type;
        uint16_t bits;
        float value;
    };
    const float infinity = std::numeric_limits<float>::infinity();
    for (const Number& number : {Number{MmaType::kFloat16, 0x0001, 0x1p-24f},
                                 {MmaType::kFloat16, 0x83ff, -0x1.ff8p-15f},
                                 {MmaType::kFloat16, 0x7bff, 65504},
                                 {MmaType::kFloat16, 0xfc00, -infinity},
                                 {MmaType::kBFloat16, 0x0001, 0x1p-133f},
                                 {MmaType::kBFloat16, 0x7f7f, 0x1.fep127f},
                                 {MmaType::kBFloat16, 0x7f80, infinity}}) {
        float result = 0;
        launch(widen_by_mma, 1, 32, 0, nullptr, number.type, number.bits, &result);
        CHECK(result == number.value);
    }
    float result = 0;
    launch(widen_by_mma, 1, 32, 0, nullptr, MmaType::kFloat16, uint16_t{0x7e00}, &result);
    CHECK(std::isnan(result));
}

// ---- mistakes that give wrong results ----

TEST_CASE("a dropped barrier is wrong in some order" * doctest::skip(kUnderTsan)) {
    int wrong = 0;
    for_each_setting([&] { wrong += !sums_are_right<1>(); });
    CHECK(wrong > 0);
}

TEST_CASE("a dropped warp barrier is wrong in every order" * doctest::skip(kUnderTsan)) {
    for_each_setting([] {
        std::vector<unsigned> result(64);
        launch(pass_on_in_a_warp<false>, 1, 64, 64 * sizeof(unsigned), nullptr, result.data());
        bool wrong = false;
        for (unsigned k = 0; k < 64; k++) wrong |= result[k] != (k ^ 1);
        CHECK(wrong);
    });
}

TEST_CASE("a copy that is not waited for is stale") {
    for_each_setting([] { CHECK((tiles_are_right<2>()) == !settings().deferred_copies); });
}

TEST_CASE("a copy that other threads need takes a barrier" * doctest::skip(kUnderTsan)) {
    int wrong = 0;
    for_each_setting([&] { wrong += !tiles_are_right<1, false>(); });
    CHECK(wrong > 0);
}

// ---- mistakes that end the process ----

constexpr BoxMistakes kWithoutWait{false}, kWrongPhase{true, false}, kWrongBytes{true, true, false},
    kWithoutBarrier{true, true, true, false};

__global__ void use_no_barrier() { expect_bytes(static_cast<uint64_t*>(shared_memory()), 64); }

__global__ void begin_a_barrier_twice() { begin_barrier(static_cast<uint64_t*>(shared_memory())); }

__global__ void copy_a_box(const TensorMap map, int place, int first) {
    char* const memory = static_cast<char*>(shared_memory());
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(memory);
    begin_barrier(barrier);
    copy_box(memory + place, map, {first, 0, 0, 0}, barrier);
}

__global__ void barrier_in_a_branch() {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void barrier_after_an_end() {
    if (threadIdx.x == 5) return;
    __syncthreads();
}

__global__ void shuffle_in_a_branch() {
    if (threadIdx.x < 16) {
        __shfl_sync(0xffffffff, 1, 0);
    } else {
        __shfl_sync(0xffffffff, 1, 0);
    }
}

__global__ void shuffle_without_itself() { __shfl_sync(0x0000ffff, 1, 0); }

__global__ void wait_for_each_other() {
    if (threadIdx.x >= 32 && threadIdx.x < 40) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

__global__ void mma_of_half_a_warp() {
    float sums[4] = {};
    if (threadIdx.x < 16) mma_m16n8k8(MmaType::kFloat16, sums, {0, 0}, {0});
}

__global__ void do_nothing() {}

__global__ void load_beside(const float* values) { __ldg(reinterpret_cast<const float2*>(values + 1)); }

__global__ void copy_beside(const float* values) { copy_async(shared_memory(), values + 1, 8, 0); }

__global__ void copy_beyond(const float* values) { copy_async(shared<float>() + 2 * threadIdx.x, values, 8, 8); }

__global__ void write_beyond() { shared<float>()[threadIdx.x] = 1; }

__global__ void write_before() { shared<float>()[static_cast<int>(threadIdx.x) - 1] = 1; }

__global__ void read_beyond(float* result) { *result = shared<float>()[threadIdx.x + 1]; }

__global__ void read_beyond_the_array(const float* values, float* result) { *result = values[threadIdx.x]; }

__global__ void write_the_same(int* result) { *result = 1; }

__global__ void copy_over_others(const float* values, float* result) {
    copy_async(shared<float>(), values, 4, 4);
    commit_copies();
    wait_for_copies(0);
    *result = *shared<float>();
}

struct Mistake {
    const char* name;
    enum { kAlways, kAsan, kTsan } seen;
    void (*run)();
    const char* report;  // a part of it
};

alignas(16) float numbers[64];
const TensorMap kMapOfNumbers{reinterpret_cast<const char*>(numbers), {4, 1, 1, 1}, {4, 16, 16, 16}, {4, 1, 1, 1}};
std::vector<float> three_numbers(3);

const Mistake kMistakes[] = {
    {"barrier_in_a_branch", Mistake::kAlways, [] { launch(barrier_in_a_branch, 1, 32, 0, nullptr); },
     "divergent barrier: thread (16, 0, 0) waits at "},
    {"barrier_after_an_end", Mistake::kAlways, [] { launch(barrier_after_an_end, 1, 32, 0, nullptr); },
     "divergent barrier: thread (5, 0, 0) has ended, thread (0, 0, 0) waits at "},
    {"shuffle_in_a_branch", Mistake::kAlways, [] { launch(shuffle_in_a_branch, 1, 32, 0, nullptr); },
     "divergent warp: thread (16, 0, 0) is at "},
    {"shuffle_without_itself", Mistake::kAlways, [] { launch(shuffle_without_itself, 1, 32, 0, nullptr); },
     "is not in the mask 0000ffff of its own collective"},
    {"wait_for_each_other", Mistake::kAlways, [] { launch(wait_for_each_other, 1, 64, 0, nullptr); }, "deadlock"},
    {"mma_of_half_a_warp", Mistake::kAlways, [] { launch(mma_of_half_a_warp, 1, 32, 0, nullptr); },
     "needs all lanes of a warp"},
    {"too_many_threads", Mistake::kAlways, [] { launch(do_nothing, 1, dim3(32, 33), 0, nullptr); },
     "of at most 1024 threads; got (32, 33, 1)"},
    {"too_many_rows_of_blocks", Mistake::kAlways, [] { launch(do_nothing, dim3(1, 65536), 32, 0, nullptr); },
     "a grid must be from (1, 1, 1) to (2^31-1, 65535, 65535); got (1, 65536, 1)"},
    {"no_blocks", Mistake::kAlways, [] { launch(do_nothing, 0, 32, 0, nullptr); }, "got (0, 1, 1)"},
    {"too_much_shared_memory", Mistake::kAlways, [] { launch(do_nothing, 1, 32, 227 * 1024 + 1, nullptr); },
     "at most 232448 bytes of shared memory; got 232449"},
    {"load_beside", Mistake::kAlways, [] { launch(load_beside, 1, 1, 0, nullptr, numbers); },
     "which is not aligned to 8 bytes"},
    {"copy_beside", Mistake::kAlways, [] { launch(copy_beside, 1, 1, 8, nullptr, numbers); },
     "which is not aligned to 8 bytes"},
    {"copy_beyond", Mistake::kAlways, [] { launch(copy_beyond, 1, 5, 36, nullptr, numbers); },
     "thread (4, 0, 0) copies beyond the 36 bytes"},
    {"boxes_of_other_sizes", Mistake::kAlways, [] { boxes_are_right<kWrongBytes>(); }, "for copies"},
    {"boxes_without_a_wait", Mistake::kAlways,
     [] {
    settings().deferred_copies = true;
    boxes_are_right<kWithoutWait>();
}, "has two arrivals"},
    {"boxes_of_the_wrong_phase", Mistake::kAlways,
     [] {
    settings().deferred_copies = true;
    boxes_are_right<kWrongPhase>();
}, "has two arrivals"},
    {"use_no_barrier", Mistake::kAlways, [] { launch(use_no_barrier, 1, 1, 8, nullptr); }, "that has not begun"},
    {"begin_a_barrier_twice", Mistake::kAlways, [] { launch(begin_a_barrier_twice, 1, 2, 8, nullptr); },
     "begins twice"},
    {"copy_a_box_beside", Mistake::kAlways, [] { launch(copy_a_box, 1, 1, 256, nullptr, kMapOfNumbers, 16, 0); },
     "which is not aligned to 128 bytes"},
    {"copy_a_box_between_vectors", Mistake::kAlways,
     [] { launch(copy_a_box, 1, 1, 256, nullptr, kMapOfNumbers, 128, -2); },
     "begins at element -2 of a row, no multiple of 16 bytes"},
    {"boxes_ahead_of_threads", Mistake::kAlways, [] { boxes_are_right<kWithoutBarrier>(); }, "deadlock"},
    {"write_beyond", Mistake::kAlways, [] { launch(write_beyond, 1, 5, 16, nullptr); },
     kUnderAsan ? "use-after-poison" : "wrote beyond the 16 bytes of shared memory"},
    {"write_before", Mistake::kAlways, [] { launch(write_before, 1, 5, 20, nullptr); },
     kUnderAsan ? "use-after-poison" : "wrote beyond the 20 bytes of shared memory"},
    {"read_beyond", Mistake::kAsan, [] { launch(read_beyond, 1, 5, 20, nullptr, numbers); }, "use-after-poison"},
    {"read_beyond_the_array", Mistake::kAsan,
     [] { launch(read_beyond_the_array, 1, 4, 0, nullptr, three_numbers.data(), numbers); }, "heap-buffer-overflow"},
    {"a_dropped_barrier_races", Mistake::kTsan, [] { sums_are_right<1>(); }, "data race"},
    {"a_dropped_warp_barrier_races", Mistake::kTsan,
     [] {
    launch(pass_on_in_a_warp<false>, 1, 64, 64 * sizeof(unsigned), nullptr, reinterpret_cast<unsigned*>(numbers));
}, "data race"},
    {"a_copy_without_a_barrier_races", Mistake::kTsan, [] { tiles_are_right<1, false>(); }, "data race"},
    {"copies_over_others_race", Mistake::kTsan,
     [] { launch(copy_over_others, 1, 2, 4, nullptr, numbers, numbers + 4); }, "data race"},
    {"threads_of_two_blocks_race", Mistake::kTsan,
     [] { launch(write_the_same, 2, 1, 0, nullptr, reinterpret_cast<int*>(numbers)); }, "data race"},
};

// Make a mistake in a child process, which should abort. Return what it prints.
std::string report_of(const Mistake& mistake) {
    int ends[2];
    if (pipe(ends) != 0) return "no pipe";
    std::fflush(nullptr);  // or the child would print it, too
    const pid_t child = fork();
    if (child == 0) {
        std::signal(SIGABRT, SIG_DFL);  // doctest would report it, too
        dup2(ends[1], 2);
        close(ends[0]);
        // TSan watches no child of a process that has had fibres, unless it begins anew.
        if (kUnderTsan) execl("/proc/self/exe", "test_emulation", mistake.name, nullptr);
        mistake.run();
        _exit(0);
    }
    close(ends[1]);
    std::string report;
    char buffer[4096];
    for (ssize_t bytes; (bytes = read(ends[0], buffer, sizeof buffer)) > 0;)
        report.append(buffer, static_cast<size_t>(bytes));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "it went unnoticed" : report;
}

TEST_CASE("mistakes are reported") {
    for (const Mistake& mistake : kMistakes) {
        if ((mistake.seen == Mistake::kAsan && !kUnderAsan) || (mistake.seen == Mistake::kTsan && !kUnderTsan))
            continue;
        const std::string report = report_of(mistake);
        CHECK(doctest::String(report.c_str()) == doctest::Contains(mistake.report));
    }
}

}  // namespace

int main(int count, char** arguments) {
    for (const Mistake& mistake : kMistakes) {
        if (count > 1 && std::strcmp(mistake.name, arguments[1]) == 0) return mistake.run(), 0;
    }
    return doctest::Context(count, arguments).run();
}
