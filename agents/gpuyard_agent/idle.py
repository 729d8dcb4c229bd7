"""What becomes of jobs that hold cards and do not use them: a warning, and later the end. Both are off by default.

A job is idle while every card it lies on computes nothing (`IDLE_PCT` at most), counted from the last sample that said
otherwise. Shares of a card are judged by the whole card, so a share is idle only while its neighbours are too: the
driver tells the load of a card and not, in every mode, of a process. A card that does not tell its load (MIG before
Hopper) is never idle. Samples come with telemetry; while none come, the time counts on only up to `GAP_MS`.

Pure: samples and times come in, verdicts come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from gpuyard_agent.core.model import Assignment, Verdict
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.resources import MigInstance, devices_of
from gpuyard_protocol.units import format_ms

IDLE_PCT = 1
#: Time without a sample that counts as idle at most.
GAP_MS = 10_000
IDLE_GPU = "IdleGpu"


class IdlePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """0: never."""

    warn_ms: int = 0
    release_ms: int = 0

    @property
    def is_on(self) -> bool:
        return bool(self.warn_ms or self.release_ms)


class IdleWarning(NamedTuple):
    key: AssignmentKey
    idle_ms: int


class _Idle(msgspec.Struct):
    """One assignment whose cards computed nothing in the last sample."""

    idle_ms: int = 0
    warned: bool = False


class IdleWatch:
    """How long each assignment has been idle."""

    def __init__(self, policy: IdlePolicy) -> None:
        self._policy = policy
        self._idle: dict[AssignmentKey, _Idle] = {}
        self._last_ms = 0

    def look(
        self, samples: Iterable[DeviceSample], live: Mapping[AssignmentKey, Assignment], now_ms: int
    ) -> tuple[list[IdleWarning], dict[AssignmentKey, Verdict]]:
        """(those to be warned of, once each; those that must end). `now_ms`: the node's clock."""
        passed_ms = min(GAP_MS, now_ms - self._last_ms) if self._last_ms else 0
        self._last_ms = now_ms
        policy = self._policy
        if not policy.is_on:
            return [], {}
        load = {sample.uuid: sample.utilization_pct for sample in samples}
        idle = {key: self._idle.get(key, _Idle()) for key, found in live.items() if _is_idle(found, load)}
        warnings: list[IdleWarning] = []
        verdicts: dict[AssignmentKey, Verdict] = {}
        for key, known in sorted(idle.items()):
            if key in self._idle:
                known.idle_ms += passed_ms
            if policy.warn_ms and known.idle_ms >= policy.warn_ms and not known.warned:
                known.warned = True
                warnings.append(IdleWarning(key, known.idle_ms))
            if policy.release_ms and known.idle_ms >= policy.release_ms:
                detail = f"its cards computed nothing for {format_ms(known.idle_ms)}"
                verdicts[key] = Verdict(outcome="signalled", code=IDLE_GPU, detail=detail)
        self._idle = idle
        return warnings, verdicts

    @property
    def idle(self) -> int:
        """Assignments that are idle now."""
        return len(self._idle)


def _is_idle(assignment: Assignment, load: Mapping[str, int | None]) -> bool:
    partition = assignment.start.partition
    cards = devices_of(partition)
    if assignment.state != "running" or not cards or isinstance(partition, MigInstance):
        return False
    return all((pct := load.get(card)) is not None and pct <= IDLE_PCT for card in cards)
