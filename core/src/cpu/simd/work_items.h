// SPDX-License-Identifier: Apache-2.0
// The run of a kernel, which is a plan made from a problem and its result. The plan has `items`, `scratch_size` and
// run_item(item, scratch); nothing changes it. Threads take items one after the other, each with a part of the caller's
// scratch. A plan may depend on the number of threads; what is computed never does.
#pragma once

#include <cassert>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp {
namespace {

template <class A>
int threads_worth(const Problem& p, int64_t items = INT32_MAX) {
    return threads_for(items, p.cost() / kLanes<A>);
}

// Calls run_item(item, scratch) for each item, with `scratch_size` elements of A.
template <class A, class F>
void run_items(int64_t items, int threads, int64_t scratch_size, const F& run_item) {
    assert(scratch_size * int64_t{sizeof(A)} <= kScratchBytes);
    A* const scratch = static_cast<A*>(scratch_bytes(threads * scratch_size * int64_t{sizeof(A)}));
    parallel_for(items, threads,
                 [&](int64_t item, int worker) noexcept { run_item(item, scratch + worker * scratch_size); });
}

template <class Kernel>
void run_items(const Kernel& kernel) {
    using A = typename Kernel::A;
    run_items<A>(kernel.items, threads_worth<A>(kernel.p, kernel.items), kernel.scratch_size,
                 [&](int64_t item, A* scratch) { kernel.run_item(item, scratch); });
}

// Runs a kernel for the storage type of features.
template <template <class> class Kernel>
void run_kernel(const Problem& problem, const Array& result) {
    with_type(problem.features.dtype,
              [&](auto features) { run_items(Kernel<typename decltype(features)::type>{problem, result}); });
}

}  // namespace
}  // namespace carafepp
