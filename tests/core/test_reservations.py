"""Places kept for who has waited to the top: gangs start in the end, guests leave, and nothing is chased in circles."""

from __future__ import annotations

from typing import Any

import msgspec

from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.preempting.occupants import Occupant
from gpuyard_daemon.core.preempting.victims import Search
from gpuyard_daemon.core.state.facts import ClaimDropped, ClaimMade
from gpuyard_protocol.jobs import JobSpec, Preemption
from support.builders import CoreHarness, job, node

MINUTE = 60_000
HOUR = 60 * MINUTE


def gives(kind: Preemption, *, restart_ms: int = 0, time_limit_ms: int = 0, **fields: Any) -> JobSpec:
    wanted = job(time_limit_ms=time_limit_ms, **fields)
    return msgspec.structs.replace(wanted, preemption=kind, restart_ms=restart_ms)


def full_yard(h: CoreHarness, gpus: int) -> list[int]:
    """Every card is held by a job that gives way to nobody, started ten minutes apart."""
    running = []
    for _ in range(gpus):
        running.append(h.submit(gives("never", gpus=1)))
        h.run(running[-1])
        h.settle(most_ms=10 * MINUTE)
    return running


def claims(h: CoreHarness, kind: str) -> list[ClaimMade]:
    return [fact for fact in h.facts(ClaimMade) if fact.kind == kind]


def test_a_gang_starts_in_the_end_although_somebody_small_always_fits() -> None:
    """Each small job that ends would make room for the next, and never for a gang of eight, as long as they come."""
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    running = full_yard(h, 8)
    gang = h.submit(gives("never", replicas=2, gpus=4))
    waited = 0
    while h.state(gang) == "pending" and waited < 24 * HOUR:
        h.submit(gives("never", gpus=1))
        h.settle(most_ms=10 * MINUTE)
        waited += 10 * MINUTE
        h.ended(running.pop(0))
        for number in list(h.core.cluster.jobs):
            if h.state(number) == "starting":
                h.run(number)
                running.append(number)
    assert h.state(gang) == "running"
    assert waited < 6 * HOUR


def top_gang(h: CoreHarness) -> int:
    """A gang that has waited to the top."""
    gang = h.submit(gives("never", replicas=2, gpus=4))
    h.settle(most_ms=2 * HOUR)
    assert [claim.job for claim in claims(h, "reserve")] == [gang]
    return gang


def test_what_becomes_free_is_kept_for_the_owner() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    running = full_yard(h, 8)
    gang = top_gang(h)
    small = h.submit(gives("never", gpus=1))
    h.ended(running[0])
    assert h.states(gang, small) == ["pending", "pending"]
    for number in running[1:]:
        h.ended(number)
    assert h.states(gang, small) == ["starting", "pending"]


def test_a_guest_that_can_leave_is_let_in_and_leaves_last() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    running = full_yard(h, 8)
    gang = top_gang(h)
    h.ended(running[0])
    stays = h.submit(gives("checkpoint", restart_ms=600_000, gpus=1))
    guest = h.submit(gives("checkpoint", restart_ms=10_000, gpus=1, cpu_milli=2000))
    assert h.states(stays, guest) == ["pending", "starting"]
    h.run(guest)
    for number in running[1:]:
        h.ended(number)
    h.settle(most_ms=11_000)
    assert h.states(gang, guest) == ["pending", "stopping"]
    h.stopped(guest)
    assert h.state(gang) == "starting"


def test_a_guest_that_came_twice_leaves_once() -> None:
    """Its first run failed, and its second is a guest of the same set."""
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    running = full_yard(h, 8)
    gang = top_gang(h)
    h.ended(running[0])
    guest = h.submit(gives("checkpoint", restart_ms=10_000, gpus=1, retries=1))
    h.run(guest)
    h.ended(guest, 1)
    h.settle(most_ms=11_000)
    assert h.state(guest) == "starting"
    h.run(guest)
    for number in running[1:]:
        h.ended(number)
    h.settle(most_ms=11_000)
    assert h.states(gang, guest) == ["pending", "stopping"]


