"""Output of jobs, fetched from the node that has it.

The daemon stores no output. A range is asked of the agent on its command subject and handed through; `follow` asks
the agent to send what comes, live, on the tenant's own subject for a while. Neither is an order: nothing is numbered,
nothing changes.
"""

from __future__ import annotations

from typing import Protocol

from gpuyard_protocol.bus.base import Bus, NoResponders, Unanswered
from gpuyard_protocol.codec import Malformed, decode, encode
from gpuyard_protocol.jobs import JobView
from gpuyard_protocol.names import JobId, NodeId, Tenant
from gpuyard_protocol.nodes import FollowLog, LogChunk, ReadLog
from gpuyard_protocol.queries import LogsQuery, QueryError
from gpuyard_protocol.subjects import commands

#: A range of 256 KiB, in Base64, with room to spare.
CHUNK_BYTES_MAX = 1024 * 1024
RANGE_BYTES_MAX = 256 * 1024
ANSWER_TIMEOUT_S = 5.0


class PlacesOfJobs(Protocol):
    """What this file reads of the core."""

    def assignment_node(self, job: JobId, replica: int, attempt: int = 0) -> NodeId | None: ...

    def job_view(self, job: JobId) -> JobView | None: ...


class LogForwarder:
    def __init__(self, bus: Bus, core: PlacesOfJobs) -> None:
        self._bus = bus
        self._core = core

    async def read(self, tenant: Tenant, query: LogsQuery, past: JobView | None) -> LogChunk | QueryError:
        """The range asked for. `past` is the job's last view where the core no longer has it."""
        if not 1 <= query.limit <= RANGE_BYTES_MAX:
            return _malformed("limit", query.limit, f"a number between 1 and {RANGE_BYTES_MAX}")
        node = self._node(query, past)
        if node is None:
            return QueryError(code="NoOutput", text=_no_output(query, past or self._core.job_view(query.job)))
        read = ReadLog(
            job=query.job,
            attempt=query.attempt,
            replica=query.replica,
            stream=query.stream,
            offset=query.offset,
            limit=query.limit,
        )
        try:
            if query.follow:
                # First, so that nothing is written between the range and the live pieces: offsets tell what is doubled.
                follow = FollowLog(tenant=tenant, job=query.job, replica=query.replica)
                await self._bus.request(commands(node), encode(follow), timeout=ANSWER_TIMEOUT_S)
            reply = await self._bus.request(commands(node), encode(read), timeout=ANSWER_TIMEOUT_S)
            return decode(LogChunk, reply.data, max_bytes=CHUNK_BYTES_MAX)
        except (NoResponders, Unanswered):
            return QueryError(code="Unavailable", text=f"node {node}, which has the output, does not answer")
        except Malformed as error:
            return QueryError(code="Unavailable", text=f"node {node} gave an unreadable answer: {error}")

    def _node(self, query: LogsQuery, past: JobView | None) -> NodeId | None:
        if past is None:
            return self._core.assignment_node(query.job, query.replica, query.attempt)
        return next((place.node for place in past.placed if place.replica == query.replica), None)


def _no_output(query: LogsQuery, view: JobView | None) -> str:
    """Why there is none: nobody ever asked for such a replica or attempt, or it has not begun."""
    if view is not None and query.replica >= view.replicas:
        return f"job {query.job} has no replica {query.replica}: its replicas are 0 to {view.replicas - 1}"
    if view is not None and query.attempt > view.attempt:
        return f"job {query.job} has had no attempt {query.attempt}: the newest is {view.attempt}"
    which = f", attempt {query.attempt}" if query.attempt else ""
    return f"job {query.job} has no output of replica {query.replica}{which}: it has not been placed on a node"


def _malformed(field: str, found: object, expected: str) -> QueryError:
    return QueryError(code="Malformed", text=f"$.{field}: found {found}; expected {expected}")
