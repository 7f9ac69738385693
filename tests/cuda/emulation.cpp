// SPDX-License-Identifier: Apache-2.0
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "boxes.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// ThreadSanitizer must not see the emulator's own accesses, which pass between fibres without a barrier.
#if defined(__SANITIZE_THREAD__)
#error "compile this file with -fno-sanitize=thread"
#endif

// Functions of the sanitizers, NULL if the program is linked without them.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* begin, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* clock);
__attribute__((weak)) void __tsan_release(void* clock);
}

// trace.cpp watches what has no load or store of the kernel's own; `code` is where the kernel calls.
extern "C" {
__attribute__((weak)) void carafepp_trace_copy(const void* shared, const void* global, size_t bytes, size_t bytes_read,
                                               const void* code);
__attribute__((weak)) void carafepp_trace_row(const void* global, size_t bytes_read, size_t bytes);
__attribute__((weak)) void carafepp_trace_load(const void* shared, size_t bytes, const void* code);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace carafepp::emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;  // in a block
constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 4096;
constexpr unsigned char kPoison = 0xff;      // NaN in every type
constexpr unsigned char kNotArrived = 0x5a;  // finite in every type: kernels that repair NaN do not hide it

bool under_asan() { return __asan_poison_memory_region != nullptr; }
bool under_tsan() { return __tsan_create_fiber != nullptr; }

char* map(size_t bytes) {
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                              0);
    if (memory == MAP_FAILED) {
        std::perror("carafepp emulation: mmap");
        std::abort();
    }
    return static_cast<char*>(memory);
}

// ---- fibres ----

// Code with a stack of its own. The host, which starts the fibres and gets back control, is one too.
struct Fibre {
    const void* stack = nullptr;  // its lowest address, of the host known once a fibre has begun
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // ASan's
    void* tsan_fibre = nullptr;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

#if defined(__x86_64__)

// Saves what a function must preserve on the old stack, takes it from the new one and returns there.
extern "C" void carafepp_switch_stack(void** old_stack_pointer, void* new_stack_pointer);
asm(R"(
    .text
    .type carafepp_switch_stack, @function
carafepp_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size carafepp_switch_stack, . - carafepp_switch_stack
)");

void prepare(Fibre& fibre, void (*entry)(), size_t stack_bytes) {
    const char* const top = static_cast<const char*>(fibre.stack) + stack_bytes;
    void** const registers = reinterpret_cast<void**>(const_cast<char*>(top)) - 8;
    std::fill_n(registers, 8, nullptr);
    registers[6] = reinterpret_cast<void*>(entry);  // above it the address that entry would return to
    fibre.stack_pointer = registers;
}

void switch_stack(Fibre& from, Fibre& to) { carafepp_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

void prepare(Fibre& fibre, void (*entry)(), size_t stack_bytes) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = const_cast<void*>(fibre.stack);
    fibre.context.uc_stack.ss_size = stack_bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, entry, 0);
}

void switch_stack(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }

#endif

