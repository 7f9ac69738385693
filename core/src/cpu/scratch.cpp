// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <memory>

namespace carafepp {
namespace {

constexpr std::align_val_t kAlignment{64};  // a cache line, and the widest vector

struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
};

}  // namespace

void* scratch_bytes(int64_t bytes) {
    static thread_local std::unique_ptr<void, Free> memory;
    static thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset(::operator new(static_cast<size_t>(bytes), kAlignment));
        size = bytes;
    }
    return memory.get();
}

}  // namespace carafepp
