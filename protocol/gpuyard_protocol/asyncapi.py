"""The AsyncAPI 3 document of a yard's messages, made from the types and the subject grammar.

    python -m gpuyard_protocol.asyncapi                             print it
    python -m gpuyard_protocol.asyncapi --write docs/asyncapi.yaml  write it
    python -m gpuyard_protocol.asyncapi --check docs/asyncapi.yaml  exit 1 if the file says anything else

It speaks from the daemon's point of view: the daemon *receives* submissions and *sends* events. Payload schemas come
from the structs, descriptions of fields from the `#:` comments above them, stream settings from `subjects.streams`.
Only which type travels on which subject stands in this file. A new verb or subject belongs into `every_channel()`.

Same types, same bytes: the tests compare the committed file with this module's output.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec
import yaml

from gpuyard_protocol import (
    PROTOCOL_VERSION,
    audit,
    directives,
    jobs,
    joining,
    nodes,
    queries,
    scaling,
    services,
    subjects,
    uploads,
)
from gpuyard_protocol.codec import json_schemas

StreamKind = Literal["SUB", "REP", "JRN", "EVT"]

_PARAMETERS = {
    "tenant": "Name of the tenant, as in the account whose key is used.",
    "user": "Name of the user: each key may publish under its own user alone.",
    "operator": "Name of the operator: each key may publish under its own name alone.",
    "service": "Name of the service.",
    "job": "Number of the job.",
    "submission": "The submission id: the one in the payload, or `s<sequence>` from the PubAck.",
    "node": "Id of the node.",
    "replica": "Number of the replica, from 0.",
    "holder": "A daemon process, as its claims in the journal name it.",
}


class Channel(NamedTuple):
    """One subject: what travels on it, in which direction, and what answers."""

    name: str
    address: str
    #: What the daemon does on it; `observe` is an agent's message that clients read themselves.
    action: Literal["receive", "send", "observe"]
    summary: str
    #: Types of the payload; none for the journal, whose format is the daemon's own affair.
    payloads: tuple[type[Any], ...]
    #: Types of the answer, for requests.
    replies: tuple[type[Any], ...] = ()
    stream: StreamKind | None = None
    #: NATS queue group of those who receive.
    queue: str = ""


class PubAck(msgspec.Struct, kw_only=True):
    """JetStream's word that the request is durable. It says nothing about what the yard decides."""

    #: The stream that took it.
    stream: str
    #: Its place there; a request without an id of its own becomes `s<seq>`.
    seq: int
    #: The server had this Nats-Msg-Id already.
    duplicate: bool = False


#: Verb, question, answer, summary, and who may ask: "q" tenants, "adm" operators.
_QUERIES: tuple[tuple[str, type[Any], type[Any], str, str], ...] = (
    ("jobs", queries.JobsQuery, queries.JobsPage, "List jobs, newest first.", "q adm"),
    ("job", queries.JobQuery, jobs.JobView, "Everything about one job.", "q adm"),
    ("why", queries.JobQuery, queries.WhyAnswer, "Why a job is where it is.", "q adm"),
    ("plan", jobs.JobRequest, queries.DryRun, "What would become of a job if it were submitted now.", "q"),
    ("submission", queries.SubmissionQuery, queries.SubmissionStatus, "What became of a submission.", "q"),
    ("services", queries.ServicesQuery, queries.ServicesPage, "List services.", "q adm"),
    ("nodes", queries.NodesQuery, queries.NodesPage, "List nodes and their cards.", "q adm"),
    ("logs", queries.LogsQuery, nodes.LogChunk, "A range of output; with `follow`, live pieces on `log.…`.", "q adm"),
    ("upload", uploads.UploadPiece, uploads.UploadHeld, "A piece of what jobs bring along.", "q"),
    ("stats", queries.StatsQuery, queries.Stats, "The yard in numbers.", "q adm"),
    ("usage", queries.UsageQuery, queries.UsageReport, "What tenants hold, have used, and may have.", "q adm"),
    ("ping", queries.PingQuery, queries.Ok, "Whether somebody answers.", "q adm"),
    ("shutdown", queries.ShutdownRequest, queries.Ok, "End every replica with grace and requeue its job.", "adm"),
    ("handover", queries.HandOverRequest, queries.Ok, "Let a standby daemon lead, without a gap.", "adm"),
    (
        "declare-dead",
        queries.NodeRequest,
        queries.Ok,
        "Take what a lost node had for gone: it may run elsewhere.",
        "adm",
    ),
    ("remove-node", queries.NodeRequest, queries.Ok, "Take a lost node out of the yard, and its key.", "adm"),
    ("cordon", queries.CordonRequest, queries.Ok, "Keep new work away from a node; let it empty, if asked to.", "adm"),
    ("uncordon", queries.NodeRequest, queries.Ok, "Let work go to a node again.", "adm"),
    ("audit", audit.AuditQuery, audit.AuditPage, "Who did what, newest first.", "adm"),
)
_SUBMISSIONS: tuple[tuple[subjects.SubmitVerb, type[Any], str], ...] = (
    ("submit", jobs.JobRequest, "Submit a job."),
    ("submit-many", jobs.BatchRequest, "Submit many jobs in one message; each is decided alone."),
    ("cancel", directives.CancelRequest, "Cancel a job."),
    ("hold", directives.HoldRequest, "Keep a job that waits from starting."),
    ("release", directives.HoldRequest, "Let a held job start again."),
    ("suspend", directives.HoldRequest, "Take a running job off its card, until it is resumed."),
    ("resume", directives.HoldRequest, "Let a suspended job go back to its card."),
    ("requeue", directives.RequeueRequest, "End a job's attempt with grace; it waits again, uncharged."),
    ("scale", scaling.ScaleRequest, "Say how many replicas an elastic job or a service has."),
    ("apply", services.ServiceRequest, "Create or change a service."),
    ("rollout", scaling.RolloutRequest, "Replace a service's replicas one by one."),
    ("delete", services.DeleteRequest, "Stop a service's replicas and forget it."),
)


