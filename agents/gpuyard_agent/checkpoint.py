"""Suspending a job to the host's memory and back: the order of steps, the way back from each, and the memory it takes.

Suspend: lock every process, checkpoint every process, and only then freeze the tree; a frozen process could not be
locked, since a thread of its own does the work. Resume: thaw, restore every process, unlock every process. A process is
only let go when all are ready, so no member of a job meets another that is half gone.

Every failure leaves the job in one of two states. Either it runs as before (`CannotSuspend`, `CannotResume`: still
suspended, to be tried again), or it is lost (`JobBroken`): the driver promises no way back from a failed checkpoint,
so it is to be killed and started anew. The caller goes one rung down: signal and grace, requeue, kill.

Both begin by asking the driver how far each process has come, so that they can be asked again after an agent that died
on the way: what is done is not done twice.

What a job held on its cards lies in the host's memory while it is suspended; `RamLedger` keeps it within what the node
gives for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol, TypeAlias

from gpuyard_protocol.names import AssignmentKey

#: As the driver tells it; `none`: this process has nothing on a card.
ProcessStanding: TypeAlias = Literal["running", "locked", "checkpointed", "failed", "none"]

#: For the calls that a process has under way when it is to be locked.
LOCK_MS = 10_000
#: What a checkpoint or restore may take: reports speak of 3 to 6 GB/s; this is a third of the slowest.
_FIXED_S = 30.0
_MIB_PER_S = 1_000


class CheckpointTrouble(Exception):
    """A call was refused, failed or was not answered in time; the text says which."""


class CannotSuspend(Exception):
    """The job runs on as before."""


class NoHostMemory(CannotSuspend):
    """There is no room for what it holds."""


class CannotResume(Exception):
    """The job is suspended as before."""


class JobBroken(Exception):
    """The job can neither go on nor be suspended: it must be killed."""


class CheckpointBackend(Protocol):
    """The driver's four steps, each for one process. All raise `CheckpointTrouble`; none is undone by failing."""

    async def problem(self) -> str:
        """Why this host cannot suspend anything, in words; "" if it can. Asks the driver, and changes nothing."""
        ...

    async def standing(self, pid: int) -> ProcessStanding: ...

    async def lock(self, pid: int, timeout_ms: int) -> None:
        """Hold back its further CUDA calls. Not in time: it runs on."""
        ...

    async def checkpoint(self, pid: int, deadline_s: float) -> None:
        """Of a locked one: its memory goes to the host, its cards are free of it."""
        ...

    async def restore(self, pid: int, deadline_s: float) -> None:
        """Of a checkpointed one: back to its cards, which must have the room. It stays locked."""
        ...

    async def unlock(self, pid: int) -> None: ...

    async def close(self) -> None: ...


class RamLedger:
    """Host memory given to suspended jobs, MiB."""

    def __init__(self, budget_mib: int) -> None:
        self._budget_mib = budget_mib
        self._held: dict[AssignmentKey, int] = {}

    @property
    def held_mib(self) -> int:
        return sum(self._held.values())

    @property
    def free_mib(self) -> int:
        return self._budget_mib - self.held_mib

    def reserve(self, key: AssignmentKey, mib: int) -> bool:
        """False: there is not so much left, and nothing changes. Again for one key: the new figure holds."""
        held = self._held.get(key, 0)
        if mib > held and mib > self.free_mib + held:
            return False
        self._held[key] = mib
        return True

    def hold(self, key: AssignmentKey, mib: int) -> None:
        """It takes so much already, whatever is left."""
        self._held[key] = mib

    def release(self, key: AssignmentKey) -> None:
        self._held.pop(key, None)


Freeze: TypeAlias = Callable[[AssignmentKey, bool], Awaitable[None]]


