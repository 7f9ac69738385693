// SPDX-License-Identifier: Apache-2.0
// Scratch of the calling thread, kept for its next call. Each worker gets a part of it.
#pragma once

#include <cstdint>
#include <new>

namespace carafepp {

// The most scratch of a worker, as carafepp.h promises: about a level 2 cache.
constexpr int64_t kScratchBytes = int64_t{2} << 20;

// At least `bytes`, aligned to 64; valid until this thread's next call. Throws std::bad_alloc.
void* scratch_bytes(int64_t bytes);

}  // namespace carafepp
