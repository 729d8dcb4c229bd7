"""Turns on a card, as the driver gives them by itself to processes that share one without MPS.

The driver divides time evenly between those that have work: weights (`share_milli`) are kept in the books and not yet
enforced, and memory is counted when placing and not limited. That is what isolation `none` promises, and no more.
"""

from __future__ import annotations

from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_agent.partitions.whole import visible
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Partition, devices_of


class TimeSliceMaker:
    """A place in the turns of one card."""

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        return PartitionGrant(env=visible(devices_of(partition)), mode="timeslice", cards=1)

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        return None

    async def sweep(self) -> tuple[str, ...]:
        return ()
