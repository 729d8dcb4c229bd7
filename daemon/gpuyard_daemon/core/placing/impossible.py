"""What no node could ever run, even empty and up: found out when it is asked for, not after a week of waiting.

The answer names the resource that is missing and the nearest that exists. It depends on the inventories alone, and is
remembered until one of them changes.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Reason, Shape
from gpuyard_daemon.core.placing.gangs import offer_of
from gpuyard_protocol.names import Tenant, User, nearest
from gpuyard_protocol.resources import Device, ResourceNeed
from gpuyard_protocol.units import format_mib, format_milli

_Key: TypeAlias = tuple[ResourceNeed, int, Tenant, User]
_KNOWN_MAX = 4096


class Missing(NamedTuple):
    """What the yard does not have, for an answer."""

    #: Of the request's field.
    path: str
    found: str
    expected: str
    #: The nearest that exists, "" where there is none.
    nearest: str
    text: str


class Possibilities:
    """Findings about requests, for the present inventories."""

    __slots__ = ("_known", "_version")

    def __init__(self) -> None:
        self._known: dict[_Key, Missing | None] = {}
        self._version = -1

    def missing(self, pool: Pool, need: ResourceNeed, replicas: int, tenant: Tenant, user: User) -> Missing | None:
        """What the yard lacks for such a request; None if nothing, or if there is no node yet to compare with."""
        if self._version != pool.inventory_version or len(self._known) > _KNOWN_MAX:
            self._known.clear()
            self._version = pool.inventory_version
        key = (need, replicas, tenant, user)
        if key not in self._known:
            self._known[key] = _find_missing(pool, Shape(need, replicas, tenant, user))
        return self._known[key]


def _find_missing(pool: Pool, shape: Shape) -> Missing | None:
    spaces = [space for space in pool.spaces.values() if space.node.inventory is not None]
    if not spaces:
        return None
    suited = [space for space in spaces if shape.eligible(space)[0] is None]
    if not suited:
        order = list(Reason)
        furthest = max([shape.eligible(space)[0] or Reason.NO_GPU for space in spaces], key=order.index)
        return _describe(furthest, shape, [space for space in spaces if shape.eligible(space)[0] is furthest])
    members = 0
    by_domain: dict[int, int] = {}
    for space in suited:
        if len(offer_of(space, shape, shape.replicas, empty=True).partitions) == shape.replicas:
            return None
        room = len(offer_of(space, shape, shape.replicas, spanning=True, empty=True).partitions)
        domain = int(pool.domains(shape.need.within)[space.node.number - 1]) if shape.need.within else 0
        by_domain[domain] = by_domain.get(domain, 0) + room
        members = max(members, by_domain[domain])
        if members >= shape.replicas:
            return None
    return _too_many(shape, members, suited)


def _too_many(shape: Shape, members: int, suited: list[NodeSpace]) -> Missing:
    what = shape.need.describe()
    if shape.replicas == 1 or not members:
        text = f"no node has {what} together with its CPUs and memory, even empty"
        return Missing("$", what, "less per replica", "", text)
    where = f"one {shape.need.within} of the yard" if shape.need.within else "the yard"
    text = f"{where} holds at most {members} replicas of {what} at once, even empty; {shape.replicas} were asked for"
    return Missing("$.replicas", str(shape.replicas), f"at most {members}", str(members), text)


def _describe(reason: Reason, shape: Shape, nearest_spaces: list[NodeSpace]) -> Missing:
    """`nearest_spaces`: the nodes that lack nothing but this."""
    need = shape.need
    inventories = [space.node.inventory for space in nearest_spaces if space.node.inventory is not None]
    match reason:
        case Reason.NODE_NOT_NAMED:
            names = {space.node.id for space in nearest_spaces} | {inventory.hostname for inventory in inventories}
            return _one_of("$.nodes", ", ".join(need.nodes), need.nodes[0], sorted(names), "no such node has joined")
        case Reason.LABEL_MISSING:
            wanted = [f"{name}={value}" for name, value in need.node_labels]
            labels = sorted({f"{name}={value}" for inventory in inventories for name, value in inventory.labels})
            return _one_of("$.node_labels", ", ".join(wanted), wanted[0], labels, "no node carries these labels")
        case Reason.NO_ACCOUNT:
            who = f"{shape.tenant}/{shape.user}"
            return Missing("$", who, "a user with an account on some node", "", f"no node has an account for {who}")
        case Reason.NO_ENGINE:
            text = "no node runs container images (podman or docker; for turns on a card podman)"
            return Missing("$.image", "an image", "a command on the host", "", text)
        case Reason.AGENT_TOO_OLD:
            known = {each for inventory in inventories for each in inventory.abilities}
            asked = next((each for each in need.abilities if each not in known), need.abilities[0])
            field = "launcher" if asked == "torchrun" else asked
            text = f"every agent is of an older version and does not know {field!r}: upgrade one that may run it"
            return Missing(f"$.{field}", f"{field!r}", "a job without it", "", text)
        case Reason.NO_GPU:
            return Missing("$", need.describe(), "CPU only", "", "no node has a GPU")
        case Reason.TOO_FEW_CARDS:
            most = str(max(len(shape.eligible(space)[1]) for space in nearest_spaces))
            return _at_most("$.gpus", need.describe(), most, "cards on one node")
        case Reason.TOO_FEW_CPUS:
            most = format_milli(max(inventory.cpu_milli for inventory in inventories))
            return _at_most("$.cpus", format_milli(need.cpu_milli), most, "CPU cores")
        case Reason.TOO_LITTLE_MEMORY:
            most = format_mib(max(inventory.memory_mib for inventory in inventories))
            return _at_most("$.memory", format_mib(need.memory_mib), most, "memory")
        case _:
            return _describe_cards(reason, need, [device for each in inventories for device in each.devices])


def _describe_cards(reason: Reason, need: ResourceNeed, devices: list[Device]) -> Missing:
    match reason:
        case Reason.MODEL_MISSING:
            models = sorted({device.short_model for device in devices})
            found = "|".join(need.models)
            return _one_of("$.gpu_model", found, need.models[0], models, "no node has such a GPU")
        case Reason.CARD_TOO_SMALL:
            wanted = max(need.card_memory_mib, need.share_memory_mib)
            path = "$.gpu_memory" if need.share_memory_mib == wanted else "$.gpu_model"
            most = format_mib(max(device.memory_mib for device in devices))
            return _at_most(path, format_mib(wanted), most, "memory of one card")
        case Reason.PROFILE_MISSING:
            profiles = sorted({profile.name for device in devices for profile in device.mig_profiles})
            return _one_of("$.mig", need.mig, need.mig, profiles, "no card offers this MIG profile")
        case _ if need.mps:
            text = (
                f"no card can give {need.describe()}: such an instance serves fewer processes, or its node has no MPS"
            )
            return Missing("$.gpu_processes", str(need.gpu_processes), "fewer, or a larger instance", "", text)
        case _:
            modes = ", ".join(sorted({mode for device in devices for mode in device.modes})) or "no mode"
            text = f"no card can give {need.describe()}: cards offer {modes}"
            return Missing("$.isolation", need.isolation, "another isolation", "", text)


def _at_most(path: str, found: str, most: str, what: str) -> Missing:
    return Missing(path, found, f"at most {most}", most, f"no node has {found} ({what}): the most is {most}")


def _one_of(path: str, found: str, wanted: str, known: list[str], text: str) -> Missing:
    near = nearest(wanted, known)
    shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    hint = f"; did you mean {near}?" if near else f"; there is: {shown}" if shown else ""
    return Missing(
        path, found, f"one of: {shown}" if shown else "nothing: there is none", near, f"{text}: {found}{hint}"
    )
