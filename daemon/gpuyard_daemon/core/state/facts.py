"""What the journal keeps: the closed union of facts.

A fact is either something that came in and was believed, or something that was decided. Together they are all that the
state rests on: `Cluster.apply_fact` is the one writer, so applying the facts of a record again leads to the same state,
the same orders and the same notices, whatever policy made them.

Facts are arrays with a short tag (`["placed", 17, …]`): compact, and readable in a dump. A new field goes at the end
with a default; a tag is never used again for another meaning.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.jobs import JobSpec, JobState, JobView, SubmissionAnswer, Why
from gpuyard_protocol.names import AssignmentKey, DeviceUuid, JobId, NodeId, ServiceName, SubmissionId, Tenant, User
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Partition
from gpuyard_protocol.services import ServiceSpec

#: `ready`: takes work. `joining`: known, but its agent has not (yet) joined since the yard started.
NodeState: TypeAlias = Literal["joining", "ready", "suspected", "lost", "incompatible"]
#: What becomes of a job when the last replica of the attempt has ended, whatever ended it.
#: `cancel`: cancelled. `fail`: a failure of its own, which a retry may follow. `abort`: failed, without retry.
#: `requeue`: it waits again, uncharged.
VerdictKind: TypeAlias = Literal["cancel", "fail", "abort", "requeue"]
#: `preempt`: the place is being freed for the job. `reserve`: it is kept until those who hold it have ended.
#: `resize`: an elastic job goes back to these once its attempt, which has another size, has ended.
#: `drain`: kept like `reserve`, on cards of which small instances hold a part only.
ClaimKind: TypeAlias = Literal["preempt", "reserve", "resize", "drain"]
#: Claims to places that nobody was told to leave.
PATIENT_CLAIMS: tuple[ClaimKind, ...] = ("reserve", "drain")
#: `shrink`: an elastic job goes on with fewer replicas.
EvictionKind: TypeAlias = Literal["requeue", "checkpoint", "suspend", "shrink"]


class _Fact(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all facts."""


# --- requests --------------------------------------------------------------------------------------------------------


class JobAccepted(_Fact, frozen=True, tag="accepted"):
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


class ArrayAccepted(_Fact, frozen=True, tag="array"):
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


class ArrayCancelled(_Fact, frozen=True, tag="array-cancelled"):
    """Every element that waits is cancelled; those that run are told to stop by facts of their own."""

    array: JobId
    why: Why


class RequestAnswered(_Fact, frozen=True, tag="answered"):
    """Any other answer: rejections, and the outcome of cancel, apply and delete."""

    tenant: Tenant
    answer: SubmissionAnswer
    until_ms: int
    chosen: bool


class AnswerRepeated(_Fact, frozen=True, tag="repeated"):
    """A request came again under the same chosen id: it gets the first one's answer."""

    tenant: Tenant
    submission_id: SubmissionId


class AnswersForgotten(_Fact, frozen=True, tag="forgotten"):
    """The oldest so many answers were dropped."""

    chosen: int
    given: int


# --- jobs ------------------------------------------------------------------------------------------------------------


class Placement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where one replica goes."""

    node: NodeId
    partition: Partition


class JobPlaced(_Fact, frozen=True, tag="placed"):
    """A new attempt begins: replica i goes to `placements[i]`."""

    job: JobId
    placements: tuple[Placement, ...]
    #: A gang that is not prepared by then gives its places back; 0 for a single replica.
    prepare_until_ms: int = 0
    #: On a place that is kept for that job; 0: on none.
    guest_of: JobId = 0
    #: With another size than its attempt before, which was ended for that.
    resized: bool = False


class Eviction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One who gives way to a claim, and what that costs."""

    job: JobId
    #: How: it is stopped and starts anew, or it is told to save its state first.
    kind: EvictionKind
    #: Run time that it will have to spend again, ms.
    overhead_ms: int
    #: The same over its GPUs, thousandths of a card × ms.
    lost_milli_ms: int
    why: Why
    #: There is room for it elsewhere.
    moved: bool = False
    #: Of one that shrinks: the places that it keeps.
    keeps: tuple[Placement, ...] = ()


class ClaimMade(_Fact, frozen=True, tag="claimed"):
    """Places are kept for a waiting job, and those who stand in its way are told to go: all of this or nothing."""

    job: JobId
    kind: ClaimKind
    placements: tuple[Placement, ...]
    evictions: tuple[Eviction, ...] = ()


class JobIdled(_Fact, frozen=True, tag="idled"):
    """Its cards compute nothing, and its owner is told so."""

    job: JobId
    why: Why


