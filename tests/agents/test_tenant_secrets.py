"""Secrets of a node: whose they are, who may read them, and that they go with the replica."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from gpuyard_agent.launch.base import Account
from gpuyard_agent.launch.starters import starter
from gpuyard_agent.tenant_secrets import SECRET_BYTES_MAX, SecretMissing, TenantSecrets
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Launch

KEY = AssignmentKey(17, 1, 0)
ME = Account(name="me", uid=os.geteuid(), gid=os.getegid())


def keep(tmp_path: Path, name: str, text: bytes, mode: int = 0o600) -> None:
    path = tmp_path / "kept" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    path.chmod(mode)


def secrets(tmp_path: Path) -> TenantSecrets:
    return TenantSecrets(tmp_path / "kept", tmp_path / "handed", "n-1")


async def handed(tmp_path: Path, *names: str) -> dict[str, str]:
    """What the replica's command finds in its environment."""
    store = secrets(tmp_path)
    await store.hand_over(KEY, "acme", "alice", names, ME)
    command = [*store.wrapper(KEY, names), "env"]
    said = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in said.stdout.splitlines() if "=" in line)


async def test_a_users_own_goes_before_the_tenants(tmp_path: Path) -> None:
    keep(tmp_path, "acme/TOKEN", b"everybody's")
    keep(tmp_path, "acme/alice/TOKEN", b"alice's, with $HOME and 'quotes'\n")
    keep(tmp_path, "acme/OTHER", b"other")
    env = await handed(tmp_path, "TOKEN", "OTHER")
    assert (env["TOKEN"], env["OTHER"]) == ("alice's, with $HOME and 'quotes'", "other")


async def test_what_was_handed_over_goes_with_the_replica(tmp_path: Path) -> None:
    keep(tmp_path, "acme/TOKEN", b"x")
    store = secrets(tmp_path)
    await store.hand_over(KEY, "acme", "alice", ["TOKEN"], ME)
    file = tmp_path / "handed" / "17.1.0" / "TOKEN"
    assert file.stat().st_mode & 0o777 == 0o400
    assert file.parent.stat().st_mode & 0o777 == 0o700
    await store.hand_over(KEY, "acme", "alice", ["TOKEN"], ME)
    store.take_back(KEY)
    store.take_back(KEY)
    assert not file.parent.exists()


@pytest.mark.parametrize(
    ("name", "text", "mode", "why"),
    [
        ("umbrella/TOKEN", b"x", 0o600, "keeps no secret TOKEN for acme/alice"),
        ("acme/bob/TOKEN", b"x", 0o600, "keeps no secret TOKEN for acme/alice"),
        ("acme/TOKEN", b"x", 0o640, "its owner alone may read"),
        ("acme/TOKEN", b"x" * (SECRET_BYTES_MAX + 1), 0o600, "more than"),
        ("acme/TOKEN", b"a\0b", 0o600, "NUL"),
    ],
)
async def test_what_is_not_to_be_had_is_said(tmp_path: Path, name: str, text: bytes, mode: int, why: str) -> None:
    keep(tmp_path, name, text, mode)
    with pytest.raises(SecretMissing, match=why):
        await handed(tmp_path, "TOKEN")
    assert not (tmp_path / "handed" / "17.1.0").exists()


async def test_a_link_to_somebody_elses_is_not_followed(tmp_path: Path) -> None:
    keep(tmp_path, "umbrella/TOKEN", b"x")
    (tmp_path / "kept" / "acme").mkdir()
    (tmp_path / "kept" / "acme" / "TOKEN").symlink_to(tmp_path / "kept" / "umbrella" / "TOKEN")
    with pytest.raises(SecretMissing):
        await handed(tmp_path, "TOKEN")


def test_torchrun_is_told_what_is_no_python() -> None:
    def of(*argv: str, script: str = "", launcher: str = "torchrun") -> tuple[str, ...]:
        return starter(Launch(tenant="acme", user="alice", argv=argv, script=script, launcher=launcher))

    assert of("train.py", "--lr", "1") == ("torchrun",)
    assert of("-m", "train") == ("torchrun",)
    assert of("./train") == ("torchrun", "--no-python")
    assert of("x.py", script="#!/bin/sh") == ("torchrun", "--no-python")
    assert of("train.py", launcher="") == ()
