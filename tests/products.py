"""Tests over a product of axes: a part that covers it, or with `pytest -m exhaustive` all of it.

    @product(case=CASES, isa=ISAS, turns={"dtypes": DTYPES, "normalizer": NORMALIZERS})

The part has each pair of values of two axes. Axes that hardly depend on these take turns: a row
gets the combination of their values that came least, alone and beside the row's own values.
"""

import itertools
import math
import random
import re
import zlib
from collections import Counter

import pytest


def product(*, turns=None, by_default=None, valid=lambda *_: True, **axes):
    """Parametrize a test by rows of the axes: lists, or dictionaries from names to values.

    by_default has shorter axes, for the part alone. valid(*values) tells whether values of the axes
    go together. It gets none of turns.
    """
    return pytest.mark.product(axes, turns or {}, by_default or {}, valid)


def are_exhaustive(config) -> bool:
    """Tell whether the command line asks for exhaustive tests."""
    asked = config.getoption("-m")
    return "exhaustive" in asked and not re.search(r"\bnot\b[\s(]*exhaustive\b", asked)


def parametrize(metafunc, part: int, parts: int) -> None:
    """Parametrize a test that is marked by product, with one of equal parts of its rows."""
    mark = metafunc.definition.get_closest_marker("product")
    if mark is None:
        return
    axes, turns, by_default, valid = mark.args
    exhaustive = are_exhaustive(metafunc.config)
    if not exhaustive:
        axes = axes | by_default
    tables = [_by_name(axis) for axis in (*axes.values(), *turns.values())]
    of_axes, of_turns = tables[: len(axes)], tables[len(axes) :]

    def may_go(row) -> bool:
        return valid(*map(dict.__getitem__, of_axes, row))

    find_rows = _all_rows if exhaustive else _covering_rows
    marks = [pytest.mark.exhaustive] if exhaustive else []
    params = []
    for row in find_rows(of_axes, of_turns, may_go):
        name = "-".join(row)
        if zlib.crc32(f"{metafunc.function.__name__}-{name}".encode()) % parts == part:
            values = map(dict.__getitem__, tables, row)
            params.append(pytest.param(*values, id=name, marks=marks))
    metafunc.parametrize([*axes, *turns], params)


def _by_name(axis) -> dict:
    if isinstance(axis, dict):
        return axis
    return {getattr(value, "name", None) or str(value): value for value in axis}


def _all_rows(axes, turns, may_go):
    turns = list(itertools.product(*turns))
    return ((*row, *turn) for row in itertools.product(*axes) if may_go(row) for turn in turns)


def _covering_rows(axes, turns, may_go):
    """Choose rows greedily, first those that add most pairs, and a turn for each."""
    rows, turns = list(_all_rows(axes, [], may_go)), list(itertools.product(*turns))
    random.Random(0).shuffle(rows)  # else every choice among equals is the first value
    covered: set = set()
    chosen = []
    size = min(2, len(axes))  # of what must be covered: pairs, or the values of a single axis
    for least in range(math.comb(len(axes), size), 0, -1):
        for row in rows:
            pairs = set(itertools.combinations(enumerate(row), size))
            if len(pairs - covered) >= least:
                covered |= pairs
                chosen.append(row)
    seen: Counter = Counter()
    for row in chosen:
        turn = min(turns, key=lambda turn: _times(row, turn, seen))
        seen.update([(value, turn) for value in row] + _parts(row, turn))
        yield (*row, *turn)


def _times(row, turn, seen) -> tuple[int, int]:
    """Return how often values of the row had the whole turn, and how often parts of it came."""
    whole = sum(seen[value, turn] for value in row)
    return whole, sum(seen[part] for part in _parts(row, turn))


def _parts(row, turn) -> list:
    """Return the values of a turn: alone, beside each other and beside those of the row."""
    values = list(enumerate(turn))
    return [*values, *itertools.combinations(values, 2), *itertools.product(row, values)]