void switch_fibre(Fibre& from, Fibre& to, bool for_good) {
    constexpr unsigned kWithoutOrder = 1;  // the switch itself does not order memory
    if (under_tsan()) __tsan_switch_to_fiber(to.tsan_fibre, kWithoutOrder);
    if (under_asan()) __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
    switch_stack(from, to);
    if (under_asan()) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// ---- the state of a running kernel ----

enum class State { kReady, kAtBarrier, kInCollective, kAtPhase, kEnded };
enum class Collective { kSync, kShuffle, kMma };

struct Copy {
    void* shared;
    const void* global;
    size_t bytes, bytes_read;
    int group;
};

// A box on its way. Its rows are adjacent in shared memory.
struct Box {
    char* shared;
    TensorMap map;
    int first[TensorMap::kAxes];

    size_t row_bytes() const { return map.box[0] * static_cast<size_t>(map.strides[0]); }
    size_t bytes() const { return row_bytes() * map.box[1] * map.box[2] * map.box[3]; }
};

// A barrier in shared memory, for copies of boxes.
struct PhaseBarrier {
    const uint64_t* address;
    bool phase = false, arrived = false;  // the one that is not complete, and of its arrival
    int64_t bytes_expected = 0;           // more than have come
    std::vector<Box> boxes{};             // that are deferred
};

// The part of a collective that one lane brings, and gets.
struct Operands {
    uint64_t bits;
    unsigned source;
    MmaType type;
    int k;
    uint32_t a[4], b[2];
    float sums[4];
};

struct Thread {
    Fibre fibre;
    unsigned number = 0;  // in its block
    uint3 index{};
    State state = State::kEnded;
    Place place{};  // where it waits
    Collective collective{};
    unsigned mask = 0;
    Operands operands{};
    std::vector<Copy> copies;
    int group = 0;            // of copies, that is not committed
    bool has_copied = false;  // in this group
};

struct Warp {
    unsigned alive = 0;    // lanes that have not ended
    unsigned waiting = 0;  // in a collective
    unsigned phases = 0;   // for the clocks
};

// Order the accesses of threads, for TSan. A barrier has two clocks that alternate. A thread that is ahead at the next
// barrier must not be ordered before one that still leaves this one. Parts of a warp, each known by its first lane, may
// wait apart.
struct Clocks {
    char block[2];
    char warps[kMaxThreads / kWarpSize][kWarpSize][2];
};

// Shared memory between two margins, and clocks. Under TSan each block has new ones, or TSan sees races of a block with
// the one before.
struct BlockMemory {
    static constexpr size_t kMargin = 1024 + 128;  // so that memory is aligned to 128 bytes and not by chance to more
    static constexpr size_t kBytes = kPageBytes + kMargin + kMostSharedBytes + kMargin;

    char* base = nullptr;

    Clocks& clocks() const { return *reinterpret_cast<Clocks*>(base); }
    char* margin() const { return base + kPageBytes; }
    char* shared() const { return margin() + kMargin; }

    void begin_launch(size_t bytes) {
        if (base == nullptr) base = map(kBytes);
        if (under_asan()) __asan_unpoison_memory_region(base, kBytes);
        std::memset(margin(), kPoison, kMargin + bytes + kMargin);
        if (under_asan()) {
            __asan_poison_memory_region(margin(), kMargin);
            __asan_poison_memory_region(shared() + bytes, kMostSharedBytes - bytes + kMargin);
        }
    }

    void begin_block(size_t bytes) {
        if (under_tsan()) {
            munmap(base, kBytes);
            base = map(kBytes);
            std::memset(margin(), kPoison, kMargin + bytes + kMargin);
        }
        std::memset(shared(), kPoison, bytes);
    }

    bool margins_are_untouched(size_t bytes) const {
        const auto untouched = [](const char* begin) {
            return *begin == static_cast<char>(kPoison) && std::memcmp(begin, begin + 1, kMargin - 1) == 0;
        };
        return under_asan() || (untouched(margin()) && untouched(shared() + bytes));
    }
};

// One kernel at a time.
struct Machine {
    Fibre host;
    std::vector<Thread> threads;  // under TSan two sets, which blocks use in turn: two threads of one number race, too
    Thread* block = nullptr;      // the set of this block
    Thread* current = nullptr;
    Warp warps[kMaxThreads / kWarpSize];
    BlockMemory memory;
    size_t shared_bytes = 0;
    unsigned count = 0, ended = 0, at_barrier = 0;  // threads of this block
    const Thread* first_at_barrier = nullptr;
    bool barrier_phase = false;
    std::vector<PhaseBarrier> phase_barriers;
    void (*call)(const void*) = nullptr;
    const void* kernel = nullptr;
    Settings settings;
    uint64_t random = 0;
    uint64_t threads_run = 0, mmas_run = 0, bytes_copied = 0, groups_copied = 0;

    // Threads have ranks: of those that are ready, the one of the lowest rank runs.
    unsigned rank_of[kMaxThreads], thread_at[kMaxThreads];
    uint64_t ready[kMaxThreads / 64];

    void make_ready(Thread& thread) {
        thread.state = State::kReady;
        ready[rank_of[thread.number] / 64] |= uint64_t{1} << rank_of[thread.number] % 64;
    }
    void wait(Thread& thread, State state, Place place) {
        thread.state = state;
        thread.place = place;
        ready[rank_of[thread.number] / 64] &= ~(uint64_t{1} << rank_of[thread.number] % 64);
    }
    Thread* first_ready() {
        for (unsigned word = 0; word * 64 < count; word++) {
            if (ready[word] != 0)
                return &block[thread_at[word * 64 + static_cast<unsigned>(__builtin_ctzll(ready[word]))]];
        }
        return nullptr;
    }
};

Machine machine;
Settings next_settings;
char start_of_block, end_of_launch;  // clocks: blocks are not ordered among themselves

uint64_t next_random() {  // xorshift64*
    machine.random ^= machine.random >> 12;
    machine.random ^= machine.random << 25;
    machine.random ^= machine.random >> 27;
    return (machine.random * 0x2545f4914f6cdd1d) >> 32;
}

// ---- reports ----

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    std::fflush(stdout);
    std::fputs("carafepp emulation: ", stderr);
    std::va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n    in block (%u, %u, %u) of (%u, %u, %u)\n", blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x,
                 gridDim.y, gridDim.z);
    std::abort();
}

