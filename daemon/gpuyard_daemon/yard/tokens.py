"""One-time tokens: leave for a GPU host to bring a key of its own, under one name and for a short time.

A token *is* a key: the seed of an nkey that the NATS server lets in for `join.<node>` alone. So it never travels when
it is used (the connection signs a challenge), and what is kept here, its public half, is worth nothing to a thief. The
text handed to the host also carries how to reach the server and whom to trust there.

    keys/join/<node>.json

Used and expired tokens stay in their files, so that whoever comes with one is told what is wrong with it. The server
lets one in until it expires, and some moments after its use, so that a host whose answer was lost may ask again.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from pathlib import Path

import msgspec
import nkeys

from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.names import NodeId, is_name

#: Text that every token begins with; the number is the format's.
PREFIX = "gyjoin1."
#: A host that got no answer may ask again for so long after its token was used.
AFTERLIFE_MS = 30_000


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What the text of a token holds, for the host."""

    node: NodeId
    #: How the host reaches the NATS server.
    url: str
    #: The seed that opens `join.<node>`.
    seed: str
    #: What a server that believes signed tokens is shown with it; "": the server knows the key.
    credential: str = ""
    #: The authority that signed the server's certificate, in PEM form; "": no TLS.
    ca: str = ""

    def to_text(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> Token:
        """`BusError` if it is none, for example because a part was lost in copying."""
        body = text.strip().removeprefix(PREFIX)
        try:
            if body == text.strip():
                raise ValueError("it does not begin as one")
            token = msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=cls)
        except (ValueError, binascii.Error, msgspec.MsgspecError):
            raise BusError(
                f"{text.strip()[:20]!r}… is no token: expected the whole line that `gpuyard node token` printed"
            ) from None
        if not is_name(token.node):
            raise BusError(f"the token names the node {token.node!r}, which is no name")
        return token


class Issued(msgspec.Struct, kw_only=True):
    """What the head keeps of a token."""

    node: NodeId
    public_key: str
    #: Unix milliseconds; likewise `used_ms`, 0 for an unused one.
    expires_ms: int
    used_ms: int = 0
    #: The key that came with it.
    used_for: str = ""
    #: Whether it may take the place of a key that the node has.
    replaces: bool = False


class JoinTokens:
    """The tokens in one directory: one for each node at most; a new one makes the one before it void."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def issue(self, node: NodeId, lifetime_ms: int, *, replaces: bool = False) -> str:
        """The seed of a new token."""
        seed: str = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER).decode()
        public_key: str = nkeys.from_seed(bytearray(seed.encode())).public_key.decode()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        expires_ms = _now_ms() + lifetime_ms
        self._write(Issued(node=node, public_key=public_key, expires_ms=expires_ms, replaces=replaces))
        return seed

    def find(self, node: NodeId) -> Issued | None:
        try:
            return msgspec.json.decode(self._path(node).read_bytes(), type=Issued)
        except (OSError, msgspec.MsgspecError):
            return None

    def use(self, issued: Issued, public_key: str) -> None:
        """It is spent, for this key."""
        issued.used_ms, issued.used_for = _now_ms(), public_key
        self._write(issued)

    def revoke(self, node: NodeId) -> None:
        self._path(node).unlink(missing_ok=True)

    def admitted(self) -> dict[NodeId, str]:
        """Node and public key of each token that the server is to let in now."""
        if not self._directory.is_dir():
            return {}
        now_ms = _now_ms()
        found = [issued for path in sorted(self._directory.glob("*.json")) if (issued := self.find(path.stem))]
        return {issued.node: issued.public_key for issued in found if not _is_over(issued, now_ms)}

    def _path(self, node: NodeId) -> Path:
        return self._directory / f"{node}.json"

    def _write(self, issued: Issued) -> None:
        path = self._path(issued.node)
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        fresh.touch(mode=0o600)
        fresh.write_bytes(msgspec.json.encode(issued))
        fresh.replace(path)


def is_expired(issued: Issued) -> bool:
    return _now_ms() > issued.expires_ms


def _is_over(issued: Issued, now_ms: int) -> bool:
    return now_ms > issued.expires_ms or (issued.used_ms > 0 and now_ms > issued.used_ms + AFTERLIFE_MS)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
