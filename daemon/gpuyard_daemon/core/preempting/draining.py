"""Letting small MIG instances run out on a card, so that somebody's larger one, or a job of the whole card, fits.

On-demand instances leave holes: enough slices are free in all, and nowhere side by side. Where no one move mends that,
the slices of one place are kept for the job that waits: nothing new goes there, and when the last who holds one of them
has ended, the place is reshaped. Who runs is not touched, so this waits for what it cannot hasten, and costs what the
slices that are free already could have done meanwhile.

The place: the one where the fewest slice-seconds pass until it is whole, held ones and idle ones together (they are the
claimant's width times the wait); of equals, where fewer of them are idle. The test: the idle ones, with what reshaping
costs, are fewer than those that the blocked demand of the shape would hold in ten minutes. It is asked anew in every
round, with what is then known of those who run, and the place is given up when it fails, or when somebody who goes
first could use it as it is.

Only where it is known how long those will run who stand in the way: by their estimates, by what such jobs needed
before, or by their time limits. On guesses (as long again as they ran) a yard at 85 % load idled more slices than it
made whole: of demand 4.7 % waited instead of 3.7 %, where with estimates nothing was lost at 85 % and a tenth gained at
95 %.

Rare: a job has stood in line for a minute, a card is left alone for ten minutes after it was last kept free, and one
card in a hundred is kept at once. Durable as claims; when a card was kept last stands in its node's record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Reason, Shape, carve, could_go, judge
from gpuyard_daemon.core.placing.partitions import Card, profile_for, sample_of, slices_at
from gpuyard_daemon.core.preempting.consolidation import HORIZON_MS
from gpuyard_daemon.core.preempting.reservations import left_ms
from gpuyard_daemon.core.queueing.order import ShapeQueue, WaitingLine
from gpuyard_daemon.core.queueing.ranking import outlives_ms, ran_ms, width_milli
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.draft import Draft
from gpuyard_daemon.core.state.model import Claim, Job
from gpuyard_daemon.core.tenants.limits import may_hold
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import MigInstance, MigProfileFacts, Partition, WholeCards, devices_of
from gpuyard_protocol.units import MILLI

#: A job stands in line for so long before a place is kept for it: what passes by itself is not worth idle slices.
PATIENCE_MS: Final = 60_000
#: Whether a place should be kept is asked in the first round after each multiple of this: as the ends of others come
#: nearer it becomes worth it by time alone, and a core that was restored must find the same in the same round.
LOOK_MS: Final = 60_000
#: A card is left alone for so long after it was last kept free.
REST_MS: Final = 600_000
#: One card in so many is kept free at once, and at least one.
CARDS_PER_DRAIN: Final = 100
#: Destroying and making instances, for each slice of the place: a pessimist's figure.
_RESHAPE_MS: Final = 10_000
#: Jobs of a queue that are counted as blocked demand.
_BLOCKED_MAX: Final = 32
#: Of those before the owner of a place in line, so many are asked whether they could use it.
_AHEAD_MAX: Final = 32


class Place(NamedTuple):
    """A place that becomes whole when those on it have ended."""

    #: Thousandths of a card × ms until it is whole: of all its slices, and of those that are idle until then.
    waits: int
    idle: int
    node: int
    #: Cards that somebody has to leave.
    cards: int
    placement: f.Placement

    @property
    def order(self) -> tuple[int, int, int]:
        return self.waits, self.idle, self.node


class CutNodes:
    """The nodes with a card that is cut by MIG, kept up to date by reading on in the pool's changes. Derived."""

    __slots__ = ("_pool", "_read_to", "_spaces")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._read_to = -1
        self._spaces: dict[int, NodeSpace] = {}

    @property
    def may_be(self) -> bool:
        """Whether any card of the yard can be cut by MIG."""
        return any(sample_of(kind).mig_profiles for kind in self._pool.card_kinds)

    def in_order(self) -> list[NodeSpace]:
        """The node known longest first."""
        pool = self._pool
        changed = pool.changes.since(self._read_to) if self._read_to >= 0 else None
        for space in pool.by_number if changed is None else changed:
            for card in space.cards:
                if card.mode == "mig" and card.held:
                    self._spaces[space.node.number] = space
                    break
            else:
                self._spaces.pop(space.node.number, None)
        self._read_to = pool.changes.made
        return [self._spaces[number] for number in sorted(self._spaces)]


def is_of_mig(job: Job) -> bool:
    """Whether places are kept for jobs of this kind: one replica, on whole cards of one node or a MIG instance."""
    need = job.spec.need
    return job.spec.replicas == 1 and bool(need.gpus or need.mig or (need.is_share and need.isolation == "hard"))


def patient_from_ms(job: Job) -> int:
    """From when on a place may be kept for a job that stands in line."""
    return job.waits_since_ms + PATIENCE_MS


