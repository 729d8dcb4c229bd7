"""Which job next: the order of `ranking`, kept so that nothing is sorted again; what does not fit lets others pass.

Jobs of equal shape, tenant and user stand in one queue, in buckets of equal level; a bucket is ordered by sequence.
Queues of all tenants that fit the same nodes form a group. The queue whose head ranks first goes first; when it fits
nowhere, its group is blocked as a whole, and looked at again only when a node changed, by asking once for all of it; a
queue that is at a limit is held back by a barrier (`barriers`) until there is room for it. So neither a long queue nor
many tenants nor a full yard make a turn slow: the work is per shape and changed node, not per waiting job.

What time moves is noted on a wheel: a job that has waited long enough costs one move to the next bucket. What moves a
whole tenant (its shift, its band) changes one entry per queue of the tenant, because inside a queue it moves everybody
alike.

Derived from `Cluster.waiting`, read through its list of changes; nothing here is saved, and nothing here may matter to
the outcome: levels, and which queues are blocked, follow from the state and the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from gpuyard_daemon.core.placing.placement import Finder
from gpuyard_daemon.core.queueing.barriers import Barriers
from gpuyard_daemon.core.queueing.priority import shifted
from gpuyard_daemon.core.queueing.queues import Barrier, Bucket, Group, Source
from gpuyard_daemon.core.queueing.queues import ShapeQueue as ShapeQueue
from gpuyard_daemon.core.queueing.ranking import (
    BORROWING,
    NOMINAL,
    SCAVENGING,
    TOP_LEVEL,
    Rank,
    band_in,
    in_band,
    number_in,
    packed,
    sequence_of,
)
from gpuyard_daemon.core.queueing.wheel import Wheel
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import capacity_by_model
from gpuyard_daemon.core.tenants.quota import Obstacle, Way
from gpuyard_protocol.names import JobId, Tenant, User

#: Queues kept although empty, with what they learnt about nodes.
_IDLE_QUEUES_MAX = 256
#: Jobs that time moves in one turn; more of one moment are moved in the turns that follow.
_MOVES_PER_TURN = 1000


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
        #: How often somebody was found not to fit, or not to be allowed to start.
        self.proofs = 0
        #: More queues than this, and those that are empty go.
        self._drop_at = _IDLE_QUEUES_MAX
        self._stands: dict[JobId, _Stand] = {}
        self._groups: dict[tuple[object, ...], Group] = {}
        #: Groups and barriers.
        self._sources: dict[int, Source] = {}
        #: Of the pool, when queues were put into groups.
        self._groups_version = -1
        #: (packed rank of the head, number of the source), of groups that are not blocked and of barriers that were
        #: open, a heap.
        self._ready: list[tuple[int, int]] = []
        self._blocked: dict[int, Group] = {}
        self._barriers = Barriers(cluster.tenancy)
        #: Of the quota tree and the pool, when limits were last weighed from scratch.
        self._limits_version = (-1, -1)
        #: Queues that are at a limit and might count for less on another card: they are looked at when nodes change.
        self._costly: list[ShapeQueue] = []
        #: Queues by the name of the quota tree's queue that decides on their band, and those of services' replicas.
        self._guaranteed: dict[str, dict[int, ShapeQueue]] = {}
        self._of_services: dict[int, ShapeQueue] = {}
        #: Of the pool, when blocked queues were last looked at.
        self._changes_seen = -1
        #: Whom time will move.
        self._wheel = Wheel()
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
        everybody = self._ease()
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

    def _ease(self) -> bool:
        """Let those on whose limits have room for them now. True: all limits may be others."""
        cluster, quota = self._cluster, self._cluster.quota
        everybody, tenants_eased = cluster.tenancy.take_eased()
        queues_eased = quota.take_eased()
        moved_tenants = cluster.fairness.changed
        version = (quota.version, cluster.pool.inventory_version)
        if everybody or version != self._limits_version:
            self._limits_version = version
            moved_tenants.clear()
            self._release([queue for queue in self._queues.values() if queue.held_back])
            self._barriers.clear()
            self._sources = {number: each for number, each in self._sources.items() if isinstance(each, Group)}
            self._rank_anew(self._queues.values())
            return True
        for name in sorted(queues_eased):
            if any(allotment.idle_reserve_milli for allotment in quota.allotments(name)):
                self._release_below(name)
        for barrier in self._barriers.opened(tenants_eased, queues_eased):
            if barrier.ready_key < 0:
                self._offer_early(barrier)
        moved: dict[int, ShapeQueue] = {}
        for name in queues_eased:
            # Where all of a nominal part is used nobody is within it, whatever was given back.
            if (known := self._guaranteed.get(name)) and any(
                each.used_milli < each.nominal_milli for each in quota.allotments(name)
            ):
                moved |= {queue.number: queue for queue in list(known.values()) if self._is_moved(queue)}
        if queues_eased:
            moved |= self._of_services
        if moved_tenants:
            moved |= {queue.number: queue for queue in self._queues.values() if queue.shape.tenant in moved_tenants}
            moved_tenants.clear()
        self._rank_anew(moved.values())
        return False

    def _release_below(self, name: str) -> None:
        """A queue of the quota tree keeps places for itself that it does not use: those under it may have them."""
        below = [queue for queue in self._queues.values() if queue.held_back and queue.is_over_quota]
        self._release([queue for queue in below if any(name in way.names for way in queue.ways)])

    def _follow(self, now_ms: int) -> None:
        """Make the buckets those of the jobs that wait now."""
        cluster = self._cluster
        waiting = cluster.waiting
        changes, cluster.line_changes = cluster.line_changes, []
        if changes is None:
            self._enter_all(now_ms)
        for number in changes or ():
            self._drop(number)
            if (job := waiting.get(number)) is not None:
                self._enter(job, now_ms)
        for moment, number in self._wheel.due(now_ms, _MOVES_PER_TURN):
            stand = self._stands.get(number)
            if stand is not None and stand.moves_ms == moment:
                self._drop(number)
                if (job := waiting.get(number)) is not None:
                    self._enter(job, now_ms)
        if len(self._wheel) > 1024 + 2 * len(self._stands):
            self._wheel = Wheel([(stand.moves_ms, number) for number, stand in self._stands.items() if stand.moves_ms])

    def queue_of(self, job: Job) -> ShapeQueue:
        spec = job.spec
        key = (spec.need, spec.least_replicas, job.tenant, job.user)
        # What else the band depends on.
        entry = (*key, spec.queue, job.service)
        queue = self._queues.get(entry)
        if queue is None:
            self._numbers += 1
            queue = ShapeQueue(key, self._numbers, self._timeslice_milli_max, self._finder)
            queue.entry, queue.asked, queue.service = entry, spec.queue, job.service
            self._queues[entry] = self._by_number[queue.number] = queue
            if job.service:
                self._of_services[queue.number] = queue
        return queue

    def _enter(self, job: Job, now_ms: int) -> None:
        queue = self.queue_of(job)
        level, moves_ms = self._cluster.ranking.standing_of(job, now_ms)
        sequence = sequence_of(job)
        queue.add(sequence, level)
        self._stands[job.id] = _Stand(queue, sequence, level, moves_ms)
        if moves_ms:
            self._wheel.note(moves_ms, job.id)
        key, known = self._key(queue, level, sequence, job), queue.ready_key
        if known < 0 or key < known or (band_in(known) < band_in(key) and in_band(key, band_in(known)) < known):
            # It is the head now, or all of the queue stands in a better band than it is known by.
            head = self._head(queue)
            self._make_ready(queue, head[0] if head is not None else key)

    def _enter_all(self, now_ms: int) -> None:
        """As if each of those who wait were dropped and entered: for a line that was not told who came and went."""
        ranking, stands = self._cluster.ranking, self._stands
        stands.clear()
        for known in self._queues.values():
            known.buckets.clear()
        self._wheel = Wheel()
        queues: dict[tuple[int, Tenant, User, str], ShapeQueue] = {}
        standings: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        entered: dict[tuple[ShapeQueue, int], list[int]] = {}
        for number, job in self._cluster.waiting.items():
            spec = job.spec
            # Most have their specification in common with others, and came with them.
            alike = (id(spec), job.tenant, job.user, job.service)
            queue = queues.get(alike)
            if queue is None:
                queue = queues[alike] = self.queue_of(job)
            if job.promised or not job.waits_since_ms:
                level, moves_ms = ranking.standing_of(job, now_ms)
            else:
                came = (job.level, job.waits_since_ms, queue.width_milli, spec.priority)
                standing = standings.get(came)
                if standing is None:
                    standing = standings[came] = ranking.standing_of(job, now_ms)
                level, moves_ms = standing
            sequence = sequence_of(job)
            stands[number] = _Stand(queue, sequence, level, moves_ms)
            if moves_ms:
                self._wheel.note(moves_ms, number)
            entered.setdefault((queue, level), []).append(sequence)
        for (queue, level), sequences in entered.items():
            queue.add_all(sequences, level)
        self._rank_anew(dict.fromkeys(queue for queue, _ in entered))

    def _drop(self, number: JobId) -> None:
        stand = self._stands.pop(number, None)
        if stand is not None:
            stand.queue.remove(stand.sequence, stand.level)

    def _key(self, queue: ShapeQueue, level: int, sequence: int, job: Job) -> int:
        if level != TOP_LEVEL:
            level = shifted(level, self._cluster.fairness.shift(job.tenant))
        band = self._cluster.ranking.band_of(job) if queue.service or job.live else self._band(queue)
        return packed(band, level, sequence)

    def _band(self, queue: ShapeQueue) -> int:
        """As `Ranking.band_of`, of those who wait in a queue and are no replicas of a service."""
        if self._cluster.quota.is_plain:
            return NOMINAL
        ways = self._ways(queue)
        if queue.is_scavenger:
            return SCAVENGING
        for way in ways:
            if way.is_nominal():
                return NOMINAL
        return BORROWING if queue.width_milli else NOMINAL

    # limits

    def _ways(self, queue: ShapeQueue) -> tuple[Way, ...]:
        cluster, quota = self._cluster, self._cluster.quota
        of_quota, of_pool = queue.ways_version
        if of_quota != quota.version or of_pool != cluster.pool.inventory_version:
            version = (quota.version, cluster.pool.inventory_version)
            self._forget_ways(queue)
            name = quota.queue_name(queue.shape.tenant, queue.asked)
            wanted = cluster.ranking.wanted_by(queue.shape.need, queue.shape.replicas)
            queue.ways, queue.ways_version = tuple([quota.way(name, amounts) for amounts in wanted]), version
            queue.is_scavenger = quota.is_scavenger(name)
            for way in queue.ways:
                self._guaranteed.setdefault(way.guaranteed_by, {})[queue.number] = queue
        return queue.ways

    def _forget_ways(self, queue: ShapeQueue) -> None:
        for way in queue.ways:
            self._guaranteed[way.guaranteed_by].pop(queue.number, None)

    def obstacles(self, queue: ShapeQueue) -> list[Obstacle | None]:
        """What the quota tree says against one more job of a queue, for each model of card that could serve it."""
        return [way.obstacle() for way in self._ways(queue)]

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
                group = self._groups[fits_like] = Group(self._numbers)
                self._sources[group.number] = group
            queue.group = group
        return queue.group

    def _regroup(self) -> None:
        """An inventory changed: who fits the same nodes may be another question now. Nobody is blocked any more."""
        self._groups_version = self._cluster.pool.inventory_version
        for group in self._groups.values():
            del self._sources[group.number]
        self._groups.clear()
        self._ready.clear()
        self._blocked.clear()
        for queue in self._queues.values():
            queue.group, queue.ready_key = None, -1

    def _rank_anew(self, queues: Iterable[ShapeQueue]) -> None:
        """What decides on the rank of all in these queues moved."""
        for queue in queues:
            head = self._head(queue)
            if head is not None and head[0] != queue.ready_key:
                self._make_ready(queue, head[0])

    def _is_moved(self, queue: ShapeQueue) -> bool:
        """Whether it stands in a better band than it is known by. That it stands in a worse one, or that its head has
        left, is seen when it comes to the top."""
        known = queue.ready_key
        return bool(queue.buckets) and (known < 0 or (band_in(known) > NOMINAL and band_in(known) > self._band(queue)))

    def _make_ready(self, queue: ShapeQueue, key: int) -> None:
        queue.ready_key = key
        if queue.held_back:
            for barrier in queue.barriers:
                self._push(barrier, key, queue.number)
                if barrier.ready_key >= 0 and key < barrier.ready_key:
                    self._offer_at(barrier, key)
            return
        group = self._group_of(queue)
        self._push(group, key, queue.number)
        if not group.blocked and (group.ready_key < 0 or key < group.ready_key):
            self._offer_at(group, key)

    def _push(self, source: Source, key: int, number: int) -> None:
        heads = source.heads
        heapq.heappush(heads, (key, number))
        if len(heads) > source.keep:
            kept = {entry for entry in heads if self._counts(source, *entry)}
            source.heads = sorted(kept)
            source.keep = 64 + 2 * len(kept)

    def _counts(self, source: Source, key: int, number: int) -> bool:
        queue = self._by_number.get(number)
        return queue is not None and queue.ready_key == key and source.has(queue)

    def _offer_early(self, source: Source) -> None:
        """The first of a source goes on when it is its turn. Who that is, and if anybody, is found out then: nobody in
        it goes before the first of its entries."""
        if source.heads:
            self._offer_at(source, source.heads[0][0])
        else:
            self._offer_first(source, None)

    def _offer_first(self, source: Source, first: tuple[int, ShapeQueue, Job] | None) -> None:
        source.ready_key = -1
        if first is not None:
            self._offer_at(source, first[0])
        elif isinstance(source, Barrier):
            source.ceiling.remove(source)
            del self._sources[source.number]

    def _offer_at(self, source: Source, key: int) -> None:
        source.ready_key = key
        heapq.heappush(self._ready, (key, source.number))

    def _unblock(self) -> None:
        pool = self._cluster.pool
        for group in list(self._blocked.values()):
            first = self._first(group)
            if first is not None and first[1].fits_nowhere(pool):
                continue
            group.blocked = False
            del self._blocked[group.number]
            if first is not None:
                self._offer_at(group, first[0])

    def _release(self, queues: Iterable[ShapeQueue]) -> None:
        """Let queues that were held back be looked at again."""
        for queue in queues:
            queue.held_back, queue.barriers = False, ()
            if (head := self._head(queue)) is not None:
                self._make_ready(queue, head[0])
            else:
                queue.ready_key = -1

    def _first(self, source: Source) -> tuple[int, ShapeQueue, Job] | None:
        """The first of a source, with its packed rank."""
        heads = source.heads
        while heads:
            key, number = heads[0]
            queue = self._by_number.get(number)
            if queue is None or queue.ready_key != key or not source.has(queue):
                heapq.heappop(heads)
                continue
            head = self._head(queue)
            if head is None:
                # Nobody is left in it, so nobody is held back.
                queue.held_back, queue.barriers, queue.ready_key = False, (), -1
                heapq.heappop(heads)
            elif head[0] != key:
                heapq.heappop(heads)
                self._make_ready(queue, head[0])
                heads = source.heads
            else:
                return key, queue, head[1]
        return None

    def _head(self, queue: ShapeQueue) -> tuple[int, Job] | None:
        """The first of a queue that still waits, with its packed rank."""
        found = self._foremost(queue)
        return (self._key(queue, *found), found[2]) if found is not None else None

    def _foremost(self, queue: ShapeQueue) -> tuple[int, int, Job] | None:
        """(level without the tenant's shift, sequence, job) of the first of a queue that still waits."""
        waiting, buckets = self._cluster.waiting, queue.buckets
        while buckets:
            if len(buckets) == 1:
                (level,) = buckets
            else:
                level = queue.first_level(self._cluster.fairness.shift(queue.shape.tenant))
            sequence = buckets[level].least
            number = number_in(sequence)
            job = waiting.get(number)
            if job is not None:
                return level, sequence, job
            self._drop(number)
        return None

    # --- asking ------------------------------------------------------------------------------------------------------

    def next(self) -> tuple[ShapeQueue, Job] | None:
        """The first waiting job whose queue is not blocked."""
        ready = self._ready
        while ready:
            key, number = entry = ready[0]
            source = self._sources.get(number)
            if source is None or source.ready_key != key:
                heapq.heappop(ready)
                continue
            barrier = source if isinstance(source, Barrier) else None
            if barrier is not None and not barrier.is_open:
                source.ready_key = -1
                heapq.heappop(ready)
                continue
            first = self._first(source)
            if first is None or first[0] != key:
                if ready[0] == entry:
                    heapq.heappop(ready)
                self._offer_first(source, first)
                if first is None or ready[0] != (first[0], number):
                    continue
            if barrier is None:
                return first[1], first[2]
            # Its limit has room for it: now its place is among those of its group.
            heapq.heappop(ready)
            self._release([first[1]])
            self._offer_early(barrier)
        return None

    def block(self, queue: ShapeQueue) -> None:
        """The head of this queue fits nowhere, so nobody who fits the same nodes does, until a node changes."""
        self.proofs += 1
        group = self._group_of(queue)
        group.blocked = True
        group.ready_key = -1
        self._blocked[group.number] = group

    def hold_back(self, queue: ShapeQueue, *, over: str | None = None, costly: bool = False) -> None:
        """A limit stands in the way of the one that `next` named: the tenant's, or that of a queue of the quota tree
        (`over`). `costly`: only with the cards that it would get now.
        """
        self.proofs += 1
        obstacles = [] if over is None else [each for each in self.obstacles(queue) if each is not None]
        group = self._group_of(queue)
        if group.heads and group.heads[0] == (queue.ready_key, queue.number):
            heapq.heappop(group.heads)
        queue.held_back, queue.is_over_quota = True, bool(obstacles)
        if costly:
            self._costly.append(queue)
            return
        number, barriers = self._numbers + 1, self._barriers
        if obstacles:
            found = [barriers.of_quota(each, number + place) for place, each in enumerate(obstacles)]
        else:
            least = queue.least_milli(self._cluster.pool)
            found = [barriers.of_tenant(queue.shape.tenant, least, number)]
        self._numbers += len(found)
        queue.barriers = tuple(dict.fromkeys(found))
        for barrier in queue.barriers:
            self._sources[barrier.number] = barrier
            self._push(barrier, queue.ready_key, queue.number)

    def blocked_heads(self) -> list[tuple[int, ShapeQueue, Job]]:
        """The first of each queue that fits nowhere, or whose quota others have, with its packed rank; best first."""
        found = [
            (head[0], queue, head[1])
            for queue in self._queues.values()
            if queue.buckets and self._lacks_room(queue) and (head := self._head(queue)) is not None
        ]
        return sorted(found, key=lambda entry: entry[0])

    def blocked_queue_of(self, job: Job) -> ShapeQueue | None:
        """The queue of a job that is its head and of those; None for any other."""
        stand = self._stands.get(job.id)
        if stand is None or not self._lacks_room(stand.queue):
            return None
        foremost = self._foremost(stand.queue)
        return stand.queue if foremost is not None and foremost[2] is job else None

    def first_of(self, queue: ShapeQueue, most: int) -> list[Job]:
        """The first jobs of a queue, in order, at most so many."""
        waiting = self._cluster.waiting
        found: list[Job] = []
        buckets, shift = queue.buckets, self._cluster.fairness.shift(queue.shape.tenant)
        for _, levels in groupby(sorted(buckets), lambda level: shifted(level, shift)):
            rest = most - len(found)
            sequences = heapq.nsmallest(rest, [each for level in levels for each in buckets[level].first(rest)])
            found += [job for each in sequences if (job := waiting.get(number_in(each))) is not None]
            if len(found) >= most:
                break
        return found

    def _lacks_room(self, queue: ShapeQueue) -> bool:
        """It was looked at and others have what it wants: places, or its part of a quota; no limit of its own."""
        is_blocked = queue.is_over_quota if queue.held_back else queue.group is not None and queue.group.blocked
        # Not where it fitted nowhere when it was looked at, and has reached its own limit since.
        return is_blocked and self._cluster.tenancy.has_room(queue.shape.tenant, queue.least_milli(self._cluster.pool))

    def is_at_limit(self, queue: ShapeQueue) -> bool:
        """Its tenant's limit or the quota tree stands in the way of one more of its jobs."""
        if not self._cluster.tenancy.has_room(queue.shape.tenant, queue.least_milli(self._cluster.pool)):
            return True
        obstacles = self.obstacles(queue) if self._cluster.quota.has_quotas else []
        return bool(obstacles) and None not in obstacles

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
                shown = level if level == TOP_LEVEL else shifted(level, shift)
                if band < band_mine or shown < level_mine:
                    yield (band, shown), bucket, len(bucket)
                elif shown == level_mine and (count := bucket.before(sequence)):
                    yield (band, shown), bucket, count

    def _drop_idle(self) -> None:
        for queue in list(self._queues.values()):
            if not queue.held_back and self._foremost(queue) is None:
                del self._queues[queue.entry], self._by_number[queue.number]
                self._of_services.pop(queue.number, None)
                self._forget_ways(queue)
        if len(self._groups) > _IDLE_QUEUES_MAX:
            kept = {id(queue.group) for queue in self._queues.values()}
            for fits_like, group in list(self._groups.items()):
                if id(group) not in kept:
                    del self._groups[fits_like], self._sources[group.number]
                    self._blocked.pop(group.number, None)
