// SPDX-License-Identifier: Apache-2.0
// A harness of thirty lines for the tests in C++.
#pragma once

#include <cstdio>
#include <vector>

inline int failures_here = 0;

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            failures_here++;                                                      \
            std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                         \
    } while (false)

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

#define TEST(name)                                                      \
    void name();                                                        \
    const bool name##_added = (tests().push_back({#name, name}), true); \
    void name()

// The exit status: whether a test has failed.
inline int run_tests() {
    int passed = 0, failed = 0;
    for (const Test& test : tests()) {
        failures_here = 0;
        test.run();
        std::printf("%s %s\n", failures_here ? "FAILED" : "ok    ", test.name);
        std::fflush(stdout);
        (failures_here ? failed : passed)++;
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
