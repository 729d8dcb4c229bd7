"""What commands print: tables and lines for people, JSON for programs.

Standard output carries the answer and nothing else; remarks go to stderr. Colour and fitting to the terminal's width
(`tables`) happen on a terminal alone (NO_COLOR is respected), so what a pipe gets is whole.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any, TypeAlias

import typer

from gpuyard_protocol.units import format_ms

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def say(text: str) -> None:
    """One line of the answer."""
    sys.stdout.write(text + "\n")


def remark(text: str) -> None:
    """One line beside the answer."""
    sys.stderr.write(text + "\n")


def print_json(value: Any) -> None:
    """A message of the protocol, or a list or dict of such, as one JSON value."""
    import orjson

    from gpuyard_protocol.codec import to_plain

    sys.stdout.write(orjson.dumps(to_plain(value), option=orjson.OPT_INDENT_2).decode() + "\n")


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """`name  value` lines, empty values left out."""
    shown = [(name, value) for name, value in fields if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name:<{width}}  {value}")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def ago(at_ms: int, now: int) -> str:
    """`3m ago`, to its two largest units at most; "" for a time that has not come."""
    return f"{rough(max(0, now - at_ms))} ago" if at_ms else ""


def rough(length_ms: int) -> str:
    """A length of time as people say it: `450ms`, `12s`, `3m20s`, `2h5m`, `3d4h`."""
    for unit_ms in (86_400_000, 3_600_000, 60_000, 1000):
        if length_ms >= unit_ms:
            step = max(1000, {86_400_000: 3_600_000, 3_600_000: 60_000}.get(unit_ms, 1000))
            return format_ms(length_ms // step * step)
    return format_ms(length_ms)


def clock(at_ms: int) -> str:
    """Local wall time, ISO; "" for 0."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at_ms / 1000)) if at_ms else ""


def is_interactive() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
