"""The registry of array libraries: a door is all that a new library needs."""

import ast
from pathlib import Path

import numpy as np

import carafepp
from carafepp import _doors
from carafepp._doors.door import Door


class Named:
    """An array of a library that nobody else knows."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape


class NamedDoor(Door):
    def recognise(self, array):
        return "named" if isinstance(array, Named) else None

    def view(self, function, name, array):
        return array.array

    def empty(self, function, like, shape):
        return Named(np.empty(shape, like.array.dtype))

    def stream(self, array):
        return 0


class OwnOperators(NamedDoor):
    """A library that computes by itself."""

    def call(self, function, inputs, params, out=(None, None), needed=(True, True)):
        return tuple((function, params, need) for need in needed)


ARRAYS = np.ones((1, 1, 2, 2)), np.ones((1, 1, 4, 4))


def test_a_door_makes_the_functions_take_the_arrays_of_a_library(monkeypatch):
    monkeypatch.setattr(_doors, "DOORS", (*_doors.DOORS, NamedDoor()))
    features, masks = map(Named, ARRAYS)
    output = carafepp.reassemble(features, masks, up=2)
    np.testing.assert_array_equal(output.array, carafepp.reassemble(*ARRAYS, up=2))
    assert carafepp.reassemble(features, masks, up=2, out=output) is output
    _, grad_masks = carafepp.reassemble_backward(output, features, masks, up=2, need_features=False)
    assert isinstance(grad_masks, Named)


def test_a_door_may_have_operators_of_its_own(monkeypatch):
    monkeypatch.setattr(_doors, "DOORS", (OwnOperators(), *_doors.DOORS))
    features, masks = map(Named, ARRAYS)
    function, params, _ = carafepp.reassemble(features, masks, up=2)
    assert (function, params["up"]) == ("reassemble", 2)


def test_the_public_functions_know_no_library():
    """Nor do the steps that all libraries share."""
    folder = Path(carafepp.__file__).parent
    for name in ("ops.py", "_doors/door.py"):
        tree = ast.parse((folder / name).read_text())
        for node in ast.walk(tree):
            modules = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            modules.append(getattr(node, "module", None) or "")
            assert not {"numpy", "torch", "cupy", "sys"}.intersection(modules), (name, modules)


def test_a_large_result_of_numpy_begins_at_a_cache_line():
    features = np.ones((1, 64, 1024, 16), np.float32)
    output = carafepp.reassemble(features, np.ones((1, 1, 1024, 16), np.float32))
    assert output.nbytes == 1 << 22
    assert output.ctypes.data % 64 == 0
    np.testing.assert_array_equal(output, features)
