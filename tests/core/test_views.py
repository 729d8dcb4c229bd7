"""What people are shown: lists and their pages, nodes and cards, numbers, and why a job waits."""

from __future__ import annotations

from typing import Any

import pytest

from gpuyard_daemon.core.inputs import Input, ServiceApplied
from gpuyard_protocol.queries import JobsQuery, ServicesQuery, WhyAnswer
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, exited, gpu, job, need, node


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 2))
    return h


def ids(h: CoreHarness, tenant: str | None = "acme", **query: Any) -> list[int]:
    return [view.job for view in h.core.jobs_page(tenant, JobsQuery(**query)).jobs]


def test_a_list_shows_a_tenants_own_jobs_newest_first(yard: CoreHarness) -> None:
    yard.submit_many([job(), job()])
    yard.submit_many([job()], tenant="umbrella")
    assert ids(yard) == [2, 1]
    assert ids(yard, "umbrella") == [3]
    assert ids(yard, None) == [3, 2, 1]
    assert ids(yard, "nobody") == []


def test_final_jobs_are_shown_when_asked_for(yard: CoreHarness) -> None:
    first, second, third = yard.submit_many([job(), job(), job()])
    yard.ended(first)
    yard.ended(second, exit_code=1)
    assert ids(yard) == [third]
    assert ids(yard, all=True) == [third, second, first]
    assert ids(yard, states=["failed"]) == [second]
    assert yard.core.jobs_page("acme", JobsQuery()).counts == {"starting": 1, "succeeded": 1, "failed": 1}


def test_pages_follow_each_other_without_gap_or_repetition(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=1) for _ in range(7)])
    seen, cursor = [], 0
    for _ in range(4):
        page = yard.core.jobs_page("acme", JobsQuery(limit=3, cursor=cursor))
        seen += [view.job for view in page.jobs]
        cursor = page.next
        if not cursor:
            break
    assert seen == [7, 6, 5, 4, 3, 2, 1]


def test_lists_filter_by_user_and_service(yard: CoreHarness) -> None:
    yard.submit(job(), user="bob")
    yard.submit(job(), user="alice")
    spec = ServiceSpec(name="chat", argv=("serve",), need=need(gpus=1))
    yard.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s77", spec=spec))
    assert ids(yard, user="bob") == [1]
    assert ids(yard, service="chat") == [3]
    assert [v.service for v in yard.core.services_page(None, ServicesQuery(service="chat")).services] == ["chat"]
    assert yard.core.services_page("acme", ServicesQuery(service="chad")).services == ()


def test_long_lists_stay_sorted_as_old_jobs_leave() -> None:
    h = CoreHarness()
    h.join(node("n-1", 0))
    for _ in range(30):
        numbers = h.submit_many([job(cpu_milli=1)] * 50)
        h.turn(*[batch for number in numbers for batch in _ends(h, number)])
    h.settle(most_ms=7_300_000)
    assert ids(h, all=True) == []
    number = h.submit(job())
    assert ids(h, all=True) == [number]


def _ends(h: CoreHarness, number: int) -> list[Input]:
    return [h.batch(a.node, exited(a.key)) for a in h.core.cluster.jobs[number].assignments]


def test_a_view_says_what_was_asked_and_where_it_went(yard: CoreHarness) -> None:
    number = yard.submit(job(share_milli=300, name="train", priority=1))
    view = yard.view(number)
    assert (view.wants, view.priority, view.replicas) == ("0.3×GPU (soft)", 1, 1)
    assert [(p.replica, p.state, p.node, p.partition) for p in view.placed] == [
        (0, "ordered", "n-2", "mps 0.3/24345Mi")
    ]
    assert yard.core.job_view(99) is None
    assert yard.core.job_owner(number) == ("acme", "alice")
    assert yard.core.job_owner(99) is None
    assert yard.core.assignment_node(number, 0) == "n-2"
    assert yard.core.assignment_node(number, 0, attempt=1) == "n-2"
    assert yard.core.assignment_node(number, 0, attempt=2) is None
    assert yard.core.assignment_node(number, 5) is None


def test_where_earlier_attempts_ran_is_remembered(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=9))
    for attempt in range(8):
        yard.ended(number, exit_code=1)
        if attempt % 2:
            yard.submit(job(gpus=2, nodes=("n-2",)))
        yard.settle(most_ms=60_000)
    known = [yard.core.assignment_node(number, 0, attempt=attempt) for attempt in range(10)]
    assert known[1:4] == [None] * 3
    assert None not in known[4:]
    assert known[0] == known[9]


def test_nodes_show_their_cards_and_a_tenant_its_own_jobs(yard: CoreHarness) -> None:
    yard.submit(job(share_milli=300))
    yard.submit(job(gpus=4), tenant="umbrella")
    full, shared = yard.core.node_views("acme")
    assert [card.mode for card in full.cards] == ["whole"] * 4
    assert [card.jobs for card in full.cards] == [()] * 4
    assert [(card.mode, card.held_milli, card.jobs) for card in shared.cards] == [("mps", 300, (1,)), ("idle", 0, ())]
    assert full.cpu_held_milli == 1000
    assert yard.core.node_views(None)[0].cards[0].jobs == (2,)


