"""A NATS server with the yard's accounts, static or by tokens, and a connection for each role that a test plays."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gpuyard_daemon.yard.accounts import (
    API_INBOX,
    DAEMON_INBOX,
    join_inbox,
    layout,
    node_inbox,
    operator_inbox,
    user_inbox,
)
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.operator_mode import Authority, credentials
from gpuyard_daemon.yard.server_config import ServerSettings, server_config
from gpuyard_protocol.audit import audit_stream
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import (
    Message,
)
from gpuyard_protocol.bus.credentials import CREDENTIALS_SUFFIX
from gpuyard_protocol.bus.nats import NatsBus
from gpuyard_protocol.subjects import streams
from support.nats import NatsProcess

DEADLINE_S = 5.0
STORE_BYTES = 400_000_000
ALL_STREAMS = (*streams("lab", STORE_BYTES * 9 // 10), audit_stream("lab", STORE_BYTES * 9 // 10))


class RoleYard:
    """A server with the generated accounts, and a connection for each role that asks for one."""

    def __init__(self, directory: Path, *, by_tokens: bool = False) -> None:
        self.by_tokens = by_tokens
        self.keys = YardKeys.load_or_create(directory / "keys")
        self.keys.add_operator("olga")
        self.keys.add_operator("otto")
        self.keys.add_viewer("vera")
        self.token = self.directory_of(directory) / "token.seed"
        self.token.write_text(self.keys.tokens.issue("n3", 3_600_000))
        for node in ("n1", "n2"):
            self.keys.add_node(node)
        for tenant, user in (("acme", "alice"), ("acme", "bob"), ("globex", "gus")):
            self.keys.add_user(tenant, user)
        self.server = NatsProcess(directory / "nats")
        self.server.config = self.config()

    @staticmethod
    def directory_of(directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        return directory

    def config(self) -> str:
        settings = ServerSettings("lab", self.server_directory, STORE_BYTES, port=4222, by_tokens=self.by_tokens)
        text = server_config(settings, self.keys).replace("{", "{{").replace("}", "}}")
        return text.replace(':4222"', ':{port}"').replace(f'log_file: "{self.server_directory}/nats.log"', "")

    @property
    def server_directory(self) -> Path:
        return self.server.directory

    def role(self, role: str) -> tuple[str, Path]:
        """Inbox prefix and key file of a role, as `_role` names it."""
        inbox, seed = self._role(role)
        if not self.by_tokens:
            return inbox, seed
        by_token = seed.with_suffix(CREDENTIALS_SUFFIX)
        if role.startswith("token ") and not by_token.exists():
            # Hosts bring no one-time tokens in this mode; the account and its bounds are there all the same.
            authority = Authority(self.keys)
            account = next(account for account in layout("lab", self.keys) if account.name == "JOIN")
            token = authority.user_token(account, account.users[0], role)
            by_token.write_text(credentials(token, seed.read_text().strip()))
        return inbox, by_token

    def _role(self, role: str) -> tuple[str, Path]:
        """Inbox prefix and seed file of `api`, `operator olga`, `viewer vera`, `token n3`, `node n1`, `acme alice`."""
        match role.split():
            case ["daemon"]:
                return DAEMON_INBOX, self.keys.daemon
            case ["api"]:
                return API_INBOX, self.keys.api
            case ["sys"]:
                return DAEMON_INBOX, self.keys.sys
            case ["operator", name]:
                return operator_inbox(name), self.keys.operator(name)
            case ["viewer", name]:
                return operator_inbox(name), self.keys.viewer(name)
            case ["token", node]:
                return join_inbox(node), self.token
            case ["node", node]:
                return node_inbox(node), self.keys.node(node)
            case [tenant, user]:
                return user_inbox(user), self.keys.user(tenant, user)
        raise AssertionError(role)


class Roles:
    """The connections of one test."""

    def __init__(self, yard: RoleYard) -> None:
        self.yard = yard
        self._buses: dict[str, NatsBus] = {}

    async def get(self, role: str) -> NatsBus:
        if role not in self._buses:
            inbox, seed = self.yard.role(role)
            self._buses[role] = await nats.connect(self.yard.server.url, name=role, inbox_prefix=inbox, seed=str(seed))
        return self._buses[role]

    async def close(self) -> None:
        for bus in self._buses.values():
            await bus.close()


class Heard:
    """Everything that arrived at one handler."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._arrived = asyncio.Event()

    def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self._arrived.set()

    async def one(self) -> Message:
        async with asyncio.timeout(DEADLINE_S):
            while not self.messages:
                self._arrived.clear()
                await self._arrived.wait()
        return self.messages[0]


class Answering:
    """Answers each request with `answer`, as its role."""

    def __init__(self, bus: NatsBus, answer: bytes = b"done") -> None:
        self.heard: list[Message] = []
        self._bus = bus
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, message: Message) -> None:
        self.heard.append(message)
        task = asyncio.ensure_future(self._bus.publish(message.reply, self._answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def until_logged(yard: RoleYard, seen: int, *words: str) -> None:
    """Until one line of the server's log after its first `seen` characters has each of the words."""
    async with asyncio.timeout(DEADLINE_S):
        while not any(all(word in line for word in words) for line in yard.server.log[seen:].splitlines()):
            await asyncio.sleep(0.005)
