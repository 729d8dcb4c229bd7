"""What running jobs have had, by level: the index against a count of each job."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.queueing.priority import LEVEL_MAX, natural_level
from gpuyard_daemon.core.state.underway import Underway
from gpuyard_protocol.units import MILLI

START_MS = 1_700_000_000_000
runs = st.tuples(
    st.sampled_from([13, 142, 1000, 8000, 128_000]),
    st.sampled_from([0, 0, 1, 5000, 1_000_000, 1_000_000_000]),
    st.sampled_from([1000, 1000, 500, 1300]),
)
steps = st.lists(st.tuples(st.sampled_from([1, 1000, 60_000, 10_000_000]), runs, st.booleans()), max_size=60)


@settings(max_examples=100)
@given(steps)
def test_levels_reached_are_those_of_each_job(given_steps: list[tuple[int, tuple[int, int, int], bool]]) -> None:
    underway, now_ms = Underway(), START_MS
    there: dict[int, tuple[int, int, int, int]] = {}
    for number, (passed_ms, (width, served, speed), leaves) in enumerate(given_steps):
        now_ms += passed_ms
        underway.enter(number, width, served, now_ms, speed)
        there[number] = (width, served, speed, now_ms)
        if leaves:
            oldest = next(iter(there))
            underway.leave(oldest)
            del there[oldest]
        if number % 3:
            assert underway.reached(now_ms + 10) == _counted(there, now_ms + 10)


def _counted(there: dict[int, tuple[int, int, int, int]], now_ms: int) -> list[int]:
    found = [0] * (LEVEL_MAX + 1)
    for width, served, speed, since_ms in there.values():
        first = natural_level(served * width // MILLI) + 1 if served else 0
        ran = served + (now_ms - since_ms) * speed // MILLI
        for level in range(first, natural_level(ran * width // MILLI) + 1):
            found[level] += 1
    return found