def every_channel() -> Iterator[Channel]:
    """Every subject there is, with what travels on it."""
    for submit, request, summary in _SUBMISSIONS:
        address = subjects.submission("{tenant}", "{user}", submit)
        yield Channel(f"sub.{submit}", address, "receive", summary, (request,), (PubAck,), "SUB")
    for verb, query, answer, summary, askers in _QUERIES:
        for asker in askers.split():
            own, others = subjects.query("{tenant}", "{user}", verb), subjects.operation("{operator}", verb)
            address = own if asker == "q" else others
            replies = (answer, queries.QueryError)
            yield Channel(f"{asker}.{verb}", address, "receive", summary, (query,), replies, queue="api")
    yield Channel(
        "load", subjects.load("{tenant}", "{service}"), "receive",
        "What a gateway sees now; the newest of each source counts, their sum scales the service. Lossy.",
        (services.LoadReport,),
    )  # fmt: skip
    yield Channel(
        "evt.job", "evt.{tenant}.{job}", "send", "A job entered a state.", (jobs.JobEvent,), stream="EVT"
    )  # fmt: skip
    yield Channel(
        "evt.submission", subjects.submission_events("{tenant}", "{submission}"), "send",
        "What the yard decided about a request: accepted or rejected.", (jobs.SubmissionAnswer,), stream="EVT",
    )  # fmt: skip
    yield Channel(
        "log", "log.{tenant}.{job}.{replica}", "observe",
        "Output of a replica as it is written, while somebody follows. Lossy: `offset` shows what is missing.",
        (nodes.LogChunk,),
    )  # fmt: skip
    yield Channel(
        "cmd", subjects.commands("{node}"), "send",
        "Orders to a node. The answer `ok` means: the intent is durable in the agent's ledger.",
        get_args(nodes.Command), (nodes.OrderAnswer, nodes.LogChunk, queries.Ok),
    )  # fmt: skip
    yield Channel(
        "rep", subjects.reports("{node}"), "receive", "Outcomes from a node, numbered densely.",
        (nodes.ReportBatch,), (PubAck,), "REP",
    )  # fmt: skip
    yield Channel(
        "join", joining.join("{node}"), "receive", "A GPU host asks to be let in, with the key of a one-time token.",
        (joining.JoinRequest,), (joining.JoinAnswer, queries.QueryError), queue="api",
    )  # fmt: skip
    yield Channel(
        "aud", audit.AUDIT_DAEMON, "send", "Who did what; kept in the append-only stream `AUD_<yard>`.",
        (audit.AuditBatch,),
    )  # fmt: skip
    yield Channel(
        "hb", subjects.heartbeat("{node}"), "receive", "Sign of life, each second. Lossy.", (nodes.Heartbeat,)
    )  # fmt: skip
    yield Channel(
        "tel", subjects.telemetry("{node}"), "receive", "Samples of the cards. Lossy.", (nodes.Telemetry,)
    )  # fmt: skip
    for name, address, summary in (
        ("jrn.leader", subjects.JOURNAL_LEADER, "The claim of the daemon that leads; each append is fenced by it."),
        ("jrn.entry", subjects.JOURNAL_ENTRY, "One turn's record."),
        ("jrn.snapshot", subjects.JOURNAL_SNAPSHOT, "Where the newest snapshot lies."),
    ):
        yield Channel(name, address, "send", f"{summary} Internal to the daemon.", (), stream="JRN")
    yield Channel(
        "lead", subjects.presence("{holder}"), "receive",
        "A standby daemon asks the leader for a sign of life; the leader hands over. Internal to the daemon.", (),
    )  # fmt: skip


