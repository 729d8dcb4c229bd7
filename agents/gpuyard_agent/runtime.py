"""The agent's loop: events in, one turn of the core, one commit, then the actions.

Order of a turn: the core decides, the ledger makes it durable, reports go to the outbox, actions are carried out and
orders answered. Nothing is done about an order before its intent is on the disk; nothing is reported that the next
process of this agent would not know.

The agent does not need the bus to look after its jobs: it takes over what runs, keeps time limits and collects ends
without it, and reports when it is there. It ends at once when asked (its jobs go on), when the core contradicts itself,
and when the ledger cannot be written.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from gpuyard_agent import host
from gpuyard_agent.cards import CardWatch
from gpuyard_agent.checkpoint import CheckpointBackend
from gpuyard_agent.checkpoint_dirs import CheckpointDirectories
from gpuyard_agent.commands import CommandDoor
from gpuyard_agent.core import AgentCore
from gpuyard_agent.core.events import InventoryRead, ProcessesListed, ReportsDelivered, TimeHalted, TimePassed
from gpuyard_agent.declared_use import DeclaredUse
from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble
from gpuyard_agent.drill import FaultDrill
from gpuyard_agent.hands import Hands
from gpuyard_agent.health import Health
from gpuyard_agent.identity import Identity
from gpuyard_agent.idle import IdleWatch
from gpuyard_agent.inbox import Inbox
from gpuyard_agent.job_use import JobUse
from gpuyard_agent.launch.accounts import AccountPolicy
from gpuyard_agent.launch.containers import Containers, Engine
from gpuyard_agent.launch.turn_taking import TurnTakingLauncher
from gpuyard_agent.ledger import Ledger
from gpuyard_agent.logs import Followers, LogStore
from gpuyard_agent.metrics import Metrics
from gpuyard_agent.network import training_environment
from gpuyard_agent.outbox import Outbox
from gpuyard_agent.partitions.maker import CardPartitions
from gpuyard_agent.suspending import Suspending, SuspendRules
from gpuyard_agent.telemetry import Pulse
from gpuyard_agent.tenant_secrets import TenantSecrets
from gpuyard_agent.twin import Holder, claim
from gpuyard_agent.uploads import Uploads
from gpuyard_agent.watchdog import Watchdog
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import Bus, BusError, Connector
from gpuyard_protocol.codec import encode
from gpuyard_protocol.nodes import Ended, IdleGpu, Inventory, OrderAnswer, Prepared, Report, Started

#: The beat by which health is judged, and by which deletions are written that nothing waits for.
TICK_S = 1.0
CONNECT_PAUSE_S = 1.0
#: Between two looks for output to rotate or remove.
TIDY_S = 60.0

_log = structlog.get_logger("gpuyard_agent")


class _StopAsked(Exception):
    """Ends the group of tasks; never leaves this module."""


@dataclass(frozen=True, slots=True)
class NodeRules:
    """What the settings say of the work on this node."""

    #: Output and own directories of jobs.
    jobs: Path
    #: For checkpoints, shared by all nodes; None: there is none, they stay on the node.
    checkpoints: Path | None
    #: What the node keeps for tenants, by name.
    secrets: Path
    #: For jobs that bring no rule of their own.
    idle: IdleGpu
    #: See `commands`.
    must_be_forwarded: bool


class Runtime:
    """One agent process. `run` returns when `stop` was called; whatever else it raises ends the process."""

    def __init__(
        self,
        *,
        identity: Identity,
        boot_id: str,
        rules: NodeRules,
        inventory: Inventory,
        ledger: Ledger,
        backend: DeviceBackend,
        partitions: CardPartitions,
        launcher: TurnTakingLauncher,
        accounts: AccountPolicy,
        checkpoint: CheckpointBackend,
        engine: Engine,
        connector: Connector,
        drill: FaultDrill | None = None,
    ) -> None:
        """`inventory`: what the node has besides its cards. `drill`: faults of modelled cards."""
        self._identity = identity
        self._boot_id = boot_id
        self._inventory = inventory
        self._ledger = ledger
        self._backend = backend
        self._partitions = partitions
        self._launcher = launcher
        self._connector = connector
        self._must_be_forwarded = rules.must_be_forwarded
        self._inbox = Inbox()
        self._stop_asked = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._bus: Bus | None = None
        self._door: CommandDoor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_ms: int | None = None
        self.health = Health()
        #: Set once everything that survived the last process is taken over.
        self.resumed = asyncio.Event()
        content = ledger.load(host.node_clock_ms())
        counters, live, closed = content.counters, content.live, content.closed
        self._core = AgentCore(identity.node, identity.instance, boot_id, counters=counters, live=live, closed=closed)
        self._outbox = Outbox(
            identity.node, identity.instance, boot_id, content.outbox, self._on_delivered, ledger=ledger.id
        )
        self.metrics = Metrics(lambda: self._core.live, lambda: self._outbox.depth)
        self._uploads = Uploads(rules.jobs.parent / "uploads")
        self._store = LogStore(rules.jobs, lambda key: key in self._core.live)
        self._suspending = self._make_suspending(checkpoint)
        self._suspending.restore(live)
        self._containers = Containers(engine, identity.node)
        self._hands = self._make_hands(rules, accounts)
        launcher.on_halted = lambda key, total_ms: self._inbox.put(TimeHalted(key, total_ms))
        declared = DeclaredUse(self._store)
        self._use = JobUse(backend, declared)
        launcher.is_busy = self._use.is_busy
        self._idle = IdleWatch(rules.idle)
        self._watchdog = Watchdog(backend, declared, emit=self._inbox.put, live=lambda: self._core.live)
        self._cards = CardWatch(
            inventory,
            backend,
            partitions,
            drill,
            emit=self._inbox.put,
            live=lambda: self._core.live,
            on_mig=self._hands.on_mig,
        )

    def _make_suspending(self, checkpoint: CheckpointBackend) -> Suspending:
        return Suspending(
            self._backend,
            self._partitions,
            self._launcher,
            checkpoint,
            SuspendRules(budget_mib=self._inventory.suspend_mib, problem=self._inventory.suspend_problem),
            emit=self._inbox.put,
        )

    def _make_hands(self, rules: NodeRules, accounts: AccountPolicy) -> Hands:
        inventory = self._inventory
        return Hands(
            self._identity.node,
            self._partitions,
            self._launcher,
            accounts,
            self._store,
            CheckpointDirectories(rules.jobs, rules.checkpoints),
            self.metrics,
            self._suspending,
            self._containers,
            TenantSecrets(rules.secrets, rules.jobs.parent / "handed", self._identity.node),
            self._uploads,
            network=training_environment(inventory.address, inventory.interfaces, inventory.rdma),
            emit=self._inbox.put,
            answer=self._answer,
            spawn=self._spawn,
        )

    def stop(self) -> None:
        self._stop_asked.set()

    async def run(self) -> None:
        try:
            async with self._group as group:
                await self._resume()
                group.create_task(self._wait_for_stop())
                group.create_task(self._turns())
                group.create_task(self._tick())
                group.create_task(self._hands.watch())
                group.create_task(self._cards.run())
                group.create_task(self._partitions.watch())
                group.create_task(self._watchdog.run())
                group.create_task(self._tidy())
                group.create_task(self._serve())
        except* _StopAsked:
            _log.info("stopping", jobs_left_running=self._core.running)
        finally:
            await self._close()

    async def _wait_for_stop(self) -> None:
        await self._stop_asked.wait()
        raise _StopAsked

    async def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._bus is not None:
            await self._bus.close()
        await self._launcher.close()
        await self._suspending.close()
        await self._partitions.close()
        await self._backend.close()
        self._ledger.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._group.create_task(work)

    # --- taking over ---

    async def _resume(self) -> None:
        """The ledger's word, the launcher's and the cards' into the core, as its first events."""
        devices = await self._cards.open()
        found = await self._hands.open_launcher()
        self._inbox.put(ProcessesListed(found, at_start=True))
        held = [assignment for assignment in self._core.live.values() if assignment.boot_id == self._boot_id]
        for assignment in held:
            if assignment.is_on_cards:
                self._inbox.put(await self._hands.adopt(assignment))
        try:
            for removed in await self._partitions.sweep():
                _log.warning("removed from the cards", what=removed)
        except DeviceTrouble as error:
            _log.warning("cards not swept", why=str(error))
        self._inbox.put(InventoryRead(msgspec.structs.replace(self._inventory, devices=devices)))
        _log.info(
            "resumed",
            node=self._identity.node,
            instance=self._identity.instance,
            assignments=len(self._core.live),
            processes=len(found),
            cards=len(devices),
            undelivered=self._outbox.depth,
        )

    # --- turns ---

    async def _turns(self) -> None:
        core, ledger = self._core, self._ledger
        while True:
            events = await self._inbox.take()
            turn = core.handle(events, host.node_clock_ms(), host.wall_clock_ms())
            if turn.must_commit:
                reports = [(number, encode(report)) for number, report in turn.reports]
                began_s = time.perf_counter()
                await ledger.commit(turn, reports, core.counters)
                self.metrics.commit_latency.observe(time.perf_counter() - began_s)
                self._outbox.add(reports)
                for _, report in turn.reports:
                    self._note(report)
            else:
                ledger.postpone(turn, core.counters)
            self._hands.carry_out(turn.actions)
            self._arm_timer()
            if not turn.must_commit and ledger.has_postponed and TimePassed() in events:
                await ledger.sweep()
            self.health.turned()
            self.resumed.set()

    def _note(self, report: Report) -> None:
        """One line for each thing that happened to an assignment."""
        match report:
            case Prepared(key=key, port=port):
                _log.info("prepared", assignment=str(key), port=port)
            case Started(key=key, pid=pid):
                _log.info("started", assignment=str(key), pid=pid)
            case Ended(key=key, outcome=outcome):
                self.metrics.ended(key, outcome)
                _log.info(
                    "ended",
                    assignment=str(key),
                    outcome=outcome,
                    exit_code=report.exit_code,
                    signal=report.signal,
                    code=report.code,
                    detail=report.detail,
                )
            case _:
                pass

    def _on_delivered(self, up_to: int) -> None:
        self._inbox.put(ReportsDelivered(up_to))

    def _answer(self, request: int, answer: OrderAnswer) -> None:
        if self._door is not None:
            self._door.answer(request, answer)

    # --- time ---

    def _arm_timer(self) -> None:
        at_ms = self._core.next_deadline_ms()
        if at_ms == self._timer_at_ms:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at_ms = None, at_ms
        if at_ms is not None:
            delay_s = max(0, at_ms - host.node_clock_ms()) / 1000
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at_ms = None, None
        self._inbox.put(TimePassed())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._inbox.put(TimePassed())

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            await asyncio.to_thread(self._store.tidy, time.time())

    # --- the bus ---

    async def _serve(self) -> None:
        """Connect, listen, and only then report: the daemon answers a `Joined` with a command."""
        await self.resumed.wait()
        bus = await self._connect()
        identity = self._identity
        holder = Holder(instance=identity.instance, hostname=self._inventory.hostname, pid=os.getpid())
        await claim(bus, identity, holder, self._spawn)
        followers = Followers(bus, self._store)
        door = self._door = CommandDoor(
            bus,
            self._inbox,
            self._store,
            followers,
            self.metrics,
            self._spawn,
            self._uploads,
            must_be_forwarded=self._must_be_forwarded,
        )
        while True:
            try:
                await bus.subscribe(subjects.commands(identity.node), door.on_message)
                break
            except BusError as error:
                _log.warning("not listening for orders", why=str(error))
                await asyncio.sleep(CONNECT_PAUSE_S)
        pulse = Pulse(
            identity.node,
            identity.instance,
            self._boot_id,
            self._core,
            self._backend,
            self.metrics,
            self._use,
            self._idle,
            self._inbox.put,
            self._hands.on_mig,
        )
        _log.info("connected", node=identity.node, instance=identity.instance)
        self._spawn(self._outbox.run(bus))
        self._spawn(followers.run())
        self._spawn(pulse.beat(bus))
        self._spawn(pulse.measure(bus))

    async def _connect(self) -> Bus:
        while True:
            try:
                bus = await self._connector()
                break
            except BusError as error:
                _log.warning("not connected", why=str(error))
                await asyncio.sleep(CONNECT_PAUSE_S)
        self._bus = bus
        self.health.is_connected = True
        bus.on_disconnect(lambda: self._on_connection(False))
        bus.on_reconnect(lambda: self._on_connection(True))
        bus.on_error(lambda error: _log.warning("bus", why=str(error)))
        return bus

    def _on_connection(self, is_connected: bool) -> None:
        self.health.is_connected = is_connected
        (_log.info if is_connected else _log.warning)("connection", connected=is_connected)
