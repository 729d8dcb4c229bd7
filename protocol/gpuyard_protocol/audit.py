"""The audit: who did what, from where, with what outcome; kept in a stream that nobody can delete from.

| subject | who writes | what |
|---|---|---|
| `aud.daemon` | the daemon | decisions about tenants' requests, operators' actions, nodes that join |
| `aud.head` | commands on the head node | tenants, users, tokens: made, changed, removed |

A message holds a batch of entries. What changes nothing is not recorded: questions of tenants, and operators' verbs
in `READING_VERBS`, which are also all that a viewer may send. What the server refuses to a key never reaches the
daemon; it stands in the server's log, with the key.
"""

from __future__ import annotations

import msgspec

from gpuyard_protocol.bus.base import StreamSpec
from gpuyard_protocol.codec import RequestVersion
from gpuyard_protocol.units import Count

AUDIT_DAEMON = "aud.daemon"
AUDIT_HEAD = "aud.head"
#: Operators' verbs that change nothing.
READING_VERBS = ("ping", "jobs", "job", "why", "services", "nodes", "stats", "usage", "logs")

ENTRIES_PAGE_MAX = 500
#: Part of the yard's budget, in percent, beside the four streams; and the most that it is.
_BUDGET_PERCENT = 2
_BYTES_MAX = 256 * 1024 * 1024


def audit_stream(yard: str, budget_bytes: int = 0, replicas: int = 1) -> StreamSpec:
    """Settings of the stream: append-only; the oldest entries go after 400 days, or where there is no more room."""
    return StreamSpec(
        name=f"AUD_{yard}",
        subjects=("aud.>",),
        max_bytes=min(budget_bytes * _BUDGET_PERCENT // 100, _BYTES_MAX),
        max_message_bytes=1024 * 1024,
        discard_old=True,
        max_age_s=400 * 86_400,
        duplicate_window_s=120,
        replicas=replicas,
        is_append_only=True,
    )


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One action, or a run of equal ones within a second."""

    at_ms: int
    #: `user acme/alice`, `operator olga`, `node gpu-1`, `account root` (of the head's own system).
    who: str
    #: The verb: `submit`, `cancel`, `shutdown`, `join`, `tenants add`, …
    what: str
    #: `accepted`, `ok`, or the code of the refusal: `Malformed`, `UnknownJob`, `TokenExpired`, …
    outcome: str
    #: Host name or address; `unknown` where nobody could tell.
    where: str = ""
    #: What it was about: `job 17`, `service chat`, `node gpu-1`; of a run, the first.
    about: str = ""
    #: Of a run of several: how many, and what the last one was about.
    count: int = 1
    until: str = ""


class AuditBatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """On `aud.>`: entries nearly in the order of their times (one may have waited some seconds for its address)."""

    entries: tuple[AuditEntry, ...]
    #: Entries that were dropped before these because too many waited.
    lost: int = 0
    v: int = 1


class AuditQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`adm.….audit` → `AuditPage`, newest first."""

    limit: Count = 100
    #: The `next` of the page before; 0: from the newest.
    cursor: Count = 0
    v: RequestVersion = 1


class AuditPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    entries: tuple[AuditEntry, ...]
    #: Cursor of the next page, 0 if this is the last.
    next: int = 0
