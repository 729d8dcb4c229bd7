"""The comparisons as one call each: files and a policy's name in, one flat record of numbers out.

The command line and the benchmarks both call these, so they cannot disagree.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path

from gpuyard_daemon.sim import ordering
from gpuyard_daemon.sim.board_pods import BoardPods
from gpuyard_daemon.sim.churn import Churn
from gpuyard_daemon.sim.core_jobs import CoreJobs
from gpuyard_daemon.sim.core_pods import CorePods
from gpuyard_daemon.sim.equal_tenants import equal_tenants
from gpuyard_daemon.sim.fill import MARKS, fill, read_as_published
from gpuyard_daemon.sim.history import GittinsTable
from gpuyard_daemon.sim.jobs_run import DAY_S, JobPolicy, JobsRun, RunJob
from gpuyard_daemon.sim.measures import Measures, further_measures, job_measures
from gpuyard_daemon.sim.openb import HostShape, read_asks, read_hosts
from gpuyard_daemon.sim.placing import PLACEMENT_POLICIES, placement_policy, tie_order
from gpuyard_daemon.sim.pods import Pods
from gpuyard_daemon.sim.published_draws import FIRST_SEED, published_run
from gpuyard_daemon.sim.tiresias import Tiresias
from gpuyard_daemon.sim.trace_files import TraceError
from gpuyard_daemon.sim.trace_jobs import TraceJob, model_restart_s, read_jobs
from gpuyard_daemon.sim.typical import TypicalTasks
from gpuyard_protocol.jobs import Preemption

JOB_POLICIES = ("gpuyard", "fifo", "fifo-skip", "easy", "sjf", "srtf", "srsf", "tiresias", "gittins", "qssf")
POLICIES = tuple(dict.fromkeys(JOB_POLICIES + PLACEMENT_POLICIES))
#: Spread of estimates around the truth, and the part of jobs that have one.
_ESTIMATE_SIGMA = 1.0
_ESTIMATE_PART = 0.7


def pods_under(
    policy: str, hosts: tuple[HostShape, ...], typical: TypicalTasks, seed: int, preemption: Preemption
) -> Pods:
    """Empty hosts under a policy. `preemption`: of all pods, for the one policy that takes any off."""
    if policy == "gpuyard":
        return CorePods(hosts, preemption)
    return BoardPods(tie_order(hosts, seed), placement_policy(policy, typical, seed))


def run_fill(nodes: Path, pods: Path, policy: str, seeds: int, seed_base: int = 0, batch: int = 1) -> Measures:
    hosts, asks = read_hosts(nodes), read_asks(pods)
    typical = TypicalTasks(asks)
    results = [
        fill(pods_under(policy, hosts, typical, seed, "never"), asks, seed, batch, typical)
        for seed in range(seed_base, seed_base + seeds)
    ]
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


def run_published_fill(nodes: Path, pods: Path, policy: str, run: int) -> tuple[float, float]:
    """A baseline's allocation at 100 and 130 % arrived in one of the ten published runs, from 0 on."""
    hosts, asks = read_hosts(nodes), read_asks(pods)
    order, hosts = published_run(asks, hosts, FIRST_SEED + run)
    return read_as_published(BoardPods(hosts, placement_policy(policy, TypicalTasks(asks), run)), order)


def run_churn(
    nodes: Path, pods: Path, policy: str, load: float, seed: int = 0, preemption: Preemption = "checkpoint"
) -> Measures:
    """`preemption`: of all pods; it matters to the core alone, since no baseline takes pods off their hosts."""
    hosts, asks = read_hosts(nodes), read_asks(pods)
    typical = TypicalTasks(asks)
    result = Churn(pods_under(policy, hosts, typical, seed, preemption), asks, load, seed).run(typical)
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
        RunJob(job, _restart_s(job, restart), estimate_s(job, durations, dice)) for job in jobs
    ]  # fmt: skip
    run = JobsRun(run_jobs, nodes, gpus_per_node, job_policy(policy, run_jobs, nodes, gpus_per_node))
    run.go()
    return run


def run_equal_tenants(
    policy: str, load: float, days: int, nodes: int, gpus_per_node: int, restart_s: float, seed: int
) -> JobsRun:
    """Tenants of equal weight who want more than there is, for whole days, with run times unknown."""
    jobs = equal_tenants(load, days, nodes * gpus_per_node, gpus_per_node, seed)
    run_jobs = [RunJob(job, restart_s, None) for job in jobs]
    run = JobsRun(run_jobs, nodes, gpus_per_node, job_policy(policy, run_jobs, nodes, gpus_per_node))
    run.go(days * DAY_S)
    return run


def _restart_s(job: TraceJob, restart: float | None) -> float:
    return model_restart_s(job.model, job.gpus) if restart is None else restart


def estimate_s(job: TraceJob, durations: str, dice: random.Random) -> float | None:
    if durations == "known":
        return job.service_s
    if durations == "estimated" and dice.random() < _ESTIMATE_PART:
        return job.service_s * dice.lognormvariate(0.0, _ESTIMATE_SIGMA)
    return None


def job_policy(name: str, jobs: list[RunJob], nodes: int, gpus_per_node: int) -> JobPolicy:
    """A policy by name; `KeyError` for an unknown one."""
    match name:
        case "gpuyard":
            return CoreJobs(nodes, gpus_per_node)
        case "fifo" | "fifo-skip":
            return ordering.fifo(skip=name == "fifo-skip")
        case "easy":
            return ordering.Easy()
        case "gittins":
            return ordering.gittins(GittinsTable([job.gpus * job.service_s for job in jobs]))
        case _:
            makers: dict[str, Callable[[], JobPolicy]] = {
                "sjf": ordering.sjf, "qssf": ordering.qssf, "srtf": ordering.srtf, "srsf": ordering.srsf,
                "tiresias": Tiresias,
            }  # fmt: skip
            return makers[name]()


def jobs_result(run: JobsRun, *, more: bool = False) -> Measures:
    """The figures that runs are compared by; `more`: further ones as well."""
    return job_measures(run) | (further_measures(run) if more else {})