def keep_free(
    draft: Draft, line: WaitingLine, nodes: CutNodes, queue: ShapeQueue, job: Job, at_ms: int, looks: int
) -> int:
    """Keep the best place for a job, if one is worth it; how many looks are left."""
    cluster = draft.cluster
    if looks <= 0 or cluster.claims.of(job.id) is not None:
        return looks
    allowed = max(1, cluster.pool.capacity_milli // MILLI // CARDS_PER_DRAIN) - _kept_cards(cluster)
    if allowed <= 0:
        return looks
    best: Place | None = None
    free, wanted = 0, width_milli(job)
    for space in nodes.in_order():
        if looks <= 0:
            break
        looks -= 1
        places, free_there = _places_on(cluster, space, queue.shape, at_ms)
        free += free_there
        for place in places:
            if place.cards <= allowed and (best is None or place.order < best.order):
                best = place
    if best is None or not best.idle or free < wanted:
        # Nothing is in pieces there: whoever holds it leaves all of it to whoever is first.
        return looks
    is_worth_it = best.idle + _reshaping(best.placement) < _gain(line, queue)
    if is_worth_it and may_hold(cluster, job, (best.placement,)):
        draft.add(f.ClaimMade(job.id, "drain", (best.placement,)))
    return looks


def _gain(line: WaitingLine, queue: ShapeQueue) -> int:
    """What the blocked jobs of a shape would hold in the horizon, thousandths of a card × ms."""
    return sum([width_milli(each) for each in line.first_of(queue, _BLOCKED_MAX)]) * HORIZON_MS


def _reshaping(placement: f.Placement) -> int:
    """What it costs to make the instance where others were, thousandths of a card × ms."""
    partition = placement.partition
    if isinstance(partition, MigInstance):
        return partition.size * MILLI // 8 * _RESHAPE_MS
    return len(devices_of(partition)) * MILLI * _RESHAPE_MS


def _kept_cards(cluster: Cluster) -> int:
    return sum([len(devices_of(each.placements[0].partition)) for each in cluster.claims if each.kind == "drain"])


# --- places ----------------------------------------------------------------------------------------------------------


def _places_on(cluster: Cluster, space: NodeSpace, shape: Shape, at_ms: int) -> tuple[list[Place], int]:
    """The places on a node that would be whole once somebody has ended, and how much is free on its cards now."""
    reason, positions = shape.eligible(space)
    if reason is not None or could_go(space, shape) is not None:
        return [], 0
    claimed = {uuid for claim in space.claims for uuid in devices_of(claim.partition)}
    cards = [card for position in positions if (card := space.cards[position]).device.uuid not in claimed]
    free = sum([MILLI - card.milli for card in cards if card.takes_work and card.mode in ("idle", "mig")])
    if shape.need.gpus:
        place = _whole(cluster, space, cards, shape.need.gpus, at_ms)
        return ([place] if place is not None else []), free
    return [each for card in cards for each in _instances(cluster, space, card, shape, at_ms)], free


def _instances(cluster: Cluster, space: NodeSpace, card: Card, shape: Shape, at_ms: int) -> Iterator[Place]:
    profile = profile_for(card, shape.need)
    if profile is None or card.mode != "mig" or not card.held or not _may_keep(space, card, at_ms):
        return
    for start in profile.starts:
        over = _in_the_way(card, profile, start)
        if over is None or not over:
            continue
        left = [_left_ms(cluster, key, at_ms) for key in over]
        if None in left:
            continue
        waits_ms = max([each for each in left if each is not None])
        slice_milli = MILLI // max(1, card.device.mig_slices)
        mask = slices_at(start, profile.size)
        held_ms = sum(
            [
                each * (slices_at(part.start, part.size) & mask).bit_count()
                for key, each in zip(over, left, strict=True)
                if each is not None and isinstance(part := card.held[key], MigInstance)
            ]
        )
        waits = waits_ms * profile.size
        partition = MigInstance(
            device=card.device.uuid,
            profile=profile.name,
            start=start,
            size=profile.size,
            memory_mib=profile.memory_mib,
            compute_slices=profile.compute_slices,
        )
        placement = f.Placement(space.node.id, partition)
        yield Place(waits * slice_milli, (waits - held_ms) * slice_milli, space.node.number, 1, placement)


def _in_the_way(card: Card, profile: MigProfileFacts, start: int) -> list[AssignmentKey] | None:
    """Who has to end before an instance fits there; None: that would not suffice."""
    mask = slices_at(start, profile.size)
    if mask & card.foreign:
        return None
    over, milli, alike = [], card.milli, card.profile_counts.get(profile.name, 0)
    for key, partition in sorted(card.held.items()):
        if isinstance(partition, MigInstance):
            both_media = "+me" in profile.name and "+me" in partition.profile
            if slices_at(partition.start, partition.size) & mask or both_media:
                over.append(key)
                milli -= partition.compute_slices * MILLI // max(1, card.device.mig_compute_slices)
                alike -= partition.profile == profile.name
    milli += profile.compute_slices * MILLI // max(1, card.device.mig_compute_slices)
    return over if milli <= MILLI and alike < profile.count_max else None


def _whole(cluster: Cluster, space: NodeSpace, cards: Sequence[Card], count: int, at_ms: int) -> Place | None:
    """The cards of a node that are whole soonest, if some of them are cut by MIG now and nobody else holds any."""
    found: list[tuple[int, int, int, Card]] = []
    for card in cards:
        if card.mode == "idle" and card.takes_work:
            found.append((0, card.position, 0, card))
        elif card.mode == "mig" and card.held and not card.foreign and _may_keep(space, card, at_ms):
            left = [(key, _left_ms(cluster, key, at_ms)) for key in sorted(card.held)]
            if all(each is not None for _, each in left):
                longest = max([each for _, each in left if each is not None])
                held = sum([each * _milli_of(card, card.held[key]) for key, each in left if each is not None])
                found.append((longest, card.position, held, card))
    chosen = sorted(found, key=lambda each: each[:2])[:count]
    if len(chosen) < count or not chosen[-1][0]:
        return None
    waits = chosen[-1][0] * count * MILLI
    devices = tuple([card.device.uuid for _, _, _, card in sorted(chosen, key=lambda each: each[1])])
    placement = f.Placement(space.node.id, WholeCards(devices=devices))
    cut = sum([1 for longest, _, _, _ in chosen if longest])
    return Place(waits, waits - sum([held for _, _, held, _ in chosen]), space.node.number, cut, placement)


def _milli_of(card: Card, partition: Partition) -> int:
    slices = partition.size if isinstance(partition, MigInstance) else 0
    return slices * MILLI // max(1, card.device.mig_slices)


def _may_keep(space: NodeSpace, card: Card, at_ms: int) -> bool:
    past = space.node.pasts.get(card.device.uuid)
    return card.takes_work and (past is None or not past.drained_ms or at_ms - past.drained_ms >= REST_MS)


def _left_ms(cluster: Cluster, key: AssignmentKey, at_ms: int) -> int | None:
    """How long somebody is expected to hold its slices; None: nobody knows."""
    job = cluster.jobs[key.job]
    if job.service:
        return None
    if job.state == "stopping":
        return job.spec.stop_grace_ms
    if not job.spec.time_limit_ms and ran_ms(job, at_ms) >= outlives_ms(job):
        return None
    return left_ms(job, at_ms) if job.started_ms else max(job.expected_ms, job.spec.time_limit_ms)


# --- the places that are kept ----------------------------------------------------------------------------------------


def review(draft: Draft, line: WaitingLine, at_ms: int) -> None:
    """Give up what is no longer worth it, or what somebody who goes first could use as it is."""
    cluster = draft.cluster
    for claim in [claim for claim in cluster.claims if claim.kind == "drain"]:
        job = cluster.jobs[claim.job]
        first = _goes_first(draft, line, claim, job)
        if first is not None:
            why = Why("DrainOvertaken", f"nothing is kept free for it any more: job {first.id} goes first there")
            draft.add(f.ClaimDropped(job.id, why))
            continue
        idle = _idle_now(cluster, claim, at_ms)
        if idle is None or idle + _reshaping(claim.placements[0]) >= _gain(line, line.queue_of(job)):
            text = "nothing is kept free for it any more: those who hold the rest run longer than it is worth"
            draft.add(f.ClaimDropped(job.id, Why("DrainTooDear", text)))


def _goes_first(draft: Draft, line: WaitingLine, claim: Claim, job: Job) -> Job | None:
    """Somebody before the owner in line who finds no other place than what is kept free for that, and may have it.

    From the state alone: which queues were found blocked is not known to a core that was just restored.
    """
    cluster = draft.cluster
    space = cluster.pool.spaces[claim.placements[0].node]
    for other in line.those_ahead(job, draft.now_ms, _AHEAD_MAX):
        queue = line.queue_of(other)
        if other.is_gang or other.id in cluster.claims:
            continue
        if isinstance(judge(space, queue.shape, owner=job.id), Reason) or not queue.fits_nowhere(cluster.pool):
            continue
        placement = f.Placement(space.node.id, carve(space, queue.shape, owner=job.id))
        if may_hold(cluster, other, (placement,)):
            return other
    return None


def _idle_now(cluster: Cluster, claim: Claim, at_ms: int) -> int | None:
    """Idle thousandths of a card × ms until a kept place is whole, from now on; None: it may never be."""
    placement = claim.placements[0]
    space = cluster.pool.spaces[placement.node]
    waits_ms, held, size = 0, 0, 0
    for uuid in devices_of(placement.partition):
        card = space.by_uuid.get(uuid)
        if card is None:
            return None
        own = placement.partition if isinstance(placement.partition, MigInstance) else None
        slices = max(1, card.device.mig_slices)
        mask = slices_at(own.start, own.size) if own is not None else slices_at(0, slices)
        size += mask.bit_count() * MILLI // slices
        for key, partition in card.held.items():
            over = slices_at(partition.start, partition.size) & mask if isinstance(partition, MigInstance) else mask
            if over:
                left = _left_ms(cluster, key, at_ms)
                if left is None:
                    return None
                waits_ms = max(waits_ms, left)
                held += left * over.bit_count() * MILLI // slices
    return waits_ms * size - held