class JobSuspending(_Fact, frozen=True, tag="suspending"):
    """It is told to leave its card, for nobody else's sake, and stays off it until it is released."""

    job: JobId
    why: Why
    #: In whose name it is held.
    by: User
    #: It was suspended for holding its card idle. Unless it has been released it ends at `end_ms`; 0: whenever.
    idle: bool = False
    end_ms: int = 0


class ReplicaSuspended(_Fact, frozen=True, tag="suspended"):
    """Off its card, into the host's memory."""

    key: AssignmentKey
    image_mib: int


class SuspensionFailed(_Fact, frozen=True, tag="not-suspended"):
    """It runs on as before, and is not asked again."""

    key: AssignmentKey
    why: Why


class JobResuming(_Fact, frozen=True, tag="resuming"):
    """Its card is free again: back to it."""

    job: JobId


class ReplicaResumed(_Fact, frozen=True, tag="resumed-replica"):
    """Back on its card, and it goes on."""

    key: AssignmentKey


class ResumptionFailed(_Fact, frozen=True, tag="not-resumed"):
    """It is suspended as before, and not asked again before that."""

    key: AssignmentKey
    again_ms: int
    why: Why


class ClaimDropped(_Fact, frozen=True, tag="unclaimed"):
    """Nothing is kept for the job any more."""

    job: JobId
    why: Why


class JobWidened(_Fact, frozen=True, tag="widened"):
    """An elastic job that was placed in this turn gets more replicas than its least, on GPUs that nobody waits for."""

    job: JobId
    #: Of the replicas that follow those it has.
    placements: tuple[Placement, ...]


class JobResizing(_Fact, frozen=True, tag="resizing"):
    """An elastic job is to have another size: its attempt ends, and the next one starts on these places."""

    job: JobId
    placements: tuple[Placement, ...]
    why: Why


class JobScaled(_Fact, frozen=True, tag="job-scaled"):
    """Its owner says how many replicas an elastic job has at most."""

    job: JobId
    replicas: int


class GangReleased(_Fact, frozen=True, tag="released"):
    """Every member is prepared: go."""

    job: JobId


class JobStopping(_Fact, frozen=True, tag="stopping"):
    """Whatever still runs of the job is told to stop; when the last replica has ended, the verdict holds."""

    job: JobId
    verdict: VerdictKind
    why: Why
    #: The word the agent is told.
    order_reason: str
    exit_code: int | None = None


class JobRequeued(_Fact, frozen=True, tag="requeued"):
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


class JobWoken(_Fact, frozen=True, tag="woken"):
    """A wait before a retry is over."""

    job: JobId


class JobHeld(_Fact, frozen=True, tag="held"):
    """The job does not start, or not again, until it is released."""

    job: JobId
    by: User
    #: Also every other element of its array that waits.
    whole_array: bool = False


class JobReleased(_Fact, frozen=True, tag="let-go"):
    """The job is held no more."""

    job: JobId
    whole_array: bool = False


class JobEnded(_Fact, frozen=True, tag="ended"):
    job: JobId
    state: JobState
    why: Why | None = None
    exit_code: int | None = None


class JobRetired(_Fact, frozen=True, tag="retired"):
    """A finished job leaves the core; `view` is what history keeps of it."""

    job: JobId
    view: JobView


# --- nodes -----------------------------------------------------------------------------------------------------------


class ReportsTaken(_Fact, frozen=True, tag="reports"):
    """A node's reports up to `last` were taken in."""

    node: NodeId
    last: int
    #: Numbers that never came. Never seen so far; journaled so that it can be found.
    missing: int = 0


class LedgerReplaced(_Fact, frozen=True, tag="new-ledger"):
    """A node of a known name came with a ledger that was made anew: its numbers begin again."""

    node: NodeId


class NodeJoined(_Fact, frozen=True, tag="joined"):
    """An agent process reported what the node has."""

    node: NodeId
    instance: str
    boot_id: str
    inventory: Inventory
    #: Identity of its ledger; "": not told.
    ledger: str = ""


class NodeChanged(_Fact, frozen=True, tag="node"):
    """A node's state changed."""

    node: NodeId
    state: NodeState
    reason: str = ""
    #: Fenced because two agent processes speak for it.
    twins: bool = False


class ReplicasGivenUp(_Fact, frozen=True, tag="given-up"):
    """What a lost node had is taken for gone, and the node is told to stop it. Their ends follow as facts of their own;
    the node takes no work until it has confirmed each."""

    node: NodeId
    keys: tuple[AssignmentKey, ...]


class GivenUpGone(_Fact, frozen=True, tag="gone"):
    """The node says that what was given up does not run there (any more)."""

    node: NodeId
    key: AssignmentKey


