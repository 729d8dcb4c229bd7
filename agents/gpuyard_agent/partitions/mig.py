"""MIG instances: created at the place the planner chose, destroyed with their last use.

Always with an explicit placement: the driver's own choice depends on the order of requests and can leave a card on
which the next instance does not fit although the plan says so. An instance's UUID is read when it is made or found and
kept with the assignment; it is never derived and never assumed to be the same after re-creation.

An instance that is there already, at the same place and of the same profile, is taken over: after a restart of the
agent it is the one its process runs in.
"""

from __future__ import annotations

from gpuyard_agent.devices.base import DeviceBackend
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant, PartitionRefused
from gpuyard_agent.partitions.whole import visible
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import MigInstance, Partition


class MigMaker:
    """One instance for one assignment."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        #: The UUID of the instance of each assignment.
        self._made: dict[AssignmentKey, str] = {}

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        if not isinstance(partition, MigInstance):
            raise PartitionRefused(f"assignment {key} asks for no MIG instance")
        present = await self._backend.mig_instances(partition.device)
        found = next(
            (one for one in present if one.start == partition.start and one.profile == partition.profile), None
        )
        if found is None:
            found = await self._backend.create_mig(partition.device, partition.profile, partition.start)
        self._made[key] = found.mig_uuid
        return PartitionGrant(env=visible((found.mig_uuid,)), mode="mig", cards=1, mig_uuid=found.mig_uuid)

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        mig_uuid = self._made.get(key)
        if mig_uuid is not None and isinstance(partition, MigInstance):
            await self._backend.destroy_mig(partition.device, mig_uuid)
            del self._made[key]

    async def sweep(self) -> tuple[str, ...]:
        removed = []
        ours = set(self._made.values())
        for device in await self._backend.inventory():
            if not device.healthy or "mig" not in device.modes:
                continue
            for instance in await self._backend.mig_instances(device.uuid):
                if instance.mig_uuid not in ours:
                    await self._backend.destroy_mig(device.uuid, instance.mig_uuid)
                    removed.append(
                        f"MIG instance {instance.profile} at {instance.start} of card {device.index} ({device.uuid})"
                    )
        return tuple(removed)
