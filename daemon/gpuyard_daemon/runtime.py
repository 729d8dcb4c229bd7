"""The loop: collect, decide, store, send; one turn at a time.

A turn takes what the inbox holds, hands it to the core, and appends the core's record to the journal. Only when that
is acknowledged do orders and events leave (write-ahead): a daemon that dies or is deposed in between has told nobody
anything that the journal does not know. While the append is under way the next turn's inputs collect, so that load
makes turns larger, not later, up to what can be decided in a moment (`inbox`); an idle yard's first input is handled at
once.

`is_settled` says whether the core's state is the journal's: true between turns. Whatever shows state to the outside
(desired sets, answers) does so only then; `on_settled` is the moment.

What ends the process is decided here and in `exits` alone: an invariant of the core, a lost journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import structlog

from gpuyard_daemon.clock import YardClock
from gpuyard_daemon.config import EXIT_BAD_CONFIG
from gpuyard_daemon.core.state.inputs import Cursors, Input
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_daemon.core.state.turn import Record, Turn
from gpuyard_daemon.exits import EXIT_INVARIANT, EXIT_TEMPORARY, Fate
from gpuyard_daemon.health import Health
from gpuyard_daemon.inbox import Inbox
from gpuyard_daemon.journal import Journal, JournalRefused, LeadershipLost
from gpuyard_daemon.measures import Measures
from gpuyard_protocol.codec import encode

log = structlog.get_logger("runtime")

#: A timer that the core answers with nothing and with a deadline that has passed would spin; it gets this pause.
IDLE_TIMER_PAUSE_S = 0.05
#: The server takes 8 MB; a record may not come near. Turns are bounded so that none does (see `inbox`).
RECORD_BYTES_MAX = 7 * 1024 * 1024


class TurningCore(Protocol):
    """What this file asks of the core."""

    now_ms: int

    def handle(self, inputs: list[Input], now_ms: int, cursors: Cursors) -> Turn: ...
    def next_deadline_ms(self) -> int | None: ...


class Durable(NamedTuple):
    """A turn that the journal has."""

    turn: Turn
    record: Record
    sequence: int
    #: Of the record as stored, bytes.
    size: int
    #: What the turn was about.
    inputs: Sequence[Input] = ()


class Runtime:
    def __init__(
        self,
        core: TurningCore,
        journal: Journal,
        clock: YardClock,
        fate: Fate,
        health: Health,
        measures: Measures,
        cursors: Cursors,
    ) -> None:
        self._core = core
        self._journal = journal
        self._clock = clock
        self._fate = fate
        self._health = health
        self._measures = measures
        self._wake = asyncio.Event()
        self.inbox = Inbox(cursors, self._wake.set)
        #: Cursors of the newest record in the journal: what SUB and REP may be purged to.
        self.journaled = cursors
        #: The core's state is what the journal says.
        self.is_settled = True
        #: The last turn stopped at its bound: the next follows without waiting for anything.
        self._is_unfinished = False
        self._is_stopping = False
        #: Loop time before which a deadline is not looked at (see IDLE_TIMER_PAUSE_S).
        self._timer_rests_until = 0.0
        self._on_durable: list[Callable[[Durable], None]] = []
        self._on_settled: list[Callable[[], None]] = []

    def on_durable(self, callback: Callable[[Durable], None]) -> None:
        """Called for each record once the journal has it, in order; must not wait and must not raise."""
        self._on_durable.append(callback)

    def on_settled(self, callback: Callable[[], None]) -> None:
        """Called whenever state may be shown, after `on_durable`."""
        self._on_settled.append(callback)

    def stop(self) -> None:
        """End after the turn under way."""
        self._is_stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Turn after turn until `stop`; seals the fate of the process if it must end."""
        try:
            while not self._is_stopping and not self._fate.is_sealed:
                if self._is_due():
                    await self._turn()
                    # Readers and timers get the loop between turns, whatever the load.
                    await asyncio.sleep(0)
                else:
                    await self._wait()
        except InvariantViolated as error:
            self._fate.seal(EXIT_INVARIANT, str(error))
        except LeadershipLost as error:
            self._fate.seal(EXIT_TEMPORARY, str(error))
        except JournalRefused as error:
            self._fate.seal(EXIT_BAD_CONFIG, str(error))

    # -- when ---------------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        if self.inbox or self._is_unfinished:
            return True
        wait_s = self._timer_s()
        return wait_s is not None and wait_s <= 0

    def _timer_s(self) -> float | None:
        """Seconds until the core wants to be called; None: never."""
        deadline_ms = self._core.next_deadline_ms()
        if deadline_ms is None:
            return None
        rest_s = self._timer_rests_until - asyncio.get_running_loop().time()
        return max((deadline_ms - self._clock.now_ms()) / 1000, rest_s)

    async def _wait(self) -> None:
        self._wake.clear()
        timer_s = self._timer_s()
        if timer_s is None:
            await self._wake.wait()
            return
        # One timer, set anew for each wait. It may come early by what the clock is slewed: then nothing is due yet.
        timer = asyncio.get_running_loop().call_later(max(timer_s, 0.001), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    # -- a turn -------------------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        began = time.monotonic()
        self._health.turn_since = began
        taken = self.inbox.take()
        now_ms = max(self._clock.now_ms(), self._core.now_ms)
        self.is_settled = False
        turn = self._core.handle(taken.inputs, now_ms, taken.cursors)
        decided = time.monotonic()
        if turn.record is not None:
            await self._store(turn, turn.record, taken.inputs, decided)
        elif not taken.inputs:
            self._timer_rests_until = asyncio.get_running_loop().time() + IDLE_TIMER_PAUSE_S
        self._is_unfinished = turn.unfinished
        self.is_settled = True
        self._health.turn_since = None
        if not turn.unfinished:
            # Starts, not inputs, are what an unfinished turn was long for.
            self.inbox.pace.turn_ended(len(taken.inputs), decided - began, time.monotonic() - decided)
        self._measures.turn_ended(
            began=began, decided=decided, inputs=len(taken.inputs), came_at=taken.came_at, decisions=turn.decisions
        )
        for callback in self._on_settled:
            callback()

    async def _store(self, turn: Turn, record: Record, inputs: Sequence[Input], decided: float) -> None:
        data = encode(record)
        if len(data) > RECORD_BYTES_MAX:
            raise InvariantViolated(f"the record of turn {record.turn} has {len(data)} bytes")
        sequence = await self._journal.append(data, f"{self._journal.epoch}-{record.turn}")
        self._measures.appended(time.monotonic() - decided, len(data))
        self.journaled = record.cursors
        durable = Durable(turn, record, sequence, len(data), inputs)
        for callback in self._on_durable:
            callback(durable)
