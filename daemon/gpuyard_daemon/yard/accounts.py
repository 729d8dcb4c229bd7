"""The NATS server's configuration: who may say and hear what.

One account for the scheduler (all streams live there), one for the agents, one per tenant, one for the server itself.
Accounts, not permissions, keep tenants apart: a server checks the subject of a message but never its *reply* subject,
and JetStream answers to whatever it says; in one account a tenant could have acknowledgements written over anybody's
subjects. Across accounts a reply stays in the account of whoever asked. What crosses is listed here, as exports and
imports, and the second token of every tenant's subject must be the tenant's account.

Inside an account, permissions give each key its own name in the subjects and its own inbox. The refusal matrix in
`tests/yard/test_accounts.py` tries every role against the subjects of the others.

It writes text; files, processes and reloads are in `gpuyard_daemon.yard.nats_server`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_protocol.audit import AUDIT_DAEMON, AUDIT_HEAD, READING_VERBS, audit_stream
from gpuyard_protocol.names import NodeId, Tenant, User
from gpuyard_protocol.subjects import stream_name


class TlsFiles(NamedTuple):
    """PEM files. The server shows `cert`; whoever trusts `ca` believes it."""

    ca: Path
    cert: Path
    key: Path


class ServerSettings(NamedTuple):
    """What the configuration says besides who may do what."""

    yard: str
    #: Directory of the server's files: `store/` and `nats.log` are made in it.
    directory: Path
    #: Bytes that all streams together may take.
    store_bytes: int
    host: str = "127.0.0.1"
    #: -1: any free one.
    port: int = 4222
    #: None: in the clear, which only a loopback address may be.
    tls: TlsFiles | None = None


#: Inbox prefixes, one per role, so that nobody reads another's answers.
DAEMON_INBOX = "_INBOX_D"
API_INBOX = "_INBOX_API"


def operator_inbox(name: User) -> str:
    return f"_INBOX_O.{name}"


def node_inbox(node: NodeId) -> str:
    return f"_INBOX_A.{node}"


def join_inbox(node: NodeId) -> str:
    return f"_INBOX_J.{node}"


def user_inbox(user: User) -> str:
    return f"_INBOX.{user}"


def server_config(settings: ServerSettings, keys: YardKeys) -> str:
    """The whole configuration file."""
    return "\n".join((_server_section(settings), _accounts_section(settings.yard, keys), "system_account: SYS", ""))


def _server_section(settings: ServerSettings) -> str:
    store = settings.directory / "store"
    log = settings.directory / "nats.log"
    return f"""\
# Written by gpuyard whenever a key is added or removed; changes made by hand are lost.
listen: {_quoted(f"{settings.host}:{settings.port}")}
server_name: {_quoted(f"gpuyard-{settings.yard}")}
log_file: {_quoted(str(log))}
logfile_size_limit: 16MB
logfile_max_num: 3
# A journal record is at most 8 MiB, bounded by the turn that makes it.
max_payload: 8MB
max_connections: 20000
write_deadline: "5s"
ping_interval: "10s"
ping_max: 2
# An acknowledged message is on the disk: with any other sync_interval a power cut takes the last seconds with it.
jetstream {{
  store_dir: {_quoted(str(store))}
  max_file: {settings.store_bytes}
  max_mem: 256MB
  sync_interval: always
  strict: true
}}
# The client reads acknowledgement subjects of the first form.
feature_flags {{ js_ack_fc_v2: false }}
{_tls_section(settings.tls)}"""


def _tls_section(tls: TlsFiles | None) -> str:
    """Only the server shows a certificate: clients prove who they are with their nkeys."""
    if tls is None:
        return ""
    return f"""\
