"""The live mix: what arrivals and the queue make of it, when it changes, and that a restart goes on with the same."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_daemon.core.placing import demand as demand_module
from gpuyard_daemon.core.placing.demand import DemandRecord, LiveDemand, faded
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.snapshot import Snapshot
from gpuyard_daemon.core.state.turn import Record
from gpuyard_protocol.resources import ResourceNeed
from support.builders import START_MS, CoreHarness, job, need, node

DAY_MS = 86_400_000


def kinds(demand: LiveDemand) -> dict[str, int]:
    """Weights of the mix in use, in thousandths."""
    return {each.describe(): weight // 1000 for each, weight in demand.record.in_use}


def arrive(demand: LiveDemand, wanted: ResourceNeed, times: int, at_ms: int = START_MS, nodes: int = 1) -> None:
    for _ in range(times):
        demand.arrived(wanted, 1, at_ms, nodes)


def test_a_yard_that_has_seen_nothing_goes_by_one_whole_card() -> None:
    (only,) = LiveDemand().mix.demands
    assert only.need.gpus == 1


def test_the_mix_is_made_at_epochs_from_what_arrived() -> None:
    demand = LiveDemand()
    arrive(demand, need(gpus=1), 12)
    arrive(demand, need(gpus=8), 3)
    assert demand.version == 0
    arrive(demand, need(gpus=8), 1)
    assert demand.version == 1
    assert kinds(demand) == {"1×GPU": 750, "8×GPU": 250}


def test_what_waits_counts_twice() -> None:
    demand = LiveDemand()
    demand.waits(need(gpus=8), 4)
    arrive(demand, need(gpus=1), 16)
    assert kinds(demand) == {"1×GPU": 666, "8×GPU": 333}
    demand.waits(need(gpus=8), -4)
    arrive(demand, need(gpus=1), 16)
    assert kinds(demand) == {"1×GPU": 1000}


def test_names_labels_and_limits_are_no_kinds_of_their_own() -> None:
    demand = LiveDemand()
    arrive(demand, need(gpus=1, nodes=("n-1",), cpu_asked=True), 8)
    arrive(demand, need(gpus=1, node_labels=(("zone", "b"),), gpu_processes=3), 8)
    assert kinds(demand) == {"1×GPU": 1000}


def test_a_mix_that_hardly_differs_is_not_taken_over() -> None:
    demand = LiveDemand()
    for _ in range(40):
        arrive(demand, need(gpus=1), 9)
        arrive(demand, need(gpus=2), 1)
    settled = demand.version
    for _ in range(200):
        arrive(demand, need(gpus=1), 9)
        arrive(demand, need(gpus=2), 1)
    assert demand.version == settled


def test_old_arrivals_fade() -> None:
    assert faded(1 << 20, 0) == 1 << 20
    assert faded(1 << 20, DAY_MS) == 1 << 19
    assert faded(1 << 20, DAY_MS // 2) == (1 << 20) * 3 // 4
    assert faded(1 << 20, 100 * DAY_MS) == 0
    demand = LiveDemand()
    arrive(demand, need(gpus=8), 16)
    arrive(demand, need(gpus=1), 16, START_MS + 10 * DAY_MS)
    assert kinds(demand)["1×GPU"] >= 990


def test_the_record_goes_on_where_it_stopped() -> None:
    one = LiveDemand()
    arrive(one, need(gpus=1), 20)
    arrive(one, need(share_milli=300), 7)
    data = msgspec.msgpack.encode(one.record)
    other = LiveDemand(msgspec.msgpack.decode(data, type=DemandRecord))
    for demand in (one, other):
        arrive(demand, need(gpus=4), 9)
    assert msgspec.msgpack.encode(one.record) == msgspec.msgpack.encode(other.record)
    assert one.mix.demands == other.mix.demands


def test_a_snapshot_from_before_demand_was_counted_begins_with_what_is_there() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2))
    h.submit_many([job(gpus=1)] * 20)
    snapshot = msgspec.msgpack.decode(h.core.snapshot(), type=Snapshot)
    old = msgspec.msgpack.encode(msgspec.structs.replace(snapshot, demand=None))
    restored = Scheduler.restore(old)
    assert kinds(restored.cluster.demand) == {"1×GPU": 1000}
    assert restored.cluster.demand.record.seen == 20


def goes_by(demand: LiveDemand, nodes: int) -> list[str]:
    """What is commonest in the mix of each node."""
    return [demand.mix_at(number).demands[0].need.describe() for number in range(1, nodes + 1)]


def test_a_large_yard_takes_a_changed_mix_over_node_by_node() -> None:
    demand = LiveDemand()
    arrive(demand, need(gpus=1), 16, nodes=38)
    assert goes_by(demand, 38) == ["1×GPU"] * 38
    arrive(demand, need(gpus=8), 1600, nodes=20)
    assert goes_by(demand, 20) == ["8×GPU"] * 20
    changed = demand.version
    while demand.version == changed:
        arrive(demand, need(gpus=2), 1, START_MS + 9 * DAY_MS, nodes=38)
    assert goes_by(demand, 38) == ["2×GPU"] * 16 + ["8×GPU"] * 22
    restored = LiveDemand(msgspec.msgpack.decode(msgspec.msgpack.encode(demand.record), type=DemandRecord))
    assert goes_by(restored, 38) == goes_by(demand, 38)
    for each in (demand, restored):
        arrive(each, need(gpus=2), 1, START_MS + 9 * DAY_MS, nodes=38)
        assert goes_by(each, 38) == ["2×GPU"] * 32 + ["8×GPU"] * 6
        arrive(each, need(gpus=2), 1, START_MS + 9 * DAY_MS, nodes=38)
        assert goes_by(each, 38) == ["2×GPU"] * 38
        assert not each.record.before


def test_a_core_restored_while_a_mix_is_taken_over_decides_like_one_that_never_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demand_module, "_NODES_PER_ARRIVAL", 1)
    halfway = 0

    def day(harness: CoreHarness) -> list[Record]:
        nonlocal halfway
        harness.join(*[node(f"n-{number}", 8) for number in range(1, 9)])
        running: list[int] = []
        for number in range(100):
            kind = (job(gpus=1), job(share_milli=300), job(gpus=4), job(share_milli=650))[number // 20 % 4]
            running.append(harness.submit(kind))
            halfway += bool(harness.core.cluster.demand.record.before)
            if number % 3 and harness.state(running[0]) == "starting":
                harness.run(running[0])
                harness.ended(running.pop(0))
        return harness.records

    assert day(CoreHarness()) == day(CoreHarness(restart_every=1))
    assert halfway > 10
