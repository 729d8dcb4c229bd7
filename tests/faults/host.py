"""A GPU host as it is: what outlives its agent, and what a reboot takes away.

The launcher starts a key once until it is told to forget it, serves one agent process at a time, and keeps every exit
until it is forgotten; it ends what has outlived its lease, whether an agent runs or not. Partitions stay made until
they are undone; a suspended process is halted, has none, and takes memory of the host instead. The ledger holds what
was committed. A reboot ends processes, partitions and the launcher's memory; the ledger stays.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from faults.witness import SafetyViolated, Witness
from gpuyard_agent.core.actions import Turn
from gpuyard_agent.core.book import Counters
from gpuyard_agent.core.events import ProcessExited, ProcessFound
from gpuyard_agent.core.model import Assignment, Closed
from gpuyard_agent.launch.leases import LOOK_S, Lease, Leases
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Inventory, Launch
from gpuyard_protocol.resources import Partition

if TYPE_CHECKING:
    from faults.node import AgentProcess

WALL_START_MS = 1_700_000_000_000
#: Far more than any clock drifts that anybody has not thrown away: a hundredth part is 14 minutes a day.
DRIFT_MAX = 0.03


@dataclass(slots=True)
class Process:
    """`argv` of a simulated program: its name, seconds it runs, exit code, and "stubborn" if SIGTERM does nothing."""

    key: AssignmentKey
    launch: Launch
    pid: int
    started_ms: int
    end: ProcessExited | None = None
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    #: Seconds that it still has to run when it does not; below 0: it never ends by itself.
    left_s: float = -1.0
    exit_code: int = 0
    began_at: float = 0.0
    program: asyncio.TimerHandle | None = None
    #: Memory of the host that its work takes while it is off its card; 0: it is on it.
    image_mib: int = 0


@dataclass(slots=True)
class LedgerWrite:
    """One transaction, encoded when it was decided: the core goes on changing while it is written."""

    saved: list[tuple[AssignmentKey, bytes]]
    closed: list[tuple[AssignmentKey, int]]
    pruned: list[AssignmentKey]
    reports: list[tuple[int, bytes]]
    counters: bytes


class LedgerFile:
    """What is on the disk."""

    def __init__(self) -> None:
        self.rows: dict[AssignmentKey, bytes] = {}
        self.ended: dict[AssignmentKey, int] = {}
        self.outbox: dict[int, bytes] = {}
        self.counters = encode(Counters())

    def commit(self, write: LedgerWrite) -> None:
        self.rows.update(write.saved)
        for key, number in write.closed:
            self.rows.pop(key, None)
            self.ended[key] = number
        for key in write.pruned:
            self.ended.pop(key, None)
        self.outbox.update(write.reports)
        self.counters = write.counters
        delivered = decode(Counters, write.counters).delivered
        for number in [number for number in self.outbox if number <= delivered]:
            del self.outbox[number]

    def load(self, now_ms: int) -> tuple[Counters, list[Assignment], dict[AssignmentKey, Closed]]:
        counters = decode(Counters, self.counters)
        counters.delivered = min(self.outbox) - 1 if self.outbox else counters.reported
        live = [decode(Assignment, row, max_bytes=2**20) for _, row in sorted(self.rows.items())]
        closed = {
            key: Closed(report=number, delivered_ms=now_ms if number <= counters.delivered else None)
            for key, number in sorted(self.ended.items(), key=lambda entry: entry[1])
        }
        return counters, live, closed


def ledger_write(
    turn: Turn, reports: list[tuple[int, bytes]], counters: Counters, pruned: list[AssignmentKey]
) -> LedgerWrite:
    saved = [(key, encode(assignment)) for key, assignment in turn.saved.items()]
    return LedgerWrite(saved, list(turn.closed.items()), pruned, reports, encode(counters))


class Host:
    def __init__(self, inventory: Inventory, witness: Witness, rng: random.Random) -> None:
        self.name = inventory.hostname.removeprefix("host-")
        self.inventory = inventory
        self.ledger = LedgerFile()
        self.boot = 1
        #: The launcher's memory.
        self.processes: dict[AssignmentKey, Process] = {}
        #: The partitions that exist.
        self.made: dict[AssignmentKey, Partition] = {}
        #: The agent process that the launcher serves.
        self.owner: AgentProcess | None = None
        #: How far the wall clock is off.
        self.wall_error_ms = 0
        #: How much faster than time itself its clocks go.
        self.drift = rng.uniform(-DRIFT_MAX, DRIFT_MAX)
        self._witness = witness
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._booted_at = -100.0
        self._pids = 0
        self.leases = Leases()
        self._looks_at_leases = False

    @property
    def boot_id(self) -> str:
        return f"{self.name}-boot-{self.boot}"

    def clock_ms(self) -> int:
        """Since the boot."""
        return int((self._loop.time() - self._booted_at) * 1000 * (1 + self.drift))

    def wall_ms(self) -> int:
        return max(1, WALL_START_MS + int(self._loop.time() * 1000) + self.wall_error_ms)

    @property
    def running(self) -> list[Process]:
        return [process for process in self.processes.values() if process.end is None]

    # --- partitions ---

    def make(self, key: AssignmentKey, partition: Partition) -> None:
        if key not in self.made:
            self.made[key] = partition
            self._witness.partition_made(self.name, key, self.inventory.devices, self.made.values())

    def undo(self, key: AssignmentKey) -> None:
        if (process := self.processes.get(key)) is not None and process.end is None:
            raise SafetyViolated(f"{self.name}: the partition of {key} is undone under its running process")
        self.made.pop(key, None)

    # --- the launcher ---

    def list_processes(self) -> tuple[ProcessFound, ...]:
        return tuple(
            ProcessFound(process.key, process.pid, process.started_ms, process.end is not None)
            for _, process in sorted(self.processes.items())
        )

    def launch(self, key: AssignmentKey, launch: Launch, renewed_ms: int) -> Process:
        """Started now, or at an earlier call."""
        self.leases.renew(renewed_ms)
        known = self.processes.get(key)
        if known is not None:
            return known
        if key not in self.made:
            raise SafetyViolated(f"{self.name}: {key} starts without its partition")
        self._witness.process_starts(self.name, key, launch)
        self._pids += 1
        process = Process(key, launch, self._pids, self.wall_ms())
        self.processes[key] = process
        self.leases.hold(key, Lease(launch.lease_ms, launch.stop_grace_ms))
        if self.leases.waits and not self._looks_at_leases:
            self._looks_at_leases = True
            self._loop.call_later(LOOK_S, self._look_at_leases)
        process.left_s, process.exit_code = float(launch.argv[1]), int(launch.argv[2])
        self._go_on(process)
        return process

    def _go_on(self, process: Process) -> None:
        if process.left_s >= 0:
            process.began_at = self._loop.time()
            process.program = self._loop.call_later(process.left_s, self._end, process, process.exit_code, 0)

    def suspend(self, key: AssignmentKey, image_mib: int) -> Process | None:
        """Off its card and halted; None if it does not run. Again for one that is suspended: as it is."""
        process = self.processes.get(key)
        if process is None or process.end is not None:
            return None
        if not process.image_mib:
            if process.program is not None:
                process.program.cancel()
                process.left_s = max(0.0, process.left_s - (self._loop.time() - process.began_at))
            process.image_mib = image_mib
        self.made.pop(key, None)
        held = sum(each.image_mib for each in self.running)
        if held > self.inventory.suspend_mib:
            whose = ", ".join(f"{each.key} {each.image_mib}" for each in self.running if each.image_mib)
            raise SafetyViolated(f"{self.name}: images take {held} MiB of {self.inventory.suspend_mib}: {whose}")
        return process

    def resume(self, key: AssignmentKey, partition: Partition) -> bool:
        process = self.processes.get(key)
        if process is None or process.end is not None:
            return False
        self.make(key, partition)
        if process.image_mib:
            process.image_mib = 0
            self._go_on(process)
        return True

    def stop(self, key: AssignmentKey, grace_ms: int) -> None:
        process = self.processes.get(key)
        if process is None or process.end is not None:
            return
        # What is halted cannot see a signal but the last.
        if "stubborn" not in process.launch.argv and not process.image_mib:
            process.timers.append(self._loop.call_later(self._rng.uniform(0.0, 0.5), self._end, process, 0, 15))
        process.timers.append(self._loop.call_later(grace_ms / 1000, self._end, process, 0, 9))

    def forget(self, key: AssignmentKey) -> None:
        process = self.processes.get(key)
        if process is not None and process.end is not None:
            del self.processes[key]
            self.leases.drop(key)

    def _look_at_leases(self) -> None:
        for key, grace_ms in self.leases.run_out(self.clock_ms()):
            self.stop(key, grace_ms)
        self._looks_at_leases = self.leases.waits
        if self._looks_at_leases:
            self._loop.call_later(LOOK_S, self._look_at_leases)

    def _end(self, process: Process, exit_code: int, signal: int) -> None:
        if process.end is not None:
            return
        self._cancel(process)
        self._witness.process_ends(process.key, exit_code, signal)
        process.end = ProcessExited(
            process.key,
            exit_code=exit_code,
            signal=signal,
            at_ms=self.wall_ms(),
            started_ms=process.started_ms,
            expired=self.leases.is_over(process.key),
        )
        if self.owner is not None:
            self.owner.process_ended(process)

    def _cancel(self, process: Process) -> None:
        if process.program is not None:
            process.program.cancel()
        for timer in process.timers:
            timer.cancel()

    # --- the machine ---

    def reboot(self) -> None:
        """The power goes and comes back. Whoever ran here is gone."""
        if self.owner is not None:
            self.owner.kill()
        for process in self.running:
            self._cancel(process)
            self._witness.process_ends(process.key, 0, 9, vanished=True)
        self.processes.clear()
        self.made.clear()
        self.leases = Leases()
        self.boot += 1
        self._booted_at = self._loop.time()