def document() -> dict[str, Any]:
    """The whole document as plain data."""
    channels = tuple(every_channel())
    kinds = {kind.__name__: kind for channel in channels for kind in (*channel.payloads, *channel.replies)}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "gpuyard",
            "version": str(PROTOCOL_VERSION),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "yard": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "The yard's nats-server; `gpuyard up` prints the address of its own.",
                "security": [{"$ref": "#/components/securitySchemes/nkey"}],
            }
        },
        "channels": {channel.name: _channel(channel) for channel in channels} | {"inbox": _inbox(channels)},
        "operations": {f"{channel.action}.{channel.name}": _operation(channel) for channel in channels},
        "components": {
            "messages": {name: _message(name, kind) for name, kind in sorted(kinds.items())},
            "schemas": _schemas(list(kinds.values())),
            "securitySchemes": {
                "nkey": {
                    "type": "asymmetricEncryption",
                    "description": "An Ed25519 nkey; what it may publish and read is fixed by the server.",
                }
            },
        },
    }


_DESCRIPTION = (
    "Every message of a gpuyard yard, from the daemon's point of view. Who asks is read from the subject, never from "
    "the payload. Requests on `sub.` are durable: send them as NATS requests, so that the PubAck comes back; "
    "`accepted` or `rejected` follows on `evt.<tenant>.sub.<submission id>`. `x-nats-stream` names the JetStream "
    "stream behind a subject, with the yard's name as its suffix."
)


def _channel(channel: Channel) -> dict[str, Any]:
    parameters = re.findall(r"{(\w+)}", channel.address)
    body: dict[str, Any] = {"address": channel.address, "description": channel.summary}
    if parameters:
        body["parameters"] = {name: {"description": _PARAMETERS[name]} for name in parameters}
    body["messages"] = {kind.__name__: _message_reference(kind) for kind in channel.payloads}
    if channel.stream:
        body |= _stream(channel.stream)
    return body


def _inbox(channels: tuple[Channel, ...]) -> dict[str, Any]:
    replies = sorted({kind.__name__ for channel in channels for kind in channel.replies})
    return {
        "address": None,
        "description": "The inbox that a request names as its reply subject.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in replies},
    }


def _operation(channel: Channel) -> dict[str, Any]:
    body: dict[str, Any] = {
        "action": "receive" if channel.action == "receive" else "send",
        "channel": {"$ref": f"#/channels/{channel.name}"},
        "summary": channel.summary,
    }
    if channel.action == "observe":
        body["description"] = "Sent by the node's agent to the tenant, past the daemon."
    if channel.queue:
        body["bindings"] = {"nats": {"queue": channel.queue}}
    if channel.payloads:
        names = [kind.__name__ for kind in channel.payloads]
        body["messages"] = [{"$ref": f"#/channels/{channel.name}/messages/{name}"} for name in names]
    if channel.replies:
        answers = [{"$ref": f"#/channels/inbox/messages/{kind.__name__}"} for kind in channel.replies]
        body["reply"] = {"channel": {"$ref": "#/channels/inbox"}, "messages": answers}
    return body


def _message_reference(kind: type[Any]) -> dict[str, str]:
    return {"$ref": f"#/components/messages/{kind.__name__}"}


def _message(name: str, kind: type[Any]) -> dict[str, Any]:
    return {"name": name, "summary": _paragraph(kind), "payload": {"$ref": f"#/components/schemas/{name}"}}


