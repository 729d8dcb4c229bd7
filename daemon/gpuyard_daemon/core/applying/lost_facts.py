"""What facts about lost nodes change in the state: leases that run out, what is given up, nodes that are taken out.

Called by `Cluster.apply_fact`, by `node_facts`, and by the restore of a snapshot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Assignment, GivenUp, Node
from gpuyard_daemon.core.state.timers import Timer
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Desired, Inventory, Launch, Start, Stop

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

#: The word the agent is told with such a stop.
GIVEN_UP = "given-up"


def lease_on(node: Node, spec: JobSpec) -> int:
    """The lease that a replica of such a job has on this node; 0: it runs until it is told to stop."""
    keeps = node.inventory is not None and node.inventory.keeps_leases
    return spec.lease_ms if keeps and spec.on_node_lost == "restart" else 0


def lapses_ms(node: Node, assignment: Assignment, spec: JobSpec) -> int:
    """When a replica on a lost node has surely ended: its lease, its grace, and a tenth for clocks that drift.

    Counted from the record that said `lost`: no lease is renewed after it, and one that was granted before it counts
    from a heartbeat that was heard before it.
    """
    return node.lost_ms + (assignment.lease_ms + spec.stop_grace_ms) * 11 // 10


def await_leases(cluster: Cluster, node: Node) -> None:
    """The node is lost: each replica under a lease there ends by itself."""
    for key in cluster.leased.get(node.id, {}):
        job = cluster.jobs[key.job]
        at_ms = lapses_ms(node, job.assignments[key.replica], job.spec)
        cluster.timers.set_named(at_ms, Timer.LEASE, node.id, str(key))


def note_lease(cluster: Cluster, assignment: Assignment) -> None:
    """A replica was placed, or found in a snapshot."""
    if assignment.lease_ms:
        cluster.leased.setdefault(assignment.node, {})[assignment.key] = assignment.lease_ms


def drop_lease(cluster: Cluster, assignment: Assignment) -> None:
    if assignment.lease_ms:
        del cluster.leased[assignment.node][assignment.key]
        if not cluster.leased[assignment.node]:
            del cluster.leased[assignment.node]


def given_up(cluster: Cluster, fact: f.ReplicasGivenUp, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    for key in fact.keys:
        job = cluster.job(key.job)
        partition = job.assignments[key.replica].partition
        node.given_up.append(GivenUp(key, partition, job.tenant, job.user, job.spec.stop_grace_ms))
        effects.order(node, Stop(key=key, grace_ms=job.spec.stop_grace_ms, reason=GIVEN_UP))


def gone(cluster: Cluster, fact: f.GivenUpGone, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.given_up = [entry for entry in node.given_up if entry.key != fact.key]


def forgotten(cluster: Cluster, fact: f.NodeForgotten, now_ms: int, effects: Effects) -> None:
    node = cluster.nodes[fact.node]
    node.is_removed = True
    node.absent = []
    node.inventory = Inventory(hostname=node.id, address="", cpu_milli=0, memory_mib=0)
    cluster.refit(cluster.pool.spaces[node.id])


def wanted_gone(node: Node) -> list[Desired]:
    """What the node must still end, as part of its desired set."""
    return [
        Desired(
            start=Start(key=entry.key, partition=entry.partition, launch=Launch(tenant=entry.tenant, user=entry.user)),
            stop=Stop(key=entry.key, grace_ms=entry.grace_ms, reason=GIVEN_UP),
        )
        for entry in node.given_up
    ]


def is_given_up(node: Node, key: AssignmentKey) -> bool:
    return any(entry.key == key for entry in node.given_up)
