"""What a replica needs of a node, and the partition of GPUs that the planner chose for it.

`ResourceNeed` is what was asked, in integers; `Partition` is what was decided: a closed union with one member per mode.
A card is in one mode at a time. A share has two dimensions, compute and memory; only compute may be over-subscribed.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.names import DeviceUuid, Tenant
from gpuyard_protocol.units import MILLI, format_mib, format_milli

#: How far neighbours on a card must be kept apart. `hard`: whole card or MIG. `soft`: MPS or MIG. `none`: time-slice.
Isolation: TypeAlias = Literal["hard", "soft", "none"]
#: What a share leans on, if its owner says so: two of the same heavy kind on one card slow each other down.
GpuLoad: TypeAlias = Literal["", "compute", "memory", "light"]
GPU_LOADS: tuple[GpuLoad, ...] = ("compute", "memory", "light")
#: What the replicas of a gang must have in common: one node, the nodes of one rack, or of the racks under one spine.
Within: TypeAlias = Literal["", "node", "rack", "spine"]
#: What a job may ask of a node's agent that the first agents did not know. They start it without, and say nothing.
Ability: TypeAlias = Literal["secrets", "torchrun", "upload"]
ABILITIES: tuple[Ability, ...] = ("secrets", "torchrun", "upload")
#: How a card is cut. `idle`: not cut; the first allocation decides.
Mode: TypeAlias = Literal["idle", "whole", "mig", "mps", "timeslice"]
MODES: tuple[Mode, ...] = ("whole", "mig", "mps", "timeslice")


class ResourceNeed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, cache_hash=True):
    """Per replica. Exactly one of `gpus`, `share_milli`/`share_memory_mib`, `mig` is set, or none (CPU only)."""

    #: Whole cards.
    gpus: int = 0
    #: Compute of one card in thousandths; 0 with `share_memory_mib` set: in proportion to the memory.
    share_milli: int = 0
    #: Memory of one card in MiB; 0 with `share_milli` set: in proportion to the compute.
    share_memory_mib: int = 0
    #: A MIG profile by name, "" for none.
    mig: str = ""
    isolation: Isolation = "soft"
    #: CUDA processes the replica may have at once: under MPS the driver's memory limit is per process.
    gpu_processes: int = 1
    #: Accepted card models, matched on whole words of the card's name, any of them; empty: any model.
    models: tuple[str, ...] = ()
    #: Least memory of each card used.
    card_memory_mib: int = 0
    #: Counted on the node; a limit that the node enforces only where it was asked for.
    cpu_milli: int = 1000
    memory_mib: int = 1024
    cpu_asked: bool = False
    memory_asked: bool = False
    #: Labels the node must carry, sorted by name.
    node_labels: tuple[tuple[str, str], ...] = ()
    #: Node names or ids allowed; empty: any.
    nodes: tuple[str, ...] = ()
    #: The node must run container images.
    containers: bool = False
    gpu_load: GpuLoad = ""
    #: The replica's CUDA processes share its MIG instance under MPS, at most `gpu_processes` of them.
    mps: bool = False

    #: How fast models of cards are for this work beside the fastest, in thousandths, sorted by name.
    speeds: tuple[tuple[str, int], ...] = ()
    #: Of a gang.
    within: Within = ""
    #: Narrows who it shares cards with: jobs of its tenant with the same. "": all jobs of its tenant that name none.
    share_domain: str = ""
    #: What the node's agent must have said that it knows.
    abilities: tuple[Ability, ...] = ()

    @property
    def wants_gpu(self) -> bool:
        return bool(self.gpus or self.share_milli or self.share_memory_mib or self.mig)

    @property
    def is_share(self) -> bool:
        return bool(self.share_milli or self.share_memory_mib)

    def describe(self) -> str:
        """`2×H100`, `0.3 GPU/12Gi (soft)`, `1g.10gb`, `CPU only`."""
        model = "|".join(self.models)
        if self.gpus:
            return f"{self.gpus}×{model or 'GPU'}"
        if self.mig:
            crowd = f" for {self.gpu_processes} processes under MPS" if self.mps else ""
            return self.mig + crowd + (f" of {model}" if model else "")
        if self.is_share:
            compute = f"{format_milli(self.share_milli)}×{model or 'GPU'}" if self.share_milli else model or "GPU"
            memory = f"/{format_mib(self.share_memory_mib)}" if self.share_memory_mib else ""
            return f"{compute}{memory} ({self.isolation})"
        return "CPU only"


def share_domain_of(tenant: Tenant, share_domain: str) -> str:
    """With whom a job shares cards softly: whoever has the same."""
    return f"{tenant}/{share_domain}" if share_domain else tenant


class NoGpu(msgspec.Struct, frozen=True, tag="none", tag_field="mode"):
    """A replica that runs on the node's CPUs alone."""


class WholeCards(msgspec.Struct, frozen=True, tag="whole", tag_field="mode"):
    """One or more cards that nobody else uses."""

    devices: tuple[DeviceUuid, ...]


