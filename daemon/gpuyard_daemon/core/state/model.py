"""The records the scheduler keeps: jobs and their assignments, nodes, services, answers.

These structs are the whole durable state; a snapshot is their encoding, field by field in this order. Everything else
in the core (what is free on a card, who waits, which deadline comes next) is derived from them and rebuilt on restore.
Only `Cluster` writes them. Times are Unix milliseconds of the core's clock, 0 = not yet.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_daemon.core.state.fact_words import ClaimKind, NodeState, Placement, VerdictKind
from gpuyard_protocol.jobs import JobSpec, JobState, SubmissionAnswer, Why
from gpuyard_protocol.names import AssignmentKey, DeviceUuid, JobId, NodeId, ServiceName, SubmissionId, Tenant, User
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device, Partition, ResourceNeed, share_domain_of
from gpuyard_protocol.services import ServiceSpec

#: `ordered`: the node was told to start (or prepare) it. `prepared`: waits for the gang. `released`: told to go.
#: `stopping`: told to stop; its resources are held until `ended`.
#: `suspending`, `suspended`, `resuming`: on the way off its card, off it, and on the way back.
AssignmentState: TypeAlias = Literal[
    "ordered", "prepared", "released", "running", "suspending", "suspended", "resuming", "stopping", "ended"
]
#: States in which a place is about to be free.
LEAVING = ("stopping", "suspending")

#: Lines of a job's story that are kept, the newest.
STORY_LINES_MAX = 50
#: Earlier attempts of a job whose nodes are remembered.
EARLIER_ATTEMPTS_MAX = 5


class _Record(msgspec.Struct, array_like=True, gc=False):
    """Base of the records. They form trees, never cycles, so the garbage collector need not look at them."""


class Assignment(_Record):
    """One start of one replica on one node: decided, ordered, and held until the node reports its end."""

    key: AssignmentKey
    node: NodeId
    partition: Partition
    state: AssignmentState = "ordered"
    #: Held by the replica: rendezvous of a gang, or where a service's replica listens. 0: none.
    port: int = 0
    started_ms: int = 0
    #: How it ended; "" while it has not.
    outcome: Literal["", "exited", "signalled", "stopped", "refused", "lost"] = ""
    exit_code: int = 0
    signal: int = 0
    code: str = ""
    detail: str = ""
    #: It ends by itself once its node has heard nothing of the daemon for so long; 0: it does not.
    lease_ms: int = 0
    #: It was refused, and the node said that it is to blame, whatever the code.
    node_fault: bool = False
    #: Of the last order to suspend or resume it; 0: there was none.
    step: int = 0
    #: Its place while it is suspended; it holds only memory of the host then. None: it is not.
    home: Partition | None = None
    #: Memory of the host that its work takes while it is suspended, and until it is back on its card.
    image_mib: int = 0
    #: It was told to stop on its way off its card: until it has ended its work may lie in the host's memory.
    may_leave_image: bool = False

    def held(self, need: ResourceNeed) -> tuple[int, int]:
        """(CPU, memory) of its node that it holds: suspended, no CPU, and memory for its image beside its own."""
        return need.cpu_milli if self.home is None else 0, need.memory_mib + self.image_mib

    @property
    def is_live(self) -> bool:
        return self.state != "ended"

    @property
    def went_well(self) -> bool:
        return self.outcome == "exited" and self.exit_code == 0


class Verdict(_Record):
    """What becomes of a job once every replica of the attempt has ended."""

    kind: VerdictKind
    why: Why
    #: The word for the agent, for orders that are still to be made.
    order_reason: str
    exit_code: int | None = None


class Job(_Record):
    """A job from acceptance until an hour after its end."""

    id: JobId
    tenant: Tenant
    user: User
    submission_id: SubmissionId
    spec: JobSpec
    submitted_ms: int
    #: Set for a service's replica, with the service's generation that it runs.
    service: ServiceName = ""
    generation: int = 0
    state: JobState = "pending"
    #: 0 before the first start.
    attempt: int = 0
    retries_left: int = 0
    #: Uncharged requeues in a row; the wait before the next grows with it.
    uncharged: int = 0
    #: A pending job does not start before this; 0: it may start now.
    not_before_ms: int = 0
    #: Set while a gang is being prepared.
    prepare_until_ms: int = 0
    #: Set once the attempt is to end for a reason of its own; None while nothing is decided.
    verdict: Verdict | None = None
    #: Of the current or last attempt, by replica; [] before the first.
    assignments: list[Assignment] = []
    #: Attempts before that with the node of each replica, newest last: where their output lies.
    earlier: list[tuple[int, tuple[NodeId, ...]]] = []
    #: Of `assignments`: how many have not ended.
    live: int = 0
    first_started_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    exit_code: int | None = None
    #: Why it is where it is: of the last requeue or of the end.
    why: Why | None = None
    #: What happened to it, when and in words, oldest first.
    story: list[tuple[int, str]] = []
    #: Who holds it: it does not start until released. "": nobody.
    held_by: User = ""
    #: The array it is an element of, by its first job's number, and which one. 0: none.
    array: JobId = 0
    array_index: int = 0
    #: Run time until `runs_since_ms`, of all attempts; and since when all its replicas run, 0: they do not. Run time is
    #: counted as on the fastest card: what passes counts by `speed_milli`.
    served_ms: int = 0
    runs_since_ms: int = 0
    #: Run time of one attempt as it was expected at acceptance, and from what (`estimate`, `history`); 0: unknown.
    expected_ms: int = 0
    expected_from: str = ""
    #: When it should have ended, and whether that was promised; 0: whenever.
    deadline_ms: int = 0
    promised: bool = False
    #: In line for a place since then; 0: it is not.
    waits_since_ms: int = 0
    #: Level of its size when it last came into line.
    level: int = 0
    #: How long it stood in line before the present attempt.
    waited_ms: int = 0
    #: Times it gave way to others, and the run time that this cost it, ms.
    preemptions: int = 0
    overhead_ms: int = 0
    #: Its node could not suspend it: it gives way by starting anew.
    refused_suspension: bool = False
    #: A suspended job is not resumed before this.
    resume_after_ms: int = 0
    #: It was suspended for holding its card idle, and not because its owner said so.
    idled: bool = False
    #: Unless it has been released by then, such a job ends; 0: whenever.
    idle_end_ms: int = 0
    #: Of an elastic job: times that its size was changed while it ran; the most replicas that its owner wants now, 0:
    #: as its specification says; and when the owner said so of the present attempt, 0: not.
    resizes: int = 0
    scaled_to: int = 0
    scaled_ms: int = 0
    #: How fast its cards are in its present run, in thousandths of the fastest.
    speed_milli: int = 1000

    @property
    def domain(self) -> str:
        """With whom it shares cards."""
        return share_domain_of(self.tenant, self.spec.need.share_domain)

    @property
    def most_replicas(self) -> int:
        return self.scaled_to or self.spec.replicas

    @property
    def is_elastic(self) -> bool:
        return self.spec.min_replicas > 0

    @property
    def is_resizable(self) -> bool:
        """It runs with all its replicas: where some have done their work, the others are left to end theirs."""
        is_whole = self.live == len(self.assignments)
        return self.is_elastic and self.state == "running" and self.verdict is None and is_whole

    @property
    def is_gang(self) -> bool:
        """Its replicas are prepared and then told to go together, if only one of them, where there may be more."""
        return self.spec.replicas > 1

    @property
    def is_final(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")

    def note(self, now_ms: int, text: str) -> None:
        if len(self.story) >= STORY_LINES_MAX:
            # The first line (its acceptance) stays, whatever else goes.
            del self.story[1]
        self.story.append((now_ms, text))


class Claim(_Record):
    """Places kept for a waiting job while others leave them. Nobody else is placed there."""

    job: JobId
    kind: ClaimKind
    #: By replica.
    placements: list[Placement]
    since_ms: int
    #: Who was told to go for it.
    evicted: list[JobId] = []
    #: Who was let in meanwhile, to go when nobody else is left.
    guests: list[JobId] = []


#: What a node is left alone for where its container engine would not serve.
CONTAINERS = "containers"


def account_of(need: ResourceNeed, tenant: Tenant, user: User) -> str:
    """What a node is left alone for where it has no account for somebody: shares may run as another than the rest."""
    return f"{tenant}/{user}" + (" shares" if need.is_share else "")


class Avoidance(_Record):
    """What a node could not set up lately: a mode, `CONTAINERS`, or an account as `account_of` names it."""

    #: Nothing of the kind goes there until then; 0: it may be tried again.
    until_ms: int
    #: Refusals in a row; a success takes the whole entry away.
    times: int


class CardPast(_Record):
    """What became of a card earlier, as far as decisions rest on it."""

    #: When it was last kept free for a job that its holders stood in the way of; 0: never.
    drained_ms: int = 0
    #: It was in MIG mode when it was last used.
    in_mig: bool = False
    #: It switched to that so lately that it stays so until then; 0: it may switch.
    keeps_mode_until_ms: int = 0


class GivenUp(_Record):
    """What a lost node had, taken for gone before the node said so: enough to tell it to stop."""

    key: AssignmentKey
    partition: Partition
    tenant: Tenant
    user: User
    grace_ms: int


class Node(_Record):
    """A node that has been heard of."""

    id: NodeId
    #: In the order in which nodes were first heard of, from 1: breaks ties between equal nodes.
    number: int
    state: NodeState = "joining"
    #: Why it takes no work, in words.
    reason: str = ""
    #: Of the agent process that joined last.
    instance: str = ""
    #: Agent processes that joined before it, newest last: their late reports are not news.
    former_instances: list[str] = []
    boot_id: str = ""
    #: None until it first joined.
    inventory: Inventory | None = None
    #: Cards that the inventory no longer lists but jobs still hold.
    absent: list[Device] = []
    #: Number of the last report taken in.
    reports_seen: int = 0
    reports_missing: int = 0
    #: Number of the last order made for it.
    orders_issued: int = 0
    #: By what it is left alone for.
    avoided: dict[str, Avoidance] = {}
    #: Identity of its ledger, whose reports are numbered through; "": never told.
    ledger: str = ""
    #: Incompatible because two agent processes speak for it.
    is_twinned: bool = False
    #: Since when it is lost; 0: it is not.
    lost_ms: int = 0
    #: What it must confirm to be gone before it takes work again.
    given_up: list[GivenUp] = []
    #: An operator took it out of the yard: nobody sees it, and it has nothing, until it joins again.
    is_removed: bool = False
    #: The operator who keeps new work away from it, and why; "": nobody does.
    cordoned_by: User = ""
    cordon_reason: str = ""
    #: By card, where there is anything to tell.
    pasts: dict[DeviceUuid, CardPast] = {}


class Service(_Record):
    """A service as it was last applied, its load, and how many replicas that means."""

    tenant: Tenant
    user: User
    spec: ServiceSpec
    generation: int
    applied_ms: int
    concurrency: int = 0
    queue_depth: int = 0
    #: Between the spec's min and max.
    wanted: int = 0
    #: Since when the load would do with fewer than wanted, and the most it asked for since. 0: it does not.
    lower_since_ms: int = 0
    lower_peak: int = 0
    #: Replicas that ended by themselves in a row, and when the next may start.
    crashes: int = 0
    not_before_ms: int = 0
    #: What it was before what its replicas run last changed, for `rollout undo`.
    previous: ServiceSpec | None = None
    #: The last replica that ended by itself since it was applied, and how (None: with exit code 0). 0: none did.
    crashed_job: JobId = 0
    crash: Why | None = None


class KeptAnswer(_Record):
    """The answer to a request, for those who ask again."""

    until_ms: int
    answer: SubmissionAnswer


class Totals(_Record):
    """Counters since the yard began."""

    finished: int = 0
    #: Starts of replicas.
    started: int = 0
    #: Of finished jobs that started: first start less submission.
    wait_sum_ms: int = 0
    requeued: int = 0
    rejected: int = 0
    #: GPU compute held and capacity, summed over time up to `summed_to_ms`.
    held_milli_ms: int = 0
    capacity_milli_ms: int = 0
    summed_to_ms: int = 0
    #: Times that a running job gave way to another, and the GPU time that this cost, thousandths of a card × ms.
    preempted: int = 0
    preempted_milli_ms: int = 0
    #: Of these, with room elsewhere, and what of that time they cost.
    moved: int = 0
    moved_milli_ms: int = 0


class Array(_Record):
    """What the elements of an array have in common, until the last of them has left."""

    #: The first element's number; the others follow.
    id: JobId
    tenant: Tenant
    count: int
    spec: JobSpec
    #: Elements that are still in the core, and those that have not ended.
    left: int
    unfinished: int
    #: Elements that ended and did not succeed.
    unsuccessful: int = 0


class Standing(_Record):
    """What a tenant was charged lately, and what follows for its jobs."""

    tenant: Tenant
    #: Up to here `recent` is summed, and from here on `charged` has to decay.
    summed_to_ms: int
    folded_ms: int
    #: Thousandths of a card × ms × 2^(class + 2).
    charged: int = 0
    recent: int = 0
    #: Levels by which its jobs sink; below 0 they rise.
    shift: int = 0
    #: What being above its share (below 0: under it) came to over time, thousandths of a level, as of `owed_ms`.
    owed: int = 0
    owed_ms: int = 0


class ModelUsage(_Record):
    """GPU compute of one model of card, summed over time: thousandths of a card × ms."""

    #: From the order to start until the place was free again.
    held_milli_ms: int
    #: While the replica's process ran.
    ran_milli_ms: int
    summed_to_ms: int


class Usage(_Record):
    """GPU compute that one user of a tenant has held, summed over time: thousandths of a card × ms."""

    tenant: Tenant
    user: User
    #: When it first held any.
    since_ms: int
    used_milli_ms: int
    summed_to_ms: int
    #: By short name of the model, in the order in which the user first held one.
    models: dict[str, ModelUsage] = {}


def replica_spec(spec: ServiceSpec) -> JobSpec:
    """One replica of a service, as a job."""
    return JobSpec(
        argv=spec.argv,
        name=spec.name,
        need=spec.need,
        priority=spec.priority,
        stop_grace_ms=spec.stop_grace_ms,
        env=spec.env,
        cwd=spec.cwd,
        allow_pending=True,
    )
