/* SPDX-License-Identifier: Apache-2.0
 *
 * libcarafepp: CARAFE++, content-aware reassembly of features in two dimensions, over raw device pointers.
 *
 * Source: J. Wang, K. Chen, R. Xu, Z. Liu, C. C. Loy, D. Lin, "CARAFE++: Unified Content-Aware ReAssembly of FEatures",
 * arXiv:2012.04733, sections 3.1 to 3.3. Equation (3) of the paper, for any rational factor up/down:
 *
 *     output[n,c,i',j'] = sum over a,b in [-r, r] of
 *         masks[n, g(c)*K*K + (a+r)*K + (b+r), i', j'] * features[n, c, src(i')+a, src(j')+b]
 *
 *     K = kernel_size, r = K/2 rounded down, g(c) = c / (C/groups) rounded down,
 *     src(i') = (i'*down/up rounded down) + r - padding.
 *
 *          Features are 0 outside their borders. Such a tap contributes exactly 0, whatever its mask: masks are not
 *          normalised again.
 *
 *          "masks" are normalised reassembly kernels: K*K weights for every output pixel. "logits" are what the
 *          content encoder predicts, before the kernel normaliser. Channel (g*K*K + t)*up*up + dy*up + dx of logits
 *          is tap t of the output pixel at the sub-pixel (dy, dx) of a source pixel: the order of pixel shuffle.
 *
 * Padding: padding is how many rows or columns of zeros count as features beyond each border, as in a convolution.
 *          The default is r. For less, set the flag CARAFEPP_PADDING, and params.padding to the numbers of rows and of
 *          columns, from 0 to r. With 0 all windows lie inside the features. So you can pad features yourself, by
 *          reflection for example. Or give a tile with a halo of r rows and columns on each side. If the tile begins
 *          at multiples of down, its output is exactly its part of the whole.
 *
 * Sizes:   H' = ceil(h*up/down), W' = ceil(w*up/down) are natural, with h = max(0, H + 2*padding - 2*r), w likewise.
 *          CARAFEPP_SIZE asks for smaller ones: a crop at the bottom and right.
 *          Hl = ceil(h/down), Wl = ceil(w/down). With the default padding h = H and w = W.
 *          K is odd, 1 <= K <= 31; groups divides C. up and down are taken as given, not reduced.
 *          Any size is legal, from 0 to beyond 2^31 elements.
 *
 * Types:   features, output and grad_output share one dtype. masks, logits, grad_masks and grad_logits have that
 *          dtype or, with features of 16 bits, float32. The CPU and CUDA, in a build with it, compute:
 *
 *          storage                sums in
 *          float32                float32
 *          float64                float64
 *          float16, bfloat16      float32
 *
 * Memory:  Tensors may have any strides: negative ones too, and inputs zero ones. Data must be aligned to its element.
 *          A result must not overlap itself, another result or an input. Slices of one buffer that interleave without
 *          sharing an element are fine. Every element of a result is written; what no term reaches is exactly 0.
 *          Nothing is written when a check fails. The library allocates no device memory, and on the CPU at most
 *          2 MB of scratch a thread.
 *
 * Order:   Each element of a result is summed in a fixed order. The bits are the same at every run and thread count.
 *          NaN and Inf propagate by the formula.
 *
 * Threads: All functions may be called from several threads at once. A forked child may go on calling.
 *
 * Kernels: The best kernels for the processor run. The environment variable CARAFEPP_ISA caps them at an instruction
 *          set: avx512, avx2 or sse2 on x86-64, neon on aarch64. There are no kernels for sse2: it leaves the portable
 *          loops, as on a processor without AVX2. For CUDA arrays, CARAFEPP_CUDA_KERNELS=generic leaves only the
 *          generic kernels; all, the default, leaves the fast ones too.
 *
 *          CARAFEPP_NUM_THREADS is a whole number from 1 to 1024 (see carafepp_set_num_threads). CARAFEPP_LOG=debug
 *          prints the choice of kernels to stderr; off, the default, does not. These four variables are read once,
 *          when a call first needs one. If one has a wrong value, every call that computes fails with a sentence.
 *
 * Errors:  No exception leaves the library. It never aborts, and prints only when CARAFEPP_LOG=debug asks for it.
 *
 *          status                      Python exception       when
 *          CARAFEPP_OK                 -
 *          CARAFEPP_TYPE_ERROR         TypeError              a dtype
 *          CARAFEPP_VALUE_ERROR        ValueError             a shape, range, device, layout or overlap
 *          CARAFEPP_NOT_IMPLEMENTED    NotImplementedError    legal, not built
 *          CARAFEPP_RUNTIME_ERROR      RuntimeError           the device failed
 *          CARAFEPP_MEMORY_ERROR       MemoryError            no memory for scratch
 */
