"""What the journal keeps: the closed union of facts.

A fact is either something that came in and was believed, or something that was decided. Together they are all that the
state rests on: `Cluster.apply_fact` is the one writer, so applying the facts of a record again leads to the same state,
the same orders and the same notices, whatever policy made them.

Facts are arrays with a short tag (`["placed", 17, …]`): compact, and readable in a dump. A new field goes at the end
with a default; a tag is never used again for another meaning. Those of nodes stand in `facts_of_nodes`, and are to be
had from here like all others.
"""

from __future__ import annotations

from typing import TypeAlias

from gpuyard_daemon.core.state.fact_words import ClaimKind, Eviction, FactBase, Placement, VerdictKind
from gpuyard_daemon.core.state.facts_of_nodes import (
    CardSettled,
    CardSwitched,
    GivenUpGone,
    LedgerReplaced,
    NodeAvoided,
    NodeChanged,
    NodeCordoned,
    NodeForgiven,
    NodeForgotten,
    NodeJoined,
    NodeUncordoned,
    ReplicaEnded,
    ReplicaPrepared,
    ReplicasGivenUp,
    ReplicaStarted,
    ReportsTaken,
)
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.jobs import JobSpec, JobState, JobView, SubmissionAnswer, Why
from gpuyard_protocol.names import AssignmentKey, JobId, ServiceName, SubmissionId, Tenant, User
from gpuyard_protocol.services import ServiceSpec

# --- requests --------------------------------------------------------------------------------------------------------


class JobAccepted(FactBase, frozen=True, tag="accepted"):
    """A job exists and waits."""

    job: JobId
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    spec: JobSpec
    #: Until when the answer is kept.
    answer_until_ms: int
    #: The tenant chose the submission id.
    chosen: bool = False
    #: Run time it is expected to need, ms, and from what: `estimate`, `history`; 0: unknown.
    expected_ms: int = 0
    expected_from: str = ""
    #: What was said about its deadline; None: it has none.
    deadline: Why | None = None


class ArrayAccepted(FactBase, frozen=True, tag="array"):
    """As many jobs exist and wait as the spec's array has elements, numbered from `first` on."""

    first: JobId
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    spec: JobSpec
    answer_until_ms: int
    chosen: bool = False
    expected_ms: int = 0
    expected_from: str = ""
    #: What was said about its deadline; None: it has none.
    deadline: Why | None = None


class ArrayCancelled(FactBase, frozen=True, tag="array-cancelled"):
    """Every element that waits is cancelled; those that run are told to stop by facts of their own."""

    array: JobId
    why: Why


class RequestAnswered(FactBase, frozen=True, tag="answered"):
    """Any other answer: rejections, and the outcome of cancel, apply and delete."""

    tenant: Tenant
    answer: SubmissionAnswer
    until_ms: int
    chosen: bool


class AnswerRepeated(FactBase, frozen=True, tag="repeated"):
    """A request came again under the same chosen id: it gets the first one's answer."""

    tenant: Tenant
    submission_id: SubmissionId


class AnswersForgotten(FactBase, frozen=True, tag="forgotten"):
    """The oldest so many answers were dropped."""

    chosen: int
    given: int


# --- jobs ------------------------------------------------------------------------------------------------------------


class JobPlaced(FactBase, frozen=True, tag="placed"):
    """A new attempt begins: replica i goes to `placements[i]`."""

    job: JobId
    placements: tuple[Placement, ...]
    #: A gang that is not prepared by then gives its places back; 0 for a single replica.
    prepare_until_ms: int = 0
    #: On a place that is kept for that job; 0: on none.
    guest_of: JobId = 0
    #: With another size than its attempt before, which was ended for that.
    resized: bool = False


class ClaimMade(FactBase, frozen=True, tag="claimed"):
    """Places are kept for a waiting job, and those who stand in its way are told to go: all of this or nothing."""

    job: JobId
    kind: ClaimKind
    placements: tuple[Placement, ...]
    evictions: tuple[Eviction, ...] = ()


