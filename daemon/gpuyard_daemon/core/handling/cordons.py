"""What operators do about a node that is to be left alone: cordon it, empty it, let work go there again.

A cordoned node takes nothing new, and what runs there goes on. To empty it at once, jobs that may be preempted are told
to go with grace; they wait again, uncharged. Those that may not are left to end by themselves.
"""

from __future__ import annotations

from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Node
from gpuyard_protocol.jobs import Why

DRAINED = "Drained"


def take_cordon(draft: Draft, given: i.NodeCordonAsked | i.NodeUncordonAsked) -> None:
    node = draft.cluster.nodes.get(given.node)
    if node is None or node.is_removed:
        return
    match given:
        case i.NodeCordonAsked(by=by, reason=reason, requeue=requeue):
            if not node.cordoned_by or (reason and reason != node.cordon_reason):
                draft.add(f.NodeCordoned(node.id, by, reason))
            if requeue:
                _empty(draft, node, f"node {node.id} is drained by {by}" + (f": {reason}" if reason else ""))
        case i.NodeUncordonAsked():
            if node.cordoned_by:
                draft.add(f.NodeUncordoned(node.id))


def _empty(draft: Draft, node: Node, text: str) -> None:
    jobs = draft.cluster.jobs
    there = dict.fromkeys([key.job for key in sorted(draft.cluster.pool.spaces[node.id].assignments)])
    for number in there:
        job = jobs[number]
        if job.verdict is None and job.spec.preemption != "never":
            draft.add(f.JobStopping(number, "requeue", Why(DRAINED, text), "requeued"))
