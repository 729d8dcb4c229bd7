"""What each tenant holds and has used, against what the policy allows it.

Compute is accounted by fraction: a whole card counts 1, a share what it was promised, a MIG instance its part of the
card's compute slices. It counts from the order to start until the node has reported the end, like the card itself.

Held amounts are derived from the assignments; what was used, summed over time, is durable. Sums are brought up to date
only when an amount changes, so the cost is per start and end and not per tenant.
"""

from __future__ import annotations

from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.placing.partitions import amounts_on
from gpuyard_daemon.core.state.model import ModelUsage, Usage
from gpuyard_daemon.core.tenants.policy import Policy, TenantLimits
from gpuyard_daemon.core.tenants.quota import Amounts
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import Tenant, User
from gpuyard_protocol.resources import Partition, ResourceNeed, devices_of
from gpuyard_protocol.units import MILLI, format_milli

OVER_QUOTA = "OverQuota"


class Tenancy:
    """Holdings and usage of all tenants, and the policy they are held against."""

    __slots__ = ("_all_eased", "_eased", "_limits", "_model_milli", "held_milli", "policy", "usage", "user_held_milli")

    def __init__(self) -> None:
        self.policy = Policy()
        self._limits: dict[Tenant, TenantLimits] = {}
        #: Durable: by tenant and user, in the order in which they first held something.
        self.usage: dict[tuple[Tenant, User], Usage] = {}
        #: Compute held now.
        self.held_milli: dict[Tenant, int] = {}
        self.user_held_milli: dict[tuple[Tenant, User], int] = {}
        #: The same by model of card, and what of it processes use.
        self._model_milli: dict[tuple[Tenant, User, str], tuple[int, int]] = {}
        #: Tenants that hold less, since the queue last asked; or everybody, after a change of policy.
        self._eased: set[Tenant] = set()
        self._all_eased = False

    def set_policy(self, policy: Policy) -> None:
        self.policy = policy
        self._limits = dict(policy.tenants)
        self._all_eased = True

    def limits(self, tenant: Tenant) -> TenantLimits:
        return self._limits.get(tenant, self.policy.default)

    # --- accounting --------------------------------------------------------------------------------------------------

    def take(self, tenant: Tenant, user: User, amounts: Amounts, now_ms: int) -> None:
        self._sum_up(tenant, user, amounts, now_ms)
        self.restore_held(tenant, user, amounts)

    def give(self, tenant: Tenant, user: User, amounts: Amounts, now_ms: int) -> None:
        self._sum_up(tenant, user, amounts, now_ms)
        self._change_held(tenant, user, amounts, -1)
        self._eased.add(tenant)

    def run(self, tenant: Tenant, user: User, amounts: Amounts, now_ms: int) -> None:
        """A process began to use what it holds."""
        self._sum_up(tenant, user, amounts, now_ms)
        self.restore_run(tenant, user, amounts)

    def halt(self, tenant: Tenant, user: User, amounts: Amounts, now_ms: int) -> None:
        """It is gone."""
        self._sum_up(tenant, user, amounts, now_ms)
        self._change_run(tenant, user, amounts, -1)

    def _sum_up(self, tenant: Tenant, user: User, amounts: Amounts, now_ms: int) -> None:
        """Bring the sums that are to change up to now."""
        key = (tenant, user)
        usage = self.usage.get(key)
        if usage is None:
            usage = self.usage[key] = Usage(tenant, user, now_ms, 0, now_ms, {})
        usage.used_milli_ms += self.user_held_milli.get(key, 0) * (now_ms - usage.summed_to_ms)
        usage.summed_to_ms = now_ms
        for model, _ in amounts:
            sums = usage.models.get(model)
            if sums is None:
                sums = usage.models[model] = ModelUsage(0, 0, now_ms)
            held, ran = self._model_milli.get((tenant, user, model), (0, 0))
            sums.held_milli_ms += held * (now_ms - sums.summed_to_ms)
            sums.ran_milli_ms += ran * (now_ms - sums.summed_to_ms)
            sums.summed_to_ms = now_ms

    def restore_held(self, tenant: Tenant, user: User, amounts: Amounts) -> None:
        """Enter what an assignment holds without summing: after a restart, when the sums stand already."""
        self._change_held(tenant, user, amounts, 1)

    def restore_run(self, tenant: Tenant, user: User, amounts: Amounts) -> None:
        """The same for what a process uses."""
        self._change_run(tenant, user, amounts, 1)

    def _change_held(self, tenant: Tenant, user: User, amounts: Amounts, sign: int) -> None:
        key = (tenant, user)
        total = sign * sum(amounts.values())
        self.user_held_milli[key] = self.user_held_milli.get(key, 0) + total
        self.held_milli[tenant] = self.held_milli.get(tenant, 0) + total
        for (model, _), milli in amounts.items():
            held, ran = self._model_milli.get((tenant, user, model), (0, 0))
            self._model_milli[tenant, user, model] = (held + sign * milli, ran)

    def _change_run(self, tenant: Tenant, user: User, amounts: Amounts, sign: int) -> None:
        for (model, _), milli in amounts.items():
            held, ran = self._model_milli.get((tenant, user, model), (0, 0))
            self._model_milli[tenant, user, model] = (held, ran + sign * milli)

    def used_milli_ms(self, usage: Usage, now_ms: int) -> int:
        """What a user has held up to a moment."""
        held = self.user_held_milli.get((usage.tenant, usage.user), 0)
        return usage.used_milli_ms + held * max(0, now_ms - usage.summed_to_ms)

    def by_model(self, usage: Usage, now_ms: int) -> list[tuple[str, int, int, int]]:
        """(model, held now, held summed over time, used by processes summed over time) of a user, by model."""
        found = []
        for model, sums in sorted(usage.models.items()):
            held, ran = self._model_milli.get((usage.tenant, usage.user, model), (0, 0))
            since = max(0, now_ms - sums.summed_to_ms)
            found.append((model, held, sums.held_milli_ms + held * since, sums.ran_milli_ms + ran * since))
        return found

    def held_by_model(self) -> dict[tuple[Tenant, User, str], tuple[int, int]]:
        """(held now, used by processes now) by tenant, user and model, where there is any."""
        return {key: amounts for key, amounts in self._model_milli.items() if any(amounts)}

    def weight(self, tenant: Tenant) -> int:
        """A tenant's part of the yard beside others'."""
        return max(1, self.limits(tenant).weight)

    # --- limits ------------------------------------------------------------------------------------------------------

    def is_limited(self, tenant: Tenant) -> bool:
        return self.limits(tenant).gpus_max_milli > 0

    def has_room(self, tenant: Tenant, milli: int) -> bool:
        """Whether a tenant may hold so much more. Work without GPUs is never held back."""
        most = self.limits(tenant).gpus_max_milli
        return not most or not milli or self.held_milli.get(tenant, 0) + milli <= most

    def room_milli(self, tenant: Tenant) -> int:
        """How much more a tenant with a limit may hold."""
        return self.limits(tenant).gpus_max_milli - self.held_milli.get(tenant, 0)

    def take_eased(self) -> tuple[bool, set[Tenant]]:
        """(everybody, tenants) who may have more room than when this was last asked."""
        everybody, eased = self._all_eased, self._eased
        self._all_eased, self._eased = False, set()
        return everybody, eased

    def never(self, tenant: Tenant, milli: int) -> Why | None:
        """Why so much at once can never run under the present policy; None if it can."""
        most = self.limits(tenant).gpus_max_milli
        if not most or milli <= most:
            return None
        text = (
            f"this asks for {format_milli(milli)} GPUs at once, and tenant {tenant} may hold at most "
            f"{format_milli(most)}: ask for less, or ask the yard's operator to raise gpus_max"
        )
        return Why(OVER_QUOTA, text)

    def blocks(self, tenant: Tenant, milli: int) -> Why | None:
        """Why so much more may not start now; None if the policy does not stand in the way."""
        if self.has_room(tenant, milli):
            return None
        most, held = self.limits(tenant).gpus_max_milli, self.held_milli.get(tenant, 0)
        return self.never(tenant, milli) or Why(
            OVER_QUOTA,
            f"tenant {tenant} holds {format_milli(held)} of at most {format_milli(most)} GPUs, "
            f"and this needs {format_milli(milli)}",
        )


def held_by(space: NodeSpace, partition: Partition) -> int:
    """Compute that a partition on a node counts for, in thousandths of a card."""
    return sum([amounts_on(space.by_uuid[uuid].device, partition)[0] for uuid in devices_of(partition)])


def least_held(need: ResourceNeed, replicas: int) -> int:
    """The least compute that a request will count for; what depends on the card it gets (memory, MIG) counts 0."""
    return replicas * (need.gpus * MILLI or need.share_milli)
