"""Until when cards keep their MIG mode, for those who wait for one to switch."""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.explaining.survey import Survey
from gpuyard_daemon.core.placing.feasibility import Reason
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_protocol.explaining import StartEstimate
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.queries import NodeReason
from gpuyard_protocol.units import format_ms


def soonest_ms(cluster: Cluster, survey: Survey) -> int:
    """When the first of the cards that a job waits for may switch; 0: it waits for none."""
    names = [
        name for finding in survey.findings if finding.verdict is Reason.SWITCHED_LATELY for name in finding.group.nodes
    ]
    moments = [past.keeps_mode_until_ms for name in names for past in cluster.nodes[name].pasts.values()]
    return min([each for each in moments if each], default=0)


def with_end(reasons: tuple[NodeReason, ...], at_ms: int, now_ms: int) -> tuple[NodeReason, ...]:
    """The reasons, with the moment at which the first card may switch."""
    if not at_ms:
        return reasons
    left = _left(at_ms, now_ms)
    return tuple(
        [
            msgspec.structs.replace(each, reason=Why(each.reason.code, f"{each.reason.text}, the first for {left}"))
            if each.reason.code == Reason.SWITCHED_LATELY
            else each
            for each in reasons
        ]
    )


def estimate(at_ms: int, now_ms: int) -> StartEstimate:
    """Of a job that waits for nothing else."""
    return StartEstimate(basis="limit", text=f"in {_left(at_ms, now_ms)}, when a card may switch its mode", at_ms=at_ms)


def _left(at_ms: int, now_ms: int) -> str:
    return format_ms(max(0, at_ms - now_ms + 999) // 1000 * 1000)
