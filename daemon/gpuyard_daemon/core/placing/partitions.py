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

from itertools import count
from typing import Final, Literal, NamedTuple, TypeAlias

from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.names import AssignmentKey, Tenant
from gpuyard_protocol.resources import (
    GPU_LOADS,
    Device,
    MigInstance,
    MigProfileFacts,
    Mode,
    MpsShare,
    Partition,
    ResourceNeed,
    TimeSliceShare,
    WholeCards,
    mode_of,
    share_of,
)
from gpuyard_protocol.units import MILLI

#: A partition of one card; whole cards are counted per node.
CardMode: TypeAlias = Literal["whole", "mig", "mps", "timeslice"]

#: Added to a fit on a card that is not cut yet: cut cards fill up first.
_FRESH = 4 * MILLI
#: Added where the mode wastes more of the card than the wish's first choice would.
_SECOND_CHOICE = 8 * MILLI
#: A switch of MIG mode is weighed as what the card could have computed in the meantime, spread over so long.
SWITCH_HORIZON_MS = 600_000
#: Added where a time-sliced card would promise more compute than it has.
_OVERSUBSCRIBED = 16 * MILLI


class Geometry:
    """What a card's MIG profiles allow, with the answers found so far.

    Cards of one kind share a geometry: their profiles are equal. The memo holds pure facts about numbers, so it makes
    nothing depend on history.
    """

    __slots__ = ("_covering", "_packable", "_starts", "compute_slices", "number", "profiles", "slices")

    def __init__(self, slices: int, compute_slices: int, profiles: tuple[MigProfileFacts, ...]) -> None:
        #: Equal for equal geometries, and for no others.
        self.number = len(_GEOMETRIES)
        self.slices = slices
        self.compute_slices = compute_slices
        self.profiles = {profile.name: profile for profile in profiles}
        self._starts: dict[tuple[int, str], int] = {}
        self._packable: dict[tuple[int, str], int] = {}
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

    def packable(self, mask: int, profile: MigProfileFacts) -> int:
        """Most instances of one profile that still go on a card whose taken memory slices are `mask`."""
        count = self._packable.get((mask, profile.name))
        if count is None:
            count, taken = 0, mask
            for start in sorted(profile.starts):
                if not taken & slices_at(start, profile.size):
                    taken |= slices_at(start, profile.size)
                    count += 1
            count = self._packable[mask, profile.name] = min(count, profile.count_max)
        return count

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


class Look(NamedTuple):
    """All that decides what else goes on a card, but whose it is while it is shared. Equal looks, equal cards."""

    kind: int
    mode: Mode
    milli: int
    memory_mib: int
    clients: int
    mask: int
    profiles: tuple[tuple[str, int], ...]
    takes_work: bool
    loads: tuple[int, ...]
    #: Of a card that is not cut and takes time to switch: 1: it is in MIG mode, 2: it is not, and stays so for now.
    past: int = 0


#: Looks met lately, by numbers that mean nothing but equality: shorter to compare. No number comes twice.
_LOOKS: dict[Look, int] = {}
_LOOK_NUMBERS: Final = count()
_LOOKS_MAX: Final = 65_536


def _number_of(look: Look) -> int:
    number = _LOOKS.get(look)
    if number is None:
        if len(_LOOKS) >= _LOOKS_MAX:
            # Equal looks get another number from now on: what was found out about them is found out again.
            _LOOKS.clear()
        number = _LOOKS[look] = next(_LOOK_NUMBERS)
    return number


#: Kinds of card met so far, by what a card of the kind is: numbers that mean nothing but equality.
_KINDS: dict[tuple[object, ...], int] = {}
#: One card of each kind.
_SAMPLES: list[Device] = []


def kind_of(device: Device) -> int:
    """Equal for cards that can be cut alike."""
    geometry = geometry_of(device).number
    switch_ms = device.mig_switch_ms
    key = (device.model, device.memory_mib, device.modes, geometry, device.mps_clients_max, device.mig_taken, switch_ms)
    kind = _KINDS.get(key)
    if kind is None:
        kind = _KINDS[key] = len(_SAMPLES)
        _SAMPLES.append(device)
    return kind


def sample_of(kind: int) -> Device:
    """A card of a kind."""
    return _SAMPLES[kind]


class Room(NamedTuple):
    """What is free on a card, coarsely: what the measures of waste look at. Packed into an integer while kept."""

    kind: int
    #: 0: nothing can go there. 1: it is not cut. 2: it is shared, by MPS or in turns. 3: it is cut by MIG.
    tag: int
    #: Free compute in thousandths; of MIG the taken memory slices, as bits.
    first: int
    #: Free memory in thousandths of the card's; of MIG the free compute slices.
    second: int

    def pack(self) -> int:
        return ((self.kind << 2 | self.tag) << 16 | self.first) << 16 | self.second

    @classmethod
    def unpack(cls, packed: int) -> Room:
        return cls(packed >> 34, packed >> 32 & 3, packed >> 16 & 0xFFFF, packed & 0xFFFF)