class NodeCordoned(_Fact, frozen=True, tag="cordoned"):
    """An operator keeps new work away from a node; what runs there goes on."""

    node: NodeId
    by: User
    reason: str = ""


class NodeUncordoned(_Fact, frozen=True, tag="uncordoned"):
    """It takes work again."""

    node: NodeId


class NodeForgotten(_Fact, frozen=True, tag="node-removed"):
    """A node has left the yard. Its numbers are kept, should it ever come back."""

    node: NodeId


class NodeAvoided(_Fact, frozen=True, tag="avoided"):
    """A node could not set up a mode, containers or an account: nothing more of that kind goes there until then."""

    node: NodeId
    #: As a key of `Node.avoided`.
    mode: str
    until_ms: int
    #: In a row.
    times: int


class NodeForgiven(_Fact, frozen=True, tag="forgiven"):
    """The time of `NodeAvoided` is over."""

    node: NodeId
    mode: str


class CardSwitched(_Fact, frozen=True, tag="switched"):
    """A card was given to work for which it goes into MIG mode, or out of it; it keeps that mode for a while."""

    node: NodeId
    card: DeviceUuid
    in_mig: bool
    until_ms: int


class CardSettled(_Fact, frozen=True, tag="settled"):
    """It may switch again."""

    node: NodeId
    card: DeviceUuid


class ReplicaPrepared(_Fact, frozen=True, tag="prepared"):
    key: AssignmentKey
    port: int


class ReplicaStarted(_Fact, frozen=True, tag="started"):
    key: AssignmentKey
    port: int = 0


class ReplicaEnded(_Fact, frozen=True, tag="replica-ended"):
    """A replica is gone from its node, and its partition is free."""

    key: AssignmentKey
    outcome: Literal["exited", "signalled", "stopped", "refused", "lost"]
    exit_code: int = 0
    signal: int = 0
    code: str = ""
    detail: str = ""
    #: Of a refusal: the node said that it is to blame, whatever the code.
    node_fault: bool = False


# --- services --------------------------------------------------------------------------------------------------------


class ServiceSet(_Fact, frozen=True, tag="service"):
    """A service was applied, for the first time or again."""

    tenant: Tenant
    user: User
    spec: ServiceSpec
    #: Grows when what a replica runs or needs changes: replicas of an earlier generation are replaced.
    generation: int


class ServiceRemoved(_Fact, frozen=True, tag="service-removed"):
    tenant: Tenant
    service: ServiceName


class LoadTaken(_Fact, frozen=True, tag="load"):
    tenant: Tenant
    service: ServiceName
    concurrency: int
    queue_depth: int


class ServiceScaled(_Fact, frozen=True, tag="scaled"):
    """How many replicas are wanted, and since when the load would do with fewer."""

    tenant: Tenant
    service: ServiceName
    wanted: int
    #: 0: the load needs all that are wanted.
    lower_since_ms: int = 0
    #: The most that the load asked for since then.
    lower_peak: int = 0


class ReplicaWanted(_Fact, frozen=True, tag="replica"):
    """The yard asks for one more replica of a service: a job like any other, as the service's spec has it now."""

    job: JobId
    tenant: Tenant
    service: ServiceName


class ServiceFaltered(_Fact, frozen=True, tag="faltered"):
    """A replica ended by itself: the next one starts no earlier than this. 0 crashes: all is well again."""

    tenant: Tenant
    service: ServiceName
    crashes: int
    not_before_ms: int
    #: The replica that ended now, and how; 0: the wait for the last one is over.
    job: JobId = 0
    why: Why | None = None


# --- what is learnt ---------------------------------------------------------------------------------------------------


class SizesLearnt(_Fact, frozen=True, tag="sizes"):
    """What a job of unknown length is taken for by the GPU time that it has had: by level, GPU-milliseconds."""

    ranks: tuple[int, ...]


class TenantsShifted(_Fact, frozen=True, tag="shifted"):
    """Tenants' usage moved against their shares: the levels by which their jobs sink (below 0: rise) from now on."""

    shifts: tuple[tuple[Tenant, int], ...]
    #: What their being above (below 0: under) their shares came to over time, thousandths of a level.
    owed: tuple[tuple[Tenant, int], ...] = ()


# --- the yard --------------------------------------------------------------------------------------------------------


class PolicySet(_Fact, frozen=True, tag="policy"):
    """What tenants are granted from now on."""

    policy: Policy


class YardDraining(_Fact, frozen=True, tag="draining"):
    """The yard stops: every replica is told to stop, and nothing starts until `YardResumed`."""


class YardResumed(_Fact, frozen=True, tag="resumed"):
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
