"""How many submissions a second each tenant may hand in.

A token bucket per tenant: it holds `burst` submissions and fills at `per_second`. Time is when the server stored each
message, not when it is read: what waited while the daemon was away is judged as it would have been then, and a message
that is read twice is judged twice alike. An array is one submission, each job of a `submit-many` is one.

Cancelling, holding and the like are never limited: whoever floods must be able to stop.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuyard_protocol.names import Tenant

#: Seconds' worth of submissions that a bucket holds unless told.
BURST_S = 10
_MILLI = 1000


class Rate(NamedTuple):
    """0 a second: no limit."""

    per_second: int = 0
    #: Submissions at once after a pause.
    burst: int = 0


NO_LIMIT = Rate()


class Rates:
    def __init__(self, default: Rate = NO_LIMIT, tenants: dict[Tenant, Rate] | None = None) -> None:
        self._default = default
        self._rates = tenants or {}
        #: By tenant: thousandths of a submission that are left, and when that was, Unix milliseconds.
        self._left: dict[Tenant, tuple[int, int]] = {}
        #: Submissions that were over their tenant's rate.
        self.refused = 0

    def set(self, default: Rate, tenants: dict[Tenant, Rate]) -> None:
        """Other limits from now on; what was used stays used."""
        self._default, self._rates = default, tenants

    def take(self, tenant: Tenant, at_ms: int) -> int:
        """One submission more: 0 if it may pass, else how many milliseconds later it might."""
        rate = self._rates.get(tenant, self._default)
        if not rate.per_second:
            return 0
        most = max(1, rate.burst) * _MILLI
        left, since_ms = self._left.get(tenant, (most, at_ms))
        # A thousandth of a submission for each of `per_second` in a millisecond.
        left = min(most, left + max(0, at_ms - since_ms) * rate.per_second)
        if left >= _MILLI:
            self._left[tenant] = (left - _MILLI, max(at_ms, since_ms))
            return 0
        self._left[tenant] = (left, max(at_ms, since_ms))
        self.refused += 1
        return -(-(_MILLI - left) // rate.per_second)

    def describe(self, tenant: Tenant) -> str:
        rate = self._rates.get(tenant, self._default)
        return f"{rate.per_second} submissions a second, and {max(1, rate.burst)} at once"
