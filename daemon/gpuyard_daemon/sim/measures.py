"""What a job run is measured by, with the exact definitions that published values use."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from gpuyard_daemon.sim.jobs_run import JobsRun

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
    waits = sorted(job.first_start_s - job.submit_s for job in jobs)
    queued = sum(job.finish_s - job.submit_s - job.service_s for job in jobs)
    slowdown = max((job.finish_s - job.submit_s) / max(10.0, job.service_s) for job in jobs)
    useful = sum(job.gpus * job.service_s for job in jobs)
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
        "restart_pct": round(100 * run.overhead_gpu_s / useful, 3),
    }


def jain_24h(run: JobsRun) -> float:
    """Mean over days of Jain's index of the GPU time each tenant got over what it asked for that day (at most 1)."""
    got: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (hour, tenant), gpu_s in run.held.items():
        got[hour // 24][tenant] += gpu_s
    asked: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for job in run.jobs:
        asked[job.tenant].append((job.submit_s, job.gpus * job.service_s))
    indices = []
    last_day = int(run.jobs[-1].submit_s // 86_400)
    before: dict[str, float] = defaultdict(float)
    for day in range(last_day + 1):
        shares = []
        for tenant, work in asked.items():
            arrived = sum(gpu_s for submit_s, gpu_s in work if submit_s < (day + 1) * 86_400)
            demand = min(arrived - before[tenant], run.nodes * run.per_node * 86_400.0)
            if demand > 0:
                shares.append(min(1.0, got[day][tenant] / demand))
            before[tenant] += got[day][tenant]
        if len(shares) > 1:
            indices.append(jain(shares))
    return sum(indices) / len(indices) if indices else 1.0
