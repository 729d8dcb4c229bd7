"""The head's store of what jobs bring along."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from gpuyard.errors import GpuyardError
from gpuyard.uploads import pack
from gpuyard_daemon.uploads import KEPT_S, UploadStore, answer_upload
from gpuyard_protocol.codec import Malformed, encode
from gpuyard_protocol.uploads import UPLOAD_BYTES_MAX, UploadHeld, UploadPiece


def piece(data: bytes, offset: int = 0, end: int | None = None, name: str = "") -> UploadPiece:
    name = name or "sha256:" + hashlib.sha256(data).hexdigest()
    return UploadPiece(upload=name, size=len(data), offset=offset, data=data[offset:end])


def test_pieces_make_a_whole_that_only_its_tenant_has(tmp_path: Path) -> None:
    store, data = UploadStore(tmp_path), os.urandom(1000)
    assert store.take("acme", piece(data, end=0)).held == 0
    assert store.take("acme", piece(data, end=600)).held == 600
    assert store.take("acme", piece(data, offset=700)).held == 600
    whole = store.take("acme", piece(data, offset=600))
    assert (whole.complete, whole.held) == (True, 1000)
    assert store.take("acme", piece(data, end=0)).complete
    assert not store.take("umbrella", piece(data, end=0)).complete
    name = piece(data).upload
    assert store.read("acme", name, 0) == (1000, data)
    assert store.read("acme", name, 400) == (1000, data[400:])
    assert store.read("umbrella", name, 0) is None


def test_a_wrong_name_is_told_and_nothing_of_it_kept(tmp_path: Path) -> None:
    store = UploadStore(tmp_path)
    told = store.take("acme", piece(b"abc", name="sha256:" + "1" * 64))
    assert "not what its name says" in told.error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_was_not_used_for_a_week_makes_room(tmp_path: Path) -> None:
    store = UploadStore(tmp_path)
    old, new = piece(b"old"), piece(b"new")
    store.take("acme", old)
    long_ago = time.time() - KEPT_S - 60
    os.utime(store.path("acme", old.upload), (long_ago, long_ago))
    store.take("acme", new)
    assert store.read("acme", old.upload, 0) is None
    assert store.read("acme", new.upload, 0) is not None


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        (UploadPiece(upload="../x", size=1), "$.upload"),
        (UploadPiece(upload="sha256:" + "0" * 64, size=UPLOAD_BYTES_MAX + 1), "$.size"),
        (UploadPiece(upload="sha256:" + "0" * 64, size=0), "$.size"),
    ],
)
async def test_what_is_no_upload_is_refused_by_name(tmp_path: Path, wrong: UploadPiece, path: str) -> None:
    with pytest.raises(Malformed) as caught:
        await answer_upload(UploadStore(tmp_path), "acme", encode(wrong))
    assert caught.value.path == path
    held = await answer_upload(UploadStore(tmp_path), "acme", encode(piece(b"abc")))
    assert isinstance(held, UploadHeld)
    assert held.complete


def test_equal_directories_pack_to_equal_names(tmp_path: Path) -> None:
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for file in ("b", "a"):
            path = tmp_path / folder / "sub" / file
            path.write_text(file)
            os.utime(path, (1000, 1000))
        os.utime(tmp_path / folder / "sub", (1000, 1000))
        names.append(pack(tmp_path / folder))
    assert names[0] == names[1]
    with pytest.raises(GpuyardError, match="no directory"):
        pack(tmp_path / "three")
