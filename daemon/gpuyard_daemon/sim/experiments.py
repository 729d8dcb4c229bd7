"""The comparisons as one call each: files and a policy's name in, one flat record of numbers out.

The command line and the benchmarks both call these, so they cannot disagree.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path

from gpuyard_daemon.core.scoring import round_rank
from gpuyard_daemon.sim import ordering
from gpuyard_daemon.sim.churn import Churn
from gpuyard_daemon.sim.dynamic import Dynamic
from gpuyard_daemon.sim.fill import MARKS, FillResult, fill
from gpuyard_daemon.sim.history import GittinsTable
from gpuyard_daemon.sim.jobs_run import JobPolicy, JobsRun, RunJob
from gpuyard_daemon.sim.measures import Measures, job_measures
from gpuyard_daemon.sim.openb import Ask, HostShape, read_asks, read_hosts
from gpuyard_daemon.sim.placing import PLACEMENT_POLICIES, mix_of, placement_policy, tie_order
from gpuyard_daemon.sim.trace_files import TraceError
from gpuyard_daemon.sim.trace_jobs import TraceJob, model_restart_s, read_jobs
from gpuyard_daemon.sim.typical import TypicalTasks

JOB_POLICIES = ("gpuyard", "fifo", "fifo-skip", "easy", "sjf", "srtf", "srsf", "tiresias", "gittins", "qssf")
POLICIES = tuple(dict.fromkeys(JOB_POLICIES + PLACEMENT_POLICIES))
#: Spread of estimates around the truth, and the part of jobs that have one.
_ESTIMATE_SIGMA = 1.0
_ESTIMATE_PART = 0.7


def _hosts_for(policy: str, hosts: tuple[HostShape, ...]) -> tuple[HostShape, ...]:
    return hosts if policy == "gpuyard" else tie_order(hosts)


def run_fill(nodes: Path, pods: Path, policy: str, seeds: int, seed_base: int = 0, batch: int = 1) -> Measures:
    hosts, asks = read_hosts(nodes), read_asks(pods)
    typical, mix = TypicalTasks(asks), mix_of(asks)
    results: list[FillResult] = []
    for seed in range(seed_base, seed_base + seeds):
        chosen = placement_policy(policy, typical, mix, seed)
        rank = _rank if policy == "gpuyard" else None
        results.append(fill(_hosts_for(policy, hosts), asks, chosen, seed, batch, typical, rank))
    took = sorted(ns for result in results for ns in result.took_ns)
    means = [statistics.fmean(result.allocation[at] for result in results) for at in range(len(MARKS))]
    last = [result.allocation[-1] for result in results]
    return {
        "policy": policy,
        "seeds": seeds,
        "alloc": {str(mark): round(mean, 3) for mark, mean in zip(MARKS, means, strict=True)},
        "alloc_130_sd": round(statistics.stdev(last), 3) if seeds > 1 else 0.0,
        "frag_130": round(statistics.fmean(result.fragmentation for result in results), 3),
        "decisions_per_s": round(len(took) * 1e9 / sum(took)),
        "p50_us": round(took[len(took) // 2] / 1000, 1),
        "p99_us": round(took[int(0.99 * len(took))] / 1000, 1),
    }


def _rank(ask: Ask) -> tuple[int, ...]:
    return (round_rank(ask.gpus),)


def run_churn(nodes: Path, pods: Path, policy: str, load: float, seed: int = 0) -> Measures:
    hosts, asks = read_hosts(nodes), read_asks(pods)
    typical = TypicalTasks(asks)
    chosen = placement_policy(policy, typical, mix_of(asks), seed)
    result = Churn(_hosts_for(policy, hosts), asks, chosen, load, seed).run(typical)
    return {
        "policy": policy,
        "load": load,
        "blocked_pct": round(result.blocked_pct, 4),
        "frag_pct": round(result.frag_pct, 3),
        "moves_per_100": round(result.moves_per_100, 3),
        "avg_wait_s": round(result.avg_wait_s, 2),
    }


def run_jobs(
    trace: Path, file_format: str, policy: str, nodes: int, gpus_per_node: int, durations: str, restart: float | None,
    seed: int = 0,
) -> JobsRun:  # fmt: skip
    """`restart`: seconds for each start; None: by model. `durations`: known, estimated or unknown."""
    jobs = read_jobs(trace, file_format)
    too_large = next((job for job in jobs if job.gpus > nodes * gpus_per_node), None)
    if too_large is not None:
        raise TraceError(f"{trace}: a job asks for {too_large.gpus} GPUs, the cluster has {nodes * gpus_per_node}")
    dice = random.Random(seed)
    run_jobs = [
        RunJob(job, _restart_s(job, restart), _estimate_s(job, durations, dice)) for job in jobs
    ]  # fmt: skip
    run = JobsRun(run_jobs, nodes, gpus_per_node, job_policy(policy, run_jobs, nodes, gpus_per_node))
    run.go()
    return run


def _restart_s(job: TraceJob, restart: float | None) -> float:
    return model_restart_s(job.model, job.gpus) if restart is None else restart


def _estimate_s(job: TraceJob, durations: str, dice: random.Random) -> float | None:
    if durations == "known":
        return job.service_s
    if durations == "estimated" and dice.random() < _ESTIMATE_PART:
        return job.service_s * dice.lognormvariate(0.0, _ESTIMATE_SIGMA)
    return None


def job_policy(name: str, jobs: list[RunJob], nodes: int, gpus_per_node: int) -> JobPolicy:
    """A policy by name; `KeyError` for an unknown one."""
    match name:
        case "gpuyard":
            return Dynamic(nodes, gpus_per_node)
        case "fifo" | "fifo-skip":
            return ordering.fifo(skip=name == "fifo-skip")
        case "easy":
            return ordering.Easy()
        case "gittins":
            return ordering.gittins(GittinsTable([job.gpus * job.service_s for job in jobs]))
        case _:
            makers: dict[str, Callable[[], JobPolicy]] = {
                "sjf": ordering.sjf, "qssf": ordering.qssf, "srtf": ordering.srtf, "srsf": ordering.srsf,
                "tiresias": ordering.tiresias,
            }  # fmt: skip
            return makers[name]()


def jobs_result(run: JobsRun) -> Measures:
    return job_measures(run)