def test_numbers_add_up_over_time(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=3))
    yard.started(number)
    yard.now_ms += 10_000
    before = yard.core.stats(yard.now_ms)
    yard.ended(number)
    yard.now_ms += 5_000
    after = yard.core.stats(yard.now_ms)
    assert (before.held_milli, after.held_milli, after.gpus) == (3000, 0, 6)
    assert before.held_milli_ms == after.held_milli_ms == 3000 * 10_000
    assert after.capacity_milli_ms == 6000 * 15_000
    assert (after.finished, after.started, after.jobs) == (1, 1, {"succeeded": 1})


def test_over_subscribed_compute_counts_once(yard: CoreHarness) -> None:
    yard.submit_many([job(share_milli=1000, share_memory_mib=1000, isolation="none", nodes=("n-2",))] * 8)
    assert yard.core.stats(yard.now_ms).held_milli == 2000


def test_gauges_show_queue_and_modes(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=2), job(share_milli=500), job(mig="1g.10gb"), job(gpus=4), job(gpus=9)])
    found = yard.core.metrics()
    assert found.held_milli_by_mode == {"whole": 2000, "mig": 142, "mps": 500, "timeslice": 0}
    assert found.cards_by_mode == {"idle": 2, "whole": 2, "mig": 1, "mps": 1, "timeslice": 0}
    assert (found.waiting, found.asleep, found.rejected) == (1, 0, 1)
    assert found.nodes == {"ready": 2}


# --- why -------------------------------------------------------------------------------------------------------------


def why(h: CoreHarness, number: int) -> WhyAnswer:
    answer = h.core.why(number, h.now_ms)
    assert answer is not None
    return answer


def reasons(answer: WhyAnswer) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(reason.reason.code, reason.nodes, reason.examples) for reason in answer.reasons]


def test_why_gives_every_reason_by_node_from_the_code_that_places() -> None:
    h = CoreHarness()
    a30 = [gpu(0, node="n-3", model="NVIDIA A30", memory_mib=24_000)]
    h.join(node("n-1", 2), node("n-2", 2), node("n-3", devices=a30), node("n-4", 0), node("n-5", 2, cpu_milli=2000))
    fillers = [job(gpus=2, nodes=("n-1",)), job(gpus=2, nodes=("n-2",)), job(gpus=1, cpu_milli=1500, nodes=("n-5",))]
    h.submit_many(fillers)
    number = h.submit(job(gpus=1, models=("H100",)))
    answer = why(h, number)
    assert reasons(answer) == [
        ("CardsBusy", 2, ("n-1", "n-2")),
        ("NoGpu", 1, ("n-4",)),
        ("ModelMissing", 1, ("n-3",)),
        ("CpusBusy", 1, ("n-5",)),
    ]
    assert answer.summary == "no such card free (on 2 of 5 nodes)"
    assert h.core.why(99) is None


def test_why_counts_who_is_ahead(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=4), job(gpus=2)])
    numbers = yard.submit_many([job(gpus=1, priority=priority) for priority in (0, 0, 2, -1)])
    assert [(why(yard, n).position, why(yard, n).ahead) for n in numbers] == [(2, 1), (3, 2), (1, 0), (4, 3)]


def test_why_of_a_gang_says_how_many_would_fit(yard: CoreHarness) -> None:
    yard.submit(job(gpus=2))
    answer = why(yard, yard.submit(job(replicas=5, gpus=1)))
    assert answer.summary == "5 replicas start together or not at all: there is room for 4 now"


def test_why_of_the_impossible_says_so(yard: CoreHarness) -> None:
    answer = why(yard, yard.submit(job(gpus=5, allow_pending=True)))
    assert answer.summary == "no node of today could ever run it: fewer than 5 such cards"


def test_why_tells_the_story(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=1))
    yard.now_ms += 1500
    yard.started(number)
    assert why(yard, number).summary == "running on n-2"
    yard.now_ms += 60_000
    yard.ended(number, exit_code=3)
    answer = why(yard, number)
    assert answer.summary == "waits 1s before a new start after: replica 0 on n-2 exited with code 3"
    assert answer.story == (
        "+0s accepted",
        "+0s attempt 1 placed on n-2",
        "+1s500ms running",
        "+1m1s500ms waits again: replica 0 on n-2 exited with code 3",
    )
    yard.settle(most_ms=1000)
    yard.cancel(number)
    assert why(yard, number).summary == "stopping (cancelled by alice): waits for n-2 to report the end"
    yard.stopped(number)
    assert why(yard, number).summary == "cancelled: cancelled by alice"


def test_every_reason_has_words(yard: CoreHarness) -> None:
    from gpuyard_daemon.core.feasibility import Reason, Shape
    from gpuyard_daemon.core.why import text_of

    shape = Shape(need(gpus=1, models=("H100",)), 1, "acme", "alice")
    texts = [text_of(reason, shape) for reason in Reason]
    assert all(texts)
    assert len(set(texts)) == len(texts)
