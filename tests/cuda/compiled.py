"""Compile every CUDA source for some architectures and hold what comes out to a budget.

No spills, no local memory, and no more registers than let so many threads run at once that loads
are hidden: two blocks of 256 on a multiprocessor, or two or three of 128. And the instructions that
a kernel was designed around are there: vectors in one access, not in four. Needs nvcc, and for the
instructions cuobjdump (of the CUDA toolkit, or nvidia-cuda-cuobjdump from PyPI).

    python tests/cuda/compiled.py [--nvcc NVCC] [--cuobjdump CUOBJDUMP] [--architectures 75,80,...]

With --cuda12 the headers and the assembler are those of CUDA 12.9, from the folder `nvidia` that
nvidia-cuda-nvcc-cu12 and nvidia-cuda-runtime-cu12 are installed in. These packages have neither
nvcc nor a front end: NVCC's own reads the sources.
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

ROOT = Path(__file__).parents[2]
MOST_REGISTERS = 128
MOST_REGISTERS_OF = {  # with all masks of a source, or all sums, in registers
    "reassemble_nchw_kernel": 200,
    "grad_masks_nhwc_kernel": 168,
    "grad_masks_nchw_mma_kernel": 168,
    "grad_masks_nhwc_mma_kernel": 168,
    "grad_masks_down2_nchw_kernel": 168,
    "grad_masks_down2_nhwc_kernel": 168,
    "grad_masks_nchw_kernelILi5Ef": 168,
    "grad_masks_nchw_kernel": 255,  # of halves
}
# What there must be, by a part of the mangled name. LDG and STG: global memory, LDS, STS: shared.
INSTRUCTIONS = {
    r"(reassemble|grad_features)_nhwc_kernelILi.EfE": (
        r"LDG\S*\.128",
        r"STG\S*\.128",
        r"LDS\S*\.128",
    ),
    r"(reassemble|grad_features)_nhwc_kernelILi.E\w*Float16": (
        r"LDG\S*\.64",
        r"STG\S*\.64",
        r"LDS\S*\.128",
    ),
    r"grad_masks_(down2_)?nhwc_kernelILi.EfE": (r"LDG\S*\.128",),
    r"grad_masks_(down2_)?nhwc_kernelILi.E\w*Float16": (r"LDG\S*\.64",),
    r"(reassemble|grad_features)_nhwc_mma_kernelILi.E\w*7Float16": (
        r"HMMA",
        r"LDG\S*\.128",
        r"STG\S*\.128",
    ),
    r"(reassemble|grad_features)_nchw_mma_kernelILi.E\w*7Float16": (r"HMMA", r"LDG\.E\.CONSTANT"),
    r"grad_masks_nchw_mma_kernelILi.E\w*7Float16": (r"HMMA", r"LDG\.E\.CONSTANT"),
    r"grad_masks_nhwc_mma_kernelILi.E\w*7Float16": (r"HMMA", r"LDG\S*\.128"),
    r"reassemble_down2_nhwc_kernelILi.EfE": (r"LDG\S*\.128", r"STG\S*\.128", r"LDS\S*\.128"),
    r"(reassemble|grad_masks)_down2_nchw_kernelILi.EfE": (r"LDG\S*\.64",),
    r"grad_features_down2_kernelI\w*OfChannelsELi.EfE": (r"LDG\S*\.128", r"STG\S*\.128"),
    r"grad_features_down2_kernelI\w*OfChannelsELi.E\w*Float16": (r"LDG\S*\.64", r"STG\S*\.64"),
    r"grad_features_down2_kernelI\w*OfColumnsELi.EfE": (r"STG\S*\.64",),
    r"grad_features_nchw_kernel": (r"LDS\S*\.128", r"STS\S*\.128"),
}
LOCAL_MEMORY = r"(LDL|STL)\b"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass
class Kernel:
    """What the tools say of one kernel."""

    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    code: str

    def faults(self) -> list[str]:
        """Return what is wrong with it."""
        found = []
        most = next(
            (n for part, n in MOST_REGISTERS_OF.items() if part in self.name), MOST_REGISTERS
        )
        if self.registers > most:
            found.append(f"more than {most} registers")
        if self.stack or self.spilled or re.search(LOCAL_MEMORY, self.code):
            found.append("local memory")
        for part, needed in INSTRUCTIONS.items():
            if self.code and re.search(part, self.name):
                found += [f"no {text}" for text in needed if not re.search(text, self.code)]
        return found


def run(*command: str) -> subprocess.CompletedProcess:
    """Run a tool; end the program with what it says if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done


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
    parts = re.split(r"Function : (\w+)", sass)
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [
        Kernel(
            kernel["name"],
            kernel["architecture"],
            int(kernel["registers"]),
            int(kernel["stack"]),
            int(kernel["stores"]) + int(kernel["loads"]),
            code[kernel["name"]] if cuobjdump else "",
        )
        for kernel in KERNEL.finditer(said)
    ]


def demangled(name: str) -> str:
    """Return a kernel's name with its template arguments, if there is a tool that knows."""
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
    asked = parser.parse_args()
    if asked.nvcc is None:
        sys.exit("nvcc was not found")
    sources = sorted((ROOT / "core/src/cuda").glob("*.cu"))
    jobs = list(product(sources, asked.architectures.split(",")))
    with ThreadPoolExecutor() as pool:
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
    looked = "" if asked.cuobjdump else "; cuobjdump was not found: instructions were not looked at"
    print(
        f"{len(kernels)} kernels of {len(sources)} sources, {wrong} not as they should be{looked}"
    )
    sys.exit(bool(wrong) or not kernels)


if __name__ == "__main__":
    main()
