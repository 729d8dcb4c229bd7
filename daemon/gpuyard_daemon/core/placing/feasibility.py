"""Does a need fit a node? Yes, and how snugly, or no, and the reason.

One function answers placement, `why` and the check for impossible requests, so that what the yard says and what it does
cannot differ. It looks at one replica and one node; gangs and the choice between nodes are made above.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING

from gpuyard_daemon.core.placing.capacity import ANY_MODE, NodeSpace
from gpuyard_daemon.core.placing.partitions import Card, cut, fit, geometry_of, mode_for
from gpuyard_daemon.core.state.model import CONTAINERS, account_of
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.names import JobId, Tenant, User
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import (
    Device,
    Mode,
    NoGpu,
    Partition,
    ResourceNeed,
    WholeCards,
    model_matches,
    share_domain_of,
    share_of,
)
from gpuyard_protocol.units import MILLI

if TYPE_CHECKING:
    from gpuyard_daemon.core.placing.scoring import Way


class Reason(StrEnum):
    """Why a replica does not fit a node. The value is the code that programs see.

    In the order in which a node is asked: the later the reason, the nearer the node came.
    """

    # What the node is: no amount of waiting changes it.
    NODE_NOT_NAMED = "NodeNotNamed"
    LABEL_MISSING = "LabelMissing"
    NO_ACCOUNT = "NoAccount"
    NO_ENGINE = "NoContainerEngine"
    AGENT_TOO_OLD = "AgentTooOld"
    NO_GPU = "NoGpu"
    MODEL_MISSING = "ModelMissing"
    CARD_TOO_SMALL = "CardTooSmall"
    TOO_FEW_CARDS = "TooFewCards"
    PROFILE_MISSING = "MigProfileMissing"
    MODE_MISSING = "ModeMissing"
    TOO_FEW_CPUS = "TooFewCpus"
    TOO_LITTLE_MEMORY = "TooLittleMemory"
    # How the node is now.
    NOT_JOINED = "NodeNotJoined"
    SUSPECTED = "NodeSuspected"
    LOST = "NodeLost"
    INCOMPATIBLE = "NodeIncompatible"
    CARDS_UNHEALTHY = "CardsUnhealthy"
    CORDONED = "NodeCordoned"
    ENGINE_AVOIDED = "ContainersAvoided"
    ACCOUNT_AVOIDED = "AccountAvoided"
    MODE_AVOIDED = "ModeAvoided"
    # What others hold.
    CPUS_BUSY = "CpusBusy"
    MEMORY_BUSY = "MemoryBusy"
    CARDS_BUSY = "CardsBusy"
    PROFILE_BUSY = "MigSlicesBusy"
    SHARE_BUSY = "SharesBusy"
    #: A card is free, and has gone into MIG mode or out of it so lately that it stays so for now.
    SWITCHED_LATELY = "ModeSwitchCoolDown"
    #: There is room, and it is kept for a job that goes first. Told by `survey`; `judge` gives what it sees beside it.
    CLAIMED = "PlacesKept"


#: Reasons that waiting cannot cure.
LASTING = frozenset(
    {
        Reason.NODE_NOT_NAMED, Reason.LABEL_MISSING, Reason.NO_ACCOUNT, Reason.NO_ENGINE, Reason.NO_GPU,
        Reason.MODEL_MISSING, Reason.CARD_TOO_SMALL, Reason.TOO_FEW_CARDS, Reason.PROFILE_MISSING, Reason.MODE_MISSING,
        Reason.TOO_FEW_CPUS, Reason.TOO_LITTLE_MEMORY, Reason.AGENT_TOO_OLD,
    }
)  # fmt: skip

#: Reasons of a node that takes nothing of the kind now, whoever holds what there.
CLOSED = frozenset(
    {
        Reason.NOT_JOINED, Reason.SUSPECTED, Reason.LOST, Reason.INCOMPATIBLE, Reason.CORDONED,
        Reason.ENGINE_AVOIDED, Reason.ACCOUNT_AVOIDED, Reason.MODE_AVOIDED,
    }
)  # fmt: skip

_BY_STATE = {
    "joining": Reason.NOT_JOINED,
    "suspected": Reason.SUSPECTED,
    "lost": Reason.LOST,
    "incompatible": Reason.INCOMPATIBLE,
}


class Shape:
    """What equal jobs have in common: if one does not fit, none does."""

    __slots__ = (
        "_eligible", "_ways", "domain", "need", "open_to_all", "replicas", "tenant", "timeslice_milli_max", "user",
    )  # fmt: skip

    def __init__(
        self,
        need: ResourceNeed,
        replicas: int,
        tenant: Tenant,
        user: User,
        timeslice_milli_max: int = 4000,
        *,
        domain: Tenant | None = None,
        open_to_all: bool = False,
    ) -> None:
        self.need = need
        self.replicas = replicas
        self.tenant = tenant
        self.user = user
        #: Whose shared cards it may join.
        self.domain = share_domain_of(tenant, need.share_domain) if domain is None else domain
        #: For whoever has an account everywhere: accounts are not asked for.
        self.open_to_all = open_to_all
        self.timeslice_milli_max = timeslice_milli_max
        #: By kind of node (of a shape that names nodes, by number and inventory version): what the node as such says,
        #: and positions of the cards in question.
        self._eligible: dict[int | tuple[int, int], tuple[Reason | None, tuple[int, ...]]] = {}
        #: By the modes that a node may be asked for: how a card that looks so would serve it, by the look's number. A
        #: memo of `scoring`.
        self._ways: dict[tuple[Mode, ...], dict[int, Way | None]] = {}

    def learn_with(self, other: Shape) -> None:
        """Share what is found out about inventories and cards with a shape of the same need and owner."""
        self._eligible, self._ways = other._eligible, other._ways

    def ways_on(self, modes: tuple[Mode, ...]) -> dict[int, Way | None]:
        """What is known of cards, by the numbers of their looks."""
        known = self._ways.get(modes)
        if known is None:
            known = self._ways[modes] = {}
        return known

    def eligible(self, space: NodeSpace) -> tuple[Reason | None, tuple[int, ...]]:
        """What the node's inventory says: a lasting reason, or the cards that the shape could use."""
        key = (space.node.number, space.inventory_version) if self.need.nodes else space.kind
        known = self._eligible.get(key)
        if known is None:
            known = self._eligible[key] = _eligible_cards(self, space)
        return known


