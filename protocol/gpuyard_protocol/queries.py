"""Questions to the daemon on `q.<tenant>.<user>.<verb>` and `adm.<user>.<verb>`, and their answers.

A question reads and changes nothing; what changes something goes through SUB (tenants) or `adm` (operators). Lists are
paged: at most 500 rows, and a cursor that leads on. Every answer is one of the types here or a `QueryError`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gpuyard_protocol.codec import RequestVersion
from gpuyard_protocol.explaining import CardReason, Holder, KeyTerm, Remedy, StartEstimate
from gpuyard_protocol.jobs import JobView, ReplicaView, SubmissionAnswer, Why
from gpuyard_protocol.nodes import DeviceSample
from gpuyard_protocol.services import ServiceView
from gpuyard_protocol.units import Count, Offset

PAGE_ROWS_MAX = 500


class QueryError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The question could not be answered."""

    #: `Malformed`, `UnknownJob`, `UnknownService`, `UnknownVerb`, `Unavailable`.
    code: str
    text: str
    nearest: str = ""


class JobsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….jobs`, newest first."""

    #: Empty: those not yet final.
    states: list[str] = []
    #: Also those that have ended.
    all: bool = False
    user: str = ""
    service: str = ""
    #: One row for all waiting elements of an array.
    fold: bool = False
    limit: Count = 100
    #: The `next` of the page before; 0: from the newest.
    cursor: Count = 0
    v: RequestVersion = 1


class JobsPage(msgspec.Struct, frozen=True, kw_only=True):
    jobs: tuple[JobView, ...]
    #: Cursor of the next page, 0 if this is the last.
    next: int = 0
    #: How many of this tenant's there are in each state.
    counts: dict[str, int] = {}


class JobQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….job` → `JobView`; `q.….why` → `WhyAnswer`."""

    job: Count
    v: RequestVersion = 1
    #: Of `why`: the summary, the reasons and the place in line alone, which cost the yard least. For lists.
    brief: bool = False


class SubmissionQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….submission` → `SubmissionStatus`."""

    submission_id: str
    v: RequestVersion = 1


class SubmissionStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    #: None: not decided yet, or never heard of.
    answer: SubmissionAnswer | None = None


class NodeReason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job does not fit some nodes."""

    reason: Why
    #: How many nodes say so, and some of their names.
    nodes: int
    examples: tuple[str, ...] = ()


class WhyAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a job is where it is."""

    job: int
    state: str
    #: One sentence.
    summary: str
    #: The job's own history, oldest first.
    story: tuple[str, ...] = ()
    #: For a waiting job: reasons by nodes; what may pass first (what others hold, how nodes are now), then what lasts;
    #: of either, the most frequent first.
    reasons: tuple[NodeReason, ...] = ()
    #: 1 = next of those waiting.
    position: int = 0
    ahead: int = 0
    #: For a waiting job: what its tenant's limit has to do with it, whatever room the nodes have.
    limit: Why | None = None
    #: For a waiting job: what each card says to it, most frequent first.
    cards: tuple[CardReason, ...] = ()
    #: For a waiting job: who holds what it could use, the largest first; on a large yard, on the nodes nearest to free.
    holders: tuple[Holder, ...] = ()
    #: What makes its place in line, term by term.
    terms: tuple[KeyTerm, ...] = ()
    #: Changes after each of which alone it would start now, the smallest first.
    remedies: tuple[Remedy, ...] = ()
    #: Of a job that has not started.
    estimate: StartEstimate | None = None


class DryRun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`q.….plan`, asked with what one would submit: what would become of the job now. Nothing was changed."""

    #: `starts`: with the next turn.
    verdict: Literal["starts", "waits", "rejected"]
    #: One sentence.
    summary: str
    #: Where each replica would go, if it starts.
    placed: tuple[ReplicaView, ...] = ()
    #: If it waits: why, as the job itself would be answered (its number would be `job`).
    why: WhyAnswer | None = None
    #: The refusal, as the submission would be answered.
    refusal: SubmissionAnswer | None = None
    #: Of an array: how many jobs it is; what is said holds for the first of them.
    elements: int = 0


class ServicesQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….services` → `ServicesPage`."""

    service: str = ""
    v: RequestVersion = 1


class ServicesPage(msgspec.Struct, frozen=True, kw_only=True):
    services: tuple[ServiceView, ...]


class CardView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One card: how it is cut and how full it is."""

    uuid: str
    index: int
    model: str
    memory_mib: int
    mode: str
    healthy: bool = True
    #: Why it is not, in words.
    fault: str = ""
    #: Compute and memory held by jobs.
    held_milli: int = 0
    held_memory_mib: int = 0
    #: Jobs on it (own tenant's only, for tenants).
    jobs: tuple[int, ...] = ()
    sample: DeviceSample | None = None
    #: What is planned for it, in words: it is kept free for somebody, or keeps its MIG mode for now.
    note: str = ""
    #: Until when it keeps that, Unix milliseconds; 0: it may switch.
    keeps_mode_until_ms: int = 0


class NodeView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    node: str
    hostname: str
    #: `ready`, `suspected`, `lost`, `joining`, `incompatible`.
    state: str
    cards: tuple[CardView, ...] = ()
    cpu_milli: int = 0
    cpu_held_milli: int = 0
    memory_mib: int = 0
    memory_held_mib: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    simulated: bool = False
    driver: str = ""
    agent_version: str = ""
    #: Since the last heartbeat; -1: none seen yet.
    heard_ms_ago: int = -1
    #: Why it takes no work, in words.
    reason: str = ""
    #: An operator keeps new work away from it.
    cordoned: bool = False


class NodesQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….nodes` → `NodesPage`."""

    node: str = ""
    v: RequestVersion = 1


