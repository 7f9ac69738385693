"""The rows that tests over a product of axes have by default."""

import itertools

import products
from cases import CASES
from functions import ISAS, LAYOUTS_OF_KERNELS, takes
from skips import summarize


def test_each_pair_of_values_comes():
    axes = [{name: name for name in names} for names in ("abcd", "efg", "hi")]
    rows = list(products._covering_rows(axes, [], lambda _: True))
    for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) < 4 * 3 * 2


def test_values_that_do_not_go_together_do_not_come():
    axes = [{name: name for name in names} for names in ("ab", "ab")]
    rows = list(products._covering_rows(axes, [], lambda row: row[0] != row[1]))
    assert set(rows) == {("a", "b"), ("b", "a")}


def test_a_single_axis_meets_all_values_of_its_turns():
    axis, turn = {str(k): k for k in range(9)}, {name: name for name in "abc"}
    rows = list(products._covering_rows([axis], [turn, turn], lambda _: True))
    assert len(rows) == 9
    assert {row[1:] for row in rows} == set(itertools.product("abc", "abc"))


def test_each_kernel_has_many_cases():
    """A layout has more than one instruction set."""
    valid = takes("reassemble", "output")
    axes = [CASES, {name: name for name in LAYOUTS_OF_KERNELS}, {name: name for name in ISAS}]
    chosen = list(
        products._covering_rows(axes, [], lambda row: valid(CASES[row[0]], row[1], row[2]))
    )
    for layout, isa in itertools.product(LAYOUTS_OF_KERNELS, ISAS):
        taken = sum(valid(case, layout, isa) for case in CASES.values())
        came = sum(row[1:] == (layout, isa) for row in chosen)
        assert came >= taken / 7


def test_why_tests_were_skipped_takes_at_most_five_lines():
    command = 'pip install ".[test-all]"'
    reasons = [f"reassemble_nchw_isa declines: reason {k % 9}" for k in range(99)]
    reasons += [
        f"{name}: No module named '{name}.io'; {command}" for name in ("skimage", "torch")
    ] * 9
    assert summarize(reasons) == [
        "117 tests or files of tests were skipped:",
        f"     18  not installed: skimage, torch; {command}",
        "     11  reason 0",
        "     11  reason 1",
        "     77  for 7 other reasons: see pytest -rs",
    ]
    assert summarize(["slow: run with -m slow"])[1:] == ["      1  slow: run with -m slow"]
    assert summarize([]) == []