def judge(space: NodeSpace, shape: Shape, *, spanning: bool = False, owner: JobId = 0) -> int | Reason:
    """How much would be left over (smaller: snugger) if one replica went there now, or why it cannot.

    `spanning`: the replica belongs to a gang over several nodes, which is never time-sliced. `owner`: the job whose
    claims do not stand in its way; those of others always do.
    """
    reason = could_go(space, shape, owner=owner)
    if reason is not None:
        return reason
    _, positions = shape.eligible(space)
    if space.claims:
        space = space.beside_claims(owner)
    need = shape.need
    if not need.wants_gpu:
        # Away from the GPUs where possible, then where the CPUs are fullest.
        if "idle" not in space.modes:
            return Reason.MODE_AVOIDED
        return space.idle_cards * MILLI + _cpu_left(space, need)
    if need.gpus:
        if "whole" not in space.modes:
            return Reason.MODE_AVOIDED
        idle = len(positions) if space.idle_cards == len(space.cards) else _count_idle(space, positions)
        if idle >= need.gpus:
            return (idle - need.gpus) * MILLI + _cpu_left(space, need)
        return _cards_reason(space, positions, need.gpus)
    return _judge_cards(space, shape, positions, spanning)


def could_go(space: NodeSpace, shape: Shape, *, owner: JobId = 0) -> Reason | None:
    """What of a node but its cards stands in the way; None if nothing does."""
    reason, _ = shape.eligible(space)
    if reason is not None:
        return reason
    if space.claims:
        space = space.beside_claims(owner)
    node, need = space.node, shape.need
    if node.state != "ready" and not space.is_imagined:
        return _BY_STATE[node.state]
    if node.cordoned_by and not space.is_imagined:
        return Reason.CORDONED
    if space.shut:
        if need.containers and CONTAINERS in space.shut:
            return Reason.ENGINE_AVOIDED
        if account_of(need, shape.tenant, shape.user) in space.shut:
            return Reason.ACCOUNT_AVOIDED
    if space.cpu_free_milli < need.cpu_milli:
        return Reason.CPUS_BUSY
    if space.memory_free_mib < need.memory_mib:
        return Reason.MEMORY_BUSY
    return None


def _cpu_left(space: NodeSpace, need: ResourceNeed) -> int:
    """Free CPU afterwards in thousandths of the node's: a last tie-breaker, below every card."""
    inventory = space.node.inventory
    total = inventory.cpu_milli if inventory else 0
    return (space.cpu_free_milli - need.cpu_milli) * (MILLI - 1) // total if total else 0


