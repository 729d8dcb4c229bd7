"""How one card can be cut, and what is left of it.

A `Card` counts what its partitions hold; `fit` says whether one more would go on it and how snugly, `cut` makes the
partition. Neither knows of nodes, queues or time. The rules no path may break are kept here: a card is in one mode at
a time, a shared card belongs to one share domain, memory is never promised twice, MIG instances sit at legal starts on
disjoint slices.

Which mode answers which wish (first that the card offers):

=================  ================================================================
whole cards        `whole`
a MIG profile      `mig`
a share, `hard`    the smallest MIG profile that covers it; `whole` on a card where none does
a share, `soft`    `mps`, else MIG as above
a share, `none`    `timeslice`, else `mps`
=================  ================================================================

Profiles are those that the card's driver reported, never a table of ours. Of a profile's free starts the one is taken
that costs the other profiles the fewest starts, and the highest of those: 3g goes to 4 before 0, 1g from the high end.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from gpuyard_daemon.core.states import InvariantViolated
from gpuyard_protocol.names import AssignmentKey, Tenant
from gpuyard_protocol.resources import (
    Device,
    MigInstance,
    MigProfileFacts,
    Mode,
    MpsShare,
    NoGpu,
    Partition,
    ResourceNeed,
    TimeSliceShare,
    WholeCards,
    share_of,
)
from gpuyard_protocol.units import MILLI

#: A partition of one card; whole cards are counted per node.
CardMode: TypeAlias = Literal["whole", "mig", "mps", "timeslice"]

#: Added to a fit on a card that is not cut yet: cut cards fill up first.
_FRESH = 4 * MILLI
#: Added where the mode wastes more of the card than the wish's first choice would.
_SECOND_CHOICE = 8 * MILLI
#: Added where a time-sliced card would promise more compute than it has.
_OVERSUBSCRIBED = 16 * MILLI


class Geometry:
    """What a card's MIG profiles allow, with the answers found so far.

    Cards of one kind share a geometry: their profiles are equal. The memo holds pure facts about numbers, so it makes
    nothing depend on history.
    """

    __slots__ = ("_covering", "_starts", "compute_slices", "profiles", "slices")

    def __init__(self, slices: int, compute_slices: int, profiles: tuple[MigProfileFacts, ...]) -> None:
        self.slices = slices
        self.compute_slices = compute_slices
        self.profiles = {profile.name: profile for profile in profiles}
        self._starts: dict[tuple[int, str], int] = {}
        self._covering: dict[tuple[int, int], MigProfileFacts | None] = {}

    def free_start(self, mask: int, profile: MigProfileFacts) -> int:
        """Where the next instance goes on a card whose taken memory slices are `mask`; -1 if nowhere."""
        start = self._starts.get((mask, profile.name))
        if start is None:
            start = self._starts[mask, profile.name] = self._find_start(mask, profile)
        return start

    def _find_start(self, mask: int, profile: MigProfileFacts) -> int:
        legal = [start for start in profile.starts if not mask & slices_at(start, profile.size)]
        if not legal:
            return -1
        return max(legal, key=lambda start: (self._starts_left(mask | slices_at(start, profile.size)), start))

    def _starts_left(self, mask: int) -> int:
        """Memory slices that could still be had, summed over every profile and start: what a placement should save."""
        return sum(
            profile.size
            for profile in self.profiles.values()
            for start in profile.starts
            if not mask & slices_at(start, profile.size)
        )

    def covering(self, share_milli: int, memory_mib: int) -> MigProfileFacts | None:
        """The smallest plain profile with at least this compute and memory; None if none has."""
        key = (share_milli, memory_mib)
        if key not in self._covering:
            fitting = [
                profile
                for profile in self.profiles.values()
                if profile.compute_slices * MILLI >= share_milli * self.compute_slices
                and profile.memory_mib >= memory_mib
                and "+" not in profile.name
                and "-" not in profile.name
            ]
            smallest = min(fitting, key=lambda p: (p.size, p.compute_slices, p.memory_mib, p.name), default=None)
            self._covering[key] = smallest
        return self._covering[key]


def slices_at(start: int, size: int) -> int:
    """Bit mask of the memory slices start … start + size - 1."""
    return ((1 << size) - 1) << start


_GEOMETRIES: dict[tuple[int, int, tuple[MigProfileFacts, ...]], Geometry] = {}


def geometry_of(device: Device) -> Geometry:
    key = (device.mig_slices, device.mig_compute_slices, device.mig_profiles)
    geometry = _GEOMETRIES.get(key)
    if geometry is None:
        geometry = _GEOMETRIES[key] = Geometry(*key)
    return geometry


class Card:
    """One physical GPU: its mode, and the sums over its partitions. Derived from assignments, never saved."""

    __slots__ = (
        "clients",
        "device",
        "domain",
        "geometry",
        "held",
        "mask",
        "memory_mib",
        "milli",
        "mode",
        "position",
        "present",
        "profile_counts",
        "takes_work",
    )

    def __init__(self, device: Device, position: int, *, present: bool = True) -> None:
        self.device = device
        #: Within the node's cards.
        self.position = position
        #: The node's inventory lists it; if not, it stays only until its jobs have ended.
        self.present = present
        #: Something new may go there.
        self.takes_work = present and device.healthy
        self.geometry = geometry_of(device)
        self.mode: Mode = "idle"
        #: Whose it is while it is shared by MPS or time-slice.
        self.domain: Tenant = ""
        #: Who holds what; the sums below are over these.
        self.held: dict[AssignmentKey, Partition] = {}
        #: Compute in thousandths of the card.
        self.milli = 0
        self.memory_mib = 0
        #: Processes under MPS.
        self.clients = 0
        #: Taken MIG memory slices.
        self.mask = 0
        self.profile_counts: dict[str, int] = {}

    def copy(self) -> Card:
        """For trying placements: the sums are its own, what holds them is not carried over."""
        twin = Card.__new__(Card)
        twin.device, twin.position, twin.geometry = self.device, self.position, self.geometry
        twin.present, twin.takes_work = self.present, self.takes_work
        twin.mode, twin.domain, twin.milli, twin.memory_mib = self.mode, self.domain, self.milli, self.memory_mib
        twin.clients, twin.mask, twin.profile_counts = self.clients, self.mask, dict(self.profile_counts)
        twin.held = {}
        return twin

    def take(self, key: AssignmentKey, partition: Partition, tenant: Tenant) -> None:
        """Enter a partition; `InvariantViolated` if the card cannot hold it."""
        mode = mode_of(partition)
        milli, memory = amounts_on(self.device, partition)
        if key in self.held or self.mode not in ("idle", mode) or (mode == "whole" and self.mode == "whole"):
            raise InvariantViolated(f"card {self.device.uuid} is {self.mode}: {key} cannot take {partition}")
        if mode in ("mps", "timeslice") and self.domain not in ("", tenant):
            raise InvariantViolated(f"card {self.device.uuid} belongs to {self.domain!r}: {key} of {tenant!r} cannot")
        over_memory = mode != "mig" and self.memory_mib + memory > self.device.memory_mib
        if over_memory or (mode != "timeslice" and self.milli + milli > MILLI):
            raise InvariantViolated(f"card {self.device.uuid} would be over-committed by {key}: {partition}")
        match partition:
            case MigInstance(profile=profile, start=start, size=size):
                if self.mask & slices_at(start, size):
                    raise InvariantViolated(f"card {self.device.uuid}: slices of {key} are taken: {partition}")
                self.mask |= slices_at(start, size)
                self.profile_counts[profile] = self.profile_counts.get(profile, 0) + 1
            case MpsShare(processes=processes):
                self.clients += processes
        self.held[key] = partition
        self.mode = mode
        self.domain = tenant if mode in ("mps", "timeslice") else ""
        self.milli += milli
        self.memory_mib += memory

    def give(self, key: AssignmentKey) -> None:
        """Take a partition out again."""
        partition = self.held.pop(key)
        milli, memory = amounts_on(self.device, partition)
        self.milli -= milli
        self.memory_mib -= memory
        match partition:
            case MigInstance(profile=profile, start=start, size=size):
                self.mask &= ~slices_at(start, size)
                self.profile_counts[profile] -= 1
            case MpsShare(processes=processes):
                self.clients -= processes
        if not self.held:
            self.mode, self.domain = "idle", ""
            self.profile_counts = {}


def mode_of(partition: Partition) -> Mode:
    match partition:
        case WholeCards():
            return "whole"
        case MpsShare():
            return "mps"
        case MigInstance():
            return "mig"
        case TimeSliceShare():
            return "timeslice"
        case NoGpu():
            return "idle"


def amounts_on(device: Device, partition: Partition) -> tuple[int, int]:
    """(compute in thousandths, memory in MiB) that a partition holds of a card it is on."""
    match partition:
        case WholeCards():
            return MILLI, device.memory_mib
        case MpsShare(share_milli=milli, memory_mib=memory) | TimeSliceShare(share_milli=milli, memory_mib=memory):
            return milli, memory
        case MigInstance(compute_slices=slices, memory_mib=memory):
            return slices * MILLI // max(1, device.mig_compute_slices), memory
        case NoGpu():
            return 0, 0


def fit(card: Card, need: ResourceNeed, tenant: Tenant, modes: tuple[Mode, ...], timeslice_milli_max: int) -> int:
    """How much would be left over on the card (smaller: snugger) if it took a share or MIG instance; -1: no room.

    `modes`: those that may be used now. Not for whole cards, of which there is nothing to compare.
    """
    mode = mode_for(card, need, modes)
    if mode is None or card.mode not in ("idle", mode) or not card.takes_work:
        return -1
    device = card.device
    fresh = _FRESH if card.mode == "idle" else 0
    if mode == "mig":
        profile = profile_for(card, need)
        if profile is None or not _has_place(card, profile):
            return -1
        left = MILLI - card.milli - profile.compute_slices * MILLI // max(1, device.mig_compute_slices)
        memory_left = max(0, device.memory_mib - card.memory_mib - profile.memory_mib)
        # A soft share on a card that could serve it by MPS, cut for MIG already: allowed, but after the MPS cards.
        second = _SECOND_CHOICE if need.isolation == "soft" and not need.mig else 0
        return left + memory_left * MILLI // device.memory_mib + fresh + second
    if mode == "whole":
        return _SECOND_CHOICE if card.mode == "idle" else -1
    milli, memory = share_of(device.memory_mib, need)
    memory_left = device.memory_mib - card.memory_mib - memory
    left = MILLI - card.milli - milli
    if memory_left < 0 or (card.mode != "idle" and card.domain != tenant):
        return -1
    if mode == "mps":
        if left < 0 or card.clients + need.gpu_processes > device.mps_clients_max:
            return -1
        return left + memory_left * MILLI // device.memory_mib + fresh
    if card.milli + milli > timeslice_milli_max:
        return -1
    if left < 0:
        return _OVERSUBSCRIBED - left
    return left + memory_left * MILLI // device.memory_mib + fresh


def mode_for(card: Card, need: ResourceNeed, modes: tuple[Mode, ...]) -> CardMode | None:
    """The mode in which this card, as it is cut now, would serve a share or MIG instance; None if it never would."""
    offered = card.device.modes
    if need.mig:
        return "mig" if "mig" in offered and "mig" in modes and need.mig in card.geometry.profiles else None
    wanted: tuple[CardMode, ...]
    match need.isolation:
        case "hard":
            wanted = ("mig",)
        case "soft":
            wanted = ("mig", "mps") if card.mode == "mig" else ("mps", "mig")
        case "none":
            # MPS stands in only where the card cannot be shared in time (or may not, for a gang over several nodes).
            wanted = ("timeslice", "mps")
    for mode in wanted:
        if mode in offered and mode in modes and (mode != "mig" or profile_for(card, need) is not None):
            return mode
    if need.isolation == "hard" and "whole" in offered and "whole" in modes:
        milli, memory = share_of(card.device.memory_mib, need)
        # A card whose MIG profiles do cover the share, but may not be used now, is not given away whole.
        covered = "mig" in offered and profile_for(card, need) is not None
        return "whole" if milli <= MILLI and memory <= card.device.memory_mib and not covered else None
    return None


def profile_for(card: Card, need: ResourceNeed) -> MigProfileFacts | None:
    """The MIG profile that serves a need on this kind of card.

    Of a share only the dimensions that were asked for count: a quarter of the compute is a 2g, whose memory is a
    little less than a quarter of the card's.
    """
    if need.mig:
        return card.geometry.profiles.get(need.mig)
    return card.geometry.covering(need.share_milli, need.share_memory_mib)


def _has_place(card: Card, profile: MigProfileFacts) -> bool:
    if card.geometry.free_start(card.mask, profile) < 0:
        return False
    if card.profile_counts.get(profile.name, 0) >= profile.count_max:
        return False
    milli = profile.compute_slices * MILLI // max(1, card.device.mig_compute_slices)
    if card.milli + milli > MILLI:
        return False
    # The media engines exist once: at most one instance of all profiles that bring them.
    return "+me" not in profile.name or not any("+me" in name and n for name, n in card.profile_counts.items())


def cut(card: Card, need: ResourceNeed, modes: tuple[Mode, ...]) -> Partition:
    """The partition for which `fit` found room."""
    mode = mode_for(card, need, modes)
    device = card.device
    match mode:
        case "mig":
            profile = profile_for(card, need)
            if profile is not None:
                return MigInstance(
                    device=device.uuid,
                    profile=profile.name,
                    start=card.geometry.free_start(card.mask, profile),
                    size=profile.size,
                    memory_mib=profile.memory_mib,
                    compute_slices=profile.compute_slices,
                )
        case "mps":
            milli, memory = share_of(device.memory_mib, need)
            return MpsShare(device=device.uuid, share_milli=milli, memory_mib=memory, processes=need.gpu_processes)
        case "timeslice":
            milli, memory = share_of(device.memory_mib, need)
            return TimeSliceShare(device=device.uuid, share_milli=milli, memory_mib=memory)
        case "whole":
            return WholeCards(devices=(device.uuid,))
    raise InvariantViolated(f"card {device.uuid} was cut for {need.describe()}, which it does not offer")
