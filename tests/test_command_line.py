"""`python -m carafepp` and what CARAFEPP_LOG prints."""

import os
import re
import subprocess
import sys

import pytest

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
    assert {"compiler", "built for", "this processor has"} <= set(facts)
    assert re.fullmatch(r"not built|built \((emulated|nvcc \d.*)\)", facts["CUDA"])
    assert ("CUDA devices" in facts) == (facts["CUDA"] != "not built")


@pytest.mark.parametrize("argument", ["--help", "-h", "help"])
def test_help_tells_the_commands(argument):
    done = run("-m", "carafepp", argument)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("usage: python -m carafepp", "demo", "upsample", "version"):
        assert words in done.stdout


def test_help_of_a_command_is_its_own():
    for arguments in (["help", "upsample"], ["upsample", "--help"], ["upsample", "-h"]):
        done = run("-m", "carafepp", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: python -m carafepp upsample" in done.stdout
        assert "--factor N" in done.stdout


@pytest.mark.parametrize("argument", ["--version", "version"])
def test_version(argument):
    done = run("-m", "carafepp", argument)
    assert (done.returncode, done.stdout) == (0, f"carafepp {carafepp.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dmeo"], ["dmeo", "demo", "upsample", "help", "version"]),
        (["help", "dmeo"], ["dmeo", "demo", "upsample"]),
        (["--verbose"], ["--verbose"]),
        (["version", "please"], ["please"]),
        (["upsample", "--nonsense"], ["python -m carafepp upsample", "--factor"]),
    ],
)
def test_a_wrong_command_line_is_told_what_there_is(arguments, words):
    done = run("-m", "carafepp", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: python -m carafepp" in done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_the_commands_import_nothing_that_the_configuration_does_not_need():
    body = "import sys, carafepp.__main__ as m; m.main([]); print(*sys.modules, sep='\\n')"
    modules = run("-c", body).stdout.split()
    assert "carafepp.demo" not in modules
    assert "carafepp.upsample" not in modules


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


# (variable, wrong value, its rule)
WRONG = [
    ("CARAFEPP_ISA", "mmx", r"\w+(, \w+)*( or \w+)?"),
    ("CARAFEPP_NUM_THREADS", "abc", "a whole number from 1 to 1024"),
    ("CARAFEPP_CUDA_KERNELS", "some", "all or generic"),
    ("CARAFEPP_LOG", "verbose", "off or debug"),
]


@pytest.mark.parametrize(("variable", "value", "rule"), WRONG)
def test_a_wrong_variable_is_an_error_of_the_next_call(variable, value, rule):
    sentence = f"the environment variable {variable} must be {rule}; got {value}."
    done = run("-c", CALL, **{variable: value})
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"ValueError: \[reassemble\] {sentence}", last), last
    done = run("-m", "carafepp", **{variable: value})
    assert done.returncode == 0
    assert re.search(rf"^calls fail: {sentence}$", done.stdout, re.MULTILINE), done.stdout


def test_variables_that_are_empty_or_have_their_defaults_change_nothing():
    names = ("CARAFEPP_ISA", "CARAFEPP_CUDA_KERNELS", "CARAFEPP_LOG")
    for values in (
        dict.fromkeys(names, ""),
        {"CARAFEPP_CUDA_KERNELS": "all", "CARAFEPP_LOG": "off"},
    ):
        done = run("-c", CALL, **values)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_the_log_nothing_is_printed():
    done = run("-c", CALL, CARAFEPP_LOG="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
