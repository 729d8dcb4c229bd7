"""Nodes that fall silent, return, are given up or taken out.

A lost node's jobs wait for it: they may well run there. Three things end the wait: the node comes back and tells; a
replica's lease has run out, so that it has ended by itself (`lost_facts.lapses_ms`); an operator declares the node
dead. What was given up so is told to stop, and nothing the node says of it is believed but that it is gone; until the
node has said that of each, it takes no work, since its cards may still be held.

Replicas of services do not wait: one that runs twice harms nobody, so another starts elsewhere at once.
"""

from __future__ import annotations

from typing import TypeAlias

from gpuyard_daemon.core.handling import outcomes, services
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Node
from gpuyard_protocol.names import AssignmentKey, NodeId

NodeChange: TypeAlias = (
    i.NodeSuspected | i.NodeLost | i.NodeReturned | i.NodeIncompatible | i.NodeDeclaredDead | i.NodeRemoved
)


def take_node_change(draft: Draft, given: NodeChange) -> None:
    """Something was noticed of a node, or said by an operator."""
    node = draft.cluster.nodes.get(given.node)
    if node is None or node.is_removed:
        return
    match given:
        case i.NodeSuspected():
            if node.state == "ready":
                draft.add(f.NodeChanged(node.id, "suspected", "no heartbeat for some seconds"))
        case i.NodeLost():
            if node.state != "lost":
                draft.add(f.NodeChanged(node.id, "lost", _waits(draft, node)))
                services.heal_from(draft, node.id)
        case i.NodeReturned(instance=instance):
            if instance == node.instance:
                _take_back(draft, node)
        case i.NodeIncompatible(reason=reason, twins=twins):
            if (node.state, node.reason, node.is_twinned) != ("incompatible", reason, twins):
                draft.add(f.NodeChanged(node.id, "incompatible", reason, twins))
        case i.NodeDeclaredDead(by=by):
            if node.state == "lost":
                _declare_dead(draft, node, by)
        case i.NodeRemoved():
            if node.state == "lost" and not draft.cluster.pool.spaces[node.id].assignments:
                draft.add(f.NodeForgotten(node.id))


def _waits(draft: Draft, node: Node) -> str:
    leased = len(draft.cluster.leased.get(node.id, ()))
    elsewhere = f"; {leased} under a lease start elsewhere once it has run out" if leased else ""
    return f"no heartbeat: its jobs wait for it{elsewhere}"


def _take_back(draft: Draft, node: Node) -> None:
    """It speaks again, from the process that joined last."""
    is_released = node.state == "incompatible" and node.is_twinned
    if node.given_up and (is_released or node.state in ("suspected", "lost")):
        draft.add(f.NodeChanged(node.id, "joining", outcomes.still_to_end(node)))
    elif not node.given_up and (is_released or node.state in ("suspected", "lost", "joining")):
        draft.add(f.NodeChanged(node.id, "ready"))


def _declare_dead(draft: Draft, node: Node, by: str) -> None:
    keys = tuple(sorted(draft.cluster.pool.spaces[node.id].assignments))
    draft.add(f.NodeChanged(node.id, "lost", f"declared dead by {by}"))
    give_up(draft, node.id, keys, "DeclaredDead", f"node {node.id} was declared dead by {by}")


def give_up(draft: Draft, node: NodeId, keys: tuple[AssignmentKey, ...], code: str, detail: str) -> None:
    """Take what a lost node had for gone."""
    if not keys:
        return
    draft.add(f.ReplicasGivenUp(node, keys))
    for key in keys:
        outcomes.end_lost(draft, key, code, detail)


def lease_ran_out(draft: Draft, node: NodeId, key: AssignmentKey) -> None:
    """A replica on a lost node has ended by itself, though nobody could tell."""
    give_up(draft, node, (key,), "LeaseExpired", f"node {node} is lost and its lease has run out")


def count_leases_anew(draft: Draft) -> None:
    """A daemon started: how long it was away, a wall clock may have said that cannot be trusted with this."""
    for node in list(draft.cluster.nodes.values()):
        if node.state == "lost" and node.id in draft.cluster.leased:
            draft.add(f.NodeChanged(node.id, "lost", node.reason))
