"""Who may say and hear what on the NATS servers: accounts, and what each key may do in its own.

One account for the scheduler (all streams live there), one for the agents, one per tenant, one for the server itself.
Accounts, not permissions, keep tenants apart: a server checks the subject of a message but never its *reply* subject,
and JetStream answers to whatever it says; in one account a tenant could have acknowledgements written over anybody's
subjects. Across accounts a reply stays in the account of whoever asked. What crosses is listed here, as exports and
imports, and the second token of every tenant's subject must be the tenant's account.

Inside an account, permissions give each key its own name in the subjects and its own inbox. The refusal matrix in
`tests/yard/test_accounts.py` tries every role against the subjects of the others.

How a server is told is not its business: `server_config` writes it down, `operator_mode` signs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_protocol.audit import AUDIT_DAEMON, AUDIT_HEAD, READING_VERBS, audit_stream
from gpuyard_protocol.names import NodeId, Tenant, User
from gpuyard_protocol.subjects import stream_name


class Rights(NamedTuple):
    """What one key may do."""

    key: str
    publish: Sequence[str]
    subscribe: Sequence[str]
    denied: Sequence[str] = ()


class Export(NamedTuple):
    """What an account lets others import: all of them with their own name as the subject's second token, or `to`."""

    kind: str
    subject: str
    #: "": whoever is named by the subject's second token.
    to: str = ""


class Import(NamedTuple):
    kind: str
    account: str
    subject: str


class Account(NamedTuple):
    name: str
    users: Sequence[Rights]
    exports: Sequence[Export] = ()
    imports: Sequence[Import] = ()
    has_jetstream: bool = False


#: Inbox prefixes, one per role, so that nobody reads another's answers.
DAEMON_INBOX = "_INBOX_D"
API_INBOX = "_INBOX_API"
#: Where hosts with one-time tokens are.
JOIN_ACCOUNT = "JOIN"
#: Appended to, to see whether the store takes anything (`store_watch`).
PROBE = "probe.store"


def operator_inbox(name: User) -> str:
    return f"_INBOX_O.{name}"


def node_inbox(node: NodeId) -> str:
    return f"_INBOX_A.{node}"


def join_inbox(node: NodeId) -> str:
    return f"_INBOX_J.{node}"


def user_inbox(user: User) -> str:
    return f"_INBOX.{user}"


def layout(yard: str, keys: YardKeys) -> list[Account]:
    """Every account, whichever way the server is told of them."""
    roles = keys.public_roles()
    tenants = keys.public_tenants()
    return [
        _scheduler_account(yard, roles, keys),
        _agents_account(keys.public_nodes()),
        _join_account(keys.tokens.admitted()),
        *(_tenant_account(tenant, users) for tenant, users in tenants.items()),
        Account("SYS", [Rights(roles["sys"], ["$SYS.REQ.>"], [f"{DAEMON_INBOX}.>", "$SYS.ACCOUNT.*.*"])]),
    ]


def _scheduler_account(yard: str, roles: dict[str, str], keys: YardKeys) -> Account:
    events = stream_name("EVT", yard)
    audit = audit_stream(yard).name
    users = [
        Rights(
            roles["daemon"],
            # `lead`: daemons ask and answer each other; the answers go to inboxes of their own key.
            [
                *("jrn.>", "evt.>", AUDIT_DAEMON, "cmd.*", "$JS.API.>", "$JS.ACK.>", "$O.SNAP.>"),
                *("lead.*", f"{DAEMON_INBOX}.>", PROBE),
            ],
            [f"{DAEMON_INBOX}.>", "hb.*", "tel.>", "load.>", "jrn.leader", "lead.*", "$JS.EVENT.ADVISORY.>"],
            # The stream itself refuses to give up a message; it must not vanish as a whole either.
            denied=[f"$JS.API.STREAM.DELETE.{audit}"],
        ),
        # Answers tenants (`_R_` is the server's own prefix for answers across accounts) and operators, who live in this
        # account. An explicit list, because `allow_responses` would let a reply subject chosen by a tenant pass.
        Rights(
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
        Export("service", "sub.*.>"),
        Export("service", "q.*.>"),
        Export("service", "load.*.>"),
        Export("stream", "evt.*.>"),
        Export("service", "rep.>", "AGENTS"),
        Export("service", "join.*", JOIN_ACCOUNT),
    ]
    imports = [
        Import("service", "AGENTS", "cmd.*"),
        Import("stream", "AGENTS", "hb.*"),
        Import("stream", "AGENTS", "tel.>"),
    ]
    return Account("SCHED", users, exports, imports, has_jetstream=True)


def _overseer(name: User, key: str, verbs: Iterable[str]) -> Rights:
    return Rights(key, [f"adm.{name}.{verb}" for verb in verbs], [f"{operator_inbox(name)}.>", "evt.>"])


def _join_account(tokens: dict[NodeId, str]) -> Account:
    """Hosts with a one-time token, each of which may ask for one thing: to be let in under the token's name."""
    users = [Rights(key, [f"join.{node}"], [f"{join_inbox(node)}.>"]) for node, key in tokens.items()]
    return Account(JOIN_ACCOUNT, users, [], [Import("service", "SCHED", "join.*")])


def _agents_account(nodes: dict[NodeId, str]) -> Account:
    users = [
        Rights(
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
        Export("service", "cmd.*", "SCHED"),
        Export("stream", "hb.*", "SCHED"),
        Export("stream", "tel.>", "SCHED"),
        Export("stream", "log.*.>"),
    ]
    return Account("AGENTS", users, exports, [Import("service", "SCHED", "rep.>")])


def _tenant_account(tenant: Tenant, users: dict[User, str]) -> Account:
    members = [
        Rights(
            key,
            [f"sub.{tenant}.{user}.>", f"q.{tenant}.{user}.>", f"load.{tenant}.>"],
            [f"{user_inbox(user)}.>", f"evt.{tenant}.>", f"log.{tenant}.>"],
        )
        for user, key in users.items()
    ]
    imports = [
        Import("service", "SCHED", f"sub.{tenant}.>"),
        Import("service", "SCHED", f"q.{tenant}.>"),
        Import("service", "SCHED", f"load.{tenant}.>"),
        Import("stream", "SCHED", f"evt.{tenant}.>"),
        Import("stream", "AGENTS", f"log.{tenant}.>"),
    ]
    return Account(tenant, members, [], imports)
