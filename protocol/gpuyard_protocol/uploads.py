"""Directories that jobs bring along: content-addressed, in pieces from a tenant to the head and on to nodes.

An upload is a tar file, named by the SHA-256 of its bytes. Whoever hands it in sends it piece by piece and is told how
much is there; a job names it, and its nodes are given it by the daemon, piece by piece, before they start the job.
"""

from __future__ import annotations

import re

import msgspec

from gpuyard_protocol.codec import RequestVersion
from gpuyard_protocol.units import Count

UPLOAD_BYTES_MAX = 64 * 1024 * 1024
#: Of one message, before it is encoded.
PIECE_BYTES = 512 * 1024
UPLOAD_EXPECTED = "what `gpuyard submit --upload DIR` says of a directory: 'sha256:' and 64 hexadecimal digits"
_NAME = re.compile(r"sha256:[0-9a-f]{64}")


def is_upload(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


class UploadPiece(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The question `q.<tenant>.<user>.upload`: here are some bytes of an upload, how much of it is there then?

    Without `data` it only asks. A piece that does not begin where the last one ended changes nothing.
    """

    upload: str
    #: Of the whole.
    size: Count
    offset: Count = 0
    data: bytes = b""
    v: RequestVersion = 1


class UploadHeld(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How much of an upload is there. `complete`: all of it, and its name is right."""

    upload: str
    held: int = 0
    complete: bool = False
    #: Why it is not taken, in words.
    error: str = ""
    v: int = 1