class JobIdled(FactBase, frozen=True, tag="idled"):
    """Its cards compute nothing, and its owner is told so."""

    job: JobId
    why: Why


class JobSuspending(FactBase, frozen=True, tag="suspending"):
    """It is told to leave its card, for nobody else's sake, and stays off it until it is released."""

    job: JobId
    why: Why
    #: In whose name it is held.
    by: User
    #: It was suspended for holding its card idle. Unless it has been released it ends at `end_ms`; 0: whenever.
    idle: bool = False
    end_ms: int = 0


class ReplicaSuspended(FactBase, frozen=True, tag="suspended"):
    """Off its card, into the host's memory."""

    key: AssignmentKey
    image_mib: int


class SuspensionFailed(FactBase, frozen=True, tag="not-suspended"):
    """It runs on as before, and is not asked again."""

    key: AssignmentKey
    why: Why


class JobResuming(FactBase, frozen=True, tag="resuming"):
    """Its card is free again: back to it."""

    job: JobId


class ReplicaResumed(FactBase, frozen=True, tag="resumed-replica"):
    """Back on its card, and it goes on."""

    key: AssignmentKey


class ResumptionFailed(FactBase, frozen=True, tag="not-resumed"):
    """It is suspended as before, and not asked again before that."""

    key: AssignmentKey
    again_ms: int
    why: Why


class ClaimDropped(FactBase, frozen=True, tag="unclaimed"):
    """Nothing is kept for the job any more."""

    job: JobId
    why: Why


class JobWidened(FactBase, frozen=True, tag="widened"):
    """An elastic job that was placed in this turn gets more replicas than its least, on GPUs that nobody waits for."""

    job: JobId
    #: Of the replicas that follow those it has.
    placements: tuple[Placement, ...]


class JobResizing(FactBase, frozen=True, tag="resizing"):
    """An elastic job is to have another size: its attempt ends, and the next one starts on these places."""

    job: JobId
    placements: tuple[Placement, ...]
    why: Why


class JobScaled(FactBase, frozen=True, tag="job-scaled"):
    """Its owner says how many replicas an elastic job has at most."""

    job: JobId
    replicas: int


class GangReleased(FactBase, frozen=True, tag="released"):
    """Every member is prepared: go."""

    job: JobId


class JobStopping(FactBase, frozen=True, tag="stopping"):
    """Whatever still runs of the job is told to stop; when the last replica has ended, the verdict holds."""

    job: JobId
    verdict: VerdictKind
    why: Why
    #: The word the agent is told.
    order_reason: str
    exit_code: int | None = None


class JobRequeued(FactBase, frozen=True, tag="requeued"):
    """The attempt is over and the job waits again."""

    job: JobId
    #: It spent a retry.
    charged: bool
    why: Why
    #: 0: it may start at once.
    not_before_ms: int
    #: Uncharged requeues in a row, for the wait before the next.
    uncharged: int
    exit_code: int | None = None


class JobWoken(FactBase, frozen=True, tag="woken"):
    """A wait before a retry is over."""

    job: JobId


class JobHeld(FactBase, frozen=True, tag="held"):
    """The job does not start, or not again, until it is released."""

    job: JobId
    by: User
    #: Also every other element of its array that waits.
    whole_array: bool = False


class JobReleased(FactBase, frozen=True, tag="let-go"):
    """The job is held no more."""

    job: JobId
    whole_array: bool = False


class JobEnded(FactBase, frozen=True, tag="ended"):
    job: JobId
    state: JobState
    why: Why | None = None
    exit_code: int | None = None


class JobRetired(FactBase, frozen=True, tag="retired"):
    """A finished job leaves the core; `view` is what history keeps of it."""

    job: JobId
    view: JobView


# --- services --------------------------------------------------------------------------------------------------------


