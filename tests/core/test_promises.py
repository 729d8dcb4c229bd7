"""Deadlines: which are promised, how a promised one lifts its job, and what is said about the others."""

from __future__ import annotations

from typing import Any

import msgspec

from gpuyard_daemon.core.queueing.priority import PER_OCTAVE
from gpuyard_daemon.core.queueing.ranking import RankTerms
from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.jobs import JobSpec, parse_array
from support.builders import CoreHarness, job, node

HOUR = 3_600_000


def due(hours: float, within: float, **fields: Any) -> JobSpec:
    """A job of so many hours that should have ended within so many."""
    spec = job(**({"gpus": 1} | fields))
    return msgspec.structs.replace(spec, estimate_ms=int(hours * HOUR), deadline_after_ms=int(within * HOUR))


def yard(gpus: int = 1) -> CoreHarness:
    h = CoreHarness(restart_every=2)
    h.join(node("n-1", gpus))
    return h


def terms(h: CoreHarness, number: int) -> RankTerms:
    return h.core.cluster.ranking.terms_of(h.core.cluster.jobs[number], h.now_ms)


def busy(h: CoreHarness) -> int:
    """Somebody who holds the yard and never leaves."""
    number = h.submit(msgspec.structs.replace(job(gpus=1), preemption="never"), tenant="umbrella")
    h.run(number)
    return number


def test_a_promised_deadline_lifts_in_steps_as_it_comes_near_and_not_after_it() -> None:
    h = yard()
    busy(h)
    number = h.submit(due(1, 20))
    assert h.answers[-1].note == "its deadline is promised"
    steps = []
    for hours in (0, 14.4, 0.2, 2.8, 0.2, 3):
        h.turn(after_ms=int(hours * HOUR))
        steps.append(terms(h, number).deadline // PER_OCTAVE)
    assert steps == [0, 0, 2, 2, 4, 0]


def test_a_near_deadline_goes_before_smaller_jobs() -> None:
    h = yard()
    running = h.submit(msgspec.structs.replace(job(gpus=1), preemption="never"))
    h.run(running)
    small, urgent = h.submit(due(0.7, 1000)), h.submit(due(2, 4.5))
    assert terms(h, urgent).level < terms(h, small).level
    h.ended(running)
    assert h.states(small, urgent) == ["pending", "starting"]


def test_what_cannot_be_kept_is_said_and_lifts_nothing() -> None:
    h = yard()
    busy(h)
    late = h.submit(due(3, 2))
    assert "1h late" in h.answers[-1].note
    first, second = h.submit(due(3, 5)), h.submit(due(3, 5))
    assert [h.core.cluster.jobs[number].promised for number in (late, first, second)] == [False, True, False]
    assert "granted too little" in h.answers[-1].note
    h.turn(after_ms=HOUR)
    assert (terms(h, late).deadline, terms(h, second).deadline) == (0, 0)
    assert terms(h, first).deadline > 0
    h.cancel(first)
    assert h.core.cluster.jobs[h.submit(due(3, 4))].promised


def test_a_queue_promises_what_is_its_own_alone() -> None:
    h = yard(8)
    queues = (QueuePolicy("small", grants=(Grant(nominal_milli=1000),)),)
    h.turn(PolicyChanged(policy=Policy(tenants=(("acme", TenantLimits(queue="small")),), queues=queues)))
    assert h.core.cluster.jobs[h.submit(due(2, 3))].promised
    assert not h.core.cluster.jobs[h.submit(due(2, 3))].promised
    assert not h.core.cluster.jobs[h.submit(due(1, 30, gpus=2))].promised
    assert not h.core.cluster.jobs[h.submit(due(1, 30), tenant="umbrella")].promised


def test_an_array_is_promised_as_a_whole() -> None:
    h = yard()
    busy(h)
    spec = msgspec.structs.replace(due(1, 6), array=parse_array("0-3"))
    first = h.submit(spec)
    assert all(h.core.cluster.jobs[first + at].promised for at in range(4))
    assert not h.core.cluster.jobs[h.submit(msgspec.structs.replace(due(1, 6), array=parse_array("0-3")))].promised


def test_elements_that_go_one_after_the_other_must_all_be_done_in_time() -> None:
    h = yard(8)
    spec = due(1, 3)
    two_at_once = msgspec.structs.replace(spec, array=parse_array("0-3%2"))
    one_at_once = msgspec.structs.replace(spec, array=parse_array("0-3%1"))
    alone = msgspec.structs.replace(spec, array=parse_array("0-3"), singleton=True, name="night")
    h.submit(two_at_once)
    assert h.answers[-1].note == "its deadline is promised"
    for each in (one_at_once, alone):
        h.submit(each)
        assert "1h late" in h.answers[-1].note


def test_nothing_is_promised_that_waits_for_what_nobody_knows() -> None:
    h = yard(8)
    endless, long = h.submit(job(gpus=1)), h.submit(msgspec.structs.replace(job(gpus=1), estimate_ms=3 * HOUR))
    h.run(endless)
    h.run(long)
    for spec, said in (
        (due(1, 10, hold=True), "when it will be released"),
        (due(1, 10, depends_on=[("afterok", endless)]), f"when job {endless} will have ended"),
        (due(1, 3, depends_on=[("afterok", long)]), "1h late if it began as soon as it may"),
        (due(1, 4, depends_on=[("afterok", long)]), "its deadline is promised"),
    ):
        h.submit(spec)
        assert said in h.answers[-1].note
    # What follows a promised job begins when that is promised to have ended.
    chain = h.core.cluster.last_job
    for within, is_kept in ((4.5, False), (5, True)):
        assert h.core.cluster.jobs[h.submit(due(1, within, depends_on=[("afterany", chain)]))].promised == is_kept


def test_one_alone_of_its_name_is_promised_after_those_before_it() -> None:
    h = yard(8)
    alone = msgspec.structs.replace(due(2, 3), name="night", singleton=True)
    first, second = h.submit(alone), h.submit(alone)
    assert [h.core.cluster.jobs[number].promised for number in (first, second)] == [True, False]


def test_a_tenant_is_promised_no_more_than_it_may_hold() -> None:
    h = yard(8)
    h.limit("acme", gpus_milli=1000)
    assert h.core.cluster.jobs[h.submit(due(3, 5))].promised
    assert not h.core.cluster.jobs[h.submit(due(3, 5))].promised
    assert "may hold too little" in h.answers[-1].note
    assert h.core.cluster.jobs[h.submit(due(3, 5), tenant="umbrella")].promised
