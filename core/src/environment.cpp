// SPDX-License-Identifier: Apache-2.0
#include "environment.h"

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

#include "cpu/isas.h"

namespace carafepp {
namespace {

class Reader {
public:
    // The place of a variable's value among its values; 0 if it is not set, empty or wrong.
    int choice(const char* name, const std::vector<const char*>& values) {
        const char* text = std::getenv(name);
        if (text == nullptr || *text == '\0') return 0;
        for (size_t k = 0; k < values.size(); k++) {
            if (std::strcmp(text, values[k]) == 0) return static_cast<int>(k);
        }
        std::string rule = values.front();
        for (size_t k = 1; k < values.size(); k++)
            rule += std::string(k + 1 < values.size() ? ", " : " or ") + values[k];
        refuse(name, rule, text);
        return 0;
    }

    // A variable's value from 1 to `most`, in decimal digits; 0 if it is not set, empty or wrong.
    int number(const char* name, int most) {
        const char* text = std::getenv(name);
        if (text == nullptr || *text == '\0') return 0;
        int value = 0;
        const char* end = text + std::strlen(text);
        const auto [read_to, error] = std::from_chars(text, end, value);
        if (error == std::errc() && read_to == end && value >= 1 && value <= most) return value;
        refuse(name, "a whole number from 1 to " + std::to_string(most), text);
        return 0;
    }

    std::string wrong;

private:
    void refuse(const char* name, const std::string& rule, const char* text) {
        if (!wrong.empty()) return;
        const std::string got = std::string(text).substr(0, 64);
        wrong = std::string("the environment variable ") + name + " must be " + rule + "; got " + got + ".";
    }
};

Environment read() {
    Reader reader;
    Environment found;
    found.isa = reader.choice("CARAFEPP_ISA", {std::begin(kIsaNames), std::end(kIsaNames)});
    found.threads = reader.number("CARAFEPP_NUM_THREADS", kMaxThreads);
    found.only_generic = reader.choice("CARAFEPP_CUDA_KERNELS", {"all", "generic"}) == 1;
    found.log = reader.choice("CARAFEPP_LOG", {"off", "debug"}) == 1;
    found.wrong = reader.wrong;
    return found;
}

}  // namespace

const Environment& environment() {
    static const Environment of_process = read();
    return of_process;
}

}  // namespace carafepp
