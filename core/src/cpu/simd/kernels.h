// SPDX-License-Identifier: Apache-2.0
// The kernels that are compiled once for each instruction set, in a namespace of its name. Then the problems that each
// cannot run, and the problems for which another one is faster.
#pragma once

#include "cpu/geometry.h"
#include "cpu/isas.h"
#include "cpu/scratch.h"
#include "kernel.h"
#include "problem.h"

#define CARAFEPP_KERNELS_OF(isa, supported, unsupported, a, b)                                        \
    namespace isa {                                                                                   \
    void reassemble_few_nchw(const Problem& problem, const Array& output);                            \
    void grad_features_few_nchw(const Problem& problem, const Array& grad_features);                  \
    void grad_masks_few_nchw(const Problem& problem, const Array& grad_masks);                        \
    bool grads_few_nchw(const Problem& problem, const Array& grad_features, const Array& grad_masks); \
    bool grads_few_nhwc(const Problem& problem, const Array& grad_features, const Array& grad_masks); \
    void reassemble_nhwc(const Problem& problem, const Array& output);                                \
    void reassemble_nchw(const Problem& problem, const Array& output);                                \
    void grad_features_nhwc(const Problem& problem, const Array& grad_features);                      \
    void grad_masks_nhwc(const Problem& problem, const Array& grad_masks);                            \
    void grad_features_nchw(const Problem& problem, const Array& grad_features);                      \
    void grad_masks_nchw(const Problem& problem, const Array& grad_masks);                            \
    void reassemble_any(const Problem& problem, const Array& output);                                 \
    void reassemble_runs_any(const Problem& problem, const Array& output);                            \
    void grad_features_any(const Problem& problem, const Array& grad_features);                       \
    void grad_masks_any(const Problem& problem, const Array& grad_masks);                             \
    void reassemble_few_nhwc(const Problem& problem, const Array& output);                            \
    void grad_features_few_nhwc(const Problem& problem, const Array& grad_features);                  \
    void grad_masks_few_nhwc(const Problem& problem, const Array& grad_masks);                        \
    void phases_nhwc(const Problem& problem, const Array& result, Result kind);                       \
    void normalize_masks(const Problem& problem, const Array& masks);                                 \
    void normalize_masks_backward(const Problem& problem, const Array& grad_logits);                  \
    }

namespace carafepp {

CARAFEPP_ISAS(CARAFEPP_KERNELS_OF, , )

// Scratch of a thread that stages images: for the features and outputs of one, and for its kernel.
constexpr int64_t kImageBytes = kScratchBytes / 2, kImageScratchBytes = kScratchBytes - kImageBytes;

// Columns of outputs of a block of the kernels for few channels from masks, about.
constexpr int64_t kFewColumns = 1024;

// The kernel for runs stages a cache line of channels together, and needs some columns of outputs. Its outputs share
// features if K is 5, or 7 as in most involutions, and down is at most 2. It reads masks of K=7 where they are.
constexpr int kRunChannels = 16, kFewestRunColumns = 4;

bool shares_windows(const Problem& problem);
bool reads_masks_in_place(const Problem& problem);

// Sources of a register tile of grad_features_nhwc, at most: with 32 vector registers.
constexpr int kMostSourceRows = 3, kMostSourceColumns = 4;

// Channels staged for an image at once: a multiple of every vector length.
int64_t channels_of_image(const Problem& problem);

// Tells if a kernel writes all rows of a cell together: the gradients of its logits, if they are adjacent.
inline bool takes_whole_cells(const Problem& problem, const Array& grad_masks) {
    return problem.from_logits && grad_masks.stride_c == 1;
}

// Tells if lanes of a kernel for few channels are outputs of a cell, and not channels. They are in convex upsampling by
// a multiple of 4. A cell has at least so many outputs, and a group at most so many channels.
constexpr int kFewestPhases = 16, kPhaseChannels = 4;
bool phases_in_lanes(const Problem& problem);

// Why the kernel of that name cannot run a problem, or NULL.
const char* cannot_run_reassemble_few_nchw(const Problem& problem, const Array& output);
const char* cannot_run_grad_features_few_nchw(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_masks_few_nchw(const Problem& problem, const Array& grad_masks);
const char* cannot_run_reassemble_nhwc(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_nchw(const Problem& problem, const Array& output);
const char* cannot_run_grad_features_nhwc(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_masks_nhwc(const Problem& problem, const Array& grad_masks);
const char* cannot_run_grad_features_nchw(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_masks_nchw(const Problem& problem, const Array& grad_masks);
const char* cannot_run_reassemble_any(const Problem& problem, const Array& output);
const char* cannot_run_reassemble_runs_any(const Problem& problem, const Array& output);
const char* cannot_run_grad_features_any(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_masks_any(const Problem& problem, const Array& grad_masks);
const char* cannot_run_reassemble_few_nhwc(const Problem& problem, const Array& output);
const char* cannot_run_grad_features_few_nhwc(const Problem& problem, const Array& grad_features);
const char* cannot_run_grad_masks_few_nhwc(const Problem& problem, const Array& grad_masks);
const char* cannot_run_normalize_masks(const Problem& problem, const Array& masks);
const char* cannot_run_normalize_masks_backward(const Problem& problem, const Array& grad_logits);

// Why another kernel that can run a problem is faster than the one of that name, or NULL.
const char* slower_reassemble_few_nchw(const Problem& problem, const Array& output);
const char* slower_grad_features_few_nchw(const Problem& problem, const Array& grad_features);
const char* slower_grad_masks_few_nchw(const Problem& problem, const Array& grad_masks);
const char* slower_reassemble_nhwc(const Problem& problem, const Array& output);
const char* slower_reassemble_nchw(const Problem& problem, const Array& output);
const char* slower_grad_features_nhwc(const Problem& problem, const Array& grad_features);
const char* slower_grad_masks_nhwc(const Problem& problem, const Array& grad_masks);
const char* slower_grad_features_nchw(const Problem& problem, const Array& grad_features);
const char* slower_grad_masks_nchw(const Problem& problem, const Array& grad_masks);
const char* slower_reassemble_any(const Problem& problem, const Array& output);
const char* slower_reassemble_runs_any(const Problem& problem, const Array& output, Isa isa);
const char* slower_grad_features_any(const Problem& problem, const Array& grad_features);
const char* slower_grad_masks_any(const Problem& problem, const Array& grad_masks);
const char* slower_reassemble_few_nhwc(const Problem& problem, const Array& output);
const char* slower_grad_features_few_nhwc(const Problem& problem, const Array& grad_features);
const char* slower_grad_masks_few_nhwc(const Problem& problem, const Array& grad_masks);
const char* slower_normalize_masks(const Problem& problem, const Array& masks);
const char* slower_normalize_masks_backward(const Problem& problem, const Array& grad_logits);

}  // namespace carafepp
