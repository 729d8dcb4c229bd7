"""Arrays: the same job many times, each element with an index of its own."""

from __future__ import annotations

import re

import msgspec

from gpuyard_protocol.codec import Malformed

ARRAY_ELEMENTS_MAX = 10_000
ARRAY_INDEX_MAX = 999_999
_RANGE = "[0-9]{1,6}(?:-[0-9]{1,6}(?::[0-9]{1,6})?)?"
_ARRAY = re.compile(f"({_RANGE}(?:,{_RANGE})*)(?:%([0-9]{{1,5}}))?")
ARRAY_EXPECTED = (
    f"indices such as '0-99', '0-90:10' or '1,3,5', at most {ARRAY_ELEMENTS_MAX} of them up to {ARRAY_INDEX_MAX}, "
    "with '%8' behind them for at most 8 at once"
)


class ArraySpec(msgspec.Struct, frozen=True, array_like=True):
    """Which elements an array has, and how many of them may run at once."""

    #: (first, last, step), in the order asked for, without overlaps.
    ranges: tuple[tuple[int, int, int], ...]
    #: 0: as many as there is room for.
    at_once: int = 0

    def indices(self) -> list[int]:
        return [index for first, last, step in self.ranges for index in range(first, last + 1, step)]

    @property
    def count(self) -> int:
        return sum([(last - first) // step + 1 for first, last, step in self.ranges])


def parse_array(text: str) -> ArraySpec:
    """`0-99%8` and the like, or `Malformed`."""
    match = _ARRAY.fullmatch(text.replace(" ", ""))
    if match is None:
        raise Malformed("$.array", repr(text)[:120], ARRAY_EXPECTED)
    ranges = []
    for part in match[1].split(","):
        bounds, _, step = part.partition(":")
        first, _, last = bounds.partition("-")
        ranges.append((int(first), int(last or first), int(step or 1)))
        if ranges[-1][1] < ranges[-1][0] or not ranges[-1][2] or ranges[-1][1] > ARRAY_INDEX_MAX:
            raise Malformed("$.array", repr(text)[:120], ARRAY_EXPECTED)
    array = ArraySpec(tuple(ranges), int(match[2] or 0))
    if array.count > ARRAY_ELEMENTS_MAX or match[2] == "0":
        raise Malformed("$.array", repr(text)[:120], ARRAY_EXPECTED)
    if len(set(array.indices())) != array.count:
        raise Malformed("$.array", repr(text)[:120], "each index once")
    return array
