// SPDX-License-Identifier: Apache-2.0
#include "trace.h"

#include <algorithm>
#include <list>
#include <tuple>
#include <unordered_map>

#include "emulation.h"

namespace carafepp::trace {
namespace {

constexpr int kWarpSize = 32, kSectorBytes = 32, kLineBytes = 128, kBanks = 32, kWordBytes = 4;
constexpr uint8_t kShared = 255;  // in the place of an array's number

Trace result;

struct Access {
    uintptr_t address;
    uint32_t time;        // accesses of the thread before it
    uint32_t occurrence;  // accesses of the thread at this place before it
    uint16_t place, thread;
    uint8_t bytes, array;
    bool store, copy;  // a copy to shared memory is a load of one array and a store to the other
};

// The accesses of the block that runs.
struct Block {
    std::unordered_map<const void*, uint16_t> places;
    std::vector<const void*> code;                   // [place]
    std::vector<std::vector<uint32_t>> occurrences;  // [place][thread]
    std::vector<uint32_t> times;                     // [thread]
    std::vector<Access> accesses;
    unsigned number = 0;

    void clear() {
        for (auto& of_place : occurrences) std::fill(of_place.begin(), of_place.end(), 0);
        std::fill(times.begin(), times.end(), 0);
        accesses.clear();
    }
} block;

// ---- counts ----

// Tags of 128 bytes with four sectors each; the line that was used longest ago goes.
class Cache {
public:
    explicit Cache(size_t bytes) : lines_(bytes / kLineBytes) {}

    // The sectors of a mask that are not there; they are, afterwards.
    unsigned load(uintptr_t line, unsigned sectors) {
        auto found = index_.find(line);
        if (found == index_.end()) {
            if (index_.size() == lines_) {
                index_.erase(order_.back().line);
                order_.pop_back();
            }
            order_.push_front({line, 0});
            found = index_.emplace(line, order_.begin()).first;
        } else {
            order_.splice(order_.begin(), order_, found->second);
        }
        const unsigned missing = sectors & ~found->second->sectors;
        found->second->sectors |= sectors;
        return missing;
    }

private:
    struct Line {
        uintptr_t line;
        unsigned sectors;
    };
    size_t lines_;
    std::list<Line> order_;
    std::unordered_map<uintptr_t, std::list<Line>::iterator> index_;
};

int bits_of(unsigned mask) { return __builtin_popcount(mask); }

// The lanes of a warp in one access.
struct WarpAccess {
    const Access* begin;
    const Access* end;
    uint32_t time;
};

void count_global(const WarpAccess& access, std::vector<Cache>& caches) {
    const Access& first = *access.begin;
    Counts& of = result.arrays[first.array].counts;
    (first.store ? of.stores : of.loads)++;
    std::vector<std::pair<uintptr_t, unsigned>> lines;  // with their sectors
    std::vector<uintptr_t> words;
    for (const Access* lane = access.begin; lane < access.end; lane++) {
        of.lanes++;
        for (uintptr_t sector = lane->address / kSectorBytes;
             sector <= (lane->address + lane->bytes - 1) / kSectorBytes; sector++) {
            const uintptr_t line = sector / 4;
            auto found = std::find_if(lines.begin(), lines.end(),
                                      [&](const auto& other) { return other.first == line; });
            if (found == lines.end()) found = lines.insert(lines.end(), {line, 0});
            found->second |= 1u << sector % 4;
        }
        for (int byte = 0; byte < lane->bytes; byte += 2) words.push_back(lane->address + static_cast<uintptr_t>(byte));
    }
    std::sort(words.begin(), words.end());
    const int64_t bytes = 2 * (std::unique(words.begin(), words.end()) - words.begin());
    (first.store ? of.stored_bytes : of.loaded_bytes) += bytes;
    for (const auto& [line, sectors] : lines) {
        (first.store ? of.store_lines : of.load_lines)++;
        (first.store ? of.store_sectors : of.load_sectors) += bits_of(sectors);
        if (first.store) continue;
        for (size_t k = 0; k < caches.size(); k++) of.l2_sectors[k] += bits_of(caches[k].load(line, sectors));
    }
}

// Lanes of 4 bytes go together, of 8 in two halves, of 16 in four quarters. Each wavefront has a word from each bank.
void count_shared(const WarpAccess& access) {
    Counts& of = result.shared;
    (access.begin->store ? of.stores : of.loads)++;
    const int lanes_together = kWarpSize * kWordBytes / std::max<int>(access.begin->bytes, kWordBytes);
    for (int part = 0; part < kWarpSize / lanes_together; part++) {
        std::vector<uintptr_t> words;
        for (const Access* lane = access.begin; lane < access.end; lane++) {
            if (lane->thread % kWarpSize / lanes_together != part) continue;
            for (int byte = 0; byte < lane->bytes; byte += kWordBytes)
                words.push_back((lane->address + static_cast<uintptr_t>(byte)) / kWordBytes);
        }
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int of_bank[kBanks] = {};
        for (const uintptr_t word : words) of_bank[word % kBanks]++;
        of.wavefronts += *std::max_element(std::begin(of_bank), std::end(of_bank));
        of.fewest_wavefronts += (static_cast<int64_t>(words.size()) + kBanks - 1) / kBanks;
    }
    for (const Access* lane = access.begin; lane < access.end; lane++) of.lanes++;
}

void count_block() {
    auto& accesses = block.accesses;
    if (accesses.empty()) return;
    result.blocks++;
    const auto of_warp = [](const Access& a) {
        return std::tuple(a.thread / kWarpSize, a.place, a.occurrence, a.array, a.store);
    };
    std::sort(accesses.begin(), accesses.end(), [&](const Access& a, const Access& b) {
        return std::tuple(of_warp(a), a.thread) < std::tuple(of_warp(b), b.thread);
    });
    std::vector<WarpAccess> warps;
    for (size_t begin = 0, end = 0; begin < accesses.size(); begin = end) {
        uint32_t time = accesses[begin].time;
        for (end = begin + 1; end < accesses.size() && of_warp(accesses[end]) == of_warp(accesses[begin]); end++)
            time = std::min(time, accesses[end].time);
        warps.push_back({&accesses[begin], &accesses[begin] + (end - begin), time});
    }
    // All warps advance together.
    std::stable_sort(warps.begin(), warps.end(), [](const auto& a, const auto& b) { return a.time < b.time; });
    std::vector<Cache> caches;
    for (const int kilobytes : kL1Kilobytes) caches.emplace_back(static_cast<size_t>(kilobytes) * 1024);
    for (const WarpAccess& access : warps) {
        const Access& first = *access.begin;
        if (first.array == kShared) {
            result.places[{block.code[first.place], first.copy ? "LDGSTS" : first.store ? "STS" : "LDS"}]++;
            count_shared(access);
        } else {
            if (!first.copy) result.places[{block.code[first.place], first.store ? "STG" : "LDG"}]++;
            count_global(access, caches);
        }
    }
    block.clear();
}

__attribute__((noinline)) void record(const void* pointer, size_t bytes, bool store, const void* code,
                                      bool copy = false) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const uintptr_t shared = reinterpret_cast<uintptr_t>(emulation::shared_memory());
    uint8_t array = 0;
    if (address - shared < emulation::kMostSharedBytes) {
        array = kShared;
    } else {
        const auto& arrays = result.arrays;
        while (array < arrays.size() && (address < arrays[array].begin || address >= arrays[array].end)) array++;
        if (array == arrays.size()) return;  // a thread's own memory
    }
    if (blockIdx.x != block.number) {
        count_block();
        block.number = blockIdx.x;
    }
    const uint16_t thread = static_cast<uint16_t>(threadIdx.x);
    if (block.times.size() <= thread) block.times.resize(blockDim.x);
    if (copy && !store) code = static_cast<const char*>(code) + 1;  // a place of its own
    const auto [found, is_new] = block.places.emplace(code, static_cast<uint16_t>(block.places.size()));
    const uint16_t place = found->second;
    if (is_new) {
        block.code.push_back(code);
        block.occurrences.emplace_back();
    }
    auto& of_place = block.occurrences[place];
    if (of_place.size() <= thread) of_place.resize(blockDim.x);
    block.accesses.push_back({address, block.times[thread]++, of_place[thread]++, place, thread,
                              static_cast<uint8_t>(bytes), array, store, copy});
}

}  // namespace

