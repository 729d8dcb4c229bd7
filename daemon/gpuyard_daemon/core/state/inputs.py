"""What may happen to a yard: the closed union of the core's inputs.

Every input is a fact in the past tense, made by the shell from a message, a timer of its own or a change it noticed.
Heartbeats and telemetry never come this far: the shell turns them into changes (`NodeSuspected`, `NodeReturned`, …).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.jobs import JobSpec, Why
from gpuyard_protocol.names import JobId, NodeId, ServiceName, SubmissionId, Tenant, User
from gpuyard_protocol.nodes import Report
from gpuyard_protocol.services import ServiceSpec


class Cursors(msgspec.Struct, frozen=True, array_like=True):
    """How far the streams have been taken in: sequence of the last message of SUB and REP."""

    submissions: int = 0
    reports: int = 0


class JobSubmitted(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    spec: JobSpec
    #: The tenant chose the id: a second submission with it gets the first one's answer.
    chosen_id: bool = False


class RequestMalformed(msgspec.Struct, frozen=True, kw_only=True):
    """A request that could be attributed but not understood; it is answered like any other."""

    tenant: Tenant
    user: User
    submission_id: SubmissionId
    path: str
    found: str
    expected: str
    nearest: str = ""


class RequestRefused(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was not even looked at, such as one beyond its tenant's rate; it is answered like any other."""

    tenant: Tenant
    user: User
    submission_id: SubmissionId
    reason: Why
    #: When it may be sent again.
    retry_after_ms: int = 0


class CancelRequested(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    #: The whole array that the job belongs to.
    array: bool = False


class HoldRequested(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    array: bool = False


class ReleaseRequested(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    array: bool = False


class SuspendRequested(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    array: bool = False


class ResumeRequested(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    array: bool = False


class RequeueRequested(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    #: Then it is held.
    hold: bool = False
    array: bool = False


class ScaleRequested(msgspec.Struct, frozen=True, kw_only=True):
    """The most replicas that an elastic job is to have."""

    tenant: Tenant
    user: User
    submission_id: SubmissionId
    job: JobId
    replicas: int


class ServiceScaleAsked(msgspec.Struct, frozen=True, kw_only=True):
    """The fewest and the most replicas that a service is to have."""

    tenant: Tenant
    user: User
    submission_id: SubmissionId
    service: ServiceName
    min_replicas: int
    max_replicas: int


class RolloutAsked(msgspec.Struct, frozen=True, kw_only=True):
    """A service's replicas are to be replaced, by others of the same specification or of the one before it."""

    tenant: Tenant
    user: User
    submission_id: SubmissionId
    service: ServiceName
    undo: bool = False


class ServiceApplied(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    spec: ServiceSpec


class ServiceDeleted(msgspec.Struct, frozen=True, kw_only=True):
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    service: ServiceName


class LoadReported(msgspec.Struct, frozen=True, kw_only=True):
    """The load of a service changed: the sum over its sources, at most once a second per service."""

    tenant: Tenant
    service: ServiceName
    concurrency: int
    queue_depth: int = 0


class NodeReported(msgspec.Struct, frozen=True, kw_only=True):
    """A batch from a node's outbox, numbered from `first`; what was seen before is skipped."""

    node: NodeId
    instance: str
    boot_id: str
    first: int
    reports: tuple[Report, ...]
    #: Identity of the node's ledger; "": not told.
    ledger: str = ""


class NodeSuspected(msgspec.Struct, frozen=True, kw_only=True):
    """No heartbeat for some seconds: nothing new is placed there."""

    node: NodeId


class NodeLost(msgspec.Struct, frozen=True, kw_only=True):
    """No heartbeat for long. Its jobs wait for it (`on_node_lost: wait`); services heal elsewhere at once."""

    node: NodeId


class NodeReturned(msgspec.Struct, frozen=True, kw_only=True):
    """Heartbeats again, from that agent process."""

    node: NodeId
    instance: str


class NodeIncompatible(msgspec.Struct, frozen=True, kw_only=True):
    """The agent cannot be worked with: cordoned, its jobs untouched, until it joins anew."""

    node: NodeId
    reason: str
    #: Because two agent processes speak for the node: over once one of them has fallen silent (`NodeReturned`).
    twins: bool = False


class NodeDeclaredDead(msgspec.Struct, frozen=True, kw_only=True):
    """An operator says that a lost node will not go on with what it had: its jobs may start elsewhere."""

    node: NodeId
    by: User


class NodeRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """An operator takes a node out of the yard for good."""

    node: NodeId
    by: User


class NodeCordonAsked(msgspec.Struct, frozen=True, kw_only=True):
    """An operator keeps new work away from a node."""

    node: NodeId
    by: User
    reason: str = ""
    #: And jobs that may be preempted leave it: they end with grace and wait again, uncharged.
    requeue: bool = False


class NodeUncordonAsked(msgspec.Struct, frozen=True, kw_only=True):
    """An operator lets work go to a node again."""

    node: NodeId
    by: User


class PolicyChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's configuration grants tenants something else than the journal says."""

    policy: Policy


class RequeueAll(msgspec.Struct, frozen=True, kw_only=True):
    """The yard stops: every replica is to end with grace, and its job to wait, uncharged, for the next start."""


class YardStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon started and found a yard that had been stopped with `RequeueAll`: work goes on.

    The first input of such a start, before anything from the streams.
    """

    #: Sequence of the leader's claim.
    epoch: int


Input: TypeAlias = (
    JobSubmitted
    | RequestMalformed
    | RequestRefused
    | CancelRequested
    | HoldRequested
    | ReleaseRequested
    | SuspendRequested
    | ResumeRequested
    | RequeueRequested
    | ScaleRequested
    | ServiceScaleAsked
    | RolloutAsked
    | ServiceApplied
    | ServiceDeleted
    | LoadReported
    | NodeReported
    | NodeSuspected
    | NodeLost
    | NodeReturned
    | NodeIncompatible
    | NodeDeclaredDead
    | NodeRemoved
    | NodeCordonAsked
    | NodeUncordonAsked
    | PolicyChanged
    | RequeueAll
    | YardStarted
)