#ifndef CARAFEPP_CARAFEPP_H
#define CARAFEPP_CARAFEPP_H

#include <stddef.h>
#include <stdint.h>

/* Marks what the shared library exports; a DLL has a list of its exports. */
#if defined(__GNUC__) && !defined(_WIN32)
#define CARAFEPP_API __attribute__((visibility("default")))
#else
#define CARAFEPP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t carafepp_status;
enum {
    CARAFEPP_OK = 0,
    CARAFEPP_TYPE_ERROR = 1,
    CARAFEPP_VALUE_ERROR = 2,
    CARAFEPP_NOT_IMPLEMENTED = 3,
    CARAFEPP_RUNTIME_ERROR = 4,
    CARAFEPP_MEMORY_ERROR = 5
};

/* The numbers are DLPack's type code * 256 + bits: an error can name any DLPack dtype. */
typedef int32_t carafepp_dtype;
enum { CARAFEPP_FLOAT16 = 0x0210, CARAFEPP_FLOAT32 = 0x0220, CARAFEPP_FLOAT64 = 0x0240, CARAFEPP_BFLOAT16 = 0x0410 };

/* DLPack's device types. Pinned host memory counts as CPU, managed memory as CUDA. */
typedef int32_t carafepp_device;
enum { CARAFEPP_CPU = 1, CARAFEPP_CUDA = 2, CARAFEPP_CUDA_HOST = 3, CARAFEPP_CUDA_MANAGED = 13 };

/* Kernel normalisers (Table 14 of the paper), over the K*K taps of one output pixel. */
typedef int32_t carafepp_normalizer;
enum {
    CARAFEPP_SOFTMAX = 0,            /* exp(l - max l) / sum; all -inf gives NaN */
    CARAFEPP_SIGMOID = 1,            /* 1 / (1 + exp(-l)) */
    CARAFEPP_SIGMOID_NORMALIZED = 2, /* sigmoid / its sum, computed as softmax(log(sigmoid(l))): never 0/0 */
    CARAFEPP_NONE = 3                /* the logits themselves */
};

/* Bits of carafepp_params.flags. */
enum {
    CARAFEPP_CHANNELS_LAST = 1, /* the axes of every tensor are N, H, W, C; strides alone tell how it lies in memory */
    CARAFEPP_SIZE = 2,          /* params.size holds the output size; otherwise it is the natural one */
    CARAFEPP_PADDING = 4,       /* params.padding holds the padding; otherwise it is kernel_size/2 */
    CARAFEPP_FASTEST = 8 /* in a list of implementations the slower ones decline too; calls run the fastest anyway */
};

/* The functions below, for carafepp_output_shape and carafepp_list_implementations. */
typedef int32_t carafepp_function;
enum {
    CARAFEPP_OUTPUT_SIZE = 0, /* as CARAFEPP_REASSEMBLE, for carafepp_output_shape alone */
    CARAFEPP_REASSEMBLE = 1,
    CARAFEPP_REASSEMBLE_BACKWARD = 2,
    CARAFEPP_REASSEMBLE_WITH_LOGITS = 3,
    CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD = 4,
    CARAFEPP_NORMALIZE_MASKS = 5,
    CARAFEPP_NORMALIZE_MASKS_BACKWARD = 6
};

/* A strided array that somebody else owns: N, C, H, W, or with CARAFEPP_CHANNELS_LAST N, H, W, C. Without N if ndim is
 * 3: one image; then all tensors of a call have three axes. Entries of shape and strides from ndim on are not read. */
typedef struct carafepp_tensor {
    void* data; /* the element at index 0, 0, 0, 0; may be NULL where there are no elements */
    carafepp_dtype dtype;
    carafepp_device device;
    int32_t device_index;
    int32_t ndim; /* 4 or 3 */
    int64_t shape[5];
    int64_t strides[5]; /* in elements */
} carafepp_tensor;

/* Set struct_size to sizeof(carafepp_params), and everything else that is not used to 0. A smaller struct_size is
 * accepted from that of version 1 on; the missing fields read as 0. A larger one is accepted if its tail is 0. */
