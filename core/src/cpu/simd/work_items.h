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

template <class Kernel>
void run_items(const Kernel& kernel) {
    using A = typename Kernel::A;
    assert(kernel.scratch_size * int64_t{sizeof(A)} <= kScratchBytes);
    const int threads = threads_worth<A>(kernel.p, kernel.items);
    A* const scratch = static_cast<A*>(scratch_bytes(threads * kernel.scratch_size * int64_t{sizeof(A)}));
    parallel_for(kernel.items, threads, [&](int64_t item, int worker) noexcept {
        kernel.run_item(item, scratch + worker * kernel.scratch_size);
    });
}

// Runs a kernel for the storage type of features.
template <template <class> class Kernel>
void run_kernel(const Problem& problem, const Array& result) {
    with_type(problem.features.dtype,
              [&](auto features) { run_items(Kernel<typename decltype(features)::type>{problem, result}); });
}

}  // namespace
}  // namespace carafepp
