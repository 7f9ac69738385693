"""Shared by all tests: options, hypothesis profiles, libraries and random numbers."""

import gc
import os
import re
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import carafepp
import products
from skips import import_or_skip, summarize

# PyTorch's own threads wait long for each other if several tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile(
    "short",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("long", max_examples=2_500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        default="0/1",
        metavar="K/N",
        help="of tests over a product (tests/products.py), run part K of N equal ones, from 0",
    )
    parser.addoption(
        "--passed",
        type=Path,
        metavar="FILE",
        help="--passed=FILE: leave out the tests that FILE lists, and add those that pass to it",
    )


def _part(config) -> tuple[int, int]:
    given = config.getoption("--part")
    numbers = re.fullmatch(r"(\d+)/(\d+)", given)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise pytest.UsageError(f"--part must be K/N with 0 <= K < N; got {given!r}")
    return int(numbers[1]), int(numbers[2])


def pytest_configure(config):
    _part(config)  # an error for a wrong one, at once
    path = config.getoption("--passed")
    if path and not hasattr(config, "workerinput"):  # the process of workers adds for them
        config.pluginmanager.register(_Passed(path))


class _Passed:
    """Adds the names of tests that pass to a file, at the end of the run."""

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.names.append(report.nodeid)

    def pytest_sessionfinish(self):
        with self.path.open("a") as file:
            file.writelines(f"{name}\n" for name in self.names)


def pytest_generate_tests(metafunc):
    products.parametrize(metafunc, *_part(metafunc.config))


def pytest_collection_modifyitems(config, items):
    """Deselect what --passed lists. Deselect exhaustive and skip slow tests, unless -m asks."""
    asked = config.getoption("-m")
    part, parts = _part(config)
    path = config.getoption("--passed")
    passed = set(path.read_text().splitlines()) if path and path.exists() else ()

    def kept(item):
        if item.nodeid in passed:
            return False
        if item.get_closest_marker("product") or not item.get_closest_marker("exhaustive"):
            return True
        return products.are_exhaustive(config) and zlib.crc32(item.nodeid.encode()) % parts == part

    config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
    items[:] = [item for item in items if kept(item)]
    for item in items:
        if item.get_closest_marker("slow") and not asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def pytest_terminal_summary(terminalreporter):
    """Tell why tests were skipped, in few lines."""
    skipped = terminalreporter.stats.get("skipped", [])
    for line in summarize(report.longrepr[2].removeprefix("Skipped: ") for report in skipped):
        terminalreporter.write_line(line)


def pytest_collection_finish():
    """Hide the very many tests from the garbage collector."""
    gc.freeze()


@pytest.fixture
def without_cuda():
    """For arrays that only pretend to be on a GPU: they must never reach a real one."""
    if "CUDA: not built" not in carafepp._core.config():
        pytest.skip("a build with CUDA would believe the pretended pointers")


@pytest.fixture(scope="session")
def torch():
    return import_or_skip("torch")


@pytest.fixture(scope="session")
def array_api_strict():
    return import_or_skip("array_api_strict")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Return random numbers that depend on the name of the test alone."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
