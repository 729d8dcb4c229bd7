"""Suspending on modelled cards: nothing is moved, since nothing is there, and every step takes as long as it would not.

What is modelled is the order of steps, and who may do which: a step that the driver would refuse is refused. Standings
are kept in memory; after a restart of the agent everything counts as running, and is suspended again by the caller.
"""

from __future__ import annotations

from gpuyard_agent.checkpoint import CheckpointTrouble, ProcessStanding


class SimulatedCheckpoint:
    """A `CheckpointBackend`."""

    def __init__(self) -> None:
        self._standings: dict[int, ProcessStanding] = {}

    async def problem(self) -> str:
        return ""

    async def standing(self, pid: int) -> ProcessStanding:
        return self._standings.get(pid, "running")

    async def lock(self, pid: int, timeout_ms: int) -> None:
        self._move(pid, "running", "locked")

    async def checkpoint(self, pid: int, deadline_s: float) -> None:
        self._move(pid, "locked", "checkpointed")

    async def restore(self, pid: int, deadline_s: float) -> None:
        self._move(pid, "checkpointed", "locked")

    async def unlock(self, pid: int) -> None:
        self._move(pid, "locked", "running")
        del self._standings[pid]

    async def close(self) -> None:
        return None

    def _move(self, pid: int, before: ProcessStanding, after: ProcessStanding) -> None:
        present = self._standings.get(pid, "running")
        if present != before:
            raise CheckpointTrouble(f"process {pid} is {present}, not {before}")
        self._standings[pid] = after
