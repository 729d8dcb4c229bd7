"""What becomes of jobs that hold cards and do not use them: a warning, a suggestion to suspend them, the end.

How long for each step is the job's own (`Launch.idle`, from its queue or class), or else the node's; all are off by
default. A job is idle while its processes compute nothing (`IDLE_PCT` at most), where the driver tells load by
process; else while every card it lies on computes nothing, so a share under MPS is idle only while its neighbours are
too. On a MIG instance it is by the instance's load. What does not tell its load (MIG before Hopper) is never idle.
Samples come with telemetry; while none come, the time counts on only up to `GAP_MS`.

Whether an idle job is suspended is not decided here but by the yard, which knows what the job agreed to. Once it is off
its card it is not idle any more: whoever suspended it counts on.

Pure: samples and times come in, verdicts come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec

from gpuyard_agent.core.model import Assignment, Verdict
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import DeviceSample, IdleGpu, JobSample
from gpuyard_protocol.resources import MigInstance, devices_of
from gpuyard_protocol.units import format_ms

IDLE_PCT = 1
#: Time without a sample that counts as idle at most.
GAP_MS = 10_000
IDLE_GPU = "IdleGpu"
_NEVER = IdleGpu()


class IdleStep(NamedTuple):
    key: AssignmentKey
    idle_ms: int
    stage: Literal["warn", "suspend"]
    #: After so long it will be ended; 0: never.
    release_ms: int


class _Idle(msgspec.Struct):
    """One assignment that computed nothing in the last sample."""

    idle_ms: int = 0
    told: set[str] = msgspec.field(default_factory=set)


class IdleWatch:
    """How long each assignment has been idle."""

    def __init__(self, policy: IdleGpu) -> None:
        """`policy`: the node's, for jobs that bring none."""
        self._policy = policy
        self._idle: dict[AssignmentKey, _Idle] = {}
        self._last_ms = 0

    def look(
        self,
        samples: Iterable[DeviceSample],
        live: Mapping[AssignmentKey, Assignment],
        now_ms: int,
        uses: Iterable[JobSample] = (),
        instances: Mapping[AssignmentKey, int | None] = MappingProxyType({}),
    ) -> tuple[list[IdleStep], dict[AssignmentKey, Verdict]]:
        """(what is to be told of whom, once each; those that must end). `now_ms`: the node's clock. `instances`: the
        load of its MIG instance, of each that has one."""
        passed_ms = min(GAP_MS, now_ms - self._last_ms) if self._last_ms else 0
        self._last_ms = now_ms
        load = {sample.uuid: sample.utilization_pct for sample in samples}
        own = {use.key: use.utilization_pct for use in uses if use.processes} | dict(instances)
        idle: dict[AssignmentKey, _Idle] = {}
        steps: list[IdleStep] = []
        verdicts: dict[AssignmentKey, Verdict] = {}
        for key, found in sorted(live.items()):
            policy = found.start.launch.idle or self._policy
            if policy == _NEVER or not _is_idle(found, load, own.get(key)):
                continue
            known = idle[key] = self._idle.get(key) or _Idle()
            if key in self._idle:
                known.idle_ms += passed_ms
            for stage, after_ms in _stages(policy):
                if after_ms and known.idle_ms >= after_ms and stage not in known.told:
                    known.told.add(stage)
                    steps.append(IdleStep(key, known.idle_ms, stage, policy.release_ms))
            if policy.release_ms and known.idle_ms >= policy.release_ms:
                detail = f"it computed nothing on its cards for {format_ms(known.idle_ms)}"
                verdicts[key] = Verdict(outcome="signalled", code=IDLE_GPU, detail=detail)
        self._idle = idle
        return steps, verdicts

    @property
    def idle(self) -> int:
        """Assignments that are idle now."""
        return len(self._idle)


def _stages(policy: IdleGpu) -> tuple[tuple[Literal["warn", "suspend"], int], ...]:
    return ("warn", policy.warn_ms), ("suspend", policy.suspend_ms)


def _is_idle(assignment: Assignment, load: Mapping[str, int | None], own_pct: int | None) -> bool:
    partition = assignment.start.partition
    cards = devices_of(partition)
    if assignment.state != "running" or not cards:
        return False
    if own_pct is not None:
        return own_pct <= IDLE_PCT
    if isinstance(partition, MigInstance):
        return False  # what its card does is not its own
    return all((pct := load.get(card)) is not None and pct <= IDLE_PCT for card in cards)
