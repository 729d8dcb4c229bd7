"""The NATS server's configuration as text: where it listens, what it keeps, whom it believes.

Who may do what comes from `accounts`; with a cluster it is told by signed tokens (`operator_mode`), whose part of the
file is made there. Files, processes and reloads are in `server_files`, `nats_server` and `reload`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gpuyard_daemon.yard.accounts import Account, Rights, layout
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.operator_mode import operator_section


class TlsFiles(NamedTuple):
    """PEM files. The server shows `cert`; whoever trusts `ca` believes it."""

    ca: Path
    cert: Path
    key: Path


class Peer(NamedTuple):
    """One server of a cluster. All of them have the same accounts."""

    #: Of the cluster; and of this server, unlike any other's in it.
    cluster: str
    name: str
    #: HOST:PORT where the other servers reach it.
    listen: str
    #: The other servers' addresses of that kind.
    routes: tuple[str, ...]


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
    #: None: the server stands alone.
    peer: Peer | None = None
    #: Accounts and keys are told to the server by signed tokens (`operator_mode`), not in its configuration.
    by_tokens: bool = False


def server_config(settings: ServerSettings, keys: YardKeys) -> str:
    """The whole configuration file."""
    if settings.by_tokens:
        believed = operator_section(settings.yard, settings.directory, keys)
        return "\n".join((_server_section(settings), believed, ""))
    return "\n".join((_server_section(settings), _accounts_section(settings.yard, keys), "system_account: SYS", ""))


def _server_section(settings: ServerSettings) -> str:
    store = settings.directory / "store"
    log = settings.directory / "nats.log"
    return f"""\
# Written by gpuyard whenever a key is added or removed; changes made by hand are lost.
listen: {_quoted(f"{settings.host}:{settings.port}")}
server_name: {_quoted(settings.peer.name if settings.peer else f"gpuyard-{settings.yard}")}
log_file: {_quoted(str(log))}
pid_file: {_quoted(str(settings.directory / "nats.pid"))}
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
{_tls_section(settings.tls)}{_cluster_section(settings)}"""


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


def _cluster_section(settings: ServerSettings) -> str:
    """Servers trust each other by the yard's certificate authority: each shows its certificate to the other."""
    peer = settings.peer
    if peer is None:
        return ""
    scheme = "nats-route" if settings.tls is None else "tls"
    routes = ", ".join(_quoted(f"{scheme}://{route}") for route in peer.routes)
    tls = ""
    if settings.tls is not None:
        tls = f"""
  tls {{
    cert_file: {_quoted(str(settings.tls.cert))}
    key_file: {_quoted(str(settings.tls.key))}
    ca_file: {_quoted(str(settings.tls.ca))}
    verify: true
    min_version: "1.2"
    timeout: 5
  }}"""
    return f"""\
cluster {{
  name: {_quoted(peer.cluster)}
  listen: {_quoted(peer.listen)}
  routes: [ {routes} ]{tls}
}}
"""


def _accounts_section(yard: str, keys: YardKeys) -> str:
    return "accounts {\n" + "\n".join(_text(account) for account in layout(yard, keys)) + "\n}"


def _text(account: Account) -> str:
    """An account as the configuration has it."""
    lines = [f"  {_quoted(account.name)}: {{"]
    if account.has_jetstream:
        lines.append("    jetstream: enabled")
    users = [_user_text(user) for user in account.users]
    exports = [
        f"{{ {kind}: {_quoted(subject)}, {f'accounts: [ {to} ]' if to else 'account_token_position: 2'} }}"
        for kind, subject, to in account.exports
    ]
    imports = [f"{{ {kind}: {{ account: {of}, subject: {_quoted(it)} }} }}" for kind, of, it in account.imports]
    for title, entries in (("users", users), ("exports", exports), ("imports", imports)):
        if entries:
            lines.append(f"    {title}: [")
            lines.extend(f"      {entry}" for entry in entries)
            lines.append("    ]")
    lines.append("  }")
    return "\n".join(lines)


def _user_text(user: Rights) -> str:
    allowed = _list(user.publish)
    published = f"{{ allow: {allowed}, deny: {_list(user.denied)} }}" if user.denied else allowed
    return (
        f"{{ nkey: {_quoted(user.key)}, permissions: {{ publish: {published}, subscribe: {_list(user.subscribe)} }} }}"
    )


def _list(subjects: Iterable[str]) -> str:
    return "[ " + ", ".join(_quoted(subject) for subject in subjects) + " ]"


def _quoted(text: str) -> str:
    return json.dumps(text)
