"""`python -m carafepp` and what CARAFEPP_LOG prints."""

import os
import re
import subprocess
import sys

import carafepp


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_alone_it_tells_the_installation():
    done = run("-m", "carafepp", CARAFEPP_NUM_THREADS="3")
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert facts["version"] == carafepp.__version__
    assert facts["threads"] == "3"
    assert {"compiler", "built for", "this processor has", "devices"} <= set(facts)


def test_an_unknown_command_is_told_the_known_ones():
    done = run("-m", "carafepp", "dmeo")
    assert done.returncode == 2
    assert "no command 'dmeo'" in done.stderr
    assert "python -m carafepp demo" in done.stderr
    assert "python -m carafepp upsample" in done.stderr


CALL = """
import numpy as np, carafepp
carafepp.reassemble(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
with carafepp.force_implementation("reassemble_any_ref"):
    carafepp.reassemble(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
"""


def test_the_log_tells_which_implementation_was_chosen():
    done = run("-c", CALL, CARAFEPP_LOG="debug")
    chosen, forced = done.stderr.splitlines()
    assert re.match(r"carafepp: \[reassemble\] reassemble_\w+", chosen)
    assert forced == "carafepp: [reassemble] reassemble_any_ref (forced)"


def test_without_the_log_nothing_is_printed():
    done = run("-c", CALL, CARAFEPP_LOG="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
