"""Production cores in simulated time under every fault there is: fifty seeds, and proof that the bench can see.

`make soak` plays a thousand and more. A failure says with which command it is repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from faults.host import LedgerFile
from faults.simulate import SimulationFailed, simulate
from gpuyard_agent.core.book import Counters
from gpuyard_agent.core.model import Assignment, Closed
from gpuyard_daemon.dispatch import Dispatcher
from gpuyard_protocol.names import AssignmentKey

SEEDS = range(1, 51)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_or_run_or_given_twice_and_in_the_end_all_is_done(seed: int) -> None:
    played = simulate(seed)
    assert played.records > 0


def test_equal_seeds_give_equal_runs_in_every_process() -> None:
    """A seed that fails on one machine must fail on the next."""
    command = [sys.executable, "-m", "faults.simulate", "--seed", "7"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert f"digest {simulate(7).digest}" in other.stdout, other.stdout + other.stderr


def _fails_within(seeds: int) -> bool:
    for seed in range(1, seeds + 1):
        try:
            simulate(seed)
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
    assert _fails_within(10)
