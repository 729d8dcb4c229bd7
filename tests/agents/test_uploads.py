"""What jobs bring along: whole or not at all, by its content, and nothing of it outside the replica's directory."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from gpuyard_agent.launch.base import Account
from gpuyard_agent.unpacking import unpack
from gpuyard_agent.uploads import UploadMissing, Uploads
from gpuyard_protocol.nodes import TakeUpload

ME = Account(name="me", uid=os.geteuid(), gid=os.getegid())


def archive(*members: tuple[str, bytes], link: tuple[str, str] = ("", "")) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.uid = len(data), 0o4755, 12345
            tar.addfile(entry, io.BytesIO(data))
        if link[0]:
            entry = tarfile.TarInfo(link[0])
            entry.type, entry.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(entry)
    return buffer.getvalue()


def name_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def give(uploads: Uploads, data: bytes, *, name: str = "", piece: int = 4096) -> bool:
    """Bring it as the daemon does; whether it was taken."""
    upload, offset = name or name_of(data), 0
    for _ in range(len(data) // piece + 3):
        part = TakeUpload(
            tenant="acme", upload=upload, size=len(data), offset=offset, data=data[offset : offset + piece]
        )
        held = await uploads.take(part)
        if held.complete:
            return True
        offset = held.held
    return False


def job_dir(tmp_path: Path) -> Path:
    return tmp_path / "jobs" / "17" / "1" / "0"


async def test_a_replica_waits_for_it_and_finds_it_in_its_own_directory(tmp_path: Path) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), archive(("a/b.txt", b"x" * 10_000), ("run", b"#!"))
    waiting = asyncio.ensure_future(uploads.unpack("acme", name_of(data), job_dir(tmp_path), ME))
    assert await give(uploads, data)
    await waiting
    assert (job_dir(tmp_path) / "a" / "b.txt").read_bytes() == b"x" * 10_000
    assert (job_dir(tmp_path) / "run").stat().st_mode & 0o7777 == 0o755
    (job_dir(tmp_path) / "half").write_text("of an earlier try")
    await uploads.unpack("acme", name_of(data), job_dir(tmp_path), ME)
    assert sorted(path.name for path in job_dir(tmp_path).iterdir()) == ["a", "run"]


async def test_a_piece_that_comes_again_or_too_early_changes_nothing(tmp_path: Path) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), archive(("a", b"x" * 5000))
    first = TakeUpload(tenant="acme", upload=name_of(data), size=len(data), offset=0, data=data[:4000])
    later = TakeUpload(tenant="acme", upload=name_of(data), size=len(data), offset=8000, data=data[8000:])
    assert (await uploads.take(later)).held == 0
    assert (await uploads.take(first)).held == 4000
    assert (await uploads.take(first)).held == 4000
    assert await give(uploads, data)


async def test_what_is_not_what_its_name_says_is_not_kept(tmp_path: Path) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), archive(("a", b"x"))
    assert not await give(uploads, data, name="sha256:" + "0" * 64)
    assert not list((tmp_path / "uploads").rglob("*0000"))


async def test_what_the_head_does_not_have_is_said_at_once(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads")
    waiting = asyncio.ensure_future(uploads.unpack("acme", "sha256:" + "0" * 64, job_dir(tmp_path), ME))
    await asyncio.sleep(0)
    await uploads.take(TakeUpload(tenant="acme", upload="sha256:" + "0" * 64, size=0))
    with pytest.raises(UploadMissing, match="hand it in again"):
        await waiting


@pytest.mark.parametrize("name", ["../out", "a/../../out"])
async def test_nothing_is_unpacked_outside_the_directory(tmp_path: Path, name: str) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), archive((name, b"x"))
    assert await give(uploads, data)
    with pytest.raises(UploadMissing, match="cannot be unpacked"):
        await uploads.unpack("acme", name_of(data), job_dir(tmp_path), ME)
    assert not list(tmp_path.rglob("out"))


async def test_an_absolute_path_is_one_inside_the_directory(tmp_path: Path) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), archive(("/etc/own", b"x"))
    assert await give(uploads, data)
    await uploads.unpack("acme", name_of(data), job_dir(tmp_path), ME)
    assert (job_dir(tmp_path) / "etc" / "own").read_bytes() == b"x"


async def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), archive(link=("etc", "/etc"))
    assert await give(uploads, data)
    with pytest.raises(UploadMissing):
        await uploads.unpack("acme", name_of(data), job_dir(tmp_path), ME)


def hostile(tmp_path: Path, *members: tuple[str, bytes, str]) -> Path:
    """An archive of (name, tarfile's type, where it leads)."""
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o6777
            tar.addfile(member, io.BytesIO())
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("d", tarfile.DIRTYPE, ""), ("a", tarfile.SYMTYPE, "d"), ("a/own", tarfile.REGTYPE, "")],
        [("a", tarfile.SYMTYPE, "."), ("b", tarfile.SYMTYPE, "a/.."), ("c", tarfile.LNKTYPE, "b/secret")],
        [("a", tarfile.SYMTYPE, "."), ("x", tarfile.SYMTYPE, "a/../secret"), ("x", tarfile.REGTYPE, "")],
        [("c", tarfile.LNKTYPE, "../secret")],
        [("c", tarfile.LNKTYPE, "/etc/passwd")],
        [("d/e", tarfile.SYMTYPE, "../../secret")],
        [("disk", tarfile.BLKTYPE, "")],
        [("pipe", tarfile.FIFOTYPE, "")],
    ],
)
def test_nothing_is_written_or_named_through_links(tmp_path: Path, members: list[tuple[str, bytes, str]]) -> None:
    (tmp_path / "secret").write_text("of somebody else")
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(tarfile.TarError):
        unpack(hostile(tmp_path, *members), root, 1000)
    assert (tmp_path / "secret").stat().st_nlink == 1
    assert not (root / "d" / "own").exists()


def test_links_inside_are_kept_and_rights_are_cut(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    members = [("d/f", tarfile.REGTYPE, ""), ("d/s", tarfile.SYMTYPE, "f"), ("h", tarfile.LNKTYPE, "d/f")]
    unpack(hostile(tmp_path, *members), root, 1000)
    assert os.readlink(root / "d" / "s") == "f"
    assert (root / "h").samefile(root / "d" / "f")
    assert (root / "h").stat().st_mode & 0o7777 == 0o755


async def test_no_archive_is_no_upload(tmp_path: Path) -> None:
    uploads, data = Uploads(tmp_path / "uploads"), b"no tar at all" * 100
    assert await give(uploads, data)
    with pytest.raises(UploadMissing):
        await uploads.unpack("acme", name_of(data), job_dir(tmp_path), ME)
