"""Preemption between levels: the exchange test, the cheapest victims, all or nothing, and places kept for claimants."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard_daemon.core.state.facts import ClaimDropped, ClaimMade, JobPlaced
from gpuyard_daemon.core.state.inputs import NodeSuspected
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.jobs import JobSpec, Preemption
from gpuyard_protocol.nodes import Start, Stop
from support.builders import CoreHarness, job, node

HOUR = 3_600_000


def harness(*gpus: int, settings: CoreSettings | None = None) -> CoreHarness:
    h = CoreHarness(settings)
    h.join(*[node(f"n-{number}", count) for number, count in enumerate(gpus, 1)])
    return h


def gives(kind: Preemption = "checkpoint", *, restart_ms: int = 0, **fields: Any) -> JobSpec:
    """A job that gives way in this manner."""
    return msgspec.structs.replace(job(**fields), preemption=kind, restart_ms=restart_ms)


def running_for(h: CoreHarness, spec: JobSpec, ms: int) -> int:
    number = h.submit(spec)
    h.run(number)
    h.settle(most_ms=ms)
    return number


def test_a_new_job_takes_the_place_of_a_large_one_and_keeps_it_until_it_is_free() -> None:
    h = harness(8)
    large = running_for(h, gives(gpus=8), 2 * HOUR)
    small = h.submit(job(gpus=1))
    assert h.states(large, small) == ["stopping", "pending"]
    assert [stop.reason for stop in h.new_orders(Stop)] == ["preempted"]
    late = h.submit(job(gpus=1, priority=2))
    h.stopped(large)
    assert h.states(large, small, late) == ["pending", "starting", "starting"]
    view = h.view(large)
    assert view.reason is not None
    assert view.reason.code == "Preempted"
    assert f"job {small}" in view.reason.text


def test_a_job_that_would_lose_everything_is_not_ended_for_a_small_gain() -> None:
    h = harness(8)
    large = running_for(h, gives("requeue", gpus=8), 2 * HOUR)
    small = h.submit(job(gpus=1))
    h.settle(most_ms=HOUR)
    assert h.states(large, small) == ["running", "pending"]


def test_a_job_of_unknown_length_is_not_made_to_start_anew() -> None:
    h = harness(1)
    young = running_for(h, gives("requeue", gpus=1), 130_000)
    small = h.submit(job(gpus=1))
    h.settle(most_ms=HOUR)
    assert h.states(young, small) == ["running", "pending"]


def test_a_job_that_is_never_to_be_preempted_never_is() -> None:
    h = harness(8)
    large = running_for(h, gives("never", gpus=8), 5 * HOUR)
    small = h.submit(job(gpus=1, priority=2))
    h.settle(most_ms=5 * HOUR)
    assert h.states(large, small) == ["running", "pending"]


def test_nobody_is_ended_before_he_has_run_for_a_while() -> None:
    h = harness(8)
    large = running_for(h, gives(gpus=8), 60_000)
    small = h.submit(gives(gpus=1))
    assert h.states(large, small) == ["running", "pending"]
    h.settle(most_ms=59_000)
    assert h.state(large) == "running"


def test_the_one_who_loses_least_goes() -> None:
    h = harness(4, 4)
    dear = running_for(h, gives(gpus=4, restart_ms=600_000), HOUR)
    cheap = running_for(h, gives(gpus=4, restart_ms=10_000), 3 * HOUR)
    h.submit(job(gpus=2))
    assert h.states(dear, cheap) == ["running", "stopping"]


def test_nobody_goes_who_is_not_needed() -> None:
    """The largest level goes first, and stays after all when the next one makes room enough alone."""
    h = harness(8)
    one = h.submit(gives(gpus=1))
    h.run(one)
    h.settle(most_ms=40 * HOUR)
    rest = running_for(h, gives(gpus=7), 4 * HOUR)
    h.submit(job(gpus=7))
    assert h.states(one, rest) == ["running", "stopping"]


def test_a_gang_takes_places_on_several_nodes_or_none() -> None:
    h = harness(4, 4, 4)
    large = [running_for(h, gives(gpus=4), 3 * HOUR) for _ in range(2)]
    fixed = running_for(h, gives("never", gpus=4), 3 * HOUR)
    too_wide = h.submit(job(replicas=3, gpus=4))
    assert h.states(*large, fixed, too_wide) == ["running", "running", "running", "pending"]
    assert h.facts(ClaimMade) == []
    gang = h.submit(job(replicas=2, gpus=4))
    assert h.states(*large, fixed, gang) == ["stopping", "stopping", "running", "pending"]
    h.stopped(large[0])
    assert h.state(gang) == "pending"
    assert h.new_orders(Start) == []
    h.stopped(large[1])
    assert h.state(gang) == "starting"
    assert sorted(h.nodes_of(gang)) == ["n-1", "n-2"]


def test_a_gang_that_must_go_frees_all_its_nodes_for_one_price() -> None:
    h = harness(4, 4, 4)
    gang = running_for(h, gives(replicas=2, gpus=4), 3 * HOUR)
    single = running_for(h, gives(gpus=4, restart_ms=20_000), 3 * HOUR)
    wide = h.submit(job(replicas=2, gpus=4))
    h.settle(most_ms=11_000)
    assert h.state(wide) == "pending"
    evicted = [eviction.job for claim in h.facts(ClaimMade) for eviction in claim.evictions]
    assert evicted in ([gang], [single, gang], [gang, single])


def test_who_has_done_much_gives_way_again_once_its_start_has_settled() -> None:
    """A time of rest for all would leave the small as the only victims when many come at once."""
    h = harness(8)
    large = running_for(h, gives(gpus=8, restart_ms=600_000), 30 * HOUR)
    first = h.submit(job(gpus=8))
    h.stopped(large)
    h.run(first)
    h.ended(first)
    h.run(large)
    second = h.submit(job(gpus=8))
    assert h.states(large, second) == ["running", "pending"]
    h.settle(most_ms=10_000)
    assert h.states(large, second) == ["running", "pending"]
    h.settle(most_ms=20_000)
    assert h.states(large, second) == ["stopping", "pending"]
    lost = [eviction.overhead_ms for claim in h.facts(ClaimMade) for eviction in claim.evictions]
    assert lost[0] == 600_000
    assert 20_000 <= lost[1] <= 30_000, "the second time it was at its start, and lost that"


def test_whose_start_is_short_runs_for_two_minutes() -> None:
    h = harness(8)
    large = running_for(h, gives(gpus=8, restart_ms=30_000), 30 * HOUR)
    first = h.submit(job(gpus=8))
    h.stopped(large)
    h.run(first)
    h.ended(first)
    h.run(large)
    h.settle(most_ms=40_000)
    second = h.submit(job(gpus=8))
    h.settle(most_ms=60_000)
    assert h.states(large, second) == ["running", "pending"]
    h.settle(most_ms=40_000)
    assert h.states(large, second) == ["stopping", "pending"]


@pytest.mark.parametrize(("ran_h", "state"), [(2, "stopping"), (9.75, "running")])
def test_nobody_of_known_length_is_sent_away_shortly_before_its_end(ran_h: float, state: str) -> None:
    h = harness(8)
    known = msgspec.structs.replace(gives(gpus=8), estimate_ms=10 * HOUR)
    large = running_for(h, known, int(ran_h * HOUR))
    shorter = h.submit(msgspec.structs.replace(gives(gpus=8), estimate_ms=HOUR))
    h.settle(most_ms=60_000)
    assert h.states(large, shorter) == [state, "pending"]


def test_a_claim_is_dropped_when_its_job_is_cancelled() -> None:
    h = harness(8)
    large = running_for(h, gives(gpus=8), 3 * HOUR)
    small = h.submit(job(gpus=1))
    assert small in h.core.cluster.claims
    h.cancel(small)
    assert small not in h.core.cluster.claims
    other = h.submit(job(gpus=8))
    h.stopped(large)
    assert h.states(small, other) == ["cancelled", "starting"]


def test_a_claim_goes_when_the_job_found_room_elsewhere() -> None:
    h = harness(8)
    large = running_for(h, gives(gpus=8), 3 * HOUR)
    small = h.submit(job(gpus=1))
    h.join(node("n-2", 1))
    assert h.nodes_of(small) == ["n-2"]
    assert len(h.core.cluster.claims) == 0
    h.stopped(large)
    assert h.state(large) == "starting"


def test_a_claim_on_a_node_that_falls_silent_is_dropped_and_made_anew() -> None:
    h = harness(8, 8)
    large = [running_for(h, gives(gpus=8), 3 * HOUR) for _ in range(2)]
    small = h.submit(job(gpus=8))
    claim = h.core.cluster.claims.of(small)
    assert claim is not None
    first = claim.placements[0].node
    h.turn(NodeSuspected(node=first))
    assert len(h.facts(ClaimDropped)) == 1
    h.settle(most_ms=11_000)
    assert h.states(*large) == ["stopping", "stopping"]
    claim = h.core.cluster.claims.of(small)
    assert claim is not None
    assert claim.placements[0].node != first


def test_what_is_leaving_anyway_is_taken_for_free() -> None:
    h = harness(8, 8)
    leaving = h.submit(job(gpus=8))
    h.run(leaving)
    large = running_for(h, gives(gpus=8), 3 * HOUR)
    h.cancel(leaving)
    waiting = h.submit(job(gpus=8))
    assert h.states(large, waiting) == ["running", "pending"]
    h.stopped(leaving)
    assert h.states(large, waiting) == ["running", "starting"]


def test_a_restart_in_the_middle_changes_nothing() -> None:
    def play(*, restart: bool) -> list[Any]:
        h = harness(8, 8)
        for _ in range(2):
            running_for(h, gives(gpus=8), 3 * HOUR)
        for step in range(4):
            h.submit(job(gpus=4))
            if restart:
                h.restart()
            h.settle(most_ms=5000 * step)
            for number in list(h.core.cluster.jobs):
                if h.state(number) == "stopping":
                    h.stopped(number)
        return [fact for kind in (ClaimMade, JobPlaced) for fact in h.facts(kind)]

    assert play(restart=False) == play(restart=True)
