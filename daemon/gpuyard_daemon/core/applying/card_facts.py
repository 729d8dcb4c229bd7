"""What facts about places change in the records of the cards there. Called by handlers of facts, and by nobody else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import CardPast, Node
from gpuyard_daemon.core.state.timers import Timer
from gpuyard_protocol.names import DeviceUuid
from gpuyard_protocol.resources import devices_of

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def drained(cluster: Cluster, placements: Iterable[Placement], now_ms: int) -> None:
    """These cards are kept free until those on them have ended."""
    for placement in placements:
        for uuid in devices_of(placement.partition):
            past_of(cluster.nodes[placement.node], uuid).drained_ms = now_ms


def switched(cluster: Cluster, fact: f.CardSwitched, now_ms: int, effects: Effects) -> None:
    past = past_of(cluster.nodes[fact.node], fact.card)
    past.in_mig, past.keeps_mode_until_ms = fact.in_mig, fact.until_ms
    if fact.until_ms:
        cluster.timers.set_named(fact.until_ms, Timer.SETTLE, fact.node, fact.card)
    cluster.pool.recall(cluster.pool.spaces[fact.node], fact.card)


def settled(cluster: Cluster, fact: f.CardSettled, now_ms: int, effects: Effects) -> None:
    past_of(cluster.nodes[fact.node], fact.card).keeps_mode_until_ms = 0
    cluster.pool.recall(cluster.pool.spaces[fact.node], fact.card)


def past_of(node: Node, uuid: DeviceUuid) -> CardPast:
    """The record of a card, made if there is none."""
    return node.pasts.setdefault(uuid, CardPast())
