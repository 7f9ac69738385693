"""The GPU run of the benchmarks: what it keeps when processes crash, hang or are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import carafepp
from benchmarks.gpu import counters, report, sanitize
from benchmarks.gpu.processes import Group, Processes
from benchmarks.gpu.results import Results
from benchmarks.gpu.run import BUILT, STAND_INS
from benchmarks.gpu.worker import Task

ROOT = Path(__file__).parent.parent

# Items are verbs: what the process does at each.
WORKER = """
import os, sys, time
from benchmarks.gpu.worker import Skip, Worker

def compute(item):
    verb = item.split()[0]
    if verb == "abort": os.abort()
    if verb == "hang": time.sleep(100)
    if verb == "sleep": time.sleep(0.05)
    if verb == "raise" or verb == "lose": raise ValueError("of\\nthis item")
    if verb == "skip": raise Skip("a reason")
    return {"answer": 42}

worker = Worker(lambda: sys.argv[1:] == ["lose"])
worker.run(os.environ["ITEMS"].split(","), compute)
"""


class Runner:
    """Runs groups in a folder, as a step does."""

    def __init__(self, folder: Path):
        self.results = Results(folder / "results.jsonl")
        self.processes = Processes(ROOT, folder / "run.log")

    def run(self, groups, seconds=60.0):
        until = time.time() + seconds
        task = Task(self.results.path, "step", "", until, rehearse=True, quick=False)
        environment = {**os.environ, **task.environment(), "PYTHONPATH": str(ROOT)}
        return self.processes.run_groups(self.results, "step", groups, environment, until, 2)

    def statuses(self):
        return {item: r["status"] for item, r in self.results.last("step").items()}


def worker(items, *arguments, **options):
    command = [sys.executable, "-c", WORKER, *arguments]
    return Group(items[0], command, {"ITEMS": ",".join(items)}, **options)


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)


def test_a_build_is_known_by_its_configuration():
    lines = carafepp._core.config().splitlines()
    wanted = [cuda for cuda, line in BUILT.items() if any(one.startswith(line) for one in lines)]
    assert len(wanted) == ("CUDA: not built" not in lines)


def test_a_crash_costs_one_item(runner):
    assert runner.run([worker(["first", "abort", "second", "skip", "raise", "third"])])
    assert runner.statuses() == {
        "first": "pass",
        "abort": "fail",
        "second": "pass",
        "skip": "skip",
        "raise": "fail",
        "third": "pass",
    }
    last = runner.results.last("step")
    assert "SIGABRT" in last["abort"]["error"]
    assert last["raise"]["error"] == "ValueError: of this item"
    assert last["first"]["answer"] == 42


def test_a_process_that_lost_the_device_is_started_anew(runner):
    assert runner.run([worker(["a", "lose b", "c", "lose d"], "lose")])
    assert runner.statuses() == {"a": "pass", "lose b": "fail", "c": "pass", "lose d": "fail"}


def test_an_item_that_hangs_costs_itself(runner):
    assert runner.run([worker(["a", "hang", "b"], patience=3)])
    assert runner.statuses() == {"a": "pass", "hang": "fail", "b": "pass"}
    assert "it hung" in runner.results.last("step")["hang"]["error"]


def test_a_step_ends_at_its_time_and_goes_on_in_the_next_run(runner):
    assert not runner.run([worker(["a", "hang", "b"])], seconds=3)
    assert runner.statuses() == {"a": "pass", "hang": "stopped"}
    assert not runner.run([worker([f"sleep {number}" for number in range(200)])], seconds=2)
    assert runner.run([worker(["a", "b"])])
    assert runner.statuses().items() >= {"a": "pass", "hang": "stopped", "b": "pass"}.items()
    assert [r["status"] for r in runner.results.records("step") if r["item"] == "a"] == [
        "begin",
        "pass",
    ]


def test_a_process_that_does_not_start_is_one_failure(runner):
    groups = [
        Group("missing", ["/no/such/command"]),
        Group("broken", [sys.executable, "-c", "import sys; sys.exit('what is wrong')"]),
        worker(["a"]),
    ]
    assert not runner.run(groups)
    assert runner.statuses() == {"missing": "fail", "broken": "fail", "a": "pass"}
    assert "what is wrong" in runner.results.last("step")["broken"]["error"]
    assert runner.run([Group("broken", [sys.executable, "-c", ""])])  # the next run mends it
    assert runner.statuses()["broken"] == "pass"


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux")
def test_a_killed_run_keeps_every_line_and_goes_on(runner, tmp_path):
    items = [f"sleep {number}" for number in range(40)]
    script = (
        "import sys; from pathlib import Path; from test_gpu_run import Runner, worker;"
        f"Runner(Path(sys.argv[1])).run([worker({items})])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
    while len(runner.results.finished("step")) < 5:
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(0.3)
    kept = runner.results.finished("step")
    assert 5 <= len(kept) < len(items)
    time.sleep(0.3)
    assert runner.results.finished("step") == kept  # nobody writes any more
    with runner.results.path.open("a") as file:
        file.write('{"step": "step", "item": "half')
    again = Runner(tmp_path)
    assert again.run([worker(items)])
    assert again.statuses() == dict.fromkeys(items, "pass")
    ended = [r["item"] for r in again.results.records("step") if r["status"] == "pass"]
    assert len(ended) == len(items)


@pytest.mark.exhaustive
def test_a_test_that_ends_its_process_costs_one_line(runner, tmp_path):
    (tmp_path / "test_crash.py").write_text(
        "import os\nimport pytest\n"
        "def test_a(): pass\n"
        "def test_b(): os._exit(3)\n"
        "def test_c(): assert 1 == 2, 'because'\n"
        "@pytest.mark.skip(reason='not here')\ndef test_d(): pass\n"
        "def test_e(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_results"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    environment = {"PYTEST_ADDOPTS": ""}
    for workers in ([], ["-n", "2"]):
        runner.results.path.unlink(missing_ok=True)
        runner = Runner(tmp_path)
        assert runner.run([Group("tests", [*command, *workers], environment, fine=(0, 1, 5))])
        found = {item.partition("::")[2]: how for item, how in runner.statuses().items()}
        assert found == {
            "test_a": "pass",
            "test_b": "fail",
            "test_c": "fail",
            "test_d": "skip",
            "test_e": "pass",
        }


# The commands and the table


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_sanitizer_is_called_as_its_stand_in_knows_it(tool):
    name, *arguments = sanitize.command(tool, ["a kernel f32"])
    program = arguments.index(sys.executable)
    command = [str(STAND_INS / name), *arguments[:program], sys.executable, "-c", "print('ran')"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ran" in done.stdout
    assert " SUMMARY: 0 " in done.stdout
    wrong = subprocess.run([*command[:1], "--tol", tool], capture_output=True, text=True)
    assert wrong.returncode == 2


def test_an_error_that_the_sanitizer_finds_costs_one_item(runner, tmp_path):
    """A tool whose program ends at its second launch, as after an illegal access."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "done = sys.argv[-1].removeprefix('skip=').split(',')\n"
        "print('========= COMPUTE-SANITIZER')\n"
        "for name in ('a', 'b', 'c'):\n"
        "    if name in done: continue\n"
        "    print('launch:', name, flush=True)\n"
        "    if name == 'b':\n"
        "        print('========= Invalid __global__ read of size 4 bytes')\n"
        "        print('========= ERROR SUMMARY: 1 error')\n"
        "        sys.exit(9)\n"
        "    print('launched:', name)\n"
        "print('========= ERROR SUMMARY: 0 errors')\n"
    )
    tool.chmod(0o755)
    command = [sys.executable, "-m", "benchmarks.gpu.sanitize", "memcheck"]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert runner.run([Group("memcheck", command, environment)])
    assert runner.statuses() == {
        "memcheck a": "pass",
        "memcheck b": "fail",
        "memcheck c": "pass",
        "memcheck summary": "pass",
    }
    assert "Invalid __global__ read" in runner.results.last("step")["memcheck b"]["error"][0]


