// SPDX-License-Identifier: Apache-2.0
// Pages of memory from the operating system: zeros, or NULL. On Linux and macOS a page takes memory once it is written.
#pragma once

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>

namespace pages {

#if defined(_WIN32)
inline size_t size() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

inline void* allocate(size_t bytes) { return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

inline void forbid(void* memory, size_t bytes) {
    DWORD before;
    VirtualProtect(memory, bytes, PAGE_NOACCESS, &before);
}

inline void release(void* memory, size_t) { VirtualFree(memory, 0, MEM_RELEASE); }
#else
inline size_t size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

inline void* allocate(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

inline void forbid(void* memory, size_t bytes) { mprotect(memory, bytes, PROT_NONE); }

inline void release(void* memory, size_t bytes) { munmap(memory, bytes); }
#endif

}  // namespace pages
