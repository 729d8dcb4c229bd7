"""How a GPU host is let in: it makes a key of its own, and asks on `join.<node>` with a one-time token.

The token is the key that the question is asked with, so the payload holds no secret: the public half of the node's new
key, and what the host calls itself, for the audit.
"""

from __future__ import annotations

import msgspec

from gpuyard_protocol.names import NodeId, is_name

ALL_JOINS = "join.*"


def join(node: NodeId) -> str:
    return f"join.{node}"


def parse_join(subject: str) -> NodeId | None:
    parts = subject.split(".")
    return parts[1] if len(parts) == 2 and parts[0] == "join" and is_name(parts[1]) else None


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`join.<node>` → `JoinAnswer`, or a `QueryError` with `TokenUsed`, `TokenExpired`, `NodeKnown`, `Malformed`."""

    #: Of the node's new nkey.
    public_key: str
    hostname: str = ""
    v: int = 1


class JoinAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The node's key is let in from now on."""

    node: NodeId
    yard: str
    v: int = 1
    #: What the key is let in with where servers believe signed tokens: the node keeps it beside its seed. "": the
    #: seed alone is enough.
    credential: str = ""
