"""The yard's time: drawn towards wall time, never jumping, never backwards."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuyard_daemon.clock import ClockMark, YardClock, starting_ns

MS = 1_000_000
HOUR_NS = 3_600_000 * MS


class Sources:
    """A wall clock and a boot clock that the test moves."""

    def __init__(self, wall_ns: int = 1_000 * HOUR_NS) -> None:
        self.wall_ns = wall_ns
        self.elapsed_ns = 5 * HOUR_NS
        self.clock = YardClock(wall_ns, wall_ns=lambda: self.wall_ns, elapsed_ns=lambda: self.elapsed_ns)

    def pass_time(self, ns: int) -> None:
        self.wall_ns += ns
        self.elapsed_ns += ns


def test_it_is_wall_time_while_nobody_steps_the_clock() -> None:
    sources = Sources()
    for _ in range(1000):
        sources.pass_time(7 * MS + 13)
    assert abs(sources.clock.now_ns() - sources.wall_ns) < MS


def test_a_clock_stepped_forward_is_approached_at_one_part_in_twenty() -> None:
    sources = Sources()
    before = sources.clock.now_ns()
    sources.wall_ns += HOUR_NS
    sources.pass_time(60_000 * MS)
    assert sources.clock.now_ns() - before == 63_000 * MS


def test_a_clock_stepped_back_slows_time_and_does_not_stop_it() -> None:
    sources = Sources()
    before = sources.clock.now_ns()
    sources.wall_ns -= HOUR_NS
    sources.pass_time(60_000 * MS)
    assert sources.clock.now_ns() - before == 57_000 * MS


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(-(10**15), 10**15)), max_size=50))
def test_it_never_runs_backwards_nor_faster_than_the_slew(steps: list[tuple[int, int]]) -> None:
    sources = Sources()
    last = sources.clock.now_ns()
    for passed_ns, stepped_ns in steps:
        sources.pass_time(passed_ns)
        sources.wall_ns += stepped_ns
        now = sources.clock.now_ns()
        assert passed_ns * 95 // 100 - 1 <= now - last <= passed_ns * 105 // 100
        last = now


def test_a_restart_on_the_same_boot_counts_the_time_away_by_the_boot_clock() -> None:
    mark = ClockMark(boot_id="b", elapsed_ns=100 * MS, now_ns=5_000 * MS)
    start = starting_ns(journaled_ms=4_900, mark=mark, boot_id="b", elapsed_ns=700 * MS, wall_ns=9 * HOUR_NS)
    assert start == 5_600 * MS


def test_on_another_boot_the_wall_clock_is_believed_but_never_backwards() -> None:
    mark = ClockMark(boot_id="b", elapsed_ns=100 * MS, now_ns=5_000 * MS)
    assert starting_ns(journaled_ms=4_900, mark=mark, boot_id="c", elapsed_ns=0, wall_ns=HOUR_NS) == HOUR_NS
    assert starting_ns(journaled_ms=4_900, mark=None, boot_id="c", elapsed_ns=0, wall_ns=1) == 4_900 * MS
