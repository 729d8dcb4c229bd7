"""The books of a node's cards: which assignment holds what, and whether one more fits.

`CardLedger` is where the rules stand that no path may break. It is pure: no driver, no clock, no I/O, so its rules can
be tried with any sequence of takings and releases. `take` checks everything first and changes nothing when it refuses.

The rules, per card:

- one mode at a time; a card that nobody holds is in none, the next partition decides;
- a whole card has one holder;
- the memory of all shares together is at most the card's, under MPS and time-slicing alike;
- MPS shares of compute together are at most the whole card, their processes at most what MPS serves, and all of them
  belong to one share domain and run under one uid (an MPS daemon serves one uid at a time and makes others wait);
- MIG instances lie on disjoint memory slices, at a start their profile allows, no more of a profile than the card can
  have, and only one of all with the media extension.

Compute under time-slicing may be over-subscribed: that is what it is for.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from gpuyard_agent.devices.base import PartitionRefused
from gpuyard_protocol.names import AssignmentKey, DeviceUuid
from gpuyard_protocol.resources import (
    Device,
    MigInstance,
    MigProfileFacts,
    Mode,
    MpsShare,
    NoGpu,
    Partition,
    TimeSliceShare,
    WholeCards,
    devices_of,
    mode_of,
)
from gpuyard_protocol.units import MILLI

#: In a profile's name: the instance has the card's one set of media engines.
_MEDIA = "+me"


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What one assignment holds, and as whom."""

    partition: Partition
    #: Of the account its process runs as.
    uid: int
    #: Soft shares meet on a card only inside one domain.
    share_domain: str


class CardLedger:
    """Who holds what on the cards of one node."""

    def __init__(self, devices: Iterable[Device]) -> None:
        #: Cards by UUID, as last reported by the driver. A card that is gone stays, unhealthy.
        self._devices: dict[DeviceUuid, Device] = {device.uuid: device for device in devices}
        #: Everything held, by assignment.
        self._holdings: dict[AssignmentKey, Holding] = {}
        #: The same by card: `_by_card[d]` has the keys of `_holdings` whose partition lies on d.
        self._by_card: dict[DeviceUuid, set[AssignmentKey]] = {uuid: set() for uuid in self._devices}

    def update(self, devices: Iterable[Device]) -> None:
        """The inventory changed. Holdings stay whatever became of their card."""
        for device in devices:
            self._devices[device.uuid] = device
            self._by_card.setdefault(device.uuid, set())

    def take(
        self, key: AssignmentKey, partition: Partition, *, uid: int, share_domain: str, adopting: bool = False
    ) -> bool:
        """Write it down; False if this key holds exactly this already. Raises `PartitionRefused` and changes nothing.

        `adopting`: it exists already, so a card that has fallen ill meanwhile is no reason to refuse.
        """
        holding = Holding(partition=partition, uid=uid, share_domain=share_domain)
        present = self._holdings.get(key)
        if present is not None:
            if present == holding:
                return False
            raise PartitionRefused(f"assignment {key} holds another partition already")
        devices = devices_of(partition)
        if isinstance(partition, WholeCards) and (not devices or len(set(devices)) != len(devices)):
            raise PartitionRefused("a partition of whole cards must name at least one card, and each once")
        for uuid in devices:
            self._check(uuid, holding, adopting=adopting)
        self._holdings[key] = holding
        for uuid in devices:
            self._by_card[uuid].add(key)
        return True

    def release(self, key: AssignmentKey) -> Holding | None:
        """Strike it out; None if the key holds nothing."""
        holding = self._holdings.pop(key, None)
        if holding is not None:
            for uuid in devices_of(holding.partition):
                self._by_card[uuid].discard(key)
        return holding

    def get(self, key: AssignmentKey) -> Holding | None:
        return self._holdings.get(key)

    def keys(self) -> tuple[AssignmentKey, ...]:
        return tuple(sorted(self._holdings))

    def on_card(self, uuid: DeviceUuid) -> tuple[Holding, ...]:
        return tuple(self._holdings[key] for key in sorted(self._by_card.get(uuid, ())))

    def holders(self, uuid: DeviceUuid) -> int:
        """How many assignments lie on the card."""
        return len(self._by_card.get(uuid, ()))

    def mode(self, uuid: DeviceUuid) -> Mode:
        return next((mode_of(self._holdings[key].partition) for key in self._by_card.get(uuid, ())), "idle")

    def modes(self) -> dict[DeviceUuid, Mode]:
        return {uuid: self.mode(uuid) for uuid in self._devices}

    # --- the rules ---

    def _check(self, uuid: DeviceUuid, wanted: Holding, *, adopting: bool) -> None:
        device = self._devices.get(uuid)
        if device is None:
            raise PartitionRefused(f"there is no card {uuid} on this node")
        if not device.healthy and not adopting:
            raise _refusal(device, f"is not healthy: {device.fault or 'no reason given'}")
        mode, present = mode_of(wanted.partition), self.mode(uuid)
        if mode not in device.modes:
            offered = ", ".join(device.modes) or "none"
            raise _refusal(device, f"cannot be used in mode {mode}; its modes: {offered}")
        if present not in ("idle", mode):
            raise _refusal(device, f"is in mode {present}, not {mode}")
        others = self.on_card(uuid)
        match wanted.partition:
            case WholeCards():
                if others:
                    raise _refusal(device, "is held whole by another assignment")
            case MpsShare() as share:
                _check_memory(device, share.memory_mib, others)
                _check_mps(device, share, wanted, others)
            case TimeSliceShare() as turn:
                _check_memory(device, turn.memory_mib, others)
                if not 0 < turn.share_milli <= MILLI:
                    raise _refusal(device, f"a weight of {turn.share_milli} thousandths is not between 1 and {MILLI}")
            case MigInstance() as instance:
                _check_mig(device, instance, others)
            case NoGpu():
                pass


