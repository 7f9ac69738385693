"""compute-sanitizer on every kernel: memcheck or racecheck.

    python -m benchmarks.gpu.sanitize memcheck|racecheck

The lines that the tool prints between an item's launch and its end belong to the item.
"""

import re
import subprocess
import sys

from .processes import end_with_parent
from .worker import LOST, Worker

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit status of the tool if it finds an error


def command(tool: str, done: list[str]) -> list[str]:
    """Return the command line of the tool.

    It prints without a limit: items behind a limit would pass unseen. Racecheck prints a line for
    each pair of instructions, not for each hazard.
    """
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "0"]
    if tool == "racecheck":
        options += ["--racecheck-report", "analysis"]
    launches = [sys.executable, "-m", "benchmarks.gpu.launches", "sanitize"]
    return ["compute-sanitizer", *options, *launches, f"skip={','.join(done)}"]


def main() -> None:
    """Run the tool; write a line for each item when its launch ends."""
    tool = sys.argv[1]
    worker = Worker()
    prefix = f"{tool} "
    last = worker.results.last(worker.task.step)
    done = [item.removeprefix(prefix) for item in last if not worker.is_due(item)]
    process = subprocess.Popen(
        command(tool, done),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=end_with_parent,
    )
    assert process.stdout is not None
    item, said, summary = "", [], ""
    for line in process.stdout:
        print(line, end="", flush=True)
        text = line.strip("= \n") if line.startswith("=========") else ""
        if line.startswith("launch: "):
            if not item and said:
                worker.end(f"{tool} itself", "fail", error=said[:12])
            item, said = prefix + line.removeprefix("launch: ").strip(), []
            worker.begin(item)
        elif line.startswith("launched: "):
            worker.end(item, "fail" if said else "pass", **({"error": said[:12]} if said else {}))
            item, said = "", []
        elif " SUMMARY: " in text:
            summary = text
        elif text not in ("", "COMPUTE-SANITIZER"):
            said.append(text)
    status = process.wait()
    if item:  # the parent starts a new process for the later items
        worker.end(item, "fail", error=said[:12] or f"the process ended with {status}")
        sys.exit(LOST)
    found_nothing = re.match(r"(ERROR|RACECHECK) SUMMARY: 0 ", summary)
    worker.end(f"{tool} summary", "pass" if found_nothing else "fail", error=summary or "none")
    if status not in (0, FOUND):
        sys.exit(status)


if __name__ == "__main__":
    main()
