"""The daemon put together: every part made once, connected, started and stopped in order. No logic of its own.

Start: if another daemon leads, stand by until this one is needed; state from snapshot and journal, leadership, then
readers and turns. Stop: first nothing more is decided or sent, then a standby is let in, then what is under way gets a
moment to end, then the files are closed. Jobs go on whatever happens here. The process around it is `serving`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from gpuyard_daemon import leadership, levels, recovery
from gpuyard_daemon.announce import Announcer, told_up_to
from gpuyard_daemon.api import Api
from gpuyard_daemon.archive import Archive
from gpuyard_daemon.audit import AuditLog, open_audit
from gpuyard_daemon.clock import YardClock, open_clock, write_mark
from gpuyard_daemon.config import EXIT_BAD_CONFIG, DaemonConfig
from gpuyard_daemon.connecting import open_bus
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.facts import JobRetired, NodeJoined
from gpuyard_daemon.core.state.inputs import NodeIncompatible, PolicyChanged, YardStarted
from gpuyard_daemon.dispatch import Dispatcher
from gpuyard_daemon.exits import EXIT_INVARIANT, EXIT_TEMPORARY, Fate
from gpuyard_daemon.health import Health
from gpuyard_daemon.history import History
from gpuyard_daemon.history_copy import HistoryCopy
from gpuyard_daemon.http.sources import Sources
from gpuyard_daemon.ingress import Ingress
from gpuyard_daemon.joining import Joining
from gpuyard_daemon.journal import Journal, LeadershipLost
from gpuyard_daemon.leadership import Alive, Claim, Presence
from gpuyard_daemon.leases import TICK_S as LEASES_TICK_S
from gpuyard_daemon.leases import Leases
from gpuyard_daemon.lending import SnapshotLender
from gpuyard_daemon.levels import StreamLevels
from gpuyard_daemon.loads import TICK_S as LOADS_TICK_S
from gpuyard_daemon.loads import Loads
from gpuyard_daemon.logs import LogForwarder
from gpuyard_daemon.measures import Measures
from gpuyard_daemon.node_monitor import TICK_S as NODES_TICK_S
from gpuyard_daemon.node_monitor import NodeMonitor
from gpuyard_daemon.node_verbs import NodeVerbs
from gpuyard_daemon.recovery import Replay
from gpuyard_daemon.reload import Reloader
from gpuyard_daemon.runtime import Durable, Runtime
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_daemon.standby import Ground, stand_by
from gpuyard_daemon.upkeep import Upkeep
from gpuyard_daemon.uploads import Courier, UploadStore
from gpuyard_daemon.whereabouts import Whereabouts
from gpuyard_protocol.bus.base import Bus, BusError, StreamUnavailable
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.queries import NodeView
from gpuyard_protocol.service.sd_notify import Notifier
from gpuyard_protocol.subjects import Streams, stream_name

log = structlog.get_logger("daemon")

PURGE_INTERVAL_S = 1.0
CLOCK_MARK_INTERVAL_S = 10.0
HISTORY_INTERVAL_S = 2.0
FORGET_INTERVAL_S = 3600.0
#: For a turn under way when the daemon is told to stop, and for the events that it made.
STOP_TURN_S = 10.0
STOP_EVENTS_S = 2.0
STOP_REST_S = 5.0
#: After a hand-over, for the answer to whoever asked for it.
FAREWELL_S = 0.1


@dataclass(slots=True)
class Foundations:
    """What is there before the daemon leads."""

    config: DaemonConfig
    fate: Fate
    health: Health
    bus: Bus
    api_bus: Bus
    history: History
    store: SnapshotStore
    reloader: Reloader
    presence: Presence
    notifier: Notifier
    copies: HistoryCopy


class Daemon:
    """A daemon that leads: made by `lead`, then `start`, then `stop`."""

    def __init__(
        self,
        base: Foundations,
        names: Streams,
        core: Scheduler,
        journal: Journal,
        clock: YardClock,
        replay: Replay,
    ) -> None:
        self._base = base
        self.core = core
        self.journal = journal
        self.clock = clock
        self.measures = Measures()
        config, bus = base.config, base.bus
        self.runtime = Runtime(core, journal, clock, base.fate, base.health, self.measures, core.cursors)
        self.ingress = Ingress(bus, config.yard, self.runtime.inbox, replicas=config.replicas)
        self.announcer = Announcer(bus)
        self.uploads = UploadStore(config.state_directory / "uploads")
        self.courier = Courier(bus, self.uploads)
        self.dispatcher = Dispatcher(
            bus,
            core,
            journal.epoch,
            is_settled=lambda: self.runtime.is_settled,
            on_stale=self._node_is_ahead,
            may_command=journal.is_ours,
            clock_of=lambda node: self.monitor.clock_of(node),
            on_starts=self.courier.starting,
        )
        self.monitor = _monitor(config, core, self.runtime, self.dispatcher)
        self.loads = Loads(core, self.runtime.inbox.add_fact)
        self.upkeep = _upkeep(base, core, journal, self.announcer, replay)
        self._lender = SnapshotLender(base.store)
        #: The lead is being handed over: what would else end the process is expected.
        self._is_leaving = False
        self.whereabouts = Whereabouts(config.state_directory / "keys")
        self.audit = AuditLog(bus, clock.now_ms, self.whereabouts if config.authenticate else None)
        self.joining = Joining(base.api_bus, config.state_directory, config.yard, self.audit)
        self._attend_to_nodes()
        store = config.state_directory / "nats" / "store"
        disk = (lambda: levels.disk_at(store)) if store.is_dir() else None
        self.levels = StreamLevels(bus, names, self.upkeep.hasten, disk=disk)
        self.api = Api(
            base.api_bus,
            core,
            base.history,
            self.monitor,
            LogForwarder(bus, core),
            yard=config.yard,
            now_ms=clock.now_ms,
            is_settled=lambda: self.runtime.is_settled and self.ingress.is_verified,
            add_fact=self.runtime.inbox.add_fact,
            audit=self.audit,
            hand_over=self.hand_over,
            said_by=self.node_verbs.verbs,
            alarms=lambda: self.levels.alarms,
            uploads=self.uploads,
        )
        self._untold = list(replay.recent)
        self._tasks: list[asyncio.Task[None]] = []
        self._turns: asyncio.Task[None] | None = None

    def _attend_to_nodes(self) -> None:
        core, journal, config = self.core, self.journal, self._base.config
        self.leases = Leases(
            self._base.bus,
            core,
            journal.epoch,
            clock_of=self.monitor.clock_of,
            is_settled=lambda: self.runtime.is_settled,
            is_ours=journal.is_ours,
        )
        self.node_verbs = NodeVerbs(
            core,
            self.runtime.inbox.add_fact,
            is_settled=lambda: self.runtime.is_settled,
            heard_ms_ago=self.monitor.heard_ms_ago,
            forget_key=self.joining.forget if config.authenticate else None,
        )

    # -- connections between the parts ------------------------------------------------------------------------------

    def _durable(self, durable: Durable) -> None:
        """The journal has a turn. Orders first: a job waits for them."""
        record = durable.record
        for fact in record.facts:
            if type(fact) is NodeJoined:
                self.dispatcher.node_joined(fact.node, fact.instance)
                self.monitor.joined(fact.node)
        self.dispatcher.settled(durable.turn.orders)
        self.announcer.announce(durable.turn.notices, durable.sequence)
        self._base.history.take([fact.view for fact in record.facts if type(fact) is JobRetired], durable.sequence)
        self.upkeep.record_stored(durable.sequence, durable.size)
        self.audit.decided(record.now_ms, durable.inputs, record.facts)

    def _settled(self) -> None:
        self.dispatcher.settled(())
        self.node_verbs.settled()
        if self.ingress.is_verified:
            self.api.settled()
        self.upkeep.settled()

    def _verified(self) -> None:
        if self.runtime.is_settled:
            self.api.settled()

    def _node_is_ahead(self, node: NodeId, detail: str) -> None:
        """A node has orders of a newer leader: either we are deposed (the journal will say so) or it is not ours."""
        reason = f"its ledger has orders of a newer daemon ({detail or 'no detail'}): was the journal replaced?"
        self.runtime.inbox.add_fact(NodeIncompatible(node=node, reason=reason))

    def _configure(self, config: DaemonConfig) -> None:
        """What may change while the daemon runs. The core decides whether the policy is news."""
        self.monitor.set_patience(config.nodes.suspected_after / 1000, config.nodes.lost_after / 1000)
        self.runtime.inbox.add_fact(PolicyChanged(policy=config.policy()))
        self.ingress.rates.set(*config.rates())

    def _lost(self, why: str) -> None:
        self.dispatcher.stop()
        self.courier.stop()
        if not self._is_leaving:
            self._base.fate.seal(EXIT_TEMPORARY, f"the journal is no longer ours: {why}")

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        base, runtime = self._base, self.runtime
        self.journal.on_lost(self._lost)
        base.presence.alive, base.presence.piece = self._alive, self._lender.piece
        runtime.on_durable(self._durable)
        runtime.on_settled(self._settled)
        runtime.inbox.add_fact(YardStarted(epoch=self.journal.epoch))
        self._configure(base.reloader.config)
        base.reloader.apply = self._configure
        await self.announcer.retell(stream_name("EVT", base.config.yard), self._untold)
        await self.monitor.open(base.bus)
        await self.loads.open(base.bus)
        self.ingress.on_verified = self._verified
        self.ingress.on_set_back = lambda why: base.fate.seal(EXIT_BAD_CONFIG, why)
        await self.ingress.open()
        self._turns = self._spawn("turns", runtime.run())
        self.dispatcher.sync_all()
        await self.api.open()
        base.bus.on_reconnect(base.health.reconnected)
        self._spawn("nodes", every(NODES_TICK_S, self.monitor.tick))
        self._spawn("loads", every(LOADS_TICK_S, self.loads.tick))
        self._spawn("leases", every_async(LEASES_TICK_S, self.leases.tick))
        self._spawn("purge", every_async(PURGE_INTERVAL_S, self._purge))
        self._spawn("clock", every(CLOCK_MARK_INTERVAL_S, self._mark_clock))
        self._spawn("history copies", base.copies.follow_standbys())
        self._spawn("history", every_async(HISTORY_INTERVAL_S, base.history.flush))
        self._spawn("audit", self.audit.run())
        if base.config.authenticate:
            await self.joining.open()
            self._spawn("whereabouts", self.whereabouts.run(lambda: open_bus(base.config, "sys", "_INBOX_D")))
            self._spawn("joining", self.joining.run())
        self._spawn("levels", every_async(levels.INTERVAL_S, self.levels.look))
        self._spawn("lending", every(FORGET_INTERVAL_S / 60, self._lender.forget))
        self._spawn("forget", every_async(FORGET_INTERVAL_S, self._forget))
        base.health.standby_of = ""
        base.health.waiting_since = lambda: runtime.inbox.stands_since
        base.health.is_serving = True

    def _alive(self) -> Alive:
        return Alive(
            epoch=self.journal.epoch,
            now_ms=self.clock.now_ms(),
            end=self.journal.last_sequence,
            stalled=self._base.health.undecided_because(),
        )

    def _spawn(self, name: str, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._guard(name, work), name=name)
        self._tasks.append(task)
        return task

    async def _guard(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:  # a part that failed unforeseen ends the process, with its name
            log.exception("part.failed", part=name)
            self._base.fate.seal(EXIT_INVARIANT, f"{name}: {type(error).__name__}: {error}")

    async def _purge(self) -> None:
        journaled = self.runtime.journaled
        await self.ingress.purge(journaled.submissions, journaled.reports)

    def _mark_clock(self) -> None:
        write_mark(self._base.config.directory / "clock.json", self.clock)

    async def _forget(self) -> None:
        self.dispatcher.forget_removed()
        await self._base.history.forget_old(self.clock.now_ms())

    async def hand_over(self) -> str:
        """Stop deciding and sending, and let a standby lead; who does. A `BusError` says why nobody does.

        Nothing is lost if it fails half-way: this process ends, and whoever leads next finds the journal as it is.
        """
        base, presence = self._base, self._base.presence
        if self._is_leaving or presence.heir(self.journal.last_sequence) is None:
            raise BusError("no standby is there and up to date")
        self._is_leaving = True
        base.health.is_serving = False
        await self.api.leave()
        self.runtime.stop()
        if self._turns is not None:
            await asyncio.wait([self._turns], timeout=STOP_TURN_S)
        self.dispatcher.stop()
        self.courier.stop()
        try:
            successor = await presence.hand_over(self.journal.epoch, self.journal.last_sequence)
        except BusError as error:
            base.fate.seal(EXIT_TEMPORARY, f"the lead was given up, and not taken: {error}")
            raise
        finally:
            presence.alive = None
        reason = f"handed over to {successor}"
        asyncio.get_running_loop().call_later(FAREWELL_S, base.fate.seal, EXIT_TEMPORARY, reason)
        return successor

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving

    async def stop(self, *, is_orderly: bool) -> None:
        """Stop deciding and sending. Orderly: let the turn under way end, tell what it decided, let a standby in."""
        if is_orderly and not self._is_leaving:
            with contextlib.suppress(BusError):
                await self.hand_over()
        self._base.presence.close()
        self._base.health.is_serving = False
        self.dispatcher.stop()
        self.courier.stop()
        self.runtime.stop()
        if is_orderly:
            await self.api.finish()
        self.api.close()
        if is_orderly and self._turns is not None:
            # Without a connection the turn would wait for one; the next start finds its inputs where they were.
            await asyncio.wait([self._turns], timeout=STOP_TURN_S if self._base.bus.is_connected else 0.0)
            await self.announcer.drain(STOP_EVENTS_S)
            await self._last_audit()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if is_orderly:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_REST_S):
                    await self.upkeep.close()
                    await self.ingress.close()
        self._mark_clock()

    async def _last_audit(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_EVENTS_S):
                await self.audit.flush(is_last=True)

    # -- for the pages ------------------------------------------------------------------------------------------------

    def sources(self) -> Sources:
        return Sources(
            stats=self.api.stats,
            gauges=self.core.metrics,
            nodes=self._nodes,
            measures=self.measures,
            health=self._base.health,
            inbox=self.runtime.inbox,
            journal=self.journal,
            ingress=self.ingress,
            dispatcher=self.dispatcher,
            announcer=self.announcer,
            monitor=self.monitor,
            loads=self.loads,
            api=self.api,
            upkeep=self.upkeep,
            history=self._base.history,
            levels=self.levels,
            leases=self.leases,
            reloader=self._base.reloader,
            standbys=lambda: len(self._base.presence.standbys()),
        )

    def _nodes(self) -> tuple[NodeView, ...]:
        return tuple(self.api.with_samples(view) for view in self.core.node_views(None))


def _monitor(config: DaemonConfig, core: Scheduler, runtime: Runtime, dispatcher: Dispatcher) -> NodeMonitor:
    return NodeMonitor(
        core,
        runtime.inbox.add_fact,
        dispatcher.heard,
        suspected_after_s=config.nodes.suspected_after / 1000,
        lost_after_s=config.nodes.lost_after / 1000,
    )


def _upkeep(base: Foundations, core: Scheduler, journal: Journal, announcer: Announcer, replay: Replay) -> Upkeep:
    journaled = base.config.journal
    return Upkeep(
        journaled,
        journal,
        base.store,
        Archive(base.config.directory / "archive", journaled.archive_days, journaled.archive_max * 2**20),
        base.history,
        announcer,
        core.snapshot,
        lambda: core.turn,
        replay.records,
        base.presence.needed_after,
    )


async def every(seconds: float, action: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        action()


async def every_async(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await action()


async def lead(base: Foundations) -> Daemon:
    """The daemon that results has the journal's whole state and is its one writer. While another leads, this waits."""
    while True:
        claim, may_live = await _find_leader(base)
        if claim is not None and may_live:
            return await _succeed(base, claim)
        # Whatever is made while state is read stays: looking through it again and again would take as long as reading.
        gc.disable()
        try:
            return await _lead_alone(base, claim)
        except LeadershipLost as error:
            if not base.presence.is_open:
                raise
            # Two started at the same moment, and the other one was quicker.
            log.warning("claim.failed", error=str(error))
        finally:
            gc.enable()


