"""Processes with a time limit: each computes a group of items, and starts again after a crash."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .results import Results
from .worker import LOST

TIME_IS_UP = "its time was up"
PATIENCE = 90  # seconds without a new line until a process counts as hanging
_KEPT = 50_000  # characters of a process's output
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Group:
    """Items that one process computes.

    `fine` holds the exit statuses of a process that has computed all its items.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    fine: tuple[int, ...] = (0,)
    patience: float = PATIENCE


class Processes:
    """Starts processes; ends all of them with the run."""

    def __init__(self, root: Path, log: Path):
        self.root, self.log = root, log
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # a signal may arrive while this thread holds it

    def start(
        self, command: list[str], environment: dict[str, str], output: IO[bytes] | int
    ) -> subprocess.Popen:
        """Start a process in a new process group; it ends with this process."""
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        with self._lock:
            self._running.add(process)
        return process

    def end(self, process: subprocess.Popen) -> None:
        """Kill a process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it
            process.wait(5)
        with self._lock:
            self._running.discard(process)

    def end_all(self) -> None:
        """Kill all processes."""
        with self._lock:
            running = list(self._running)
        for process in running:
            self.end(process)

    def run(
        self,
        command: list[str],
        environment: dict[str, str],
        until: float,
        is_alive: Callable[[], bool] = lambda: True,
    ) -> tuple[int | str, str]:
        """Run a process until its end or a time; return its status, or why it was killed.

        The second result is the end of its output, which the log has too.
        """
        with tempfile.TemporaryFile() as output:
            status: int | str | None = None
            try:
                process = self.start(command, environment, output)
            except OSError as error:
                return f"did not start: {error}", ""
            while status is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(0.1)
                if status is None and time.time() >= until:
                    status = TIME_IS_UP
                elif status is None and not is_alive():
                    status = "it hung"
            self.end(process)
            output.seek(max(0, output.seek(0, os.SEEK_END) - _KEPT))
            text = output.read().decode(errors="replace")
        with self._lock, self.log.open("a") as log:
            print("$", *command, f"\n{text}\n-> {status}", file=log, flush=True)
        return status, text

    def run_groups(
        self,
        results: Results,
        step: str,
        groups: Iterable[Group],
        environment: dict[str, str],
        until: float,
        jobs: int,
    ) -> bool:
        """Run groups, `jobs` of them at once; return whether all ended well."""

        def run(group: Group) -> bool:
            return self._run_group(results, step, group, environment, until)

        with ThreadPoolExecutor(jobs) as pool:
            return all(list(pool.map(run, groups)))

    def _run_group(
        self, results: Results, step: str, group: Group, environment: dict[str, str], until: float
    ) -> bool:
        """Start a group's process until it ends well, makes no progress, or its time is up."""

        def lines() -> list[dict[str, Any]]:
            return [r for r in results.records(step) if r.get("group") == group.name]

        environment = {**environment, **group.environment, "CARAFEPP_GPU_GROUP": group.name}
        while time.time() < until:
            before = count = len(lines())
            last_line = time.time()

            def is_alive() -> bool:
                nonlocal count, last_line
                if len(lines()) > count:
                    count, last_line = len(lines()), time.time()
                return time.time() - last_line < group.patience

            status, said = self.run(group.command, environment, until, is_alive)
            in_time = status != TIME_IS_UP
            has_progressed = len(lines()) > before
            error = f"{_in_words(status)}. {said[-300:]}"
            last = {record["item"]: record["status"] for record in lines()}
            begun = [item for item, how in last.items() if how == "begin"]
            for item in begun:
                how = "fail" if in_time else "stopped"
                results.write(step, item, how, error=error, group=group.name)
            if status in group.fine:
                results.recover(step, group.name)
                return time.time() < until  # or its time was up
            if in_time and not begun and not (has_progressed and status == LOST):
                results.write(step, group.name, "fail", error=error, group=group.name)
                return False
        return False


def _in_words(status: int | str) -> str:
    """Return a status in words."""
    if isinstance(status, int) and status < 0:
        return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}" if isinstance(status, int) else status


def end_with_parent() -> None:
    """Let the system kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
