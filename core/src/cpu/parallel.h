// SPDX-License-Identifier: Apache-2.0
// The CPU threads: a small pool that starts when first needed and survives fork. Results do not depend on it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace carafepp {

void set_num_threads(int threads);  // below 1: back to the default
int get_num_threads();

// The work of one thread: items of [0, items) until none is left. `worker` is in [0, get_num_threads()).
struct Task {
    void (*run)(const void* context, int64_t item, int worker);
    const void* context;
};

void run_on_pool(int64_t items, int threads, Task task);

// The number of threads that items are worth: a tiny call wakes nobody. The cost is in multiply-adds, of numbers or
// vectors, about.
int threads_for(int64_t items, double cost_of_all);

// Calls f(item, worker) once for each item in [0, items), on up to `threads` threads, of which the caller's is one. f
// must not throw. While another call holds the pool, the caller does all the work itself.
template <class F>
void parallel_for(int64_t items, int threads, const F& f) {
    static_assert(std::is_nothrow_invocable_v<const F&, int64_t, int>,
                  "f runs on threads that nothing could be thrown to");
    if (threads <= 1) {
        for (int64_t item = 0; item < items; item++) f(item, 0);
        return;
    }
    run_on_pool(items, threads, {[](const void* context, int64_t item, int worker) {
        (*static_cast<const F*>(context))(item, worker);
    }, &f});
}

}  // namespace carafepp
