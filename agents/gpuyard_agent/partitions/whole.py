"""Whole cards, and replicas without any: nothing to make, only to name.

Cards are named by UUID: the order of indexes changes over reboots, and differs between the driver's tools and CUDA
unless CUDA is told to count by PCI address too.
"""

from __future__ import annotations

from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Partition, devices_of


def visible(names: tuple[str, ...]) -> dict[str, str]:
    """The environment in which CUDA sees these cards or instances and no others."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(names), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class NothingMaker:
    """A replica that runs on CPUs: it sees no card."""

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        return PartitionGrant(env=visible(()), mode="none")

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        return None

    async def sweep(self) -> tuple[str, ...]:
        return ()


class WholeMaker:
    """One or more cards that nobody else uses."""

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        devices = devices_of(partition)
        return PartitionGrant(env=visible(devices), mode="whole", cards=len(devices))

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        return None

    async def sweep(self) -> tuple[str, ...]:
        return ()
