"""Work moves aside for who waits for just its place, rarely, and only where it finds room at once."""

from __future__ import annotations

from typing import Any

import msgspec

from gpuyard_daemon.core.state.facts import ClaimMade
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.jobs import JobSpec, Preemption
from support.builders import CoreHarness, job, node

MINUTE = 60_000


def gives(kind: Preemption = "checkpoint", *, restart_ms: int = 200_000, **fields: Any) -> JobSpec:
    return msgspec.structs.replace(job(**fields), preemption=kind, restart_ms=restart_ms)


def seasoned(*gpus: int, settings: CoreSettings | None = None) -> CoreHarness:
    """A yard that has worked enough for a move."""
    h = CoreHarness(settings)
    h.join(*[node(f"n-{number}", count) for number, count in enumerate(gpus, 1)])
    work = h.submit(job(gpus=1))
    h.run(work)
    h.settle(most_ms=24 * 60 * MINUTE)
    # A job that was cancelled says nothing about how long others will run.
    h.cancel(work)
    h.stopped(work)
    return h


def one_on_each(
    h: CoreHarness, kind: Preemption = "checkpoint", minutes: int = 3, restart_ms: int = 200_000, **wants: Any
) -> tuple[int, int]:
    """One job where it was placed, that could be elsewhere, and one that is bound to the other node."""
    wants = wants or {"gpus": 1}
    free = h.submit(gives(kind, restart_ms=restart_ms, **wants))
    h.run(free)
    other = next(name for name in ("n-1", "n-2") if name not in h.nodes_of(free))
    bound = h.submit(gives(kind, restart_ms=restart_ms, nodes=(other,), **wants))
    h.run(bound)
    h.settle(most_ms=minutes * MINUTE)
    return free, bound


def test_a_job_moves_when_that_frees_a_whole_node() -> None:
    h = seasoned(4, 4)
    free, bound = one_on_each(h)
    wide = h.submit(job(gpus=4))
    h.settle(most_ms=20_000)
    assert h.states(free, bound, wide) == ["stopping", "running", "pending"]
    assert "moved" in h.core.cluster.jobs[free].story[-1][1]
    left = h.nodes_of(free)
    h.stopped(free)
    assert h.states(free, wide) == ["starting", "starting"]
    assert h.nodes_of(wide) == left
    assert h.nodes_of(free) == h.nodes_of(bound)


def test_whoever_is_near_moves_though_a_round_looks_at_few() -> None:
    h = seasoned(4, 4, settings=CoreSettings(preempt_occupants=1))
    # Of two that are as large, the one that was last is looked at, and has nowhere to go.
    free, bound = one_on_each(h)
    wide = h.submit(job(gpus=4))
    h.settle(most_ms=20_000)
    assert h.states(free, bound, wide) == ["stopping", "running", "pending"]


def test_nobody_moves_who_has_nowhere_to_go() -> None:
    h = seasoned(4, 4)
    one_on_each(h)
    filler = h.submit(job(gpus=3))
    h.run(filler)
    wide = h.submit(job(gpus=4))
    h.settle(most_ms=MINUTE)
    assert h.state(wide) == "pending"
    assert h.facts(ClaimMade) == []


def test_a_move_that_costs_too_much_is_not_made() -> None:
    h = seasoned(4, 4)
    one_on_each(h, "requeue", minutes=60)
    wide = h.submit(job(gpus=4))
    h.settle(most_ms=MINUTE)
    assert h.state(wide) == "pending"
    assert h.facts(ClaimMade) == []


def test_dear_moves_come_once_somebody_has_waited_for_as_much() -> None:
    """What comes free by itself soon is waited for: ten minutes of a start stand against forty of waiting."""
    h = seasoned(4, 4)
    free, bound = one_on_each(h, minutes=15, restart_ms=600_000)
    wide = h.submit(msgspec.structs.replace(job(gpus=4), estimate_ms=600 * MINUTE))
    h.settle(most_ms=35 * MINUTE)
    assert h.states(free, bound, wide) == ["running", "running", "pending"]
    h.settle(most_ms=15 * MINUTE)
    assert h.states(free, bound, wide) == ["stopping", "running", "pending"]
    assert "moved" in h.core.cluster.jobs[free].story[-1][1]


def test_moves_cost_a_small_part_of_what_was_held() -> None:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 4))
    # Whoever is still at its start loses less by moving.
    one_on_each(h, minutes=8, restart_ms=400_000)
    wide = h.submit(job(gpus=4))
    h.settle(most_ms=MINUTE)
    assert h.state(wide) == "pending"
    assert h.facts(ClaimMade) == []


def test_one_mig_instance_moves_where_it_stands_in_the_way() -> None:
    h = seasoned(1, 1)
    free, bound = one_on_each(h, mig="1g.10gb")
    whole = h.submit(job(gpus=1))
    h.settle(most_ms=20_000)
    h.stopped(free)
    assert h.states(free, bound, whole) == ["starting", "running", "starting"]
    assert h.nodes_of(free) == h.nodes_of(bound)
