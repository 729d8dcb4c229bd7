"""The yard's time: wall time that cannot jump.

`YardClock.now_ms()` is what every turn is handled at. It runs with the machine's boot-time clock and is drawn towards
wall time by at most one part in twenty, so that a stepped wall clock neither fires every deadline at once nor freezes
the yard; it never runs backwards. `starting_ns` says where it begins after a restart.

Both take their sources as arguments and read no clock themselves: what time it is, is the caller's business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from gpuyard_protocol.codec import Malformed, decode, encode

#: The yard's time approaches wall time by at most this part of the time that passes.
SLEW_DIVISOR = 20
_NS_PER_MS = 1_000_000
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class YardClock:
    """Nanoseconds inside, so that rounding cannot make it lose time; milliseconds outside."""

    def __init__(self, start_ns: int, *, wall_ns: Callable[[], int], elapsed_ns: Callable[[], int]) -> None:
        self._wall_ns = wall_ns
        self._elapsed_ns = elapsed_ns
        #: The yard's time when it was read last, and `elapsed_ns()` at that moment.
        self._now_ns = start_ns
        self._read_at_ns = elapsed_ns()

    def now_ns(self) -> int:
        read_at_ns = self._elapsed_ns()
        passed_ns = max(0, read_at_ns - self._read_at_ns)
        self._read_at_ns = read_at_ns
        ahead_ns = self._wall_ns() - (self._now_ns + passed_ns)
        bound_ns = passed_ns // SLEW_DIVISOR
        self._now_ns += passed_ns + max(-bound_ns, min(bound_ns, ahead_ns))
        return self._now_ns

    def now_ms(self) -> int:
        return self.now_ns() // _NS_PER_MS


class ClockMark(msgspec.Struct, frozen=True, kw_only=True):
    """The yard's time at one moment of one boot: with it, a daemon restarted on the same boot knows how long it was
    away
    without asking the wall clock."""

    boot_id: str
    #: CLOCK_BOOTTIME at the moment, and the yard's time then; nanoseconds.
    elapsed_ns: int
    now_ns: int


def starting_ns(*, journaled_ms: int, mark: ClockMark | None, boot_id: str, elapsed_ns: int, wall_ns: int) -> int:
    """Where the clock begins, given the journal's last time (0: empty journal).

    On the boot of the mark, time went on by what that boot's clock says. On another boot nothing but the wall clock
    can tell how long the yard was down, so it is believed, though never backwards.
    """
    journaled_ns = journaled_ms * _NS_PER_MS
    if mark is not None and journaled_ms and mark.boot_id == boot_id and elapsed_ns >= mark.elapsed_ns:
        return max(journaled_ns, mark.now_ns + elapsed_ns - mark.elapsed_ns)
    return max(journaled_ns, wall_ns)


# --- the real sources ------------------------------------------------------------------------------------------------


def boot_elapsed_ns() -> int:
    """Counts while the machine sleeps, and does not step."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def read_boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def read_mark(path: Path) -> ClockMark | None:
    """None if there is none or it is unreadable: then the wall clock decides."""
    try:
        return decode(ClockMark, path.read_bytes())
    except (OSError, Malformed):
        return None


def write_mark(path: Path, clock: YardClock) -> None:
    """Replace the mark; a lost one costs no more than trust in the wall clock, so it is not synced to disk."""
    now_ns = clock.now_ns()
    mark = ClockMark(boot_id=read_boot_id(), elapsed_ns=boot_elapsed_ns(), now_ns=now_ns)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(encode(mark))
    os.replace(temporary, path)


def open_clock(path: Path, journaled_ms: int) -> YardClock:
    start = starting_ns(
        journaled_ms=journaled_ms,
        mark=read_mark(path),
        boot_id=read_boot_id(),
        elapsed_ns=boot_elapsed_ns(),
        wall_ns=time.time_ns(),
    )
    return YardClock(start, wall_ns=time.time_ns, elapsed_ns=boot_elapsed_ns)
