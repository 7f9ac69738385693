"""One comparison: all rivals for one pass of one problem, checked, then timed in turns."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cases import Case

from . import implementations, memory, timing
from .implementations import CHOICE, Calls
from .problems import Arrays, as_nchw
from .rivals import Rival
from .truth import Truth

try:
    from . import peers
except ImportError as error:
    if error.name != "torch":
        raise
    peers = None

PATIENCE = 1.0  # seconds a call of the main rivals may take and still be repeated


@dataclass
class Options:
    """What to compare; see `python -m benchmarks --help`."""

    layouts: list[str]
    dtypes: list[str]
    threads: list[int]
    implementation: Callable[[str], bool]  # wanted, by name
    peer: Callable[[str], bool]
    fresh: bool = False
    quick: bool = False
    check_only: bool = False
    notes: list[str] = field(default_factory=list)  # what PyTorch could not do


class Comparison:
    """All rivals for a pass of a problem.

    Parameters
    ----------
    case : Case
    source : "masks" or "logits"
    pass_ : "forward" or "forward+backward"
    options : Options
    tell : function of a str
        Called with what is being done.
    """

    def __init__(self, case: Case, source: str, pass_: str, options: Options, tell):
        self.case, self.pass_, self.options, self.tell = case, pass_, options, tell
        self.arrays = Arrays(case, source)
        self.rivals: list[Rival] = []
        self.first: dict[Rival, float] = {}  # seconds of a first call, or of a second one

    def check(self) -> None:
        """Run every rival once; those with a wrong answer get an error."""
        eager = [*self._carafepp(), *self._peers()]
        names = tuple(dict.fromkeys(name for rival in eager for name in rival.results))
        self.truths = {dtype: Truth(self.arrays, dtype, names) for dtype in self.options.dtypes}
        for rival in eager:
            self._check(rival)
        for rival in self._compiled():
            self._check(rival, compiles=True)

    def time(self, budget: float) -> None:
        """Time the rivals whose answers are right, for this many seconds."""
        right = [rival for rival in self.rivals if not rival.error]
        if not right:
            return
        self.tell(f"timing {len(right)} rivals for {budget:.0f} s")
        main = {rival for rival in right if rival.chosen or rival.kind == "operator"}
        for threads, layout in itertools.product(self.options.threads, self.options.layouts):
            main.update(self._compositions(threads, layout)[:2])
        for rival in right:
            patience = PATIENCE if rival in main else 0
            if self.first[rival] > max(budget / len(right), patience):
                rival.samples.append(self.first[rival])
        timing.measure(right, budget)

    def release(self) -> None:
        """Let go of all arrays; what has been measured stays."""
        for rival in self.rivals:
            rival.call, rival.settings, rival.outs = None, None, ()
        self.first.clear()

    def _carafepp(self) -> Iterator[Rival]:
        options = self.options
        for dtype in options.dtypes:
            own_choice_alone = options.quick and dtype != options.dtypes[0]
            wanted = CHOICE.__eq__ if own_choice_alone else options.implementation
            for layout in options.layouts:
                yield from implementations.rivals(
                    Calls(self.arrays, dtype, layout),
                    self.pass_,
                    options.threads,
                    wanted,
                    options.fresh,
                    options.quick,
                )

    def _peers(self) -> Iterator[Rival]:
        options = self.options
        if peers is None:
            return
        peers.forget_compiled()
        fresh = ["fresh"] if options.fresh and self.pass_ == "forward" else []
        for layout in options.layouts:
            torch_peers = peers.Peers(self.arrays, self.pass_, options.dtypes[0], layout)
            for threads in options.threads[:1] if options.quick else options.threads:
                for outputs in ["recycled", *fresh]:
                    yield from torch_peers.rivals(threads, outputs, options.peer)

    def _compositions(self, threads: int, layout: str) -> list[Rival]:
        """Return those whose answers are right, best first."""
        found = [
            rival
            for rival in self.rivals
            if (rival.kind, rival.threads, rival.layout) == ("composition", threads, layout)
            and not (rival.twin or rival.error)
        ]
        return sorted(found, key=self.first.get)

    def _compiled(self) -> Iterator[Rival]:
        """Yield the best composition of each layout, and the loop over taps, compiled.

        For the first number of threads alone: compiling takes long.
        """
        options, threads = self.options, self.options.threads[0]
        if peers is None or not (options.peer(peers.COMPILED) and peers.compositions(self.case)):
            return
        for layout in options.layouts:
            torch_peers = peers.Peers(self.arrays, self.pass_, options.dtypes[0], layout)
            best = [rival.name for rival in self._compositions(threads, layout)[:1]]
            for name in dict.fromkeys([*best, "taps"]):
                yield torch_peers.composition(name, threads, "recycled", compiled=True)

    def _check(self, rival: Rival, compiles: bool = False) -> None:
        """Run a rival once and note its time, its memory, and what is wrong with its answer.

        One that compiles runs once before that.
        """
        self.tell(f"checking {rival.name}, {rival.layout}, {rival.dtype}")
        for out in rival.outs:
            out.fill(float("nan"))
        try:
            with rival.settings():
                if compiles:
                    rival.call()
                results = self._first_call(rival)
                if rival.chosen or self.first[rival] < PATIENCE:
                    again = timing.seconds(rival.call)
                    self.first[rival] = min(self.first[rival], again)
            self.truths[rival.dtype].check(rival.results, results, rival.slack)
            if rival.kind == "carafepp" and self._memory_of(rival):
                rival.memory = memory.peak_in_a_process(rival, self.case.name)
        except AssertionError as error:
            rival.error = str(error)
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            if rival.kind != "carafepp":
                self.options.notes.append(f"{self.case.name}: {rival}: {sentence}")
                return
            rival.error = sentence
        self.rivals.append(rival)

    def _first_call(self, rival: Rival) -> tuple:
        """Return the results that have names, axes N, C, H, W."""

        def timed():
            begin = time.perf_counter()
            results = rival.call()
            self.first[rival] = time.perf_counter() - begin
            return results if isinstance(results, tuple) else (results,)

        if rival.kind == "carafepp":
            return tuple(as_nchw(array, rival.layout) for array in timed() if array is not None)
        results, rival.memory = memory.peak(timed)
        return results[: len(rival.results)]

    def _memory_of(self, rival: Rival) -> bool:
        options = self.options
        return not options.check_only and (rival.chosen or not options.quick)
