"""What a job run is measured by, with the exact definitions that published values use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeAlias

from gpuyard_daemon.sim.jobs_run import DAY_S, JobsRun, RunJob

Measures: TypeAlias = dict[str, object]


def percentile(ordered: list[float], part: float) -> float:
    """sorted[int(part * n)]."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def jain(shares: list[float]) -> float:
    """1 if all are equal, 1/n if one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def job_measures(run: JobsRun) -> Measures:
    jobs = run.jobs
    count = len(jobs)
    completion = sorted(job.finish_s - job.submit_s for job in jobs)
    waits = _first_waits(jobs)
    queued = sum(job.finish_s - job.submit_s - job.service_s for job in jobs)
    slowdown = max((job.finish_s - job.submit_s) / max(10.0, job.service_s) for job in jobs)
    return {
        "policy": run.policy.name,
        "jobs": count,
        "avg_jct_s": round(sum(completion) / count, 1),
        "p50_jct_s": round(percentile(completion, 0.5), 1),
        "p99_jct_s": round(percentile(completion, 0.99), 1),
        "avg_queue_s": round(queued / count, 1),
        "makespan_s": round(max(job.finish_s for job in jobs) - jobs[0].submit_s, 1),
        "preemptions_per_job": round(sum(job.starts - 1 for job in jobs) / count, 3),
        "first_start_p99_s": round(percentile(waits, 0.99), 1),
        "worst_slowdown": round(slowdown, 1),
        "jain_24h": round(jain_24h(run), 4),
    }


#: Jobs up to this many GPUs count as small in the first-start wait of small jobs.
SMALL_GPUS = 8


def further_measures(run: JobsRun) -> Measures:
    """What is worth a look besides: waits of small jobs, work lost to restarts, how full it was."""
    jobs = run.jobs
    small = _first_waits([job for job in jobs if job.gpus <= SMALL_GPUS])
    useful = sum(job.gpus * job.service_s for job in jobs)
    held = useful + run.overhead_gpu_s
    makespan_s = max(job.finish_s for job in jobs) - jobs[0].submit_s
    return {
        "first_start_p99_small_s": round(percentile(small, 0.99), 1) if small else 0.0,
        "first_start_max_s": round(max(job.first_start_s - job.submit_s for job in jobs), 1),
        "restart_pct": round(100 * run.overhead_gpu_s / useful, 3),
        "allocation_pct": round(100 * held / (makespan_s * run.nodes * run.per_node), 2),
        "jain_entitled_24h": round(jain_entitled_24h(run), 4),
        "tenants": len({job.tenant for job in jobs}),
    }


def _first_waits(jobs: Sequence[RunJob]) -> list[float]:
    return sorted(job.first_start_s - job.submit_s for job in jobs)


def jain_24h(run: JobsRun) -> float:
    """Mean over days of Jain's index of the GPU time each tenant got over what it could have used that day.

    What it could have used: its jobs in the system, at most all the time on all their GPUs. Days after the last
    submission are left out.
    """
    return _mean_jain(run, lambda wanted: wanted)


def jain_entitled_24h(run: JobsRun) -> float:
    """The same over what each was entitled to: what it could have used, as far as an equal division gives it that.

    Beyond its entitlement nothing counts, so a tenant that wants little and gets it at once is no unfairness.
    """
    capacity = run.nodes * run.per_node * DAY_S
    return _mean_jain(run, lambda wanted: entitlements(wanted, capacity))


def fairness_measures(run: JobsRun) -> Measures:
    """Both indices, and by tenant and day what it got over what it was entitled to."""
    capacity = run.nodes * run.per_node * DAY_S
    parts: dict[str, list[float]] = defaultdict(list)
    for day, wanted in enumerate(run.wanted):
        for tenant, due in sorted(entitlements(wanted, capacity).items()):
            got = sum(run.held.get((hour, tenant), 0.0) for hour in range(day * 24, day * 24 + 24))
            parts[tenant].append(round(got / due, 3))
    return {
        "policy": run.policy.name,
        "jobs": len(run.jobs),
        "jain_24h": round(jain_24h(run), 4),
        "jain_entitled_24h": round(jain_entitled_24h(run), 4),
        "of_due": dict(parts),
    }


def _mean_jain(run: JobsRun, due_of: Callable[[dict[str, float]], dict[str, float]]) -> float:
    got: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (hour, tenant), gpu_s in run.held.items():
        got[int(hour * 3600 // DAY_S)][tenant] += gpu_s
    indices = []
    for day, wanted in enumerate(run.wanted[: int(run.jobs[-1].submit_s // DAY_S) + 1]):
        due = due_of({tenant: want for tenant, want in wanted.items() if want > 0})
        if len(due) > 1:
            indices.append(jain([min(1.0, got[day][tenant] / share) for tenant, share in due.items()]))
    return sum(indices) / len(indices) if indices else 1.0


def entitlements(wanted: dict[str, float], capacity: float) -> dict[str, float]:
    """Divide equally: nobody gets more than it wants, and what that leaves over goes to the others."""
    due: dict[str, float] = {}
    left = capacity
    for number, (tenant, want) in enumerate(sorted(wanted.items(), key=lambda item: (item[1], item[0]))):
        due[tenant] = min(want, left / (len(wanted) - number))
        left -= due[tenant]
    return due