def _refusal(device: Device, problem: str) -> PartitionRefused:
    return PartitionRefused(f"card {device.index} ({device.uuid}) {problem}")


def _check_memory(device: Device, memory_mib: int, others: tuple[Holding, ...]) -> None:
    if memory_mib <= 0:
        raise _refusal(device, f"a share needs memory, found {memory_mib} MiB")
    taken = sum(
        other.partition.memory_mib for other in others if isinstance(other.partition, MpsShare | TimeSliceShare)
    )
    if taken + memory_mib > device.memory_mib:
        raise _refusal(device, f"has {device.memory_mib - taken} MiB left of {device.memory_mib}, not {memory_mib}")


def _check_mps(device: Device, share: MpsShare, wanted: Holding, others: tuple[Holding, ...]) -> None:
    if not 0 < share.share_milli <= MILLI:
        raise _refusal(device, f"a share of {share.share_milli} thousandths is not between 1 and {MILLI}")
    if not 0 < share.processes <= share.memory_mib:
        raise _refusal(device, f"{share.processes} processes cannot divide {share.memory_mib} MiB")
    shares = [other.partition for other in others if isinstance(other.partition, MpsShare)]
    left = MILLI - sum(other.share_milli for other in shares)
    if share.share_milli > left:
        raise _refusal(device, f"has {left} thousandths of its compute left, not {share.share_milli}")
    clients = sum(other.processes for other in shares)
    if clients + share.processes > device.mps_clients_max:
        raise _refusal(device, f"serves {device.mps_clients_max} processes under MPS and has {clients}")
    for other in others:
        if other.share_domain != wanted.share_domain:
            raise _refusal(device, f"is shared inside {other.share_domain!r}, not with {wanted.share_domain!r}")
        if other.uid != wanted.uid:
            raise _refusal(device, f"serves uid {other.uid} under MPS and cannot serve uid {wanted.uid} beside it")


def _check_mig(device: Device, instance: MigInstance, others: tuple[Holding, ...]) -> None:
    facts = _profile(device, instance.profile)
    most = device.mps_clients_in(facts.compute_slices)
    if not 0 <= instance.processes <= min(most, instance.memory_mib):
        raise _refusal(device, f"serves {most} processes under MPS in {facts.name}, not {instance.processes}")
    if instance.start not in facts.starts:
        allowed = ", ".join(map(str, facts.starts))
        raise _refusal(device, f"can have {facts.name} at {allowed}, not at {instance.start}")
    if instance.size != facts.size or instance.memory_mib > facts.memory_mib:
        raise _refusal(
            device,
            f"has {facts.name} with {facts.size} slices and {facts.memory_mib} MiB, "
            f"not with {instance.size} and {instance.memory_mib}",
        )
    present = [other.partition for other in others if isinstance(other.partition, MigInstance)]
    for other in present:
        if instance.start < other.start + other.size and other.start < instance.start + instance.size:
            raise _refusal(
                device, f"has {other.profile} at {other.start}, so {facts.name} at {instance.start} overlaps"
            )
    if sum(other.profile == facts.name for other in present) >= facts.count_max:
        raise _refusal(device, f"can have {facts.count_max} of {facts.name}, and has them")
    if _MEDIA in facts.name and any(_MEDIA in other.profile for other in present):
        raise _refusal(device, f"has one set of media engines, and {facts.name} needs it for itself")


def _profile(device: Device, name: str) -> MigProfileFacts:
    facts = next((known for known in device.mig_profiles if known.name == name), None)
    if facts is None:
        offered = ", ".join(known.name for known in device.mig_profiles) or "none"
        raise _refusal(device, f"has no MIG profile {name!r}; its profiles: {offered}")
    return facts
