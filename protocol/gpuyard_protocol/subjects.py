"""The subject grammar, and the streams behind it.

| subject | who publishes | what |
|---|---|---|
| `sub.<tenant>.<user>.<verb>` | tenants | durable requests: submit, submit-many, cancel, hold, … (stream SUB) |
| `q.<tenant>.<user>.<verb>` | tenants | questions, answered at once |
| `adm.<user>.<verb>` | operators | the same for operators |
| `load.<tenant>.<service>` | gateways | load reports, lossy |
| `evt.<tenant>.<job>`, `evt.<tenant>.sub.<submission>` | daemon | what became of it (stream EVT) |
| `cmd.<node>` | daemon | orders, request-reply |
| `rep.<node>.<kind>` | agents | outcomes (stream REP) |
| `hb.<node>`, `tel.<node>.<kind>` | agents | lossy |
| `log.<tenant>.<job>.<replica>` | agents | output, while somebody follows |
| `jrn.leader`, `jrn.e`, `jrn.snap` | daemon | the journal (stream JRN) |
| `lead.<holder>` | daemons | a standby asks the leader for a sign of life |

Who asks is read from the subject, never from the payload: the server lets each key publish under its own name alone.
Tokens are names (`gpuyard_protocol.names`) or numbers; stream names carry the yard's name.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from gpuyard_protocol.bus.base import StreamSpec
from gpuyard_protocol.names import JobId, NodeId, ServiceName, SubmissionId, Tenant, User, is_name

SubmitVerb = Literal[
    "submit",
    "submit-many",
    "cancel",
    "hold",
    "release",
    "suspend",
    "resume",
    "requeue",
    "scale",
    "apply",
    "rollout",
    "delete",
]
SUBMIT_VERBS: tuple[SubmitVerb, ...] = (
    "submit", "submit-many", "cancel", "hold", "release", "suspend", "resume",
    "requeue", "scale", "apply", "rollout", "delete",
)  # fmt: skip

JOURNAL_LEADER = "jrn.leader"
JOURNAL_ENTRY = "jrn.e"
JOURNAL_SNAPSHOT = "jrn.snap"

ALL_QUERIES = "q.>"
ALL_OPERATIONS = "adm.>"
ALL_LOADS = "load.>"
ALL_HEARTBEATS = "hb.*"
ALL_TELEMETRY = "tel.>"


def submission(tenant: Tenant, user: User, verb: str) -> str:
    return f"sub.{tenant}.{user}.{verb}"


def query(tenant: Tenant, user: User, verb: str) -> str:
    return f"q.{tenant}.{user}.{verb}"


def operation(operator: User, verb: str) -> str:
    return f"adm.{operator}.{verb}"


def load(tenant: Tenant, service: ServiceName) -> str:
    return f"load.{tenant}.{service}"


def job_events(tenant: Tenant, job: JobId) -> str:
    return f"evt.{tenant}.{job}"


def submission_events(tenant: Tenant, submission_id: SubmissionId) -> str:
    return f"evt.{tenant}.sub.{submission_id}"


def tenant_events(tenant: Tenant) -> str:
    return f"evt.{tenant}.>"


def commands(node: NodeId) -> str:
    return f"cmd.{node}"


def reports(node: NodeId) -> str:
    return f"rep.{node}.report"


def heartbeat(node: NodeId) -> str:
    return f"hb.{node}"


def telemetry(node: NodeId) -> str:
    return f"tel.{node}.devices"


def log(tenant: Tenant, job: JobId, replica: int) -> str:
    return f"log.{tenant}.{job}.{replica}"


def presence(holder: str) -> str:
    """Of one daemon process, named as in its claims."""
    return f"lead.{holder}"


class Caller(NamedTuple):
    """Who asks for what, read from a subject."""

    tenant: Tenant
    user: User
    verb: str


def parse_tenant_subject(subject: str) -> Caller | None:
    """`sub.T.U.V` or `q.T.U.V`; None for anything else (poison is counted and dropped)."""
    parts = subject.split(".")
    if len(parts) != 4 or parts[0] not in ("sub", "q") or not all(is_name(part) for part in parts[1:]):
        return None
    return Caller(parts[1], parts[2], parts[3])


def parse_operation(subject: str) -> tuple[User, str] | None:
    parts = subject.split(".")
    if len(parts) != 3 or parts[0] != "adm" or not all(is_name(part) for part in parts[1:]):
        return None
    return parts[1], parts[2]


def parse_load(subject: str) -> tuple[Tenant, ServiceName] | None:
    parts = subject.split(".")
    if len(parts) != 3 or parts[0] != "load" or not all(is_name(part) for part in parts[1:]):
        return None
    return parts[1], parts[2]


_NODE_SUBJECT_PARTS = {"rep": 3, "hb": 2, "tel": 3}


def parse_node_subject(subject: str) -> NodeId | None:
    """The node of `rep.N.K`, `hb.N`, `tel.N.K`."""
    parts = subject.split(".")
    if len(parts) != _NODE_SUBJECT_PARTS.get(parts[0]) or not all(is_name(part) for part in parts[1:]):
        return None
    return parts[1]


#: Of the budget of the four streams, the journal's part.
JOURNAL_PERCENT = 60


class Streams(NamedTuple):
    """The four streams of a yard."""

    submissions: StreamSpec
    reports: StreamSpec
    journal: StreamSpec
    events: StreamSpec


def stream_name(kind: Literal["SUB", "REP", "JRN", "EVT"], yard: str) -> str:
    return f"{kind}_{yard}"


def streams(yard: str, budget_bytes: int, replicas: int = 1) -> Streams:
    """Settings of the four streams, sized so that together they use at most `budget_bytes`: the store never fills.

    SUB and REP keep at most 10,000 messages a subject: whoever floods is refused alone. Roll-ups, message TTLs,
    schedules, atomic batches and counters stay off, so that a writer's headers can do nothing.
    """
    return Streams(
        submissions=StreamSpec(
            name=stream_name("SUB", yard),
            subjects=("sub.>",),
            max_bytes=budget_bytes * 20 // 100,
            max_message_bytes=1024 * 1024,
            max_messages_per_subject=10_000,
            discard_new_per_subject=True,
            replicas=replicas,
        ),
        reports=StreamSpec(
            name=stream_name("REP", yard),
            subjects=("rep.>",),
            max_bytes=budget_bytes * 10 // 100,
            max_message_bytes=1024 * 1024,
            max_messages_per_subject=10_000,
            discard_new_per_subject=True,
            replicas=replicas,
        ),
        journal=StreamSpec(
            name=stream_name("JRN", yard),
            subjects=("jrn.>",),
            max_bytes=budget_bytes * JOURNAL_PERCENT // 100,
            max_message_bytes=8 * 1024 * 1024,
            duplicate_window_s=120,
            replicas=replicas,
        ),
        events=StreamSpec(
            name=stream_name("EVT", yard),
            subjects=("evt.>",),
            max_bytes=budget_bytes * 10 // 100,
            max_messages_per_subject=64,
            discard_old=True,
            max_age_s=7 * 86_400,
            duplicate_window_s=120,
            replicas=replicas,
            is_lazy=True,
        ),
    )