NO_ROOM = 0


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
        "_look",
        "_look_number",
        "_room",
        "clients",
        "device",
        "domain",
        "foreign",
        "geometry",
        "held",
        "in_mig",
        "keeps_mode",
        "kind",
        "loads",
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
        self.kind = kind_of(device)
        self._look: Look | None = None
        self._look_number = -1
        self._room: int | None = None
        #: Slices that somebody outside the yard holds: the card is cut by MIG, whatever the yard does.
        self.foreign = sum([slices_at(first, size) for first, size in device.mig_taken])
        #: It was in MIG mode when it was last used, and has changed so lately that it stays as it is for now.
        self.in_mig = self.keeps_mode = False
        self.mode: Mode = "mig" if self.foreign else "idle"
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
        self.mask = self.foreign
        self.profile_counts: dict[str, int] = {}
        #: Shares that said what they lean on, counted in the order of `GPU_LOADS`.
        self.loads: tuple[int, ...] = (0,) * len(GPU_LOADS)

    def copy(self, *, with_holders: bool = False) -> Card:
        """For trying placements: the sums are its own; what holds them is carried over only when asked for."""
        twin = Card.__new__(Card)
        twin.device, twin.position, twin.geometry = self.device, self.position, self.geometry
        twin.foreign, twin.loads, twin.in_mig, twin.keeps_mode = self.foreign, self.loads, self.in_mig, self.keeps_mode
        twin.kind, twin._look, twin._room = self.kind, self._look, self._room
        twin._look_number = self._look_number
        twin.present, twin.takes_work = self.present, self.takes_work
        twin.mode, twin.domain, twin.milli, twin.memory_mib = self.mode, self.domain, self.milli, self.memory_mib
        twin.clients, twin.mask, twin.profile_counts = self.clients, self.mask, dict(self.profile_counts)
        twin.held = dict(self.held) if with_holders else {}
        return twin

    @property
    def look(self) -> Look:
        look = self._look
        if look is None:
            profiles = tuple(sorted(self.profile_counts.items())) if self.mode == "mig" else ()
            look = self._look = Look(
                self.kind,
                self.mode,
                self.milli,
                self.memory_mib,
                self.clients,
                self.mask,
                profiles,
                self.takes_work,
                self.loads,
                (1 if self.in_mig else 2 * self.keeps_mode) if self.mode == "idle" else 0,
            )
        return look

    @property
    def look_number(self) -> int:
        """Of equal looks mostly the same, of others never."""
        number = self._look_number
        if number < 0:
            number = self._look_number = _number_of(self.look)
        return number

    def recall(self, *, in_mig: bool, keeps_mode: bool) -> None:
        """What is remembered of it: whether it is in MIG mode, and whether it stays in the mode that it is in."""
        self.in_mig, self.keeps_mode = in_mig, keeps_mode
        if not self.held:
            self.mode = self._unused_mode
        self.changed()

    @property
    def is_unused(self) -> bool:
        """Nobody holds any of it, and it takes work, if perhaps not in every mode."""
        return self.takes_work and not self.foreign and (self.mode == "idle" or (self.mode == "mig" and not self.mask))

    @property
    def _unused_mode(self) -> Mode:
        """How it is cut while nobody holds any of it: not at all, or for MIG, whoever comes."""
        return "mig" if self.foreign or (self.keeps_mode and self.in_mig) else "idle"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Ways in which it can be cut, once it is empty."""
        offered = self.device.modes
        return tuple([mode for mode in offered if mode != "mig"]) if self.keeps_mode and not self.in_mig else offered

    def switch_milli(self, mode: Mode) -> int:
        """What it costs to use it in a mode, for the switch that it takes, in thousandths of a card."""
        if not self.device.mig_switch_ms or self.mode != "idle" or (mode == "mig") == self.in_mig:
            return 0
        return self.device.mig_switch_ms * MILLI // SWITCH_HORIZON_MS

    def room_after(self, milli: int = 0, memory_mib: int = 0, mask: int = 0, slices: int = 0) -> int:
        """The packed `Room` once so much more is taken of it; of MIG the slices at `mask`, and compute slices."""
        device, mode = self.device, self.mode
        if not self.takes_work or mode == "whole":
            return NO_ROOM
        if mode == "mig" or mask:
            free = max(0, device.mig_compute_slices - self._slices_held() - slices)
            return ((self.kind << 2 | 3) << 16 | self.mask | mask) << 16 | free
        if mode == "idle" and not milli and not memory_mib:
            return ((self.kind << 2 | 1) << 16 | MILLI) << 16 | MILLI
        left = max(0, MILLI - self.milli - milli)
        memory = max(0, device.memory_mib - self.memory_mib - memory_mib) * MILLI // max(1, device.memory_mib)
        return ((self.kind << 2 | 2) << 16 | left) << 16 | memory

    def _count_load(self, partition: Partition, change: int) -> None:
        load = partition.load if isinstance(partition, MpsShare | TimeSliceShare) else ""
        if load:
            self.loads = tuple([n + change * (load == each) for each, n in zip(GPU_LOADS, self.loads, strict=True)])

    def _slices_held(self) -> int:
        profiles = self.geometry.profiles
        return sum([profiles[name].compute_slices * n for name, n in self.profile_counts.items() if name in profiles])

    @property
    def room(self) -> int:
        room = self._room
        if room is None:
            room = self._room = self.room_after()
        return room

    def changed(self) -> None:
        """It does not look as before."""
        self._room = None
        self._look = None
        self._look_number = -1

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
        self._count_load(partition, 1)
        self.changed()
        self.held[key] = partition
        self.mode = mode
        self.domain = tenant if mode in ("mps", "timeslice") else ""
        self.milli += milli
        self.memory_mib += memory

    def could_take(self, partition: Partition, tenant: Tenant) -> bool:
        """Whether the card, healthy or not, has room for just this partition now: whether `take` would not object."""
        mode = mode_of(partition)
        milli, memory = amounts_on(self.device, partition)
        if self.mode not in ("idle", mode) or (mode == "whole" and self.mode == "whole"):
            return False
        if mode in ("mps", "timeslice") and self.domain not in ("", tenant):
            return False
        over_memory = mode != "mig" and self.memory_mib + memory > self.device.memory_mib
        if over_memory or (mode != "timeslice" and self.milli + milli > MILLI):
            return False
        if not isinstance(partition, MigInstance):
            return True
        profile = self.geometry.profiles.get(partition.profile)
        is_taken = self.mask & slices_at(partition.start, partition.size)
        return not is_taken and (profile is None or self.allows_one_more(profile))

    def allows_one_more(self, profile: MigProfileFacts) -> bool:
        """Whether the card may have another instance of a profile, wherever that would be."""
        if self.profile_counts.get(profile.name, 0) >= profile.count_max:
            return False
        # The media engines exist once: at most one instance of all profiles that bring them.
        return "+me" not in profile.name or not any("+me" in name and n for name, n in self.profile_counts.items())

    def give(self, key: AssignmentKey) -> None:
        """Take a partition out again."""
        self.changed()
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
        self._count_load(partition, -1)
        if not self.held:
            self.mode, self.domain = self._unused_mode, ""
            self.profile_counts = {}


def amounts_on(device: Device, partition: Partition) -> tuple[int, int]:
    """(compute in thousandths, memory in MiB) that a partition holds of a card it is on."""
    if isinstance(partition, WholeCards):
        return MILLI, device.memory_mib
    if isinstance(partition, MpsShare | TimeSliceShare):
        return partition.share_milli, partition.memory_mib
    if isinstance(partition, MigInstance):
        return partition.compute_slices * MILLI // max(1, device.mig_compute_slices), partition.memory_mib
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
    offered = card.modes if card.keeps_mode else card.device.modes
    if need.mig:
        profile = card.geometry.profiles.get(need.mig)
        if profile is None or "mig" not in offered or "mig" not in modes:
            return None
        crowd = need.gpu_processes if need.mps else 0
        return "mig" if crowd <= card.device.mps_clients_in(profile.compute_slices) else None
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
        covered = "mig" in card.device.modes and profile_for(card, need) is not None
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
    if card.geometry.free_start(card.mask, profile) < 0 or not card.allows_one_more(profile):
        return False
    milli = profile.compute_slices * MILLI // max(1, card.device.mig_compute_slices)
    return card.milli + milli <= MILLI


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
                    processes=need.gpu_processes if need.mps else 0,
                )
        case "mps":
            milli, memory = share_of(device.memory_mib, need)
            return MpsShare(
                device=device.uuid,
                share_milli=milli,
                memory_mib=memory,
                processes=need.gpu_processes,
                load=need.gpu_load,
            )
        case "timeslice":
            milli, memory = share_of(device.memory_mib, need)
            return TimeSliceShare(device=device.uuid, share_milli=milli, memory_mib=memory, load=need.gpu_load)
        case "whole":
            return WholeCards(devices=(device.uuid,))
    raise InvariantViolated(f"card {device.uuid} was cut for {need.describe()}, which it does not offer")