class NodesPage(msgspec.Struct, frozen=True, kw_only=True):
    nodes: tuple[NodeView, ...]


class LogsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….logs` → `LogChunk`: a range of output, at most 256 KiB; with `follow`, live pieces on `log.…` for 30 s."""

    job: Count
    attempt: Count = 0
    replica: Count = 0
    stream: Literal["out", "err"] = "out"
    offset: Offset = 0
    limit: Count = 262_144
    follow: bool = False
    v: RequestVersion = 1


class StatsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….stats` → `Stats`."""

    v: RequestVersion = 1


class Stats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The yard in numbers (everybody's)."""

    yard: str
    now_ms: int
    #: Jobs now, by state.
    jobs: dict[str, int]
    nodes: dict[str, int]
    gpus: int
    #: GPU compute held now, and summed over time since the yard began: GPU-milli × ms.
    held_milli: int
    held_milli_ms: int
    #: Capacity summed the same way.
    capacity_milli_ms: int
    #: Finished jobs: number, and the sum of their waits (submission to first start).
    finished: int = 0
    wait_sum_ms: int = 0
    started: int = 0
    turns: int = 0
    #: What a person should do something about, in words.
    alarms: tuple[str, ...] = ()


class UsageQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….usage` → `UsageReport`: one's own tenant; operators get every tenant."""

    tenant: str = ""
    v: RequestVersion = 1


class ModelUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What somebody holds and has used of one model of card. Summed over time: GPU-milli × ms."""

    model: str
    held_milli: int = 0
    #: From the order to start until the place was free again.
    held_milli_ms: int = 0
    #: Of that, while the job's process ran: what is between is preparing and clearing up.
    used_milli_ms: int = 0
    #: How fast such cards are beside the fastest, in thousandths: what fairness counts `held_milli_ms` by.
    speed_milli: int = 1000


class QueueUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grant of a queue that a tenant's jobs stand in, or of one above it."""

    queue: str
    #: "": the yard.
    parent: str = ""
    #: What cards it is for: "" for any model, and for either kind (`whole`, `shared`).
    model: str = ""
    kind: str = ""
    #: By all jobs in the queue and those below it.
    used_milli: int = 0
    nominal_milli: int = 0
    #: Most beyond nominal; -1: as much as others leave.
    borrow_milli: int = -1
    #: Most of nominal that others may hold while it is unused; -1: all of it.
    lend_milli: int = -1


class UserUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one user of a tenant holds and has used. Compute counts by fraction, in thousandths of a card."""

    user: str
    held_milli: int = 0
    #: Held compute summed over time, GPU-milli × ms: divided by 1,000,000 it is GPU-seconds.
    used_milli_ms: int = 0
    #: Since when, Unix milliseconds: the first start.
    since_ms: int = 0
    models: tuple[ModelUsage, ...] = ()


class TenantUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tenant holds and has used, and what it may have."""

    tenant: str
    held_milli: int = 0
    #: 0: no limit.
    gpus_max_milli: int = 0
    #: Jobs that have not ended.
    jobs: int = 0
    #: 0: no limit.
    jobs_max: int = 0
    used_milli_ms: int = 0
    since_ms: int = 0
    users: tuple[UserUsage, ...] = ()
    models: tuple[ModelUsage, ...] = ()
    #: Its queue, and the grants of that and of the queues above it.
    queue: str = ""
    queues: tuple[QueueUsage, ...] = ()
    #: Its part of the yard beside other tenants', and the half octaves by which its jobs sink (below 0: rise) in line.
    weight: int = 1
    shift: int = 0


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    tenants: tuple[TenantUsage, ...]
    now_ms: int


class PingQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`q.….ping` → `Ok` with the yard's name: somebody answers."""

    v: RequestVersion = 1


class ShutdownRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`adm.….shutdown` → `Ok` once every replica has ended and its job waits again; `QueryError` after the deadline."""

    deadline_ms: Count = 60_000
    v: RequestVersion = 1


class NodeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`adm.….declare-dead` and `adm.….remove-node` → `Ok`; `QueryError` for a node that is not lost."""

    node: str
    v: RequestVersion = 1


class CordonRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`adm.….cordon` → `Ok`: nothing new goes to the node until `adm.….uncordon` (a `NodeRequest`)."""

    node: str
    reason: str = ""
    #: And jobs that may be preempted leave it: they end with grace and wait again, uncharged.
    requeue: bool = False
    v: RequestVersion = 1


class HandOverRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`adm.….handover` → `Ok` once a standby leads; `QueryError` if none is there and up to date."""

    v: RequestVersion = 1


class Ok(msgspec.Struct, frozen=True, omit_defaults=True):
    """Done."""

    text: str = ""
