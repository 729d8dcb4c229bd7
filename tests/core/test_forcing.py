"""Borrowers that may not be preempted leave after all, for whoever has waited for its own beyond all patience."""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness, job, node

HOUR = 3_600_000
SETTINGS = CoreSettings()


def firm(gpus: int = 1) -> JobSpec:
    return msgspec.structs.replace(job(gpus=gpus), preemption="never")


def yard(*, nominal: tuple[int, int] = (2, 2), gpus: int = 4) -> CoreHarness:
    """Two queues, each with its part of the cards."""
    h = CoreHarness()
    h.join(node("n-1", gpus))
    queues = tuple(
        [QueuePolicy(name, grants=(Grant(nominal_milli=n * 1000),)) for name, n in zip("ab", nominal, strict=True)]
    )
    tenants = (("acme", TenantLimits(queue="a")), ("umbrella", TenantLimits(queue="b")))
    h.turn(PolicyChanged(policy=Policy(tenants=tenants, queues=queues)))
    return h


def lent(h: CoreHarness) -> list[int]:
    """Tenant umbrella has all cards, and may not be preempted."""
    numbers = h.submit_many([firm()] * 4, tenant="umbrella")
    for number in numbers:
        h.run(number)
    return numbers


def test_borrowers_are_told_when_they_start() -> None:
    h = yard()
    numbers = lent(h)
    told = [
        "it may be stopped" in " ".join(text for _, text in h.core.cluster.jobs[number].story) for number in numbers
    ]
    assert told == [False, False, True, True]


def test_a_borrower_leaves_in_the_end() -> None:
    h = yard()
    numbers = lent(h)
    mine = h.submit(firm(), tenant="acme")
    h.settle(most_ms=SETTINGS.force_nominal_ms - HOUR)
    assert h.states(*numbers) == ["running"] * 4
    h.settle(most_ms=2 * HOUR)
    stopping = [number for number in numbers if h.state(number) == "stopping"]
    assert len(stopping) == 1
    assert stopping[0] in numbers[2:]
    assert "has waited too long" in h.core.cluster.jobs[stopping[0]].story[-1][1]
    h.stopped(stopping[0])
    assert h.states(mine, stopping[0]) == ["starting", "pending"]


def test_nobody_within_its_quota_does() -> None:
    h = yard(nominal=(1, 4), gpus=4)
    numbers = lent(h)
    h.submit(firm(), tenant="acme")
    h.settle(most_ms=3 * SETTINGS.force_borrowing_ms)
    assert h.states(*numbers) == ["running"] * 4


def test_who_would_borrow_itself_waits_longer_and_takes_from_whoever_borrows_more() -> None:
    h = yard(nominal=(1, 1))
    numbers = lent(h)
    own = h.submit(firm(), tenant="acme")
    h.settle(most_ms=SETTINGS.force_nominal_ms + HOUR)
    (left,) = [number for number in numbers if h.state(number) == "stopping"]
    h.stopped(left)
    h.run(own)
    more = h.submit(firm(), tenant="acme")
    h.settle(most_ms=SETTINGS.force_borrowing_ms - HOUR)
    assert h.state(more) == "pending"
    assert [h.state(number) for number in numbers].count("running") == 3
    h.settle(most_ms=2 * HOUR)
    assert [h.state(number) for number in numbers].count("stopping") == 1


def test_without_quotas_nobody_borrows() -> None:
    h = CoreHarness()
    h.join(node("n-1", 1))
    first = h.submit(firm())
    h.run(first)
    h.submit(firm(), tenant="umbrella")
    h.settle(most_ms=3 * SETTINGS.force_borrowing_ms)
    assert h.state(first) == "running"