class MpsShare(msgspec.Struct, frozen=True, tag="mps", tag_field="mode"):
    """A share of one card under MPS: a cap on compute, and a memory limit that the driver enforces per process."""

    device: DeviceUuid
    #: Thousandths of the card's compute; becomes the active thread percentage, rounded up.
    share_milli: int
    memory_mib: int
    processes: int = 1
    load: GpuLoad = ""


class MigInstance(msgspec.Struct, frozen=True, tag="mig", tag_field="mode"):
    """One MIG instance at an explicit place: the driver's own choice of place depends on the order of requests."""

    device: DeviceUuid
    profile: str
    #: First memory slice, and how many.
    start: int
    size: int
    memory_mib: int
    #: Compute slices, for accounting.
    compute_slices: int
    #: Its job's CUDA processes share it under MPS, so many at most, and each has that part of its memory. 0: no MPS.
    processes: int = 0


class TimeSliceShare(msgspec.Struct, frozen=True, tag="timeslice", tag_field="mode"):
    """Turns on one card: memory is counted, compute is shared by weight and may be over-subscribed."""

    device: DeviceUuid
    #: Weight of the turns.
    share_milli: int
    memory_mib: int
    load: GpuLoad = ""


Partition: TypeAlias = NoGpu | WholeCards | MpsShare | MigInstance | TimeSliceShare


def mode_of(partition: Partition) -> Mode:
    """The mode in which a card is with it; `idle` if it needs no card."""
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


def devices_of(partition: Partition) -> tuple[DeviceUuid, ...]:
    match partition:
        case NoGpu():
            return ()
        case WholeCards(devices=devices):
            return devices
        case _:
            return (partition.device,)


class MigProfileFacts(msgspec.Struct, frozen=True):
    """One MIG profile a card offers, as read from its driver."""

    name: str
    memory_mib: int
    #: Memory slices an instance takes, and where it may start.
    size: int
    starts: tuple[int, ...]
    compute_slices: int
    #: Most instances of this profile on one card.
    count_max: int


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One physical GPU as its node reports it."""

    uuid: DeviceUuid
    #: Position on the node at the time of the report; for people only.
    index: int
    #: The driver's name, such as "NVIDIA H100 80GB HBM3".
    model: str
    #: Memory that jobs may use: the card's, less what the driver reserves.
    memory_mib: int
    #: Ways of cutting it that this node can carry out.
    modes: tuple[Mode, ...]
    #: Memory slices and compute slices under MIG; 0 where it has none.
    mig_slices: int = 0
    mig_compute_slices: int = 0
    mig_profiles: tuple[MigProfileFacts, ...] = ()
    #: Most processes under MPS at once, in whichever way it is cut; 0: there is no MPS.
    mps_clients_max: int = 48
    pci_bus_id: str = ""
    numa_node: int = -1
    #: UUIDs of cards reached over NVLink, and how many links to each.
    nvlinks: tuple[tuple[DeviceUuid, int], ...] = ()
    healthy: bool = True
    #: Why it is not, in words.
    fault: str = ""
    #: Memory slices under MIG that somebody outside the yard holds, as (first, how many): nothing can be made there.
    mig_taken: tuple[tuple[int, int], ...] = ()
    #: What is special about it and no fault, in words.
    note: str = ""
    #: What lies between it and the node's other cards on PCIe, by UUID: `same-board`, `same-switch`, `switches`,
    #: `host-bridge`, `numa-node` or `system`, from near to far.
    pcie_peers: tuple[tuple[DeviceUuid, str], ...] = ()
    #: How long it takes to go into MIG mode or out of it, ms; 0: nothing that matters, or it never does.
    mig_switch_ms: int = 0

    def mps_clients_in(self, compute_slices: int) -> int:
        """Most processes under MPS in a MIG instance of so many compute slices: its part of the card's."""
        return self.mps_clients_max * compute_slices // max(1, self.mig_compute_slices)

    @property
    def short_model(self) -> str:
        """`H100` out of "NVIDIA H100 80GB HBM3"."""
        words = [word for word in self.model.replace("-", " ").split() if word.upper() not in _NOISE]
        return words[0] if words else self.model


_NOISE = {"NVIDIA", "TESLA", "GEFORCE", "QUADRO", "GRAPHICS", "DEVICE"}


def model_matches(model: str, wanted: str) -> bool:
    """Whether a card's name answers to what a person calls it: every word wanted is a word of the name."""
    have = {word.lower() for word in model.replace("-", " ").split()}
    return all(word in have for word in wanted.lower().replace("-", " ").split())


def share_of(card_memory_mib: int, need: ResourceNeed) -> tuple[int, int]:
    """(share_milli, memory_mib) of a share on a card of this size; the dimension not asked follows the other."""
    milli, memory = need.share_milli, need.share_memory_mib
    if not memory:
        memory = card_memory_mib * milli // MILLI
    if not milli:
        milli = min(MILLI, -(-memory * MILLI // max(1, card_memory_mib)))
    return milli, memory
