"""Which replicas may run here only so long without a word from the daemon, and whose time is over.

Kept by whoever outlives the agent: the supervisor, or under systemd the lease keeper. Time is the clock that counts
from boot and while the host sleeps, so a host that slept through a lease ends what ran out at once when it wakes. A
lease is never made longer by a message that was long under way: what is renewed is a time that the daemon heard of.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from gpuyard_protocol.names import AssignmentKey

#: No clock that counts while the host sleeps can be waited for here, so it is looked at.
LOOK_S = 1.0


def boot_clock_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Lease(msgspec.Struct, frozen=True):
    lease_ms: int
    #: Between SIGTERM and SIGKILL when it has run out.
    grace_ms: int


NO_LEASE = Lease(0, 0)


class Leases:
    """All leases of one node. They run together: `renewed_ms` is common to all."""

    def __init__(self, renewed_ms: int = 0) -> None:
        self.renewed_ms = renewed_ms
        self._leases: dict[AssignmentKey, Lease] = {}
        #: Told as run out.
        self._over: set[AssignmentKey] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def hold(self, key: AssignmentKey, lease: Lease) -> None:
        if lease.lease_ms:
            self._leases[key] = lease

    def renew(self, renewed_ms: int) -> bool:
        """False: a later time is known already."""
        if renewed_ms <= self.renewed_ms:
            return False
        self.renewed_ms = renewed_ms
        return True

    def has(self, key: AssignmentKey) -> bool:
        return key in self._leases

    def of(self, key: AssignmentKey) -> Lease:
        return self._leases.get(key, NO_LEASE)

    def items(self) -> Iterable[tuple[AssignmentKey, Lease]]:
        return self._leases.items()

    def over(self) -> tuple[AssignmentKey, ...]:
        return tuple(sorted(self._over))

    def mark_over(self, key: AssignmentKey) -> None:
        """Known to have run out: not told again."""
        if key in self._leases:
            self._over.add(key)

    def drop(self, key: AssignmentKey) -> None:
        self._leases.pop(key, None)
        self._over.discard(key)

    def run_out(self, now_ms: int) -> tuple[tuple[AssignmentKey, int], ...]:
        """(key, grace) of those whose time is over, each once. What is over stays over: it may run elsewhere."""
        fresh = [
            (key, lease.grace_ms)
            for key, lease in sorted(self._leases.items())
            if key not in self._over and now_ms >= self.renewed_ms + lease.lease_ms
        ]
        self._over.update(key for key, _ in fresh)
        return tuple(fresh)

    def is_over(self, key: AssignmentKey) -> bool:
        return key in self._over

    @property
    def waits(self) -> bool:
        """Some lease may still run out."""
        return len(self._leases) > len(self._over)
