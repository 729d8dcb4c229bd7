"""Checkpoint and restore of CUDA processes through NVIDIA's own bindings of the driver (`cuda-bindings`, optional).

The driver acts on another process by its pid. All calls go through one thread with deadlines: a restore of a full card
takes many seconds, and one that hangs holds up the next suspension and not the agent. The package may be missing, the
driver too old or absent; `problem` says which, found by asking the driver and not by its version.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from typing import Any, TypeVar

from gpuyard_agent.checkpoint import CheckpointTrouble, ProcessStanding
from gpuyard_agent.devices.base import NoAnswer
from gpuyard_agent.devices.driver_thread import DriverThread

T = TypeVar("T")

_MODULE = "cuda.bindings.driver"
_STANDINGS: tuple[ProcessStanding, ...] = ("running", "locked", "checkpointed", "failed")
#: A process that has nothing on a card.
_NOTHING_THERE = frozenset({1, 500, 801})
_SHORT_S = 15.0
#: No process has it: asked about, a driver that knows the question says "no such process".
_NO_PID = 2**22 + 1


class CudaCheckpoint:
    """A `CheckpointBackend`. `driver`: the bindings, imported if left out."""

    def __init__(self, driver: Any = None) -> None:
        self._driver = driver
        self._problem: str | None = None
        self._thread: DriverThread | None = None

    def problem(self) -> str:
        if self._problem is None:
            self._problem = self._find_problem()
        return self._problem

    def close(self) -> None:
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    async def standing(self, pid: int) -> ProcessStanding:
        def ask() -> ProcessStanding:
            error, state = self._driver.cuCheckpointProcessGetState(pid)
            if int(error) in _NOTHING_THERE:
                return "none"
            self._check(f"state of process {pid}", error)
            return _STANDINGS[int(state)]

        return await self._call(f"state of process {pid}", ask, _SHORT_S)

    async def lock(self, pid: int, timeout_ms: int) -> None:
        def act() -> None:
            arguments = self._driver.CUcheckpointLockArgs()
            arguments.timeoutMs = timeout_ms
            self._check(f"lock process {pid}", *self._driver.cuCheckpointProcessLock(pid, arguments))

        await self._call(f"lock process {pid}", act, timeout_ms / 1000 + _SHORT_S)

    async def checkpoint(self, pid: int, deadline_s: float) -> None:
        await self._step("checkpoint", self._driver.cuCheckpointProcessCheckpoint, pid, deadline_s)

    async def restore(self, pid: int, deadline_s: float) -> None:
        await self._step("restore", self._driver.cuCheckpointProcessRestore, pid, deadline_s)

    async def unlock(self, pid: int) -> None:
        await self._step("unlock", self._driver.cuCheckpointProcessUnlock, pid, _SHORT_S)

    async def _step(self, name: str, function: Callable[..., tuple[Any, ...]], pid: int, deadline_s: float) -> None:
        what = f"{name} process {pid}"
        await self._call(what, lambda: self._check(what, *function(pid, None)), deadline_s)

    async def _call(self, what: str, function: Callable[[], T], deadline_s: float) -> T:
        if problem := self.problem():
            raise CheckpointTrouble(problem)
        if self._thread is None:
            self._thread = DriverThread("checkpoint")
        try:
            return await self._thread.call(what, function, deadline_s)
        except NoAnswer as error:
            raise CheckpointTrouble(str(error)) from None

    def _check(self, what: str, error: Any) -> None:
        if int(error):
            raise CheckpointTrouble(f"{what}: {getattr(error, 'name', error)}")

    def _find_problem(self) -> str:
        if platform.machine() != "x86_64":
            return f"suspending exists for x86_64 alone, this is {platform.machine()}"
        if self._driver is None:
            try:
                self._driver = importlib.import_module(_MODULE)
            except ImportError:
                return "the package cuda-bindings is not installed"
        try:
            # A restore needs a caller that has initialised CUDA, or cards that somebody else keeps awake.
            self._check("cuInit", *self._driver.cuInit(0))
            error, _ = self._driver.cuCheckpointProcessGetState(_NO_PID)
        except (CheckpointTrouble, RuntimeError, AttributeError) as trouble:  # RuntimeError: no libcuda, or too old
            return f"this host's CUDA driver cannot suspend: {trouble}"
        if getattr(error, "name", "") in ("CUDA_ERROR_STUB_LIBRARY", "CUDA_ERROR_NOT_FOUND"):
            return f"this host's CUDA driver cannot suspend: {error.name}"
        return ""
