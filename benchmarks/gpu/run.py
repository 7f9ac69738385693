"""The run: its steps in order, each with a share of the time left."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .. import ROOT, commit
from . import bundle, report, sanitize
from .processes import TIME_IS_UP, Group, Processes
from .results import Results
from .worker import Task, sentence

# Seconds of each step in a run of nine minutes: on a GPU, in a rehearsal on two cores.
STEPS = {
    "install": (30, 150),
    "smoke": (70, 60),
    "results": (100, 220),
    "alone": (50, 20),
    "sanitize": (60, 15),
    "time": (140, 30),
    "counters": (70, 30),
    "large": (20, 5),
}
ENDLESS = ("time", "counters", "large")  # they use all the time they get
STAND_INS = Path(__file__).parent / "stand_ins"
PACKAGES = ["torch", "cupy-cuda13x", "numpy", "ml_dtypes", "pytest", "pytest-xdist", "nanobind"]
PACKAGES += ["nanobind-backend", "scikit-build-core", "jax", "triton"]
TOOLS = {
    "GPU": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
    "clocks": ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv"],
    "nvcc": ["nvcc", "--version"],
    "ncu": ["ncu", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
}
# carafepp's configuration has this line for each CARAFEPP_CUDA.
BUILT = {"ON": "CUDA: built (nvcc ", "EMULATED": "CUDA: built (emulated)"}
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
    "-o",
    "filterwarnings=default",
]
PYTEST += ["-p", "benchmarks.gpu.pytest_results"]


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    out: Path
    bundle: Path
    site: Path
    deadline: float  # seconds
    rehearse: bool
    quick: bool
    steps: tuple[str, ...]


class Run:
    """One run, or its continuation."""

    def __init__(self, options: Options):
        self.options = options
        self.until = time.time() + options.deadline
        self.results = Results(options.out / "results.jsonl")
        self.processes = Processes(ROOT, options.out / "run.log")
        self.cores = len(os.sched_getaffinity(0))
        # The folder of the installed carafepp; None if this Python has an emulated one.
        self.site: Path | None = options.site / ("emulated" if options.rehearse else "gpu")
        self.functions: dict[str, Callable[[float], bool]] = {
            "install": self.install,
            "smoke": self.smoke,
            "results": self.result_tests,
            "alone": self.tests_alone,
            "sanitize": self.sanitize,
            "time": self.time,
            "counters": self.counters,
            "large": self.large_tests,
        }

    # The order of a run

    def go(self) -> int:
        """Run all that no earlier run finished; return the exit status."""
        self._check_is_the_same_run()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._interrupted)
        try:
            self.facts()
            shares = {name: STEPS[name][self.options.rehearse] for name in self.options.steps}
            while shares:
                name = next(iter(shares))
                begin = time.time()
                share = shares[name] / sum(shares.values())
                del shares[name]
                # A build on this machine takes long, and other steps need it.
                share = max(share, 0.5) if name == "install" else share
                self._step(name, begin + (self.until - begin) * share)
                if name == "install" and not self.results.is_done(name):
                    break
        finally:
            self.processes.end_all()
            self._write_table()
        print((self.options.out / "table.txt").read_text())
        endless = () if self.options.rehearse else ENDLESS
        must_end = [name for name in self.options.steps if name not in endless]
        failed = report.has_failures(self.results, self.options.steps)
        return int(failed or not all(map(self.results.is_done, must_end)))

    def _step(self, name: str, until: float) -> None:
        """Run one step; write how it ended, and the table so far."""
        if name != "install" and self.results.is_done(name):
            print(f"{name:9} done before", flush=True)
            return
        begin = time.time()
        try:
            done = self.functions[name](until)
        except Exception as error:  # the next step still runs
            self.results.write(name, "the step itself", "fail", error=sentence(error))
            done = False
        else:
            self.results.recover(name, "the step itself")
        seconds = round(time.time() - begin, 1)
        self.results.write(name, "", "done" if done else "stopped", seconds=seconds)
        counts = report.counts(self.results, name)
        print(f"{name:9} {seconds:5.0f} s  {counts}{'' if done else '; not all ran'}", flush=True)
        self._write_table()

    def _interrupted(self, number: int, _frame: object) -> None:
        self.processes.end_all()
        self._write_table()
        os._exit(128 + number)

    def _write_table(self) -> None:
        (self.options.out / "table.txt").write_text(report.table(self.results))

    def _check_is_the_same_run(self) -> None:
        """Refuse to add lines to a run of other sources."""
        sources = bundle.fingerprint("CMakeLists.txt", "bindings", "cmake", "core", "python")
        mine = {"sources": sources, "rehearse": self.options.rehearse}
        for record in self.results.records("run"):
            theirs = {key: record.get(key) for key in mine}
            if theirs != mine:
                sys.exit(
                    f"{self.results.path} has lines of another run ({theirs}; this one is {mine}). "
                    "Name another folder with --out, or delete it."
                )
        self.results.write("run", "begin", "fact", **mine, deadline=self.options.deadline)

    # The environment of processes

    def environment(self, step: str, until: float) -> dict[str, str]:
        """Return the variables of a process of a step."""
        task = Task(self.results.path, step, "", until, self.options.rehearse, self.options.quick)
        return {**self._plain_environment(), **task.environment()}

    def _plain_environment(self) -> dict[str, str]:
        found = {key: text for key, text in os.environ.items() if not key.startswith("PYTEST_")}
        found["PYTHONUNBUFFERED"] = "1"
        _put_first(found, self.site)
        if self.options.rehearse:
            found["PATH"] = os.pathsep.join([str(STAND_INS), found["PATH"]])
        found["CARAFEPP_REQUIRE"] = "cuda_emulated" if self.options.rehearse else "cuda"
        return found

    def _groups(self, step: str, until: float, groups: list[Group], jobs: int) -> bool:
        environment = self.environment(step, until)
        return self.processes.run_groups(self.results, step, groups, environment, until, jobs)

    # The steps: each tells whether all its items have a result

    def facts(self) -> None:
        """Write facts about the machine and its software."""
        bundled = bundle.read(self.options.bundle).get("commit", "none")
        found = {"commit": commit(), "commit of the bundle": bundled}
        found |= {"date": time.strftime("%Y-%m-%d %H:%M"), "cores": self.cores}
        found["python"] = sys.version.split()[0]
        for name in PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        for name, command in TOOLS.items():
            found[name] = self._output(command)
        self.results.write("facts", "machine", "fact", **found)

    def _output(self, command: list[str]) -> str:
        """Return the last line that a tool prints, or its error."""
        environment = self._plain_environment()
        if shutil.which(command[0], path=environment["PATH"]) is None:
            return "not found"
        status, text = self.processes.run(command, environment, time.time() + 10)
        lines = text.strip().splitlines()
        return lines[-1] if status == 0 and lines else f"{status}: {text[-200:]}"

    def install(self, until: float) -> bool:
        """Install the bundle's wheel and import it; build on this machine if that fails.

        A rehearsal then builds emulated kernels, unless this Python has them.
        """
        folder, site = self.options.bundle, self.options.site / "gpu"
        wheel = bundle.installation((folder / "run").glob("*.whl"), site)
        reason = bundle.why_not(bundle.read(folder))
        reason = reason or self._fails(wheel, until) or self._not_imported("wheel", site, "ON")
        if reason:
            print(f"the bundle cannot be used: {reason}", flush=True)
            how = "fail" if self.options.rehearse else "skip"
            self.results.write("install", "wheel", how, error=reason)
        if self.options.rehearse:
            cuda = "EMULATED"
            if not self._not_imported("installed before", None, cuda):
                self.site = None
                return True
        elif reason:
            cuda = "ON"
        else:
            self._start_mmcv()
            return True
        reason = self._built(cuda, until) or self._not_imported("build", self.site, cuda)
        if reason:
            self.results.write("install", "build", "fail", error=reason)
            return False
        self._start_mmcv()
        return True

    def _built(self, cuda: str, until: float) -> str:
        """Build on this machine, with the bundle's build requirements; return why that failed.

        Emulated kernels come from the bundle's wheel, if it has one.
        """
        assert self.site is not None
        folder, marker = self.options.bundle, self.site / "sources"
        environment = self._plain_environment()
        if (folder / "build").exists():
            tools = self.options.site / "build"
            wheels = (folder / "build").glob("*.whl")
            if reason := self._fails(bundle.installation(wheels, tools), until):
                return reason
            _put_first(environment, tools)
        if not (marker.exists() and marker.read_text() == bundle.fingerprint()):
            build = bundle.build(self.site, cuda)
            if cuda == "EMULATED" and (folder / "emulated").exists():
                build = bundle.installation((folder / "emulated").glob("*.whl"), self.site)
            if reason := self._fails(build, until, environment):
                return reason
            marker.write_text(bundle.fingerprint())
        for backend in (folder / "run").glob("nanobind_backend*.whl"):
            if reason := self._fails(bundle.installation([backend], self.site), until):
                return reason
        return ""

    def _fails(
        self, command: list[str], until: float, environment: dict[str, str] | None = None
    ) -> str:
        """Run a command; return its error, or nothing."""
        status, said = self.processes.run(command, environment or self._plain_environment(), until)
        return "" if status == 0 else f"{' '.join(command[1:4])}: {status}. {said[-600:]}"

    def _not_imported(self, item: str, site: Path | None, cuda: str) -> str:
        """Import carafepp in a new process; return its configuration if CUDA is built otherwise."""
        environment = self._plain_environment()
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
        if site is not None and (site / "carafepp").exists():
            bundle.update_python(site)
        _put_first(environment, site)
        command = [sys.executable, "-c", "import carafepp; print(carafepp._core.config())"]
        status, said = self.processes.run(command, environment, time.time() + 60)
        if status != 0 or BUILT[cuda] not in said:
            return f"carafepp was imported as: {said[-600:]}"
        self.results.write("install", item, "pass", config=said.strip())
        return ""

    def smoke(self, until: float) -> bool:
        """Run every implementation against the CPU."""
        environment = self.environment("smoke", until)
        environment["CARAFEPP_GPU_GROUP"] = "list"
        command = [sys.executable, "-m", "benchmarks.gpu.smoke"]
        status, text = self.processes.run([*command, "--list"], environment, until)
        listed = re.search(r"(?m)^implementations: (.*)$", text)
        if status != 0 or not listed:
            how = "stopped" if status == TIME_IS_UP else "fail"
            self.results.write("smoke", "list", how, error=f"{status}: {text[-400:]}")
            return False
        self.results.write("smoke", "list", "pass")
        names = json.loads(listed[1])
        # Few names share a process: an illegal access ends it, and a graph captures its first call.
        count = 20 if self.options.rehearse else 3
        groups = [
            Group(names[k], [*command, *names[k : k + count]], patience=60)
            for k in range(0, len(names), count)
        ]
        jobs = self.cores if self.options.rehearse else max(1, self.cores // 2)
        return self._groups("smoke", until, groups, jobs)

    def result_tests(self, until: float) -> bool:
        """Run the tests of results on several processes, and the tests of streams beside them."""
        workers = ["-n", str(max(2, self.cores - 4)), "--max-worker-restart", "100"]
        tests = ["tests/test_cuda.py", "-m", "not alone and not slow"]
        if self.options.quick:
            tests += ["-k", "other_normalizers"]
        groups = [
            _tests("results", *workers, *tests),
            _tests("stand-ins", "tests/test_streams.py"),
        ]
        return self._groups("results", until, groups, 2)

    def tests_alone(self, until: float) -> bool:
        """Run tests that need the whole GPU, one process after the other."""
        alone = ["tests/test_cuda.py", "-m", "alone and not slow", "-k"]
        groups = [
            _tests("cupy", *alone, "cupy"),
            _tests("torch", *alone, "torch"),
            _tests("operators", "tests/test_torch_operators.py", "-k", "on_a_gpu"),
        ]
        return self._groups("alone", until, groups, 1)

    def large_tests(self, until: float) -> bool:
        """Run the tests on arrays of more than 2^31 elements."""
        groups = [_tests("large", "tests/test_cuda.py", "-m", "slow")]
        return self._groups("large", until, groups, 1)

    def sanitize(self, until: float) -> bool:
        """Run every kernel under memcheck and racecheck at once."""
        command = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
        groups = [Group(tool, [*command, tool]) for tool in sanitize.TOOLS]
        return self._groups("sanitize", until, groups, len(groups))

    def time(self, until: float) -> bool:
        """Time items by priority until the time is up."""
        command = [sys.executable, "-m", "benchmarks.gpu.timing"]
        return self._groups("time", until, [Group("timing", command, self._mmcv())], 1)

    def counters(self, until: float) -> bool:
        """Count by priority until the time is up."""
        command = [sys.executable, "-m", "benchmarks.gpu.counters"]
        return self._groups("counters", until, [Group("counters", command)], 1)

    # mmcv

    def _mmcv(self) -> dict[str, str]:
        """Return the variables that name mmcv's files, if the bundle has them."""
        tree = self.options.bundle / "mmcv"
        if not tree.exists():
            return {}
        extensions = self.options.site / "extensions"
        return {"CARAFEPP_GPU_MMCV": str(tree), "TORCH_EXTENSIONS_DIR": str(extensions)}

    def _start_mmcv(self) -> None:
        """Start the build of mmcv's CARAFE beside the next steps."""
        if self._mmcv() and not self.options.rehearse:
            command = [sys.executable, "-m", "benchmarks.gpu.mmcv"]
            environment = {**self._plain_environment(), **self._mmcv()}
            with (self.options.site / "mmcv.log").open("wb") as log:
                self.processes.start(command, environment, log)


def _tests(name: str, *options: str) -> Group:
    """Return a group of tests; it is complete if all passed, some failed, or none was left."""
    return Group(name, [*PYTEST, *options], fine=(0, 1, 5))


def _put_first(environment: dict[str, str], site: Path | None) -> None:
    """Let Python search a folder before all others."""
    paths = [str(site or ""), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def default_site() -> Path:
    """Return the default --site: outside the tree and the results."""
    return Path(tempfile.gettempdir()) / "carafepp-gpu"
