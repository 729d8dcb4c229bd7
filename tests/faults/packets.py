"""A yard of real processes on hosts of their own, and a network between them that loses, repeats, delays and withholds.

One host has the NATS server, two have daemons of which one leads, three have agents; `support.lan` joins them. From a
seed the ways between them go bad and come back, each direction for itself: a daemon that hears the server and is not
heard, agents that are heard and hear nothing. Jobs come all the while. Then everything heals, all that was acknowledged
has to end, and it is counted as after `bench.kills`: from the acknowledgements, from what the jobs' processes wrote
themselves, and from what the journal, the ledgers and the hosts say in the end.

PYTHONPATH=tests:. python -m faults.packets --seconds 120 --seed 7       (needs root, and /dev/net/tun)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from bench import kill_evidence as evidence
from bench.kills import final_states

from gpuyard_protocol.bus.base import Bus, BusError
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import Malformed
from gpuyard_protocol.jobs import JobView
from gpuyard_protocol.queries import JobQuery, NodesPage, NodesQuery
from support.daemon import SETTINGS, Tenant
from support.lan import CONSOLE, Lan, Way, lan
from support.nats import OPEN_CONFIG, server_binary

HUB = "hub"
HEADS = ("head-1", "head-2")
NODES = ("n-1", "n-2", "n-3")
PORT = 4222
#: Jobs that may wait or run at a time: the six cards of the yard are kept busy.
BACKLOG_MAX = 12
READY_S = 60.0
#: For everything acknowledged to end, once the network is whole.
HEALED_S = 120.0
#: A way is bad for so long at most: longer than a leader or a node is given up after.
BAD_MAX_S = 25.0
DAEMON_SETTINGS = SETTINGS.replace("snapshot_records = 40", "snapshot_records = 100000")


class Host:
    """One process on one host, started again when it ends, as systemd would."""

    def __init__(self, room: Path, name: str, command: list[str]) -> None:
        self._command = command
        self._log = room / f"{name}.log"
        self.starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)},
                    start_new_session=True,
                )
            self.starts += 1
            await self._process.wait()
            await asyncio.sleep(0.5)

    async def stop(self) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class Yard:
    def __init__(self, net: Lan, room: Path, rng: random.Random) -> None:
        self._net, self._room, self._rng = net, room, rng
        self.url = f"nats://{net.address(HUB)}:{PORT}"
        self.acknowledged: list[evidence.Acknowledged] = []
        self.submitted = 0
        self.troubles: list[str] = []
        self._hosts: list[Host] = []

    def start(self) -> None:
        nats = self._room / "nats"
        nats.mkdir()
        config = nats / "nats.conf"
        text = OPEN_CONFIG.replace("127.0.0.1", self._net.address(HUB)).format(port=PORT, directory=nats)
        config.write_text(text + 'ping_interval: "2s"\nping_max: 2\n')
        self._run(HUB, [server_binary(), "-c", str(config)])
        for name in HEADS:
            state = self._room / name
            state.mkdir()
            (state / "daemon.toml").write_text(DAEMON_SETTINGS)
            arguments = ["--config", str(state / "daemon.toml"), "--state", str(state), "--nats", self.url]
            self._run(name, [sys.executable, "-m", "gpuyard_daemon", *arguments, "--http", "", "--no-authentication"])
        agents = self._room / "agents"
        agents.mkdir(mode=0o711)
        for name in NODES:
            arguments = ["--state", str(agents / name), "--node", name, "--nats", self.url, "--http", ""]
            arguments += ["--simulate", "2xH100-80GB", "--run-as", "nobody", "--launcher", "supervisor"]
            self._run(name, [sys.executable, "-m", "gpuyard_agent", *arguments])

    def _run(self, host: str, command: list[str]) -> None:
        self._hosts.append(Host(self._room, host, [*self._net.at(host), *command]))

    async def stop(self) -> None:
        for host in self._hosts:
            await host.stop()
        for process in _processes(str(self._room)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def starts(self) -> int:
        """How often processes were started again."""
        return sum(host.starts - 1 for host in self._hosts)

    async def until_ready(self, tenant: Tenant) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(BusError, Malformed):
                page = await tenant.ask("nodes", NodesQuery(), NodesPage)
                if [view.node for view in page.nodes if view.state == "ready"] == [*NODES]:
                    return
            await asyncio.sleep(0.2)
        logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in self._room.glob("*.log"))
        raise SystemExit(f"the yard is not ready within {READY_S:.0f} s:\n{logs}")

    # -- load and weather ---------------------------------------------------------------------------------------------

    async def submit(self, tenant: Tenant, until: float) -> None:
        log = self._room / evidence.PROCESSES
        while time.monotonic() < until:
            if self.submitted - log.read_bytes().count(b"end ") >= BACKLOG_MAX:
                await asyncio.sleep(0.05)
                continue
            name = f"packet-{self.submitted}"
            self.submitted += 1
            replicas = 2 if self._rng.random() < 0.15 else 1
            command = evidence.job_command(self._room, self._rng.uniform(0.1, 3.0))
            job = {"command": command, "gpus": 1, "cpus": 0.1, "memory": "64Mi", "replicas": replicas}
            while True:
                try:
                    await tenant.submit({**job, "submission_id": name})
                    break
                except BusError:
                    await asyncio.sleep(0.1)
            at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            self.acknowledged.append(evidence.Acknowledged(name, 0, at_ns, replicas))

    async def spoil(self, until: float) -> None:
        """One way or another goes bad every now and then, and comes back."""
        others = [host for host in self._net.ways_of(HUB) if host != CONSOLE]
        rng, loop = self._rng, asyncio.get_running_loop()
        while time.monotonic() < until:
            host, trouble = rng.choice(others), rng.choice(("mute", "deaf", "cut", "loss", "slow", "repeat"))
            here, back = self._net.ways[host, HUB], self._net.ways[HUB, host]
            ways = {"mute": [here], "deaf": [back]}.get(trouble, [here, back])
            for way in ways:
                _spoil(way, trouble, rng)
                loop.call_later(rng.uniform(0.5, BAD_MAX_S), _mend, way)
            self.troubles.append(f"{host} {trouble}")
            await asyncio.sleep(rng.uniform(0.2, 4.0))

    # -- the end ------------------------------------------------------------------------------------------------------

    async def verdicts(self, tenant: Tenant, bus: Bus) -> list[evidence.Verdict]:
        deadline = time.monotonic() + HEALED_S
        views: dict[str, JobView] = {}
        waiting = [entry.submission_id for entry in self.acknowledged]
        while waiting and time.monotonic() < deadline:
            for name in list(waiting):
                try:
                    answer = await tenant.answer(name)
                    views[name] = await tenant.ask("job", JobQuery(job=answer.job), JobView)
                except (BusError, Malformed):
                    break
                if views[name].state in ("succeeded", "failed", "cancelled"):
                    waiting.remove(name)
            await asyncio.sleep(0.1)
        finals = await final_states(bus, "main") or {}
        return [
            evidence.Verdict(name, view.job, view.state, view.attempt, finals.get(view.job, 0))
            for name, view in views.items()
        ]

    async def left_behind(self) -> list[str]:
        """Of jobs that have all ended: their processes, and what ledgers hold."""
        deadline = time.monotonic() + 15.0
        while True:
            left = evidence.left_in_ledgers(self._room)
            left += [f"process {each.pid}" for each in _processes(str(self._room / evidence.PROCESSES))]
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.2)


def _spoil(way: Way, trouble: str, rng: random.Random) -> None:
    match trouble:
        case "loss":
            way.loss = rng.uniform(0.02, 0.3)
        case "slow":
            way.delay_max_s = rng.uniform(0.01, 0.4)
        case "repeat":
            way.duplicate = rng.uniform(0.1, 0.5)
        case _:
            way.is_cut = True


def _mend(way: Way) -> None:
    way.loss = way.duplicate = way.delay_max_s = 0.0
    way.is_cut = False


def _processes(words: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append(process)
    return found


async def play(net: Lan, room: Path, seed: int, seconds: float) -> tuple[evidence.Count, Yard]:
    (room / evidence.PROCESSES).touch()
    (room / evidence.PROCESSES).chmod(0o666)
    yard = Yard(net, room, random.Random(seed))
    yard.start()
    try:
        bus = await connect(yard.url, name="console", inbox_prefix="_INBOX_T", connect_timeout_s=READY_S)
        tenant = Tenant(bus)
        await yard.until_ready(tenant)
        until = time.monotonic() + seconds
        await asyncio.gather(yard.submit(tenant, until), yard.spoil(until))
        net.heal()
        verdicts = await yard.verdicts(tenant, bus)
        await yard.until_ready(tenant)
        left = await yard.left_behind()
        await bus.close()
    finally:
        await yard.stop()
    figures = evidence.count(room, yard.acknowledged, verdicts, left)
    figures.submitted = yard.submitted
    return figures, yard


def run(seed: int, seconds: float) -> tuple[evidence.Count, str]:
    """The figures; and what happened, in a line."""
    with tempfile.TemporaryDirectory(prefix="gpuyard-packets-") as name, lan((HUB, *HEADS, *NODES), seed) as net:
        room = Path(name)
        room.chmod(0o755)
        figures, yard = asyncio.run(play(net, room, seed, seconds))
        changes = sum((room / f"{head}.log").read_text(errors="replace").count('"took-over"') for head in HEADS)
        told = (
            f"{len(yard.troubles)} troubles, {changes} changes of leaders, {yard.starts} processes started again, "
            f"{net.carried} frames carried, {net.dropped} dropped"
        )
    return figures, told


def main() -> int:
    parser = argparse.ArgumentParser(description="A yard of real processes on a network with faults.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    figures, told = run(options.seed, options.seconds)
    print(told)
    print("\n".join(f"{key}: {value}" for key, value in evidence.as_figures(figures).items() if key != "kills"))
    if not figures.is_clean:
        print(f"again with: python -m faults.packets --seconds {options.seconds:g} --seed {options.seed}")
    return 0 if figures.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
