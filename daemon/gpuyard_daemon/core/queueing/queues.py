"""Where waiting jobs stand: buckets of one level, queues of one shape and owner, and those who are looked at together.

Plain containers: what moves between them, and when, is `order`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import TypeAlias

from msgspec.structs import replace

from gpuyard_daemon.core.placing.capacity import Pool
from gpuyard_daemon.core.placing.feasibility import Shape, least_milli
from gpuyard_daemon.core.placing.gangs import Offers, fits
from gpuyard_daemon.core.placing.partitions import sample_of
from gpuyard_daemon.core.placing.placement import Candidates, Finder
from gpuyard_daemon.core.queueing.priority import shifted
from gpuyard_daemon.core.queueing.ranking import TOP_LEVEL, need_milli, number_in
from gpuyard_daemon.core.tenants.quota import Way
from gpuyard_protocol.names import JobId, Tenant, User
from gpuyard_protocol.resources import ResourceNeed

ShapeKey: TypeAlias = tuple[ResourceNeed, int, Tenant, User]

#: Numbers at the front of a bucket that are gone, before it is made anew without them.
_GONE_MAX = 64


class Bucket:
    """Jobs of one level by their sequences, in order."""

    __slots__ = ("_first", "_sequences")

    def __init__(self) -> None:
        self._sequences: list[int] = []
        #: Those before this position are gone.
        self._first = 0

    def __len__(self) -> int:
        return len(self._sequences) - self._first

    @property
    def head(self) -> JobId:
        return number_in(self._sequences[self._first])

    @property
    def least(self) -> int:
        """The first's sequence."""
        return self._sequences[self._first]

    def add(self, sequence: int) -> None:
        sequences = self._sequences
        if not sequences or sequences[-1] < sequence:
            sequences.append(sequence)
        else:
            insort(sequences, sequence, self._first)

    def add_all(self, sequences: list[int]) -> None:
        """In any order."""
        self._sequences = sorted([*self._sequences[self._first :], *sequences])
        self._first = 0

    def remove(self, sequence: int) -> None:
        place = bisect_left(self._sequences, sequence, self._first)
        if place == self._first:
            self._first += 1
            if self._first > _GONE_MAX and self._first * 2 > len(self._sequences):
                del self._sequences[: self._first]
                self._first = 0
        else:
            del self._sequences[place]

    def before(self, sequence: int) -> int:
        """How many go before a place in the order."""
        return bisect_left(self._sequences, sequence, self._first) - self._first

    def first(self, most: int) -> list[int]:
        return self._sequences[self._first : self._first + most]


