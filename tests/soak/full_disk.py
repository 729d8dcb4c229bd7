"""The disk under nats-server is full, against all construction: something else took the space.

A server on a small file system and a daemon. The disk is filled to the last byte, a tenant goes on submitting, and then
the space comes back. What happens is printed; demanded is:

- while it is full, a submission is refused or goes unanswered, with an error that says so; none is acknowledged and
  lost;
- once there is room and the server was started again (a stream that met a full disk stays dead until then), the same
  daemon goes on, and everything acknowledged is there.

PYTHONPATH=tests python -m soak.full_disk
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.nats import connect
from soak.loop_disk import make_image, mounted, require_root
from support.daemon import DaemonProcess, Tenant
from support.nats import NatsProcess

DISK_MIB = 64
#: Requests of 8 KiB, so that the last blocks are soon used up.
JOB = {"command": ["true"], "gpus": 1, "allow_pending": True, "env": {"TEXT": "x" * 8192}}
REFUSED_AFTER = 400


def _fill(directory: Path) -> Path:
    """Take what is left."""
    ballast = directory / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (1024 * 1024, 4096, 1):
            block = b"x" * size
            try:
                while os.write(descriptor, block):
                    pass
            except OSError:
                continue
    finally:
        os.close(descriptor)
    return ballast


async def _submit(url: str, count: int) -> tuple[list[str], str]:
    """Submissions acknowledged, and the first error; up to `count` of them."""
    bus = await connect(url, name="tenant", inbox_prefix="_INBOX.alice")
    acknowledged, error = [], ""
    try:
        for _ in range(count):
            try:
                acknowledged.append(await Tenant(bus).submit(JOB))
            except BusError as refusal:
                error = f"{type(refusal).__name__}: {refusal}"
                break
    finally:
        await bus.close()
    return acknowledged, error


async def _all_answered(url: str, acknowledged: list[str]) -> None:
    bus = await connect(url, name="tenant", inbox_prefix="_INBOX.alice")
    try:
        for submission_id in acknowledged:
            await Tenant(bus).answer(submission_id)
    finally:
        await bus.close()


def main() -> None:
    require_root()
    with tempfile.TemporaryDirectory(prefix="gpuyard-disk-") as name:
        directory = Path(name)
        make_image(directory / "disk", DISK_MIB)
        with mounted(directory / "disk", directory / "small") as disk:
            server = NatsProcess(disk / "nats")
            server.start()
            daemon = DaemonProcess(directory / "daemon", server.url)
            try:
                daemon.start()
                before, error = asyncio.run(_submit(server.url, 20))
                assert not error, error
                ballast = _fill(disk)
                during, error = asyncio.run(_submit(server.url, REFUSED_AFTER))
                print(f"full: {len(during)} more were acknowledged, then: {error}", flush=True)
                assert error, f"{REFUSED_AFTER} submissions fitted on a full disk"
                ballast.unlink()
                server.kill()
                server.start()
                after, error = asyncio.run(_submit(server.url, 20))
                assert not error, error
                asyncio.run(_all_answered(server.url, before + during + after))
            finally:
                daemon.kill()
                server.kill()
    print(f"room again: all {len(before) + len(during) + len(after)} acknowledged submissions are answered")


if __name__ == "__main__":
    main()
