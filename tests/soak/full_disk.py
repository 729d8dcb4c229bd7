"""The disk under nats-server is full, against all construction: something else took the space.

A whole yard on a small file system, with a job that runs all the while. First the disk fills slowly: submissions are
to be refused at once, with an error that says so, before anything is stored in vain. Then it is filled to the last
byte: the stream that meets it is dead until its server is started again, which the yard is to do by itself, with the
room of its ballast. Then the space comes back. What happens is printed; demanded is:

- while it is full, a submission is refused or goes unanswered, with an error; none is acknowledged and lost;
- the server was started again by its supervisor, and the job that ran never noticed;
- once there is room, the yard takes submissions again, and everything acknowledged has run.

PYTHONPATH=tests python -m soak.full_disk
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
import time
from pathlib import Path

import gpuyard
from soak.loop_disk import make_image, mounted, require_root
from support.yard import Yard, eventually, running_yard

DISK_MIB = 768
LEFT_BYTES = 40 * 1024**2
MARGIN_BYTES = 2 * 1024**2
#: A request large enough to need blocks of the disk that are not there.
TEXT = "x" * 100_000
DEADLINE_S = 60.0
#: What was under way when the disk filled is told by then that it is for want of room.
UNDER_WAY_MAX_S = 10.0


def _fill(directory: Path, leaving: int) -> Path:
    """Take what is left, but for so many bytes."""
    filler = directory / f"filler-{leaving}"
    with filler.open("wb", buffering=0) as file:
        state = os.statvfs(directory)
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - leaving - MARGIN_BYTES)
        file.seek(0, os.SEEK_END)
        if not leaving:
            # What the file system keeps for itself comes off in the smallest of pieces.
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
    return filler


async def _submit(client: gpuyard.Client, mark: Path) -> int:
    job = await client.submit(command=["/bin/sh", "-c", f"echo $GPUYARD_JOB >> {mark}"], env={"TEXT": TEXT})
    return job.number


async def _refusal(client: gpuyard.Client, mark: Path, acknowledged: list[int]) -> tuple[str, float]:
    """The first error, and how long it took to come."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        began = time.monotonic()
        try:
            acknowledged.append(await _submit(client, mark))
        except gpuyard.GpuyardError as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
    raise AssertionError("the yard takes submissions on a full disk")


async def _until_taken(client: gpuyard.Client, mark: Path, acknowledged: list[int]) -> None:
    async def is_taken() -> bool:
        try:
            acknowledged.append(await _submit(client, mark))
        except gpuyard.GpuyardError:
            return False
        return True

    await eventually(is_taken, "submissions are taken again", timeout=DEADLINE_S)


async def _play(yard: Yard, disk: Path) -> None:
    ticks, marks = yard.scratch / "ticks", yard.scratch / "marks"
    acknowledged: list[int] = []
    async with yard.connect() as client:
        steady = await client.submit(command=["/bin/sh", "-c", f"while :; do date +%s.%N >> {ticks}; sleep 0.2; done"])
        acknowledged.append(await _submit(client, marks))
        await eventually(lambda: _exists(ticks), "the steady job runs")

        slow = _fill(disk, LEFT_BYTES)
        error, took_s = await _refusal(client, marks, acknowledged)
        print(f"{LEFT_BYTES // 1024**2} MiB left: after {took_s * 1000:.0f} ms: {error}", flush=True)
        assert "no room left" in error, error
        assert took_s < 1.0
        print("alarms:", "; ".join((await client.stats()).alarms), flush=True)

        slow.unlink()
        await _until_taken(client, marks, acknowledged)
        full = _fill(disk, 0)
        began = time.monotonic()
        error, took_s = await _refusal(client, marks, acknowledged)
        print(f"0 MiB left: after {took_s * 1000:.0f} ms: {error}", flush=True)
        assert "room" in error, error
        assert took_s < UNDER_WAY_MAX_S
        await eventually(lambda: _is_said(yard, "starting it again"), "the server is started again", timeout=DEADLINE_S)
        print(f"0 MiB left: the server was started again after {time.monotonic() - began:.1f} s", flush=True)
        full.unlink()
        await _until_taken(client, marks, acknowledged)

        async def all_ran() -> bool:
            ran = marks.read_text().split() if marks.exists() else []
            return sorted(map(int, ran)) == acknowledged

        await eventually(all_ran, "every acknowledged job ran once", timeout=DEADLINE_S)
        times = [float(line) for line in ticks.read_text().split()]
        pause_s = max(after - before for before, after in itertools.pairwise(times))
        print(f"room again: {len(acknowledged)} jobs ran once each; the steady job's longest pause: {pause_s:.2f} s")
        assert (await steady.view()).attempt == 1
        assert pause_s < 3.0
        await steady.cancel()


async def _exists(path: Path) -> bool:
    return path.exists()


async def _is_said(yard: Yard, text: str) -> bool:
    return text in (yard.state.parent / "up.log").read_text(errors="replace")


def main() -> None:
    require_root()
    with tempfile.TemporaryDirectory(prefix="gpuyard-disk-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        make_image(directory / "disk", DISK_MIB)
        with mounted(directory / "disk", directory / "small") as disk:
            disk.chmod(0o755)
            # Everything else of the yard lies elsewhere: only the streams' disk is to be full.
            with running_yard(nodes=1, simulate="1xH100-80GB", streams_at=disk) as yard:
                asyncio.run(_play(yard, disk))


if __name__ == "__main__":
    main()
