"""Who this node is: an id minted once and kept beside the ledger, and a fresh instance for each process.

The hostname is a label that people may change; the id is what orders name. It lives in `node.toml` in the agent's state
directory and says the same for ever: an agent started under another name on the same directory would take over
assignments that were given to somebody else, so it is refused. The directory is locked for the life of the process: of
two agents on one ledger the second does not start.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path

from gpuyard_protocol.names import NAME_EXPECTED, NodeId, is_name

_FILE = "node.toml"
_LOCK = "agent.lock"


class IdentityRefused(Exception):
    """This state directory cannot be this node's; the text says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    node: NodeId
    #: Of this process: orders meant for an earlier one are refused.
    instance: str


def take(state: Path, wanted: str) -> Identity:
    """The identity kept in `state`, minted on first use. `wanted`: the name it must have; "": whatever is there."""
    if wanted and not is_name(wanted):
        raise IdentityRefused(f"node: found {wanted!r}; expected {NAME_EXPECTED}")
    path = state / _FILE
    node = _read(path)
    if node is None:
        node = wanted or f"n-{secrets.token_hex(4)}"
        _write(path, node)
    elif wanted and wanted != node:
        raise IdentityRefused(f"{path}: this directory belongs to node {node!r}, not to {wanted!r}")
    return Identity(node=node, instance=secrets.token_hex(8))


def lock(state: Path) -> int:
    """Hold the directory until the process ends; the descriptor is the lock."""
    descriptor = os.open(state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise IdentityRefused(f"{state}: another agent runs on this directory") from None
    return descriptor


def _read(path: Path) -> NodeId | None:
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise IdentityRefused(f"{path}: {error}") from None
    node = content.get("node")
    if not isinstance(node, str) or not is_name(node):
        raise IdentityRefused(f"{path}: node: found {node!r}; expected {NAME_EXPECTED}")
    return node


def _write(path: Path, node: NodeId) -> None:
    """Whole or not at all, and on the disk before anything is promised under this name."""
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        file.write(
            f'# Minted once. Belongs to the ledger beside it; never copy one without the other.\nnode = "{node}"\n'
        )
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
