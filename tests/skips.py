"""Skip a test that lacks something. A promise of CARAFEPP_REQUIRE turns the skip into a failure."""

import importlib
import os

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
