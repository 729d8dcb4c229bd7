"""How much the core holds for each tenant, in bytes of what the tenant handed in (commands, environments, scripts).

A number of jobs says little about memory: one may have two hundred bytes or two hundred thousand. Counted is a
specification as it is written down, once for all elements of an array, and a service's for each replica that it may
have. Derived state.
"""

from __future__ import annotations

from gpuyard_daemon.core.state.arrays import Arrays
from gpuyard_daemon.core.state.model import Job, replica_spec
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId, Tenant
from gpuyard_protocol.services import ServiceSpec


def bytes_of(spec: JobSpec) -> int:
    return len(encode(spec))


def bytes_of_service(spec: ServiceSpec) -> int:
    return bytes_of(replica_spec(spec)) * spec.max_replicas


class Backlog:
    """Sums, kept up to date with each job and service that comes, ends and goes."""

    __slots__ = ("_arrays", "_entered", "_last", "bytes", "ended_bytes", "replicas")

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        #: Arrays that are counted.
        self._entered: set[JobId] = set()
        #: The specification counted last: many jobs have the same one (`alike`).
        self._last: tuple[JobSpec | None, int] = (None, 0)
        #: Of jobs that have not ended (replicas apart) and of services.
        self.bytes: dict[Tenant, int] = {}
        #: Of all tenants' jobs that ended and are still in the core.
        self.ended_bytes = 0
        #: How many a tenant's services may have together.
        self.replicas: dict[Tenant, int] = {}

    def enter(self, job: Job) -> None:
        """A new or restored job."""
        has_ended = job.is_final
        if job.array:
            if job.array in self._entered:
                return
            self._entered.add(job.array)
            has_ended = not self._arrays.records[job.array].unfinished
        if has_ended:
            self.ended_bytes += self._bytes_of(job.spec)
        elif not job.service:
            self._change(job.tenant, self._bytes_of(job.spec))

    def ended(self, job: Job) -> None:
        """After its array has counted it."""
        if job.array and self._arrays.records[job.array].unfinished:
            return
        size = self._bytes_of(job.spec)
        self.ended_bytes += size
        if not job.service:
            self._change(job.tenant, -size)

    def retired(self, job: Job) -> None:
        """After its array has let it go."""
        if job.array:
            if job.array in self._arrays.records:
                return
            self._entered.discard(job.array)
        self.ended_bytes -= self._bytes_of(job.spec)

    def set_service(self, tenant: Tenant, before: ServiceSpec | None, after: ServiceSpec | None) -> None:
        for spec, sign in ((before, -1), (after, 1)):
            if spec is not None:
                self._change(tenant, sign * bytes_of_service(spec))
                self.replicas[tenant] = self.replicas.get(tenant, 0) + sign * spec.max_replicas

    def _bytes_of(self, spec: JobSpec) -> int:
        if spec is not self._last[0]:
            self._last = (spec, bytes_of(spec))
        return self._last[1]

    def _change(self, tenant: Tenant, size: int) -> None:
        self.bytes[tenant] = self.bytes.get(tenant, 0) + size