tls {{
  cert_file: {_quoted(str(tls.cert))}
  key_file: {_quoted(str(tls.key))}
  min_version: "1.2"
  timeout: 5
}}
"""


def _accounts_section(yard: str, keys: YardKeys) -> str:
    roles = keys.public_roles()
    tenants = keys.public_tenants()
    accounts = [
        _scheduler_account(yard, roles, keys),
        _agents_account(keys.public_nodes()),
        _join_account(keys.tokens.admitted()),
        *(_tenant_account(tenant, users) for tenant, users in tenants.items()),
        _account("SYS", [_user(roles["sys"], ["$SYS.REQ.>"], [f"{DAEMON_INBOX}.>", "$SYS.ACCOUNT.*.*"])]),
    ]
    return "accounts {\n" + "\n".join(accounts) + "\n}"


def _scheduler_account(yard: str, roles: dict[str, str], keys: YardKeys) -> str:
    events = stream_name("EVT", yard)
    audit = audit_stream(yard).name
    users = [
        _user(
            roles["daemon"],
            ["jrn.>", "evt.>", AUDIT_DAEMON, "cmd.*", "$JS.API.>", "$JS.ACK.>", "$O.SNAP.>"],
            [f"{DAEMON_INBOX}.>", "hb.*", "tel.>", "load.>", "jrn.leader", "$JS.EVENT.ADVISORY.>"],
            # The stream itself refuses to give up a message; it must not vanish as a whole either.
            denied=[f"$JS.API.STREAM.DELETE.{audit}"],
        ),
        # Answers tenants (`_R_` is the server's own prefix for answers across accounts) and operators, who live in this
        # account. An explicit list, because `allow_responses` would let a reply subject chosen by a tenant pass.
        _user(
            roles["api"],
            [
                "_R_.>",
                "_INBOX_O.>",
                f"$JS.API.DIRECT.GET.{events}",
                f"$JS.API.DIRECT.GET.{events}.>",
                AUDIT_HEAD,
                f"$JS.API.DIRECT.GET.{audit}",
                f"$JS.API.DIRECT.GET.{audit}.>",
            ],
            ["q.>", "adm.>", "join.*", f"{API_INBOX}.>"],
        ),
        *(_overseer(name, key, [">"]) for name, key in keys.public_operators().items()),
        *(_overseer(name, key, READING_VERBS) for name, key in keys.public_viewers().items()),
    ]
    exports = [
        '{ service: "sub.*.>", account_token_position: 2 }',
        '{ service: "q.*.>", account_token_position: 2 }',
        '{ service: "load.*.>", account_token_position: 2 }',
        '{ stream: "evt.*.>", account_token_position: 2 }',
        '{ service: "rep.>", accounts: [ AGENTS ] }',
        '{ service: "join.*", accounts: [ JOIN ] }',
    ]
    imports = [
        _imported("service", "AGENTS", "cmd.*"),
        _imported("stream", "AGENTS", "hb.*"),
        _imported("stream", "AGENTS", "tel.>"),
    ]
    return _account("SCHED", users, exports, imports, has_jetstream=True)


def _overseer(name: User, key: str, verbs: Iterable[str]) -> str:
    return _user(key, [f"adm.{name}.{verb}" for verb in verbs], [f"{operator_inbox(name)}.>", "evt.>"])


def _join_account(tokens: dict[NodeId, str]) -> str:
    """Hosts with a one-time token, each of which may ask for one thing: to be let in under the token's name."""
    users = [_user(key, [f"join.{node}"], [f"{join_inbox(node)}.>"]) for node, key in tokens.items()]
    return _account("JOIN", users, [], [_imported("service", "SCHED", "join.*")])


def _agents_account(nodes: dict[NodeId, str]) -> str:
    users = [
        _user(
            key,
            # `who`: whether another agent lives under this name, asked and answered under the one key.
            [
                *(f"rep.{node}.>", f"hb.{node}", f"tel.{node}.>", "log.*.*.*", "_R_.>"),
                *(f"who.{node}", f"{node_inbox(node)}.>"),
            ],
            [f"{node_inbox(node)}.>", f"cmd.{node}", f"who.{node}"],
        )
        for node, key in nodes.items()
    ]
    exports = [
        '{ service: "cmd.*", accounts: [ SCHED ] }',
        '{ stream: "hb.*", accounts: [ SCHED ] }',
        '{ stream: "tel.>", accounts: [ SCHED ] }',
        '{ stream: "log.*.>", account_token_position: 2 }',
    ]
    return _account("AGENTS", users, exports, [_imported("service", "SCHED", "rep.>")])


def _tenant_account(tenant: Tenant, users: dict[User, str]) -> str:
    members = [
        _user(
            key,
            [f"sub.{tenant}.{user}.>", f"q.{tenant}.{user}.>", f"load.{tenant}.>"],
            [f"{user_inbox(user)}.>", f"evt.{tenant}.>", f"log.{tenant}.>"],
        )
        for user, key in users.items()
    ]
    imports = [
        _imported("service", "SCHED", f"sub.{tenant}.>"),
        _imported("service", "SCHED", f"q.{tenant}.>"),
        _imported("service", "SCHED", f"load.{tenant}.>"),
        _imported("stream", "SCHED", f"evt.{tenant}.>"),
        _imported("stream", "AGENTS", f"log.{tenant}.>"),
    ]
    return _account(tenant, members, [], imports)


def _account(
    name: str,
    users: Sequence[str],
    exports: Sequence[str] = (),
    imports: Sequence[str] = (),
    *,
    has_jetstream: bool = False,
) -> str:
    lines = [f"  {_quoted(name)}: {{"]
    if has_jetstream:
        lines.append("    jetstream: enabled")
    for title, entries in (("users", users), ("exports", exports), ("imports", imports)):
        if entries:
            lines.append(f"    {title}: [")
            lines.extend(f"      {entry}" for entry in entries)
            lines.append("    ]")
    lines.append("  }")
    return "\n".join(lines)


def _user(public_key: str, publish: Iterable[str], subscribe: Iterable[str], *, denied: Sequence[str] = ()) -> str:
    published = f"{{ allow: {_list(publish)}, deny: {_list(denied)} }}" if denied else _list(publish)
    return f"{{ nkey: {_quoted(public_key)}, permissions: {{ publish: {published}, subscribe: {_list(subscribe)} }} }}"


def _imported(kind: str, account: str, subject: str) -> str:
    return f"{{ {kind}: {{ account: {account}, subject: {_quoted(subject)} }} }}"


def _list(subjects: Iterable[str]) -> str:
    return "[ " + ", ".join(_quoted(subject) for subject in subjects) + " ]"


def _quoted(text: str) -> str:
    return json.dumps(text)
