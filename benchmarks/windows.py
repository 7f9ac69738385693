"""Windows of a problem: small blocks whose results follow from a small part of the inputs.

The blocks of source pixels lie in the first corner of the first image, in the middle of the middle
one and in the last corner of the last one. With a margin around a block its results are known.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cases import Case

_BLOCK = 6  # source pixels along each axis, at least


@dataclass(frozen=True)
class Part:
    """A stretch of one axis: what is seen, margin included, and within it what is compared."""

    seen: slice
    compared: slice

    @property
    def within(self) -> slice:
        """The compared stretch, counted from the begin of the seen one."""
        return slice(self.compared.start - self.seen.start, self.compared.stop - self.seen.start)


def windows(case: Case) -> Iterator[tuple[int, dict[str, Part], dict[str, Part]]]:
    """Yield an image, and the parts of its rows and columns: of features, output and logits."""
    for image, place in [(0, "first"), (case.n // 2, "middle"), (case.n - 1, "last")]:
        rows = _parts(case, case.h, case.output_size[0], place)
        columns = _parts(case, case.w, case.output_size[1], place)
        yield image, rows, columns


def _parts(case: Case, length: int, out_length: int, place: str) -> dict[str, Part]:
    """Cut one axis. Blocks begin at multiples of down."""
    up, down, r = case.up, case.down, case.kernel_size // 2
    block = -(-_BLOCK // down) * down
    margin = -(-r // down) * down
    last = max(0, (length - block) // down * down)
    begin = {"first": 0, "middle": last // 2 // down * down, "last": last}[place]
    end = length if place == "last" else min(length, begin + block)
    low, high = max(0, begin - margin), min(length, end + margin)

    def part(scale_up: int, scale_down: int, limit: int) -> Part:
        ends = (min(limit, -(-x * scale_up // scale_down)) for x in (low, high, begin, end))
        low_, high_, begin_, end_ = ends
        return Part(slice(low_, high_), slice(begin_, end_))

    return {
        "features": part(1, 1, length),
        "output": part(up, down, out_length),
        "logits": part(1, down, -(-length // down)),
    }
