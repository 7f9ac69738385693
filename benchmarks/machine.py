"""The limits of the machine, measured in the same run: arithmetic and memory.

Arithmetic: independent fused multiply-adds in registers, for each vector width that the processor
has, by a few lines of C that are compiled on the spot; without a compiler the speed of a matrix
product that stays in the cache stands in for it, and is called that. Memory: the better of an
ordinary copy and one with non-temporal stores, bytes read plus bytes written, for several sizes.
"""

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

TRAFFIC = [1 << exponent for exponent in range(18, 29, 2)]  # bytes read plus written by a copy
# Bytes of a vector, by the end of an implementation's name.
WIDTHS = {"avx512": 64, "avx2": 32, "sse2": 16, "neon": 16}

_SAMPLE = 10e-3  # seconds
_SAMPLES = 9

_SOURCE = r"""
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define BEGIN(j) v a##j = x + (float)j;
#define STEP(j) a##j = a##j * x + y;
#define SUM(j) + a##j[0]
#define FMA(BYTES)                                                   \
    float fma##BYTES(long rounds, float factor, float summand) {     \
        typedef float v __attribute__((vector_size(BYTES)));         \
        const v zero = {0}, x = zero + factor, y = zero + summand;   \
        EACH(BEGIN)                                                  \
        for (long round = 0; round < rounds; round++) { EACH(STEP) } \
        return 0 EACH(SUM);                                          \
    }
FMA(16)
FMA(32)
FMA(64)

void copy(float* to, const float* from, long floats, long rounds) {
    for (; rounds > 0; rounds--) memcpy(to, from, floats * sizeof *to);
}

void copy_past_the_cache(float* to, const float* from, long floats, long rounds) {
    for (; rounds > 0; rounds--) {
#if defined(__AVX512F__)
        for (long k = 0; k < floats; k += 16) _mm512_stream_ps(to + k, _mm512_load_ps(from + k));
#elif defined(__AVX__)
        for (long k = 0; k < floats; k += 8) _mm256_stream_ps(to + k, _mm256_load_ps(from + k));
#else
        memcpy(to, from, floats * sizeof *to);
#endif
    }
}
"""
_OPERATIONS_A_LANE = 12 * 2  # in one round of the code above


@dataclass
class Limits:
    """What some number of threads can do.

    `peak` is in FLOP/s of float32 for each width of a vector in bytes (0: a matrix product);
    `copy` in bytes/s for each amount of traffic in bytes.
    """

    threads: int
    how: str
    peak: dict[int, float]
    copy: dict[int, float]

    def flops(self, name: str, dtype: str) -> float:
        """Return the peak for an implementation: that of its own vectors if its name tells them.

        float64 has half the lanes; 16-bit arrays are summed in float32.
        """
        widths = [width for isa, width in WIDTHS.items() if name.endswith(isa)]
        best = max(self.peak)
        width = widths[0] if widths and widths[0] in self.peak else best
        return self.peak[width] / (2 if dtype == "float64" else 1)

    def bandwidth(self, traffic: int) -> float:
        """Return that of the copy whose traffic is nearest in size."""
        return self.copy[min(self.copy, key=lambda size: abs(math.log(size / traffic)))]


def measure(threads: list[int]) -> dict[int, Limits]:
    """Return the limits for each number of threads."""
    code = _compile()
    return {count: _limits(code, count) for count in threads}


def vector_widths() -> list[int]:
    """Return the widths of vectors that the processor has, in bytes."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return [16] + [32] * ({"avx2", "fma"} <= flags) + [64] * ("avx512f" in flags)


def _compile() -> ctypes.CDLL | None:
    """Return the C code above, loaded, or None without a compiler."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", "cc"), "gcc"])), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "limits.c"), Path(folder, "limits.so")
        source.write_text(_SOURCE)
        options = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        done = subprocess.run([compiler, *options, str(source)], capture_output=True)
        if done.returncode:
            return None
        code = ctypes.CDLL(str(library))
    for width in (16, 32, 64):
        function = getattr(code, f"fma{width}")
        function.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
        function.restype = ctypes.c_float
    for function in (code.copy, code.copy_past_the_cache):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
        function.restype = None
    return code


def _limits(code: ctypes.CDLL | None, threads: int) -> Limits:
    copy = {traffic: _copy(code, traffic, threads) for traffic in TRAFFIC}
    if code is None:
        return Limits(threads, "matmul peak (no C compiler)", {0: _matmul(threads)}, copy)
    peak = {width: _fma(code, width, threads) for width in vector_widths()}
    return Limits(threads, "FMA in registers", peak, copy)


def _best_rate(work: Callable[[int, int], None], amount: float, threads: int) -> float:
    """Return the best of several rates of `work(thread, rounds)`, in amounts a second.

    `amount` is what all threads together do in one round.
    """
    with ThreadPoolExecutor(threads) as pool:
        run_all = map if threads == 1 else pool.map

        def run(rounds: int) -> float:
            begin = time.perf_counter()
            list(run_all(work, range(threads), [rounds] * threads))
            return time.perf_counter() - begin

        rounds = 1
        while (duration := min(run(rounds) for _ in range(3))) < _SAMPLE / 2:
            rounds = math.ceil(rounds * min(100, _SAMPLE / duration))
        return max(rounds * amount / run(rounds) for _ in range(_SAMPLES))


def _fma(code: ctypes.CDLL, width: int, threads: int) -> float:
    function = getattr(code, f"fma{width}")
    amount = threads * width // 4 * _OPERATIONS_A_LANE
    return _best_rate(lambda _, rounds: function(rounds, 0.999, 1e-4), amount, threads)


def _copy(code: ctypes.CDLL | None, traffic: int, threads: int) -> float:
    """Each thread copies its share between arrays of its own."""
    floats = traffic // threads // 8 // 16 * 16
    pairs = [(_aligned(floats), _aligned(floats)) for _ in range(threads)]
    amount = threads * floats * 8

    def by_numpy(thread: int, rounds: int) -> None:
        for _ in range(rounds):
            np.copyto(*pairs[thread])

    if code is None:
        return _best_rate(by_numpy, amount, threads)
    rates = []
    for function in (code.copy, code.copy_past_the_cache):

        def in_c(thread: int, rounds: int, function=function) -> None:
            to, source = (array.ctypes.data for array in pairs[thread])
            function(to, source, floats, rounds)

        rates.append(_best_rate(in_c, amount, threads))
    return max(rates)


def _aligned(floats: int) -> np.ndarray:
    """Return float32 memory at a multiple of 64 bytes; every page has been touched."""
    buffer = np.ones(floats + 16, np.float32)
    begin = -buffer.ctypes.data % 64 // 4
    return buffer[begin : begin + floats]


def _matmul(threads: int) -> float:
    """Return the speed of a product of two 384 x 384 matrices of float32, in FLOP/s.

    By PyTorch, or else by NumPy, with as many threads as its library takes.
    """
    n = 384
    a, b, out = (np.ones((n, n), np.float32) for _ in range(3))
    try:
        import torch
    except ImportError:
        multiply, around = partial(np.matmul, a, b, out=out), nullcontext()
    else:
        from .peers import settings

        a, b, out = map(torch.from_numpy, (a, b, out))
        multiply, around = partial(torch.mm, a, b, out=out), settings(threads)
    with around:
        return _best_rate(lambda _, rounds: [multiply() for _ in range(rounds)], 2 * n**3, 1)