// For a report, which names two threads at most.
const char* name_of(const Thread& thread) {
    static char names[2][64];
    static int next = 0;
    char* const name = names[next++ % 2];
    std::snprintf(name, sizeof names[0], "thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
    return name;
}

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

[[noreturn]] void report_deadlock() {
    std::fputs("carafepp emulation: no thread can go on:\n", stderr);
    int shown = 0;
    for (const Thread* thread = machine.block; thread < machine.block + machine.count && shown < 8; thread++) {
        if (thread->state == State::kEnded) continue;
        std::fprintf(stderr, "    %s waits at %s:%d for %s\n", name_of(*thread), thread->place.file, thread->place.line,
                     thread->state == State::kAtBarrier ? "its block"
                     : thread->state == State::kAtPhase ? "copies"
                                                        : "its warp");
        shown++;
    }
    fail("deadlock");
}

// ---- waiting ----

void suspend() { switch_fibre(machine.current->fibre, machine.host, false); }

void complete_mma(Thread* lanes);

Thread* lanes_of(unsigned warp) { return machine.block + warp * kWarpSize; }

// Ends the wait of the lanes in the collective of `thread`, once all that run have come.
void complete_collective(const Thread& thread) {
    Warp& warp = machine.warps[thread.number / kWarpSize];
    Thread* const lanes = lanes_of(thread.number / kWarpSize);
    const unsigned taking_part = thread.mask & warp.alive;
    if ((warp.waiting & taking_part) != taking_part) return;
    if (thread.collective == Collective::kMma) {
        if (~taking_part != 0) fail("mma at %s:%d needs all lanes of a warp", thread.place.file, thread.place.line);
        complete_mma(lanes);
        machine.mmas_run++;
    } else if (thread.collective == Collective::kShuffle) {
        uint64_t bits[kWarpSize];
        for (unsigned lane = 0; lane < kWarpSize; lane++) {
            bits[lane] = taking_part >> lane & 1 ? lanes[lane].operands.bits : ~uint64_t{0};
        }
        for (unsigned left = taking_part; left != 0; left &= left - 1) {
            Operands& operands = lanes[__builtin_ctz(left)].operands;
            operands.bits = bits[operands.source];
        }
    }
    for (unsigned left = taking_part; left != 0; left &= left - 1) machine.make_ready(lanes[__builtin_ctz(left)]);
    warp.waiting &= ~taking_part;
    warp.phases ^= thread.mask & -thread.mask;
}

void check_collective(const Thread& thread, const Warp& warp, Collective collective, unsigned mask, Place place) {
    const unsigned lane = thread.number % kWarpSize;
    if (!(mask >> lane & 1)) {
        fail("%s at %s:%d is not in the mask %08x of its own collective", name_of(thread), place.file, place.line,
             mask);
    }
    for (unsigned others = mask & warp.waiting; others != 0; others &= others - 1) {
        const Thread& other = lanes_of(thread.number / kWarpSize)[__builtin_ctz(others)];
        if (other.mask != mask || other.collective != collective || !same(other.place, place)) {
            fail("divergent warp: %s is at %s:%d with mask %08x, %s at %s:%d with mask %08x", name_of(thread),
                 place.file, place.line, mask, name_of(other), other.place.file, other.place.line, other.mask);
        }
    }
}

// Waits for the lanes of the mask. Only __syncwarp() orders memory.
void join(Collective collective, unsigned mask, Place place) {
    Thread& thread = *machine.current;
    const unsigned number = thread.number / kWarpSize;
    Warp& warp = machine.warps[number];
    check_collective(thread, warp, collective, mask, place);
    thread.collective = collective;
    thread.mask = mask;
    machine.wait(thread, State::kInCollective, place);
    warp.waiting |= 1u << thread.number % kWarpSize;
    const unsigned first_lane = static_cast<unsigned>(__builtin_ctz(mask));
    char* const clock = &machine.memory.clocks().warps[number][first_lane][warp.phases >> first_lane & 1];
    const bool orders = under_tsan() && collective == Collective::kSync;
    if (orders) __tsan_release(clock);
    complete_collective(thread);
    suspend();
    if (orders) __tsan_acquire(clock);
}

void shuffle_ranks() {
    for (unsigned k = machine.count; k > 1; k--)
        std::swap(machine.thread_at[k - 1], machine.thread_at[next_random() % k]);
    for (unsigned k = 0; k < machine.count; k++) machine.rank_of[machine.thread_at[k]] = k;
}

void release_barrier() {
    machine.at_barrier = 0;
    machine.barrier_phase = !machine.barrier_phase;
    if (machine.settings.order == Order::kRandom) shuffle_ranks();
    for (unsigned k = 0; k < machine.count; k++) machine.make_ready(machine.block[k]);
}

void end_thread() {
    Thread& thread = *machine.current;
    machine.wait(thread, State::kEnded, Place{});
    machine.ended++;
    if (machine.at_barrier > 0) {
        const Thread& other = *machine.first_at_barrier;
        fail("divergent barrier: %s has ended, %s waits at %s:%d", name_of(thread), name_of(other), other.place.file,
             other.place.line);
    }
    Warp& warp = machine.warps[thread.number / kWarpSize];
    warp.alive &= ~(1u << thread.number % kWarpSize);
    Thread* const lanes = lanes_of(thread.number / kWarpSize);
    for (unsigned left = warp.waiting; left != 0; left &= left - 1) complete_collective(lanes[__builtin_ctz(left)]);
}

// ---- blocks ----

// The entry of every fibre.
void run_thread() {
    if (under_asan()) __sanitizer_finish_switch_fiber(nullptr, &machine.host.stack, &machine.host.stack_bytes);
    if (under_tsan()) __tsan_acquire(&start_of_block);
    machine.call(machine.kernel);
    if (under_tsan()) __tsan_release(&end_of_launch);
    end_thread();
    switch_fibre(machine.current->fibre, machine.host, true);
    std::abort();  // nobody switches to a thread that has ended
}

void make_threads() {
    const unsigned sets = under_tsan() ? 2 : 1;
    if (machine.threads.empty()) machine.threads.resize(sets * kMaxThreads);
    for (unsigned set = 0; set < sets; set++) {
        for (unsigned k = 0; k < machine.count; k++) {
            Fibre& fibre = machine.threads[set * kMaxThreads + k].fibre;
            if (fibre.stack != nullptr) continue;
            char* const stack = map(kPageBytes + kStackBytes);
            mprotect(stack, kPageBytes, PROT_NONE);  // too deep a stack ends here
            fibre.stack = stack + kPageBytes;
            fibre.stack_bytes = kStackBytes;
            if (under_tsan()) fibre.tsan_fibre = __tsan_create_fiber(0);
        }
    }
}

void begin_block(uint64_t number) {
    machine.memory.begin_block(machine.shared_bytes);
    if (under_tsan()) __tsan_release(&start_of_block);
    machine.block = machine.threads.data() + (under_tsan() && number % 2 == 1 ? kMaxThreads : 0);
    machine.ended = machine.at_barrier = 0;
    machine.phase_barriers.clear();
    std::fill(std::begin(machine.warps), std::end(machine.warps), Warp{});
    const bool reverse = machine.settings.order == Order::kReverse;
    for (unsigned k = 0; k < machine.count; k++) {
        machine.thread_at[k] = machine.rank_of[k] = reverse ? machine.count - 1 - k : k;
    }
    if (machine.settings.order == Order::kRandom) shuffle_ranks();
    std::fill(std::begin(machine.ready), std::end(machine.ready), 0);
    for (unsigned k = 0; k < machine.count; k++) {
        Thread& thread = machine.block[k];
        thread.number = k;
        thread.index = {k % blockDim.x, k / blockDim.x % blockDim.y, k / blockDim.x / blockDim.y};
        thread.copies.clear();
        thread.group = 0;
        thread.has_copied = false;
        machine.warps[k / kWarpSize].alive |= 1u << k % kWarpSize;
        machine.make_ready(thread);
        const size_t stack_bytes = kStackBytes - k % 64 * 256;  // tops of stacks in different sets of the caches
        if (under_asan()) {  // of the frames of a thread that has ended, which did not return
            const char* const top = static_cast<const char*>(thread.fibre.stack) + stack_bytes;
            __asan_unpoison_memory_region(top - kPageBytes, kPageBytes);
        }
        prepare(thread.fibre, run_thread, stack_bytes);
    }
}

void run_block(uint64_t number) {
    begin_block(number);
    while (machine.ended < machine.count) {
        Thread* const thread = machine.first_ready();
        if (thread == nullptr) report_deadlock();
        machine.current = thread;
        threadIdx = thread->index;
        switch_fibre(machine.host, thread->fibre, false);
    }
    if (!machine.memory.margins_are_untouched(machine.shared_bytes)) {
        fail("a thread wrote beyond the %zu bytes of shared memory", machine.shared_bytes);
    }
    for (const PhaseBarrier& barrier : machine.phase_barriers) {
        if (barrier.arrived || barrier.bytes_expected != 0 || !barrier.boxes.empty())
            fail("a block has ended before its copies have arrived");
    }
    machine.threads_run += machine.count;
}

void check_launch(size_t shared_bytes) {
    const dim3 &grid = gridDim, &block = blockDim;
    const auto most = [](dim3 size, unsigned x, unsigned y, unsigned z) {
        return size.x >= 1 && size.x <= x && size.y >= 1 && size.y <= y && size.z >= 1 && size.z <= z;
    };
    if (!most(grid, std::numeric_limits<int>::max(), 65535, 65535)) {
        fail("a grid must be from (1, 1, 1) to (2^31-1, 65535, 65535); got (%u, %u, %u)", grid.x, grid.y, grid.z);
    }
    if (!most(block, kMaxThreads, kMaxThreads, 64) || uint64_t{block.x} * block.y * block.z > kMaxThreads) {
        fail("a block must be from (1, 1, 1) to (1024, 1024, 64), of at most 1024 threads; got (%u, %u, %u)", block.x,
             block.y, block.z);
    }
    if (shared_bytes > kMostSharedBytes) {
        fail("a block must have at most %zu bytes of shared memory; got %zu", kMostSharedBytes, shared_bytes);
    }
}

}  // namespace

