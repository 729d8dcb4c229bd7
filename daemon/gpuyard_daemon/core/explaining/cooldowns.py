"""What is in a job's way until a known moment: cards that keep their mode, nodes that are left alone for a while.

A card that may switch then can be counted on. A node that could not set something up may refuse it again, so there is
no estimate in that.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gpuyard_daemon.core.explaining.survey import Survey
from gpuyard_daemon.core.placing.capacity import ANY_MODE
from gpuyard_daemon.core.placing.feasibility import Reason, Shape
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import CONTAINERS, Node, account_of
from gpuyard_protocol.explaining import StartEstimate
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.queries import NodeReason
from gpuyard_protocol.units import format_ms

#: Of each reason that passes by itself: when the first node that gives it stops giving it.
Ends: TypeAlias = dict[Reason, int]

_AVOIDED = (Reason.ENGINE_AVOIDED, Reason.ACCOUNT_AVOIDED, Reason.MODE_AVOIDED)


def ends_of(cluster: Cluster, survey: Survey) -> Ends:
    found: Ends = {}
    for finding in survey.findings:
        reason = finding.verdict
        if reason is Reason.SWITCHED_LATELY or (isinstance(reason, Reason) and reason in _AVOIDED):
            for name in finding.group.nodes:
                for at_ms in _moments(cluster.nodes[name], reason, survey.shape):
                    found[reason] = min(at_ms, found.get(reason, at_ms))
    return found


def _moments(node: Node, reason: Reason, shape: Shape) -> list[int]:
    match reason:
        case Reason.SWITCHED_LATELY:
            return [past.keeps_mode_until_ms for past in node.pasts.values() if past.keeps_mode_until_ms]
        case Reason.ENGINE_AVOIDED:
            names: tuple[str, ...] = (CONTAINERS,)
        case Reason.ACCOUNT_AVOIDED:
            names = (account_of(shape.need, shape.tenant, shape.user),)
        case _:
            names = ANY_MODE
    return [node.avoided[name].until_ms for name in names if name in node.avoided and node.avoided[name].until_ms]


def with_ends(reasons: tuple[NodeReason, ...], ends: Ends, now_ms: int) -> tuple[NodeReason, ...]:
    """The reasons, each with the moment at which the first of its nodes, or of their cards, is past it."""
    return tuple([_with_end(each, ends.get(Reason(each.reason.code), 0), now_ms) for each in reasons])


def _with_end(said: NodeReason, at_ms: int, now_ms: int) -> NodeReason:
    if not at_ms:
        return said
    until = "the first for" if said.reason.code == Reason.SWITCHED_LATELY else "and is tried again in"
    text = f"{said.reason.text}, {until} {_left(at_ms, now_ms)}"
    return msgspec.structs.replace(said, reason=Why(said.reason.code, text))


def estimate_of_switch(at_ms: int, now_ms: int) -> StartEstimate:
    """Of a job that waits for nothing but a card that may switch its mode."""
    return StartEstimate(basis="limit", text=f"in {_left(at_ms, now_ms)}, when a card may switch its mode", at_ms=at_ms)


def _left(at_ms: int, now_ms: int) -> str:
    return format_ms(max(0, at_ms - now_ms + 999) // 1000 * 1000)
