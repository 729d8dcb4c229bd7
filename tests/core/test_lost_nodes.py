"""Leases that run out, nodes that are declared dead or taken out, and how they come back."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_daemon.core.state.inputs import (
    NodeDeclaredDead,
    NodeIncompatible,
    NodeLost,
    NodeRemoved,
    NodeReturned,
    ServiceApplied,
    YardStarted,
)
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Inventory, Joined, Start, Started, Stop
from gpuyard_protocol.resources import ResourceNeed
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, exited, job, node

LEASE_MS = 60_000
GRACE_MS = 30_000
#: (lease + grace) and a tenth.
PATIENCE_MS = 99_000


def leased(**fields: object) -> JobSpec:
    return msgspec.structs.replace(job(gpus=1, **fields), on_node_lost="restart", lease_ms=LEASE_MS)


def keeping(name: str, gpus: int = 2) -> Inventory:
    return node(name, gpus, keeps_leases=True)


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    h.join(keeping("n-1"))
    return h


def view(h: CoreHarness, name: str = "n-1") -> tuple[str, str]:
    found = next(view for view in h.core.node_views(None) if view.node == name)
    return found.state, found.reason


def lost_while_running(h: CoreHarness, spec: JobSpec | None = None) -> int:
    number = h.submit(spec or leased())
    h.run(number)
    h.turn(NodeLost(node="n-1"))
    h.join(keeping("n-2"))
    return number


def test_the_order_to_start_carries_the_lease_where_the_node_keeps_it(yard: CoreHarness) -> None:
    yard.submit(leased())
    (start,) = yard.new_orders(Start)
    assert start.launch.lease_ms == LEASE_MS
    assert list(yard.core.leased("n-1")) == [LEASE_MS]


def test_a_job_starts_elsewhere_once_its_lease_has_run_out_and_not_before(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.settle(most_ms=PATIENCE_MS - 1)
    assert yard.nodes_of(number) == ["n-1"]
    yard.settle(most_ms=1)
    assert (yard.nodes_of(number), yard.view(number).attempt) == (["n-2"], 2)
    assert yard.view(number).retries_left == 0
    assert yard.core.leased_nodes() == ("n-2",)


def test_a_node_that_returns_in_time_keeps_the_job(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.settle(most_ms=PATIENCE_MS - 1)
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    yard.settle(most_ms=10 * PATIENCE_MS)
    assert (yard.state(number), yard.nodes_of(number)) == ("running", ["n-1"])


def test_a_second_silence_is_waited_for_from_its_own_beginning(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")), after_ms=PATIENCE_MS - 10)
    yard.turn(NodeLost(node="n-1"), after_ms=5)
    yard.settle(most_ms=PATIENCE_MS - 1)
    assert yard.nodes_of(number) == ["n-1"]
    yard.settle(most_ms=1)
    assert yard.nodes_of(number) == ["n-2"]


def test_a_restarted_daemon_waits_anew(yard: CoreHarness) -> None:
    """How long it was away, only a wall clock knows, and a wall clock may jump."""
    number = lost_while_running(yard)
    yard.restart()
    yard.turn(YardStarted(epoch=7), after_ms=PATIENCE_MS * 100)
    assert yard.nodes_of(number) == ["n-1"]
    yard.settle(most_ms=PATIENCE_MS)
    assert yard.nodes_of(number) == ["n-2"]


def test_a_restart_in_the_middle_forgets_no_lease(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.restart()
    yard.settle(most_ms=PATIENCE_MS)
    assert yard.nodes_of(number) == ["n-2"]


def test_without_a_lease_a_job_waits_for_ever(yard: CoreHarness) -> None:
    number = lost_while_running(yard, job(gpus=1))
    yard.settle(most_ms=100 * PATIENCE_MS)
    assert (yard.state(number), yard.nodes_of(number)) == ("running", ["n-1"])


def test_a_job_on_a_node_that_keeps_no_leases_waits_for_it() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2))
    number = lost_while_running(h)
    h.settle(most_ms=100 * PATIENCE_MS)
    assert h.nodes_of(number) == ["n-1"]


def test_the_yard_says_what_a_job_does_not() -> None:
    h = CoreHarness(CoreSettings(on_node_lost="restart", lease_ms=LEASE_MS))
    h.join(keeping("n-1"))
    unsaid, waits = h.submit_many([job(gpus=1), msgspec.structs.replace(job(gpus=1), on_node_lost="wait")])
    assert [h.view(number).spec.lease_ms for number in (unsaid, waits) if h.view(number).spec] == [LEASE_MS, 0]  # type: ignore[union-attr]  # asked for with the spec
    h.turn(NodeLost(node="n-1"))
    h.join(keeping("n-2"))
    h.settle(most_ms=PATIENCE_MS)
    assert [h.nodes_of(unsaid), h.nodes_of(waits)] == [["n-2"], ["n-1"]]


def test_a_gang_that_lost_one_node_starts_again_as_a_whole() -> None:
    h = CoreHarness()
    h.join(keeping("n-1", 1), keeping("n-2", 1))
    number = h.submit(leased(replicas=2))
    h.run(number)
    h.turn(NodeLost(node="n-1"))
    h.settle(most_ms=PATIENCE_MS)
    # The other member is told to stop, and only when it has, the job waits again.
    assert h.state(number) == "stopping"
    h.join(keeping("n-3", 1))
    h.stopped(number)
    assert (h.view(number).attempt, set(h.nodes_of(number))) == (2, {"n-2", "n-3"})


# --- declared dead ----------------------------------------------------------------------------------------------------


def test_a_node_declared_dead_loses_its_jobs_at_once(yard: CoreHarness) -> None:
    number = lost_while_running(yard, job(gpus=1))
    yard.turn(NodeDeclaredDead(node="n-1", by="root"))
    assert (yard.state(number), yard.nodes_of(number)) == ("starting", ["n-2"])
    assert view(yard) == ("lost", "declared dead by root")


@pytest.mark.parametrize("state", ["ready", "incompatible"])
def test_only_a_lost_node_can_be_declared_dead(yard: CoreHarness, state: str) -> None:
    number = yard.submit(job(gpus=1))
    yard.run(number)
    if state == "incompatible":
        yard.turn(NodeIncompatible(node="n-1", reason="too old"))
    yard.turn(NodeDeclaredDead(node="n-1", by="root"), NodeDeclaredDead(node="n-9", by="root"))
    assert yard.state(number) == "running"


def test_a_returned_node_takes_no_work_until_it_has_ended_what_was_given_up(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.settle(most_ms=PATIENCE_MS)
    key = AssignmentKey(number, 1, 0)
    assert [order for order in yard.orders["n-1"] if isinstance(order, Stop)] == [
        Stop(key=key, grace_ms=GRACE_MS, reason="given-up")
    ]
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    assert view(yard) == ("joining", f"it must first end what was given up while it was lost: {key}")
    waiting = yard.submit_many([job(gpus=1), job(gpus=1)])
    assert yard.states(*waiting) == ["starting", "pending"]
    _, desired = yard.core.desired("n-1")
    assert [(entry.start.key, entry.stop is not None) for entry in desired] == [(key, True)]
    yard.report("n-1", Ended(key=key, outcome="stopped", at_ms=0))
    assert view(yard) == ("ready", "")
    assert yard.nodes_of(waiting[1]) == ["n-1"]
    assert yard.core.desired("n-1")[1][0].start.key.job == waiting[1]


def test_nothing_a_returned_node_says_of_what_was_given_up_is_believed(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.settle(most_ms=PATIENCE_MS)
    yard.started(number)
    key = AssignmentKey(number, 1, 0)
    yard.report("n-1", Started(key=key, at_ms=0), exited(key, 0))
    assert (yard.state(number), yard.view(number).attempt) == ("running", 2)
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    assert view(yard) == ("ready", "")


def test_an_agent_that_restarts_while_it_must_end_something_goes_on_with_that(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    yard.settle(most_ms=PATIENCE_MS)
    key = AssignmentKey(number, 1, 0)
    yard.join(keeping("n-1"), held={"n-1": (key,)})
    assert view(yard)[0] == "joining"
    yard.restart()
    yard.report("n-1", Ended(key=key, outcome="lost", at_ms=0, code="NodeRestarted"))
    assert view(yard)[0] == "ready"


def test_a_new_ledger_has_nothing_to_end(yard: CoreHarness) -> None:
    number = lost_while_running(yard)
    for _ in range(3):
        yard.report("n-1", Started(key=AssignmentKey(99, 1, 0), at_ms=0))
    yard.settle(most_ms=PATIENCE_MS)
    fresh = msgspec.structs.replace(
        yard.batch("n-1", Joined(inventory=keeping("n-1")), first=1), instance="fresh", ledger="another"
    )
    yard.turn(fresh)
    assert view(yard) == ("ready", "")
    assert yard.view(number).attempt == 2


def test_replicas_of_services_heal_at_once(yard: CoreHarness) -> None:
    yard.join(keeping("n-2"))
    spec = ServiceSpec(name="chat", need=ResourceNeed(gpus=1), argv=("serve",), min_replicas=2, max_replicas=2)
    yard.turn(ServiceApplied(tenant="acme", user="alice", submission_id="s-x", spec=spec))
    for number in (1, 2):
        yard.run(number)
    lost = yard.nodes_of(1)[0]
    other = {"n-1": "n-2", "n-2": "n-1"}[lost]
    yard.turn(NodeLost(node=lost))
    live = [n for n in yard.core.cluster.jobs if yard.state(n) == "starting"]
    assert live
    assert {place for n in live for place in yard.nodes_of(n)} == {other}


# --- taken out --------------------------------------------------------------------------------------------------------


def test_a_lost_node_without_jobs_can_be_taken_out_and_come_back(yard: CoreHarness) -> None:
    yard.turn(NodeRemoved(node="n-1", by="root"))
    assert view(yard)[0] == "ready"
    number = lost_while_running(yard, job(gpus=1))
    yard.turn(NodeRemoved(node="n-1", by="root"))
    assert view(yard)[0] == "lost"
    yard.turn(NodeDeclaredDead(node="n-1", by="root"), NodeRemoved(node="n-1", by="root"))
    assert [found.node for found in yard.core.node_views(None)] == ["n-2"]
    assert yard.core.known_nodes() == ("n-2",)
    assert yard.core.stats(0).nodes == {"ready": 1}
    assert yard.core.stats(0).gpus == 2
    yard.turn(NodeReturned(node="n-1", instance=yard.instance("n-1")))
    assert yard.core.known_nodes() == ("n-2",)
    yard.restart()
    # Its numbers were kept: nothing is taken for an order or report of an earlier life.
    yard.join(keeping("n-1"), held={"n-1": ()})
    assert yard.core.known_nodes() == ("n-1", "n-2")
    assert view(yard)[0] == "joining"
    yard.report("n-1", Ended(key=AssignmentKey(number, 1, 0), outcome="stopped", at_ms=0))
    assert view(yard)[0] == "ready"
