"""Which yard is meant, and as whom: the context file that `gpuyard up` writes and every client reads.

Looked for in this order, the first that exists wins: what the caller names, $GPUYARD_CONTEXT,
`~/.config/gpuyard/context.toml`, and `context.toml` of the state directory that `gpuyard up` uses by default. Nothing
else decides, so that the answer to "which yard did that go to?" is one file. Paths of keys inside it may be relative
to it.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import msgspec

from gpuyard.errors import NoYard
from gpuyard_protocol.codec import Malformed, from_plain

CONTEXT_VARIABLE = "GPUYARD_CONTEXT"
FILE_NAME = "context.toml"


class Context(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client needs to speak to one yard as one user."""

    #: The yard's name.
    yard: str
    #: Where its NATS server listens; several, separated by commas.
    url: str
    tenant: str
    user: str
    #: Path of the user's nkey seed; "": the server asks for none.
    key: str = ""
    #: Name and seed of an operator, for those who run the yard; "": none.
    operator: str = ""
    operator_key: str = ""
    #: Path of the authority that signed the server's certificate, in PEM form; "": those that the system trusts.
    tls_ca: str = ""
    #: The daemon's HTTP address, for the dashboard and its health; "": none.
    http: str = ""


def default_state_dir() -> Path:
    """Where `gpuyard up` keeps a yard unless told otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/gpuyard")
    return _home_of("XDG_STATE_HOME", ".local/state") / "gpuyard"


def candidates() -> list[Path]:
    """Where a context is looked for when nobody names one, in order."""
    return [_home_of("XDG_CONFIG_HOME", ".config") / "gpuyard" / FILE_NAME, default_state_dir() / FILE_NAME]


def _home_of(variable: str, fallback: str) -> Path:
    named = os.environ.get(variable, "")
    return Path(named) if named.startswith("/") else Path.home() / fallback


def find_context(path: str | Path | None = None) -> Path:
    """The context file that counts, or `NoYard` with what to do."""
    source = "--context" if path is not None else f"${CONTEXT_VARIABLE}"
    named = path if path is not None else os.environ.get(CONTEXT_VARIABLE)
    if named:
        found = Path(named).expanduser()
        if _is_dir(found):
            found /= FILE_NAME
        if not _is_file(found):
            raise NoYard(
                f"no context file at {found} (named by {source}): start a yard with `gpuyard up`, "
                f"or point {CONTEXT_VARIABLE} at the context.toml of a running one"
            )
        return found
    for candidate in candidates():
        if _is_file(candidate):
            return candidate
    raise NoYard(
        f"no yard found: start one with `gpuyard up`, or point {CONTEXT_VARIABLE} at the context.toml of a running one"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:
        return True  # it may be there: reading it will tell what is wrong


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return False


def load_context(path: str | Path | None = None) -> Context:
    """The context that counts, read and checked; `NoYard` names the file and what is wrong with it."""
    found = find_context(path)
    try:
        plain = tomllib.loads(found.read_text(encoding="utf-8"))
        context = from_plain(Context, plain)
    except OSError as error:
        raise NoYard(f"cannot read {found}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise NoYard(f"{found} is no TOML file: {error}") from None
    except Malformed as error:
        raise NoYard(f"{found}: {error}") from None
    base = found.resolve().parent
    return msgspec.structs.replace(
        context,
        key=_absolute(base, context.key),
        operator_key=_absolute(base, context.operator_key),
        tls_ca=_absolute(base, context.tls_ca),
    )


def _absolute(base: Path, path: str) -> str:
    return str(base / path) if path else ""


def render_context(context: Context) -> str:
    """The file's text. TOML's basic strings are JSON's, for the printable text that stands here."""
    fields = msgspec.structs.asdict(context).items()
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in fields if value)