class Suspender:
    """Suspends and resumes whole assignments. `freeze` halts (True) or lets go the tree of one."""

    def __init__(self, backend: CheckpointBackend, ram: RamLedger, freeze: Freeze) -> None:
        self._backend = backend
        self._ram = ram
        self._freeze = freeze

    async def suspend(self, key: AssignmentKey, pids: Sequence[int], held_mib: int) -> None:
        """`pids`: those of its processes that have something on a card; `held_mib`: how much. Raises `CannotSuspend`,
        `NoHostMemory`, `JobBroken`."""
        if problem := await self._backend.problem():
            raise CannotSuspend(problem)
        if not pids:
            raise CannotSuspend("none of its processes has anything on a card")
        if not self._ram.reserve(key, held_mib):
            raise NoHostMemory(f"{held_mib} MiB are more than the {self._ram.free_mib} MiB left for suspended jobs")
        deadline_s = _deadline_s(held_mib)
        try:
            for pid in pids:
                match await self._backend.standing(pid):
                    case "running":
                        await self._backend.lock(pid, LOCK_MS)
                    case "failed" | "none" as standing:
                        raise CheckpointTrouble(f"process {pid} is {standing}")
                    case _:
                        pass
            for pid in pids:
                if await self._backend.standing(pid) == "locked":
                    await self._backend.checkpoint(pid, deadline_s)
        except CheckpointTrouble as trouble:
            await self._go_back(key, pids, deadline_s, trouble)
            raise CannotSuspend(str(trouble)) from None
        await self._freeze(key, True)

    async def resume(self, key: AssignmentKey, pids: Sequence[int], held_mib: int) -> None:
        """As `suspend` was asked. Raises `CannotResume` (no room on the card yet), `JobBroken`."""
        await self._freeze(key, False)
        deadline_s = _deadline_s(held_mib)
        try:
            for pid in pids:
                match await self._backend.standing(pid):
                    case "checkpointed":
                        await self._backend.restore(pid, deadline_s)
                    case "failed" | "none" as standing:
                        raise CheckpointTrouble(f"process {pid} is {standing}")
                    case _:
                        pass
        except CheckpointTrouble as trouble:
            await self._suspend_again(key, pids, deadline_s, trouble)
            raise CannotResume(str(trouble)) from None
        await self._unlock(key, pids)
        self._ram.release(key)

    def forget(self, key: AssignmentKey) -> None:
        """It has ended, suspended or not."""
        self._ram.release(key)

    async def _go_back(
        self, key: AssignmentKey, pids: Sequence[int], deadline_s: float, trouble: CheckpointTrouble
    ) -> None:
        """Whatever was done so far is undone, by what the driver says each process is in."""
        try:
            for pid in pids:
                if await self._backend.standing(pid) == "checkpointed":
                    await self._backend.restore(pid, deadline_s)
            for pid in pids:
                match await self._backend.standing(pid):
                    case "locked":
                        await self._backend.unlock(pid)
                    case "failed":
                        raise CheckpointTrouble(f"process {pid} failed in its checkpoint")
                    case _:
                        pass
        except CheckpointTrouble as second:
            self._ram.release(key)
            raise JobBroken(f"{trouble}; and no way back: {second}") from None
        self._ram.release(key)

    async def _suspend_again(
        self,
        key: AssignmentKey,
        pids: Sequence[int],
        deadline_s: float,
        trouble: CheckpointTrouble,
    ) -> None:
        """Those that came back go again, so that all are where they were."""
        try:
            for pid in pids:
                if await self._backend.standing(pid) == "locked":
                    await self._backend.checkpoint(pid, deadline_s)
            for pid in pids:
                if (standing := await self._backend.standing(pid)) != "checkpointed":
                    raise CheckpointTrouble(f"process {pid} is {standing}")
        except CheckpointTrouble as second:
            self._ram.release(key)
            raise JobBroken(f"{trouble}; and no way back: {second}") from None
        await self._freeze(key, True)

    async def _unlock(self, key: AssignmentKey, pids: Sequence[int]) -> None:
        try:
            for pid in pids:
                if await self._backend.standing(pid) == "locked":
                    await self._backend.unlock(pid)
        except CheckpointTrouble as trouble:
            self._ram.release(key)
            raise JobBroken(str(trouble)) from None


def _deadline_s(held_mib: int) -> float:
    return _FIXED_S + held_mib / _MIB_PER_S
