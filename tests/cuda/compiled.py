"""Compile every CUDA source for some architectures and hold what comes out to a budget.

A kernel has no spills and no local memory. It uses so few registers that other threads hide its
loads: two blocks of 256 threads fit on a multiprocessor, or two or three of 128. On architectures
newer than sm_90, for which it is tuned, it may use more of them, and a few bytes of local memory
outside innermost loops. Its launch bound is whole warps. It has the instructions that it was
designed around. A vector takes one access, not four; the device itself converts 16 bits. On sm_90
an inner loop, and one that stages masks, keeps within its budget of instructions. Needs nvcc, and
for the instructions cuobjdump (of the CUDA toolkit, or nvidia-cuda-cuobjdump from PyPI).

    python tests/cuda/compiled.py [--nvcc NVCC] [--cuobjdump CUOBJDUMP] [--architectures 75,80,...]

With --built it reads the objects of a build instead.
With --cuda12 the headers and the assembler are those of CUDA 12.9. The folder is `nvidia`, into
which pip installs nvidia-cuda-nvcc-cu12 and nvidia-cuda-runtime-cu12. These packages have no nvcc,
no front end and no nv/target: those of NVCC read the sources.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_REGISTERS = 128
MOST_REGISTERS_OF = {  # with all masks of a source, or all sums, in registers
    "reassemble_up2_nchw_kernel": 168,
    "reassemble_up2_nhwc_kernel": 168,
    "grad_masks_up2_nhwc_kernel": 255,  # all sums, and the gradients of a slice
    "grad_masks_up2_nchw_kernel": 255,
    "grad_masks_up2_nhwc_mma_kernel": 255,  # on sm_75; 168 on others
    "grad_masks_up2_nchw_mma_kernel": 168,  # 128 on sm_90
    "reassemble_down2_nchw_kernel": 168,
    "grad_masks_down2_nhwc_kernel": 168,  # before sm_90; 128 on others
    "grad_masks_tiles_kernel": 168,  # with all sums of two quads; a block has at most 384 threads
    "grad_masks_down2_nchw_mma_kernel": 255,  # on sm_75; 128 on others
    "grad_features_up2_nhwc_kernel": 224,  # with ten pixels in eight channels; 224 threads
    "grad_features_up2_nchw_kernel": 224,
}
# Required instructions, by a part of the mangled name. LDG, STG: global memory; LDS, STS: shared.
INSTRUCTIONS = {
    r"reassemble_up2_nhwc_kernelILi.EfE": (r"LDGSTS\S*\.128", r"STG\S*\.128", r"LDS\S*\.128"),
    r"reassemble_up2_nhwc_kernelILi.E\w*Float16": (
        r"LDGSTS\S*\.64",
        r"STG\S*\.64",
        r"LDS\S*\.128",
    ),
    r"grad_features_up2_nhwc_kernel": (r"LDGSTS\S*\.128", r"STG\S*\.128", r"LDS\S*\.128"),
    r"grad_masks_up2_nhwc_kernelILi.EfE": (r"LDGSTS\S*\.128", r"LDS\S*\.128", r"STG\S*\.128"),
    r"grad_masks_up2_nhwc_kernelILi.E\w*Float16": (r"LDGSTS\S*\.64", r"LDS\S*\.64"),
    r"grad_masks_down2_nhwc_kernel": (r"LDGSTS\S*\.128", r"LDS\S*\.128"),
    r"reassemble_up2_nchw_kernelILi[35]ELi[13]EfE": (
        r"LDGSTS\S*\.64",
        r"STG\S*\.128",
        r"LDS\S*\.128",
    ),
    r"reassemble_up2_nchw_kernelILi.ELi2EfE": (r"UTMALDG\.4D", r"STG\S*\.128", r"LDS\S*\.128"),
    r"reassemble_up2_nchw_kernelILi.ELi0E\w*Float16": (r"LDS\S*\.128",),
    r"reassemble_up2_nhwc_mma_kernelILi.E\w*Float16": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.128",
        r"STG\S*\.64",
    ),
    r"grad_features_up2_nhwc_mma_kernelILi.E\w*Float16": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.128",
        r"STG\S*\.128",
    ),
    r"backward_up2_nhwc_mma_kernelILi5E\w*Float16": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.128",
        r"STG\S*\.128",
    ),
    r"reassemble_up2_nchw_mma_kernelILi.E\w*Float16": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS"),
    r"grad_features_up2_nchw_mma_kernelILi.E\w*Float16": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS"),
    r"grad_masks_up2_nchw_mma_kernelILi.E\w*Float16": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS"),
    r"grad_masks_up2_nhwc_mma_kernelILi.E\w*Float16": (
        r"HMMA",
        r"LDGSTS\S*\.128",
        r"LDS\S*\.128",
    ),
    r"grad_masks_up2_nchw_kernelILi.ELb1EfE": (r"LDGSTS", r"LDG\S*\.64", r"LDS\S*\.128"),
    r"reassemble_tiles_kernelILi.ELi.ELi.ELb1ELb0EfE": (
        r"LDGSTS\S*\.128",
        r"STG\S*\.128",
        r"LDS\S*\.128",
    ),
    r"reassemble_tiles_kernelILi4ELi1ELi1ELb0ELb1EfE": (r"LDGSTS", r"STG\S*\.128", r"LDS\S*\.128"),
    r"reassemble_tiles_kernelILi.ELi.ELi.ELb1ELb0E\w*Float16": (r"LDG\S*\.64", r"STG\S*\.64"),
    r"grad_features_units_kernelILi.ELb1E": (
        r"LDGSTS\S*\.128",
        r"STG\S*\.128",
        r"LDS\S*\.128",
        r"F2FP(\.F16\.F32)?\.PACK_AB|F2F\.F16\.F32",
    ),
    r"grad_features_units_kernelILi.ELb0E": (
        r"LDG\S*\.128",
        r"LDG\S*\.64",
        r"STG\S*\.128",
        r"LDS\S*\.128",
    ),
    r"grad_features_patches_mma_kernelILb1E": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.128",
        r"STG\S*\.128",
    ),
    r"grad_features_patches_mma_kernelILb0E": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS\S*\.128"),
    r"grad_masks_tiles_kernelILb1E": (r"LDGSTS\S*\.128", r"LDG\S*\.64", r"LDS\S*\.128"),
    r"grad_masks_tiles_kernelILb0E": (r"LDG\S*\.64", r"STS\S*\.128", r"LDS\S*\.128"),
    r"grad_masks_mma_kernelILb1E": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS\S*\.128"),
    r"grad_masks_mma_kernelILb0E": (r"HMMA", r"LDSM\S*\.4", r"STS\S*\.128"),
    r"reassemble_down2_nchw_kernel": (r"LDGSTS\S*\.128", r"STG\S*\.64", r"LDS\S*\.128"),
    r"reassemble_down2_nchw_mma_kernelILi.E\w*Float16": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.64",
        r"STG\S*\.64",
    ),
    r"grad_masks_down2_nchw_kernel": (r"LDGSTS\S*\.128", r"LDS\S*\.64"),
    r"grad_masks_down2_nchw_mma_kernelILi.E\w*Float16": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.64",
    ),
    r"reassemble_up1_mma_kernelILi.ELb1E": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.128",
        r"STS\S*\.128",
        r"STG\S*\.128",
    ),
    r"reassemble_up1_mma_kernelILi.ELb0E": (
        r"HMMA",
        r"LDSM\S*\.4",
        r"LDGSTS\S*\.64",
        r"STS\S*\.128",
    ),
    r"grad_masks_up1_mma_kernelILi.ELb1E": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS\S*\.128"),
    r"grad_masks_up1_mma_kernelILi.ELb0E": (r"HMMA", r"LDSM\S*\.4", r"LDGSTS\S*\.64"),
    r"reassemble_up1_kernel": (r"LDG\S*\.128", r"STG\S*\.128", r"LDS\S*\.128"),
    r"grad_masks_up1_kernel": (r"LDG\S*\.128", r"STS\S*\.128", r"LDS\S*\.128"),
    r"grad_features_down_nhwc_kernel": (r"LDG\S*\.128", r"STG\S*\.128"),
    r"grad_features_down_nchw_kernelIfE": (r"STG\S*\.128",),
    r"grad_features_down_nchw_kernelI\w*Float16": (r"STG\S*\.64",),
    r"grad_features_down2_nhwc_kernel": (r"LDGSTS\S*\.128", r"STG\S*\.128", r"LDS\S*\.128"),
    r"grad_features_down2_nchw_kernelILi.EfE": (
        r"LDGSTS\S*\.128",
        r"STG\S*\.128",
        r"LDS\S*\.64",
    ),
    r"grad_features_down2_nchw_kernelILi.E\w*Float16": (r"LDGSTS\S*\.64", r"STG\S*\.64"),
    r"grad_features_up2_nchw_kernel": (r"LDGSTS\S*\.128", r"STG\S*\.64", r"LDS\S*\.128"),
    r"(reassemble|grad_masks)_few_kernelILi3ELi4EfE": (r"LDG\S*\.128", r"STG\S*\.128"),
    r"(reassemble|grad_masks)_few_kernelILi3ELi4E\w*Float16": (r"LDG\S*\.64", r"STG\S*\.64"),
    r"grad_features_few_kernelILi3ELi4EfE": (r"LDG\S*\.128",),
    r"grad_features_few_kernelILi3ELi4E\w*Float16": (r"LDG\S*\.64",),
}
# The same by dtype: conversions to floats and from them. sm_75 has none of bfloat16.
CONVERSIONS = {
    "float16": (r"HADD2\.F32", r"F2FP(\.F16\.F32)?\.PACK_AB|F2F\.F16\.F32"),
    "bfloat16": (r"F2FP\.BF16\S*\.PACK_AB",),
}
# Constants of core/src/dtypes.h, which only conversions in software have.
CONVERSIONS_IN_SOFTWARE = {
    "float16": r"\b(0xf800000|0x38800000|0x477fefff|0x477ff000)\b",
    "bfloat16": r"\b0x7fff\b",
}
# The most instructions of an inner loop on sm_90, by source and dtype, for 5 x 5 taps or any. A
# second word selects kernels by their names. A change may lower the numbers.
BUDGETS = {
    "reassemble_up2_nchw.cu": {
        "float32 Li2E": 962,  # a slice: a row of taps, others in a loop, two ways to store
        "float32 Li1E": 1048,
        "float32 Li3E": 1045,
        "float32 Li0E": 1057,
        "float16": 1250,
        "bfloat16": 1250,
    },
    # A slice, likewise.
    "reassemble_up2_nhwc.cu": {"float32": 907, "float16": 1065, "bfloat16": 1065},
    "reassemble_up2_nchw_mma.cu": {"float16": 224, "bfloat16": 210},
    "reassemble_up2_nhwc_mma.cu": {"float16": 363, "bfloat16": 333},
    "reassemble_nhwc_mma.cu": {"float16": 34, "bfloat16": 34},  # a step of a patch
    "reassemble_nchw_mma.cu": {"float16": 34, "bfloat16": 34},
    "reassemble_nchw.cu": {  # a column of taps
        "float32 ILi4ELi1ELi1E": 75,
        "float32 ILi3ELi2ELi1E": 954,
        "float32 ILi3ELi1ELi1E": 279,
        "float32 ILi2ELi1ELi2E": 250,
        "float32 ILi1ELi1ELi4E": 151,
        "float16 ILi4ELi1ELi1E": 75,
        "bfloat16 ILi4ELi1ELi1E": 75,
    },
    "reassemble_nhwc.cu": {  # a column of taps
        "float32 ILi4ELi1ELi1E": 74,
        "float32 ILi3ELi2ELi1E": 789,
        "float32 ILi3ELi1ELi1E": 278,
        "float32 ILi2ELi1ELi2E": 249,
        "float32 ILi1ELi1ELi4E": 151,
        "float16 ILi4ELi1ELi1E": 74,
        "bfloat16 ILi4ELi1ELi1E": 74,
    },
    "reassemble_down2_nchw.cu": {"float32": 151},
    "reassemble_down2_nchw_mma.cu": {"float16": 511, "bfloat16": 493},  # a slice, with its copies
    # A row of sources, with logits of the next one and the ways to copy it.
    "grad_features_up2_nhwc.cu": {"float32": 2753},
    "grad_features_up2_nchw.cu": {"float32": 2995},
    "grad_features_up2_nchw_mma.cu": {"float16": 340, "bfloat16": 338},  # a slice, with its copies
    "grad_features_up2_nhwc_mma.cu": {"float16": 89, "bfloat16": 80},
    "backward_up2_nhwc_mma.cu": {"float16": 90, "bfloat16": 81},  # the gradient of features
    "grad_masks_up2_nhwc.cu": {"float32": 951, "float16": 1183, "bfloat16": 1183},
    "grad_masks_up2_nchw.cu": {
        "float32 Lb1E": 1014,
        "float32 Lb0E": 1065,
        "float16": 1374,
        "bfloat16": 1374,
    },
    "grad_masks_up2_nhwc_mma.cu": {"float16": 296, "bfloat16": 296},
    "grad_masks_up2_nchw_mma.cu": {"float16": 316, "bfloat16": 316},
    "grad_masks_down2_nhwc.cu": {"float32": 403},
    "grad_masks_down2_nchw.cu": {"float32": 78},
    "grad_masks_down2_nchw_mma.cu": {"float16": 297, "bfloat16": 297},
    "grad_masks_nhwc.cu": {"float32": 4339},  # a slice, with its copies and 29 sorts of quads
    "grad_masks_nchw.cu": {"float32": 4617},
    "grad_masks_nhwc_mma.cu": {"float32": 279},  # a slice, with its copies and both dtypes
    "grad_masks_nchw_mma.cu": {"float32": 714},
    "grad_features_nhwc.cu": {"float32 Li5E": 482, "float32 Li0E": 271},  # all columns of a unit
    "grad_features_nchw.cu": {"float32 Li5E": 496, "float32 Li0E": 278},
    "grad_features_nhwc_mma.cu": {"float16 Li4E": 22, "bfloat16 Li4E": 22},  # a step of two patches
    "grad_features_nchw_mma.cu": {"float16 Li4E": 25, "bfloat16 Li4E": 25},
    "reassemble_up1_nhwc_mma.cu": {"float16": 70, "bfloat16": 70},  # a row of a run
    "reassemble_up1_nchw_mma.cu": {"float16": 94, "bfloat16": 94},
    "grad_features_up1_nhwc_mma.cu": {"float16": 69, "bfloat16": 62},
    "grad_features_up1_nchw_mma.cu": {"float16": 94, "bfloat16": 87},
    "grad_masks_up1_nhwc_mma.cu": {"float16": 201, "bfloat16": 201},  # the first slice and others
    "grad_masks_up1_nchw_mma.cu": {"float16": 198, "bfloat16": 198},
    "reassemble_up1_nhwc.cu": {"float32": 102},  # a row of taps
    "reassemble_up1_nchw.cu": {"float32": 102},
    "grad_features_up1_nhwc.cu": {"float32": 102},
    "grad_features_up1_nchw.cu": {"float32": 102},
    "grad_masks_up1_nhwc.cu": {"float32": 53},  # two channels
    "grad_masks_up1_nchw.cu": {"float32": 53},
    "grad_features_down_nhwc.cu": {"float32": 49, "float16": 83, "bfloat16": 83},  # a source
    "grad_features_down_nchw.cu": {"float32": 75, "float16": 86, "bfloat16": 86},  # a unit
    "grad_features_down2_nhwc.cu": {"float16": 414, "bfloat16": 414},
    "grad_features_down2_nchw.cu": {"float32": 79, "float16": 97, "bfloat16": 97},
}
MOST_TO_STAGE = 65  # instructions for a load or store
WITH_BOXES = r"reassemble_up2_nchw_kernelILi.ELi[23]E"  # and wide tiles: from sm_90 on
LOCAL_MEMORY = r"(LDL|STL)\b"
NEWER = ("sm_100", "sm_120")
MOST_STACK = 48  # bytes of local memory on these
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


BUILT_KERNEL = re.compile(
    r"Function (?P<name>\w+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) .*?LOCAL:(?P<local>\d+)"
)


@dataclass
class Kernel:
    """Facts of one kernel, from the tools."""

    source: str
    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    code: str
    bound: int = 0  # the most threads of a block

    @property
    def dtype(self) -> str:
        """Return the type of its features."""
        if "8BFloat16" in self.name:
            return "bfloat16"
        return "float16" if "7Float16" in self.name else "float32"

    def missing(self) -> list[str]:
        """Return the instructions that are missing, and conversions in software."""
        in_software = self.dtype == "bfloat16" and self.architecture == "sm_75"
        of_sm_80 = "backward_" in self.name or (in_software and "_mma_" in self.name)
        if not self.code or (of_sm_80 and self.architecture == "sm_75"):  # which only traps
            return []
        if re.search(WITH_BOXES, self.name) and self.architecture in ("sm_75", "sm_80"):  # nothing
            return ["a box"] if "UTMALDG" in self.code else []
        needed = [] if in_software else [*CONVERSIONS.get(self.dtype, ())]
        for part, more in INSTRUCTIONS.items():
            if re.search(part, self.name):
                needed += more
        if self.architecture == "sm_75":  # which copies by way of registers
            needed = [text for text in needed if "LDGSTS" not in text]
        found = [f"no {text}" for text in needed if not re.search(text, self.code)]
        constants = CONVERSIONS_IN_SOFTWARE.get(self.dtype)
        if constants and not in_software and re.search(constants, self.code):
            found.append("a conversion in software")
        return found

    def loops(self) -> tuple[list[str], list[range]]:
        """Return the instructions, and the loops as ranges of them."""
        code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(self.code)]
        index = {at: k for k, (at, _) in enumerate(code)}
        branches = [(k, at, BRANCH.search(text)) for k, (at, text) in enumerate(code)]
        loops = [
            range(index[int(branch[1], 16)], k + 1)
            for k, at, branch in branches
            if branch and int(branch[1], 16) < at
        ]
        return [text for _, text in code], loops

    def inner_loop(self) -> int:
        """Return the number of instructions of the inner loop, 0 if there is none.

        The inner loop is the shortest of those with the most HMMA or, without HMMA, FFMA. A loop
        with MUFU or a call stages masks and does not count, unless most of it are products.
        """
        code, loops = self.loops()
        product = "HMMA" if "HMMA" in self.code else "FFMA"
        sizes = [
            (-sum(product in code[k] for k in loop), len(loop))
            for loop in loops
            if 2 * sum(product in code[k] for k in loop) > len(loop)
            or not any(re.search(r"\b(MUFU|CALL)\b", code[k]) for k in loop)
        ]
        products, size = min(sizes, default=(0, 0))
        return size if products else 0

    def staging(self) -> float:
        """Return the instructions for a load or store of a loop that fills shared memory, at most.

        The more frequent ones of both count: either may be vectors. A loop of which a third are
        products contracts, and does not count.
        """
        code, loops = self.loops()
        most = 0.0
        for loop in innermost(loops):
            loads, stores, products = (
                sum(name in code[k] for k in loop) for name in ("LDG", "STS", "FFMA")
            )
            if loads and stores and products < len(loop) / 3:
                most = max(most, len(loop) / max(loads, stores))
        return most

    def has_local_memory(self) -> bool:
        """Is more of it than its architecture may have?"""
        if self.architecture not in NEWER:
            return bool(self.stack or self.spilled or re.search(LOCAL_MEMORY, self.code))
        code, loops = self.loops()
        in_loops = any(re.match(LOCAL_MEMORY, code[k]) for loop in innermost(loops) for k in loop)
        return self.stack > MOST_STACK or in_loops

    def faults(self) -> list[str]:
        """Return its faults."""
        found = []
        most = next(
            (n for part, n in MOST_REGISTERS_OF.items() if part in self.name), MOST_REGISTERS
        )
        if self.registers > most and self.architecture not in NEWER:
            found.append(f"more than {most} registers")
        if self.bound % 32:  # launches round up to whole warps
            found.append(f"a launch bound of {self.bound} threads")
        if self.architecture == "sm_90" and re.search(r"_(up|down)2_", self.name):
            staging = self.staging()
            if staging > MOST_TO_STAGE:
                found.append(f"{staging:.0f} instructions for a load that is staged")
        if self.has_local_memory():
            found.append("local memory")
        return found + self.missing()


def innermost(loops: list[range]) -> list[range]:
    """Return the loops that have no other in them."""
    return [
        loop
        for loop in loops
        if not any(other != loop and other[0] in loop and other[-1] in loop for other in loops)
    ]


def over_budget(sources: set[str], kernels: list[Kernel]) -> int:
    """Print the table of inner loops; return how many are over budget or missing."""
    wrong = 0
    for source, budgets in BUDGETS.items():
        # Some know the kernel size when they run.
        any_size = (
            r"_tiles_kernelI|_down_n\w+_kernelI|_units_kernelILi0E|_patches_mma_kernelI|"
            r"(reassemble|grad_masks)_mma_kernelI"
        )
        of_source = [
            k for k in kernels if k.source == source and re.search(f"Li5E|{any_size}", k.name)
        ]
        for key, most in budgets.items():
            dtype, *words = key.split()
            sizes = [
                kernel.inner_loop()
                for kernel in of_source
                if kernel.dtype == dtype and all(word in kernel.name for word in words)
            ]
            if source not in sources:
                fault = "no such source"
            elif not sizes:
                fault = "no such kernel"
            elif min(sizes) == 0:
                fault = "no inner loop was found"
            else:
                fault = "over budget" if max(sizes) > most else ""
            wrong += bool(fault)
            found = f"{max(sizes, default=0):>4} instructions in the inner loop, {most:>4} allowed"
            print(f"sm_90   {found}  {source} {key}{'  ' * bool(fault)}{fault.upper()}")
    return wrong


def run(*command: str, **how: Any) -> subprocess.CompletedProcess:
    """Run a tool. If it fails, end the program with its message."""
    done = subprocess.run(command, **{"cwd": ROOT, **how}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done


def code_by_name(sass: str) -> dict[str, str]:
    """Return the instructions of each kernel."""
    parts = re.split(r"Function : (\w+)", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def bounds_by_name(elf: str) -> dict[str, int]:
    """Return the launch bound of each kernel that has one."""
    parts = re.split(r"(?m)^\.nv\.info\.(\w+)$", elf)
    bounds = {}
    for name, facts in zip(parts[1::2], parts[2::2], strict=True):
        if bound := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+)", facts):
            bounds[name] = int(bound[1], 16)
    return bounds


def read_built(cuobjdump: str, built: Path, source: Path, architecture: str) -> list[Kernel]:
    """Return the kernels of a source from its object in a folder of CMake."""
    objects = list(built.glob(f"core/CMakeFiles/carafepp.dir/**/{source.name}.o"))
    if not objects:
        sys.exit(f"{built} has no object of {source.name}")
    command = [cuobjdump, "-arch", f"sm_{architecture}", str(objects[0])]
    said = run(*command, "-res-usage", "-sass").stdout
    code, bounds = code_by_name(said), bounds_by_name(run(*command, "-elf").stdout)
    kernels = [
        Kernel(
            source.name,
            kernel["name"],
            f"sm_{architecture}",
            int(kernel["registers"]),
            int(kernel["stack"]),
            int(kernel["local"]),
            code[kernel["name"]],
            bounds.get(kernel["name"], 0),
        )
        for kernel in BUILT_KERNEL.finditer(said)
    ]
    if {kernel.name for kernel in kernels} != set(code):
        sys.exit(f"{objects[0]}: cuobjdump does not tell the registers of each kernel")
    return kernels


def compile_one(
    nvcc: str, cuobjdump: str | None, cuda12: Path | None, source: Path, architecture: str
) -> list[Kernel]:
    """Return the kernels of a source."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = f"{folder}/kernels.cubin", Path(folder, "kernels.ptx")
        options = ["-std=c++17", f"-arch=sm_{architecture}", "-Werror=all-warnings"]
        options += ["-Icore/include", "-Icore/src", '-DCARAFEPP_CUDA_BUILD=""', str(source)]
        if cuda12 is None:
            said = run(nvcc, *options, "-cubin", "-Xptxas=-v", "-o", cubin).stderr
        else:
            options += [f"-I{cuda12}/{of}/include" for of in ("cuda_nvcc", "cuda_runtime")]
            run(nvcc, *options, "-ptx", "-o", str(ptx))
            ptx.write_text(re.sub(r"(?m)^\.version .*", ".version 8.8", ptx.read_text()))
            ptxas = [f"{cuda12}/cuda_nvcc/bin/ptxas", "-v", f"-arch=sm_{architecture}"]
            said = run(*ptxas, "-o", cubin, str(ptx)).stderr
        sass = run(cuobjdump, "-sass", cubin).stdout if cuobjdump else ""
        bounds = bounds_by_name(run(cuobjdump, "-elf", cubin).stdout) if cuobjdump else {}
    code = code_by_name(sass)
    return [
        Kernel(
            source.name,
            kernel["name"],
            kernel["architecture"],
            int(kernel["registers"]),
            int(kernel["stack"]),
            int(kernel["stores"]) + int(kernel["loads"]),
            code[kernel["name"]] if cuobjdump else "",
            bounds.get(kernel["name"], 0),
        )
        for kernel in KERNEL.finditer(said)
    ]


