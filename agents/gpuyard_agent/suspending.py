"""Carries out suspending and resuming: who has what on the card, the driver's steps, the host's memory, the partition.

What comes of it is told as an event. An assignment goes one way at a time, in the order in which it was asked to; asked
again (the launcher was away, and everything is compared anew), it is found where it is. Off the card means off the
books too: the partition is undone like any other, and taken anew to come back, where it may be refused.

The image counts to the job's own memory, so where that is limited, the limit is raised by the image before the
checkpoint and lowered after the restore.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias

import msgspec
import structlog

from gpuyard_agent.checkpoint import (
    CannotResume,
    CannotSuspend,
    CheckpointBackend,
    CheckpointTrouble,
    JobBroken,
    NoHostMemory,
    RamLedger,
    Suspender,
)
from gpuyard_agent.core.actions import ResumeProcess, SuspendProcess
from gpuyard_agent.core.events import (
    Event,
    PartitionFailed,
    ProcessBroken,
    ProcessResumed,
    ProcessSuspended,
    ResumeRefused,
    SuspendRefused,
)
from gpuyard_agent.core.model import Assignment
from gpuyard_agent.core.suspension import NOT_SUSPENDABLE
from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble
from gpuyard_agent.launch.base import LauncherGone
from gpuyard_agent.launch.turn_taking import TurnTakingLauncher
from gpuyard_agent.owners import owners_of
from gpuyard_agent.partitions.base import PartitionMaker
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Partition, TimeSliceShare, devices_of

NO_HOST_MEMORY, DRIVER_REFUSED, UNSUPPORTED = "NoHostMemory", "DriverRefused", "Unsupported"

#: What can come of it.
Way: TypeAlias = ProcessSuspended | SuspendRefused | ProcessResumed | ResumeRefused | ProcessBroken
#: Takes the partition of a suspended assignment anew.
TakePlace = Callable[[ResumeProcess], Awaitable[Event]]

_log = structlog.get_logger("gpuyard_agent.suspending")


class SuspendRules(msgspec.Struct, frozen=True, kw_only=True):
    """What this host can and will do."""

    #: Host memory for all images; 0: nothing is suspended here, and why.
    budget_mib: int = 0
    problem: str = ""


class Suspending:
    """`emit` takes what came of it."""

    def __init__(
        self,
        backend: DeviceBackend,
        partitions: PartitionMaker,
        launcher: TurnTakingLauncher,
        checkpoint: CheckpointBackend,
        rules: SuspendRules,
        *,
        emit: Callable[[Event], None],
    ) -> None:
        self._backend = backend
        self._partitions = partitions
        self._launcher = launcher
        self._checkpoint = checkpoint
        self._rules = rules
        self._emit = emit
        self._ram = RamLedger(rules.budget_mib)
        self._suspender = Suspender(checkpoint, self._ram, self._freeze)
        #: Held by whoever moves the assignment; gone with it.
        self._ways: dict[AssignmentKey, asyncio.Lock] = {}
        #: The newest step that was answered. Who asks for it again has not read the answer yet.
        self._answered: dict[AssignmentKey, int] = {}

    @property
    def held_mib(self) -> int:
        """Host memory that images take now."""
        return self._ram.held_mib

    def restore(self, live: Iterable[Assignment]) -> None:
        """After a restart of the agent: what is suspended takes its memory."""
        for assignment in live:
            if assignment.image_mib:
                self._ram.hold(assignment.key, assignment.image_mib)

    async def suspend(self, action: SuspendProcess) -> None:
        async with self._ways.setdefault(action.key, asyncio.Lock()):
            # One that is suspended is looked at each time: the launcher may have let it go.
            if action.gpu_pids or action.step > self._answered.get(action.key, 0):
                self._answer(action.step, await self._suspend(action))

    async def resume(self, action: ResumeProcess, take_place: TakePlace) -> None:
        async with self._ways.setdefault(action.key, asyncio.Lock()):
            if action.step > self._answered.get(action.key, 0):
                self._answer(action.step, await self._resume(action, take_place))

    def _answer(self, step: int, event: Way) -> None:
        self._answered[event.key] = step
        self._emit(event)

    def forget(self, key: AssignmentKey) -> None:
        """It has ended, suspended or not."""
        self._suspender.forget(key)
        self._ways.pop(key, None)
        self._answered.pop(key, None)

    async def close(self) -> None:
        await self._checkpoint.close()

    # --- down ---

    async def _suspend(self, action: SuspendProcess) -> Way:
        key, began_s = action.key, time.monotonic()
        if not self._rules.budget_mib:
            return SuspendRefused(key, UNSUPPORTED, self._rules.problem or "this node suspends nothing")
        try:
            pids, held_mib = await self._on_card(action)
            if len(pids) != 1:
                detail = f"{len(pids)} of its processes use the card; jobs of one can be suspended"
                return SuspendRefused(key, NOT_SUSPENDABLE, detail)
            await self._launcher.hold_out(key)
            if action.memory_limit_mib:
                await self._launcher.limit_memory(key, action.memory_limit_mib + held_mib)
            await self._suspender.suspend(key, pids, held_mib)
        except JobBroken as broken:
            return ProcessBroken(key, str(broken))
        except (CannotSuspend, CheckpointTrouble, DeviceTrouble, LauncherGone) as refusal:
            await self._run_on(key, action.memory_limit_mib)
            code = NO_HOST_MEMORY if isinstance(refusal, NoHostMemory) else DRIVER_REFUSED
            return SuspendRefused(key, code, str(refusal))
        try:
            await self._partitions.undo(key)
        except DeviceTrouble as error:  # its books stay as they are, so nobody else is let in: it only cannot resume
            return ProcessBroken(key, f"its card would not let go: {error}")
        took_ms = round((time.monotonic() - began_s) * 1000)
        _log.info("suspended", assignment=str(key), mib=held_mib, took_ms=took_ms)
        return ProcessSuspended(key, pids, held_mib, took_ms)

    async def _on_card(self, action: SuspendProcess) -> tuple[tuple[int, ...], int]:
        """Those of its processes that have something on the card, and how much."""
        if action.gpu_pids:
            return action.gpu_pids, action.image_mib
        held: dict[int, int | None] = {}
        for device in devices_of(action.partition):
            held.update({one.pid: one.memory_mib for one in await self._backend.processes(device)})
        mine = sorted(owners_of(held, {action.pid: action.key}))
        if not mine and action.pid and await self._may_be_half_way(action.pid):
            mine = [action.pid]
        most = _most_of(action.partition, await self._memory(action.partition))
        told = [held.get(pid) for pid in mine]
        known = [mib for mib in told if mib is not None]
        return tuple(mine), sum(known) if len(known) == len(told) and known else most

    async def _may_be_half_way(self, pid: int) -> bool:
        """Taken off the card by an agent that did not live to write that down: the driver lists it no more."""
        return await self._checkpoint.standing(pid) in ("locked", "checkpointed")

    async def _memory(self, partition: Partition) -> Mapping[str, int]:
        return {device.uuid: device.memory_mib for device in await self._backend.inventory()}

    # --- up ---

    async def _resume(self, action: ResumeProcess, take_place: TakePlace) -> Way:
        key, began_s = action.key, time.monotonic()
        await self._hold_out(key)
        taken = await take_place(action)
        if isinstance(taken, PartitionFailed):
            return ResumeRefused(key, taken.code, taken.detail)
        try:
            await self._suspender.resume(key, action.gpu_pids, action.image_mib)
        except JobBroken as broken:
            return ProcessBroken(key, str(broken))
        except CannotResume as refusal:
            try:
                await self._partitions.undo(key)
            except DeviceTrouble as error:
                return ProcessBroken(key, f"{refusal}; and its card would not let go: {error}")
            return ResumeRefused(key, DRIVER_REFUSED, str(refusal))
        await self._run_on(key, action.launch.memory_limit_mib)
        self._partitions.running(key, action.pid)
        took_ms = round((time.monotonic() - began_s) * 1000)
        _log.info("resumed", assignment=str(key), mib=action.image_mib, took_ms=took_ms)
        return ProcessResumed(key, took_ms)

    # --- processes ---

    async def _freeze(self, key: AssignmentKey, frozen: bool) -> None:
        """A launcher that is away halts nothing: what is off its card waits in its next call to the driver anyway, and
        is halted when the launcher is back."""
        try:
            await self._launcher.freeze([key], frozen=frozen)
        except LauncherGone as error:
            _log.warning("not halted", assignment=str(key), frozen=frozen, why=str(error))

    async def _hold_out(self, key: AssignmentKey) -> None:
        try:
            await self._launcher.hold_out(key)
        except LauncherGone as error:
            _log.warning("launcher lost", why=str(error))

    async def _run_on(self, key: AssignmentKey, memory_limit_mib: int) -> None:
        """It takes part again, within its own memory."""
        self._launcher.let_in(key)
        if not memory_limit_mib:
            return
        try:
            await self._launcher.limit_memory(key, memory_limit_mib)
        except LauncherGone as error:
            _log.warning("launcher lost", why=str(error))


def _most_of(partition: Partition, memory_mib: Mapping[str, int]) -> int:
    """What it can hold at most, where the driver does not say."""
    if isinstance(partition, TimeSliceShare):
        return partition.memory_mib
    return sum(memory_mib.get(device, 0) for device in devices_of(partition))
