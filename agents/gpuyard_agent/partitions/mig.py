"""MIG instances: created at the place the planner chose, destroyed with their last use.

Always with an explicit placement: the driver's own choice depends on the order of requests and can leave a card on
which the next instance does not fit although the plan says so. An instance's UUID is read when it is made or found and
kept with the assignment; it is never derived and never assumed to be the same after re-creation.

Three kinds of instances are told apart. Held: an assignment's, also one found after a restart of the agent, in which
its process runs. Left over: this agent's by its records, but nobody holds it (its making or destroying was cut short);
`sweep` removes those, half ones too. Foreign: everything else. Those are never touched; `offered` takes the places they
cover out of what the card offers, so that no planner counts on them.

A job with several CUDA processes may ask for MPS inside its instance: it gets a control daemon that sees the instance
alone, which comes after the instance and goes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from gpuyard_agent.devices.base import DeviceBackend, DeviceTrouble, MigInstanceFound
from gpuyard_agent.launch.base import Account
from gpuyard_agent.partitions.base import PartitionGrant, PartitionRefused
from gpuyard_agent.partitions.mig_records import MigRecord, MigRecords
from gpuyard_agent.partitions.mps import MpsMaker
from gpuyard_agent.partitions.whole import visible
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import Device, MigInstance, MigProfileFacts, Partition

#: In a profile's name: the instance has the card's one set of media engines.
_MEDIA = "+me"


class MigMaker:
    """One instance for one assignment."""

    def __init__(self, backend: DeviceBackend, records: Path, mps: MpsMaker) -> None:
        """`records`: a file of this maker alone. `mps`: serves instances whose job asked for it."""
        self._backend = backend
        self._mps = mps
        self._records = MigRecords(records)
        #: Place and UUID of the instance of each assignment; "" while it is being made.
        self._made: dict[AssignmentKey, tuple[DeviceUuid, int, str]] = {}
        #: Instances of others, by card, when they were last looked for.
        self._foreign: dict[DeviceUuid, tuple[MigInstanceFound, ...]] = {}
        #: What was left over from an earlier agent is gone, so everything unheld by now is nobody's.
        self._is_swept = False

    # --- what a card offers ---

    async def look(self, devices: Iterable[Device]) -> None:
        """Find the instances of others, and remove what was left over since the first `sweep`."""
        for device in devices:
            if not device.healthy or "mig" not in device.modes:
                continue
            try:
                present = await self._backend.mig_instances(device.uuid)
                if self._is_swept:
                    await self._remove_unheld(device, present)
            except DeviceTrouble:
                continue  # what is known of it stays, until it answers
            self._foreign[device.uuid] = tuple(one for one in present if not self._records.owns(one))

    def offered(self, device: Device) -> Device:
        """The card without the places that instances of others cover. While there are any, it is for MIG alone."""
        foreign = self._foreign.get(device.uuid, ())
        if not foreign:
            return device
        has_media = any(_MEDIA in one.profile for one in foreign)
        cut = [_cut(facts, foreign) for facts in device.mig_profiles if not (has_media and _MEDIA in facts.name)]
        return msgspec.structs.replace(
            device,
            modes=tuple(mode for mode in device.modes if mode == "mig"),
            mig_profiles=tuple(facts for facts in cut if facts.starts and facts.count_max > 0),
            mig_taken=self.taken(device.uuid),
            note=self.note(device.uuid),
        )

    def note(self, device: DeviceUuid) -> str:
        """What others have on the card, in words; "" for nothing."""
        foreign = self._foreign.get(device, ())
        words = ", ".join(f"{one.profile} at {one.start}" for one in foreign)
        return f"MIG instances that were not made here and are left alone: {words}" if words else ""

    def taken(self, device: DeviceUuid) -> tuple[tuple[int, int], ...]:
        """(start, size) of the slices that others hold."""
        return tuple((one.start, one.size) for one in self._foreign.get(device, ()))

    # --- making ---

    def claim(self, partition: MigInstance) -> None:
        """The agent's ledger says that this instance is ours, whatever the records say."""
        known = any(record.start == partition.start for record in self._records.of(partition.device))
        if not known:
            self._records.put(MigRecord(device=partition.device, profile=partition.profile, start=partition.start))
        self._foreign[partition.device] = tuple(
            one for one in self._foreign.get(partition.device, ()) if not self._records.owns(one)
        )

    async def make(self, key: AssignmentKey, partition: Partition, account: Account) -> PartitionGrant:
        if not isinstance(partition, MigInstance):
            raise PartitionRefused(f"assignment {key} asks for no MIG instance")
        self._made[key] = (partition.device, partition.start, "")
        try:
            found = await self._find(partition) or await self._create(partition)
        except BaseException:
            del self._made[key]
            raise
        self._made[key] = (partition.device, partition.start, found.mig_uuid)
        env = visible((found.mig_uuid,))
        if partition.processes:
            try:
                env = await self._mps.serve_instance(key, partition, found.mig_uuid, account)
            except BaseException:
                await self.unmake(key, partition, account.uid)
                raise
        return PartitionGrant(env=env, mode="mig", cards=1, mig_uuid=found.mig_uuid)

    async def _find(self, partition: MigInstance) -> MigInstanceFound | None:
        """The instance, if it is there and ours; what is left over in its place is removed."""
        for one in await self._backend.mig_instances(partition.device):
            if not (one.start < partition.start + partition.size and partition.start < one.start + one.size):
                continue
            if not self._records.owns(one):
                there = f"{one.profile} at {one.start}"
                raise PartitionRefused(
                    f"card {partition.device} has {there}, which was not made here and is left alone"
                )
            if (one.start, one.profile) == (partition.start, partition.profile) and one.mig_uuid:
                self._note_made(one)
                return one
            await self._destroy(one)
        return None

    async def _create(self, partition: MigInstance) -> MigInstanceFound:
        record = MigRecord(device=partition.device, profile=partition.profile, start=partition.start)
        self._records.put(record)
        try:
            found = await self._backend.create_mig(partition.device, partition.profile, partition.start)
        except PartitionRefused:
            self._records.drop(partition.device, partition.start)
            raise
        self._note_made(found)
        return found

    def _note_made(self, one: MigInstanceFound) -> None:
        self._records.put(MigRecord(device=one.device, profile=one.profile, start=one.start, mig_uuid=one.mig_uuid))

    async def unmake(self, key: AssignmentKey, partition: Partition, uid: int) -> None:
        if key not in self._made or not isinstance(partition, MigInstance):
            return
        device, start, mig_uuid = self._made[key]
        await self._mps.leave_instance(key)  # its server is at home in the instance, which could not go before it
        await self._backend.destroy_mig(device, mig_uuid)
        # An earlier try may have left half of it, which has no UUID any more.
        await self._backend.destroy_mig_remains(device, start)
        self._records.drop(device, start)
        del self._made[key]

    async def _destroy(self, one: MigInstanceFound) -> None:
        if one.mig_uuid:
            await self._backend.destroy_mig(one.device, one.mig_uuid)
        else:
            await self._backend.destroy_mig_remains(one.device, one.start)

    # --- what was left over ---

    async def sweep(self) -> tuple[str, ...]:
        removed: list[str] = []
        self._is_swept = True
        for device in await self._backend.inventory():
            if device.healthy and "mig" in device.modes:
                removed += await self._remove_unheld(device, await self._backend.mig_instances(device.uuid))
        return tuple(removed)

    async def _remove_unheld(self, device: Device, present: Sequence[MigInstanceFound]) -> list[str]:
        held = {(at, start) for at, start, _ in self._made.values()}
        removed = []
        for one in present:
            if self._records.owns(one) and (one.device, one.start) not in held:
                await self._destroy(one)
                removed.append(f"MIG instance {one.profile} at {one.start} of card {device.index} ({device.uuid})")
        for record in self._records.of(device.uuid):
            if (record.device, record.start) not in held:
                self._records.drop(record.device, record.start)
        return removed


def _cut(facts: MigProfileFacts, foreign: Sequence[MigInstanceFound]) -> MigProfileFacts:
    starts = tuple(
        start
        for start in facts.starts
        if not any(start < one.start + one.size and one.start < start + facts.size for one in foreign)
    )
    alike = sum(one.profile == facts.name for one in foreign)
    return msgspec.structs.replace(facts, starts=starts, count_max=facts.count_max - alike)
