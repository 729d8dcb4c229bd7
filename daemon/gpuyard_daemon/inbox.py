"""What waits for the next turn: decoded inputs with the place in their stream that they came from.

Three lines wait: messages of SUB, messages of REP, and facts that the shell itself noticed (a silent node, a changed
load, an operator's word). `take` empties as much of them as one turn may have. Reports go first, because they free
resources, but never take the whole turn while submissions wait.

Bounds: a turn takes at most `TURN_BYTES_MAX` and `TURN_INPUTS_MAX` (one message at least, whatever its size). When
more than `HIGH_WATER_MESSAGES` wait in a line, its reader is told to pause; what is not read yet stays in the stream,
on disk. Of the shell's own facts the newest about a node, and the newest load of a service, takes the place of one that
still waits: while the journal takes nothing they grow no further than the yard has nodes and services.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import NamedTuple

from gpuyard_daemon.core.state.inputs import (
    Cursors,
    Input,
    LoadReported,
    NodeIncompatible,
    NodeLost,
    NodeReturned,
    NodeSuspected,
    PolicyChanged,
)

TURN_BYTES_MAX = 256 * 1024
TURN_INPUTS_MAX = 500
#: Of a turn's bytes and inputs, what reports may take while submissions wait.
REPORTS_PART = 3 / 4
HIGH_WATER_MESSAGES = 4096
LOW_WATER_MESSAGES = 1024
#: What a fact of the shell's own counts as; none is larger.
FACT_BYTES = 256


class Waiting(NamedTuple):
    """One stored message, decoded: its sequence, its size, and what it says (nothing, if it was poison)."""

    sequence: int
    size: int
    inputs: tuple[Input, ...]


class Taken(NamedTuple):
    """What one turn handles."""

    inputs: list[Input]
    cursors: Cursors
    #: Monotonic time at which the oldest of it came in; None for nothing.
    oldest_at: float | None


class Line:
    """Messages of one stream, in order."""

    def __init__(self, position: int) -> None:
        #: Sequence of the last message taken.
        self.position = position
        self.waiting: deque[Waiting] = deque()
        self.is_paused = False
        self.pause: Callable[[], None] | None = None
        self.resume: Callable[[], None] | None = None

    def put(self, message: Waiting) -> None:
        self.waiting.append(message)
        if not self.is_paused and len(self.waiting) >= HIGH_WATER_MESSAGES and self.pause is not None:
            self.is_paused = True
            self.pause()

    def take(self, into: list[Input], bytes_left: int, inputs_left: int, *, at_least_one: bool) -> tuple[int, int]:
        """Move whole messages into `into`; returns the bytes and inputs that are left."""
        while self.waiting:
            message = self.waiting[0]
            fits = message.size <= bytes_left and len(message.inputs) <= inputs_left
            if not fits and not at_least_one:
                break
            at_least_one = False
            self.waiting.popleft()
            into.extend(message.inputs)
            self.position = message.sequence
            bytes_left -= message.size
            inputs_left -= len(message.inputs)
        if self.is_paused and len(self.waiting) <= LOW_WATER_MESSAGES and self.resume is not None:
            self.is_paused = False
            self.resume()
        return bytes_left, inputs_left


class Inbox:
    def __init__(self, cursors: Cursors, wake: Callable[[], None]) -> None:
        self.submissions = Line(cursors.submissions)
        self.reports = Line(cursors.reports)
        #: By what they are about, in the order in which they came.
        self._facts: dict[Hashable, Input] = {}
        self._wake = wake
        self._oldest_at: float | None = None

    def __bool__(self) -> bool:
        return bool(self._facts or self.reports.waiting or self.submissions.waiting)

    def __len__(self) -> int:
        return len(self._facts) + len(self.reports.waiting) + len(self.submissions.waiting)

    @property
    def oldest_at(self) -> float | None:
        """Monotonic time since which something waits; None: nothing does."""
        return self._oldest_at if self else None

    def add_fact(self, fact: Input) -> None:
        about = _about(fact)
        self._facts.pop(about, None)
        self._facts[about] = fact
        self.arrived()

    def arrived(self) -> None:
        """Something was put into one of the lines."""
        if self._oldest_at is None:
            self._oldest_at = time.monotonic()
        self._wake()

    def take(self) -> Taken:
        inputs: list[Input] = []
        bytes_left, inputs_left = TURN_BYTES_MAX, TURN_INPUTS_MAX
        while self._facts and inputs_left > 0:
            inputs.append(self._facts.pop(next(iter(self._facts))))
            bytes_left -= FACT_BYTES
            inputs_left -= 1
        if self.submissions.waiting:
            kept_bytes = int(bytes_left * (1 - REPORTS_PART))
            kept_inputs = int(inputs_left * (1 - REPORTS_PART))
        else:
            kept_bytes = kept_inputs = 0
        bytes_left, inputs_left = self.reports.take(
            inputs, bytes_left - kept_bytes, inputs_left - kept_inputs, at_least_one=not inputs
        )
        self.submissions.take(inputs, bytes_left + kept_bytes, inputs_left + kept_inputs, at_least_one=not inputs)
        oldest_at, self._oldest_at = self._oldest_at, time.monotonic() if self else None
        return Taken(inputs, Cursors(self.submissions.position, self.reports.position), oldest_at)


def _about(fact: Input) -> Hashable:
    """What a fact says the newest of: of two with the same, the later one alone matters."""
    match fact:
        case NodeSuspected() | NodeLost() | NodeReturned() | NodeIncompatible():
            return "node", fact.node
        case LoadReported():
            return "load", fact.tenant, fact.service
        case PolicyChanged():
            return "policy"
        case _:
            return fact
