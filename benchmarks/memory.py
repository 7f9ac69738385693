"""Peak memory of a call, beyond what was resident before it.

A call of carafepp is measured as the first one of a process of its own, because what it keeps for
the next call (scratch of its threads, their stacks) would not show later. Such processes are
forked by a server, `python -m benchmarks.memory`, that has imported carafepp and never called it.
Pages of files, which are code that runs for the first time, do not count.
"""

import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from . import ROOT
from .implementations import Calls
from .problems import PROBLEMS, Arrays
from .rivals import Rival


def _status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def _begin() -> int:
    """Give free memory back, restart the peak, and return the bytes that are resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """Call; return the result and the bytes, or None where the system does not tell."""
    try:
        before, files = _begin(), _status("RssFile")
    except (OSError, AttributeError):
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before - (_status("RssFile") - files))


def peak_in_a_process(rival: Rival, case_name: str) -> int | None:
    """Return the bytes of carafepp's first call in a process of its own, or None."""
    fields = ("pass_", "name", "source", "layout", "dtype", "threads", "outputs")
    what = {"case": case_name, **{field: getattr(rival, field) for field in fields}}
    server = _server()
    print(json.dumps(what), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    """Start the server, which ends when this process closes its input."""
    command = [sys.executable, "-m", "benchmarks.memory"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def _serve() -> None:
    """Answer each line of input with one of output."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(_measure(json.loads(line))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("null", flush=True)


def _measure(what: dict[str, Any]) -> int | None:
    arrays = Arrays(PROBLEMS[what["case"]], what["source"], constant=True)
    calls = Calls(arrays, what["dtype"], what["layout"])
    options = {key: what[key] for key in ("threads", "outputs")}
    rival = calls.rival(what["pass_"], what["name"], chosen=False, **options)
    with rival.settings():
        return peak(rival.call)[1]


if __name__ == "__main__":
    _serve()
