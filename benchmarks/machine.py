"""The machine's peaks, measured once in a run by a few lines of C: arithmetic, copies and exp.

Arithmetic: independent fused multiply-adds in registers, on the widest vectors. Copies of several
sizes: bytes read plus bytes written, by memcpy or by non-temporal stores, whichever is faster.
Exponentials: by the C library (glibc's libmvec) or by NumPy, whichever is faster. The array is in
the level 1 cache.
"""

import ctypes
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

TRAFFIC = [1 << exponent for exponent in range(18, 29, 2)]  # bytes read plus written by a copy
_SAMPLE = 10e-3  # seconds
_SAMPLES = 9

_SOURCE = r"""
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float v __attribute__((vector_size(BYTES)));

#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define BEGIN(j) v a##j = x + (float)j;
#define STEP(j) a##j = a##j * x + y;
#define SUM(j) + a##j[0]

const long flops = 12 * 2 * BYTES / 4;  /* of one round */

float multiply_add(long rounds, float factor, float summand) {
    const v zero = {0}, x = zero + factor, y = zero + summand;
    EACH(BEGIN)
    for (; rounds > 0; rounds--) { EACH(STEP) }
    return 0 EACH(SUM);
}

void copy(float* to, const float* from, long floats, long rounds) {
    for (; rounds > 0; rounds--) memcpy(to, from, floats * sizeof *to);
}

void copy_non_temporal(float* to, const float* from, long floats, long rounds) {
    for (; rounds > 0; rounds--) {
#if defined(__AVX__)
        for (long k = 0; k < floats; k += 8) _mm256_stream_ps(to + k, _mm256_load_ps(from + k));
#else
        memcpy(to, from, floats * sizeof *to);
#endif
    }
}

#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__clang__)
__attribute__((simd("notinbranch")))
#endif
float expf(float);

void exponentials(float* restrict to, const float* restrict from, long floats, long rounds) {
    for (; rounds > 0; rounds--) {
        for (long k = 0; k < floats; k++) to[k] = expf(from[k]);
        __asm__ volatile("" ::: "memory");  /* the compiler keeps every round */
    }
}
"""


@dataclass
class Peaks:
    """Peaks of some threads: float32 operations a second; bytes a second for each copy size.

    `exponentials` is how many one thread computes in a second.
    """

    threads: int
    flops: float
    copy: dict[int, float]
    exponentials: float

    def __str__(self) -> str:  # noqa: D105
        rates = [f"{size / 2**20:.3g} MiB {rate / 1e9:.0f}" for size, rate in self.copy.items()]
        return (
            f"FMA in registers {self.flops / 1e9:.0f} GFLOP/s; exp "
            f"{self.exponentials / 1e9:.2f} G/s; copy, GB/s read plus written: {', '.join(rates)}"
        )

    def peak(self, dtype: str) -> float:
        """Return the operations a second in registers.

        float64 has half the lanes of float32; sums of 16-bit arrays are float32.
        """
        return self.flops / (2 if dtype == "float64" else 1)

    def ceiling(self, flops: int, traffic: int, dtype: str) -> float:
        """Return the operations a second that the roofline allows."""
        nearest = min(self.copy, key=lambda size: abs(math.log(size / traffic)))
        return min(self.peak(dtype), flops * self.copy[nearest] / traffic)


def measure(threads: list[int]) -> dict[int, Peaks]:
    """Return the peaks for each number of threads."""
    code = _compile()
    exponentials = _exponentials(code)
    return {
        count: Peaks(
            count,
            _flops(code, count),
            {size: _copy(code, size, count) for size in TRAFFIC},
            exponentials,
        )
        for count in threads
    }


def _compile() -> ctypes.CDLL:
    """Compile and load the C code above."""
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peaks.so")
        options = ["-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno"]
        options += ["-x", "c", "-", "-o", str(library), "-lm"]
        try:
            subprocess.run([compiler, *options], input=_SOURCE.encode(), check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"[benchmarks] CC must name a C compiler, for the machine's peaks; got {error}."
            )
        code = ctypes.CDLL(str(library))
    code.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    code.multiply_add.restype = ctypes.c_float
    for function in (code.copy, code.copy_non_temporal, code.exponentials):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return code


def _best_rate(work: Callable[[int, int], object], amount: float, threads: int) -> float:
    """Return the best rate of `work(thread, rounds)`, in amounts a second.

    All threads together do `amount` in one round.
    """
    with ThreadPoolExecutor(threads) as pool:

        def run(rounds: int) -> float:
            begin = time.perf_counter()
            list(pool.map(work, range(threads), [rounds] * threads))
            return time.perf_counter() - begin

        rounds = 1
        while (duration := min(run(rounds) for _ in range(3))) < _SAMPLE / 2:
            rounds = math.ceil(rounds * min(100, _SAMPLE / duration))
        return max(rounds * amount / run(rounds) for _ in range(_SAMPLES))


def _flops(code: ctypes.CDLL, threads: int) -> float:
    amount = threads * ctypes.c_long.in_dll(code, "flops").value
    return _best_rate(lambda _, rounds: code.multiply_add(rounds, 0.999, 1e-4), amount, threads)


def _copy(code: ctypes.CDLL, traffic: int, threads: int) -> float:
    """Return the rate of copies, in bytes a second; each thread has its own arrays."""
    floats = traffic // threads // 8 // 16 * 16
    pairs = [(_aligned(floats), _aligned(floats)) for _ in range(threads)]

    def copy(function, thread: int, rounds: int) -> None:
        to, original = (array.ctypes.data for array in pairs[thread])
        function(to, original, floats, rounds)

    functions = [partial(copy, function) for function in (code.copy, code.copy_non_temporal)]
    return max(_best_rate(function, threads * floats * 8, threads) for function in functions)


def _exponentials(code: ctypes.CDLL) -> float:
    """Return the float32 exponentials that one thread computes in a second."""
    floats = 2048
    logits, result = _aligned(floats), _aligned(floats)

    def of_c(_: int, rounds: int) -> None:
        code.exponentials(result.ctypes.data, logits.ctypes.data, floats, rounds)

    def of_numpy(_: int, rounds: int) -> None:
        for _ in range(rounds):
            np.exp(logits, out=result)

    return max(_best_rate(function, floats, 1) for function in (of_c, of_numpy))


def _aligned(floats: int) -> np.ndarray:
    """Return float32 memory aligned to 64 bytes, with every page touched."""
    buffer = np.ones(floats + 16, np.float32)
    begin = -buffer.ctypes.data % 64 // 4
    return buffer[begin : begin + floats]
