"""Places that are kept for waiting jobs: nobody else is placed there, whoever leaves them.

A claim is made when others were told to go for a job (`preempt`; a suspended job claims its own card), or when a job
that may not evict them is to get their places as they end (`reserve`). It lasts as long as its job stands in line: a
job that was placed, wherever, that was cancelled or held, has none. The records are durable; what the nodes' spaces
know of them is derived.

Decides nothing. Who gets a claim is for `preemption` and `reservations`, and what a claim means for others is read by
`feasibility` from the spaces.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard_daemon.core.placing.capacity import ClaimedPlace, Pool
from gpuyard_daemon.core.state.fact_words import PATIENT_CLAIMS
from gpuyard_daemon.core.state.model import Claim, Job
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.names import JobId, NodeId


class Claims:
    """All claims, by the job that they are for; oldest first."""

    __slots__ = ("_pool", "records")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.records: dict[JobId, Claim] = {}

    def __contains__(self, job: JobId) -> bool:
        return job in self.records

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.records.values())

    def __len__(self) -> int:
        return len(self.records)

    def of(self, job: JobId) -> Claim | None:
        return self.records.get(job)

    def make(self, job: Job, claim: Claim) -> None:
        if job.id in self.records:
            raise InvariantViolated(f"job {job.id} claims places and has claimed others already")
        self.records[job.id] = claim
        cpu_milli, memory_mib = takes(job)
        for placement in claim.placements:
            is_firm = claim.kind not in PATIENT_CLAIMS
            place = ClaimedPlace(job.id, job.domain, placement.partition, cpu_milli, memory_mib, is_firm)
            self._pool.claim(self._pool.spaces[placement.node], place)

    def drop(self, job: JobId) -> None:
        """Keep nothing for a job any more; nothing happens if it has no claim."""
        claim = self.records.pop(job, None)
        if claim is not None:
            for node in nodes_of(claim):
                if (space := self._pool.spaces.get(node)) is not None:
                    self._pool.unclaim(space, job)


def takes(job: Job) -> tuple[int, int]:
    """(CPU, memory) of a node that each replica of a claimant will take, beside what it has there already.

    A suspended job's memory is held while it is off its card.
    """
    need = job.spec.need
    return need.cpu_milli, 0 if job.state == "suspended" else need.memory_mib


def nodes_of(claim: Claim) -> tuple[NodeId, ...]:
    return tuple(dict.fromkeys([placement.node for placement in claim.placements]))
