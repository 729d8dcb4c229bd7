"""Leases: how long replicas that may be started elsewhere may run here without a word from the daemon.

The daemon sends the node's own clock back, as a heartbeat told it, so a renewal that was long under way renews no more
than it should. Who ends a replica whose lease has run out is the launcher, outside the agent, which may be dead; it is
told of renewals now and then, often enough that none runs out that was renewed. Here a start is refused whose lease has
run out already: a node that slept may read orders of long ago when it wakes.

A lease counts from the start of the agent at the earliest: orders for this instance were sent after the daemon had
heard of it.
"""

from __future__ import annotations

from gpuyard_agent.core.actions import RenewLeases
from gpuyard_agent.core.book import Book
from gpuyard_agent.core.model import Assignment

LEASE_EXPIRED = "LeaseExpired"
#: The launcher is told once in so many parts of the shortest lease, and no more often than the second.
_PARTS = 10
_TELL_MS_MIN = 1_000


def renew(book: Book, clock_ms: int) -> None:
    """`clock_ms`: the node's clock when the heartbeat was sent that the daemon has heard; 0: it does not say."""
    fresh_ms = min(clock_ms, book.now_ms)
    if fresh_ms <= book.renewed_ms:
        return
    book.renewed_ms = fresh_ms
    shortest_ms = min((one.start.launch.lease_ms for one in book.live.values() if _has_lease(one)), default=0)
    if shortest_ms and fresh_ms - book.renewal_told_ms >= max(_TELL_MS_MIN, shortest_ms // _PARTS):
        book.renewal_told_ms = fresh_ms
        book.act(RenewLeases(fresh_ms))


def has_run_out(book: Book, assignment: Assignment) -> bool:
    return _has_lease(assignment) and book.now_ms >= book.renewed_ms + assignment.start.launch.lease_ms


def _has_lease(assignment: Assignment) -> bool:
    return assignment.start.launch.lease_ms > 0
