"""Checkpoint and restore of CUDA processes through NVIDIA's own bindings of the driver (`cuda-bindings`, optional).

The driver acts on another process by its pid, and whoever asks it to must have begun CUDA itself. The agent never does:
a process that has begun CUDA keeps the cards open, and so forbids older ones to switch their MIG mode, and it takes
some hundred MiB. So the calls are made by a process of their own, `python -m gpuyard_agent.cuda_checkpoint`, which
`checkpoint_worker` starts when there is something to do. It reads one request a line and answers each with one line.

The package may be missing, the driver too old or absent; `problem` says which, found by asking the driver and not by
its version.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Any, Literal

import msgspec

from gpuyard_agent.checkpoint import CheckpointTrouble, ProcessStanding

#: Bindings that have the calls, by name.
MODULE = "cuda.bindings.driver"
_STANDINGS: tuple[ProcessStanding, ...] = ("running", "locked", "checkpointed", "failed")
#: A process that has nothing on a card.
_NOTHING_THERE = frozenset({1, 500, 801})
#: No process has it: asked about, a driver that knows the question says "no such process".
_NO_PID = 2**22 + 1


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line to the worker."""

    do: Literal["problem", "standing", "lock", "checkpoint", "restore", "unlock"]
    pid: int = 0
    timeout_ms: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line from the worker. `trouble`: the call failed, in words; `said`: a problem, or a standing."""

    trouble: str = ""
    said: str = ""


class CudaCalls:
    """The calls, one after another. All but `problem` raise `CheckpointTrouble`."""

    def __init__(self, driver: Any = None) -> None:
        """`driver`: the bindings, imported if left out."""
        self._driver = driver
        self._problem: str | None = None

    def problem(self) -> str:
        if self._problem is None:
            self._problem = self._find_problem()
        return self._problem

    def standing(self, pid: int) -> ProcessStanding:
        error, state = self._driver.cuCheckpointProcessGetState(pid)
        if int(error) in _NOTHING_THERE:
            return "none"
        self._check(f"state of process {pid}", error)
        return _STANDINGS[int(state)]

    def lock(self, pid: int, timeout_ms: int) -> None:
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = timeout_ms
        self._check(f"lock process {pid}", *self._driver.cuCheckpointProcessLock(pid, arguments))

    def checkpoint(self, pid: int) -> None:
        self._check(f"checkpoint process {pid}", *self._driver.cuCheckpointProcessCheckpoint(pid, None))

    def restore(self, pid: int) -> None:
        self._check(f"restore process {pid}", *self._driver.cuCheckpointProcessRestore(pid, None))

    def unlock(self, pid: int) -> None:
        self._check(f"unlock process {pid}", *self._driver.cuCheckpointProcessUnlock(pid, None))

    def answer(self, request: Request) -> Answer:
        if request.do != "problem" and self.problem():
            return Answer(trouble=self.problem())
        try:
            match request.do:
                case "problem":
                    return Answer(said=self.problem())
                case "standing":
                    return Answer(said=self.standing(request.pid))
                case "lock":
                    self.lock(request.pid, request.timeout_ms)
                case "checkpoint":
                    self.checkpoint(request.pid)
                case "restore":
                    self.restore(request.pid)
                case "unlock":
                    self.unlock(request.pid)
        except CheckpointTrouble as trouble:
            return Answer(trouble=str(trouble))
        return Answer()

    def _check(self, what: str, error: Any) -> None:
        if int(error):
            raise CheckpointTrouble(f"{what}: {getattr(error, 'name', error)}")

    def _find_problem(self) -> str:
        if platform.machine() != "x86_64":
            return f"suspending exists for x86_64 alone, this is {platform.machine()}"
        if self._driver is None:
            try:
                self._driver = importlib.import_module(MODULE)
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


def main() -> None:
    """Until standard input ends: the agent has gone, or needs nothing more."""
    calls, decoder = CudaCalls(), msgspec.json.Decoder(Request)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(calls.answer(decoder.decode(line))) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
