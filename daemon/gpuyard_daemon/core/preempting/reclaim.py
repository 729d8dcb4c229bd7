"""Who may be told to go for a claimant, as far as quotas have a say: the rule of final shares.

Who is within its nominal part takes from those above theirs. Of two that borrow, one takes from the other only while
that leaves it no better off than the other is then, or was before. No two can take from each other in turns: a second
exchange would need the opposite inequality. Scavengers give way to everybody and take from nobody.

Only queues that part the two count: what both stand under is common to them, and between jobs of one queue (or of one
above the other) the levels decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import amounts_of, sum_of
from gpuyard_daemon.core.tenants.quota import ROOT, Amounts, Queue, QuotaTree, within

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster

_ONE = 1_000_000_000


class Reclaiming:
    """The question for one waiting job; victims are told as they are chosen."""

    __slots__ = ("_cluster", "_reclaim")

    def __init__(self, cluster: Cluster, claimant: Job, also: Amounts | None = None) -> None:
        """`also`: what others of its queue will hold in a moment, because places are being freed for them."""
        quota = cluster.quota
        wanted = tuple([sum_of([amounts, also or {}]) for amounts in cluster.ranking.wanted(claimant)])
        name = quota.queue_of(claimant)
        self._cluster = cluster
        coming, going = self._under_way(claimant)
        # On whichever model it is within nominal, else on the first.
        best = next(
            (amounts for amounts in wanted if quota.within_nominal(name, sum_of([amounts, *coming(name)]))), None
        )
        self._reclaim = Reclaim(quota, name, best or (wanted[0] if wanted else {}), coming(name))
        for victim in going:
            self.take(victim)

    def _under_way(self, claimant: Job) -> tuple[Callable[[str], list[Amounts]], list[Job]]:
        """What others of a queue are about to get by their claims, and who leaves for those."""
        cluster = self._cluster
        quota, spaces = cluster.quota, cluster.pool.spaces
        coming: dict[str, list[Amounts]] = {}
        going = []
        for claim in cluster.claims:
            if claim.job != claimant.id:
                name = quota.queue_of(cluster.jobs[claim.job])
                got = [
                    amounts_of(spaces[each.node], each.partition) for each in claim.placements if each.node in spaces
                ]
                coming.setdefault(name, []).extend(got)
            going += [cluster.leaving[number] for number in claim.evicted if number in cluster.leaving]
        return lambda name: coming.get(name, []), going

    def may_take(self, victim: Job) -> bool:
        """Whether quota lets the claimant have what a running job of another queue holds."""
        return self._reclaim.may_take(self._cluster.quota.queue_of(victim), self._held(victim))

    def take(self, victim: Job) -> None:
        """It was chosen: what follows is judged as if it were gone."""
        self._reclaim.take(self._cluster.quota.queue_of(victim), self._held(victim))

    def _held(self, job: Job) -> Amounts:
        spaces = self._cluster.pool.spaces
        return sum_of([amounts_of(spaces[each.node], each.partition) for each in job.assignments if each.is_live])


class Reclaim:
    """Who may be told to go for one claimant, given who was chosen already."""

    __slots__ = ("_claimant", "_freed", "_quota", "_wanted", "_within_nominal")

    def __init__(self, quota: QuotaTree, claimant: str, wanted: Amounts, coming: Iterable[Amounts] = ()) -> None:
        """`coming`: what the claimant's queue is about to get beside it."""
        self._quota = quota
        self._claimant = claimant
        self._wanted = sum_of([wanted, *coming])
        self._within_nominal = quota.within_nominal(claimant, self._wanted)
        #: By queue: what those chosen will leave.
        self._freed: dict[str, Amounts] = {}

    def may_take(self, victim: str, held: Amounts) -> bool:
        """Whether quota lets the claimant have what somebody in another queue holds."""
        quota = self._quota
        if quota.is_scavenger(self._claimant):
            return False
        if quota.is_scavenger(victim):
            return True
        sides = quota.sides(self._claimant, victim)
        if sides is None or not quota.has_quotas:
            return False
        mine, theirs = sides
        if self._within_nominal:
            return self._borrows(victim, held)
        after, before = self._share(mine, self._wanted, ()), self._share(theirs, {}, self._left_by(theirs))
        left = self._share(theirs, {}, [*self._left_by(theirs), held])
        return after <= left or after < before

    def take(self, victim: str, held: Amounts) -> None:
        """It was chosen: what follows is judged as if it were gone."""
        freed = self._freed.setdefault(victim, {})
        for key, milli in held.items():
            freed[key] = freed.get(key, 0) + milli

    def _borrows(self, victim: str, held: Amounts) -> bool:
        """Whether somebody's queue, without those chosen already, uses more than its nominal part of such cards."""
        for queue in self._quota.queues[victim].upwards():
            covering = queue.covering(held)
            if queue.name != ROOT and covering:
                gone = self._left_by(queue)
                return any(
                    allotment.used_milli - sum(map(allotment.part_of, gone)) > allotment.nominal_milli
                    for allotment, _ in covering
                )
        # No queue above it is granted such cards: all of it is borrowed.
        return True

    def _left_by(self, queue: Queue) -> list[Amounts]:
        return [freed for name, freed in self._freed.items() if queue in self._quota.queues[name].upwards()]

    def _share(self, queue: Queue, more: Amounts, less: Iterable[Amounts]) -> int:
        """What a queue uses above nominal, as a part of what is lent around it, by weight: billionths."""
        shares = [0]
        for allotment in queue.allotments:
            used = allotment.used_milli + allotment.part_of(more) - sum(map(allotment.part_of, less))
            lent = sum(
                [
                    each.nominal_milli - each.reserve_milli
                    for beside in self._quota.queues.values()
                    if beside.parent is queue.parent
                    for each in beside.allotments
                    if within(each, allotment)
                ]
            )
            shares.append(max(0, used - allotment.nominal_milli) * _ONE // max(1, lent) // queue.weight)
        return max(shares)
