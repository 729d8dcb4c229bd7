"""Who may read an endpoint, and what an endpoint needs before it is opened to others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuyard_protocol.service.http_guard import OPEN, GuardRefused, HttpGuard, guard_for, is_loopback


@pytest.mark.parametrize(
    ("host", "is_one"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True),
        ("0.0.0.0", False), ("", False), ("::", False), ("10.0.0.1", False), ("head.example", False),
    ],
)  # fmt: skip
def test_what_counts_as_loopback(host: str, is_one: bool) -> None:
    assert is_loopback(host) is is_one


def test_loopback_is_open_unless_a_token_is_asked_for(tmp_path: Path) -> None:
    paths = tmp_path / "token", tmp_path / "cert", tmp_path / "key"
    assert guard_for("127.0.0.1", *paths) == OPEN
    assert list(tmp_path.iterdir()) == []
    guard = guard_for("127.0.0.1", *paths, wants_token=True)
    assert (guard.scheme, guard.token) == ("http", paths[0].read_text().strip())
    assert os.stat(paths[0]).st_mode & 0o777 == 0o600
    assert guard_for("127.0.0.1", *paths, wants_token=True).token == guard.token


def test_beyond_loopback_there_is_no_way_without_tls(tmp_path: Path) -> None:
    with pytest.raises(GuardRefused, match="TLS"):
        guard_for("10.0.0.1", tmp_path / "token", tmp_path / "cert", tmp_path / "key")
    for name in ("cert", "key"):
        (tmp_path / name).write_text("nonsense")
    with pytest.raises(GuardRefused, match="http_cert"):
        guard_for("10.0.0.1", tmp_path / "token", tmp_path / "cert", tmp_path / "key")


@pytest.mark.parametrize("text", ["", "short", "with a space in its middle", "ü" * 20])
def test_a_file_without_a_token_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(GuardRefused, match="http_token"):
        guard_for("127.0.0.1", tmp_path / "token", tmp_path, tmp_path, wants_token=True)


@pytest.mark.parametrize(
    ("header", "admitted"),
    [
        ("Bearer 0123456789abcdef", True),
        ("bearer 0123456789abcdef ", True),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Bearer 0123456789abcde", False),
        ("Bearer 0123456789abcdef0", False),
        ("Basic 0123456789abcdef", False),
        ("0123456789abcdef", False),
        ("Bearer \udcff", False),
    ],
)
def test_only_the_token_lets_in(header: str, admitted: bool) -> None:
    assert HttpGuard("0123456789abcdef").admits(header) is admitted
    assert OPEN.admits(header)
