"""What a tenant asks of a service, and the load reports that scale it.

A service is a model, a version and the shape of one replica; the yard keeps between `min_replicas` and `max_replicas`
of them, as many as the reported load needs. Each replica is placed like a job, by the same planner on the same cards.
"""

from __future__ import annotations

import msgspec

from gpuyard_protocol.codec import Malformed, RequestVersion
from gpuyard_protocol.jobs import DEFAULT_STOP_GRACE_MS, Why, check_process
from gpuyard_protocol.names import (
    NAME_EXPECTED,
    SUBMISSION_EXPECTED,
    ServiceName,
    Tenant,
    User,
    is_name,
    is_submission_id,
)
from gpuyard_protocol.needs import ResourceRequest, resource_need
from gpuyard_protocol.resources import ResourceNeed
from gpuyard_protocol.units import Count, Duration

REPLICAS_MAX = 1024
DEFAULT_SCALE_DOWN_AFTER_MS = 60_000


class ServiceRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A service as people write it: the payload of `sub.<tenant>.<user>.apply`. Applying again changes it in place."""

    name: str
    #: Started for each replica; it finds its port in $PORT.
    command: list[str] | str
    v: RequestVersion = 1
    submission_id: str | None = None
    model: str = ""
    version: str = ""
    replica: ResourceRequest = msgspec.field(default_factory=ResourceRequest)
    #: 0: scale to zero.
    min_replicas: int = 1
    max_replicas: int = 1
    #: Requests in flight that one replica serves well.
    target_concurrency: int = 1
    #: How long the load must have been lower before replicas go.
    scale_down_after: Duration | None = None
    stop_grace: Duration | None = None
    env: dict[str, str] = {}
    cwd: str | None = None
    priority: int = 0
    # Known and not honoured yet: refused by name.
    target_qps: int | None = None
    target_queue: int | None = None
    latency_slo: Duration | None = None
    traffic: dict[str, int] | None = None
    tiers: list[str] | None = None
    image: str | None = None

    def specify(self) -> ServiceSpec:
        for field in ("target_qps", "target_queue", "latency_slo", "traffic", "tiers", "image"):
            if (value := getattr(self, field)) is not None:
                raise Malformed(f"$.{field}", repr(value), "no value: this field is not honoured yet")
        self._check()
        down_after = self.scale_down_after
        return ServiceSpec(
            name=self.name,
            model=self.model,
            version=self.version,
            argv=self._argv(),
            need=self._need(),
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            target_concurrency=self.target_concurrency,
            scale_down_after_ms=DEFAULT_SCALE_DOWN_AFTER_MS if down_after is None else int(down_after),
            stop_grace_ms=DEFAULT_STOP_GRACE_MS if self.stop_grace is None else int(self.stop_grace),
            env=tuple(sorted(self.env.items())),
            cwd=self.cwd or "",
            priority=self.priority,
        )

    def _check(self) -> None:
        if not is_name(self.name):
            raise Malformed("$.name", repr(self.name), NAME_EXPECTED)
        if self.submission_id is not None and not is_submission_id(self.submission_id):
            raise Malformed("$.submission_id", repr(self.submission_id), SUBMISSION_EXPECTED)
        if not self.command:
            raise Malformed("$.command", repr(self.command), "a program with its arguments, or a line for /bin/sh")
        if not 0 <= self.min_replicas <= REPLICAS_MAX:
            raise Malformed("$.min_replicas", str(self.min_replicas), f"a number between 0 and {REPLICAS_MAX}")
        if not max(1, self.min_replicas) <= self.max_replicas <= REPLICAS_MAX:
            allowed = f"a number between {max(1, self.min_replicas)} and {REPLICAS_MAX}"
            raise Malformed("$.max_replicas", str(self.max_replicas), allowed)
        if not 1 <= self.target_concurrency <= 1_000_000:
            raise Malformed("$.target_concurrency", str(self.target_concurrency), "a number between 1 and 1000000")
        if not -2 <= self.priority <= 2:
            raise Malformed("$.priority", str(self.priority), "a number between -2 and 2")
        for field in ("model", "version"):
            if len(value := getattr(self, field)) > 128 or not (value == "" or value.isprintable()):
                raise Malformed(f"$.{field}", repr(value), "at most 128 printable characters")
        check_process(self._argv(), self.env, self.cwd)

    def _argv(self) -> tuple[str, ...]:
        return ("/bin/sh", "-c", self.command) if isinstance(self.command, str) else tuple(self.command)

    def _need(self) -> ResourceNeed:
        try:
            # Services trust their neighbours less: hard isolation where MIG or a whole card can give it.
            return resource_need(self.replica, default_isolation="hard")
        except Malformed as error:
            path = error.path.replace("$", "$.replica", 1)
            raise Malformed(path, error.found, error.expected, error.nearest) from None


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A service in integers, complete."""

    name: ServiceName
    argv: tuple[str, ...]
    need: ResourceNeed
    model: str = ""
    version: str = ""
    min_replicas: int = 1
    max_replicas: int = 1
    target_concurrency: int = 1
    scale_down_after_ms: int = DEFAULT_SCALE_DOWN_AFTER_MS
    stop_grace_ms: int = DEFAULT_STOP_GRACE_MS
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    priority: int = 0


class DeleteRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `sub.<tenant>.<user>.delete`: stop a service's replicas and forget it."""

    service: str
    v: RequestVersion = 1
    submission_id: str | None = None


class LoadReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `load.<tenant>.<service>` (core NATS, newest wins): what a gateway sees now."""

    #: Requests in flight, over all replicas, as this source sees them.
    concurrency: Count
    v: RequestVersion = 1
    #: Who reports; the loads of different sources add up.
    source: str = "gateway"
    qps: float = 0.0
    queue_depth: Count = 0
    p95_ms: Count = 0


class ServiceView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A service as `services` prints it."""

    service: ServiceName
    tenant: Tenant
    user: User
    model: str
    version: str
    #: How many replicas the load asks for now, and how many there are in which state.
    wanted: int
    running: int
    starting: int
    pending: int
    min_replicas: int
    max_replicas: int
    target_concurrency: int
    concurrency: int
    queue_depth: int
    #: `host:port` of each running replica.
    endpoints: tuple[str, ...] = ()
    jobs: tuple[int, ...] = ()
    applied_ms: int = 0
    #: Grows when what a replica runs changes; running replicas of the present one, and replicas of earlier ones.
    generation: int = 0
    updated: int = 0
    outdated: int = 0
    #: Replicas that ended by themselves in a row, the last of them, and how it ended (None: with exit code 0).
    crashes: int = 0
    crashed_job: int = 0
    crash: Why | None = None
