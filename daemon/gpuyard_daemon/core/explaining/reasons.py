"""Reasons in words: what nodes say to a shape, what cards say to it, and what a key's terms mean.

The reasons themselves are found where placement finds them (`feasibility`, `partitions`); here is only how to say them.
"""

from __future__ import annotations

from collections import Counter

from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.placing.feasibility import Reason, Shape, modes_for
from gpuyard_daemon.core.placing.partitions import Card, fit, mode_for
from gpuyard_daemon.core.queueing.priority import CLASS_LEVELS
from gpuyard_daemon.core.queueing.ranking import BORROWING, FLOOR, NOMINAL, SCAVENGING, RankTerms
from gpuyard_protocol.explaining import KeyTerm
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import JobId
from gpuyard_protocol.resources import Mode, share_of
from gpuyard_protocol.units import MILLI, format_mib, format_milli, format_ms

# --- nodes -----------------------------------------------------------------------------------------------------------


def text_of(reason: Reason, shape: Shape) -> str:
    """The reason in words, for any node that gives it."""
    need = shape.need
    match reason:
        case Reason.NODE_NOT_NAMED:
            return f"it asks for {', '.join(need.nodes)}"
        case Reason.LABEL_MISSING:
            return f"it asks for nodes with {', '.join(f'{name}={value}' for name, value in need.node_labels)}"
        case Reason.NO_ACCOUNT:
            return f"no account for {shape.tenant}/{shape.user}"
        case Reason.TOO_FEW_CPUS:
            return f"fewer than {format_milli(need.cpu_milli)} CPU cores"
        case Reason.TOO_LITTLE_MEMORY:
            return f"less than {format_mib(need.memory_mib)} of memory"
        case Reason.MODEL_MISSING:
            return f"no {'|'.join(need.models)}"
        case Reason.CARD_TOO_SMALL:
            return f"no card with {format_mib(max(need.card_memory_mib, need.share_memory_mib))}"
        case Reason.TOO_FEW_CARDS:
            return f"fewer than {need.gpus} such cards" if need.gpus > 1 else "no such card"
        case Reason.PROFILE_MISSING:
            return f"no card offers MIG profile {need.mig}"
        case Reason.MODE_MISSING if need.mig:
            return f"no card can give {need.describe()}"
        case Reason.MODE_MISSING:
            return f"no card can be shared with isolation {need.isolation}"
        case Reason.ACCOUNT_AVOIDED:
            return (
                f"the node had no account for {'shares of ' if need.is_share else ''}{shape.tenant}/{shape.user} lately"
            )
        case Reason.CPUS_BUSY:
            return f"fewer than {format_milli(need.cpu_milli)} CPU cores free"
        case Reason.MEMORY_BUSY:
            return f"less than {format_mib(need.memory_mib)} of memory free"
        case Reason.CARDS_BUSY:
            return f"fewer than {need.gpus} such cards free" if need.gpus > 1 else "no such card free"
        case Reason.PROFILE_BUSY:
            return f"no free slices for {need.mig}"
        case Reason.SHARE_BUSY:
            return f"no card with room for {need.describe()} of tenant {shape.tenant}"
        case _:
            return _TEXTS.get(reason, reason.value)


_TEXTS = {
    Reason.NO_ENGINE: "it runs no container images, or not of this kind",
    Reason.AGENT_TOO_OLD: "its agent is of an older version, which does not know what the job asks for",
    Reason.NO_GPU: "no GPU",
    Reason.NOT_JOINED: "the node's agent has not joined",
    Reason.SUSPECTED: "the node has not been heard of for some seconds",
    Reason.LOST: "the node is lost",
    Reason.INCOMPATIBLE: "the node's agent speaks another version",
    Reason.CORDONED: "an operator keeps new work away from it (cordoned)",
    Reason.CARDS_UNHEALTHY: "its cards are not healthy",
    Reason.ENGINE_AVOIDED: "the node could not run a container lately",
    Reason.MODE_AVOIDED: "the node could not set up such a partition lately",
    Reason.SWITCHED_LATELY: "a card there went into MIG mode or out of it lately, and stays as it is for now",
    Reason.CLAIMED: "what is free there is kept for a job that goes first",
}


# --- cards -----------------------------------------------------------------------------------------------------------


_UNHEALTHY = Why("CardUnhealthy", "not healthy")
_KEPT = Why("CardKept", "kept for a job that goes first")
_WHOLE = Why("HeldWhole", "held whole")
_SWITCHED = Why("ModeSwitchCoolDown", "free, and stays for now in the mode that it switched to lately")
_UNSUITED = Why("CardUnsuited", "of another kind than it asks for")


def count_cards(
    counts: Counter[Why], space: NodeSpace, shape: Shape, verdict: int | Reason, nodes: int, owner: JobId
) -> None:
    """Add what each card of so many equal nodes says to one replica."""
    space = space.beside_claims(owner)
    present = [card for card in space.cards if card.present]
    reason, positions = shape.eligible(space)
    if reason is not None:
        counts[_of_the_node(reason, shape)] += nodes * len(present)
        return
    if space.node.state != "ready" or space.node.cordoned_by:
        counts[Why("NodeNotReady", "on a node that takes no work now")] += nodes * len(present)
        return
    usable = frozenset(positions)
    modes = modes_for(space, spanning=shape.replicas > 1)
    for card in present:
        if card.position not in usable:
            counts[_UNSUITED] += nodes
        else:
            counts[_say(card, shape, modes, verdict)] += nodes


