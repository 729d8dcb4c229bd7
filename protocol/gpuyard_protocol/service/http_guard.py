"""Who may read an HTTP endpoint: on loopback everybody, elsewhere whoever has the token, and over TLS only.

The token is one line in a file that its owner alone may read; it is made where there is none. What it protects is
metrics, health and pages, nothing that changes anything.
"""

from __future__ import annotations

import hmac
import os
import secrets
import ssl
from pathlib import Path
from typing import NamedTuple

_SCHEME = "bearer "
_TOKEN_CHARS_MIN = 16


class GuardRefused(Exception):
    """An endpoint cannot be opened so; the text says which setting is missing or wrong."""


class HttpGuard(NamedTuple):
    """What an endpoint asks of whoever reads it."""

    #: "": nothing.
    token: str = ""
    #: None: in the clear.
    tls: ssl.SSLContext | None = None

    def admits(self, authorization: str) -> bool:
        """Whether the value of an `Authorization` header lets its sender in."""
        if not self.token:
            return True
        given = authorization[len(_SCHEME) :] if authorization[: len(_SCHEME)].lower() == _SCHEME else ""
        return hmac.compare_digest(given.strip().encode(errors="replace"), self.token.encode())

    @property
    def scheme(self) -> str:
        return "https" if self.tls is not None else "http"


OPEN = HttpGuard()


def address_of(text: str) -> tuple[str, int] | None:
    """Host and port of a setting `HOST:PORT` that was found good; None where there is to be no endpoint."""
    host, _, port = text.rpartition(":")
    return (host.strip("[]"), int(port)) if text else None


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def guard_for(
    host: str, token: Path, cert: Path, key: Path, *, wants_token: bool = False, wants_tls: bool = False
) -> HttpGuard:
    """The guard of an endpoint on this address; `wants_…`: on loopback too. Raises `GuardRefused`."""
    is_open = is_loopback(host)
    return HttpGuard(
        _read_token(token) if wants_token or not is_open else "",
        _tls(host, cert, key) if wants_tls or not is_open else None,
    )


def _tls(host: str, cert: Path, key: Path) -> ssl.SSLContext:
    if not cert.exists() or not key.exists():
        raise GuardRefused(
            f"{host or 'every address'} can be reached from other machines: that takes TLS, and there is no "
            f"certificate at {cert} with its key at {key} (see http_cert and http_key)"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise GuardRefused(f"http_cert: {cert} and {key} are no certificate and its key ({error})") from None
    return context


def _read_token(path: Path) -> str:
    try:
        token = _made(path) if not path.exists() else path.read_text().strip()
    except OSError as error:
        raise GuardRefused(f"http_token: {path}: {error.strerror or error}") from None
    if len(token) < _TOKEN_CHARS_MIN or not token.isascii() or not token.isprintable() or " " in token:
        raise GuardRefused(
            f"http_token: {path} holds no token: expected one line of at least {_TOKEN_CHARS_MIN} characters"
        )
    return token


def _made(path: Path) -> str:
    """A new token, whole or not there, and readable by its owner alone from the first moment."""
    token = secrets.token_urlsafe(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    draft.replace(path)
    return token
