"""Count what the CUDA kernels ask of a device, and estimate their time.

The program `traffic` of an emulated build runs some blocks of a kernel and counts their accesses,
warp by warp. nvcc and nvdisasm, if they are found, add registers and instructions of sm_90. Those
of a loop run as often as the emulated code of their lines makes its accesses. A loop without
accesses runs once each time. gcov tells which lines no thread ran: most lines of a branch among
them, and the branch does not run.

    cmake --build BUILD --target traffic
    python tests/cuda/traffic.py --program BUILD/tests/cuda/traffic [--problems ...]

For each pass of a problem the table has

    waves          how often the blocks fill the first device
    L2 reads       bytes that its L1s do not have, in sizes of the array: F features, W masks or
                   logits, O outputs or grad_output
    full sectors   bytes that are asked for, of the 32-byte sectors of loads / of stores
    conflicts      wavefronts of shared memory, of the fewest that the bytes allow
    instructions   warp instructions for each 32 products

and for each device an estimate, what takes it, and the floor as a share of it. The floor is the
time to touch each byte once. The estimate is the longest of these times, as if all others were
hidden behind it:

    DRAM     the floor, at the bandwidth of a copy
    L2       sectors that the L1 does not have, and those stored. The L1 is cold for each block, and
             the blocks of a multiprocessor have equal parts of it.
    L1       a cycle for each line of 128 bytes in an access of a warp, and for a wavefront
    issue    instructions at ISSUED a cycle
    latency  the time of an access for what is in flight: the bytes that a loop loads before an
             instruction waits, or those that a thread copies before it waits, in all warps that fit

L1 and issue are those of the multiprocessor with the most blocks. If blocks run in several rounds,
the last one takes as long as a full one, as it did on an H200. Bandwidths are what public
measurements reach of the data sheets' figures.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil, prod
from pathlib import Path

import compiled

sys.path.append(str(compiled.ROOT))
from cases import Case
from cases.networks import LAYERS

Counts = dict[str, int]
Lines = tuple[str, ...]  # as "masks.h:100"
Accesses = Counter[tuple[Lines, str]]  # of warps; LDG, STG, LDS, STS or LDGSTS
SECTOR = 32  # bytes
WARP = 32  # threads
ISSUED = 2.4  # instructions a cycle and multiprocessor, of 4
TO_L2, TO_DRAM = 280e-9, 600e-9  # seconds until a load arrives
REGISTERS = 64 * 1024  # of a multiprocessor
USUAL_REGISTERS = 128  # of a thread, without nvcc
DTYPES = {"float32": "f", "float16": "NS_7Float16E", "bfloat16": "NS_8BFloat16E"}  # mangled
ACCESS = re.compile(r"^(?:@!?U?P\d+ )?(LDGSTS|LDG|STG|LDS|STS|LD|ST)M?\b")
GENERIC = {"LD": "LDG", "ST": "STG"}  # where the compiler does not know that memory is global
LEAVES = re.compile(r"^(?:@!?U?P\d+ )?(BRA|BRX|EXIT|RET|JMP)\b")


@dataclass(frozen=True)
class Device:
    """Facts of a device: multiprocessors, hertz, bytes a second, bytes, threads."""

    name: str
    multiprocessors: int
    clock: float
    dram: float
    l2: float
    l1: int  # with shared memory, of a multiprocessor
    threads: int  # of a multiprocessor
    products: int = 128  # a cycle and multiprocessor, float32


DEVICES = [
    Device("H200", 132, 1.9e9, 4.3e12, 5.5e12, 256 * 1024, 2048),
    Device("H100", 132, 1.75e9, 3.0e12, 5.5e12, 256 * 1024, 2048),
    Device("A100", 108, 1.41e9, 1.4e12, 4.0e12, 192 * 1024, 2048, products=64),
    Device("T4", 40, 1.2e9, 0.25e12, 1.0e12, 96 * 1024, 1024, products=64),
    Device("RTX 4090", 128, 2.5e9, 0.92e12, 4.5e12, 128 * 1024, 1536),
]


_TABLE = [
    *LAYERS.values(),
    Case("up4", "a factor of the generic kernels", 2, 256, 50, 76, up=4, kernel_size=5),
    Case("convex", "RAFT's upsampling of flow", 4, 2, 55, 128, up=8),
    Case("up2_k7", "a large kernel", 2, 256, 50, 76, up=2, kernel_size=7),
    Case("same", "a filter", 2, 256, 100, 152, kernel_size=5),
    Case("r32", "a fraction", 2, 256, 50, 76, up=3, down=2, kernel_size=5),
    Case("down3", "an odd factor", 64, 256, 56, 56, down=3, kernel_size=5),
    Case("down4", "a large factor", 64, 256, 56, 56, down=4, kernel_size=5),
    Case("involution", "RedNet's third stage", 32, 256, 28, 28, kernel_size=7, groups=16),
]
PROBLEMS = {case.name: case for case in _TABLE}
PASSES = ("forward", "grad_features", "grad_weights", "backward")


@dataclass(frozen=True)
class Instruction:
    """One of the machine code, with its lines of core/src: the innermost inlined one first."""

    text: str
    lines: Lines

    @property
    def access(self) -> str | None:
        """Return LDG, STG, LDS, STS or LDGSTS, or None for no access of such memory."""
        kind = ACCESS.search(self.text)
        return GENERIC.get(kind[1], kind[1]) if kind else None


def beside(line: str) -> set[str]:
    """Return the lines at most two further."""
    name, number = line.split(":")
    return {f"{name}:{int(number) + k}" for k in range(-2, 3)}


def in_flight(loop: list[Instruction]) -> int:
    """Return the bytes a lane that the loop loads before an instruction waits for one of them."""
    pending: dict[int, int] = {}  # by register
    most = 0
    for instruction in loop + loop:  # an iteration may wait for loads of the one before
        text = instruction.text
        load = re.match(r"(?:@!?U?P\d+ )?(LDG\b\S*) R(\d+)", text)
        read = [int(register) for register in re.findall(r"\bR(\d+)", text)][1 if load else 0 :]
        words = {first + k for first, size in pending.items() for k in range(ceil(size / 4))}
        if not words.isdisjoint(read):
            pending.clear()
        if load:
            width = re.search(r"\.(64|128)\b", load[1])
            pending[int(load[2])] = int(width[1]) // 8 if width else 2 if ".U16" in load[1] else 4
            most = max(most, sum(pending.values()))
    return most


class Code:
    """The machine code of a kernel."""

    def __init__(self, registers: int, code: list[Instruction], labels: dict[str, int]) -> None:
        self.registers = registers
        ranges = []
        for k, instruction in enumerate(code):
            branch = re.search(r"\bBRA\b.*`\((\S+)\)", instruction.text)
            if branch and labels[branch[1]] < k:
                ranges.append(range(labels[branch[1]], k + 1))
        self.code = code
        self._in_loops = {k for loop in compiled.innermost(ranges) for k in loop}
        # Loops, outer ones first; the first is all. Each has its instructions without those of
        # loops in it, cut where branches begin and end.
        all_loops = [range(len(code)), *sorted(ranges, key=len, reverse=True)]
        starts = set(labels.values())
        starts |= {k + 1 for k, one in enumerate(code) if LEAVES.search(one.text)}
        loop_of = {k: loop for loop in all_loops for k in loop}
        self._stretches: dict[range, list[list[int]]] = {loop: [] for loop in all_loops}
        for k, loop in loop_of.items():
            if k in starts or loop_of.get(k - 1) != loop:
                self._stretches[loop].append([])
            self._stretches[loop][-1].append(k)
        loops = ([code[k] for k in loop] for loop in compiled.innermost(ranges))
        self.in_flight = max(map(in_flight, loops), default=0)

    def _branches_not_taken(self, idle_lines: set[str]) -> set[int]:
        """Return the instructions of stretches most of whose instructions have an idle line."""
        stretches = [stretch for of_loop in self._stretches.values() for stretch in of_loop]
        not_taken: set[int] = set()
        for stretch in stretches:
            idle = sum(not idle_lines.isdisjoint(self.code[k].lines) for k in stretch)
            if 2 * idle > sum(bool(self.code[k].lines) for k in stretch):
                not_taken |= {*stretch}
        return not_taken

    def _same(self, lines: Lines, kind: str, not_taken: set[int]) -> list[int]:
        """Return the instructions that make an emulated access."""
        of_kind = [k for k, one in enumerate(self.code) if one.access == kind]
        of_kind = [k for k in of_kind if k not in not_taken]
        same = [k for k in of_kind if self.code[k].lines[: len(lines)] == lines]
        # Compilers differ on the line of a long statement, and on the innermost function.
        places = [{lines[0]}, beside(lines[0]), *({line} for line in lines[1:])]
        for place in places:
            same = same or [k for k in of_kind if not place.isdisjoint(self.code[k].lines)]
        return [k for k in same if k in self._in_loops] or same

    def executed(self, accesses: Accesses, idle_lines: set[str]) -> float:
        """Return how many instructions warps run that make so many accesses."""
        not_taken = self._branches_not_taken(idle_lines)
        runs: Counter[int] = Counter()  # of each instruction that accesses memory
        for (lines, kind), times in accesses.items():
            same = self._same(lines, kind, not_taken)
            for k in same:
                runs[k] += times / len(same)
        idle = {k for k, one in enumerate(self.code) if one.access} - {*runs} - not_taken
        # Accesses whose lines ran elsewhere are in a branch not taken, such as for another dtype.
        seen = {(lines[:1], kind) for lines, kind in accesses}
        branch = {k for k in idle if (self.code[k].lines[:1], self.code[k].access) in seen}
        total = 0.0
        of_loop: dict[range, float] = {}
        for loop, stretches in self._stretches.items():
            inside = {k for stretch in stretches for k in stretch}
            known = [runs[k] for k in inside if k in runs]
            around = [n for outer, n in of_loop.items() if loop[0] in outer and loop[-1] in outer]
            if known:
                of_loop[loop] = sum(known) / len(known)
            else:
                of_loop[loop] = around[-1] if around and idle.isdisjoint(inside) else 0.0
            for stretch in stretches:
                if stretch[0] in not_taken:
                    continue
                if branch.isdisjoint(stretch) or not runs.keys().isdisjoint(stretch):
                    total += len(stretch) * of_loop[loop]
        return total


def parsed(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a kernel, and its labels, from what nvdisasm prints with lines."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: Lines = ()
    complete = True
    for row in sass.splitlines():
        if place := re.match(r'\t//## File "([^"]+)", line (\d+)', row):
            if complete:
                lines, complete = (), False
            # CUDA's headers do not count, nor what the emulation replaces.
            if "/core/src/" in place[1] and not place[1].endswith("/ptx.h"):
                lines += (f"{Path(place[1]).name}:{place[2]}",)
        elif label := re.match(r"(\.L_\w+):", row):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?) ;", row):
            code.append(Instruction(instruction[1], lines))
            complete = True
    return code, labels


@cache
def read_code(nvcc: str, nvdisasm: str, source: str) -> dict[str, Code]:
    """Compile a source for sm_90; return the code of its kernels by their mangled names."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        options = ["-std=c++17", "-arch=sm_90", "-lineinfo", "-Xptxas=-v", "-cubin", "-o", cubin]
        options += ["-Icore/include", "-Icore/src", '-DCARAFEPP_CUDA_BUILD=""']
        path = next((compiled.ROOT / "core/src/cuda").rglob(source))
        said = compiled.run(nvcc, *options, str(path)).stderr
        text = compiled.run(nvdisasm, "-gi", "-c", cubin).stdout
    kernels = compiled.KERNEL.finditer(said)
    registers = {kernel["name"]: int(kernel["registers"]) for kernel in kernels}
    sections = re.split(r"\n\t\.section\t\.text\.(\w+)", text)
    parts = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {name: Code(registers[name], *parsed(parts[name])) for name in registers}


