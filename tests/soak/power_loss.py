"""The power goes while tenants submit: nothing that was acknowledged may be lost.

nats-server and the daemon run on a file system in a file. At a random moment both are killed and the file is copied;
the copy is mounted, everything is started on it, and each submission that was acknowledged is asked for. What the yard
had answered before must be answered the same way after.

PYTHONPATH=tests python -m soak.power_loss --rounds 5 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path

from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.queries import SubmissionQuery, SubmissionStatus
from soak.loop_disk import copy_as_cut, make_image, mounted, require_root
from support.daemon import DaemonProcess, Tenant
from support.nats import OPEN_CONFIG, NatsProcess

DISK_MIB = 512
WRITERS = 16


class Promises:
    """What tenants were told before the cut."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        #: Job numbers that were answered.
        self.answered: dict[str, int] = {}


async def _submit_until_cut(url: str, seconds: float, promises: Promises) -> None:
    bus = await connect(url, name="tenant", inbox_prefix="_INBOX.alice")
    tenant = Tenant(bus)

    async def write(writer: int) -> None:
        number = 0
        while True:
            number += 1
            name = f"w{writer}-{number}"
            try:
                await tenant.submit({"command": ["true"], "gpus": 1, "allow_pending": True, "submission_id": name})
                promises.acknowledged.append(name)
                if number % 10 == 0:
                    status = await tenant.ask("submission", SubmissionQuery(submission_id=name), SubmissionStatus)
                    if status.answer is not None:
                        promises.answered[name] = status.answer.job
            except BusError:
                return

    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    except TimeoutError:
        pass
    finally:
        await bus.close()


async def _ask_for_all(url: str, promises: Promises) -> tuple[list[str], list[str]]:
    """Submissions that are lost, and answers that changed."""
    bus = await connect(url, name="tenant", inbox_prefix="_INBOX.alice")
    tenant = Tenant(bus)
    lost, changed = [], []
    try:
        # The last one is decided after all before it.
        await tenant.answer(await tenant.submit({"command": ["true"], "gpus": 1, "allow_pending": True}))
        for name in promises.acknowledged:
            status = await tenant.ask("submission", SubmissionQuery(submission_id=name), SubmissionStatus)
            if status.answer is None:
                lost.append(name)
            elif promises.answered.get(name, status.answer.job) != status.answer.job:
                changed.append(name)
    finally:
        await bus.close()
    return lost, changed


def _round(directory: Path, rng: random.Random, sync: str) -> tuple[int, list[str], list[str]]:
    image, copy = directory / "disk", directory / "cut"
    make_image(image, DISK_MIB)
    promises = Promises()
    config = OPEN_CONFIG.replace("sync_interval: always", f"sync_interval: {sync}")
    with mounted(image, directory / "before") as disk:
        server = NatsProcess(disk / "nats", config)
        server.start()
        daemon = DaemonProcess(disk / "daemon", server.url)
        try:
            daemon.start()
            asyncio.run(_submit_until_cut(server.url, rng.uniform(1.0, 6.0), promises))
        finally:
            server.kill()
            daemon.kill()
            copy_as_cut(image, copy)
    with mounted(copy, directory / "after") as disk:
        server = NatsProcess(disk / "nats", config)
        server.start()
        daemon = DaemonProcess(disk / "daemon", server.url)
        try:
            daemon.start()
            lost, changed = asyncio.run(_ask_for_all(server.url, promises))
        finally:
            daemon.kill()
            server.kill()
    return len(promises.acknowledged), lost, changed


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the power of a submitting yard, again and again.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sync", default="always", help="the server's sync_interval: with 10s much is lost")
    options = parser.parse_args()
    require_root()
    rng = random.Random(options.seed)
    failed = False
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="gpuyard-power-") as name:
            acknowledged, lost, changed = _round(Path(name), rng, options.sync)
        print(
            f"cut {number}: {acknowledged} acknowledged, {len(lost)} lost, {len(changed)} answers changed", flush=True
        )
        failed = failed or bool(lost or changed) or not acknowledged
    if failed:
        raise SystemExit(f"again with: python -m soak.power_loss --rounds {options.rounds} --seed {options.seed}")


if __name__ == "__main__":
    main()