Settings& settings() { return next_settings; }

uint64_t threads_run() { return machine.threads_run; }

uint64_t mmas_run() { return machine.mmas_run; }

uint64_t bytes_copied() { return machine.bytes_copied; }

uint64_t groups_copied() { return machine.groups_copied; }

void* shared_memory() { return machine.memory.shared(); }

size_t shared_bytes() { return machine.shared_bytes; }

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* kernel) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    gridDim = grid;
    blockDim = block;
    blockIdx = {0, 0, 0};
    check_launch(shared_bytes);
    machine.settings = next_settings;
    machine.random = next_settings.seed * 0x9e3779b97f4a7c15 + 0x1234567;
    machine.count = block.x * block.y * block.z;
    machine.shared_bytes = shared_bytes;
    machine.call = call;
    machine.kernel = kernel;
    make_threads();
    machine.memory.begin_launch(shared_bytes);
    if (under_tsan()) machine.host.tsan_fibre = __tsan_get_current_fiber();
    // Blocks run in the order of threads. At random they are a step apart, coprime to their number. A sample has steps
    // near the golden ratio, coprime too, which meet no period of the grid.
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const uint64_t most = std::min(blocks, static_cast<uint64_t>(machine.settings.most_blocks_run));
    uint64_t first = 0, step = most < blocks ? static_cast<uint64_t>(0.618 * static_cast<double>(blocks)) : 1;
    while (most < blocks && std::gcd(step, blocks) != 1) step++;
    if (machine.settings.order == Order::kReverse) {
        first = step = blocks - 1;
    } else if (machine.settings.order == Order::kRandom) {
        first = next_random() % blocks;
        do step = 1 + next_random() % blocks;
        while (std::gcd(step, blocks) != 1);
    }
    for (uint64_t k = 0; k < most; k++) {
        const uint64_t number = (first + k % blocks * step) % blocks;
        blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                    static_cast<unsigned>(number / grid.x / grid.y)};
        run_block(k);
    }
    if (under_tsan()) __tsan_acquire(&end_of_launch);
}