typedef struct carafepp_params {
    size_t struct_size;
    int32_t up, down;               /* at least 1 */
    int32_t kernel_size;            /* odd, 1 to 31; where masks are given also 0: sqrt(channels of masks / groups) */
    int32_t groups;                 /* at least 1 */
    carafepp_normalizer normalizer; /* read by the functions of logits */
    uint32_t flags;
    const char* implementation; /* NULL: the best. Else the name of a listed one, forced for what it gives */
    int64_t size[2];            /* H', W', with CARAFEPP_SIZE */
    int64_t padding[2];         /* rows, columns, with CARAFEPP_PADDING: for functions that read features */
    int64_t reserved[2];        /* 0 */
} carafepp_params;

/* `stream` is a cudaStream_t for CUDA tensors; NULL is the legacy default stream. The call does not wait for the work.
 * For CPU tensors it is ignored, and the call returns when the work is done.
 *
 * carafepp_reassemble: the formula above.
 *
 *     features  (N, C, H, W)                      in
 *     masks     (N, groups*K*K, H', W')           in
 *     output    (N, C, H', W')                    out
 */
CARAFEPP_API carafepp_status carafepp_reassemble(const carafepp_params* params, const carafepp_tensor* features,
                                                 const carafepp_tensor* masks, const carafepp_tensor* output,
                                                 void* stream);

/* Both gradients of carafepp_reassemble, each in gather form. A NULL result is not computed. The size is that of masks.
 *
 *     grad_masks[n, g*K*K+t, i', j'] = sum over c in group g of
 *         grad_output[n,c,i',j'] * features[n,c,src(i')+a_t,src(j')+b_t]
 *     grad_features[n,c,i,j] = sum over (i',j',a,b) with src(i')+a = i, src(j')+b = j of
 *         grad_output[n,c,i',j'] * masks[n, g(c)*K*K + (a+r)*K + (b+r), i', j']
 *
 *     grad_output    (N, C, H', W')               in
 *     features       (N, C, H, W)                 in
 *     masks          (N, groups*K*K, H', W')      in
 *     grad_features  (N, C, H, W) or NULL         out, dtype of features
 *     grad_masks     (N, groups*K*K, H', W') or NULL    out, dtype of masks
 */
CARAFEPP_API carafepp_status carafepp_reassemble_backward(const carafepp_params* params,
                                                          const carafepp_tensor* grad_output,
                                                          const carafepp_tensor* features, const carafepp_tensor* masks,
                                                          const carafepp_tensor* grad_features,
                                                          const carafepp_tensor* grad_masks, void* stream);

/* carafepp_reassemble with masks = normalizer(pixel_shuffle(logits, up)), cropped to H', W'. One pass computes it:
 * masks are never stored.
 *
 *     features  (N, C, H, W)                      in
 *     logits    (N, groups*K*K*up*up, Hl, Wl)     in
 *     output    (N, C, H', W')                    out
 */
CARAFEPP_API carafepp_status carafepp_reassemble_with_logits(const carafepp_params* params,
                                                             const carafepp_tensor* features,
                                                             const carafepp_tensor* logits,
                                                             const carafepp_tensor* output, void* stream);

/* Both gradients of carafepp_reassemble_with_logits. The masks are computed again. A NULL result is not computed. The
 * size is that of grad_output, at most the natural one. Logits outside the crop get gradient 0.
 *
 *     grad_output    (N, C, H', W')               in
 *     features       (N, C, H, W)                 in
 *     logits         (N, groups*K*K*up*up, Hl, Wl)            in
 *     grad_features  (N, C, H, W) or NULL         out, dtype of features
 *     grad_logits    (N, groups*K*K*up*up, Hl, Wl) or NULL    out, dtype of logits
 */
CARAFEPP_API carafepp_status carafepp_reassemble_with_logits_backward(const carafepp_params* params,
                                                                      const carafepp_tensor* grad_output,
                                                                      const carafepp_tensor* features,
                                                                      const carafepp_tensor* logits,
                                                                      const carafepp_tensor* grad_features,
                                                                      const carafepp_tensor* grad_logits, void* stream);

/* masks = normalizer(pixel_shuffle(logits, up)), cropped to the size. params.down is not used. masks have the dtype of
 * logits.
 *
 *     logits  (N, groups*K*K*up*up, Hl, Wl)       in
 *     masks   (N, groups*K*K, H', W')             out; natural size (Hl*up, Wl*up), or params.size
 */