class ServiceSet(FactBase, frozen=True, tag="service"):
    """A service was applied, for the first time or again."""

    tenant: Tenant
    user: User
    spec: ServiceSpec
    #: Grows when what a replica runs or needs changes: replicas of an earlier generation are replaced.
    generation: int


class ServiceRemoved(FactBase, frozen=True, tag="service-removed"):
    tenant: Tenant
    service: ServiceName


class LoadTaken(FactBase, frozen=True, tag="load"):
    tenant: Tenant
    service: ServiceName
    concurrency: int
    queue_depth: int


class ServiceScaled(FactBase, frozen=True, tag="scaled"):
    """How many replicas are wanted, and since when the load would do with fewer."""

    tenant: Tenant
    service: ServiceName
    wanted: int
    #: 0: the load needs all that are wanted.
    lower_since_ms: int = 0
    #: The most that the load asked for since then.
    lower_peak: int = 0


class ReplicaWanted(FactBase, frozen=True, tag="replica"):
    """The yard asks for one more replica of a service: a job like any other, as the service's spec has it now."""

    job: JobId
    tenant: Tenant
    service: ServiceName


class ServiceFaltered(FactBase, frozen=True, tag="faltered"):
    """A replica ended by itself: the next one starts no earlier than this. 0 crashes: all is well again."""

    tenant: Tenant
    service: ServiceName
    crashes: int
    not_before_ms: int
    #: The replica that ended now, and how; 0: the wait for the last one is over.
    job: JobId = 0
    why: Why | None = None


# --- what is learnt ---------------------------------------------------------------------------------------------------


class SizesLearnt(FactBase, frozen=True, tag="sizes"):
    """What a job of unknown length is taken for by the GPU time that it has had: by level, GPU-milliseconds."""

    ranks: tuple[int, ...]


class TenantsShifted(FactBase, frozen=True, tag="shifted"):
    """Tenants' usage moved against their shares: the levels by which their jobs sink (below 0: rise) from now on."""

    shifts: tuple[tuple[Tenant, int], ...]
    #: What their being above (below 0: under) their shares came to over time, thousandths of a level.
    owed: tuple[tuple[Tenant, int], ...] = ()


# --- the yard --------------------------------------------------------------------------------------------------------


class PolicySet(FactBase, frozen=True, tag="policy"):
    """What tenants are granted from now on."""

    policy: Policy


class YardDraining(FactBase, frozen=True, tag="draining"):
    """The yard stops: every replica is told to stop, and nothing starts until `YardResumed`."""


class YardResumed(FactBase, frozen=True, tag="resumed"):
    """A daemon started on the state of a stopped yard: nodes take work again once their agents have joined."""

    epoch: int


Fact: TypeAlias = (
    JobAccepted
    | ArrayAccepted
    | ArrayCancelled
    | RequestAnswered
    | AnswerRepeated
    | AnswersForgotten
    | JobPlaced
    | ClaimMade
    | ClaimDropped
    | JobWidened
    | JobResizing
    | JobScaled
    | JobIdled
    | JobSuspending
    | ReplicaSuspended
    | SuspensionFailed
    | JobResuming
    | ReplicaResumed
    | ResumptionFailed
    | GangReleased
    | JobStopping
    | JobRequeued
    | JobWoken
    | JobHeld
    | JobReleased
    | JobEnded
    | JobRetired
    | ReportsTaken
    | LedgerReplaced
    | NodeJoined
    | NodeChanged
    | ReplicasGivenUp
    | GivenUpGone
    | NodeForgotten
    | NodeCordoned
    | NodeUncordoned
    | NodeAvoided
    | NodeForgiven
    | CardSwitched
    | CardSettled
    | ReplicaPrepared
    | ReplicaStarted
    | ReplicaEnded
    | ServiceSet
    | ServiceRemoved
    | LoadTaken
    | ServiceScaled
    | ReplicaWanted
    | ServiceFaltered
    | SizesLearnt
    | TenantsShifted
    | PolicySet
    | YardDraining
    | YardResumed
)