void misaligned(const volatile void* address, size_t alignment, Place place) {
    fail("%s accesses %p at %s:%d, which is not aligned to %zu bytes", name_of(*machine.current),
         const_cast<const void*>(address), place.file, place.line, alignment);
}

void sync_block(Place place) {
    Thread& thread = *machine.current;
    if (machine.ended > 0) {
        fail("divergent barrier: %s waits at %s:%d, %u threads have ended", name_of(thread), place.file, place.line,
             machine.ended);
    }
    if (machine.at_barrier == 0) machine.first_at_barrier = &thread;
    const Thread& first = *machine.first_at_barrier;
    if (machine.at_barrier > 0 && !same(first.place, place)) {
        fail("divergent barrier: %s waits at %s:%d, %s at %s:%d", name_of(thread), place.file, place.line,
             name_of(first), first.place.file, first.place.line);
    }
    machine.wait(thread, State::kAtBarrier, place);
    char* const clock = &machine.memory.clocks().block[machine.barrier_phase];
    if (under_tsan()) __tsan_release(clock);
    if (++machine.at_barrier == machine.count) release_barrier();
    suspend();
    if (under_tsan()) __tsan_acquire(clock);
}

void sync_warp(unsigned mask, Place place) { join(Collective::kSync, mask, place); }

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Place place) {
    Thread& thread = *machine.current;
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        fail("the width of a shuffle must be a power of two up to 32; got %d at %s:%d", width, place.file, place.line);
    }
    // Follow the PTX manual: up and down, but not xor, stay out of the parts of the warp before a lane's own.
    const int lane = static_cast<int>(thread.number % kWarpSize), first = lane & -width, last = first + width - 1;
    operand &= 31;
    int source = lane;
    switch (kind) {
        case Shuffle::kFrom: source = first | (operand & (width - 1)); break;
        case Shuffle::kXor: source = (lane ^ operand) <= last ? lane ^ operand : lane; break;
        case Shuffle::kDown: source = lane + operand <= last ? lane + operand : lane; break;
        case Shuffle::kUp: source = lane - operand >= first ? lane - operand : lane; break;
    }
    thread.operands.bits = bits;
    thread.operands.source = static_cast<unsigned>(source);
    join(Collective::kShuffle, mask, place);
    return thread.operands.bits;
}

