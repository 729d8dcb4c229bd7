"""A node's whole desired set as messages: one where it fits, else pieces that the agent puts together.

The bound is what the server takes of one message, less what travels around it. An assignment is never split: what one
order may hold is bounded where requests come in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import NodeId
from gpuyard_protocol.nodes import Desired

#: Of one message; the server takes 8 MB.
SYNC_BYTES_MAX = 4 * 1024 * 1024


class _Sync(msgspec.Struct, frozen=True, tag="sync", kw_only=True):
    """`gpuyard_protocol.nodes.Sync` with assignments that are encoded already."""

    node: NodeId
    instance: str
    epoch: int
    n: int
    desired: tuple[msgspec.Raw, ...]
    v: int = 1
    clock_ms: int = 0
    serial: int = 0


class _Part(msgspec.Struct, frozen=True, tag="sync-part", kw_only=True):
    """`gpuyard_protocol.nodes.SyncPart`, likewise."""

    node: NodeId
    instance: str
    epoch: int
    n: int
    part: int
    parts: int
    desired: tuple[msgspec.Raw, ...]
    v: int = 1
    clock_ms: int = 0
    serial: int = 0


def sync_messages(
    node: NodeId, instance: str, epoch: int, n: int, desired: Iterable[Desired], clock_ms: int = 0, serial: int = 0
) -> list[bytes]:
    """To be sent in order, each after the answer to the one before."""
    pieces = list(_pieces([encode(entry) for entry in desired]))
    if len(pieces) == 1:
        (whole,) = pieces
        sync = _Sync(
            node=node, instance=instance, epoch=epoch, n=n, desired=tuple(whole), clock_ms=clock_ms, serial=serial
        )
        return [encode(sync)]
    return [
        encode(
            _Part(
                node=node,
                instance=instance,
                epoch=epoch,
                n=n,
                part=number,
                parts=len(pieces),
                desired=tuple(piece),
                clock_ms=clock_ms,
                serial=serial,
            )
        )
        for number, piece in enumerate(pieces, 1)
    ]


def _pieces(entries: list[bytes]) -> Iterator[list[msgspec.Raw]]:
    piece: list[msgspec.Raw] = []
    size = 0
    for entry in entries:
        if piece and size + len(entry) > SYNC_BYTES_MAX:
            yield piece
            piece, size = [], 0
        piece.append(msgspec.Raw(entry))
        size += len(entry) + 1
    yield piece