Trace& trace() { return result; }

void finish() { count_block(); }

}  // namespace carafepp::trace

using carafepp::trace::record;

extern "C" {
// emulation.cpp calls them.
void carafepp_trace_copy(const void* shared, const void* global, size_t bytes, size_t bytes_read, const void* code) {
    if (bytes_read > 0) record(global, bytes_read, false, code, true);
    record(shared, bytes, true, code, true);
}
// A row of a box. It passes by the L1, and no lane asks for it.
void carafepp_trace_row(const void* global, size_t bytes_read, size_t bytes) {
    using namespace carafepp::trace;
    const int64_t wavefronts = static_cast<int64_t>(bytes + kLineBytes - 1) / kLineBytes;
    result.shared.wavefronts += wavefronts;
    result.shared.fewest_wavefronts += wavefronts;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(global);
    for (Array& array : result.arrays) {
        if (bytes_read == 0 || begin < array.begin || begin >= array.end) continue;
        Counts& of = array.counts;
        const uintptr_t sectors = (begin + bytes_read - 1) / kSectorBytes - begin / kSectorBytes + 1;
        of.loads++;
        of.loaded_bytes += static_cast<int64_t>(bytes_read);
        of.load_sectors += static_cast<int64_t>(sectors);
        for (int64_t& of_size : of.l2_sectors) of_size += static_cast<int64_t>(sectors);
    }
}
void carafepp_trace_load(const void* shared, size_t bytes, const void* code) { record(shared, bytes, false, code); }

// The functions that -fsanitize=thread calls.
#define CARAFEPP_HOOKS(bytes)                                                                                        \
    void __tsan_read##bytes(void* address) { record(address, bytes, false, __builtin_return_address(0)); }           \
    void __tsan_write##bytes(void* address) { record(address, bytes, true, __builtin_return_address(0)); }           \
    void __tsan_unaligned_read##bytes(void* address) { record(address, bytes, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##bytes(void* address) { record(address, bytes, true, __builtin_return_address(0)); }
CARAFEPP_HOOKS(1)
CARAFEPP_HOOKS(2)
CARAFEPP_HOOKS(4)
CARAFEPP_HOOKS(8)
CARAFEPP_HOOKS(16)
void __tsan_read_range(void* address, unsigned long bytes) {
    record(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
    record(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
}
