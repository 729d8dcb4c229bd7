"""How long a yard with 100,000 jobs is without commands when its daemon is killed: with a standby, and without.

A real nats-server with the settings of production, daemon processes, agents that run nothing. A tenth of the jobs run,
the others wait for a card. At the moment of each SIGKILL one running job ends, so that a waiting one can start: the
figure is the time from the kill to the arrival of that new start at a node, through the new leader's own decision.

`takeover_s`: a standby follows the journal and takes over; `takeover_hang_s`: the leader was not killed but suspended,
which takes longer to be sure of. `to_dispatching_s`: there is none; a new process is started
at once, as a supervisor would, and reads snapshot and journal. Medians of `--rounds`.

    python -m bench.recovery --jobs 100000 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import uvloop

from bench.fleet import FakeAgent
from bench.turns import start_nats
from bench.yard import report
from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.queries import Stats, StatsQuery
from gpuyard_protocol.subjects import query, submission

RUNNING_PART = 10
CARDS_PER_NODE = 50
BATCH_JOBS = 1000
#: Messages of one tenant that wait to be decided at a time.
BATCHES_AT_ONCE = 4
DEADLINE_S = 120.0
CONFIG = "[tenants.default]\njobs_max = 10000000\n"


class Head:
    """One daemon with a directory of its own; it can be killed and started again."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self._url = url
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir()
        (directory / "daemon.toml").write_text(CONFIG)

    def start(self) -> None:
        arguments = ["--config", str(self.directory / "daemon.toml"), "--state", str(self.directory)]
        arguments += ["--nats", self._url, "--http", "", "--no-authentication"]
        # As where it is installed: with its modules compiled, which the first start sees to.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(self.directory.parent / "compiled")
        command = [sys.executable, "-m", "gpuyard_daemon", *arguments]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def suspend(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    @property
    def _log(self) -> Path:
        return self.directory / "daemon.log"

    def said(self, event: str) -> int:
        """How often its log has this event."""
        return self._log.read_text(errors="replace").count(f'"event":"{event}"')

    def last(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    @property
    def rss_mib(self) -> float:
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    @property
    def cpu_s(self) -> float:
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    async def until_said(self, event: str, times: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.said(event) < times:
            if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                raise SystemExit(f"no {event!r} from a daemon:\n{self._log.read_text(errors='replace')[-3000:]}")
            await asyncio.sleep(0.05)


class Yard:
    """The agents, and a tenant that fills the yard."""

    def __init__(self, bus: Bus, jobs: int) -> None:
        self.bus = bus
        self.jobs = jobs
        self.running = jobs // RUNNING_PART
        nodes = -(-self.running // CARDS_PER_NODE)
        self.agents = [FakeAgent(bus, f"node-{n}", gpus=CARDS_PER_NODE, runs_for_s=-1) for n in range(nodes)]

    async def stats(self) -> Stats:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(BusError):
                reply = await self.bus.request(query("acme", "alice", "stats"), encode(StatsQuery()), timeout=10)
                return decode(Stats, reply.data)
            await asyncio.sleep(0.05)
        raise SystemExit("the daemon does not answer")

    async def fill(self) -> None:
        for agent in self.agents:
            await agent.join()
        job = {"command": ["/bin/true"], "gpus": 1, "cpus": 0.1, "memory": "64Mi"}
        batch = encode({"jobs": [job] * BATCH_JOBS})
        for number in range(self.jobs // BATCH_JOBS):
            await self.bus.stream_publish(submission("acme", "alice", "submit-many"), batch)
            wanted = (number + 1 - BATCHES_AT_ONCE) * BATCH_JOBS
            while sum((await self.stats()).jobs.values()) < wanted:
                await asyncio.sleep(0.02)
        deadline = time.monotonic() + DEADLINE_S
        while (found := await self.stats()).jobs.get("running", 0) < len(self.agents) * CARDS_PER_NODE:
            if time.monotonic() > deadline:
                raise SystemExit(f"the yard does not fill: {found}")
            await asyncio.sleep(0.1)

    async def seconds_to_new_start(self) -> float:
        """End one job; seconds until any node is told to start one that was never started."""
        agent = max(self.agents, key=lambda agent: len(agent.live))
        known = sum(len(agent.started) for agent in self.agents)
        for each in self.agents:
            each.news.clear()
        began = time.monotonic()
        agent.end(min(agent.live))
        while sum(len(agent.started) for agent in self.agents) == known:
            if time.monotonic() - began > DEADLINE_S:
                raise SystemExit("no new start")
            await asyncio.sleep(0.001)
        return time.monotonic() - began


@contextlib.asynccontextmanager
async def _server(directory: Path) -> AsyncIterator[str]:
    server, url = start_nats(directory)
    try:
        yield url
    finally:
        server.kill()
        server.wait()


async def _takeovers(
    yard: Yard, leader: Head, standby: Head, rounds: int, *, hang: bool = False
) -> tuple[list[float], Head, Head]:
    """Kill whichever leads, with the other one standing by; the times, who leads in the end, and who does not."""
    times = []
    for _ in range(rounds):
        standby.start()
        taken_before = standby.said("took-over")
        await standby.until_said("standby.up-to-date", standby.said("standby.up-to-date") + 1)
        await asyncio.sleep(1.0)
        if standby.said("took-over") > taken_before:
            raise SystemExit(f"the standby took over from a leader that lives: too busy a machine?\n{standby.last()}")
        if hang:
            leader.suspend()
        else:
            leader.kill()
        times.append(await yard.seconds_to_new_start())
        leader.kill()
        leader, standby = standby, leader
    return times, leader, standby


async def _restarts(yard: Yard, head: Head, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds to the first new start, and what the new process spent of a processor until then."""
    times, spent = [], []
    for _ in range(rounds):
        head.kill()
        head.start()
        times.append(await yard.seconds_to_new_start())
        spent.append(head.cpu_s)
        await yard.stats()
    return times, spent


async def _run(jobs: int, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="gpuyard-recovery-") as name:
        directory = Path(name)
        async with _server(directory) as url:
            heads = [Head(directory / word, url) for word in ("first", "second")]
            bus = await connect(url, name="bench", inbox_prefix="_INBOX_T", reconnect_jitter_s=(0.01, 0.05))
            try:
                heads[0].start()
                yard = Yard(bus, jobs)
                await yard.stats()
                await yard.fill()
                journal_mib = (await bus.stream_state("JRN_main")).bytes / 2**20
                rss_mib = heads[0].rss_mib
                takeovers, leader, other = await _takeovers(yard, *heads, rounds)
                hangs, leader, other = await _takeovers(yard, leader, other, 1, hang=True)
                restarts, spent = await _restarts(yard, leader, rounds)
                faults = [fault for agent in yard.agents for fault in agent.faults]
            finally:
                await bus.close()
                for head in heads:
                    head.kill()
    if faults:
        raise SystemExit(f"orders that should not have come: {faults[:5]}")
    return {
        "jobs": jobs,
        "to_dispatching_s": round(statistics.median(restarts), 3),
        "takeover_s": round(statistics.median(takeovers), 3),
        "journal_mib": round(journal_mib, 1),
        "rss_mib": round(rss_mib, 1),
        "to_dispatching_cpu_s": round(statistics.median(spent), 3),
        "to_dispatching_all_s": [round(value, 3) for value in restarts],
        "takeover_hang_s": round(statistics.median(hangs), 3),
        "takeover_all_s": [round(value, 3) for value in takeovers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report(uvloop.run(_run(options.jobs, options.rounds)), as_json=options.json)


if __name__ == "__main__":
    main()
