"""The daemon put together: every part made once, connected, started and stopped in order. No logic of its own.

Start: connections, state from snapshot and journal, leadership, then readers and turns. Stop: first nothing more is
decided or sent, then what is under way gets a moment to end, then the files are closed. Jobs go on whatever happens
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from gpuyard_daemon import levels, recovery
from gpuyard_daemon.announce import Announcer
from gpuyard_daemon.api import Api
from gpuyard_daemon.archive import Archive
from gpuyard_daemon.audit import AuditLog, open_audit
from gpuyard_daemon.clock import YardClock, open_clock, write_mark
from gpuyard_daemon.config import DaemonConfig
from gpuyard_daemon.core.facts import JobRetired, NodeJoined
from gpuyard_daemon.core.inputs import NodeIncompatible, PolicyChanged, YardStarted
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.dispatch import Dispatcher
from gpuyard_daemon.exits import EXIT_INVARIANT, EXIT_OK, EXIT_TEMPORARY, Fate
from gpuyard_daemon.health import BEAT_S, Health
from gpuyard_daemon.history import History
from gpuyard_daemon.http.server import HttpDoor
from gpuyard_daemon.http.sources import Sources
from gpuyard_daemon.ingress import Ingress
from gpuyard_daemon.joining import Joining
from gpuyard_daemon.journal import Journal
from gpuyard_daemon.levels import StreamLevels
from gpuyard_daemon.loads import TICK_S as LOADS_TICK_S
from gpuyard_daemon.loads import Loads
from gpuyard_daemon.logs import LogForwarder
from gpuyard_daemon.measures import Measures
from gpuyard_daemon.node_monitor import TICK_S as NODES_TICK_S
from gpuyard_daemon.node_monitor import NodeMonitor
from gpuyard_daemon.notify import Notifier
from gpuyard_daemon.recovery import Replay, StartLater, StartRefused
from gpuyard_daemon.reload import Reloader
from gpuyard_daemon.runtime import Durable, Runtime
from gpuyard_daemon.snapshots import SnapshotStore
from gpuyard_daemon.upkeep import Upkeep
from gpuyard_protocol.bus.base import Bus
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.queries import NodeView
from gpuyard_protocol.subjects import Streams, stream_name

log = structlog.get_logger("daemon")

CONNECT_TIMEOUT_S = 30.0
PURGE_INTERVAL_S = 1.0
CLOCK_MARK_INTERVAL_S = 10.0
HISTORY_INTERVAL_S = 2.0
FORGET_INTERVAL_S = 3600.0
#: For a turn under way when the daemon is told to stop, and for the events that it made.
STOP_TURN_S = 10.0
STOP_EVENTS_S = 2.0
STOP_REST_S = 5.0


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
        self.ingress = Ingress(bus, config.yard, self.runtime.inbox)
        self.announcer = Announcer(bus)
        self.dispatcher = Dispatcher(
            bus, core, journal.epoch, is_settled=lambda: self.runtime.is_settled, on_stale=self._node_is_ahead
        )
        self.monitor = NodeMonitor(
            core,
            self.runtime.inbox.add_fact,
            self.dispatcher.heard,
            suspected_after_s=config.nodes.suspected_after / 1000,
            lost_after_s=config.nodes.lost_after / 1000,
        )
        self.loads = Loads(core, self.runtime.inbox.add_fact)
        archive = Archive(config.directory / "archive", config.journal.archive_days)
        self.upkeep = Upkeep(
            config.journal,
            journal,
            base.store,
            archive,
            base.history,
            self.announcer,
            core.snapshot,
            lambda: core.turn,
            replay.records,
        )
        self.audit = AuditLog(bus, clock.now_ms)
        self.joining = Joining(base.api_bus, config.state_directory, config.yard, self.audit)
        self.api = Api(
            base.api_bus,
            core,
            base.history,
            self.monitor,
            LogForwarder(bus, core),
            yard=config.yard,
            now_ms=clock.now_ms,
            is_settled=lambda: self.runtime.is_settled,
            add_fact=self.runtime.inbox.add_fact,
            audit=self.audit,
        )
        self.levels = StreamLevels(bus, names, self.upkeep.hasten)
        self._untold = list(replay.recent)
        self._tasks: list[asyncio.Task[None]] = []
        self._turns: asyncio.Task[None] | None = None

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
        self.api.settled()
        self.upkeep.settled()

    def _node_is_ahead(self, node: NodeId, detail: str) -> None:
        """A node has orders of a newer leader: either we are deposed (the journal will say so) or it is not ours."""
        reason = f"its ledger has orders of a newer daemon ({detail or 'no detail'}): was the journal replaced?"
        self.runtime.inbox.add_fact(NodeIncompatible(node=node, reason=reason))

    def _configure(self, config: DaemonConfig) -> None:
        """What may change while the daemon runs. The core decides whether the policy is news."""
        self.monitor.set_patience(config.nodes.suspected_after / 1000, config.nodes.lost_after / 1000)
        self.runtime.inbox.add_fact(PolicyChanged(policy=config.policy()))

    def _lost(self, why: str) -> None:
        self.dispatcher.stop()
        self._base.fate.seal(EXIT_TEMPORARY, f"the journal is no longer ours: {why}")

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        base, runtime = self._base, self.runtime
        self.journal.on_lost(self._lost)
        runtime.on_durable(self._durable)
        runtime.on_settled(self._settled)
        runtime.inbox.add_fact(YardStarted(epoch=self.journal.epoch))
        self._configure(base.reloader.config)
        base.reloader.apply = self._configure
        await self.announcer.retell(stream_name("EVT", base.config.yard), self._untold)
        await self.monitor.open(base.bus)
        await self.loads.open(base.bus)
        await self.ingress.open()
        self._turns = self._spawn("turns", runtime.run())
        self.dispatcher.sync_all()
        await self.api.open()
        base.bus.on_reconnect(base.health.reconnected)
        self._spawn("nodes", every(NODES_TICK_S, self.monitor.tick))
        self._spawn("loads", every(LOADS_TICK_S, self.loads.tick))
        self._spawn("purge", every_async(PURGE_INTERVAL_S, self._purge))
        self._spawn("clock", every(CLOCK_MARK_INTERVAL_S, self._mark_clock))
        self._spawn("history", every_async(HISTORY_INTERVAL_S, base.history.flush))
        self._spawn("audit", self.audit.run())
        if base.config.authenticate:
            await self.joining.open()
            self._spawn("joining", self.joining.run())
        self._spawn("levels", every_async(levels.INTERVAL_S, self.levels.look))
        self._spawn("forget", every_async(FORGET_INTERVAL_S, self._forget))
        base.health.is_serving = True

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
        await self._base.history.forget_old(self.clock.now_ms())

    async def stop(self, *, is_orderly: bool) -> None:
        """Stop deciding and sending. Orderly: let the turn under way end, and tell what it decided."""
        self._base.health.is_serving = False
        self.dispatcher.stop()
        self.runtime.stop()
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
                await self.audit.flush()

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
            reloader=self._base.reloader,
        )

    def _nodes(self) -> tuple[NodeView, ...]:
        return tuple(self.api.with_samples(view) for view in self.core.node_views(None))


async def every(seconds: float, action: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        action()


async def every_async(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await action()


async def lead(base: Foundations) -> Daemon:
    """Restore, replay, claim: the daemon that results has the journal's whole state and is its one writer."""
    config = base.config
    names = await recovery.ensure_streams(base.bus, config)
    await open_audit(base.bus, config.yard, sum(spec.max_bytes for spec in names))
    restored = recovery.restore(base.store)
    core = (
        Scheduler(config.scheduler) if restored.state is None else Scheduler.restore(restored.state, config.scheduler)
    )
    journal = Journal(base.bus, config.yard, secrets.token_hex(8))
    replay = await recovery.replay_and_claim(journal, core, base.history, restored)
    await recovery.check_cursors(base.bus, names, core.cursors)
    clock = open_clock(config.directory / "clock.json", core.now_ms)
    return Daemon(base, names, core, journal, clock, replay)


