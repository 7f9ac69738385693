// SPDX-License-Identifier: Apache-2.0
// Each allocation of a call fails in turn. The call then returns CARAFEPP_MEMORY_ERROR or succeeds without that memory,
// and the process goes on. A forked child makes each attempt: it has no scratch and no threads yet.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "carafepp/carafepp.h"

namespace {

std::atomic<int64_t> allocations{0};
std::atomic<int64_t> first_to_fail{INT64_MAX}, last_to_fail{INT64_MAX};

void* allocate(size_t bytes, size_t alignment) {
    const int64_t number = allocations++;
    if (number >= first_to_fail && number <= last_to_fail) throw std::bad_alloc();
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes ? bytes : 1)) {
        throw std::bad_alloc();
    }
    return memory;
}

}  // namespace

void* operator new(size_t bytes) { return allocate(bytes, sizeof(void*)); }
void* operator new[](size_t bytes) { return allocate(bytes, sizeof(void*)); }
void* operator new(size_t bytes, std::align_val_t alignment) { return allocate(bytes, static_cast<size_t>(alignment)); }
// Inlined, gcc would compare `free` with `operator new`, and warn.
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

constexpr int64_t N = 2, C = 32, H = 24, W = 24, K = 3, UP = 2;

struct Array {
    std::vector<float> values;
    carafepp_tensor tensor{};

    Array(int64_t c, int64_t h, int64_t w, float value) : values(static_cast<size_t>(N * c * h * w), value) {
        tensor = {values.data(), CARAFEPP_FLOAT32, CARAFEPP_CPU, 0, 4, {N, c, h, w}, {c * h * w, h * w, w, 1}};
    }
};

struct Problem {
    Array features{C, H, W, 1}, masks{K * K, UP * H, UP * W, 1}, logits{K * K * UP * UP, H, W, 0};
    Array output{C, UP * H, UP * W, 0}, grad_features{C, H, W, 0}, grad_masks{K * K, UP * H, UP * W, 0};
    Array grad_logits{K * K * UP * UP, H, W, 0};
    carafepp_params params{};

    Problem() {
        params.struct_size = sizeof params;
        params.up = UP;
        params.down = 1;
        params.kernel_size = K;
        params.groups = 1;
    }

    carafepp_status run(int function) {
        const carafepp_tensor &x = features.tensor, &m = masks.tensor, &l = logits.tensor, &y = output.tensor;
        switch (function) {
            case 0: return carafepp_reassemble(&params, &x, &m, &y, nullptr);
            case 1:
                return carafepp_reassemble_backward(&params, &y, &x, &m, &grad_features.tensor, &grad_masks.tensor,
                                                    nullptr);
            case 2: return carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr);
            case 3:
                return carafepp_reassemble_with_logits_backward(&params, &y, &x, &l, &grad_features.tensor,
                                                                &grad_logits.tensor, nullptr);
            case 4: return carafepp_normalize_masks(&params, &l, &m, nullptr);
            default: return carafepp_normalize_masks_backward(&params, &m, &l, &grad_logits.tensor, nullptr);
        }
    }
};

// Run a call in a child process. Return its status, or -1 if the child crashes, or -2 if a second call fails there.
// `count` becomes the number of its allocations.
int attempt(Problem& problem, int function, int64_t first, int64_t last, int64_t& count) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    const pid_t child = fork();
    if (child == 0) {
        allocations = 0;
        first_to_fail = first;
        last_to_fail = last;
        const carafepp_status status = problem.run(function);
        const int64_t made = allocations;
        first_to_fail = INT64_MAX;
        const bool told = status != CARAFEPP_MEMORY_ERROR || std::strstr(carafepp_last_error(), "out of memory");
        sigset_t blocked;
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
        const bool sane = told && !sigismember(&blocked, SIGINT) && problem.run(function) == CARAFEPP_OK;
        const bool written = write(ends[1], &made, sizeof made) == sizeof made;
        _exit(sane && written ? status : 100);
    }
    close(ends[1]);
    if (read(ends[0], &count, sizeof count) != sizeof count) count = -1;
    close(ends[0]);
    int ended = 0;
    waitpid(child, &ended, 0);
    if (!WIFEXITED(ended)) return -1;
    return WEXITSTATUS(ended) == 100 ? -2 : WEXITSTATUS(ended);
}

void every_allocation(int threads) {
    carafepp_set_num_threads(threads);
    Problem problem;
    for (int function = 0; function < 6; function++) {
        for (const bool all_that_follow : {false, true}) {
            int64_t count = 0, errors = 0;
            CAPTURE(function);
            CAPTURE(all_that_follow);
            for (int64_t k = 0; k <= count; k++) {
                CAPTURE(k);
                const int status = attempt(problem, function, k, all_that_follow ? INT64_MAX : k, count);
                CHECK((status == CARAFEPP_OK || status == CARAFEPP_MEMORY_ERROR));
                REQUIRE(count >= 0);
                REQUIRE(count < 1000);
                errors += status == CARAFEPP_MEMORY_ERROR;
            }
            if (function < 4) CHECK(errors > 0);  // else nothing was tested
        }
    }
    carafepp_set_num_threads(0);
}

TEST_CASE("on one thread") { every_allocation(1); }
TEST_CASE("on three threads") { every_allocation(3); }

}  // namespace
