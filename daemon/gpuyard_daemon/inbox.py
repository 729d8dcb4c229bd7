"""What waits for the next turn: decoded inputs with the place in their stream that they came from.

Three lines wait: messages of SUB, messages of REP, and facts that the shell itself noticed (a silent node, a changed
load, an operator's word). `take` empties as much of them as one turn may have. Reports go first, because they free
resources, but never take the whole turn while submissions wait.

Bounds: a turn takes at most `TURN_BYTES_MAX`, `TURN_INPUTS_MAX`, and what the core can be expected to decide in
`TURN_CORE_S` (`Pace`): when much has come in, the first of it need not wait until all of it is decided, and questions
are answered in between. One message goes at least, whatever its size; what is left is the next turn's, at once. When
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
#: No fewer than this where as many wait: a turn has a cost of its own, its append above all.
TURN_INPUTS_MIN = 16
#: What the core should take for one turn, seconds: a moment for whoever asks something meanwhile.
TURN_CORE_S = 0.02
#: But so many times what else the turn takes, its append above all, where the disk is slow (0.1 to 3 ms is usual): a
#: fifth of the time at most is waited, however much comes in.
TURN_CORE_TIMES = 4
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
    #: Monotonic time at which it came in, seconds.
    came_at: float


class Taken(NamedTuple):
    """What one turn handles."""

    inputs: list[Input]
    cursors: Cursors
    #: Monotonic time at which each message and fact of it came in, seconds.
    came_at: list[float]


class Pace:
    """How many inputs a turn takes: as many as the core lately decided in `TURN_CORE_S`, more behind a slow disk."""

    def __init__(self) -> None:
        self.inputs = TURN_INPUTS_MAX // 4

    def turn_ended(self, inputs: int, core_s: float, rest_s: float) -> None:
        """Only a full turn says what so many cost: one of few inputs is mostly the cost of any turn."""
        if inputs < self.inputs:
            return
        allowed_s = max(TURN_CORE_S, TURN_CORE_TIMES * rest_s)
        if core_s > allowed_s:
            self.inputs = max(TURN_INPUTS_MIN, self.inputs // 2)
        elif core_s < allowed_s / 2:
            self.inputs = min(TURN_INPUTS_MAX, self.inputs * 2)


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

    def take(self, into: Taken, bytes_left: int, inputs_left: int, *, at_least_one: bool) -> tuple[int, int]:
        """Move whole messages into `into`; returns the bytes and inputs that are left."""
        while self.waiting:
            message = self.waiting[0]
            fits = message.size <= bytes_left and len(message.inputs) <= inputs_left
            if not fits and not at_least_one:
                break
            at_least_one = False
            self.waiting.popleft()
            into.inputs.extend(message.inputs)
            into.came_at.append(message.came_at)
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
        self.pace = Pace()
        #: By what they are about, in the order in which they came, each with when it did.
        self._facts: dict[Hashable, tuple[Input, float]] = {}
        self._wake = wake
        self._stands_since: float | None = None

    def __bool__(self) -> bool:
        return bool(self._facts or self.reports.waiting or self.submissions.waiting)

    def __len__(self) -> int:
        return len(self._facts) + len(self.reports.waiting) + len(self.submissions.waiting)

    @property
    def stands_since(self) -> float | None:
        """Monotonic time since which something waits and no turn has taken anything; None: nothing waits."""
        return self._stands_since if self else None

    def add_fact(self, fact: Input) -> None:
        about = _about(fact)
        self._facts.pop(about, None)
        self._facts[about] = fact, time.monotonic()
        self.arrived()

    def arrived(self) -> None:
        """Something was put into one of the lines."""
        if self._stands_since is None:
            self._stands_since = time.monotonic()
        self._wake()

    def take(self) -> Taken:
        inputs: list[Input] = []
        came_at: list[float] = []
        taken = Taken(inputs, self._cursors(), came_at)
        bytes_left, inputs_left = TURN_BYTES_MAX, self.pace.inputs
        while self._facts and inputs_left > 0:
            fact, at = self._facts.pop(next(iter(self._facts)))
            inputs.append(fact)
            came_at.append(at)
            bytes_left -= FACT_BYTES
            inputs_left -= 1
        if self.submissions.waiting:
            kept_bytes = int(bytes_left * (1 - REPORTS_PART))
            kept_inputs = int(inputs_left * (1 - REPORTS_PART))
        else:
            kept_bytes = kept_inputs = 0
        bytes_left, inputs_left = self.reports.take(
            taken, bytes_left - kept_bytes, inputs_left - kept_inputs, at_least_one=not inputs
        )
        self.submissions.take(taken, bytes_left + kept_bytes, inputs_left + kept_inputs, at_least_one=not inputs)
        self._stands_since = time.monotonic() if self else None
        return taken._replace(cursors=self._cursors())

    def _cursors(self) -> Cursors:
        return Cursors(self.submissions.position, self.reports.position)


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
