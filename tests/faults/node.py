"""An agent process: the production core and outbox on a modelled host.

The shell around them does what the agent's own does, in the same order: the core decides, the ledger makes it durable,
reports go to the outbox, actions are carried out. Each of these steps takes its time, and between any two of them the
process can die (`POINTS`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import cast

from faults.host import Host, Process, ledger_write
from faults.network import FaultyBroker, FaultyBus, Weather
from faults.party import Party
from gpuyard_agent.core import AgentCore
from gpuyard_agent.core.actions import (
    Action,
    Answer,
    ForgetProcess,
    HoldPort,
    PreparePartition,
    RenewLeases,
    ResumeProcess,
    StartProcess,
    StopProcess,
    SuspendProcess,
    Turn,
    UndoPartition,
)
from gpuyard_agent.core.events import (
    InventoryRead,
    OrdersReceived,
    PartitionFailed,
    PartitionReady,
    PartitionUndone,
    PortFree,
    PortTaken,
    ProcessBroken,
    ProcessesListed,
    ProcessRefused,
    ProcessResumed,
    ProcessStarted,
    ProcessSuspended,
    RenewalReceived,
    ReportsDelivered,
    ResumeRefused,
    SuspendRefused,
    SyncReceived,
    TimePassed,
    UndoFailed,
)
from gpuyard_agent.inbox import Inbox
from gpuyard_agent.outbox import Outbox
from gpuyard_protocol import subjects
from gpuyard_protocol.bus.base import BusError, Message
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Command, Heartbeat, OrderBatch, Renew, Sync
from gpuyard_protocol.resources import Partition

#: Where an agent may die: between deciding and the commit, after it, with a partition or a process that it has told
#: nobody of, with an end that it has seen and not written down, with a partition undone, with a process halted or going
#: on again that it has told nobody of.
POINTS = ("decided", "committed", "partition-made", "launched", "end-seen", "undone", "off-card", "on-card")
#: How often the host refuses what it is asked, in a bad hour.
TROUBLE = 0.04
_COMMAND = cast("type[Command]", Command)


class AgentProcess(Party):
    def __init__(
        self,
        host: Host,
        number: int,
        broker: FaultyBroker,
        weather: Weather,
        *,
        has_trouble: Callable[[], bool],
        beat_s: float,
        on_failure: Callable[[BaseException], None],
        on_death: Callable[[Host], None],
    ) -> None:
        super().__init__(on_failure)
        self.host = host
        self.instance = f"{host.name}-process-{number}"
        self._broker = broker
        self._weather = weather
        self._rng: random.Random = broker.rng
        self._has_trouble = has_trouble
        self._beat_s = beat_s
        self._told_death = on_death
        self._inbox = Inbox()
        self._replies: dict[int, str] = {}
        self._requests = 0
        self._pruned: list[AssignmentKey] = []
        self._resumed = asyncio.Event()
        self._watches = False
        self.core: AgentCore | None = None
        self.spawn(self._main())

    def on_death(self) -> None:
        if self.host.owner is self:
            self.host.owner = None
        self._told_death(self.host)

    async def _pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self._rng.uniform(least_s, most_s))

    # --- start ---

    async def _main(self) -> None:
        await self._pause(0.05, 0.5)
        host = self.host
        host.owner = self  # from here on the launcher serves nobody else
        counters, live, closed = host.ledger.load(host.clock_ms())
        self.core = AgentCore(host.name, self.instance, host.boot_id, counters=counters, live=live, closed=closed)
        waiting = sorted(host.ledger.outbox.items())
        self._outbox = Outbox(
            host.name, self.instance, host.boot_id, waiting, self._delivered, ledger=f"ledger-{host.name}"
        )
        await self._resume(self.core)
        self.spawn(self._turns(self.core))
        self.spawn(self._tick())
        await self._resumed.wait()
        self._watches = True
        for _, process in sorted(host.processes.items()):
            if process.end is not None:
                self.process_ended(process)
        await self._serve(self.core)

    async def _resume(self, core: AgentCore) -> None:
        host = self.host
        self._inbox.put(ProcessesListed(host.list_processes(), at_start=True))
        await self._pause(0.001, 0.05)
        for key, assignment in list(core.live.items()):
            if assignment.boot_id == host.boot_id and assignment.is_on_cards:
                host.make(key, assignment.start.partition)
                self._inbox.put(PartitionReady(key))
        for key in [key for key in host.made if key not in core.live]:
            if key not in host.processes or host.processes[key].end is not None:
                host.undo(key)
        self._inbox.put(InventoryRead(host.inventory))

    def _delivered(self, up_to: int) -> None:
        self._inbox.put(ReportsDelivered(up_to))

    # --- turns ---

    async def _turns(self, core: AgentCore) -> None:
        host = self.host
        while True:
            events = await self._inbox.take()
            turn = core.handle(events, host.clock_ms(), host.wall_ms())
            self._pruned.extend(turn.pruned)
            if turn.must_commit or TimePassed() in events:
                await self._commit(core, turn)
            self._carry_out(turn.actions)
            self._resumed.set()

    async def _commit(self, core: AgentCore, turn: Turn) -> None:
        reports = [(number, encode(report)) for number, report in turn.reports]
        pruned, self._pruned = self._pruned, []
        write = ledger_write(turn, reports, core.counters, pruned)
        self.passes("decided")
        await self._pause(0.0005, 0.01)
        self.host.ledger.commit(write)
        self.passes("committed")
        self._outbox.add(reports)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            self._inbox.put(TimePassed())

    # --- actions ---

    def _carry_out(self, actions: Sequence[Action]) -> None:
        starts = [action for action in actions if isinstance(action, StartProcess)]
        for action in actions:
            match action:
                case PreparePartition(key=key, partition=partition):
                    self.spawn(self._prepare(key, partition))
                case HoldPort(key=key, port=port):
                    is_taken = self._has_trouble() and self._rng.random() < TROUBLE
                    self._inbox.put((PortTaken if is_taken else PortFree)(key, port))
                case StopProcess(key=key, grace_ms=grace_ms):
                    self.spawn(self._stop(key, grace_ms))
                case SuspendProcess():
                    self.spawn(self._suspend(action))
                case ResumeProcess():
                    self.spawn(self._resume_process(action))
                case UndoPartition(key=key):
                    self.spawn(self._undo(key))
                case ForgetProcess(key=key):
                    self.spawn(self._forget(key))
                case RenewLeases(renewed_ms=renewed_ms):
                    self.spawn(self._renew(renewed_ms))
                case Answer(request=request, answer=answer):
                    if (reply := self._replies.pop(request, "")) != "":
                        self.spawn(self._publish(reply, encode(answer)))
                case _:
                    pass
        if starts:
            self.spawn(self._start(starts))

    def _goes_wrong(self) -> bool:
        return self._has_trouble() and self._rng.random() < TROUBLE

    async def _prepare(self, key: AssignmentKey, partition: Partition) -> None:
        await self._pause(0.001, 0.5)
        if self._goes_wrong():
            self._inbox.put(PartitionFailed(key, "PartitionUnavailable", "the card would not be cut"))
            return
        self.host.make(key, partition)
        self.passes("partition-made")
        self._inbox.put(PartitionReady(key))

    async def _undo(self, key: AssignmentKey) -> None:
        await self._pause(0.001, 0.2)
        if self._goes_wrong():
            self._inbox.put(UndoFailed(key, "the card is busy"))
            return
        self.host.undo(key)
        self.passes("undone")
        self._inbox.put(PartitionUndone(key))

    async def _start(self, starts: Sequence[StartProcess]) -> None:
        await self._pause(0.0005, 0.02)
        results: list[ProcessStarted | ProcessRefused] = []
        for start in starts:
            if start.key not in self.host.processes and self._goes_wrong():
                results.append(ProcessRefused(start.key, "CommandNotFound", "no such program"))
                continue
            process = self.host.launch(start.key, start.launch, start.renewed_ms)
            results.append(ProcessStarted(start.key, process.pid, process.started_ms))
        self.passes("launched")
        await self._pause(0.0005, 0.02)
        for result in results:
            self._inbox.put(result)

    async def _suspend(self, action: SuspendProcess) -> None:
        await self._pause(0.01, 2.0)
        key, rng = action.key, self._rng
        known = self.host.processes.get(key)
        # What is off its card already, by an agent that died before it wrote that down, is found so.
        is_off = bool(action.gpu_pids) or (known is not None and bool(known.image_mib))
        if not is_off and self._goes_wrong():
            is_lost = rng.random() < 0.3
            self._inbox.put(
                ProcessBroken(key, "the driver") if is_lost else SuspendRefused(key, "DriverRefused", "busy")
            )
            return
        process = self.host.suspend(key, rng.randint(500, 80_000))
        if process is None:
            self._inbox.put(SuspendRefused(key, "NotRunning", "it has ended"))
            return
        self.passes("off-card")
        self._inbox.put(ProcessSuspended(key, (process.pid,), process.image_mib, 10))

    async def _resume_process(self, action: ResumeProcess) -> None:
        await self._pause(0.01, 2.0)
        key = action.key
        known = self.host.processes.get(key)
        is_back = known is not None and known.end is None and not known.image_mib
        if not is_back and self._goes_wrong():
            is_lost = self._rng.random() < 0.3
            self._inbox.put(
                ProcessBroken(key, "the driver") if is_lost else ResumeRefused(key, "DriverRefused", "busy")
            )
            return
        if self.host.resume(key, action.partition):
            self.passes("on-card")
            self._inbox.put(ProcessResumed(key, 10))

    async def _stop(self, key: AssignmentKey, grace_ms: int) -> None:
        await self._pause(0.0005, 0.01)
        self.host.stop(key, grace_ms)

    async def _renew(self, renewed_ms: int) -> None:
        await self._pause(0.0005, 0.01)
        self.host.leases.renew(renewed_ms)

    async def _forget(self, key: AssignmentKey) -> None:
        await self._pause(0.0005, 0.01)
        self.host.forget(key)

    def process_ended(self, process: Process) -> None:
        """The launcher tells an end; it does so again to every agent process, until it is told to forget."""
        if self._watches:
            self.spawn(self._see_end(process))

    async def _see_end(self, process: Process) -> None:
        await self._pause(0.0005, 0.01)
        self.passes("end-seen")
        assert process.end is not None
        self._inbox.put(process.end)

    # --- the bus ---

    async def _serve(self, core: AgentCore) -> None:
        bus = self.bus = FaultyBus(self._broker, self.instance, self._weather)
        while True:
            try:
                await bus.subscribe(subjects.commands(self.host.name), self._on_command)
                break
            except BusError:
                await asyncio.sleep(1.0)
        self.spawn(self._outbox.run(bus))
        while True:
            beat = Heartbeat(
                node=self.host.name,
                instance=self.instance,
                boot_id=self.host.boot_id,
                applied=core.counters.applied,
                reported=core.counters.reported,
                running=core.running,
                clock_ms=self.host.clock_ms(),
            )
            await self._publish(subjects.heartbeat(self.host.name), encode(beat))
            await asyncio.sleep(self._beat_s)

    def _on_command(self, message: Message) -> None:
        command = decode(_COMMAND, message.data, max_bytes=8 * 1024 * 1024)
        self._requests += 1
        request = self._requests
        self._replies[request] = message.reply
        match command:
            case OrderBatch():
                self._inbox.put(OrdersReceived(request, command))
            case Sync():
                self._inbox.put(SyncReceived(request, command))
            case Renew():
                self._inbox.put(RenewalReceived(request, command))
            case _:
                raise AssertionError(f"no such command is sent here: {command}")

    async def _publish(self, subject: str, data: bytes) -> None:
        assert self.bus is not None
        try:
            await self.bus.publish(subject, data)
        except BusError:
            return  # whoever waits for it asks again; the next heartbeat comes in a second
