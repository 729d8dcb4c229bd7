"""How tenants stand against their shares: what each was charged lately, and the levels that its jobs sink or rise by.

A tenant is charged for the GPU compute that it holds, doubled for each step of a job's class (so a class buys no more
than it costs), and what was charged loses half its weight in a day. Its share is its part of what all tenants were
charged who have work now: each queue's part is by its weight beside the queues beside it, a tenant's by its own beside
the others of its queue. Above its share its jobs sink by two octaves for every factor of two, and below it they
rise: so a tenant with little work is served at once, and those with too much share what is left.

Where that is not enough, time is: what answers a factor with so many levels leaves a factor for ever to whoever's jobs
are larger by more than that, and a flood of short jobs would keep almost everything. So while a tenant that waits is
under its share, it rises by an octave an hour for each factor of two, and those above theirs sink likewise, until the
distance between their jobs is made up for. Where restarts take longer than a minute it does so the more slowly, or
the yard would be busy with following. Half of that is forgotten in two days: it has to outlast the charges that it
answers, or the two chase each other.

Sizes decide how long people wait, and most jobs are small; who has how much of the yard is decided by the large. So
small jobs are moved less (`priority.shifted`): fairness costs little waiting that way.

Near the beginning nobody has used anything, and a quotient of small amounts means nothing: an hour of its part of the
yard is added to either side.

Charges follow from the facts about jobs. Shifts are decided, by a fact, at most once a minute and only where one moved
far enough: in between they stand still, and who goes before whom does not flicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, Final

from gpuyard_daemon.core.queueing.fixedpoint import decayed, grown
from gpuyard_daemon.core.queueing.priority import SHIFT_MAX, drift, tenant_shift
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Standing
from gpuyard_protocol.jobs import PRIORITY_MIN, JobSpec
from gpuyard_protocol.names import Tenant
from gpuyard_protocol.units import MILLI

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster
    from gpuyard_daemon.core.state.draft import Draft

HALF_LIFE_MS: Final = 24 * 3_600_000
#: Of the yard, added to usage and share.
_PRIOR_MS: Final = 3_600_000
#: Shifts are looked at once in each such period in which anything happens.
PERIOD_MS: Final = 60_000
_OWED_HALF_LIFE_MS: Final = 2 * HALF_LIFE_MS
#: What is owed is summed up once in each such period.
OWED_PERIOD_MS: Final = 600_000
#: What was charged is summed up plainly for so long before it begins to decay.
_FOLD_MS: Final = HALF_LIFE_MS // 256
#: More than moves anybody the whole way is not summed up, so that it does not take as long to undo.
_OWED_MAX: Final = SHIFT_MAX * MILLI


class Fairness:
    """Charges and shifts of all tenants."""

    __slots__ = ("_held", "_rates", "_restarts", "changed", "standings")

    def __init__(self) -> None:
        #: Durable, in the order in which tenants first held something.
        self.standings: dict[Tenant, Standing] = {}
        #: What is charged per ms now: thousandths of a card times 2^(class + 2).
        self._rates: dict[Tenant, int] = {}
        #: What is held, thousandths of a card; the same times what a restart of its job takes, ms.
        self._held = self._restarts = 0
        #: Tenants whose shift changed since the line last asked.
        self.changed: set[Tenant] = set()

    def shift(self, tenant: Tenant) -> int:
        standing = self.standings.get(tenant)
        return standing.shift if standing is not None else 0

    def standing(self, tenant: Tenant, now_ms: int) -> Standing:
        """Of whoever has none yet, a new one."""
        standing = self.standings.get(tenant)
        if standing is None:
            standing = self.standings[tenant] = Standing(tenant, now_ms, now_ms)
        return standing

    def owed(self, tenant: Tenant, now_ms: int) -> int:
        """What being above its share (below 0: under it) came to, decayed; thousandths of a level."""
        standing = self.standings.get(tenant)
        if standing is None or not standing.owed:
            return 0
        left = decayed(abs(standing.owed), now_ms - standing.owed_ms, _OWED_HALF_LIFE_MS)
        return left if standing.owed > 0 else -left

    @property
    def restart_ms(self) -> int:
        """What a restart takes, on the average of the cards that are held, by what their jobs say."""
        return self._restarts // self._held if self._held else 0

    def hold(self, tenant: Tenant, milli: int, spec: JobSpec, now_ms: int) -> None:
        """A job of a tenant holds so much more (or less)."""
        if not milli:
            return
        self._sum_up(tenant, now_ms)
        self.restore_hold(tenant, milli, spec)

    def begin_anew(self, now_ms: int) -> None:
        """What is held may count for more or less from now on: sum up, and count it again."""
        for tenant in [tenant for tenant, rate in self._rates.items() if rate]:
            self._sum_up(tenant, now_ms)
        self._rates.clear()
        self._held = self._restarts = 0

    def _sum_up(self, tenant: Tenant, now_ms: int) -> None:
        standing = self.standing(tenant, now_ms)
        if now_ms - standing.folded_ms >= _FOLD_MS:
            standing.charged = self.charged(tenant, now_ms)
            standing.recent, standing.folded_ms = 0, now_ms
        else:
            standing.recent += self._rates.get(tenant, 0) * (now_ms - standing.summed_to_ms)
        standing.summed_to_ms = now_ms

    def restore_hold(self, tenant: Tenant, milli: int, spec: JobSpec) -> None:
        """Enter what is held without summing: after a restart, when the sums stand already."""
        self._rates[tenant] = self._rates.get(tenant, 0) + (milli << (spec.priority - PRIORITY_MIN))
        self._held += milli
        self._restarts += milli * spec.restart_ms

    def charged(self, tenant: Tenant, now_ms: int) -> int:
        """What a tenant was charged lately: thousandths of a card × ms × 2^(class + 2), decayed."""
        standing = self.standings.get(tenant)
        if standing is None:
            return 0
        before = decayed(standing.charged + standing.recent, now_ms - standing.folded_ms, HALF_LIFE_MS)
        return before + grown(self._rates.get(tenant, 0), now_ms - standing.summed_to_ms, HALF_LIFE_MS)

    def rates(self) -> dict[Tenant, int]:
        """What is charged per ms now, where anything is."""
        return {tenant: rate for tenant, rate in self._rates.items() if rate}


def refresh(draft: Draft, last_record_ms: int) -> None:
    """Decide about shifts, if none were decided about in this period.

    Which period that was follows from the last record's time, so a restored core looks at the same moments.
    """
    now_ms = draft.now_ms
    if now_ms // PERIOD_MS <= last_record_ms // PERIOD_MS:
        return
    cluster = draft.cluster
    against = _usage_and_shares(cluster, now_ms)
    owed = _summed(cluster, against, now_ms) if now_ms // OWED_PERIOD_MS > last_record_ms // OWED_PERIOD_MS else {}
    moved = tuple(_moved(cluster, against, owed, now_ms))
    if moved or owed:
        draft.add(f.TenantsShifted(moved, tuple(owed.items())))


def _usage_and_shares(cluster: Cluster, now_ms: int) -> dict[Tenant, tuple[int, int]]:
    """(usage, share) of the tenants with work, both in the same measure, both above 0."""
    fairness = cluster.fairness
    active = sorted(name for name, jobs in cluster.lists.items() if name and jobs.unfinished)
    weights = _weights(cluster, active)
    charged = {tenant: fairness.charged(tenant, now_ms) for tenant in active}
    everything, all_weights = sum(charged.values()), sum(weights.values())
    prior = (cluster.pool.capacity_milli << -PRIORITY_MIN) * _PRIOR_MS
    # Both times the sum of weights, to stay whole.
    return {
        tenant: (max(1, charged[tenant] * all_weights + prior * weight), max(1, (everything + prior) * weight))
        for tenant, weight in weights.items()
    }


def _weights(cluster: Cluster, active: Sequence[Tenant]) -> dict[Tenant, int]:
    """What each counts beside the others: its queue's weight beside the queues beside it, so down the tree as far as
    there is work, and its own beside the tenants of its queue."""
    quota, tenancy = cluster.quota, cluster.tenancy
    of: dict[str, list[Tenant]] = {}
    for tenant in active:
        of.setdefault(quota.queue_name(tenant, ""), []).append(tenant)
    ways = {name: quota.queues[name].upwards()[::-1] for name in of}
    #: What has work in each queue: the sum of its tenants' weights, and the weight of each queue right below.
    sums = {name: sum([tenancy.weight(tenant) for tenant in tenants]) for name, tenants in of.items()}
    for above, queue in {pair for way in ways.values() for pair in pairwise(way)}:
        sums[above.name] = sums.get(above.name, 0) + queue.weight
    parts: dict[str, Fraction] = {}
    for name, way in ways.items():
        parts[name] = Fraction(1, sums[name])
        for above, queue in pairwise(way):
            parts[name] *= Fraction(queue.weight, sums[above.name])
    whole = lcm(*[part.denominator for part in parts.values()])
    return {
        tenant: part.numerator * (whole // part.denominator) * tenancy.weight(tenant)
        for name, part in parts.items()
        for tenant in of[name]
    }


def _moved(
    cluster: Cluster, against: dict[Tenant, tuple[int, int]], owed: dict[Tenant, int], now_ms: int
) -> list[tuple[Tenant, int]]:
    fairness = cluster.fairness
    moved = []
    for tenant, (usage, share) in against.items():
        before = fairness.shift(tenant)
        due = owed[tenant] if tenant in owed else fairness.owed(tenant, now_ms)
        after = tenant_shift(usage, share, due, before)
        if after != before:
            moved.append((tenant, after))
    return moved


def _summed(cluster: Cluster, against: dict[Tenant, tuple[int, int]], now_ms: int) -> dict[Tenant, int]:
    """What each is owed now, where that changed: somebody under its share waits."""
    tenancy = cluster.tenancy
    waiting = {job.tenant for job in cluster.waiting.values()}
    wanting = {
        tenant
        for tenant, (usage, share) in against.items()
        # Whoever is at its own limit could have no more.
        if usage < share and tenant in waiting and not (tenancy.is_limited(tenant) and tenancy.room_milli(tenant) <= 0)
    }
    found = {}
    for tenant, (usage, share) in against.items():
        before = cluster.fairness.owed(tenant, now_ms)
        if wanting and (usage > share or tenant in wanting):
            after = before + drift(usage, share, OWED_PERIOD_MS, cluster.fairness.restart_ms)
            after = max(-_OWED_MAX, min(_OWED_MAX, after))
            if after != before:
                found[tenant] = after
    return found


def shifted(cluster: Cluster, fact: f.TenantsShifted, now_ms: int, effects: Effects) -> None:
    fairness = cluster.fairness
    for tenant, shift in fact.shifts:
        fairness.standing(tenant, now_ms).shift = shift
        fairness.changed.add(tenant)
    for tenant, owed in fact.owed:
        standing = fairness.standing(tenant, now_ms)
        standing.owed, standing.owed_ms = owed, now_ms
