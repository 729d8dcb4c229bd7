"""What a job's processes are started by, how its cards are parted, and the secrets that it is given, on a real yard."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard

#: Stands where torchrun would: it says how it was called, and runs the program once.
_TORCHRUN = """#!/bin/sh
echo "called $*; nodes=$PET_NNODES rank=$PET_NODE_RANK processes=$PET_NPROC_PER_NODE alone=$PET_STANDALONE"
[ "$1" = --no-python ] && shift
exec "$@"
"""


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB") as yard:
        torchrun = yard.scratch / "torchrun"
        torchrun.write_text(_TORCHRUN)
        torchrun.chmod(0o755)
        for node in ("node-1", "node-2"):
            for name, text, mode in (("main/TOKEN", "s3cret\n", 0o600), ("main/OPEN", "seen", 0o644)):
                path = yard.state / "agents" / node / "secrets" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                path.chmod(mode)
        yield yard


async def test_torchrun_starts_a_process_for_each_card(yard: Yard) -> None:
    launcher = str(yard.scratch / "torchrun")
    async with yard.connect() as client:
        alone = await client.submit(command=["echo", "hello"], gpus=2, launcher=launcher)
        assert (await alone.wait(timeout=30)).state == "succeeded"
        said = (await alone.logs()).decode()
        assert said == "called --no-python echo hello; nodes= rank= processes=2 alone=1\nhello\n"
        gang = await client.submit(script="echo from a script", gpus=4, replicas=2, launcher=launcher)
        assert (await gang.wait(timeout=30)).state == "succeeded"
        for replica in (0, 1):
            said = (await gang.logs(replica=replica)).decode()
            assert f"nodes=2 rank={replica} processes=4 alone=\n" in said
            assert said.endswith("from a script\n")


async def test_cards_asked_for_in_all_are_parted_by_the_yard(yard: Yard) -> None:
    line = "echo $RANK of $WORLD_SIZE with $SLURM_GPUS_ON_NODE"
    shown = await asyncio.to_thread(
        yard.cli, "run", "--total-gpus", "6", "--cwd", "", "--", "sh", "-c", line, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    async with yard.connect() as client:
        job = await client.submit(command=line, total_gpus=6)
        view = await job.wait(timeout=30)
        assert (view.replicas, [len(replica.devices) for replica in view.placed]) == (2, [3, 3])
        assert (await job.logs(replica=1)).decode() == "1 of 2 with 3\n"


async def test_a_secret_comes_from_the_node_and_goes_with_the_job(yard: Yard) -> None:
    seen, line = yard.scratch / "line", "/proc/$PPID/cmdline"
    async with yard.connect() as client:
        job = await client.submit(
            command=f'echo "$TOKEN"; tr "\\0" " " < {line} > {seen}; env | grep -c ^TOKEN=', secrets=["TOKEN"]
        )
        view = await job.wait(timeout=30)
        assert view.state == "succeeded"
        assert (await job.logs()).decode().splitlines()[0] == "s3cret"
        assert "s3cret" not in seen.read_text()
        assert "s3cret" not in str(view)
        for name, code in (("MISSING", "keeps no secret MISSING"), ("OPEN", "its owner alone may read")):
            refused = await client.submit(command=["true"], secrets=[name])
            end = await refused.wait(timeout=30)
            assert end.state == "failed"
            assert end.reason is not None
            assert end.reason.code == "SecretMissing"
            assert code in end.reason.text
    left = [path for _, _, files in os.walk(yard.state / "agents") for path in files if path == "TOKEN"]
    assert len(left) == 2, "only what the nodes keep"
    journal = b"".join(path.read_bytes() for path in (yard.state / "nats").rglob("*.blk"))
    assert b"s3cret" not in journal


async def test_logs_come_as_objects_line_by_line(yard: Yard) -> None:
    async with yard.connect() as client:
        job = await client.submit(command="echo one; echo two; printf three", gpus=1)
        assert (await job.wait(timeout=30)).state == "succeeded"
    for flags, wanted in (
        ((), ["one", "two", "three"]),
        (("-n", "2"), ["two", "three"]),
        (("-f",), ["one", "two", "three"]),
    ):
        shown = await asyncio.to_thread(yard.cli, "logs", str(job.number), "--json", *flags)
        assert shown.returncode == 0, shown.stderr
        found = [json.loads(line) for line in shown.stdout.splitlines()]
        assert [each["line"] for each in found] == wanted
        assert found[-1] == {
            "job": job.number, "attempt": 1, "replica": 0, "stream": "out", "offset": 8, "line": "three"
        }  # fmt: skip


async def test_shares_of_other_domains_are_on_other_cards(yard: Yard) -> None:
    async with yard.connect() as client:
        shares = [
            await client.submit(command=["sleep", "30"], gpu=0.2, share_domain=domain)
            for domain in (None, "team", "team", None)
        ]
        for job in shares:
            await eventually(lambda job=job: is_running(job), "it runs")
        cards = [(await job.view()).placed[0].devices for job in shares]
        assert cards[0] == cards[3] != cards[1] == cards[2]
        for job in shares:
            await job.cancel()
        for job in shares:
            await job.wait(timeout=30)


async def is_running(job: gpuyard.Job) -> bool:
    return (await job.view()).state == "running"


async def test_a_directory_is_brought_along_to_every_node(yard: Yard, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "large").write_bytes(os.urandom(3_000_000))
    (tmp_path / "train.sh").write_text("#!/bin/sh\nwc -c < data/large; echo written > own; pwd\n")
    (tmp_path / "train.sh").chmod(0o755)
    shown = await asyncio.to_thread(
        yard.cli, "run", "-q", "--gpus", "4", "--replicas", "2", "--upload", str(tmp_path), "--", "./train.sh"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("3000000\n") == 2
    async with yard.connect() as client:
        name = await client.upload(tmp_path)
        assert name == await client.upload(tmp_path), "the same content has the same name"
        again = await client.submit(command=["./train.sh"], upload=name)
        assert (await again.wait(timeout=30)).state == "succeeded"
        gone = await client.submit(command=["true"], upload="sha256:" + "0" * 64)
        view = await gone.wait(timeout=40)
        assert view.state == "failed"
        assert view.reason is not None
        assert (view.reason.code, "hand it in again" in view.reason.text) == ("UploadMissing", True)
        with pytest.raises(gpuyard.Rejected, match="upload"):
            await client.submit(command=["true"], upload="data")
