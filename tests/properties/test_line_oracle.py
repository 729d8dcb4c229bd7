"""The waiting line against sorting everybody anew, and a restored core against one that never stopped.

Jobs of several tenants, shapes, classes, estimates and deadlines come, end and are held, and time passes by minutes and
by days. After each step the line must name the job that sorting by rank names, and count those ahead as sorting does.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.queueing.order import WaitingLine
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import Cursors, HoldRequested, JobSubmitted, PolicyChanged, ReleaseRequested
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness, job, node

TENANTS = ("acme", "umbrella", "zed")
MINUTE = 60_000

specs = st.builds(
    lambda gpus, replicas, chosen, estimate, within: msgspec.structs.replace(
        job(gpus=gpus, replicas=replicas, priority=chosen, allow_pending=True),
        estimate_ms=estimate * MINUTE,
        deadline_after_ms=within * MINUTE if estimate else 0,
    ),
    st.sampled_from((1, 1, 2, 4)),
    st.sampled_from((1, 1, 2)),
    st.integers(-2, 2),
    st.sampled_from((0, 0, 1, 30, 600, 9000)),
    st.sampled_from((0, 0, 60, 6000)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from(TENANTS), specs),
        st.tuples(st.just("pass"), st.sampled_from((1, 20, 400, 6000)), st.none()),
        st.tuples(st.just("end"), st.integers(0, 50), st.none()),
        st.tuples(st.just("hold"), st.integers(0, 50), st.none()),
    ),
    max_size=25,
)
POLICY = Policy(
    tenants=(("acme", TenantLimits(queue="a")), ("umbrella", TenantLimits(queue="b", weight=3))),
    queues=(
        QueuePolicy("a", parent="lab", grants=(Grant(nominal_milli=2000, borrow_milli=1000),)),
        QueuePolicy("b", parent="lab", weight=2, grants=(Grant(nominal_milli=1000, lend_milli=0),)),
        QueuePolicy("lab", grants=(Grant(nominal_milli=4000, borrow_milli=0),)),
    ),
)


def take(h: CoreHarness, step: tuple[str, Any, JobSpec | None]) -> None:
    kind, what, spec = step
    jobs = h.core.cluster.jobs
    live = [job for job in jobs.values() if job.live]
    waiting = [job for job in jobs.values() if job.state == "pending"]
    if kind == "submit" and spec is not None:
        h.submit(spec, tenant=what)
    elif kind == "pass":
        h.turn(after_ms=what * MINUTE)
    elif kind == "end" and live:
        chosen = live[what % len(live)]
        if chosen.state == "starting":
            h.run(chosen.id)
        elif chosen.state == "running":
            h.ended(chosen.id)
        else:
            h.stopped(chosen.id)
    elif kind == "hold" and waiting:
        held = waiting[what % len(waiting)]
        verb = ReleaseRequested if held.held_by else HoldRequested
        h.turn(verb(tenant=held.tenant, user=held.user, submission_id=f"h{h.now_ms}", job=held.id))


def check_quotas(h: CoreHarness) -> None:
    """Nobody ever holds more than its queue and all above it may."""
    for queue in h.core.cluster.quota.queues.values():
        for allotment in queue.allotments:
            most = allotment.most_milli()
            assert most is None or allotment.used_milli <= most, queue.name


def by_sorting(core: Scheduler, now_ms: int) -> list[Job]:
    ranking = core.cluster.ranking
    return sorted(core.cluster.waiting.values(), key=lambda each: ranking.rank_of(each, now_ms))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.booleans(), steps)
def test_the_line_is_what_sorting_by_rank_would_be(with_quotas: bool, is_told: bool, taken: list[Any]) -> None:
    """A line that is told who came and went, one that looks at everybody again, and a new one."""
    h = CoreHarness()
    h.join(node("n-1", 4))
    if with_quotas:
        h.turn(PolicyChanged(policy=POLICY))
    for step in taken:
        take(h, step)
        check_quotas(h)
        expected = by_sorting(h.core, h.now_ms)
        kept = h.core._line
        if not is_told:
            h.core.cluster.line_changes = None
        kept.catch_up(h.now_ms)
        fresh = WaitingLine(h.core.cluster, h.settings.timeslice_milli_max)
        fresh.catch_up(h.now_ms)
        for line in (kept, fresh):
            assert [line.ahead_of(each, h.now_ms) for each in expected] == list(range(len(expected)))
            if expected:
                assert line.those_ahead(expected[-1], h.now_ms, 5) == expected[:-1][:5]
        head = fresh.next()
        assert (head[1] if head else None) is (expected[0] if expected else None)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.integers(0, 24))
def test_a_restored_core_goes_on_as_the_one_that_never_stopped(taken: list[Any], at: int) -> None:
    """Time goes by in between, so that what only time decides must come out the same."""
    h = CoreHarness()
    h.join(node("n-1", 4))
    h.turn(PolicyChanged(policy=POLICY))
    for step in taken[:at]:
        take(h, step)
    twin = Scheduler.restore(h.core.snapshot(), h.settings)
    for number, minutes in enumerate((1, 15, 300, 5000)):
        now_ms = h.now_ms + minutes * MINUTE
        spec = job(gpus=number % 3 + 1, priority=number % 2)
        given_ = JobSubmitted(tenant=TENANTS[number % 3], user="bob", submission_id=f"t{number}", spec=spec)
        cursors = Cursors(1000 + number, 1000)
        one, other = h.core.handle([given_], now_ms, cursors), twin.handle([given_], now_ms, cursors)
        # How much was decided may differ: a restored core proves anew what the other knows.
        assert msgspec.structs.replace(one, decisions=0) == msgspec.structs.replace(other, decisions=0)
        assert h.core.digest() == twin.digest()
