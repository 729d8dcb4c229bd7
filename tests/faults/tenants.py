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

from faults.asked import job_asked
from faults.network import FaultyBroker, FaultyBus, Weather
from faults.party import Party
from faults.scale import SMALL, Scale
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import JobId, given_submission_id
from gpuyard_protocol.subjects import submission

TENANTS = (("acme", "alice"), ("umbrella", "bob"))
SERVICES = ("chat", "embed")
TRIES = 8


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

    def submit_job(self, newest: JobId) -> None:
        """`newest`: the last job that exists."""
        rng = self._rng
        tenant, user = rng.choice(TENANTS)
        job = job_asked(rng, self._scale, newest)
        kept = Submission(tenant, "", sent_s=asyncio.get_running_loop().time())
        self.submissions.append(kept)
        self.submitted += 1
        if self._scale.own_ids >= 100 or rng.randrange(100) < self._scale.own_ids:
            job["submission_id"] = kept.submission_id = self._next_id()
        self.spawn(self._send(tenant, user, "submit", job, kept))

    def direct(self, tenant: str, job: int, verb: str, **how: Any) -> None:
        """`cancel`, `suspend`, … one of its jobs."""
        user = dict(TENANTS)[tenant]
        self.spawn(self._send(tenant, user, verb, {"job": job, "submission_id": self._next_id(), **how}))

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

    def change_service(self) -> None:
        """Another number of replicas, or all of them anew."""
        rng = self._rng
        tenant, user = rng.choice(TENANTS)
        request: dict[str, Any] = {"service": rng.choice(SERVICES), "submission_id": self._next_id()}
        if rng.random() < 0.6:
            low = rng.randint(0, 2)
            self.spawn(self._send(tenant, user, "scale", request | {"replicas": low, "max_replicas": low + 1}))
        else:
            self.spawn(self._send(tenant, user, "rollout", request | {"action": rng.choice(("restart", "undo"))}))

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
