"""Gangs: all members or none, in two phases, and one member's end is everybody's."""

from __future__ import annotations

from typing import Any

from gpuyard_daemon.core.state.facts import JobPlaced
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Go, Prepared, Start, Started, Stop
from gpuyard_protocol.resources import TimeSliceShare
from support.builders import CoreHarness, exited, gpu, job, node


def harness(*gpus: int) -> CoreHarness:
    h = CoreHarness()
    h.join(*[node(f"n-{number}", count) for number, count in enumerate(gpus, 1)])
    return h


def test_a_gang_waits_when_one_member_does_not_fit() -> None:
    h = harness(2, 2)
    blocker = h.submit(job(gpus=1))
    gang = h.submit(job(replicas=4, gpus=1))
    assert h.state(gang) == "pending"
    assert h.new_facts(JobPlaced) == []
    h.run(blocker)
    h.ended(blocker)
    assert h.state(gang) == "starting"
    assert sorted(h.nodes_of(gang)) == ["n-1", "n-1", "n-2", "n-2"]


def test_a_waiting_gang_holds_nothing() -> None:
    h = harness(2, 2)
    h.submit(job(gpus=1))
    gang, single = h.submit_many([job(replicas=4, gpus=1), job(gpus=2)])
    assert h.states(gang, single) == ["pending", "starting"]


def test_a_gang_keeps_together_on_the_node_it_fills_best() -> None:
    h = harness(8, 4, 8)
    assert h.nodes_of(h.submit(job(replicas=4, gpus=1))) == ["n-2"] * 4


def test_a_gang_over_nodes_uses_few_and_fills_the_last_one_best() -> None:
    h = harness(4, 8, 2, 8)
    assert h.nodes_of(h.submit(job(replicas=9, gpus=2))) == ["n-2"] * 4 + ["n-4"] * 4 + ["n-3"]


def test_members_are_held_until_all_are_prepared() -> None:
    h = harness(1, 1)
    gang = h.submit(job(replicas=2, gpus=1))
    assert [start.hold for start in h.new_orders(Start)] == [True, True]
    first, second = h.nodes_of(gang)
    h.report(first, Prepared(key=AssignmentKey(gang, 1, 0), port=29_511))
    h.check_no_other_orders()
    h.report(second, Prepared(key=AssignmentKey(gang, 1, 1), port=29_522))
    go = h.new_orders(Go)
    assert [order.key.replica for order in go] == [0, 1]
    assert go[1].master_address == "10.0.0.1"
    assert go[1].master_port == 29_511
    assert go[1].peers == ("10.0.0.1", "10.0.0.2")
    assert h.state(gang) == "starting"
    h.report(first, Started(key=AssignmentKey(gang, 1, 0), at_ms=1))
    assert h.state(gang) == "starting"
    h.report(second, Started(key=AssignmentKey(gang, 1, 1), at_ms=1))
    assert h.state(gang) == "running"


def test_a_gang_succeeds_when_every_member_has() -> None:
    h = harness(2)
    gang = h.submit(job(replicas=2, gpus=1))
    h.run(gang)
    h.report("n-1", exited(AssignmentKey(gang, 1, 1)))
    assert h.state(gang) == "running"
    h.check_no_other_orders()
    h.report("n-1", exited(AssignmentKey(gang, 1, 0)))
    assert h.state(gang) == "succeeded"


def test_one_members_failure_ends_the_attempt_for_all() -> None:
    h = harness(3)
    gang = h.submit(job(replicas=3, gpus=1))
    h.run(gang)
    h.report("n-1", exited(AssignmentKey(gang, 1, 1), 7))
    stops = h.new_orders(Stop)
    assert [(stop.key.replica, stop.reason) for stop in stops] == [(0, "peer-failed"), (2, "peer-failed")]
    assert h.state(gang) == "stopping"
    h.report("n-1", Ended(key=AssignmentKey(gang, 1, 0), outcome="stopped", at_ms=1))
    assert h.state(gang) == "stopping"
    h.report("n-1", Ended(key=AssignmentKey(gang, 1, 2), outcome="exited", at_ms=1, exit_code=143))
    view = h.view(gang)
    assert view.reason is not None
    assert (view.state, view.exit_code, view.reason.code) == ("failed", 7, "ExitCode")
    assert "replica 1" in view.reason.text


def test_a_gang_that_is_not_prepared_in_time_gives_its_places_back_uncharged() -> None:
    h = harness(2)
    gang = h.submit(job(replicas=2, gpus=1, retries=1))
    h.report("n-1", Prepared(key=AssignmentKey(gang, 1, 0), port=29_500))
    h.settle(most_ms=29_999)
    assert h.state(gang) == "starting"
    h.settle(most_ms=1)
    assert [stop.reason for stop in h.new_orders(Stop)] == ["prepare-timeout"] * 2
    assert h.state(gang) == "stopping"
    h.stopped(gang)
    view = h.view(gang)
    assert (view.state, view.attempt, view.retries_left) == ("starting", 2, 1)


def test_a_prepared_gang_is_not_timed_out() -> None:
    h = harness(2)
    gang = h.submit(job(replicas=2, gpus=1))
    h.prepared(gang)
    h.settle(most_ms=120_000)
    assert h.state(gang) == "starting"


def test_a_late_prepared_after_the_timeout_releases_nobody() -> None:
    h = harness(2)
    gang = h.submit(job(replicas=2, gpus=1))
    h.settle(most_ms=30_000)
    h.prepared(gang)
    h.check_no_other_orders()
    assert h.state(gang) == "stopping"


def test_a_gang_shares_time_on_one_node_but_never_over_several() -> None:
    cards = [gpu(index, node="n-1", modes=("whole", "timeslice")) for index in range(2)]
    more = [gpu(index, node="n-2", modes=("whole", "timeslice")) for index in range(2)]
    h = CoreHarness()
    h.join(node("n-1", devices=cards), node("n-2", devices=more))
    wanted: dict[str, Any] = {"share_milli": 500, "share_memory_mib": 30_000, "isolation": "none"}
    together = h.submit(job(replicas=4, **wanted))
    assert set(h.nodes_of(together)) == {"n-1"}
    assert all(isinstance(partition, TimeSliceShare) for partition in h.partitions_of(together))
    assert h.submit(job(replicas=6, **wanted)) == 0
    assert h.answers[-1].reason is not None
    assert h.answers[-1].reason.code == "Impossible"


def test_members_of_a_time_sharing_gang_over_nodes_get_mps_instead() -> None:
    h = harness(1, 1)
    gang = h.submit(job(replicas=4, share_milli=500, share_memory_mib=30_000, isolation="none"))
    assert h.view(gang).placed[0].partition.startswith("mps")
    assert sorted(h.nodes_of(gang)) == ["n-1", "n-1", "n-2", "n-2"]


def test_a_gang_larger_than_the_bound_of_a_turn_starts_whole() -> None:
    h = harness(0)
    gang = h.submit(job(replicas=100, cpu_milli=1000))
    assert len(h.nodes_of(gang)) == 100