def _count_idle(space: NodeSpace, positions: tuple[int, ...]) -> int:
    if len(positions) == len(space.cards):
        return space.idle_cards
    cards = space.cards
    return sum([1 for position in positions if cards[position].mode == "idle" and cards[position].takes_work])


def _cards_reason(space: NodeSpace, positions: tuple[int, ...], wanted: int) -> Reason:
    if sum([1 for position in positions if space.cards[position].is_unused]) >= wanted:
        return Reason.SWITCHED_LATELY
    usable = sum(1 for position in positions if space.cards[position].device.healthy)
    return Reason.CARDS_UNHEALTHY if usable < wanted else Reason.CARDS_BUSY


def _judge_cards(space: NodeSpace, shape: Shape, positions: tuple[int, ...], spanning: bool) -> int | Reason:
    modes = modes_for(space, spanning=spanning)
    best = _snuggest(space, shape, positions, modes)
    if best is not None:
        # Between equal cards, the node with fewer idle ones: the others stay whole.
        return best[0] * 64 + min(63, space.idle_cards)
    cards = [space.cards[position] for position in positions]
    if not any(card.device.healthy for card in cards):
        return Reason.CARDS_UNHEALTHY
    if any(card.is_unused and card.keeps_mode for card in cards):
        return Reason.SWITCHED_LATELY
    if len(modes) < len(ANY_MODE) and all(mode_for(card, shape.need, modes) is None for card in cards):
        return Reason.MODE_MISSING if spanning and modes is not space.modes else Reason.MODE_AVOIDED
    return Reason.PROFILE_BUSY if shape.need.mig else Reason.SHARE_BUSY


def modes_for(space: NodeSpace, *, spanning: bool) -> tuple[Mode, ...]:
    return tuple([mode for mode in space.modes if mode != "timeslice"]) if spanning else space.modes


def _snuggest(
    space: NodeSpace, shape: Shape, positions: tuple[int, ...], modes: tuple[Mode, ...]
) -> tuple[int, int] | None:
    """(left over, position) of the card that a share or MIG instance fits best; None if none has room."""
    cards, need, tenant, most = space.cards, shape.need, shape.domain, shape.timeslice_milli_max
    best: tuple[int, int] | None = None
    tried: Card | None = None
    for position in positions:
        card = cards[position]
        if card.mode == "idle" and card.takes_work:
            # Idle cards of one kind fit alike: the first answers for all.
            if (
                tried is not None
                and tried.geometry is card.geometry
                and tried.device.memory_mib == card.device.memory_mib
                and tried.keeps_mode == card.keeps_mode
            ):
                continue
            tried = card
        left = fit(card, need, tenant, modes, most)
        if left >= 0 and (best is None or left < best[0]):
            best = (left, position)
    return best


def carve(space: NodeSpace, shape: Shape, *, spanning: bool = False, owner: JobId = 0) -> Partition:
    """The partition for a replica that `judge` let in."""
    need = shape.need
    _, positions = shape.eligible(space)
    if space.claims:
        space = space.beside_claims(owner)
    if not need.wants_gpu:
        return NoGpu()
    if need.gpus:
        return carve_from(space, shape, whole_cards(space, positions, need.gpus)[0], spanning=spanning)
    best = _snuggest(space, shape, positions, modes_for(space, spanning=spanning))
    if best is None:
        raise InvariantViolated(f"node {space.node.id} was judged to fit {need.describe()} and has no card for it")
    return carve_from(space, shape, (best[1],), spanning=spanning)


def carve_from(space: NodeSpace, shape: Shape, cards: tuple[int, ...], *, spanning: bool = False) -> Partition:
    """The partition for a replica on cards that were chosen for it, by position."""
    need = shape.need
    if not need.wants_gpu:
        return NoGpu()
    if need.gpus:
        return WholeCards(devices=tuple([space.cards[position].device.uuid for position in cards]))
    return cut(space.cards[cards[0]], need, modes_for(space, spanning=spanning))


def whole_cards(space: NodeSpace, positions: tuple[int, ...], count: int) -> tuple[tuple[int, ...], bool]:
    """(idle cards to take whole, as far as there are any; whether each reaches each over links): the best linked."""
    idle = tuple([p for p in positions if space.cards[p].mode == "idle" and space.cards[p].takes_work])
    if space.wiring is None:
        return tuple(sorted(sorted(idle, key=lambda p: space.cards[p].switch_milli("whole"))[:count])), True
    return space.wiring.pick(idle, min(count, len(idle)))