def test_the_profiler_is_called_as_its_stand_in_knows_it(tmp_path):
    log = tmp_path / "log.csv"
    name, *arguments = counters.command(list(counters.METRICS.values()), log, "fpn2 float32")
    program = arguments.index(sys.executable)
    prints = "print('launched: a'); print('launched: b')"
    command = [str(STAND_INS / name), *arguments[:program], sys.executable, "-c", prints]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = counters.parsed(log.read_text())
    assert len(rows) == 2
    assert set(rows[0]) == {"kernel", *counters.METRICS}
    command[command.index("--metrics") + 1] = "no_such_metric"
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_counts_of_the_profiler_are_read():
    us, reads = counters.METRICS["us"], counters.METRICS["dram_read"]
    text = (
        "==PROF== Connected\n==PROF== Profiling\n"
        f'"ID","Process ID","Kernel Name","{us}","{reads}"\n'
        '"","","","ns","byte"\n'
        '"0","7","void a(Problem)","1,234,500","5,000.5"\n'
        '"1","7","void b(Problem)","2","n/a"\n'
    )
    assert counters.parsed(text) == [
        {"kernel": "void a(Problem)", "us": 1234.5, "dram_read": 5000.5},
        {"kernel": "void b(Problem)", "us": 0.002},
    ]


