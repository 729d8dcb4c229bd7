"""Cards that go into MIG mode and out of it: what that costs, and how often a card may.

A card that nobody holds goes into the mode that its next work needs. Into MIG and out of it that takes time: a reset of
the card before Hopper, a moment since; each card says how long. MPS and turns cost no more than the start of a process.
So of cards that fit equally well one is taken that is in the mode already (`scoring`), and one that has switched keeps
its mode for ten times as long as the switch took: at most an eleventh of its time goes into switching, however the
demand alternates. Whoever would have it otherwise waits, with that reason, for the moment at which it may.

Cards that their agent may not switch do not offer the other modes at all. Cards that take no time (modelled ones) are
not kept in any mode.
"""

from __future__ import annotations

from typing import Final

from gpuyard_daemon.core.placing.partitions import sample_of
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.resources import MigInstance, Partition, devices_of

#: A card keeps a mode for so many times what it took to get there.
KEEPS_FACTOR: Final = 10


def note_switches(draft: Draft) -> None:
    """Write down which cards were given to work in another mode in this turn."""
    if not any(sample_of(kind).mig_switch_ms for kind in draft.cluster.pool.card_kinds):
        return
    for fact in list(draft.facts):
        match fact:
            case f.JobPlaced(placements=placements) | f.JobWidened(placements=placements):
                for placement in placements:
                    _note(draft, placement.node, placement.partition)
            case f.JobResuming(job=number):
                for assignment in draft.cluster.jobs[number].assignments:
                    _note(draft, assignment.node, assignment.partition)


def _note(draft: Draft, node: NodeId, partition: Partition) -> None:
    space = draft.cluster.pool.spaces[node]
    in_mig = isinstance(partition, MigInstance)
    for uuid in devices_of(partition):
        card = space.by_uuid.get(uuid)
        if card is not None and card.device.mig_switch_ms and card.in_mig != in_mig:
            until_ms = draft.now_ms + KEEPS_FACTOR * card.device.mig_switch_ms
            draft.add(f.CardSwitched(node, uuid, in_mig, until_ms))
