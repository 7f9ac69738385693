"""Skip a test that lacks something. A promise of CARAFEPP_REQUIRE turns the skip into a failure."""

import importlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

TEST_ALL = 'pip install ".[test-all]"'


def skip(what: str, reason: str) -> None:
    """Skip a test or a module, or fail if CARAFEPP_REQUIRE (say `torch,cuda`) promises `what`."""
    if what in os.environ.get("CARAFEPP_REQUIRE", "").split(","):
        pytest.fail(f"CARAFEPP_REQUIRE promises {what}, but: {reason}")
    pytest.skip(f"{what}: {reason}", allow_module_level=True)


def import_or_skip(name: str, install: str = TEST_ALL):
    """Return a module. `install` is the command that the skip names."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        skip(name, f"{error}; {install}")


def summarize(reasons: Iterable[str]) -> list[str]:
    """Return at most five lines that tell how many tests were skipped, and why."""
    counts: Counter[str] = Counter()
    modules = defaultdict(set)
    for reason in reasons:
        if missing := re.search(r"No module named '(\w+)[^;]*; (.*)", reason):
            reason = missing[2]
            modules[reason].add(missing[1])
        counts[re.sub(r"^\w+_\w+( declines)?: ", "", reason)] += 1  # without a kernel's name
    for command, names in modules.items():
        counts[f"not installed: {', '.join(sorted(names))}; {command}"] = counts.pop(command)
    if not counts:
        return []
    most = counts.most_common(3)
    lines = [f"{counts.total():,} tests or files of tests were skipped:"]
    lines += [f"{count:7,}  {reason}" for reason, count in most]
    if len(counts) > len(most):
        others = counts.total() - sum(count for _, count in most)
        lines.append(f"{others:7,}  for {len(counts) - len(most)} other reasons: see pytest -rs")
    return lines