def _of_the_node(reason: Reason, shape: Shape) -> Why:
    if reason in (Reason.MODEL_MISSING, Reason.CARD_TOO_SMALL, Reason.PROFILE_MISSING, Reason.MODE_MISSING):
        return _UNSUITED
    return Why("NodeUnsuited", "on a node that it cannot go to")


def _say(card: Card, shape: Shape, modes: tuple[Mode, ...], verdict: int | Reason) -> Why:
    """What one card that could serve the shape says now."""
    need = shape.need
    if card.mode == "whole":
        return _WHOLE
    if not card.takes_work:
        return _KEPT if card.device.healthy else _UNHEALTHY
    if card.is_unused and card.keeps_mode:
        has_room = card.mode == "idle" if need.gpus else fit(card, need, shape.domain, modes, MILLI) >= 0
        if not has_room:
            return _SWITCHED
    if need.gpus:
        if card.mode != "idle":
            return Why("Shared", f"cut for {card.mode.upper()}" if card.mode != "timeslice" else "shared in time")
        free = Why("Free", "free")
        return free if not isinstance(verdict, Reason) else Why("FreeOfTooFew", _beside(verdict, shape))
    if fit(card, need, shape.domain, modes, shape.timeslice_milli_max) >= 0:
        if not isinstance(verdict, Reason):
            return Why("Free", "with room for it")
        return Why("FreeOfTooFew", _beside(verdict, shape))
    if card.mode == "idle":
        return Why("ModeAvoided", "free, but the node could not cut it so lately")
    return _shared(card, shape, modes)


def _beside(verdict: Reason, shape: Shape) -> str:
    """A free card on a node that has no place all the same."""
    if verdict is Reason.CARDS_BUSY:
        return f"free, on nodes with fewer than {shape.need.gpus} free"
    return f"free, on nodes with {text_of(verdict, shape)}"


def _shared(card: Card, shape: Shape, modes: tuple[Mode, ...]) -> Why:
    """Why a card that is cut already has no room for a share or instance."""
    need = shape.need
    mode = mode_for(card, need, modes)
    if card.mode != mode:
        how = {"mig": "cut for MIG", "mps": "shared by MPS", "timeslice": "shared in time"}[card.mode]
        return Why("CutOtherwise", f"{how}, which this request cannot use")
    if mode in ("mps", "timeslice") and card.domain != shape.domain:
        return Why("OtherTenant", "shared by another tenant")
    if mode == "mig":
        return Why("SlicesTaken", "cut for MIG, without the slices it needs")
    milli, memory = share_of(card.device.memory_mib, need)
    if card.memory_mib + memory > card.device.memory_mib:
        return Why("MemoryTaken", f"shared, with less than {format_mib(memory)} of memory left")
    if mode == "mps" and card.milli + milli > MILLI:
        return Why("ComputeTaken", f"shared, with less than {format_milli(milli)} of the compute left")
    return Why("ClientsTaken", "shared by as many processes as it can serve")


# --- the place in line -----------------------------------------------------------------------------------------------

_BANDS = {
    FLOOR: "a service's least replicas",
    NOMINAL: "within its quota",
    BORROWING: "borrows what others do not use",
    SCAVENGING: "takes what is left over",
}
_SIZES = {
    "estimate": "as its owner estimates",
    "history": "as jobs like it took",
    "attained": "which it has had so far",
    "probe": "short until it has shown otherwise",
    "service": "a service has no size",
}


def key_terms(terms: RankTerms) -> tuple[KeyTerm, ...]:
    """Every term of a key, those that make the level with their sign; what has no words here is shown by its name."""
    order = "smaller goes first; of equals who came first, of those who came together the larger"
    shown = [KeyTerm("level", str(terms.level), order)]
    for name, value in terms._asdict().items():
        if name != "size_from":
            shown.append(_term(name, value, terms))
    return tuple(shown)


def _term(name: str, value: object, terms: RankTerms) -> KeyTerm:
    """One term, as what it adds to the level if it does."""
    match name, value:
        case "band", int(band):
            return KeyTerm(name, str(band), _BANDS.get(band, ""))
        case "natural", int(level):
            return KeyTerm(name, f"{level:+}", f"its size: {_size_text(terms)}")
        case "tenant_shift", int(shift):
            where = "above" if shift > 0 else "below" if shift else "at"
            return KeyTerm(name, f"{shift:+}", f"its tenant is {where} its share of the yard")
        case "aging", int(lift):
            return KeyTerm(name, f"{-lift:+}", "it has waited")
        case "deadline", int(lift):
            return KeyTerm(name, f"{-lift:+}", "its deadline is near")
        case "user_class", int(chosen):
            return KeyTerm(name, f"{-CLASS_LEVELS * chosen:+}", f"priority {chosen}")
        case "at_top", bool(at_top):
            return KeyTerm(name, "yes" if at_top else "no", "waited long enough to go before all who have not")
        case _, int(amount) if name.endswith("_gpu_ms"):
            return KeyTerm(name, str(amount), f"{_words(name.removesuffix('_gpu_ms'))}: {_on_one_gpu(amount)}")
        case _:
            return KeyTerm(name, str(value), _words(name))


def _size_text(terms: RankTerms) -> str:
    return f"{_on_one_gpu(terms.size_gpu_ms)}, {_SIZES.get(terms.size_from, terms.size_from)}"


def _on_one_gpu(gpu_ms: int) -> str:
    return f"{format_ms(gpu_ms // 1000 * 1000)} on one GPU"


def _words(name: str) -> str:
    return name.replace("_", " ")