CARAFEPP_API carafepp_status carafepp_normalize_masks(const carafepp_params* params, const carafepp_tensor* logits,
                                                      const carafepp_tensor* masks, void* stream);

/* The gradient of carafepp_normalize_masks. The size is that of grad_masks. Logits outside the crop get gradient 0.
 *
 *     grad_masks   (N, groups*K*K, H', W')        in, dtype of logits
 *     logits       (N, groups*K*K*up*up, Hl, Wl)  in
 *     grad_logits  as logits                      out
 */
CARAFEPP_API carafepp_status carafepp_normalize_masks_backward(const carafepp_params* params,
                                                               const carafepp_tensor* grad_masks,
                                                               const carafepp_tensor* logits,
                                                               const carafepp_tensor* grad_logits, void* stream);

/* The shape of the output or masks that a forward `function` gives for its first input: features, or logits for
 * CARAFEPP_NORMALIZE_MASKS. Only ndim and shape of `input` are read. With CARAFEPP_PADDING the size depends on
 * kernel_size, which must be given. `shape` gets input->ndim numbers, in the axes of `input`. */
CARAFEPP_API carafepp_status carafepp_output_shape(const carafepp_params* params, carafepp_function function,
                                                   const carafepp_tensor* input, int64_t* shape);

/* What carafepp_list_implementations calls. */
typedef void (*carafepp_visit)(void* user, const char* name, const char* declines);

/* Calls visit(user, name, declines) for every implementation of `function`, in the order of preference. `declines` is
 * NULL for one that can run the problem, else the reason. One that can run, runs if it is forced. Otherwise the first
 * that can runs, without those that are slower here: CARAFEPP_LOG=debug tells which. With CARAFEPP_FASTEST these
 * decline too, so that the first without a reason runs. For a backward there may be implementations of both gradients.
 * They come first, and run only where both are wanted. `tensors` are those of the function in the order of its
 * signature. Results may be NULL while they are not known: they count as contiguous, with adjacent channels where
 * features, or masks or logits, have them. Strings live until visit returns. Names follow one grammar:
 *     <result>[_<factor>|_few|_runs]_<layout>[_mma]_<target>
 *     result: reassemble, reassemble_with_logits, grad_features, grad_masks, grad_logits, normalize_masks,
 *             normalize_masks_backward, backward (both gradients)
 *     factor: up1 (up = down = 1), up2 or down2, of a kernel for that factor alone; down, for all whole factors
 *     few:    of a kernel for few channels in a group
 *     runs:   of a kernel for runs of neighbouring outputs, each centred on a source of its own
 *     layout: nchw (adjacent columns share a vector), nhwc (adjacent channels do), any (any strides)
 *     mma:    by tensor cores
 *     target: ref (portable loops), avx2, avx512, neon, generic or cuda */
CARAFEPP_API carafepp_status carafepp_list_implementations(const carafepp_params* params, carafepp_function function,
                                                           const carafepp_tensor* const* tensors, carafepp_visit visit,
                                                           void* user);

/* The sentence of this thread's last failed call: "[function] argument must <rule> = <numbers>; got <numbers>. <hint>"
 * There is a hint if the inputs fit with another parameter, dtype, layout or order, or another function. The check
 * accepts the inputs with that change. */
CARAFEPP_API const char* carafepp_last_error(void);

CARAFEPP_API const char* carafepp_version(void); /* "major.minor.patch" */
CARAFEPP_API int carafepp_abi_version(void);     /* 1 */
CARAFEPP_API const char* carafepp_config(void);  /* lines "key: value": version, compiler, instruction sets, CUDA */

/* The line "CUDA devices: ..." with the driver, and each device with its compute capability; or why there is none. ""
 * in a build without CUDA. It makes no CUDA context, but initialises the driver: a child that is forked afterwards
 * cannot use CUDA. The string lives until this thread calls it again. */
CARAFEPP_API const char* carafepp_devices(void);

/* Threads that one call may use on the CPU, 1024 at most. At first they are CARAFEPP_NUM_THREADS, or else the cores
 * that the process may use; a number below 1 goes back to that. No thread starts before a call has work for it. */
CARAFEPP_API void carafepp_set_num_threads(int threads);
CARAFEPP_API int carafepp_get_num_threads(void);

#ifdef __cplusplus
}
#endif
#endif
