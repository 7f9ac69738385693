// SPDX-License-Identifier: Apache-2.0
// CUDA's devices. A build without CUDA has no_cuda.cpp in the place of device.cu.
#pragma once

#include <string>

#include "problem.h"

namespace carafepp::cuda {

// CARAFEPP_OK, or the status and the reason: CUDA is not built, or finds no driver or device.
struct Availability {
    carafepp_status status;
    std::string reason;
};
Availability availability();

// The build, as the value of carafepp_config's line "CUDA".
const char* description();

// The text of carafepp_devices. It asks the driver and the runtime, but makes no context.
std::string devices();

// A refusal of CUDA, with its name and text.
struct Failure {
    std::string text;
};

// Makes a device current, and at its end the caller's again.
class CurrentDevice {
public:
    explicit CurrentDevice(int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice&) = delete;

private:
    [[maybe_unused]] int callers_ = 0, device_ = 0;  // not in no_cuda.cpp
};

}  // namespace carafepp::cuda