def test_who_leaves_already_is_not_put_back_where_the_claimant_goes() -> None:
    """Somebody whom an earlier claimant of the same turn sent away still stands among those who might go."""
    h = CoreHarness()
    h.join(node("n-1", 4))
    leaving, stays = h.submit(gives("requeue", gpus=2)), h.submit(gives("requeue", gpus=2))
    h.run(leaving)
    h.run(stays)
    gang = h.submit(gives("requeue", replicas=3, gpus=1))
    jobs = h.core.cluster.jobs
    candidates = [
        Occupant(jobs[number], 1, 0, 0, "requeue", lost, lost, True, True, 0)
        for number, lost in ((leaving, 1), (stays, 2))
    ]
    h.cancel(leaving)
    search = Search(
        h.core.cluster.pool, Shape(jobs[gang].spec.need, 3, "acme", "alice"), jobs[gang], candidates, (), 99
    )
    plan = search.gang(["n-1"])
    assert plan is not None
    assert [victim.job.id for victim in plan.victims] == [stays]


def test_a_job_that_ends_before_the_others_may_be_a_guest() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    running = full_yard(h, 8)
    top_gang(h)
    h.ended(running[0])
    long, short = h.submit_many(
        [
            gives("requeue", gpus=1, time_limit_ms=100 * HOUR),
            gives("requeue", gpus=1, cpu_milli=2000, time_limit_ms=5 * MINUTE),
        ]
    )
    h.settle(most_ms=11_000)
    assert h.states(long, short) == ["pending", "starting"]


def test_a_set_is_not_chased_from_node_to_node() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4), node("n-3", 4))
    running = full_yard(h, 12)
    top_gang(h)
    h.settle(most_ms=5 * HOUR)
    assert h.facts(ClaimDropped) == []
    claim = claims(h, "reserve")[0]
    beside = next(name for name in ("n-1", "n-2", "n-3") if name not in {place.node for place in claim.placements})
    for number in running:
        if h.nodes_of(number) == [beside]:
            h.ended(number)
    h.settle(most_ms=71_000)
    assert len(h.facts(ClaimDropped)) == 1
    assert beside in {place.node for place in claims(h, "reserve")[-1].placements}


def test_only_one_of_a_band_has_a_set_at_a_time() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4), node("n-3", 4), node("n-4", 4))
    full_yard(h, 16)
    top_gang(h)
    h.submit(gives("never", replicas=2, gpus=4))
    h.settle(most_ms=3 * HOUR)
    assert len(claims(h, "reserve")) == 1


def test_a_set_is_dropped_with_its_job() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    running = full_yard(h, 8)
    gang = top_gang(h)
    small = h.submit(gives("never", gpus=1))
    h.ended(running[0])
    h.cancel(gang)
    assert h.state(small) == "starting"
    assert len(h.core.cluster.claims) == 0


def test_guests_leave_softly_only_as_far_as_the_hosts_memory_goes() -> None:
    """Each alone could be suspended, and the host has memory for one of them."""
    h = CoreHarness()
    h.join(msgspec.structs.replace(node("n-1", 4), suspend_mib=100 * 1024), node("n-2", 4))
    running = full_yard(h, 8)
    top_gang(h)
    on_first = [number for number in running if h.core.cluster.jobs[number].assignments[0].node == "n-1"]
    guests = []
    for number in on_first[:2]:
        h.ended(number)
        guests.append(h.submit(gives("suspend", gpus=1)))
        h.run(guests[-1])
    for number in running:
        if h.state(number) == "running":
            h.ended(number)
    h.settle(most_ms=11_000)
    made = claims(h, "preempt")[-1]
    assert sorted(each.kind for each in made.evictions) == ["requeue", "suspend"]
    assert {each.job for each in made.evictions} == set(guests)
