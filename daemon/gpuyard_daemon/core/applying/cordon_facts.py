"""What facts about cordoned nodes change in the state. Called by `Cluster.apply_fact`, and by nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster


def cordoned(cluster: Cluster, fact: f.NodeCordoned, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.cordoned_by, node.cordon_reason = fact.by, fact.reason
    cluster.pool.touch(cluster.pool.spaces[node.id])


def uncordoned(cluster: Cluster, fact: f.NodeUncordoned, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.cordoned_by = node.cordon_reason = ""
    cluster.pool.touch(cluster.pool.spaces[node.id])
