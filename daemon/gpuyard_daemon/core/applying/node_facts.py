"""What facts about nodes change in the state.

Called by `Cluster.apply_fact`, and by nobody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.applying import lost_facts
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Avoidance, Node
from gpuyard_daemon.core.state.timers import Timer

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

#: Agent processes remembered per node: enough that a late report of an earlier one is recognised.
_FORMER_INSTANCES_MAX = 8


def reports(cluster: Cluster, fact: f.ReportsTaken, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes.get(fact.node)
    if node is None:
        node = cluster.nodes[fact.node] = Node(fact.node, len(cluster.nodes) + 1)
        cluster.pool.add(node)
    node.reports_seen = fact.last
    node.reports_missing += fact.missing


def new_ledger(cluster: Cluster, fact: f.LedgerReplaced, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.reports_seen = 0
    # It knows nothing of what it had.
    node.given_up = []


def joined(cluster: Cluster, fact: f.NodeJoined, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    if node.instance and node.instance != fact.instance:
        node.former_instances.append(node.instance)
        del node.former_instances[:-_FORMER_INSTANCES_MAX]
    node.instance, node.boot_id = fact.instance, fact.boot_id
    node.ledger = fact.ledger or node.ledger
    node.state, node.reason = "ready", ""
    node.is_twinned = node.is_removed = False
    node.lost_ms = 0
    space = cluster.pool.spaces[node.id]
    if fact.inventory != node.inventory:
        listed = {device.uuid for device in fact.inventory.devices}
        node.absent = [card.device for card in space.cards if card.held and card.device.uuid not in listed]
        node.inventory = fact.inventory
        cluster.refit(space)
    else:
        cluster.pool.touch(space)


def node_changed(cluster: Cluster, fact: f.NodeChanged, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.state, node.reason, node.is_twinned = fact.state, fact.reason, fact.twins
    node.lost_ms = now_ms if fact.state == "lost" else 0
    if fact.state == "lost":
        lost_facts.await_leases(cluster, node)
    cluster.pool.touch(cluster.pool.spaces[node.id])


def avoided(cluster: Cluster, fact: f.NodeAvoided, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.avoided[fact.mode] = Avoidance(fact.until_ms, fact.times)
    cluster.timers.set_named(fact.until_ms, Timer.FORGIVE, node.id, fact.mode)
    cluster.restore_modes(node)


def forgiven(cluster: Cluster, fact: f.NodeForgiven, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.avoided[fact.mode].until_ms = 0
    cluster.restore_modes(node)


def forget_avoidance(cluster: Cluster, node: Node, *names: str) -> None:
    """The node did set up these."""
    if [name for name in names if node.avoided.pop(name, None) is not None]:
        cluster.restore_modes(node)
