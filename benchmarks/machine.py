"""The machine's peaks, by a few lines of C: arithmetic, copies and exponentials.

Arithmetic: independent fused multiply-adds in registers, on the widest vectors. Copies of several
sizes: bytes read plus bytes written, by memcpy or by non-temporal stores. Exponentials: by the C
library (glibc's libmvec) or by NumPy; the array is in the level 1 cache. A first try chooses the
faster of two ways.

Peaks take turns with the calls that they limit, by the same clock. So what slows both leaves their
ratio.
"""

import ctypes
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from . import timing
from .problems import aligned
from .timing import Candidate

TRAFFIC = [1 << exponent for exponent in range(18, 29, 2)]  # bytes read plus written by a copy
_CALL = 2e-3  # seconds; a call repeats its work at least so long

_EXPONENTIALS = 2048  # of one round

Work = Callable[[int, int], None]  # of a thread, so many rounds

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
        return min(self.peak(dtype), flops * self.copy[_nearest(traffic)] / traffic)


class Machine:
    """The code that computes the peaks, compiled once."""

    def __init__(self) -> None:
        self._code = _compile()

    def limits(self, calls: Iterable[tuple[int, int]]) -> list[Candidate]:
        """Return candidates for the peaks of calls, each given by its threads and its bytes."""
        sizes: dict[int, set[int]] = {}
        for threads, traffic in calls:
            sizes.setdefault(threads, set()).add(_nearest(traffic))
        found = [_fastest("exponentials", self._exponentials(), _EXPONENTIALS, 1)]
        for threads in sorted(sizes):
            flops = threads * ctypes.c_long.in_dll(self._code, "flops").value
            found.append(_fastest("flops", [self._multiply_add], flops, threads))
            for size in sorted(sizes[threads]):
                limit = _fastest("copy", self._copies(size, threads), size, threads)
                limit.labels["size"] = size
                found.append(limit)
        return found

    def _multiply_add(self, thread: int, rounds: int) -> None:
        self._code.multiply_add(rounds, 0.999, 1e-4)

    def _copies(self, traffic: int, threads: int) -> list[Work]:
        """Return two ways to copy; each thread has its own arrays."""
        floats = traffic // threads // 8 // 16 * 16
        pairs = [(_filled(floats), _filled(floats)) for _ in range(threads)]

        def copy(function: Callable[..., None], thread: int, rounds: int) -> None:
            to, original = (array.ctypes.data for array in pairs[thread])
            function(to, original, floats, rounds)

        return [partial(copy, way) for way in (self._code.copy, self._code.copy_non_temporal)]

    def _exponentials(self) -> list[Work]:
        """Return two ways to compute exponentials."""
        logits, result = _filled(_EXPONENTIALS), _filled(_EXPONENTIALS)

        def of_c(_: int, rounds: int) -> None:
            self._code.exponentials(result.ctypes.data, logits.ctypes.data, logits.size, rounds)

        def of_numpy(_: int, rounds: int) -> None:
            for _ in range(rounds):
                np.exp(logits, out=result)

        return [of_c, of_numpy]


def peaks(limits: list[Candidate]) -> dict[int, Peaks]:
    """Return the peaks for each number of threads, from the times of their candidates."""
    found: dict[int, Peaks] = {}
    exponentials = _rate(limits[0])
    for limit in limits[1:]:
        if limit.name == "flops":
            found[limit.threads] = Peaks(limit.threads, _rate(limit), {}, exponentials)
        else:
            found[limit.threads].copy[limit.labels["size"]] = _rate(limit)
    return found


def _rate(limit: Candidate) -> float:
    """Return the amounts that a candidate does in a second."""
    return limit.labels["amount"] / limit.row()["seconds"]


def _nearest(traffic: int) -> int:
    """Return the size of a copy that stands for so many bytes."""
    return min(TRAFFIC, key=lambda size: abs(math.log(size / traffic)))


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


def _fastest(name: str, ways: list[Work], amount: int, threads: int) -> Candidate:
    """Return a candidate that works in the way that is the fastest now.

    All threads together do `amount` in one round.
    """
    found, clock = [], timing.clock(threads)
    for work in ways:
        pool = ThreadPoolExecutor(threads)

        def call(rounds: int, work: Work = work, pool: ThreadPoolExecutor = pool) -> None:
            list(pool.map(work, range(threads), [rounds] * threads))

        rounds = 1
        while (seconds := min(clock(partial(call, rounds)) for _ in range(3))) < _CALL:
            rounds = math.ceil(rounds * min(100, 1.2 * _CALL / seconds))
        labels = {"kind": "limit", "amount": rounds * amount}
        found.append(
            (seconds / rounds, Candidate(name, partial(call, rounds), threads, labels=labels))
        )
    return min(found, key=lambda one: one[0])[1]


def _filled(floats: int) -> np.ndarray:
    """Return float32 memory that begins at a cache line, with every page touched."""
    return aligned(np.ones(floats, np.float32))