def _stream(kind: StreamKind) -> dict[str, Any]:
    """Settings of the stream behind a subject; sizes as a share of the yard's budget of bytes."""
    all_specs = subjects.streams("<yard>", 100)
    spec = next(spec for spec in all_specs if spec.name == subjects.stream_name(kind, "<yard>"))
    settings: dict[str, Any] = {
        "x-nats-stream": spec.name,
        "x-nats-storage": "file",
        "x-nats-retention": "limits",
        "x-nats-discard": "old" if spec.discard_old else "new",
        "x-nats-max-bytes-pct-of-budget": spec.max_bytes,
        "x-nats-duplicate-window-s": spec.duplicate_window_s,
        "x-nats-persist-mode": "async" if spec.is_lazy else "default",
    }
    bounds = {
        "x-nats-max-msg-size": spec.max_message_bytes,
        "x-nats-max-msgs-per-subject": spec.max_messages_per_subject,
        "x-nats-max-age-s": spec.max_age_s,
    }
    return settings | {name: bound for name, bound in bounds.items() if bound > 0}


def _schemas(kinds: list[type[Any]]) -> dict[str, Any]:
    """JSON Schemas by name, with what the `#:` comments say about the fields."""
    _, schemas = json_schemas(kinds)
    known = {kind.__name__: kind for kind in _structs()}
    for name, schema in schemas.items():
        properties = schema.get("properties", {})
        for field, note in field_notes(known[name]).items() if name in known else ():
            if field in properties:
                # A reference stands alone in JSON Schema draft 7, so a note beside one needs an `allOf`.
                whole = properties[field]
                properties[field] = {"description": note} | ({"allOf": [whole]} if "$ref" in whole else whole)
        if "description" in schema:
            schema["description"] = _unfolded(schema["description"])
        if not schema.get("required", True):
            del schema["required"]  # an empty list says nothing, and JSON Schema draft 4 forbids it
    return {name: _plain_discriminators(schema) for name, schema in sorted(schemas.items())}


def _plain_discriminators(schema: Any) -> Any:
    """OpenAPI's discriminator objects as AsyncAPI has them: the property's name alone."""
    if isinstance(schema, list):
        return [_plain_discriminators(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _plain_discriminators(value) for key, value in schema.items()}
    if isinstance(named := plain.get("discriminator"), dict) and "propertyName" in named:
        plain["discriminator"] = named["propertyName"]
    return plain


def _structs() -> Iterator[type[msgspec.Struct]]:
    """Every message type there is (not those of other packages, which may have the same names)."""
    yield PubAck
    pending: list[type[msgspec.Struct]] = [msgspec.Struct]
    while pending:
        kind = pending.pop()
        yield kind
        pending.extend(
            child for child in kind.__subclasses__() if child.__module__.startswith(("gpuyard_protocol", "__main__"))
        )


_FIELD = re.compile(r"^    (\w+)\s*:")
_NOT_HONOURED = "# Known and not honoured yet: refused by name."


def field_notes(kind: type[Any]) -> dict[str, str]:
    """What the source says above each field of a struct."""
    notes: dict[str, str] = {}
    comment: list[str] = []
    refused = False
    for line in inspect.getsource(kind).splitlines():
        stripped = line.strip()
        if stripped.startswith("#:"):
            comment.append(stripped[2:].strip())
        elif stripped == _NOT_HONOURED:
            refused = True
        elif match := _FIELD.match(line):
            if refused:
                comment.append("Not honoured yet: refused by name.")
            if comment:
                notes[match[1]] = " ".join(comment)
            comment = []
        elif not stripped:
            refused, comment = False, []
    return notes


def _paragraph(kind: type[Any]) -> str:
    """The first paragraph of a type's docstring, in one line."""
    text = kind.__doc__ or ""
    if text.startswith(f"{kind.__name__}("):  # made up by the struct, not written by anybody
        text = ""
    return _unfolded(text).split("\n\n")[0]


def _unfolded(docstring: str) -> str:
    """A docstring without its indentation (which Python 3.13 takes away by itself), each paragraph one line."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


class _Dumper(yaml.SafeDumper):
    """Without anchors, with indented lists: what a person would write."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def render() -> str:
    """The document as YAML text, the same for the same types."""
    head = "# Made by `make docs` from the types in protocol/gpuyard_protocol; do not edit.\n"
    return head + yaml.dump(document(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpuyard_protocol.asyncapi", description="The AsyncAPI document.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit 1 if that file differs")
    arguments = parser.parse_args()
    text = render()
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    if arguments.check and (not arguments.check.is_file() or arguments.check.read_text(encoding="utf-8") != text):
        sys.stderr.write(f"{arguments.check} is not what the message types say; run: make docs\n")
        return 1
    if not arguments.write and not arguments.check:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