def test_the_table_is_short_and_tells_the_failures(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.write("facts", "machine", "fact", GPU="a GPU " * 40, commit="abc")
    for number in range(300):
        error = "begin " + 300 * "x" + f" the cause {number}"
        results.write("smoke", f"kernel {number}", "fail", error=error)
        results.write("results", f"test {number}", "pass")
    results.write("smoke", "", "done", seconds=1.5)
    results.write("results", "", "stopped", seconds=2)
    text = report.table(results)
    assert len(text.splitlines()) <= report.LINES
    assert max(map(len, text.splitlines())) <= 150
    assert "smoke         2 s  300 failed" in text
    assert "results       2 s  300 passed; NOT ALL RAN" in text
    assert "the cause 0" in text
    assert report.has_failures(results, ["smoke", "results"])
    assert not report.has_failures(results, ["results"])
    assert [results.is_done(step) for step in ("smoke", "results")] == [True, False]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_wrong_arguments_are_refused(tmp_path):
    done = run("nothing")
    assert done.returncode == 2
    assert "steps must be of install, smoke, results" in done.stderr
    done = run("--deadline", "0")
    assert done.returncode == 2
    assert "--deadline must be positive; got 0" in done.stderr


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    done = run("--rehearse", "--out", str(tmp_path / "file"))
    assert done.returncode == 2
    assert "--out and --site must be folders to write to" in done.stderr


def test_rubbish_among_the_lines_is_no_result(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'42\n"x"\n{"a": 1}\n\xff\n')
    results = Results(path)
    results.write("step", "a", "pass")
    assert list(results.last("step")) == ["a"]
    assert report.table(results)


def test_lines_of_another_run_are_not_mixed_in(tmp_path):
    line = {"step": "run", "item": "begin", "status": "fact", "sources": "x", "rehearse": True}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    done = run("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "has lines of another run" in done.stderr


def test_the_run_imports_nothing_of_the_tests(torch):
    program = (
        "import sys; import benchmarks.gpu.run, benchmarks.gpu.timing, benchmarks.gpu.launches,"
        " benchmarks.gpu.sanitize, benchmarks.gpu.counters, benchmarks.gpu.smoke;"
        "files = {n: getattr(m, '__file__', None) or '' for n, m in sys.modules.items()};"
        f"print([n for n, file in files.items() if file.startswith({str(ROOT / 'tests')!r})])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_watched_process_imports_no_pytorch():
    """Tools that watch a process slow down its start: PyTorch's would take most of their time."""
    program = "import sys, benchmarks.gpu.launches; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
