"""Which job next: the order of `ranking`, kept so that nothing is sorted again; what does not fit lets others pass.

Jobs of equal shape, tenant and user stand in one queue, in buckets of equal level; a bucket is ordered by sequence.
Queues of all tenants that fit the same nodes form a group. The queue whose head ranks first goes first; when it fits
nowhere, its group is blocked as a whole, and looked at again only when a node changed, by asking once for all of it; a
queue that is at a limit is held back until the limit eases. So neither a long queue nor many tenants nor a full yard
make a turn slow: the work is per shape and changed node, not per waiting job.

What time moves is noted on a wheel: a job that has waited long enough costs one move to the next bucket. What moves a
whole tenant (its shift, its band) changes one entry per queue of the tenant, because inside a queue it moves everybody
alike.

Derived from `Cluster.waiting`, read through its list of changes; nothing here is saved, and nothing here may matter to
the outcome: levels, and which queues are blocked, follow from the state and the time.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

from msgspec.structs import replace

from gpuyard_daemon.core.placing.capacity import Pool
from gpuyard_daemon.core.placing.feasibility import Shape, least_milli
from gpuyard_daemon.core.placing.gangs import Offers, fits
from gpuyard_daemon.core.placing.partitions import sample_of
from gpuyard_daemon.core.placing.placement import Candidates, Finder
from gpuyard_daemon.core.queueing.ranking import TOP_LEVEL, Rank, number_in, sequence_of
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import capacity_by_model
from gpuyard_protocol.names import JobId, Tenant, User
from gpuyard_protocol.resources import ResourceNeed

ShapeKey: TypeAlias = tuple[ResourceNeed, int, Tenant, User]

#: Whose limit a queue is held back by.
TENANT: Final = "tenant"
QUOTA: Final = "queue"
#: Queues kept although empty, with what they learnt about nodes.
_IDLE_QUEUES_MAX = 256
#: Jobs that time moves in one turn; more of one moment are moved in the turns that follow.
_MOVES_PER_TURN = 1000
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

    def add(self, sequence: int) -> None:
        sequences = self._sequences
        if not sequences or sequences[-1] < sequence:
            sequences.append(sequence)
        else:
            insort(sequences, sequence, self._first)

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
        "_finder", "_least", "_limited", "apart", "buckets", "candidates", "entry", "group", "held_back",
        "is_over_quota", "key",
        "number", "ready_key", "shape", "spanning", "together",
    )  # fmt: skip

    def __init__(self, key: ShapeKey, number: int, timeslice_milli_max: int, finder: Finder | None = None) -> None:
        self.key = key
        #: What it stands under in the line.
        self.entry: tuple[object, ...] = key
        self.number = number
        self.shape = Shape(*key, timeslice_milli_max)
        self._finder = finder
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
        #: Key of the one entry in its group that counts; -1: none does.
        self.ready_key = -1

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

    def remove(self, sequence: int, level: int) -> None:
        bucket = self.buckets[level]
        bucket.remove(sequence)
        if not bucket:
            del self.buckets[level]

    def fits_nowhere(self, pool: Pool) -> bool:
        """No node takes it; of a gang: the nodes together do not."""
        if self.shape.replicas > 1:
            return not fits(pool, self.together, self.apart)
        return self.candidates.best(pool) is None


class Group:
    """Queues of all tenants that fit the same nodes: when one fits nowhere, none does."""

    __slots__ = ("blocked", "heads", "number", "ready_key")

    def __init__(self, number: int) -> None:
        self.number = number
        #: (packed rank of a head, number of its queue), a heap.
        self.heads: list[tuple[int, int]] = []
        self.blocked = False
        #: Key of its one entry in the line that counts; -1: none does.
        self.ready_key = -1


class _Stand(NamedTuple):
    """Where a waiting job stands."""

    queue: ShapeQueue
    sequence: int
    #: Without the tenant's shift.
    level: int
    #: When time moves it on; 0: never.
    moves_ms: int


class WaitingLine:
    """All queues, and the order between their heads."""

    def __init__(self, cluster: Cluster, timeslice_milli_max: int) -> None:
        self._cluster = cluster
        self._timeslice_milli_max = timeslice_milli_max
        self._finder = Finder(cluster.demand)
        self._queues: dict[tuple[object, ...], ShapeQueue] = {}
        self._by_number: dict[int, ShapeQueue] = {}
        self._numbers = 0
        #: More queues than this, and those that are empty go.
        self._drop_at = _IDLE_QUEUES_MAX
        self._stands: dict[JobId, _Stand] = {}
        self._groups: dict[tuple[object, ...], Group] = {}
        self._group_by_number: dict[int, Group] = {}
        #: Of the pool, when queues were put into groups.
        self._groups_version = -1
        #: (packed rank of the head, number of the group), of groups that are not blocked, a heap.
        self._ready: list[tuple[int, int]] = []
        self._blocked: dict[int, Group] = {}
        #: Queues that are at a limit, by what must ease before they are looked at again: their tenant's or a queue's.
        self._held_back: dict[tuple[str, str], list[ShapeQueue]] = {}
        #: Those among them that might count for less on another card: they are looked at when nodes change, too.
        self._costly: list[ShapeQueue] = []
        #: Of the pool, when blocked queues were last looked at.
        self._changes_seen = -1
        #: Jobs by the moment at which time moves them, those moments (a heap), and how many entries that makes.
        self._wheel: dict[int, list[JobId]] = {}
        self._moments: list[int] = []
        self._noted = 0
        cluster.line_changes = None

    # --- keeping up --------------------------------------------------------------------------------------------------

    def catch_up(self, now_ms: int) -> None:
        """Take in who began or ceased to wait and whom time moved; unblock the queues that changed nodes may serve."""
        cluster = self._cluster
        pool = cluster.pool
        if self._groups_version != pool.inventory_version:
            self._regroup()
        if cluster.quota.has_quotas and cluster.quota.capacity_version != pool.inventory_version:
            cluster.quota.capacity_version = pool.inventory_version
            cluster.quota.set_capacity(capacity_by_model(pool))
        self._follow(now_ms)
        everybody, eased = cluster.tenancy.take_eased()
        keys = {(TENANT, tenant) for tenant in eased}
        queues_eased = cluster.quota.take_eased()
        keys.update([(QUOTA, name) for name in queues_eased])
        for key in sorted(self._held_back if everybody else keys & self._held_back.keys()):
            self._release(self._held_back.pop(key))
        if queues_eased or cluster.fairness.changed:
            cluster.fairness.changed.clear()
            self._rank_anew()
        changes = pool.changes_made
        if everybody or changes != self._changes_seen:
            costly, self._costly = self._costly, []
            self._release(costly)
        if changes != self._changes_seen:
            self._changes_seen = changes
            self._unblock()
        if len(self._queues) > self._drop_at:
            self._drop_idle()
            # Whoever is left stays for a while: most of many queues have somebody in them.
            self._drop_at = max(_IDLE_QUEUES_MAX, 2 * len(self._queues))

    def _follow(self, now_ms: int) -> None:
        """Make the buckets those of the jobs that wait now."""
        cluster = self._cluster
        waiting = cluster.waiting
        if (changes := cluster.line_changes) is None:
            changes = [*(self._stands.keys() - waiting.keys()), *waiting]
        cluster.line_changes = []
        for number in changes:
            self._drop(number)
            if (job := waiting.get(number)) is not None:
                self._enter(job, now_ms)
        moments = self._moments
        left = _MOVES_PER_TURN
        while moments and moments[0] <= now_ms and left:
            moment = moments[0]
            numbers = self._wheel[moment]
            while numbers and left:
                left -= 1
                self._noted -= 1
                number = numbers.pop()
                stand = self._stands.get(number)
                if stand is not None and stand.moves_ms == moment:
                    self._drop(number)
                    if (job := waiting.get(number)) is not None:
                        self._enter(job, now_ms)
            if not numbers:
                heapq.heappop(moments)
                del self._wheel[moment]
        if self._noted > 1024 + 2 * len(self._stands):
            self._wind_up_anew()

    def queue_of(self, job: Job) -> ShapeQueue:
        spec = job.spec
        key = (spec.need, spec.least_replicas, job.tenant, job.user)
        # What else the band depends on.
        entry = (*key, spec.queue, job.service)
        queue = self._queues.get(entry)
        if queue is None:
            self._numbers += 1
            queue = ShapeQueue(key, self._numbers, self._timeslice_milli_max, self._finder)
            queue.entry = entry
            self._queues[entry] = self._by_number[queue.number] = queue
        return queue

    def _enter(self, job: Job, now_ms: int) -> None:
        queue = self.queue_of(job)
        level, moves_ms = self._cluster.ranking.standing_of(job, now_ms)
        sequence = sequence_of(job)
        queue.add(sequence, level)
        self._stands[job.id] = _Stand(queue, sequence, level, moves_ms)
        if moves_ms:
            self._note(moves_ms, job.id)
        if not queue.held_back:
            key = self._key(level, job)
            if queue.ready_key < 0 or key < queue.ready_key:
                self._make_ready(queue, key)

    def _drop(self, number: JobId) -> None:
        stand = self._stands.pop(number, None)
        if stand is not None:
            stand.queue.remove(stand.sequence, stand.level)

    def _note(self, moment: int, number: JobId) -> None:
        """Time will move a job."""
        if moment not in self._wheel:
            self._wheel[moment] = []
            heapq.heappush(self._moments, moment)
        self._wheel[moment].append(number)
        self._noted += 1

    def _wind_up_anew(self) -> None:
        """Forget the moments of jobs that no longer stand there."""
        self._wheel, self._moments, self._noted = {}, [], 0
        for number, stand in self._stands.items():
            if stand.moves_ms:
                self._note(stand.moves_ms, number)

    def _key(self, level: int, job: Job) -> int:
        ranking = self._cluster.ranking
        if level != TOP_LEVEL:
            level += ranking.shift_of(job)
        return Rank(ranking.band_of(job), level, sequence_of(job)).key

    # groups

    def _group_of(self, queue: ShapeQueue) -> Group:
        if queue.group is None:
            pool, shape = self._cluster.pool, queue.shape
            fits_like: tuple[object, ...] = (shape.replicas, queue.candidates.group(pool))
            if shape.replicas > 1:
                fits_like += (queue.spanning.group(pool),)
            group = self._groups.get(fits_like)
            if group is None:
                self._numbers += 1
                group = self._groups[fits_like] = self._group_by_number[self._numbers] = Group(self._numbers)
            queue.group = group
        return queue.group

    def _regroup(self) -> None:
        """An inventory changed: who fits the same nodes may be another question now. Nobody is blocked any more."""
        self._groups_version = self._cluster.pool.inventory_version
        self._groups.clear()
        self._group_by_number.clear()
        self._ready.clear()
        self._blocked.clear()
        for queue in self._queues.values():
            queue.group, queue.ready_key = None, -1
        self._rank_anew()

    def _rank_anew(self) -> None:
        """Whole tenants moved."""
        for queue in self._queues.values():
            head = None if queue.held_back else self._head(queue)
            if head is not None and head[0] != queue.ready_key:
                self._make_ready(queue, head[0])

    def _make_ready(self, queue: ShapeQueue, key: int) -> None:
        group = self._group_of(queue)
        queue.ready_key = key
        heapq.heappush(group.heads, (key, queue.number))
        if not group.blocked and (group.ready_key < 0 or key < group.ready_key):
            group.ready_key = key
            heapq.heappush(self._ready, (key, group.number))

    def _unblock(self) -> None:
        pool = self._cluster.pool
        for group in list(self._blocked.values()):
            first = self._first(group)
            if first is not None and first[1].fits_nowhere(pool):
                continue
            group.blocked = False
            del self._blocked[group.number]
            if first is not None:
                group.ready_key = first[0]
                heapq.heappush(self._ready, (first[0], group.number))

    def _release(self, queues: list[ShapeQueue]) -> None:
        """Let queues that were held back be looked at again."""
        for queue in queues:
            queue.held_back = False
            if (head := self._head(queue)) is not None:
                self._make_ready(queue, head[0])

    def _first(self, group: Group) -> tuple[int, ShapeQueue, Job] | None:
        """The first of a group, with its packed rank."""
        heads = group.heads
        while heads:
            key, number = heads[0]
            queue = self._by_number.get(number)
            if queue is None or queue.group is not group or queue.ready_key != key or queue.held_back:
                heapq.heappop(heads)
                continue
            head = self._head(queue)
            if head is None:
                queue.ready_key = -1
                heapq.heappop(heads)
            elif head[0] != key:
                queue.ready_key = head[0]
                heapq.heapreplace(heads, (head[0], number))
            else:
                return key, queue, head[1]
        return None

    def _head(self, queue: ShapeQueue) -> tuple[int, Job] | None:
        """The first of a queue that still waits, with its packed rank."""
        waiting = self._cluster.waiting
        while queue.buckets:
            level = min(queue.buckets)
            number = queue.buckets[level].head
            job = waiting.get(number)
            if job is not None:
                return self._key(level, job), job
            self._drop(number)
        return None

    # --- asking ------------------------------------------------------------------------------------------------------

    def next(self) -> tuple[ShapeQueue, Job] | None:
        """The first waiting job whose queue is not blocked."""
        ready = self._ready
        while ready:
            key, number = ready[0]
            group = self._group_by_number.get(number)
            if group is None or group.ready_key != key:
                heapq.heappop(ready)
                continue
            first = self._first(group)
            if first is None:
                group.ready_key = -1
                heapq.heappop(ready)
            elif first[0] != key:
                group.ready_key = first[0]
                heapq.heapreplace(ready, (first[0], number))
            else:
                return first[1], first[2]
        return None

    def block(self, queue: ShapeQueue) -> None:
        """The head of this queue fits nowhere, so nobody who fits the same nodes does, until a node changes."""
        group = self._group_of(queue)
        group.blocked = True
        group.ready_key = -1
        self._blocked[group.number] = group

    def hold_back(self, queue: ShapeQueue, *, costly: bool = False, over: str | None = None) -> None:
        """A limit stands in the way: the tenant's, or that of a queue of the quota tree (`over`).

        `costly`: only with the cards that it would get now.
        """
        queue.held_back = True
        queue.is_over_quota = over is not None
        queue.ready_key = -1
        if costly:
            self._costly.append(queue)
        else:
            key = (TENANT, queue.shape.tenant) if over is None else (QUOTA, over)
            self._held_back.setdefault(key, []).append(queue)

    def blocked_heads(self) -> list[tuple[int, ShapeQueue, Job]]:
        """The first of each queue that fits nowhere, or whose quota others have, with its packed rank; best first."""
        found = [
            (head[0], queue, head[1])
            for queue in self._queues.values()
            if self._lacks_room(queue) and (head := self._head(queue)) is not None
        ]
        return sorted(found, key=lambda entry: entry[0])

    def blocked_queue_of(self, job: Job) -> ShapeQueue | None:
        """The queue of a job that is its head and of those; None for any other."""
        stand = self._stands.get(job.id)
        if stand is None or not self._lacks_room(stand.queue):
            return None
        head = self._head(stand.queue)
        return stand.queue if head is not None and head[1] is job else None

    def first_of(self, queue: ShapeQueue, most: int) -> list[Job]:
        """The first jobs of a queue, in order, at most so many."""
        waiting = self._cluster.waiting
        found: list[Job] = []
        for level in sorted(queue.buckets):
            sequences = queue.buckets[level].first(most - len(found))
            found += [job for each in sequences if (job := waiting.get(number_in(each))) is not None]
            if len(found) >= most:
                break
        return found

    def _lacks_room(self, queue: ShapeQueue) -> bool:
        """It was looked at and others have what it wants: places, or its part of a quota; no limit of its own."""
        if queue.held_back:
            return queue.is_over_quota
        return queue.group is not None and queue.group.blocked

    def ahead_of(self, job: Job, now_ms: int) -> int:
        """How many of those that wait go before a job, which need not wait itself (or exist)."""
        return sum([count for _, _, count in self._ahead(job, now_ms)])

    def those_ahead(self, job: Job, now_ms: int, most: int) -> list[Job]:
        """The first of the line that go before a job, in order, at most so many."""
        waiting, found = self._cluster.waiting, []
        for (band, level), bucket, count in self._ahead(job, now_ms):
            found += [(band, level, sequence) for sequence in bucket.first(min(most, count))]
        return [waiting[Rank(*rank).job] for rank in heapq.nsmallest(most, found)]

    def _ahead(self, job: Job, now_ms: int) -> Iterator[tuple[tuple[int, int], Bucket, int]]:
        """((band, level), bucket, how many of it go before a job), of all buckets with any."""
        self._follow(now_ms)
        ranking, waiting = self._cluster.ranking, self._cluster.waiting
        band_mine, level_mine, sequence = ranking.rank_of(job, now_ms)
        shifts: dict[Tenant, int] = {}
        for queue in self._queues.values():
            buckets = queue.buckets
            if not buckets:
                continue
            one = waiting[next(iter(buckets.values())).head]
            band = ranking.band_of(one)
            if band > band_mine:
                continue
            shift = shifts.get(one.tenant)
            if shift is None:
                shift = shifts[one.tenant] = ranking.shift_of(one)
            for level, bucket in buckets.items():
                shown = level if level == TOP_LEVEL else level + shift
                if band < band_mine or shown < level_mine:
                    yield (band, shown), bucket, len(bucket)
                elif shown == level_mine and (count := bucket.before(sequence)):
                    yield (band, shown), bucket, count

    def _drop_idle(self) -> None:
        for queue in list(self._queues.values()):
            if not queue.held_back and self._head(queue) is None:
                del self._queues[queue.entry], self._by_number[queue.number]
        if len(self._groups) > _IDLE_QUEUES_MAX:
            kept = {id(queue.group) for queue in self._queues.values()}
            for fits_like, group in list(self._groups.items()):
                if id(group) not in kept:
                    del self._groups[fits_like], self._group_by_number[group.number]
                    self._blocked.pop(group.number, None)