async def run(config: DaemonConfig, fate: Fate, health: Health, notifier: Notifier, reloader: Reloader) -> int:
    """Serve until the fate is sealed; returns the exit code. `StartRefused` or a `BusError` if there is no start."""
    directory = recovery.prepare_directory(config)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, _lock(directory / "daemon.lock"))
        door = await _open_door(config, health)
        if door is not None:
            stack.push_async_callback(door.close)
        beat = asyncio.get_running_loop().create_task(_beat(health, notifier), name="heartbeat")
        stack.callback(beat.cancel)
        bus, api_bus = await _connect(config, "daemon", "_INBOX_D"), await _connect(config, "api", "_INBOX_API")
        stack.push_async_callback(bus.close)
        stack.push_async_callback(api_bus.close)
        health.is_connected = lambda: bus.is_connected and api_bus.is_connected
        for connection in (bus, api_bus):
            connection.on_error(lambda error: log.warning("bus.error", error=str(error)))
        history = History(directory / "history.sqlite", config.history_days)
        await history.open()
        stack.push_async_callback(history.close)
        store = SnapshotStore(directory / "snapshots", config.yard)
        daemon = await lead(Foundations(config, fate, health, bus, api_bus, history, store, reloader))
        gc.collect()
        gc.freeze()
        await daemon.start()
        if door is not None:
            door.show(daemon.sources())
        notifier.ready(f"scheduling yard {config.yard}")
        log.info("serving", yard=config.yard, epoch=daemon.journal.epoch, turn=daemon.core.turn)
        ending = await fate.wait()
        notifier.stopping(ending.reason)
        await daemon.stop(is_orderly=ending.code == EXIT_OK)
        return ending.code