def least_milli(need: ResourceNeed, devices: Iterable[Device]) -> int:
    """The least compute that one replica will count for on any of these cards; 0 where none could serve it."""
    if need.gpus:
        return need.gpus * MILLI
    if not need.wants_gpu:
        return 0
    amounts: list[int] = []
    for device in devices:
        if need.models and not any(model_matches(device.model, model) for model in need.models):
            continue
        geometry = geometry_of(device)
        profile = geometry.profiles.get(need.mig) if need.mig else None
        if need.is_share:
            profile = geometry.covering(need.share_milli, need.share_memory_mib) if need.isolation != "none" else None
            if need.isolation != "hard":
                amounts.append(share_of(device.memory_mib, need)[0])
            elif profile is None:
                amounts.append(MILLI)
        if profile is not None:
            amounts.append(profile.compute_slices * MILLI // max(1, device.mig_compute_slices))
    return min(amounts, default=0)


# --- what an inventory says ------------------------------------------------------------------------------------------


def _eligible_cards(shape: Shape, space: NodeSpace) -> tuple[Reason | None, tuple[int, ...]]:
    inventory = space.node.inventory
    if inventory is None:
        return Reason.NOT_JOINED, ()
    need = shape.need
    positions: tuple[int, ...] = ()
    reason = _node_reason(shape, space, inventory)
    if reason is None and need.wants_gpu:
        reason, positions = _suitable_cards(need, space)
    if reason is None and inventory.cpu_milli < need.cpu_milli:
        reason = Reason.TOO_FEW_CPUS
    if reason is None and inventory.memory_mib < need.memory_mib:
        reason = Reason.TOO_LITTLE_MEMORY
    return reason, positions


def _suitable_cards(need: ResourceNeed, space: NodeSpace) -> tuple[Reason | None, tuple[int, ...]]:
    present = [card for card in space.cards if card.present]
    if not present:
        return Reason.NO_GPU, ()
    if need.models:
        present = [card for card in present if any(model_matches(card.device.model, model) for model in need.models)]
        if not present:
            return Reason.MODEL_MISSING, ()
    memory = max(need.card_memory_mib, need.share_memory_mib)
    present = [card for card in present if card.device.memory_mib >= memory]
    if not present:
        return Reason.CARD_TOO_SMALL, ()
    if need.gpus:
        usable = [card for card in present if "whole" in card.device.modes]
        return (Reason.TOO_FEW_CARDS if len(usable) < need.gpus else None), tuple([card.position for card in usable])
    usable = [card for card in present if _could_serve(card, need)]
    if usable:
        return None, tuple([card.position for card in usable])
    lacks_profile = need.mig and not any(need.mig in card.geometry.profiles for card in present)
    return (Reason.PROFILE_MISSING if lacks_profile else Reason.MODE_MISSING), ()


def _could_serve(card: Card, need: ResourceNeed) -> bool:
    """Whether the card, empty, could serve a share or MIG instance."""
    if mode_for(Card(card.device, 0), need, ("whole", "mig", "mps", "timeslice")) is None:
        return False
    return bool(need.mig) or share_of(card.device.memory_mib, need)[1] <= card.device.memory_mib


def _node_reason(shape: Shape, space: NodeSpace, inventory: Inventory) -> Reason | None:
    need = shape.need
    if need.nodes and space.node.id not in need.nodes and inventory.hostname not in need.nodes:
        return Reason.NODE_NOT_NAMED
    if need.node_labels:
        labels = dict(inventory.labels)
        if any(labels.get(name) != value for name, value in need.node_labels):
            return Reason.LABEL_MISSING
    accounts = inventory.accounts
    if not shape.open_to_all and not any(_account_matches(each, shape.tenant, shape.user) for each in accounts):
        return Reason.NO_ACCOUNT
    if need.containers and not _can_contain(need, inventory.container_engine):
        return Reason.NO_ENGINE
    if need.abilities and not set(need.abilities) <= set(inventory.abilities):
        return Reason.AGENT_TOO_OLD
    return None


def _can_contain(need: ResourceNeed, engine: str) -> bool:
    """Turns on a card need containers that can be halted, which are podman's alone."""
    return engine == "podman" or (engine == "docker" and not (need.is_share and need.isolation == "none"))


def _account_matches(pattern: str, tenant: Tenant, user: User) -> bool:
    """`acme/*`, `*/alice`, `acme/alice`, `*/*`."""
    for_tenant, _, for_user = pattern.partition("/")
    return for_tenant in ("*", tenant) and for_user in ("*", "", user)
