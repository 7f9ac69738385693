// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the calling thread, kept for its next call: one block, of which each worker gets a part.
#pragma once

#include <cstdint>
#include <new>

namespace carafepp {

// What a kernel asks for at most, for each worker: about a level 2 cache.
constexpr int64_t kScratchBytes = int64_t{2} << 20;

// At least `bytes`, aligned to 64; valid until this thread's next call. Throws std::bad_alloc.
void* scratch_bytes(int64_t bytes);

}  // namespace carafepp
