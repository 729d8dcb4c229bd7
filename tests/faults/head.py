"""A daemon process: the production core, turns, journal, readers, orders and node watch, with modelled files.

It is put together as the daemon's own assembly puts it together. Modelled are its disk (snapshots, the clock's mark,
history) and what has no part in the promises (queries, events, metrics). It can die at any of `POINTS`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from faults.network import FaultyBroker, FaultyBus, Weather
from faults.party import Party
from faults.scale import SMALL, Scale
from faults.witness import Witness
from gpuyard_daemon import recovery
from gpuyard_daemon.clock import ClockMark, YardClock, starting_ns
from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.facts import JobRetired, NodeJoined
from gpuyard_daemon.core.state.inputs import Input, NodeIncompatible, YardStarted
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.dispatch import Dispatcher
from gpuyard_daemon.exits import EXIT_INVARIANT, Fate
from gpuyard_daemon.health import Health
from gpuyard_daemon.ingress import Ingress
from gpuyard_daemon.journal import Journal, JournalRefused, LeadershipLost, SnapshotPointer
from gpuyard_daemon.leases import TICK_S as LEASES_TICK_S
from gpuyard_daemon.leases import Leases
from gpuyard_daemon.measures import Measures
from gpuyard_daemon.node_monitor import TICK_S, NodeMonitor
from gpuyard_daemon.recovery import Restored
from gpuyard_daemon.runtime import Durable, Runtime
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.jobs import JobView
from gpuyard_protocol.subjects import JOURNAL_ENTRY, streams

YARD = "sim"
#: Who may take back its part of a quota does so at once: simulations are minutes long.
SETTINGS = CoreSettings(reclaim_after_ms=1000, preempt_every_ms=1000)
BUDGET_BYTES = 1024 * 1024 * 1024
#: Where a daemon may die: with a decision that nobody knows, with its record under way, with one that the journal has
#: and no node, with orders sent and not answered, with a snapshot not yet in place, with the journal half pruned.
POINTS = ("before-append", "append-sent", "after-append", "order-sent", "in-snapshot", "in-pruning")


class _History:
    """Finished jobs that left the core. What is told here is on the disk."""

    def __init__(self) -> None:
        self.through = 0
        #: Finished jobs that it was told.
        self.taken = 0

    def take(self, views: Sequence[JobView], sequence: int) -> None:
        self.taken += len(views)
        self.through = max(self.through, sequence)


@dataclass(slots=True)
class HeadDisk:
    """The state directory: what one daemon process leaves to the next."""

    #: (journal sequence, turn, bytes), oldest first; two are kept.
    snapshots: list[tuple[int, int, bytes]] = field(default_factory=list)
    mark: ClockMark | None = None
    history: _History = field(default_factory=_History)
    wall_error_ms: int = 0


class Head(Party):
    def __init__(
        self,
        number: int,
        broker: FaultyBroker,
        weather: Weather,
        disk: HeadDisk,
        witness: Witness,
        *,
        on_failure: Callable[[BaseException], None],
        on_death: Callable[[Head], None],
        scale: Scale = SMALL,
    ) -> None:
        super().__init__(on_failure)
        self._scale = scale
        self.weather = weather
        self.number = number
        self._broker = broker
        self._disk = disk
        self._witness = witness
        self._told_death = on_death
        self._rng: random.Random = broker.rng
        self._records_until_snapshot = self._rng.randint(*scale.snapshot_records)
        self._is_making_snapshot = False
        self._dispatcher: Dispatcher | None = None
        self.runtime: Runtime | None = None
        self.core: Scheduler | None = None
        self.spawn(self._main())

    @property
    def leads(self) -> bool:
        return self.is_alive and self.runtime is not None

    def add_fact(self, fact: Input) -> None:
        if self.runtime is not None:
            self.runtime.inbox.add_fact(fact)

    def on_death(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.stop()
        self._told_death(self)

    # --- life ---

    async def _main(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.05, 0.5))
        bus = self.bus = FaultyBus(self._broker, f"head-{self.number}", self.weather)
        bus.before_send = self._before_send
        bus.after_send = self._after_send
        try:
            await self._lead(bus)
        except (BusError, LeadershipLost):
            self.kill()  # its supervisor starts it again

    async def _lead(self, bus: FaultyBus) -> None:
        disk = self._disk
        names = streams(YARD, BUDGET_BYTES)
        for spec in names:
            await bus.ensure_stream(spec)
        restored = self._restore()
        core = Scheduler(SETTINGS) if restored.state is None else Scheduler.restore(restored.state, SETTINGS)
        journal = Journal(bus, YARD, f"holder-{self.number}")
        async with asyncio.timeout(60):
            # The production history and its recorder have more to them; what recovery asks of them is this.
            await recovery.replay_and_claim(journal, core, cast("Any", disk.history), restored)
        await recovery.check_cursors(bus, names, core.cursors)
        check(core.cluster)
        await self._serve(bus, core, journal)

    def _restore(self) -> Restored:
        snapshots = self._disk.snapshots
        if len(snapshots) > 1 and self._rng.random() < 0.1:
            snapshots.pop()  # the newest turned out to be corrupt
        if not snapshots:
            return Restored(None, 0)
        sequence, _, state = snapshots[-1]
        return Restored(state, sequence)

    async def _serve(self, bus: FaultyBus, core: Scheduler, journal: Journal) -> None:
        loop = asyncio.get_running_loop()
        fate, health = Fate(), Health(loop.time)
        health.is_connected = lambda: bus.is_connected
        clock = self._open_clock(core.now_ms)
        runtime = Runtime(core, journal, clock, fate, health, Measures(), core.cursors)
        ingress = Ingress(bus, YARD, runtime.inbox)
        monitor = self._watch_nodes(bus, core, journal, runtime)
        leases = Leases(
            bus,
            core,
            journal.epoch,
            clock_of=monitor.clock_of,
            is_settled=lambda: runtime.is_settled,
            is_ours=journal.is_ours,
        )
        self._connect(core, journal, runtime, monitor, fate)
        runtime.inbox.add_fact(YardStarted(epoch=journal.epoch))
        await monitor.open(bus)
        await ingress.open()
        self.core, self.runtime = core, runtime
        self.spawn(runtime.run())
        if self._dispatcher is not None:
            self._dispatcher.sync_all()
        self.spawn(self._every(TICK_S, monitor.tick))
        self.spawn(self._renew(leases))
        self.spawn(self._every(10.0, lambda: self._mark(clock)))
        self.spawn(self._purge(ingress, runtime))
        ending = await fate.wait()
        if ending.code == EXIT_INVARIANT:
            raise AssertionError(f"the daemon contradicts itself: {ending.reason}")
        self.kill()

    def _watch_nodes(self, bus: FaultyBus, core: Scheduler, journal: Journal, runtime: Runtime) -> NodeMonitor:
        """Who sends orders to nodes, and who listens to them."""

        def node_is_ahead(node: str, detail: str) -> None:
            runtime.inbox.add_fact(NodeIncompatible(node=node, reason=detail))

        dispatcher = self._dispatcher = Dispatcher(
            bus,
            core,
            journal.epoch,
            is_settled=lambda: runtime.is_settled,
            on_stale=node_is_ahead,
            may_command=journal.is_ours,
            clock_of=lambda node: monitor.clock_of(node),
        )
        monitor = NodeMonitor(
            core,
            runtime.inbox.add_fact,
            dispatcher.heard,
            suspected_after_s=self._scale.suspected_after_s,
            lost_after_s=self._scale.lost_after_s,
            monotonic=asyncio.get_running_loop().time,
        )
        return monitor

    def _connect(self, core: Scheduler, journal: Journal, runtime: Runtime, monitor: NodeMonitor, fate: Fate) -> None:
        """What follows from a record that is durable, from a turn that is over, and from a leadership that is lost."""
        dispatcher = self._dispatcher
        assert dispatcher is not None

        def durable(stored: Durable) -> None:
            self.passes("after-append")
            for fact in stored.record.facts:
                if type(fact) is NodeJoined:
                    dispatcher.node_joined(fact.node, fact.instance)
                    monitor.joined(fact.node)
            dispatcher.settled(stored.turn.orders)
            self._note_durable(stored, core)

        def settled() -> None:
            dispatcher.settled(())
            if self._records_until_snapshot <= 0 and not self._is_making_snapshot:
                self._is_making_snapshot = True
                self._records_until_snapshot = self._rng.randint(*self._scale.snapshot_records)
                self.spawn(self._snapshot(journal, journal.last_sequence, core.turn, core.snapshot()))

        def lost(why: str) -> None:
            dispatcher.stop()
            fate.seal(75, why)

        journal.on_lost(lost)
        runtime.on_durable(durable)
        runtime.on_settled(settled)

    # --- fault points ---

    def _before_send(self, subject: str) -> None:
        if subject == JOURNAL_ENTRY:
            self.passes("before-append")

    def _after_send(self, subject: str) -> None:
        if subject.startswith("cmd."):
            self.passes("order-sent")
        elif subject == JOURNAL_ENTRY:
            self.passes("append-sent")

    def _note_durable(self, stored: Durable, core: Scheduler) -> None:
        self._records_until_snapshot -= 1
        retired = [fact.view for fact in stored.record.facts if type(fact) is JobRetired]
        self._disk.history.take(retired, stored.sequence)
        self._witness.check_leader(core)
        if stored.record.turn % self._scale.check_every == 0:
            check(core.cluster)

    # --- files ---

    def _elapsed_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * 1_000_000_000)

    def _wall_ns(self) -> int:
        return (1_700_000_000_000 + self._disk.wall_error_ms) * 1_000_000 + self._elapsed_ns()

    def _open_clock(self, journaled_ms: int) -> YardClock:
        start = starting_ns(
            journaled_ms=journaled_ms,
            mark=self._disk.mark,
            boot_id="boot",
            elapsed_ns=self._elapsed_ns(),
            wall_ns=self._wall_ns(),
        )
        return YardClock(start, wall_ns=self._wall_ns, elapsed_ns=self._elapsed_ns)

    def _mark(self, clock: YardClock) -> None:
        self._disk.mark = ClockMark(boot_id="boot", elapsed_ns=self._elapsed_ns(), now_ns=clock.now_ns())

    async def _snapshot(self, journal: Journal, sequence: int, turn: int, state: bytes) -> None:
        try:
            await asyncio.sleep(self._rng.uniform(0.05, 1.0))
            self.passes("in-snapshot")
            snapshots = self._disk.snapshots
            if not snapshots or snapshots[-1][0] < sequence:
                snapshots.append((sequence, turn, state))
                del snapshots[:-2]
            pointer = SnapshotPointer(sequence=sequence, turn=turn, file=f"{sequence}", sha256="", size=len(state))
            await journal.point_to_snapshot(pointer)
            self.passes("in-pruning")
            if len(snapshots) == 2:
                await journal.prune(min(snapshots[0][0], self._disk.history.through))
        except (BusError, LeadershipLost, JournalRefused):
            return  # the turns meet the same, and the next snapshot comes
        finally:
            self._is_making_snapshot = False

    async def _renew(self, leases: Leases) -> None:
        try:
            while True:
                await asyncio.sleep(LEASES_TICK_S)
                await leases.tick()
        finally:
            leases.close()

    async def _purge(self, ingress: Ingress, runtime: Runtime) -> None:
        while True:
            await asyncio.sleep(1.0)
            await ingress.purge(runtime.journaled.submissions, runtime.journaled.reports)

    async def _every(self, seconds: float, action: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(seconds)
            action()
