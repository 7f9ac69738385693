"""A pytest plugin: it writes a line of results for each test, and ends a process without a device.

    python -m pytest -p benchmarks.gpu.pytest_results ...

It leaves out tests that an earlier run finished. After an illegal access, every later test of the
process would fail. So the process ends, and pytest-xdist or the parent starts a new one.
"""

import os
import sys
from typing import Any

import pytest

from .worker import LOST, Worker, device_is_lost

_KEY = "carafepp_gpu_finished"


class Lines:
    """Writes lines in the process that gets the reports: the controller, or the only process."""

    def __init__(self, worker: Worker, finished: set[str], writes: bool):
        self.worker, self.finished, self.writes = worker, finished, writes

    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist the finished tests: all workers must collect the same."""
        node.workerinput[_KEY] = sorted(self.finished)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out finished tests."""
        left = [item for item in items if item.nodeid not in self.finished]
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid in self.finished])
        items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins."""
        if self.writes:
            self.worker.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write how a test ended: in its call, or before."""
        if not self.writes or (report.when == "teardown" and report.passed):
            return
        if report.failed:
            if self._has_failed(report.nodeid):
                return  # its process wrote the cause before it ended
            self.worker.end(report.nodeid, "fail", error=_last_lines(report.longreprtext))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.worker.end(report.nodeid, "skip", reason=reason)
        elif report.when == "call":
            seconds = round(report.duration, 3)
            self.worker.end(report.nodeid, "pass", seconds=seconds)

    def _has_failed(self, nodeid: str) -> bool:
        last = self.worker.results.last(self.worker.task.step).get(nodeid, {})
        return last.get("status") == "fail"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        """End the process after a test that lost the device."""
        report = yield
        if report.failed and device_is_lost():
            print(report.longreprtext, file=sys.stderr, flush=True)
            self.worker.end(item.nodeid, "fail", error=_last_lines(report.longreprtext))
            os._exit(LOST)
        return report


def _last_lines(text: str) -> str:
    """Return the lines with the error."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return " ".join(marked or text.split())[:400]


def pytest_configure(config: Any) -> None:
    """Register the plugin."""
    worker = Worker()
    given = getattr(config, "workerinput", {}).get(_KEY)
    finished = set(given) if given is not None else worker.results.finished(worker.task.step)
    config.pluginmanager.register(Lines(worker, finished, writes=given is None), "gpu_lines")