// ---- copies ----

namespace {

// Calls of memcpy and memset, whose sizes the compiler does not know: the sanitizers see them.
void arrive(const Copy& copy) {
    std::memcpy(copy.shared, copy.global, copy.bytes_read);
    std::memset(static_cast<char*>(copy.shared) + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
}

}  // namespace

void copy_async(void* shared, const void* global, size_t bytes, size_t bytes_read, Place place) {
    Thread& thread = *machine.current;
    if ((bytes != 4 && bytes != 8 && bytes != 16) || bytes_read > bytes) {
        fail("a copy must be of 4, 8 or 16 bytes and read at most these; got %zu, of which %zu are read, at %s:%d",
             bytes, bytes_read, place.file, place.line);
    }
    for (const void* address : {static_cast<const void*>(shared), global}) {
        if (reinterpret_cast<uintptr_t>(address) % bytes != 0) misaligned(address, bytes, place);
    }
    const char* const to = static_cast<char*>(shared);
    if (to < machine.memory.shared() || to + bytes > machine.memory.shared() + machine.shared_bytes) {
        fail("%s copies beyond the %zu bytes of shared memory at %s:%d", name_of(thread), machine.shared_bytes,
             place.file, place.line);
    }
    machine.bytes_copied += bytes_read;
    thread.has_copied = true;
    if (carafepp_trace_copy != nullptr)
        carafepp_trace_copy(shared, global, bytes, bytes_read, __builtin_return_address(0));
    const Copy copy{shared, global, bytes, bytes_read, thread.group};
    if (machine.settings.deferred_copies) {
        std::memset(shared, kNotArrived, bytes);
        thread.copies.push_back(copy);
    } else {
        arrive(copy);
    }
}

void commit_copies() {
    Thread& thread = *machine.current;
    thread.group++;
    machine.groups_copied += thread.has_copied;
    thread.has_copied = false;
}

void wait_for_copies(int groups_left) {
    Thread& thread = *machine.current;
    const auto arrived = [&](const Copy& copy) { return copy.group < thread.group - groups_left; };
    for (const Copy& copy : thread.copies) {
        if (arrived(copy)) arrive(copy);
    }
    thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), arrived), thread.copies.end());
}

// ---- copies of boxes ----