def lines_of(program: Path, places: list[tuple[int, str, int]]) -> Accesses:
    """Return the accesses of warps by their lines of core/src, and their instruction."""
    addresses = [hex(place[0]) for place in places]
    said = compiled.run("addr2line", "-a", "-i", "-e", str(program), *addresses).stdout
    found: Accesses = Counter()
    parts = re.split(r"^0x\w+\n", said, flags=re.MULTILINE)[1:]
    for (_, kind, times), part in zip(places, parts, strict=True):
        lines = re.findall(r"/core/src/\S*?([^/]+:\d+)", part)
        found[tuple(lines), kind] += times
    return found


class Row:
    """One pass of one problem: what was counted, as if all blocks had run."""

    def __init__(
        self,
        problem: Case,
        counted: dict,
        code: Code | None,
        accesses: Accesses,
    ) -> None:
        self.code, self.accesses = code, accesses
        # gcov may see a line of an inlined function in another instance of it alone.
        self.idle_lines = counted["idle_lines"].difference(*(lines for lines, _ in accesses))
        self.products = prod(problem.output_shape) * problem.kernel_size**2
        self.kernel: str = counted["kernel"]
        self.blocks: int = counted["blocks"]
        self.threads: int = counted["threads"]
        self.shared_bytes: int = counted["shared_bytes"]
        self._scale = self.blocks / counted["blocks_run"]
        self.mmas = counted["mmas"] * self._scale
        self.copied = counted["bytes_copied"] / max(1, counted["groups_copied"])  # at once
        self.arrays: dict[str, Counts] = counted["arrays"]
        self.shared: Counts = counted["shared"]

    def total(self, name: str) -> float:
        """Return a count of all arrays in global memory."""
        return sum(of[name] for of in self.arrays.values()) * self._scale

    def touched(self) -> int:
        """Return the bytes of the arrays that the pass reads or writes, each once."""
        return sum(of["bytes"] for of in self.arrays.values() if of["loads"] or of["stores"])

    def resident(self, device: Device) -> int:
        """Return the blocks that a multiprocessor has at once."""
        registers = self.code.registers if self.code else USUAL_REGISTERS
        by_registers = REGISTERS // (ceil(registers / 8) * 8 * self.threads)
        by_shared = device.l1 // (self.shared_bytes + 1024)
        return max(1, min(by_registers, by_shared, device.threads // self.threads))

    def waves(self, device: Device) -> float:
        """Return how often the blocks fill the device."""
        return self.blocks / (self.resident(device) * device.multiprocessors)

    def l2_reads(self, device: Device, array: str | None = None) -> float:
        """Return the bytes that come from the L2, of one array or of all."""
        resident = self.resident(device)
        part = (device.l1 / resident - self.shared_bytes) / 1024
        of_arrays = self.arrays.values() if array is None else [self.arrays[array]]
        total = 0
        for of in of_arrays:
            sizes = [size for size in of["l2_sectors"] if int(size) <= part]
            total += of["l2_sectors"][sizes[-1] if sizes else min(of["l2_sectors"], key=int)]
        return total * self._scale * SECTOR

    def instructions(self) -> float:
        """Return the warp instructions, 0 without machine code."""
        return self.code.executed(self.accesses, self.idle_lines) * self._scale if self.code else 0

    def lanes(self) -> float:
        """Return the share of the lanes that take part in the stores."""
        stores = [of for of in self.arrays.values() if of["stores"]]
        return sum(of["lanes"] for of in stores) / (WARP * sum(of["stores"] for of in stores))

    def times(self, device: Device) -> dict[str, float]:
        """Return the times in seconds, by what takes them."""
        machine = device.multiprocessors * device.clock
        each, resident = self.blocks / device.multiprocessors, self.resident(device)
        rounds = ceil(each / resident)
        full = (ceil(each) if rounds == 1 else rounds * resident) / each
        lines = self.total("load_lines") + self.total("store_lines")
        wavefronts = self.shared["wavefronts"] * self._scale
        reads = self.l2_reads(device)
        times = {
            "DRAM": self.touched() / device.dram,
            "L2": (reads + self.total("store_sectors") * SECTOR) / device.l2,
            "L1": (lines + wavefronts) / machine * full,
        }
        if self.code is not None:
            products = 0 if self.mmas else self.products / self.lanes() / device.products
            times["issue"] = max(self.instructions() / ISSUED, products) / machine * full
            threads = min(resident, each) * self.threads * device.multiprocessors
            flight = max(self.code.in_flight, self.copied) * threads
            latency = TO_DRAM if reads < 1.5 * self.touched() else TO_L2
            times["latency"] = reads * latency / flight if flight else 0.0
        return times

    def estimate(self, device: Device) -> tuple[float, str]:
        """Return the estimate in seconds, and what takes it."""
        times = self.times(device)
        longest = max(times, key=lambda name: times[name])
        return times[longest], longest

    def share(self, device: Device) -> float:
        """Return the floor as a share of the estimate."""
        return self.times(device)["DRAM"] / self.estimate(device)[0]


def source_of(kernel: str) -> str:
    """Return the name of the source that has an implementation."""
    name = kernel.removesuffix("_cuda").removesuffix("_any")
    return name.replace("_with_logits", "").replace("grad_logits", "grad_masks")


def idle_lines(folder: Path, source: str) -> set[str]:
    """Return the lines of core/src that no thread ran, from what a program wrote for gcov."""
    data = next(folder.rglob(f"{source}.cu.gcda"))
    notes = Path("/") / data.relative_to(folder).with_suffix(".gcno")
    data.with_suffix(".gcno").symlink_to(notes)
    said = compiled.run("gcov", "--json-format", "--stdout", str(data), cwd=folder).stdout
    times: Counter[str] = Counter()
    for of_file in (file for row in said.splitlines() for file in json.loads(row)["files"]):
        if "/core/src/" in of_file["file"]:
            name = Path(of_file["file"]).name
            for line in of_file["lines"]:
                times[f"{name}:{line['line_number']}"] += line["count"]
    return {line for line, count in times.items() if count == 0}


def run(program: Path, problem: Case, how: tuple[str, str, str, str], blocks: int) -> dict:
    """Return what the program counts in some blocks; `how` is pass, weights, dtype, layout."""
    sizes = [
        *(problem.n, problem.c, problem.h, problem.w, problem.up, problem.down),
        *(problem.kernel_size, problem.groups, blocks),
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GCOV_PREFIX": folder}
        said = compiled.run(str(program), *how, *map(str, sizes), env=environment).stdout
        counted: dict = json.loads(said)
        counted["idle_lines"] = idle_lines(Path(folder), source_of(counted["kernel"]))
    return counted


def share_of(problem: Case) -> tuple[int, int, int]:
    """Return a square's outputs along an axis, its sources, and a thread's squares: see Share."""
    if problem.up * 2 == problem.down * 3:
        return 3, 2, 1
    most = ceil(problem.up / problem.down)
    fewer = min((4, 3), key=lambda p: ceil(most / p) * p)
    p = fewer if most > 3 else most
    if p == 2:
        return p, 1, 2
    return p, 1, 4 if problem.up == problem.down and problem.kernel_size >= 3 else 1


def code_of(kernel: str, problem: Case, dtype: str, tools: tuple[str, str]) -> Code:
    """Return the machine code of an implementation, whose source has its name."""
    name = source_of(kernel)
    type_ = DTYPES[dtype]
    size = f"Li{problem.kernel_size}E"
    arguments = {"", size, f"{size}Lb1E"}
    if name == "reassemble_up2_nchw":
        wide = ceil(problem.w / 14) * 14 < ceil(problem.w / 8) * 8 and problem.kernel_size < 7
        arguments = {f"{size}Li{3 if wide else 2}E"}  # wide tiles, or boxes
    if name in ("reassemble_nhwc", "reassemble_nchw"):
        p, d, s = share_of(problem)
        vectors = name.endswith("nhwc")
        floats = dtype == "float32"
        whole = floats and not vectors and p in (2, 4) and problem.down == 1 and problem.up % p == 0
        arguments = {f"Li{p}ELi{d}ELi{s}ELb{int(vectors)}ELb{int(whole)}E"}
    if name in ("reassemble_nhwc_mma", "reassemble_nchw_mma"):
        arguments = {f"Lb{int(name.endswith('nhwc_mma'))}E"}
    if name == "grad_features_up2_nchw_mma":
        columns = 16 if ceil(problem.w / 16) % 2 else 32
        arguments, type_ = {f"{size}{type_}Li{columns}E"}, ""
    if name.endswith("_few"):
        own = 4 if problem.kernel_size == 3 and problem.up % 4 == 0 else 1
        arguments = {f"{size}Li{own}E"}
    if name in ("grad_features_nhwc_mma", "grad_features_nchw_mma"):
        products = 4 if problem.c // problem.groups > 32 else 1
        arguments = {f"Lb{int(name.endswith('nhwc_mma'))}ELi{products}E"}
    if name in ("grad_features_nhwc", "grad_features_nchw"):
        channels = problem.c // problem.groups
        own = channels >= 16 and problem.kernel_size in (3, 5, 7)
        number = problem.kernel_size if own else 0
        arguments, type_ = {f"Li{number}ELb{int(name.endswith('nhwc'))}E"}, ""
    if name.removesuffix("_mma") in ("grad_masks_nhwc", "grad_masks_nchw"):
        arguments, type_ = {f"Lb{int('nhwc' in name)}E"}, ""
    if "_up1_" in name:
        vectors = f"{size}Lb{int('nhwc' in name)}E"
        type_ = type_ if name.endswith("_mma") else ""
        arguments = {vectors, f"{vectors}Lb{int(name.startswith('grad_features'))}E"}
    wanted = {of_kernel + type_ for of_kernel in arguments} | {size}  # some are of one dtype
    for mangled, code in read_code(*tools, f"{name}.cu").items():
        if mangled.partition("_kernelI")[2].partition("EEv")[0] in wanted:
            return code
    raise SystemExit(f"no machine code of {kernel}, {dtype}")


def table(rows: list[tuple[str, Row]], devices: list[Device]) -> Iterator[str]:
    """Yield the lines of the table."""
    titles = ["pass", "kernel", "blocks", "waves", "L2 reads", "full sectors", "conflicts"]
    titles.append("instructions")
    titles += [f"{device.name}, us" for device in devices]
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    first = devices[0]
    for title, row in rows:
        reads = [
            f"{name[0].upper()} {row.l2_reads(first, name) / of['bytes']:.2g}"
            for name, of in row.arrays.items()
            if of["loads"]
        ]
        loaded, stored = (
            row.total(f"{verb}_bytes") / (SECTOR * max(1, row.total(f"{noun}_sectors")))
            for verb, noun in (("loaded", "load"), ("stored", "store"))
        )
        conflicts = row.shared["wavefronts"] / max(1, row.shared["fewest_wavefronts"])
        each = f"{row.instructions() / (row.products / WARP):.2f}" if row.code else "-"
        cells = [
            *(title, row.kernel, str(row.blocks), f"{row.waves(first):.2g}", ", ".join(reads)),
            *(f"{loaded:.0%} / {stored:.0%}", f"{conflicts:.2f}", each),
        ]
        for device in devices:
            seconds, longest = row.estimate(device)
            cells.append(f"{seconds * 1e6:.0f} ({longest}, {row.share(device):.0%})")
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--program", type=Path, required=True, help="the target `traffic`")
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES[:3])
    parser.add_argument("--weights", nargs="+", choices=("masks", "logits"), default=["logits"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--layouts", nargs="+", choices=("NHWC", "NCHW"), default=["NHWC", "NCHW"])
    parser.add_argument("--devices", nargs="+", choices=[device.name for device in DEVICES])
    parser.add_argument("--blocks", type=int, default=12, help="of each kernel, to be run")
    asked = parser.parse_args()
    devices = [d for d in DEVICES if asked.devices is None or d.name in asked.devices]
    tools = (asked.nvcc, asked.nvdisasm)
    rows = []
    for name, pass_, weights, dtype, layout in product(
        asked.problems, asked.passes, asked.weights, asked.dtypes, asked.layouts
    ):
        problem = PROBLEMS[name]
        counted = run(asked.program, problem, (pass_, weights, dtype, layout), asked.blocks)
        code = code_of(counted["kernel"], problem, dtype, tools) if all(tools) else None
        title = f"{name} {dtype} {layout} {pass_.replace('weights', weights)}"
        accesses = lines_of(asked.program, counted["places"])
        rows.append((title, Row(problem, counted, code, accesses)))
    print("\n".join(table(rows, devices)))


if __name__ == "__main__":
    main()
