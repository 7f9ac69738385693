"""Compile every CUDA source for some architectures and hold the kernels to a budget.

No spills, no local memory, and no more registers than let so many threads run at once that loads
are hidden: two blocks of 256 on a multiprocessor, or two or three of 128. Needs nvcc.

    python tests/cuda/ptxas.py [--nvcc NVCC] [--architectures 75,80,90,100,120]
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_REGISTERS = 128
MOST_REGISTERS_OF = {  # with all masks of a source, or all sums, in registers
    "reassemble_nchw_kernel": 168,
    "grad_masks_nhwc_kernel": 168,
    "grad_masks_nchw_kernelILi5Ef": 168,
    "grad_masks_nchw_kernel": 254,  # of halves
}
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_one(nvcc: str, source: Path, architecture: str) -> list[dict[str, str]]:
    """Return what ptxas says of each kernel of a source."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v"]
        command += ["-Icore/include", "-Icore/src", '-DCARAFEPP_CUDA_BUILD=""']
        command += ["-Werror=all-warnings", "-o", f"{folder}/kernels.cubin", str(source)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source} for sm_{architecture}:\n{done.stderr}")
    return [match.groupdict() for match in KERNEL.finditer(done.stderr)]


def demangled(name: str) -> str:
    """Return a kernel's name with its template arguments, if there is a tool that knows."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return text.replace("carafepp::cuda::(anonymous namespace)::", "").partition("(")[0]


def main() -> None:
    """Print a line for each kernel; exit with 1 if one is beyond the budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    parser.add_argument("--architectures", default="75,80,90,100,120")
    asked = parser.parse_args()
    if asked.nvcc is None:
        sys.exit("nvcc was not found")
    sources = sorted((ROOT / "core/src/cuda").glob("*.cu"))
    jobs = list(product(sources, asked.architectures.split(",")))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda job: compile_one(asked.nvcc, *job), jobs))
    kernels = [kernel for result in results for kernel in result]
    beyond = 0
    for kernel in kernels:
        local = [int(kernel[key]) for key in ("stack", "stores", "loads")]
        most = next(
            (most for name, most in MOST_REGISTERS_OF.items() if name in kernel["name"]),
            MOST_REGISTERS,
        )
        wrong = any(local) or int(kernel["registers"]) > most
        beyond += wrong
        print(
            f"{kernel['architecture']:7} {kernel['registers']:>3} registers, "
            f"{local[0]} bytes of stack, {local[1] + local[2]} spilled  "
            f"{demangled(kernel['name'])}{'  BEYOND THE BUDGET' if wrong else ''}"
        )
    print(f"{len(kernels)} kernels of {len(sources)} sources, {beyond} beyond the budget")
    sys.exit(beyond > 0 or not kernels)


if __name__ == "__main__":
    main()