namespace {

// The places of the rows of a box: f(in shared memory, first existing byte, bytes that exist, bytes before them).
template <class F>
void for_each_row(const Box& box, F f) {
    const TensorMap& map = box.map;
    const int64_t begin = std::clamp<int64_t>(-int64_t{box.first[0]}, 0, map.box[0]),
                  end = std::clamp<int64_t>(map.sizes[0] - box.first[0], begin, map.box[0]);
    char* row = box.shared;
    uint32_t at[TensorMap::kAxes] = {};
    for (at[3] = 0; at[3] < map.box[3]; at[3]++) {
        for (at[2] = 0; at[2] < map.box[2]; at[2]++) {
            for (at[1] = 0; at[1] < map.box[1]; at[1]++, row += box.row_bytes()) {
                bool exists = begin < end;
                const char* from = map.data;
                for (int axis = 1; axis < TensorMap::kAxes; axis++) {
                    const int64_t index = box.first[axis] + int64_t{at[axis]};
                    exists = exists && index >= 0 && index < map.sizes[axis];
                    from += index * map.strides[axis];
                }
                f(row, from + (box.first[0] + begin) * map.strides[0],
                  static_cast<size_t>(exists ? (end - begin) * map.strides[0] : 0),
                  static_cast<size_t>(begin * map.strides[0]));
            }
        }
    }
}

PhaseBarrier& find_barrier(const uint64_t* address, Place place) {
    for (PhaseBarrier& barrier : machine.phase_barriers) {
        if (barrier.address == address) return barrier;
    }
    fail("%s uses a barrier at %s:%d that has not begun", name_of(*machine.current), place.file, place.line);
}

void check_shared(const void* address, size_t bytes, size_t alignment, Place place) {
    const char* const begin = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) misaligned(address, alignment, place);
    if (begin < machine.memory.shared() || begin + bytes > machine.memory.shared() + machine.shared_bytes) {
        fail("%s copies beyond the %zu bytes of shared memory at %s:%d", name_of(*machine.current),
             machine.shared_bytes, place.file, place.line);
    }
}

// Ends a phase whose arrival and bytes have come. Who waits for it goes on.
void complete_phase(PhaseBarrier& barrier) {
    if (!barrier.arrived || barrier.bytes_expected != 0) return;
    barrier.arrived = false;
    barrier.phase = !barrier.phase;
    for (unsigned k = 0; k < machine.count; k++) {
        if (machine.block[k].state == State::kAtPhase) machine.make_ready(machine.block[k]);  // it looks again
    }
}

void arrive(PhaseBarrier& barrier, const Box& box) {
    for_each_row(box, [&](char* row, const char* from, size_t bytes_read, size_t before) {
        std::memset(row, 0, box.row_bytes());
        if (bytes_read > 0) std::memcpy(row + before, from, bytes_read);
    });
    barrier.bytes_expected -= static_cast<int64_t>(box.bytes());
    if (under_tsan()) __tsan_release(const_cast<uint64_t*>(barrier.address));
}

}  // namespace

void begin_barrier(uint64_t* barrier, Place place) {
    check_shared(barrier, sizeof *barrier, sizeof *barrier, place);
    for (const PhaseBarrier& other : machine.phase_barriers) {
        if (other.address == barrier) fail("a barrier begins twice at %s:%d", place.file, place.line);
    }
    std::memset(barrier, 0, sizeof *barrier);
    machine.phase_barriers.push_back({barrier});
}

void expect_bytes(uint64_t* address, size_t bytes, Place place) {
    PhaseBarrier& barrier = find_barrier(address, place);
    if (barrier.arrived) fail("a phase has two arrivals at %s:%d", place.file, place.line);
    if (under_tsan()) __tsan_release(address);
    barrier.arrived = true;
    barrier.bytes_expected += static_cast<int64_t>(bytes);
    complete_phase(barrier);
}

void copy_box(void* shared, const TensorMap& map, const int (&first)[TensorMap::kAxes], uint64_t* address,
              Place place) {
    PhaseBarrier& barrier = find_barrier(address, place);
    Box box{static_cast<char*>(shared), map, {}};
    std::copy_n(first, TensorMap::kAxes, box.first);
    check_shared(shared, box.bytes(), 128, place);
    if (first[0] * map.strides[0] % 16 != 0) {
        fail("%s copies a box that begins at element %d of a row, no multiple of 16 bytes, at %s:%d",
             name_of(*machine.current), first[0], place.file, place.line);
    }
    machine.bytes_copied += box.bytes();
    machine.groups_copied += machine.count;  // a thread copies for all
    if (carafepp_trace_row != nullptr) {
        for_each_row(box, [&](char*, const char* from, size_t bytes_read, size_t) {
            carafepp_trace_row(from, bytes_read, box.row_bytes());
        });
    }
    if (machine.settings.deferred_copies) {
        std::memset(shared, kNotArrived, box.bytes());
        barrier.boxes.push_back(box);
    } else {
        arrive(barrier, box);
        complete_phase(barrier);
    }
}

