"""Agents without processes: they keep the protocol of a node and run nothing.

For tests and measurements of the daemon alone. Each takes orders in their numbers, answers as soon as it has them,
and reports a start and an end after `runs_for_s`; whatever goes wrong in the exchange (a gap, a repeated start) is
noted in `faults`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable

from gpuyard_agent.sync_parts import SyncParts
from gpuyard_protocol.bus.base import Bus, BusError, Message
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey, NodeId
from gpuyard_protocol.nodes import (
    Command,
    Ended,
    FollowLog,
    Go,
    Heartbeat,
    Inventory,
    Joined,
    LogChunk,
    Order,
    OrderAnswer,
    OrderBatch,
    Prepared,
    ReadLog,
    Renew,
    Report,
    ReportBatch,
    Start,
    Started,
    Stop,
    Sync,
    SyncPart,
)
from gpuyard_protocol.resources import Device
from gpuyard_protocol.subjects import commands, heartbeat, reports

HEARTBEAT_S = 1.0


def inventory(node: NodeId, gpus: int) -> Inventory:
    devices = tuple(
        Device(
            uuid=f"GPU-{node}-{index}",
            index=index,
            model="NVIDIA H100 80GB HBM3",
            memory_mib=80 * 1024,
            modes=("whole", "mps", "timeslice"),
        )
        for index in range(gpus)
    )
    return Inventory(
        hostname=node,
        address="127.0.0.1",
        cpu_milli=256_000,
        memory_mib=2**20,
        devices=devices,
        simulated=True,
        keeps_leases=True,
    )


class FakeAgent:
    def __init__(self, bus: Bus, node: NodeId, *, gpus: int = 8, runs_for_s: float = 0.0) -> None:
        self._bus = bus
        self.node = node
        self._gpus = gpus
        #: Seconds from a start to its end; negative: it never ends by itself.
        self.runs_for_s = runs_for_s
        self.instance = secrets.token_hex(4)
        #: Up to which order the "ledger" is.
        self.applied = 0
        self._next_report = 1
        self._reports: list[Report] = []
        self._sending: asyncio.Task[None] | None = None
        #: Keys ever started, and those that have not ended.
        self.started: set[AssignmentKey] = set()
        self.live: set[AssignmentKey] = set()
        self.ended: set[AssignmentKey] = set()
        #: Set by each start.
        self.news = asyncio.Event()
        self.syncs = 0
        self._parts = SyncParts()
        #: Node clocks that came back in renewals of leases.
        self.renewals: list[int] = []
        #: The highest leader's epoch obeyed, and how many commands of earlier leaders came after it.
        self.epoch = 0
        self.stale = 0
        #: Called with each order to start something new.
        self.on_start: Callable[[Start], None] | None = None
        self.faults: list[str] = []
        #: Set to leave commands unanswered.
        self.is_mute = False
        self._beating: asyncio.Task[None] | None = None

    async def join(self) -> None:
        subscription = await self._bus.subscribe(commands(self.node), self._on_command)
        self._unsubscribe = subscription.unsubscribe
        self.report(Joined(inventory=inventory(self.node, self._gpus), held=tuple(sorted(self.live))))
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def leave(self) -> None:
        """Fall silent, as a killed agent would."""
        if self._beating is not None:
            self._beating.cancel()
        await self._unsubscribe()

    async def restart(self) -> None:
        """The agent's process dies and comes back; its jobs and its ledger stay."""
        await self.leave()
        self.instance = secrets.token_hex(4)
        await self.join()

    # -- reports -------------------------------------------------------------------------------------------------

    def report(self, *new: Report) -> None:
        self._reports.extend(new)
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send_reports())

    async def _send_reports(self) -> None:
        """As an outbox does: in order, the same batch again until it is stored."""
        while self._reports:
            batch = tuple(self._reports)
            message = ReportBatch(
                node=self.node, instance=self.instance, boot_id="boot", first=self._next_report, reports=batch
            )
            try:
                await self._bus.stream_publish(reports(self.node), encode(message))
            except BusError:
                await asyncio.sleep(0.05)
                continue
            self._next_report += len(batch)
            del self._reports[: len(batch)]
        self._sending = None

    async def _beat(self) -> None:
        while True:
            beat = Heartbeat(
                node=self.node,
                instance=self.instance,
                boot_id="boot",
                applied=self.applied,
                reported=self._next_report - 1,
                running=len(self.live),
                clock_ms=time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000,
            )
            if self._bus.is_connected:
                await self._bus.publish(heartbeat(self.node), encode(beat))
            await asyncio.sleep(HEARTBEAT_S)

    # -- orders --------------------------------------------------------------------------------------------------

    def _on_command(self, message: Message) -> None:
        if self.is_mute:
            return
        command: Command = decode(Command, message.data, max_bytes=8 * 1024 * 1024)
        if isinstance(command, OrderBatch | Sync):
            if command.epoch < self.epoch:
                self.stale += 1
                self._publish(message.reply, encode(OrderAnswer(status="stale", applied=self.applied)))
                return
            self.epoch = command.epoch
        match command:
            case OrderBatch():
                answer = self._take_batch(command)
            case Sync():
                answer = self._take_sync(command)
            case SyncPart():
                whole = self._parts.take(command)
                answer = self._take_sync(whole) if whole is not None else OrderAnswer(status="ok")
            case Renew(clock_ms=clock_ms):
                self.renewals.append(clock_ms)
                answer = OrderAnswer(status="ok", applied=self.applied)
            case ReadLog(job=job, replica=replica) | FollowLog(job=job, replica=replica):
                chunk = LogChunk(job=job, attempt=1, replica=replica, data=b"output\n", size=7, ended=True)
                self._publish(message.reply, encode(chunk))
                return
        self._publish(message.reply, encode(answer))

    def _publish(self, subject: str, data: bytes) -> None:
        asyncio.get_running_loop().create_task(self._bus.publish(subject, data))

    def _take_batch(self, batch: OrderBatch) -> OrderAnswer:
        if batch.instance != self.instance:
            return OrderAnswer(status="wrong-instance", applied=self.applied)
        if batch.first > self.applied + 1:
            self.faults.append(f"gap: {batch.first} after {self.applied}")
            return OrderAnswer(status="gap", applied=self.applied)
        self._obey(batch.orders[self.applied + 1 - batch.first :])
        self.applied = max(self.applied, batch.first + len(batch.orders) - 1)
        return OrderAnswer(status="ok", applied=self.applied)

    def _take_sync(self, sync: Sync) -> OrderAnswer:
        if sync.instance != self.instance:
            return OrderAnswer(status="wrong-instance", applied=self.applied)
        self.syncs += 1
        self.applied = sync.n
        wanted = {desired.start.key for desired in sync.desired}
        self._end(self.live - wanted, "stopped")
        for desired in sync.desired:
            if desired.start.key not in self.started:
                self._obey((desired.start,))
            if desired.go is not None:
                self._obey((desired.go,))
            if desired.stop is not None:
                self._obey((desired.stop,))
        return OrderAnswer(status="ok", applied=self.applied)

    def _obey(self, orders: Iterable[Order]) -> None:
        for order in orders:
            match order:
                case Start(key=key, hold=hold) as start:
                    if key in self.started:
                        self.faults.append(f"started twice: {key}")
                        continue
                    self.started.add(key)
                    self.live.add(key)
                    self.news.set()
                    if self.on_start is not None:
                        self.on_start(start)
                    if hold:
                        self.report(Prepared(key=key, port=29500))
                    else:
                        self._run(key)
                case Go(key=key):
                    self._run(key)
                case Stop(key=key):
                    self.started.add(key)
                    self._end({key}, "stopped")

    def _run(self, key: AssignmentKey) -> None:
        self.report(Started(key=key, at_ms=0))
        if self.runs_for_s == 0:
            self._end({key}, "exited")
        elif self.runs_for_s > 0:
            asyncio.get_running_loop().call_later(self.runs_for_s, lambda: self._end({key}, "exited"))

    def end(self, key: AssignmentKey) -> None:
        """A replica exits by itself."""
        self._end({key}, "exited")

    def _end(self, keys: Iterable[AssignmentKey], outcome: str) -> None:
        for key in sorted(keys):
            if key in self.ended:
                continue
            self.live.discard(key)
            self.ended.add(key)
            self.report(Ended(key=key, outcome="exited" if outcome == "exited" else "stopped", at_ms=0))
