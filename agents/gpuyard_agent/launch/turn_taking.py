"""`TurnTakingLauncher`: any launcher, whose replicas on time-sliced cards take turns.

Partitions say who has a place on which card (`admit`, `dismiss`); the launcher inside says who runs. From both, and
from what running trees are seen to use, `partitions.turns` decides; what it decides is carried out by freezing and
thawing. Nobody is frozen where nobody else wants the card. A stop comes before everything: who is to end is thawed.

It keeps how long each replica was frozen, on disk too, since its time limit is about the time it could use. An agent
that dies leaves nobody frozen: the supervisor thaws what it froze, and under systemd the next agent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from gpuyard_agent.launch.base import (
    Launcher,
    LauncherGone,
    ProcessExit,
    ProcessSpec,
    ProcessState,
    Started,
    StartResult,
)
from gpuyard_agent.launch.usage import cpu_ms_of_tree
from gpuyard_agent.partitions.turns import Party, Turns, TurnSettings, party_of
from gpuyard_protocol.names import AssignmentKey, DeviceUuid

#: Between two looks at what running parties use, while somebody waits.
WATCH_MS = 250
#: CPU use that counts as work: in thousandths of a CPU. A program that waits for its card spins, or wakes up often.
_WORK_MILLI = 10

#: Whether a replica uses its card now; None: not known, then its CPU use decides.
IsBusy = Callable[[AssignmentKey], bool | None]

_log = structlog.get_logger("gpuyard_agent.turns")


class _Running(msgspec.Struct):
    """A replica that runs."""

    pid: int
    #: Wall clock.
    started_ms: int


class _Frozen(msgspec.Struct):
    """How long a replica was frozen, and since when it is; monotonic clock, 0: it is not."""

    total_ms: int = 0
    since_ms: int = 0


class TurnTakingLauncher:
    """The `Launcher` that the agent uses; everything but starts, stops and ends goes straight to the one inside."""

    def __init__(
        self,
        inner: Launcher,
        settings: TurnSettings,
        *,
        book: Path | None = None,
        clock_ms: Callable[[], int],
        wall_ms: Callable[[], int],
    ) -> None:
        """`book`: file that keeps frozen times over a restart of the agent. `clock_ms`: monotonic."""
        self._inner = inner
        self._turns = Turns(settings)
        self._book = book
        self._clock_ms = clock_ms
        self._wall_ms = wall_ms
        #: What the driver says of a replica's load, where it says it.
        self.is_busy: IsBusy = lambda key: None
        #: Told how long a replica has been halted in all, whenever that has grown.
        self.on_halted: Callable[[AssignmentKey, int], None] = lambda key, total_ms: None
        #: Places on cards, by replica: card and weight.
        self._places: dict[AssignmentKey, tuple[DeviceUuid, int]] = {}
        self._running: dict[AssignmentKey, _Running] = {}
        #: Being stopped: never frozen again.
        self._stopping: set[AssignmentKey] = set()
        #: On their way to or from the host's memory: halted by nobody meanwhile.
        self._held_out: set[AssignmentKey] = set()
        #: Held while replicas are halted and let go.
        self._carrying = asyncio.Lock()
        self._frozen: dict[AssignmentKey, _Frozen] = self._read_book()
        #: CPU time of trees when last looked at, and when.
        self._seen: dict[AssignmentKey, tuple[int, int]] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # --- places, said by partitions ---

    def admit(self, key: AssignmentKey, card: DeviceUuid, weight: int) -> None:
        """It has a place on this card; idempotent."""
        self._places[key] = (card, weight)
        self._enter(key)

    def dismiss(self, key: AssignmentKey) -> None:
        if self._places.pop(key, None) is not None:
            self._turns.leave(key, self._clock_ms())
            self._changed.set()

    async def hold_out(self, key: AssignmentKey) -> None:
        """No turns for it until `let_in`; it runs when this returns. Raises `LauncherGone`."""
        self._held_out.add(key)
        self._turns.leave(key, self._clock_ms())
        async with self._carrying:
            frozen = self._frozen.get(key)
            if frozen is not None and frozen.since_ms:
                await self._inner.freeze([key], frozen=False)
                self._thawed(frozen)
                self.on_halted(key, frozen.total_ms)
        self._changed.set()

    def let_in(self, key: AssignmentKey) -> None:
        self._held_out.discard(key)
        self._enter(key)

    def thawed_ms(self, key: AssignmentKey) -> int:
        """How long it has run without being halted; 0 for what does not run."""
        running = self._running.get(key)
        if running is None:
            return 0
        return max(0, self._wall_ms() - running.started_ms - self.frozen_ms(key))

    def frozen_ms(self, key: AssignmentKey) -> int:
        """How long it has been halted for the sake of others."""
        frozen = self._frozen.get(key)
        if frozen is None:
            return 0
        return frozen.total_ms + (self._clock_ms() - frozen.since_ms if frozen.since_ms else 0)

    # --- the launcher ---

    async def open(self) -> tuple[ProcessState, ...]:
        await self._end_task()
        states = await self._inner.open()
        for frozen in self._frozen.values():
            self._thawed(frozen)  # whoever froze them has gone, so they are not
        self._running = {state.key: _Running(state.pid, state.at_ms) for state in states if state.exit is None}
        for key in [key for key in self._frozen if key not in self._running]:
            del self._frozen[key]
        for state in states:
            if state.stopping:
                self._stopping.add(state.key)
            self._enter(state.key)
        self._task = asyncio.create_task(self._take_turns(), name="turns")
        self._task.add_done_callback(_say_if_broken)
        return states

    async def close(self) -> None:
        await self._end_task()
        await self._inner.close()

    async def start(self, specs: Sequence[ProcessSpec]) -> tuple[StartResult, ...]:
        results = await self._inner.start(specs)
        for result in results:
            if isinstance(result, Started):
                self._running[result.key] = _Running(result.pid, result.at_ms)
                self._enter(result.key)
        return results

    async def stop(self, key: AssignmentKey, grace_ms: int) -> None:
        self._stopping.add(key)
        self._turns.leave(key, self._clock_ms())
        self._changed.set()
        await self._inner.stop(key, grace_ms)

    async def freeze(self, keys: Sequence[AssignmentKey], *, frozen: bool) -> None:
        await self._inner.freeze(keys, frozen=frozen)

    async def limit_memory(self, key: AssignmentKey, memory_mib: int) -> None:
        await self._inner.limit_memory(key, memory_mib)

    async def renew(self, renewed_ms: int) -> None:
        await self._inner.renew(renewed_ms)

    async def list(self) -> tuple[ProcessState, ...]:
        return await self._inner.list()

    async def exits(self) -> AsyncIterator[ProcessExit]:
        async for ended in self._inner.exits():
            self._leave(ended.key)
            yield ended

    async def forget(self, keys: Sequence[AssignmentKey]) -> None:
        await self._inner.forget(keys)

    # --- who takes part ---

    def _enter(self, key: AssignmentKey) -> None:
        place = self._places.get(key)
        if place is not None and key in self._running and key not in self._stopping and key not in self._held_out:
            self._turns.join(key, *place, self._clock_ms())
            self._changed.set()

    def _leave(self, key: AssignmentKey) -> None:
        self._turns.leave(key, self._clock_ms())
        self._running.pop(key, None)
        self._stopping.discard(key)
        self._held_out.discard(key)
        self._seen.pop(key, None)
        self._frozen.pop(key, None)
        self._changed.set()

    # --- turns ---

    async def _take_turns(self) -> None:
        for key, frozen in self._frozen.items():
            self.on_halted(key, frozen.total_ms)
        while True:
            self._changed.clear()
            self._watch()
            now_ms = self._clock_ms()
            decision = self._turns.decide(now_ms)
            try:
                await self._carry_out(decision.running)
            except LauncherGone as error:
                _log.warning("turns stand still until the launcher is back", why=str(error))
                return  # `open` begins anew
            delay_ms = WATCH_MS if self._turns.is_contended else None
            if decision.next_ms is not None:
                until_next_ms = max(1, decision.next_ms - now_ms)
                delay_ms = until_next_ms if delay_ms is None else min(delay_ms, until_next_ms)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if delay_ms is None else delay_ms / 1000):
                    await self._changed.wait()

    async def _carry_out(self, running: frozenset[Party]) -> None:
        async with self._carrying:
            await self._halt_and_let_go(running)

    async def _halt_and_let_go(self, running: frozenset[Party]) -> None:
        """First halt those whose turn is over, then let the next ones go."""
        halted = {key for party in self._turns.parties() if party not in running for key in self._turns.members(party)}
        frozen = {key for key, one in self._frozen.items() if one.since_ms}
        to_freeze, to_thaw = sorted(halted - frozen), sorted(frozen - halted)
        if to_freeze:
            await self._inner.freeze(to_freeze, frozen=True)
            for key in to_freeze:
                self._frozen.setdefault(key, _Frozen()).since_ms = self._clock_ms()
        if to_thaw:
            await self._inner.freeze(to_thaw, frozen=False)
            for key in to_thaw:
                self._seen.pop(key, None)
                if key in self._frozen:
                    self._thawed(self._frozen[key])
                    self.on_halted(key, self._frozen[key].total_ms)
        if to_freeze or to_thaw:
            self._write_book()

    def _thawed(self, frozen: _Frozen) -> None:
        if frozen.since_ms:
            frozen.total_ms += self._clock_ms() - frozen.since_ms
            frozen.since_ms = 0

    def _watch(self) -> None:
        """See who works, of those that may. Only while somebody waits: otherwise nobody is asked to give way."""
        if not self._turns.is_contended:
            self._seen.clear()
            return
        works: dict[Party, bool] = {}
        now_ms = self._clock_ms()
        for key in self._places:
            frozen = self._frozen.get(key)
            if key in self._running and not (frozen and frozen.since_ms):
                seen = self._works(key, now_ms)
                if seen is not None:
                    works[party_of(key)] = works.get(party_of(key), False) or seen
        for party, one_works in works.items():
            self._turns.note(party, now_ms, works=one_works)

    def _works(self, key: AssignmentKey, now_ms: int) -> bool | None:
        """None: it has not been watched for long enough to tell."""
        busy = self.is_busy(key)
        if busy is not None:
            return busy
        before = self._seen.get(key)
        if before is not None and now_ms - before[1] < WATCH_MS // 2:
            return None
        used_ms = cpu_ms_of_tree(self._running[key].pid)
        self._seen[key] = (used_ms, now_ms)
        if before is None:
            return None
        return (used_ms - before[0]) * 1000 >= _WORK_MILLI * (now_ms - before[1])

    async def _end_task(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    # --- what survives the agent ---

    def _write_book(self) -> None:
        if self._book is None:
            return
        fresh = self._book.with_suffix(".new")
        totals = {str(key): self.frozen_ms(key) for key in self._frozen}
        try:
            fresh.write_bytes(msgspec.json.encode(totals))
            os.replace(fresh, self._book)
        except OSError as error:
            _log.warning("frozen times not written down", why=str(error))

    def _read_book(self) -> dict[AssignmentKey, _Frozen]:
        if self._book is None:
            return {}
        try:
            totals = msgspec.json.decode(self._book.read_bytes(), type=dict[str, int])
            return {AssignmentKey.parse(text): _Frozen(total) for text, total in totals.items()}
        except (OSError, msgspec.DecodeError, ValueError):
            return {}  # none yet, or cut off: then limits are as strict as by the wall clock


def _say_if_broken(task: asyncio.Task[None]) -> None:
    """A mistake in here must not stay unseen: replicas would stay as they are, some of them halted."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("turns are not taken any more", exc_info=error)
