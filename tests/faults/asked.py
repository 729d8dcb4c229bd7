"""What tenants of a simulated yard ask for: every kind of work that there is, as small as its few hosts.

Whole cards, shares, MIG and none; gangs, elastic jobs, GPUs in all; each way to give way; retries, leases, time limits;
arrays with a throttle, dependencies, jobs alone of their name; estimates, deadlines, later begins and holds.
"""

from __future__ import annotations

import random
from typing import Any

from faults.scale import Scale
from gpuyard_protocol.names import JobId

#: All can be met by the simulated nodes.
NEEDS: tuple[dict[str, Any], ...] = (
    {"gpus": 1},
    {"gpus": 2},
    {"gpu": 0.3},
    {"gpu": 0.5, "isolation": "hard"},
    {"gpu_memory": "20Gi", "isolation": "none"},
    {"mig": "1g.10gb"},
    {"mig": "3g.40gb"},
    {"gpus": 0},
)
#: Fields of a job that say how a card is cut for it.
CUTS = ("gpus", "gpu", "gpu_memory", "mig", "isolation")


def job_asked(rng: random.Random, scale: Scale, newest: JobId) -> dict[str, Any]:
    """A job of any kind. `newest`: the number of the last one that exists, so that there is something to depend on."""
    seconds, exit_code = round(rng.uniform(*scale.program_s), 1), rng.choice((0, 0, 0, 0, 3))
    job: dict[str, Any] = {
        "command": ["program", str(seconds), str(exit_code), *rng.choice(([], [], [], ["stubborn"]))],
        "stop_grace": f"{rng.choice((0, 1, 5))}s",
        "retries": rng.choice((0, 0, 1, 2)),
        "priority": rng.randint(-2, 2),
        "replicas": rng.choice((1, 1, 1, 1, 2, 3)),
        "cpus": 1,
        **rng.choice(NEEDS),
    }
    if job.get("gpus") == 2:
        # The smallest yard has four cards, and takes what needs more while it does not know that yet.
        job["replicas"] = min(job["replicas"], 2)
    kind = job["preemption"] = rng.choice(("requeue", "requeue", "checkpoint", "suspend", "suspend", "never"))
    if kind == "suspend" and rng.random() < 0.7:
        # What a driver can take off its card: one process on one card.
        job = _cut(job, gpus=1, replicas=1)
    elif rng.random() < 0.2:
        job = _of_many_sizes(rng, job)
    if rng.random() < 0.3:
        job["restart_time"] = rng.choice(("1s", "20s"))
    if rng.random() < 0.2:
        job["time_limit"] = "8s"
    if rng.random() < 0.4:
        job["lease"] = rng.choice(scale.leases)
        job["command"][1] = str(round(rng.uniform(0.0, 120.0), 1))
    if rng.random() < 0.3:
        _place_in_time(rng, scale, job)
    if rng.random() < 0.25:
        _tie_to_others(rng, scale, job, newest)
    return job


def _cut(job: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name not in CUTS} | fields


def _of_many_sizes(rng: random.Random, job: dict[str, Any]) -> dict[str, Any]:
    """Elastic, of which some run long enough to grow; or GPUs in all, which the yard parts as it finds them."""
    if rng.random() < 0.2:
        return {name: value for name, value in _cut(job).items() if name != "replicas"} | {
            "total_gpus": rng.randint(1, 4)
        }
    least = rng.choice((1, 1, 2))
    job = _cut(job, **rng.choice(({"gpus": 1}, {"gpus": 1}, {"gpu": 0.3}, {"mig": "1g.10gb"})))
    job |= {"min_replicas": least, "replicas": least + rng.choice((1, 2, 4))}
    if rng.random() < 0.5:
        job |= {"preemption": "checkpoint", "restart_time": "1s"}
        job["command"][1] = str(round(rng.uniform(100.0, 250.0), 1))
    return job


def _place_in_time(rng: random.Random, scale: Scale, job: dict[str, Any]) -> None:
    match rng.randrange(4):
        case 0:
            job["estimate"] = rng.choice(("5s", "20s", "10m"))
        case 1:
            job |= {"estimate": "20s", "deadline": rng.choice(("+10s", "+60s", "+1h"))}
        case 2:
            job["begin"] = f"+{rng.randint(1, 20)}s"
        case _:
            job["hold"] = scale.holds and rng.random() < 0.4


def _tie_to_others(rng: random.Random, scale: Scale, job: dict[str, Any], newest: JobId) -> None:
    """Some depend on a job that is another tenant's, or that has ended otherwise: those are refused."""
    name = f"night-{rng.randrange(scale.names)}"
    match rng.randrange(4):
        case 0:
            job["array"] = rng.choice(("0-2", "0-3%2", "0-2%1"))
        case 1:
            job |= {"name": name, "depends_on": ["singleton"]}
        case 2:
            job["name"] = name
        case _ if newest:
            kind = rng.choice(("afterok", "afterany", "afterany", "afternotok"))
            job["depends_on"] = [f"{kind}:{max(1, newest - rng.randrange(4))}"]
        case _:
            pass
