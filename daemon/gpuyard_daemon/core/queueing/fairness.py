"""How tenants stand against their shares: what each was charged lately, and the levels that its jobs sink or rise by.

A tenant is charged for the GPU compute that it holds, doubled for each step of a job's class (so a class buys no more
than it costs), and what was charged loses half its weight in a day. Its share is its weight's part of what all tenants
were charged who have work now. Above its share its jobs sink by a level for every factor, and below it they rise: so a
tenant with little work is served at once, and those with too much share what is left.

Near the beginning nobody has used anything, and a quotient of small amounts means nothing: an hour of its part of the
yard is added to either side.

Charges follow from the facts about jobs. Shifts are decided, by a fact, at most once a minute and only where one moved
far enough: in between they stand still, and who goes before whom does not flicker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuyard_daemon.core.queueing.fixedpoint import decayed, grown
from gpuyard_daemon.core.queueing.priority import tenant_shift
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.effects import Effects
from gpuyard_daemon.core.state.model import Standing
from gpuyard_protocol.jobs import PRIORITY_MIN
from gpuyard_protocol.names import Tenant

if TYPE_CHECKING:
    from gpuyard_daemon.core.state.cluster import Cluster
    from gpuyard_daemon.core.state.draft import Draft

HALF_LIFE_MS: Final = 24 * 3_600_000
#: Of the yard, added to usage and share.
_PRIOR_MS: Final = 3_600_000
#: Shifts are looked at once in each such period in which anything happens.
PERIOD_MS: Final = 60_000
#: What was charged is summed up plainly for so long before it begins to decay.
_FOLD_MS: Final = HALF_LIFE_MS // 256


class Fairness:
    """Charges and shifts of all tenants."""

    __slots__ = ("_rates", "changed", "standings")

    def __init__(self) -> None:
        #: Durable, in the order in which tenants first held something.
        self.standings: dict[Tenant, Standing] = {}
        #: What is charged per ms now: thousandths of a card times 2^(class + 2).
        self._rates: dict[Tenant, int] = {}
        #: Tenants whose shift changed since the line last asked.
        self.changed: set[Tenant] = set()

    def shift(self, tenant: Tenant) -> int:
        standing = self.standings.get(tenant)
        return standing.shift if standing is not None else 0

    def hold(self, tenant: Tenant, milli: int, user_class: int, now_ms: int) -> None:
        """A tenant holds so much more (or less)."""
        if not milli:
            return
        self._sum_up(tenant, now_ms)
        self.restore_hold(tenant, milli, user_class)

    def begin_anew(self, now_ms: int) -> None:
        """What is held may count for more or less from now on: sum up, and count it again."""
        for tenant in [tenant for tenant, rate in self._rates.items() if rate]:
            self._sum_up(tenant, now_ms)
        self._rates.clear()

    def _sum_up(self, tenant: Tenant, now_ms: int) -> None:
        standing = self.standings.get(tenant)
        if standing is None:
            standing = self.standings[tenant] = Standing(tenant, now_ms, now_ms)
        if now_ms - standing.folded_ms >= _FOLD_MS:
            standing.charged = self.charged(tenant, now_ms)
            standing.recent, standing.folded_ms = 0, now_ms
        else:
            standing.recent += self._rates.get(tenant, 0) * (now_ms - standing.summed_to_ms)
        standing.summed_to_ms = now_ms

    def restore_hold(self, tenant: Tenant, milli: int, user_class: int) -> None:
        """Enter what is held without summing: after a restart, when the sums stand already."""
        self._rates[tenant] = self._rates.get(tenant, 0) + (milli << (user_class - PRIORITY_MIN))

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
    if draft.now_ms // PERIOD_MS <= last_record_ms // PERIOD_MS:
        return
    moved = tuple(_moved(draft.cluster, draft.now_ms))
    if moved:
        draft.add(f.TenantsShifted(moved))


def _moved(cluster: Cluster, now_ms: int) -> list[tuple[Tenant, int]]:
    fairness = cluster.fairness
    active = sorted(name for name, jobs in cluster.lists.items() if name and jobs.unfinished)
    weights = {tenant: cluster.tenancy.weight(tenant) for tenant in active}
    charged = {tenant: fairness.charged(tenant, now_ms) for tenant in active}
    everything, all_weights = sum(charged.values()), sum(weights.values())
    prior = (cluster.pool.capacity_milli << -PRIORITY_MIN) * _PRIOR_MS
    moved = []
    for tenant in active:
        weight = weights[tenant]
        # Both times the sum of weights, to stay whole.
        usage = charged[tenant] * all_weights + prior * weight
        share = (everything + prior) * weight
        before = fairness.shift(tenant)
        after = tenant_shift(max(1, usage), max(1, share), before)
        if after != before:
            moved.append((tenant, after))
    return moved


def shifted(cluster: Cluster, fact: f.TenantsShifted, now_ms: int, effects: Effects) -> None:
    fairness = cluster.fairness
    for tenant, shift in fact.shifts:
        standing = fairness.standings.get(tenant)
        if standing is None:
            standing = fairness.standings[tenant] = Standing(tenant, now_ms, now_ms)
        standing.shift = shift
        fairness.changed.add(tenant)