async def _find_leader(base: Foundations) -> tuple[Claim | None, bool]:
    try:
        return await leadership.find_leader(base.bus, stream_name("JRN", base.config.yard), base.presence)
    except StreamUnavailable:
        return None, False  # A new yard.


async def _succeed(base: Foundations, claim: Claim) -> Daemon:
    """Stand by, and take the place of the leader when it is gone."""
    config = base.config
    ground = Ground(config, base.health, base.bus, base.history, base.store, base.presence, base.notifier, base.copies)
    succession = await stand_by(ground, claim)
    names = await recovery.planned_streams(base.bus, config)
    core = succession.core
    await recovery.check_cursors(base.bus, names, core.cursors)
    clock = succession.clock or open_clock(config.directory / "clock.json", core.now_ms)
    return Daemon(base, names, core, succession.journal, clock, succession.replay)


async def _lead_alone(base: Foundations, claim: Claim | None) -> Daemon:
    """Restore, replay, and claim in the place of `claim`."""
    config = base.config
    names = await recovery.ensure_streams(base.bus, config)
    await open_audit(base.bus, config.yard, sum(spec.max_bytes for spec in names), config.replicas)
    restored = recovery.restore(base.store)
    core = (
        Scheduler(config.scheduler) if restored.state is None else Scheduler.restore(restored.state, config.scheduler)
    )
    journal = Journal(base.bus, config.yard, base.presence.holder)
    replaced = None if not base.presence.is_open else claim.sequence if claim else 0
    told, _ = await told_up_to(base.bus, stream_name("EVT", config.yard))
    replay = await recovery.replay_and_claim(journal, core, base.history, restored, replacing=replaced, told=told)
    await recovery.check_cursors(base.bus, names, core.cursors)
    clock = open_clock(config.directory / "clock.json", core.now_ms)
    return Daemon(base, names, core, journal, clock, replay)
