"""Production cores in simulated time under every fault there is: fifty seeds, and proof that the bench can see.

`make soak` plays a thousand and more. A failure says with which command it is repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from faults.host import LedgerFile
from faults.long_run import Sample, growth
from faults.network import FaultyBroker
from faults.simulate import SimulationFailed, simulate, simulate_hours
from faults.world import Kind
from gpuyard_agent.core.book import Counters
from gpuyard_agent.core.model import Assignment, Closed
from gpuyard_agent.launch.leases import Leases
from gpuyard_daemon.core.applying import lost_facts
from gpuyard_daemon.core.handling import deadlines
from gpuyard_daemon.dispatch import Dispatcher
from gpuyard_protocol.names import AssignmentKey

SEEDS = range(1, 51)
PARTITION_SEEDS = range(1, 13)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_or_run_or_given_twice_and_in_the_end_all_is_done(seed: int) -> None:
    played = simulate(seed)
    assert played.records > 0


@pytest.mark.parametrize("seed", PARTITION_SEEDS)
def test_hosts_that_are_cut_off_for_long_keep_every_promise_too(seed: int) -> None:
    """Leases run out, jobs start elsewhere, and hosts come back with what was given up."""
    played = simulate(seed, kind="partitions")
    assert played.records > 0


@pytest.mark.parametrize("seed", range(1, 7))
def test_a_neighbour_in_version_says_more_than_is_understood_and_all_is_done(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders, heartbeats and reports each carry a field of a later version."""

    def later(self: FaultyBroker, subject: str, data: bytes) -> bytes:
        between = subject.startswith(("cmd.", "hb.", "rep."))
        return b'{"later":{"x":[1]},' + data[1:] if between and data.startswith(b'{"') else data

    monkeypatch.setattr(FaultyBroker, "rewrite", later)
    assert simulate(seed).processes > 0


def test_an_hour_of_a_larger_yard_keeps_every_promise_and_nothing_that_is_over() -> None:
    """`make soak` plays a day of two hundred nodes."""
    played, samples = simulate_hours(seed=1, nodes=10, hours=1)
    assert played.processes > 100
    assert [sample.hour for sample in samples] == [1]
    assert samples[0].heads > 2
    assert samples[0].agents > 10


def test_growth_is_told_and_noise_is_not() -> None:
    flat = Sample(1, 100.0, 3000, 900, 5000, 300, 200, 1000, 5000, 3, 20)
    assert growth([flat._replace(hour=hour, rss_mib=100.0 + hour % 3) for hour in range(1, 25)]) == []
    assert "rss_mib grew" in growth([flat._replace(hour=hour, rss_mib=100.0 + 2 * hour) for hour in range(1, 25)])[0]


def test_the_bench_sees_leases_that_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hasty = lambda node, assignment, spec: node.lost_ms + assignment.lease_ms // 8  # noqa: E731  a mutant of one line
    for module in (lost_facts, deadlines):
        monkeypatch.setattr(module, "lapses_ms", hasty)
    assert _fails_within(10, "partitions")


def test_the_bench_sees_leases_that_nobody_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "run_out", lambda self, now_ms: ())
    assert _fails_within(10, "partitions")


def test_equal_seeds_give_equal_runs_in_every_process() -> None:
    """A seed that fails on one machine must fail on the next."""
    command = [sys.executable, "-m", "faults.simulate", "--seed", "7"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert f"digest {simulate(7).digest}" in other.stdout, other.stdout + other.stderr


def _fails_within(seeds: int, kind: Kind = "crashes") -> bool:
    for seed in range(1, seeds + 1):
        try:
            simulate(seed, kind=kind)
        except SimulationFailed:
            return True
    return False


def test_the_bench_sees_a_ledger_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    load = LedgerFile.load

    def forgetful(self: LedgerFile, now_ms: int) -> tuple[Counters, list[Assignment], dict[AssignmentKey, Closed]]:
        counters, _, closed = load(self, now_ms)
        return counters, [], closed

    monkeypatch.setattr(LedgerFile, "load", forgetful)
    assert _fails_within(5)


def test_the_bench_sees_orders_that_are_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatcher, "heard", lambda self, node, instance, applied: None)
    monkeypatch.setattr(Dispatcher, "sync_all", lambda self: None)
    assert _fails_within(20, "partitions")