void wait_for_phase(const uint64_t* address, bool phase, Place place) {
    Thread& thread = *machine.current;
    while (find_barrier(address, place).phase == phase) {
        PhaseBarrier& barrier = find_barrier(address, place);
        for (const Box& box : barrier.boxes) arrive(barrier, box);
        barrier.boxes.clear();
        complete_phase(barrier);
        if (barrier.phase != phase) break;
        machine.wait(thread, State::kAtPhase, place);
        suspend();
    }
    if (under_tsan()) __tsan_acquire(const_cast<uint64_t*>(address));
}

// ---- tensor cores ----

namespace {

double widened(uint16_t bits, MmaType type) {
    const int fraction_bits = type == MmaType::kFloat16 ? 10 : 7, bias = type == MmaType::kFloat16 ? 15 : 127;
    const int exponent = (bits & 0x7fff) >> fraction_bits, largest = 2 * bias + 1;
    const int fraction = bits & ((1 << fraction_bits) - 1), one = 1 << fraction_bits;
    const double magnitude = exponent == largest ? (fraction ? std::numeric_limits<double>::quiet_NaN()
                                                             : std::numeric_limits<double>::infinity())
                             : exponent == 0     ? std::ldexp(fraction, 1 - bias - fraction_bits)
                                                 : std::ldexp(one + fraction, exponent - bias - fraction_bits);
    return bits & 0x8000 ? -magnitude : magnitude;
}

void complete_mma(Thread* lanes) {
    const MmaType type = lanes[0].operands.type;
    const int k = lanes[0].operands.k;
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Operands& operands = lanes[lane].operands;
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            const auto element = [&](uint32_t bits) { return widened(static_cast<uint16_t>(bits >> 16 * half), type); };
            for (int r = 0; r < k / 4; r++) a[group + r % 2 * 8][pair + r / 2 * 8 + half] = element(operands.a[r]);
            for (int r = 0; r < k / 8; r++) b[pair + r * 8 + half][group] = element(operands.b[r]);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        for (int r = 0; r < 4; r++) {
            const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
            double sum = lanes[lane].operands.sums[r];
            for (int i = 0; i < k; i++) sum += a[row][i] * b[i][column];
            lanes[lane].operands.sums[r] = static_cast<float>(sum);
        }
    }
}

}  // namespace

void load_matrices(bool transposed, const void* row, uint32_t (&words)[4], Place place) {
    constexpr size_t kBytes = 16;
    if (reinterpret_cast<uintptr_t>(row) % kBytes != 0) misaligned(row, kBytes, place);
    if (carafepp_trace_load != nullptr) carafepp_trace_load(row, kBytes, __builtin_return_address(0));
    const int lane = static_cast<int>(machine.current->number % kWarpSize);
    for (int k = 0; k < 8; k++) {
        const int quad = lane / 4, of_pair = lane % 4 * 2 + k % 2;
        const int from = k / 2 * 8 + (transposed ? of_pair : quad);  // the lane that knows the row
        const uint64_t address = shuffle(Shuffle::kFrom, 0xffffffff, reinterpret_cast<uintptr_t>(row), from, 32, place);
        Copy element{nullptr, reinterpret_cast<const uint16_t*>(address) + (transposed ? quad : of_pair),
                     sizeof(uint16_t), sizeof(uint16_t), 0};
        element.shared = reinterpret_cast<uint16_t*>(&words[k / 2]) + k % 2;
        arrive(element);
    }
}

void mma(MmaType type, int k, float* sums, const uint32_t* a, const uint32_t* b, Place place) {
    Operands& operands = machine.current->operands;
    operands.type = type;
    operands.k = k;
    std::copy_n(sums, 4, operands.sums);
    std::copy_n(a, k / 4, operands.a);
    std::copy_n(b, k / 8, operands.b);
    join(Collective::kMma, 0xffffffff, place);
    std::copy_n(operands.sums, 4, sums);
}

}  // namespace carafepp::emulation
