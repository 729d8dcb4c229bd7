"""What people are shown: lists and their pages, nodes and cards, numbers."""

from __future__ import annotations

from typing import Any

import pytest

from gpuyard_daemon.core.state.inputs import Input, ServiceApplied
from gpuyard_protocol.queries import JobsQuery, ServicesQuery
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, exited, job, need, node


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
    yard.submit_many([job(gpus=2), job(share_milli=500), job(mig="1g.10gb")])
    yard.submit_many([job(gpus=4), job(gpus=9)])
    found = yard.core.metrics()
    assert found.held_milli_by_mode == {"whole": 2000, "mig": 142, "mps": 500, "timeslice": 0}
    assert found.cards_by_mode == {"idle": 2, "whole": 2, "mig": 1, "mps": 1, "timeslice": 0}
    assert (found.waiting, found.asleep, found.rejected) == (1, 0, 1)
    assert found.nodes == {"ready": 2}
