"""What each comparison's JSON is called: other programs read these names."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import bench.core
import bench.why
import pytest

from gpuyard_daemon.sim.experiments import run_churn, run_fill

NODES = "sn,cpu_milli,memory_mib,gpu,model\nn-1,32000,131072,4,T4\nn-2,32000,131072,4,T4\n"
PODS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np-1,1000,1024,1,1000\np-2,1000,1024,1,460\n"


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Benchmarks set the garbage collector as the daemon does."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def _files(directory: Path) -> tuple[Path, Path]:
    nodes, pods = directory / "nodes.csv", directory / "pods.csv"
    nodes.write_text(NODES)
    pods.write_text(PODS)
    return nodes, pods


def test_a_fill_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    found = run_fill(*_files(tmp_path), "fgd", seeds=2)
    assert list(found) == [
        "policy", "seeds", "alloc", "alloc_130_sd", "frag_130", "decisions_per_s", "p50_us", "p99_us",
    ]  # fmt: skip
    assert isinstance(found["alloc"], dict)
    assert list(found["alloc"]) == ["90", "95", "100", "110", "130"]


def test_a_churn_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    found = run_churn(*_files(tmp_path), "fgd", 0.5)
    assert list(found) == ["policy", "load", "blocked_pct", "frag_pct", "moves_per_100", "avg_wait_s"]


def test_the_core_has_exactly_the_promised_keys() -> None:
    found = bench.core.measure(nodes=2, cards=8, queued=20, turns=5, seed=0)
    assert list(found) == ["nodes", "gpus", "queued", "decisions_per_s", "p50_us", "p99_us", "max_us", "rss_mib"]


def test_why_has_exactly_the_promised_keys() -> None:
    found = bench.why.measure(queued=20, nodes=2, gpus=8, questions=3, seed=0)
    assert list(found) == ["queued", "p50_ms", "p99_ms"]
