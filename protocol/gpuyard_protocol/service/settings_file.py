"""Settings of a service: a TOML file with flags on top, into a typed record.

A service with a wrong setting does not start: `BadConfig` says which file, which key, what stood there and what is
allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gpuyard_protocol.codec import Malformed, from_plain


class BadConfig(Exception):
    """The settings make no sense; the text says where and what is allowed."""


class Checked(Protocol):
    def validate(self) -> None:
        """`BadConfig` with one sentence for the first thing wrong."""


S = TypeVar("S", bound=Checked)


def bad(key: str, found: str, expected: str) -> BadConfig:
    return BadConfig(f"{key}: found {found!r}; expected {expected}")


def load_settings(
    settings: type[S],
    file: Path | None,
    overrides: Mapping[str, Any],
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> S:
    """The settings of `file` with `overrides` (from flags, by key) on top; `BadConfig` for anything wrong.

    `check` sees the file's plain values first and may raise `Malformed` with a better path than the decoder's.
    """
    plain: dict[str, Any] = {}
    if file is not None:
        try:
            plain = tomllib.loads(file.read_text())
        except OSError as error:
            raise BadConfig(f"{file}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise BadConfig(f"{file}: not TOML: {error}") from None
    where = str(file) if file is not None else "flags"
    try:
        check(plain)
        loaded = from_plain(settings, {**plain, **overrides})
        loaded.validate()
    except Malformed as error:
        hint = f" (did you mean {error.nearest!r}?)" if error.nearest else ""
        key = error.path.removeprefix("$.")
        raise BadConfig(f"{where}: {key}: found {error.found}; expected {error.expected}{hint}") from None
    except BadConfig as error:
        raise BadConfig(f"{where}: {error}") from None
    return loaded