class ShapeQueue:
    """Waiting jobs of one shape, tenant and user, and the nodes they fit."""

    __slots__ = (
        "_finder", "_least", "_limited", "apart", "asked", "barriers", "buckets", "candidates", "entry", "group",
        "held_back", "is_over_quota", "is_scavenger", "key", "number", "ready_key", "service", "shape", "spanning",
        "together", "ways", "ways_version", "width_milli",
    )  # fmt: skip

    def __init__(self, key: ShapeKey, number: int, timeslice_milli_max: int, finder: Finder | None = None) -> None:
        self.key = key
        #: What it stands under in the line; the queue of the quota tree that its jobs ask for, and their service.
        self.entry: tuple[object, ...] = key
        self.asked = self.service = ""
        self.number = number
        self.shape = Shape(*key, timeslice_milli_max)
        self._finder = finder
        #: GPUs that one of its jobs takes at once, in thousandths of a card.
        self.width_milli = self.shape.replicas * need_milli(self.shape.need)
        #: The same on some models of card only, where a quota leaves no others.
        self._limited: dict[tuple[str, ...], ShapeQueue] = {}
        self.candidates = Candidates(self.shape, finder)
        #: The same for a member of a gang over several nodes.
        self.spanning = Candidates(self.shape, finder, spanning=True)
        #: What nodes could take of a gang, as a whole and in parts.
        self.together = Offers(self.candidates, spanning=False)
        self.apart = Offers(self.spanning, spanning=True)
        #: What a job of this shape counts for at least, against its tenant's limit; for these inventories.
        self._least: tuple[int, int] = (-1, 0)
        #: By level, without the tenant's shift; none is empty.
        self.buckets: dict[int, Bucket] = {}
        #: Those that fit the same nodes as it does; None: not looked up yet.
        self.group: Group | None = None
        #: Its tenant, or its queue of the quota tree, was at its limit when last looked at.
        self.held_back = False
        #: With that: a queue of the quota tree is, and not the tenant.
        self.is_over_quota = False
        #: The limits that hold it back: any of them lets it on.
        self.barriers: tuple[Barrier, ...] = ()
        #: Key of the one entry that counts in its group, or where it is held back; -1: none does.
        self.ready_key = -1
        #: Up the quota tree, with what a job counts for on each model of card that could serve it; for these versions
        #: of the tree and of the inventories.
        self.ways: tuple[Way, ...] = ()
        self.ways_version: tuple[int, int] = (-1, -1)
        self.is_scavenger = False

    def least_milli(self, pool: Pool) -> int:
        """What a job of this shape counts for at least, against its tenant's limit, on the cards that there are."""
        if self._least[0] != pool.inventory_version:
            least = least_milli(self.shape.need, [sample_of(kind) for kind in pool.card_kinds])
            self._least = (pool.inventory_version, self.shape.replicas * least)
        return self._least[1]

    def limited_to(self, models: tuple[str, ...]) -> ShapeQueue:
        """The same shape on some models of card only; it holds no jobs."""
        limited = self._limited.get(models)
        if limited is None:
            key = (replace(self.shape.need, models=models), *self.key[1:])
            limited = ShapeQueue(key, self.number, self.shape.timeslice_milli_max, self._finder)
            self._limited[models] = limited
        return limited

    @property
    def blocked(self) -> bool:
        """It fitted nowhere, or was at a limit, when last looked at."""
        return self.held_back or (self.group is not None and self.group.blocked)

    def add(self, sequence: int, level: int) -> None:
        bucket = self.buckets.get(level)
        if bucket is None:
            bucket = self.buckets[level] = Bucket()
        bucket.add(sequence)

    def add_all(self, sequences: list[int], level: int) -> None:
        """The same for many, in any order."""
        bucket = self.buckets.get(level)
        if bucket is None:
            bucket = self.buckets[level] = Bucket()
        bucket.add_all(sequences)

    def remove(self, sequence: int, level: int) -> None:
        bucket = self.buckets[level]
        bucket.remove(sequence)
        if not bucket:
            del self.buckets[level]

    def first_level(self, shift: int) -> int:
        """The level, without its tenant's shift, of whoever is first in it with the shift; somebody is in it."""
        buckets = self.buckets
        level = min(buckets)
        if shift < 0 and level != TOP_LEVEL and len(buckets) > 1:
            # Other levels may have become one with it: then whoever came first is first.
            shown = shifted(level, shift)
            alike = [each for each in buckets if shifted(each, shift) == shown]
            level = min(alike, key=lambda each: buckets[each].least)
        return level

    def fits_nowhere(self, pool: Pool) -> bool:
        """No node takes it; of a gang: the nodes together do not."""
        if self.shape.replicas > 1:
            return not fits(pool, self.together, self.apart)
        return self.candidates.best(pool) is None


class Source(ABC):
    """Queues of which the first goes on, by their heads."""

    __slots__ = ("heads", "keep", "number", "ready_key")

    def __init__(self, number: int) -> None:
        self.number = number
        #: (packed rank of a head, number of its queue), a heap. Most entries that do not count any more go when they
        #: come to the top; the others, when there are more than so many.
        self.heads: list[tuple[int, int]] = []
        self.keep = 64
        #: Key of its one entry in the line that counts; -1: none does.
        self.ready_key = -1

    @abstractmethod
    def has(self, queue: ShapeQueue) -> bool:
        """Whether the queue stands here now."""


class Group(Source):
    """Queues of all tenants that fit the same nodes: when one fits nowhere, none does."""

    __slots__ = ("blocked",)

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.blocked = False

    def has(self, queue: ShapeQueue) -> bool:
        return queue.group is self and not queue.held_back


class Barrier(Source):
    """Queues that need as much room under a limit, and are let on, one after the other, when there is so much."""

    __slots__ = ("ceiling", "need")

    def __init__(self, number: int, ceiling: Ceiling, need: int) -> None:
        super().__init__(number)
        self.ceiling = ceiling
        self.need = need

    def has(self, queue: ShapeQueue) -> bool:
        return queue.held_back and self in queue.barriers

    @property
    def is_open(self) -> bool:
        return self.ceiling.room() >= self.need


class Ceiling:
    """A limit, of a tenant or of a grant in the quota tree: who waits for room under it."""

    __slots__ = ("barriers", "needs", "room")

    def __init__(self, room: Callable[[], int]) -> None:
        #: How much more may be held.
        self.room = room
        #: By the room that they wait for, and those amounts in order.
        self.barriers: dict[int, Barrier] = {}
        self.needs: list[int] = []

    def add(self, barrier: Barrier) -> None:
        self.barriers[barrier.need] = barrier
        insort(self.needs, barrier.need)

    def remove(self, barrier: Barrier) -> None:
        """Nobody stands there."""
        del self.barriers[barrier.need]
        self.needs.remove(barrier.need)

    def opened(self) -> list[Barrier]:
        """Those for which there is room now."""
        room, found = self.room(), []
        for need in self.needs:
            if need > room:
                break
            found.append(self.barriers[need])
        return found