def _lock(path: os.PathLike[str]) -> int:
    """Hold the state directory as long as this process lives; two daemons would only depose each other in turn."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StartLater(f"another daemon runs from this state directory ({path} is locked)") from None
    return descriptor


async def _open_door(config: DaemonConfig, health: Health) -> HttpDoor | None:
    address = config.http_address()
    if address is None:
        return None
    door = HttpDoor(*address, health)
    try:
        url = await door.open()
    except OSError as error:
        raise StartRefused(f"cannot listen on {config.http}: {error.strerror or error}") from None
    # For whoever started us with port 0; whole or not there.
    note = config.directory / "http.url.new"
    note.write_text(url + "\n")
    note.replace(config.directory / "http.url")
    log.info("http.listening", url=url)
    return door


async def _connect(config: DaemonConfig, role: str, inbox_prefix: str) -> Bus:
    seed = config.seed(role)
    if seed is not None and not seed.exists():
        raise StartRefused(f"there is no key {seed}: `gpuyard up` makes the keys of a yard")
    return await connect(
        config.nats,
        name=f"gpuyard-{role}",
        inbox_prefix=inbox_prefix,
        seed=str(seed) if seed is not None else None,
        reconnect_jitter_s=(0.02, 0.1),
        connect_timeout_s=CONNECT_TIMEOUT_S,
        tls_ca=config.tls_ca or None,
        tls_cert=config.tls_cert or None,
        tls_key=config.tls_key or None,
    )


async def _beat(health: Health, notifier: Notifier) -> None:
    """The loop's own pulse, and systemd's watchdog, which is fed only while the daemon gets on."""
    interval_s = notifier.watchdog_interval_s
    fed_at = 0.0
    while True:
        await asyncio.sleep(BEAT_S)
        health.beat()
        now = time.monotonic()
        if interval_s is not None and now - fed_at >= min(interval_s, 10.0) and not health.stalled_because():
            notifier.alive()
            fed_at = now


def handle_loop_exception(fate: Fate) -> Callable[[asyncio.AbstractEventLoop, dict[str, object]], None]:
    """What nobody awaited. A message handler that failed may have lost a message: the process must start anew."""

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        message = str(context.get("message", ""))
        trace = error if isinstance(error, BaseException) else None
        log.error("loop.exception", message=message, exc_info=trace)
        if message.startswith("bus "):
            fate.seal(EXIT_INVARIANT, f"{message}: {error!r}")

    return handle