def demangled(name: str) -> str:
    """Return a kernel's name with its template arguments, or as it is without c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return text.replace("carafepp::cuda::(anonymous namespace)::", "").partition("(")[0]


def main() -> None:
    """Print a line for each kernel; exit with 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump"))
    parser.add_argument("--cuda12", type=Path)
    parser.add_argument("--architectures", default="75,80,90,100,120")
    parser.add_argument("--built", type=Path)
    asked = parser.parse_args()
    if asked.built is None and asked.nvcc is None:
        sys.exit("nvcc was not found")
    if asked.built is not None and asked.cuobjdump is None:
        sys.exit("cuobjdump was not found, which reads the objects of a build")
    sources = sorted((ROOT / "core/src/cuda").rglob("*.cu"))
    jobs = list(product(sources, asked.architectures.split(",")))
    with ThreadPoolExecutor() as pool:
        if asked.built is not None:
            results = pool.map(lambda job: read_built(asked.cuobjdump, asked.built, *job), jobs)
        else:
            tools = asked.nvcc, asked.cuobjdump, asked.cuda12
            results = pool.map(lambda job: compile_one(*tools, *job), jobs)
        kernels = [kernel for result in results for kernel in result]
    wrong = 0
    for kernel in kernels:
        faults = kernel.faults()
        wrong += bool(faults)
        numbers = f"{kernel.registers:>3} registers, {kernel.stack} bytes of stack"
        line = f"{kernel.architecture:7} {numbers}, {kernel.spilled} spilled  "
        print(line + demangled(kernel.name) + "".join(f"  {fault.upper()}" for fault in faults))
    if asked.cuobjdump and "90" in asked.architectures.split(","):
        of_sm_90 = [kernel for kernel in kernels if kernel.architecture == "sm_90"]
        wrong += over_budget({source.name for source in sources}, of_sm_90)
    looked = "" if asked.cuobjdump else "; cuobjdump was not found: instructions were not looked at"
    print(
        f"{len(kernels)} kernels of {len(sources)} sources, {wrong} not as they should be{looked}"
    )
    sys.exit(bool(wrong) or not kernels)


if __name__ == "__main__":
    main()
