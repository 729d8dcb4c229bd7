"""Tenants of a simulated yard: they submit, cancel, run services, and remember what they were promised.

Each request carries an id of its own, and is sent again unchanged until the stream confirms it or the tenant gives up.
What was confirmed is a promise; what was not may have been taken all the same.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from faults.network import FaultyBroker, FaultyBus, Weather
from faults.party import Party
from faults.scale import SMALL, Scale
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import given_submission_id
from gpuyard_protocol.subjects import submission

TENANTS = (("acme", "alice"), ("umbrella", "bob"))
SERVICES = ("chat", "embed")
TRIES = 8
#: Whole cards, shares of every kind, MIG, none; all can be met by the simulated nodes.
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


@dataclass(slots=True)
class Submission:
    tenant: str
    #: "" while it has none: then it is the stream's number, once that is told.
    submission_id: str
    is_acknowledged: bool = False
    #: When it was first sent, seconds of the simulation.
    sent_s: float = 0.0


class Tenants(Party):
    def __init__(
        self,
        broker: FaultyBroker,
        weather: Weather,
        rng: random.Random,
        on_failure: Callable[[BaseException], None],
        scale: Scale = SMALL,
    ) -> None:
        super().__init__(on_failure)
        self._scale = scale
        self.submissions: list[Submission] = []
        self.services: set[tuple[str, str]] = set()
        self.submitted = 0
        self.under_way = 0
        self._rng = rng
        self._requests = 0
        self.bus = FaultyBus(broker, "tenants", weather)

    def submit_job(self) -> None:
        rng = self._rng
        tenant, user = rng.choice(TENANTS)
        seconds, exit_code = round(rng.uniform(*self._scale.program_s), 1), rng.choice((0, 0, 0, 0, 3))
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
            job = {name: value for name, value in job.items() if name not in CUTS} | {"gpus": 1, "replicas": 1}
        if rng.random() < 0.3:
            job["restart_time"] = rng.choice(("1s", "20s"))
        if rng.random() < 0.2:
            job["time_limit"] = "8s"
        if rng.random() < 0.4:
            job["lease"] = rng.choice(self._scale.leases)
            job["command"][1] = str(round(rng.uniform(0.0, 120.0), 1))
        kept = Submission(tenant, "", sent_s=asyncio.get_running_loop().time())
        self.submissions.append(kept)
        self.submitted += 1
        if self._scale.own_ids >= 100 or rng.randrange(100) < self._scale.own_ids:
            job["submission_id"] = kept.submission_id = self._next_id()
        self.spawn(self._send(tenant, user, "submit", job, kept))

    def direct(self, tenant: str, job: int, verb: str) -> None:
        """`cancel`, `suspend`, … one of its jobs."""
        user = dict(TENANTS)[tenant]
        self.spawn(self._send(tenant, user, verb, {"job": job, "submission_id": self._next_id()}))

    def apply_service(self) -> None:
        rng = self._rng
        tenant, user = rng.choice(TENANTS)
        name, low = rng.choice(SERVICES), rng.randint(0, 2)
        request = {
            "name": name,
            "command": ["program", rng.choice(("-1", "-1", "30")), "1"],
            "version": rng.choice(("1", "2")),
            "replica": {"gpu": 0.2, "isolation": rng.choice(("hard", "soft"))},
            "min_replicas": low,
            "max_replicas": low + rng.randint(1, 2),
            "target_concurrency": 4,
            "scale_down_after": "10s",
            "stop_grace": "1s",
            "submission_id": self._next_id(),
        }
        self.services.add((tenant, name))
        self.spawn(self._send(tenant, user, "apply", request))

    def delete_services(self) -> None:
        for tenant, name in sorted(self.services):
            request = {"service": name, "submission_id": self._next_id()}
            self.spawn(self._send(tenant, dict(TENANTS)[tenant], "delete", request))

    def _next_id(self) -> str:
        self._requests += 1
        return f"r{self._requests}"

    async def _send(
        self, tenant: str, user: str, verb: str, payload: dict[str, Any], kept: Submission | None = None
    ) -> None:
        self.under_way += 1
        assert self.bus is not None
        for _ in range(TRIES):
            try:
                ack = await self.bus.stream_publish(submission(tenant, user, verb), encode(payload), timeout=2.0)
            except BusError:
                await asyncio.sleep(0.5)
                continue
            if kept is not None:
                kept.submission_id = kept.submission_id or given_submission_id(ack.sequence)
                kept.is_acknowledged = True
            break
        self.under_way -= 1
