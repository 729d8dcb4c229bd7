"""A card as everybody else may use it, of which places are kept for somebody: what is claimed counts as taken.

Works on copies of cards alone; who claims what is known to the node's space.
"""

from __future__ import annotations

from gpuyard_daemon.core.placing.partitions import Card, amounts_on, slices_at
from gpuyard_protocol.names import AssignmentKey, Tenant
from gpuyard_protocol.resources import Device, MigInstance, MpsShare, Partition, mode_of


class Freed:
    """What those who leave a card will have left of it; claims use it up one after the other."""

    __slots__ = ("_counted", "memory_mib", "milli")

    def __init__(self) -> None:
        self._counted: set[AssignmentKey] = set()
        self.milli = self.memory_mib = 0

    def add(self, device: Device, key: AssignmentKey, partition: Partition) -> None:
        if key not in self._counted:
            self._counted.add(key)
            milli, memory_mib = amounts_on(device, partition)
            self.milli += milli
            self.memory_mib += memory_mib

    def use(self, milli: int, memory_mib: int) -> tuple[int, int]:
        """How much more than that a claim takes."""
        more = max(0, milli - self.milli), max(0, memory_mib - self.memory_mib)
        self.milli, self.memory_mib = max(0, self.milli - milli), max(0, self.memory_mib - memory_mib)
        return more


def claim_on(
    twin: Card, card: Card, partition: Partition, tenant: Tenant, leaving: list[AssignmentKey], freed: Freed
) -> None:
    """Make a copy of a card look as to everybody else: what is claimed counts as taken, beyond what leaves for it.

    `freed`: of the card, the same for all claims on it.
    """
    mode = mode_of(partition)
    twin.changed()
    if mode == "whole" or twin.mode not in ("idle", mode) or twin.domain not in ("", tenant):
        # It is to be whole, or cut otherwise than it is now, or somebody else's: nothing new goes there.
        twin.takes_work = False
        return
    for key in leaving:
        if key in card.held:
            freed.add(card.device, key, card.held[key])
    if isinstance(partition, MigInstance):
        # Whoever stands on its slices will have left them by then.
        mask = slices_at(partition.start, partition.size)
        for key, held in card.held.items():
            if isinstance(held, MigInstance) and slices_at(held.start, held.size) & mask:
                freed.add(card.device, key, held)
    milli, memory_mib = freed.use(*amounts_on(card.device, partition))
    twin.milli += milli
    twin.memory_mib += memory_mib
    match partition:
        case MigInstance(start=start, size=size, profile=profile):
            twin.mask |= slices_at(start, size)
            twin.profile_counts[profile] = twin.profile_counts.get(profile, 0) + 1
        case MpsShare(processes=processes):
            twin.clients += processes
    if twin.mode == "idle":
        twin.mode, twin.domain = mode, tenant if mode in ("mps", "timeslice") else ""
