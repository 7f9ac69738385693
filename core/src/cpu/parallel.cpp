// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <bitset>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "environment.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#endif

namespace carafepp {
namespace {

// The cost of waking a thread and filling the caches of its core, in multiply-adds: some 40 microseconds. With less
// work for each thread, fewer threads are faster.
constexpr double kCostWorthAThread = 150e3;

int usable_cores() {
    int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t may_use;  // of all cores, those that this process may use
    if (sched_getaffinity(0, sizeof may_use, &may_use) == 0) cores = CPU_COUNT(&may_use);
#elif defined(_WIN32)
    DWORD_PTR may_use = 0, all = 0;  // of a process in several groups of processors they stay 0
    if (GetProcessAffinityMask(GetCurrentProcess(), &may_use, &all) && may_use != 0)
        cores = static_cast<int>(std::bitset<64>(may_use).count());
#endif
    return std::clamp(cores, 1, kMaxThreads);
}

#if defined(_WIN32)
// Threads outlive a FreeLibrary, so the library that has their code stays loaded.
struct StartingThreads {
    StartingThreads() {
        HMODULE library;
        GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_PIN,
                           reinterpret_cast<LPCWSTR>(&run_on_pool), &library);
    }
};
#else
// Threads that start in its scope take no signals, which are the caller's to handle.
struct StartingThreads {
    sigset_t before;

    StartingThreads() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
    }
    ~StartingThreads() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
};
#endif

// One job at a time: the caller and the workers that it wakes draw items from a common counter. A worker that wakes too
// late finds the job closed; nobody waits for it. The pool is never destroyed, since its threads outlive main: at exit
// they end with the process.
class Pool {
public:
    // False when another call has the pool.
    bool run(int64_t items, int threads, Task task) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        start_workers(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task;
            items_ = items;
            next_.store(0, std::memory_order_relaxed);
            open_to_ = threads - 1;
            job_++;
        }
        wake_.notify_all();
        work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        open_to_ = 0;
        done_.wait(lock, [this] { return active_ == 0; });
        return true;
    }

private:
    // As many workers as asked for, or as many as the system lets us start.
    void start_workers(int count) {
        if (workers_ >= count) return;
        const StartingThreads starting;
        try {
            for (; workers_ < count; workers_++) std::thread(&Pool::worker, this, workers_ + 1, job_).detach();
        } catch (const std::exception&) {  // no thread, or no memory for one: the others do its work
        }
    }

    void worker(int id, uint64_t job_seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return job_ != job_seen; });
            job_seen = job_;
            if (id > open_to_) continue;
            active_++;
            lock.unlock();
            work(id);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    void work(int id) {
        for (;;) {
            const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
            if (item >= items_) return;
            task_.run(task_.context, item, id);
        }
    }

    std::mutex turn_;  // held by the call that has the pool
    int workers_ = 0;  // started so far; guarded by turn_

    std::mutex mutex_;  // guards what follows, but for the counter and, while a job runs, task_ and items_
    std::condition_variable wake_, done_;
    uint64_t job_ = 0;
    int open_to_ = 0;  // workers with an id up to this may join the job
    int active_ = 0;   // those that have
    Task task_{};
    int64_t items_ = 0;
    std::atomic<int64_t> next_{0};
};

// A forked child has none of its parent's threads, and its mutex may be locked. It gets a new pool in the same place.
alignas(Pool) unsigned char pool_memory[sizeof(Pool)];

void renew_pool() { new (pool_memory) Pool; }

// When the library is loaded, while there is nobody to race with.
const int cores = [] {
    renew_pool();
#if !defined(_WIN32)  // which has no fork
    pthread_atfork(nullptr, nullptr, renew_pool);
#endif
    return usable_cores();
}();

std::atomic<int> chosen_threads{0};  // 0: the default

}  // namespace

void set_num_threads(int threads) {
    chosen_threads.store(std::clamp(threads, 0, kMaxThreads), std::memory_order_relaxed);
}

int get_num_threads() {
    const int chosen = chosen_threads.load(std::memory_order_relaxed);
    if (chosen > 0) return chosen;
    const int of_environment = environment().threads;
    return of_environment > 0 ? of_environment : cores;
}

int threads_for(int64_t items, double cost_of_all) {
    const double worth = std::min(cost_of_all / kCostWorthAThread, static_cast<double>(items));
    return std::clamp(static_cast<int>(std::min<double>(worth, kMaxThreads)), 1, get_num_threads());
}

void run_on_pool(int64_t items, int threads, Task task) {
    if (std::launder(reinterpret_cast<Pool*>(pool_memory))->run(items, threads, task)) return;
    for (int64_t item = 0; item < items; item++) task.run(task.context, item, 0);
}

}  // namespace carafepp
