"""Queues and their quotas: a tree in which each queue has a nominal part, may borrow, and lends what it does not use.

A *grant* is for one model of card and one kind of sharing, or for any. A queue is held to its grants, and so is every
queue above it: something starts only if used + wanted stays within nominal + borrow limit at each of them, and if it
leaves alone what other queues do not lend. What a queue uses counts at all queues above it, and is kept up to date as
places come and go, so a question costs the depth of the tree.

*Band.* A job is within quota if it stays within nominal at the nearest queue, from its own upwards, that has a grant
for such cards. Beyond that it borrows. Queues of scavengers take what nobody wants. Where no queue has a grant,
everybody shares one queue without quota.

Who may have back what another queue holds says `reclaim`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gpuyard_daemon.core.tenants.policy import DEFAULT_QUEUE, Grant, Kind, Policy, QueuePolicy
from gpuyard_protocol.names import Tenant
from gpuyard_protocol.nodes import IdleGpu

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.model import Job

#: Compute in thousandths of a card, by model and kind of sharing.
Amounts: TypeAlias = dict[tuple[str, Kind], int]
#: The yard itself, above all queues.
ROOT = ""
#: Questions about a place in a queue that are remembered.
_WAYS_MAX = 4096


class Allotment:
    """A grant of a queue, and how much of it is used."""

    __slots__ = (
        "borrow_milli", "kind", "lend_milli", "model", "nominal_milli", "reserve_milli", "unlent_milli", "used_milli",
    )  # fmt: skip

    def __init__(self, grant: Grant) -> None:
        self.model, self.kind = grant.model, grant.kind
        self.nominal_milli = grant.nominal_milli
        #: -1: as much as others leave.
        self.borrow_milli = grant.borrow_milli
        self.lend_milli = grant.lend_milli
        #: What is kept for the queue itself though it does not use it.
        self.reserve_milli = 0 if grant.lend_milli < 0 else max(0, grant.nominal_milli - grant.lend_milli)
        #: By this queue and those below it.
        self.used_milli = 0
        #: Reserved and unused by queues below.
        self.unlent_milli = 0

    def covers(self, model: str, kind: str) -> bool:
        """Whether it is for such cards."""
        return self.model in ("", model) and self.kind in ("", kind)

    def part_of(self, amounts: Mapping[tuple[str, Kind], int]) -> int:
        return sum([milli for (model, kind), milli in amounts.items() if self.covers(model, kind)])

    @property
    def idle_reserve_milli(self) -> int:
        return max(0, self.reserve_milli - self.used_milli)

    def most_milli(self) -> int | None:
        """None: no limit."""
        return None if self.borrow_milli < 0 else self.nominal_milli + self.borrow_milli

    @property
    def room_milli(self) -> int:
        """How much more may be held, where there is a limit, beside what queues below keep for themselves."""
        return self.nominal_milli + self.borrow_milli - self.used_milli - self.unlent_milli


#: Grants from a queue upwards, each with those of the queue above its own.
_Path: TypeAlias = "list[tuple[Allotment, list[Allotment]]]"


class Queue:
    """A queue of the tree."""

    __slots__ = ("_covering", "_upwards", "allotments", "idle", "is_scavenger", "name", "parent", "weight")

    def __init__(self, policy: QueuePolicy) -> None:
        self.name = policy.name
        self.parent: Queue | None = None
        self.weight = max(1, policy.weight)
        self.is_scavenger = policy.scavenger
        self.idle = policy.idle
        self.allotments = [Allotment(grant) for grant in policy.grants]
        #: Which of them are for such cards. A memo.
        self._covering: dict[tuple[str, Kind], list[Allotment]] = {}
        self._upwards: tuple[Queue, ...] = ()

    def upwards(self) -> tuple[Queue, ...]:
        """It and all above it, once the tree stands."""
        if not self._upwards:
            found: list[Queue] = []
            queue: Queue | None = self
            while queue is not None:
                found.append(queue)
                queue = queue.parent
            self._upwards = tuple(found)
        return self._upwards

    def covering(self, amounts: Amounts) -> list[tuple[Allotment, int]]:
        """Its grants that such a place counts towards, and with how much."""
        if len(amounts) == 1:
            [(key, milli)] = amounts.items()
            known = self._covering.get(key)
            if known is None:
                known = self._covering[key] = [each for each in self.allotments if each.covers(*key)]
            return [(allotment, milli) for allotment in known] if milli else []
        found = [(allotment, allotment.part_of(amounts)) for allotment in self.allotments]
        return [(allotment, milli) for allotment, milli in found if milli]


class Obstacle(NamedTuple):
    """What a quota says against a place."""

    queue: str
    allotment: Allotment
    wanted_milli: int
    #: Of that, what the queue below keeps for itself anyway.
    own_milli: int = 0


class _Step(NamedTuple):
    """A grant on the way up."""

    queue: str
    allotment: Allotment
    milli: int
    #: Grants of the queue below that are for a part of it, each with what it would hold.
    below: tuple[tuple[Allotment, int], ...]


class Way:
    """From a queue up to the yard, for what one place counts for: the same question asked again and again.

    Good until the policy changes.
    """

    __slots__ = ("_guarantor", "_steps", "guaranteed_by", "has_quotas", "names")

    def __init__(self, tree: QuotaTree, name: str, amounts: Amounts) -> None:
        self.has_quotas = tree.has_quotas
        steps: list[_Step] = []
        below: list[tuple[Allotment, int]] = []
        #: All queues on it.
        self.names = tuple([queue.name for queue in tree.queues[name].upwards()])
        self._guarantor: list[tuple[Allotment, int]] = []
        #: The queue whose nominal part says whether the place is borrowed; "": none does.
        self.guaranteed_by = ""
        for queue in tree.queues[name].upwards():
            mine = queue.covering(amounts)
            if mine and not self._guarantor and queue.name != ROOT:
                self._guarantor, self.guaranteed_by = mine, queue.name
            for allotment, milli in mine:
                inner = tuple([(each, part) for each, part in below if within(each, allotment)])
                steps.append(_Step(queue.name, allotment, milli, inner))
            below = mine
        self._steps = tuple(steps)

    def obstacle(self) -> Obstacle | None:
        """As `QuotaTree.obstacle`."""
        for queue, allotment, milli, below in self._steps:
            if allotment.borrow_milli >= 0:
                own = 0
                for each, part in below:
                    if each.reserve_milli > each.used_milli:
                        own += min(part, each.reserve_milli - each.used_milli)
                if milli - own > allotment.room_milli:
                    return Obstacle(queue, allotment, milli, own)
        return None

    def is_nominal(self, *, held: bool = False) -> bool:
        """As `QuotaTree.within_nominal`."""
        if not self.has_quotas:
            return True
        for allotment, milli in self._guarantor:
            if allotment.used_milli + (0 if held else milli) > allotment.nominal_milli:
                return False
        return bool(self._guarantor)


class QuotaTree:
    """All queues, and what is used of their grants."""

    __slots__ = (
        "_eased",
        "_names",
        "_paths",
        "_queue_of_tenant",
        "_root",
        "_scavengers",
        "_ways",
        "capacity_version",
        "has_quotas",
        "is_plain",
        "queues",
        "version",
    )

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}
        self._queue_of_tenant: dict[Tenant, str] = {}
        #: Grows with each policy.
        self.version = 0
        self._root = Queue(QueuePolicy(name=ROOT))
        #: Any queue has a grant; no queue has, and none is of scavengers.
        self.has_quotas = False
        self.is_plain = True
        #: Queues that use less since this was last asked.
        self._eased: set[str] = set()
        #: Memos, good until the policy changes: what was asked for with `way`; by queue and what a place is, the grants
        #: that it counts towards, each with those of the queue above that cover it; and the queues' names upwards.
        self._ways: dict[tuple[str, tuple[tuple[tuple[str, Kind], int], ...]], Way] = {}
        self._paths: dict[tuple[str, tuple[str, Kind]], _Path] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        #: Of the pool, when its cards were counted last.
        self.capacity_version = -1
        self.set_policy(Policy(), {})

    def set_policy(self, policy: Policy, capacity: Mapping[str, int]) -> None:
        """Make the tree that a policy says, unused; whoever calls enters what is held. `capacity`: by model."""
        self.version += 1
        self._ways.clear()
        self._paths.clear()
        self._names.clear()
        self.queues = {each.name: Queue(each) for each in policy.queues}
        self.queues.setdefault(DEFAULT_QUEUE, Queue(QueuePolicy(name=DEFAULT_QUEUE)))
        self._root = Queue(QueuePolicy(name=ROOT))
        for each in policy.queues:
            self.queues[each.name].parent = self.queues.get(each.parent, self._root)
        for queue in self.queues.values():
            queue.parent = queue.parent or self._root
        self._queue_of_tenant = {name: limits.queue for name, limits in policy.tenants if limits.queue}
        self._queue_of_tenant[""] = policy.default.queue or DEFAULT_QUEUE
        self.has_quotas = any(queue.allotments for queue in self.queues.values())
        above = {name: list(queue.upwards()) for name, queue in self.queues.items()}
        self._scavengers = {name for name, queues in above.items() if any(queue.is_scavenger for queue in queues)}
        self.is_plain = not self.has_quotas and not self._scavengers
        self._eased.update(self.queues)
        models = {allotment.model for queue in self.queues.values() for allotment in queue.allotments}
        self._root.allotments = [Allotment(Grant(model=model, borrow_milli=0)) for model in sorted(models)]
        for queue in self.queues.values():
            for allotment in queue.allotments:
                for over in _above(queue, allotment):
                    over.unlent_milli += allotment.idle_reserve_milli
        self.set_capacity(capacity)

    def set_capacity(self, capacity: Mapping[str, int]) -> None:
        """The yard's cards changed: what it has itself bounds what can be borrowed beside what is not lent."""
        for allotment in self._root.allotments:
            have = capacity.get(allotment.model, 0) if allotment.model else sum(capacity.values())
            # Cards are counted where they are: here is only kept what somebody does not lend.
            keeps = any(within(each, allotment) and each.reserve_milli for each in self._all_below_root())
            allotment.nominal_milli, allotment.borrow_milli = have, (0 if keeps else -1)
        self._eased.add(ROOT)

    def _all_below_root(self) -> Iterator[Allotment]:
        for queue in self.queues.values():
            if queue.parent is self._root:
                yield from queue.allotments

    # --- whose -------------------------------------------------------------------------------------------------------

    def queue_name(self, tenant: Tenant, asked: str) -> str:
        """The queue that a job of a tenant stands in; one that is no more stands for the default queue."""
        name = asked or self._queue_of_tenant.get(tenant) or self._queue_of_tenant[""]
        return name if name in self.queues else DEFAULT_QUEUE

    def queue_of(self, job: Job) -> str:
        return self.queue_name(job.tenant, job.spec.queue)

    def idle_rule(self, tenant: Tenant, asked: str) -> IdleGpu | None:
        """Of the queue, or of the nearest one above it that has one."""
        queue = self.queues[self.queue_name(tenant, asked)]
        return next((each.idle for each in queue.upwards() if each.idle is not None), None)

    def may_use(self, tenant: Tenant, asked: str) -> bool:
        """A tenant's jobs go to its own queue, or to one below it."""
        own = self.queue_name(tenant, "")
        return any(queue.name == own for queue in self.queues[asked].upwards())

    # --- what is used ------------------------------------------------------------------------------------------------

    def take(self, name: str, amounts: Amounts) -> None:
        self._count(name, amounts, 1)

    def give(self, name: str, amounts: Amounts) -> None:
        self._count(name, amounts, -1)
        if self.has_quotas:
            names = self._names.get(name)
            if names is None:
                names = self._names[name] = tuple([queue.name for queue in self.queues[name].upwards()])
            self._eased.update(names)

    def _count(self, name: str, amounts: Amounts, sign: int) -> None:
        if not self.has_quotas:
            return
        if len(amounts) == 1:
            [(place, milli)] = amounts.items()
            if milli:
                for allotment, above in self._path(name, place):
                    self._use(allotment, sign * milli, above)
            return
        for queue in self.queues[name].upwards():
            for allotment, milli in queue.covering(amounts):
                self._use(allotment, sign * milli, _above(queue, allotment))

    def _path(self, name: str, place: tuple[str, Kind]) -> _Path:
        """Grants from a queue upwards that a place of one model and kind counts towards."""
        key = (name, place)
        path = self._paths.get(key)
        if path is None:
            path = self._paths[key] = [
                (allotment, _above(queue, allotment))
                for queue in self.queues[name].upwards()
                for allotment in queue.allotments
                if allotment.covers(*place)
            ]
        return path

    def _use(self, allotment: Allotment, change: int, above: list[Allotment]) -> None:
        if not allotment.reserve_milli:
            allotment.used_milli += change
            return
        before = allotment.idle_reserve_milli
        allotment.used_milli += change
        if kept := allotment.idle_reserve_milli - before:
            for each in above:
                each.unlent_milli += kept

    def allotments(self, name: str) -> list[Allotment]:
        """The grants of a queue, or of the yard."""
        return self.queues[name].allotments if name else self._root.allotments

    def take_eased(self) -> set[str]:
        """Queues (and the yard, "") that may have more room than when this was last asked."""
        eased, self._eased = self._eased, set()
        return eased

    # --- may it start ------------------------------------------------------------------------------------------------

    def obstacle(self, name: str, amounts: Amounts, less: Mapping[str, Amounts] | None = None) -> Obstacle | None:
        """What keeps so much more from being held in a queue; None if nothing does.

        `less`: by queue, what is taken to be given back.
        """
        if not self.has_quotas:
            return None
        if not less:
            return self.way(name, amounts).obstacle()
        below: list[tuple[Allotment, int]] = []
        for queue in self.queues[name].upwards():
            mine = queue.covering(amounts)
            gone = [given for giver, given in less.items() if queue in self.queues[giver].upwards()]
            for allotment, milli in mine:
                most = allotment.most_milli()
                if most is not None:
                    # What the queue below keeps for itself is there for its own jobs.
                    own = sum([min(part, each.idle_reserve_milli) for each, part in below if within(each, allotment)])
                    used = allotment.used_milli - sum(map(allotment.part_of, gone))
                    if used + allotment.unlent_milli - own + milli > most:
                        return Obstacle(queue.name, allotment, milli, own)
            below = mine
        return None

    def never(self, name: str, amounts: Amounts) -> Obstacle | None:
        """What would keep so much from being held in a queue though nothing else were."""
        if not self.has_quotas:
            return None
        for queue in self.queues[name].upwards():
            for allotment, milli in queue.covering(amounts):
                most = allotment.most_milli()
                if queue is not self._root and most is not None and milli > most:
                    return Obstacle(queue.name, allotment, milli)
        return None

    def way(self, name: str, amounts: Amounts) -> Way:
        """For a question that will be asked often."""
        key = (name, tuple(amounts.items()))
        way = self._ways.get(key)
        if way is None:
            if len(self._ways) >= _WAYS_MAX:
                self._ways.clear()
            way = self._ways[key] = Way(self, name, amounts)
        return way

    # --- bands -------------------------------------------------------------------------------------------------------

    def is_scavenger(self, name: str) -> bool:
        return name in self._scavengers

    def within_nominal(self, name: str, amounts: Amounts, *, held: bool = False) -> bool:
        """Whether a place stays within nominal at the queue that guarantees it. `held`: it is counted already."""
        return not self.has_quotas or self.way(name, amounts).is_nominal(held=held)

    def guaranteed_milli(self, name: str, amounts: Amounts, otherwise: int) -> int:
        """What a queue is guaranteed of such cards, by itself or those above; `otherwise`, where nobody has a quota."""
        if not self.has_quotas:
            return otherwise
        return min([allotment.nominal_milli for allotment, _ in self._guarantor(name, amounts)], default=0)

    def _guarantor(self, name: str, amounts: Amounts) -> list[tuple[Allotment, int]]:
        for queue in self.queues[name].upwards():
            if queue is not self._root and (found := queue.covering(amounts)):
                return found
        return []

    # --- reclaim -----------------------------------------------------------------------------------------------------

    def sides(self, one: str, other: str) -> tuple[Queue, Queue] | None:
        """The queues beside each other, one above or at each, that part the two; None if one stands above the other."""
        above = list(self.queues[one].upwards())
        places = {queue.name: at for at, queue in enumerate(above)}
        below: Queue | None = None
        for queue in self.queues[other].upwards():
            at = places.get(queue.name)
            if at is not None:
                return (above[at - 1], below) if at and below is not None else None
            below = queue
        return None


def _above(queue: Queue, allotment: Allotment) -> list[Allotment]:
    """Grants of the queue above one that are also for what one of its grants is for."""
    return [each for each in queue.parent.allotments if within(allotment, each)] if queue.parent is not None else []


def within(inner: Allotment, outer: Allotment) -> bool:
    """Whether one grant is for a part of what another is for."""
    return outer.model in ("", inner.model) and outer.kind in ("", inner.kind)
