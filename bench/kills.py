"""Kill a whole yard at random while it works, and count what became of every job.

Real processes all: `gpuyard up` with simulated cards, a submitter with its own connection, jobs that write down their
own starts and ends. The daemon, the agents and nats-server are killed with SIGKILL, or stopped with SIGSTOP for a
while and sometimes killed in their sleep. Which, when and how comes from the seed; what the yard is doing at that
moment does not, so a seed repeats the blows and not the run.

python -m bench.kills --kills 60 --seed 1 --json --evidence DIR
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import gpuyard
from bench import kill_evidence as evidence
from bench.yard import BenchYard, report, running_yard
from gpuyard_daemon.core.state.facts import JobEnded
from gpuyard_daemon.core.state.turn import Record
from gpuyard_protocol.bus.base import Bus, BusError, StoredMessage
from gpuyard_protocol.bus.nats import connect
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.queries import SubmissionQuery, SubmissionStatus
from gpuyard_protocol.subjects import JOURNAL_ENTRY, query, stream_name, submission

NODES = 4
GPUS_PER_NODE = 4
#: Jobs submitted and not yet ended by their own word; the submitter waits above it.
BACKLOG_MAX = 60
#: For the replacement of what was killed, and for the last job after the last kill.
REPLACED_S = 30.0
FINISHED_S = 180.0
#: Share of blows that are a SIGSTOP.
STOP_SHARE = 0.4
WEIGHTS = {"agent": 2, "daemon": 1, "standby": 1, "nats-server": 1}
#: So many blows fall without regard; then some job must end and some submission be taken before the next ones do:
#: a yard that is merely down is not tested.
PROGRESS_EVERY = 5


class Submitter:
    """Sends jobs until told to stop, each again until the stream confirms it; writes down what was confirmed."""

    def __init__(self, bus: Bus, context: gpuyard.Context, directory: Path, rng: random.Random) -> None:
        self.acknowledged: list[evidence.Acknowledged] = []
        self.submitted = 0
        self._bus = bus
        self._context = context
        self._directory = directory
        self._rng = rng
        self._is_stopped = False

    def stop(self) -> None:
        self._is_stopped = True

    async def run(self) -> None:
        while not self._is_stopped:
            if self.submitted - self.ended < BACKLOG_MAX:
                await self._submit()
            else:
                await asyncio.sleep(0.05)

    @property
    def ended(self) -> int:
        """Replicas that said themselves that they ended."""
        return (self._directory / evidence.PROCESSES).read_bytes().count(b"end ")

    async def _submit(self) -> None:
        rng, number = self._rng, self.submitted
        self.submitted += 1
        replicas = 2 if rng.random() < 0.1 else 1
        command = evidence.job_command(self._directory, rng.uniform(0.05, 1.0))
        job: dict[str, Any] = {"command": command, "gpus": 1, "cpus": 0.1, "memory": "64Mi", "replicas": replicas}
        job["submission_id"] = f"kill-{number}"
        subject = submission(self._context.tenant, self._context.user, "submit")
        while True:
            try:
                ack = await self._bus.stream_publish(subject, encode(job), timeout=5.0)
                break
            except BusError:
                await asyncio.sleep(0.05)
        at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self.acknowledged.append(evidence.Acknowledged(job["submission_id"], ack.sequence, at_ns, replicas))


class Killer:
    """Blows from a seed. A victim is only hit while it lives; its replacement is waited for in the background."""

    def __init__(self, up_pid: int, seed: int) -> None:
        self._up = psutil.Process(up_pid)
        self._rng = random.Random(seed)
        self.blows: list[str] = []

    def victims(self) -> dict[str, psutil.Process]:
        """Every process of the yard that must survive being killed, by name."""
        found: dict[str, psutil.Process] = {}
        for child in self._up.children(recursive=False):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if child.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    continue
                if "gpuyard_daemon" in words:
                    found["standby" if "--daemon-dir" in words else "daemon"] = child
                elif "gpuyard_agent" in words:
                    found["agent " + next(w for w in words if "node-" in w).rpartition("/")[2]] = child
                elif any(word.endswith("nats-server") for word in words):
                    found["nats-server"] = child
        return found

    async def strike(self) -> None:
        """One blow, as soon as there is somebody to hit."""
        deadline = time.monotonic() + REPLACED_S
        while not (victims := self.victims()):
            if time.monotonic() > deadline:
                raise SystemExit("nothing of the yard is left to kill, and nothing comes back")
            await asyncio.sleep(0.05)
        # There are several agents: every second blow hits one of them.
        names = sorted(victims)
        weights = [WEIGHTS[name.split()[0]] / (NODES if name.startswith("agent") else 1) for name in names]
        name = self._rng.choices(names, weights)[0]
        victim, roll = victims[name], self._rng.random()
        with contextlib.suppress(psutil.NoSuchProcess):
            if roll < STOP_SHARE:
                victim.suspend()
                await asyncio.sleep(self._rng.uniform(0.05, 0.8))
                if roll < STOP_SHARE / 4:
                    victim.kill()
                else:
                    victim.resume()
            else:
                victim.kill()
        self.blows.append(f"{name} {'stopped' if roll < STOP_SHARE else 'killed'}")
        await asyncio.sleep(self._rng.uniform(0.0, 0.4))


async def kill_yard(kills: int, seed: int, directory: Path, *, standby: bool) -> evidence.Count:
    """`directory`: where the evidence goes; jobs must be able to write there. `standby`: two daemons."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / evidence.PROCESSES
    log.touch()
    log.chmod(0o666)
    async with running_yard(nodes=NODES, gpus_per_node=GPUS_PER_NODE, standby=standby) as yard:
        context = gpuyard.load_context(yard.state / "context.toml")
        bus = await connect(context.url, name="submitter", inbox_prefix=f"_INBOX.{context.user}", seed=str(context.key))
        try:
            submitter = Submitter(bus, context, directory, random.Random(seed))
            sending = asyncio.create_task(submitter.run())
            killer = Killer(yard.up.pid, seed)
            for number in range(kills):
                if number % PROGRESS_EVERY == 0:
                    await _some_work_goes_on(submitter)
                await killer.strike()
                print(f"\r{number + 1}/{kills} blows, {submitter.submitted} jobs", end="", file=sys.stderr)
            submitter.stop()
            await sending
            verdicts = await _verdicts(yard, bus, context, submitter)
            orphans = await _orphans(yard, directory)
        finally:
            await bus.close()
        evidence.write_lines(directory / evidence.ACKNOWLEDGEMENTS, submitter.acknowledged)
        evidence.write_lines(directory / evidence.VERDICTS, verdicts)
        (directory / "blows.log").write_text("\n".join(killer.blows) + "\n")
        figures = evidence.count(directory, submitter.acknowledged, verdicts, orphans)
    print(file=sys.stderr)
    figures.kills, figures.submitted = kills, submitter.submitted
    return figures


async def _some_work_goes_on(submitter: Submitter) -> None:
    ended, taken = submitter.ended, len(submitter.acknowledged)
    deadline = time.monotonic() + REPLACED_S
    while submitter.ended <= ended or len(submitter.acknowledged) <= taken:
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing has gone on for {REPLACED_S:g} s")
        await asyncio.sleep(0.05)


async def _verdicts(
    yard: BenchYard, bus: Bus, context: gpuyard.Context, submitter: Submitter
) -> list[evidence.Verdict]:
    """What the yard says of each acknowledged submission, once all have ended or the time is up."""
    deadline = time.monotonic() + FINISHED_S
    open_ids = {entry.submission_id for entry in submitter.acknowledged}
    views: dict[str, tuple[int, str, int]] = {}
    while open_ids and time.monotonic() < deadline:
        for submission_id in sorted(open_ids):
            try:
                question = encode(SubmissionQuery(submission_id=submission_id))
                reply = await bus.request(query(context.tenant, context.user, "submission"), question, timeout=5.0)
                answer = decode(SubmissionStatus, reply.data).answer
                if answer is None:
                    continue
                view = await yard.client.job(answer.job)
            except (BusError, gpuyard.GpuyardError):
                break
            views[submission_id] = (view.job, view.state, view.attempt)
            if view.state in ("succeeded", "failed", "cancelled"):
                open_ids.discard(submission_id)
        await asyncio.sleep(0.1)
    finals = await _finals(yard, context)
    return [
        evidence.Verdict(name, job, state, attempt, -1 if finals is None else finals.get(job, 0))
        for name, (job, state, attempt) in views.items()
    ]


async def _finals(yard: BenchYard, context: gpuyard.Context) -> dict[int, int] | None:
    bus = await connect(
        context.url, name="reader", inbox_prefix="_INBOX_D", seed=str(yard.state / "keys" / "daemon.seed")
    )
    try:
        return await final_states(bus, context.yard)
    finally:
        await bus.close()


async def final_states(bus: Bus, yard: str) -> dict[int, int] | None:
    """How often the journal says that a job ended; None where its beginning is pruned."""
    stream = stream_name("JRN", yard)
    end = (await bus.stream_state(stream)).last_sequence
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    messages: list[StoredMessage] = []

    def take(batch: list[StoredMessage]) -> None:
        messages.extend(batch)
        if batch[-1].sequence >= end and not done.done():
            done.set_result(None)

    reader = await bus.read_stream(stream, take)
    async with asyncio.timeout(60):
        await done
    await reader.close()
    records = [
        decode(Record, message.data, max_bytes=8 * 1024 * 1024)
        for message in messages
        if message.subject == JOURNAL_ENTRY
    ]
    if not records or records[0].turn != 1:
        return None
    finals: dict[int, int] = {}
    for record in records:
        for fact in record.facts:
            if isinstance(fact, JobEnded):
                finals[fact.job] = finals.get(fact.job, 0) + 1
    return finals


async def _orphans(yard: BenchYard, directory: Path) -> list[str]:
    """What is left of jobs: their processes, and entries of ledgers (which may take a moment to close)."""
    deadline = time.monotonic() + 10.0
    while True:
        left = evidence.left_in_ledgers(yard.state)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(directory / evidence.PROCESSES) in process.cmdline():
                    left.append(f"process {process.pid}")
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)


def run_kills(kills: int, seed: int, kept: str = "", *, standby: bool = False) -> evidence.Count:
    """In a directory that every account may enter: jobs run as one. `kept`: where the evidence is copied to."""
    with tempfile.TemporaryDirectory(prefix="gpuyard-kills-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        figures = asyncio.run(kill_yard(kills, seed, directory / "evidence", standby=standby))
        if kept:
            shutil.copytree(directory / "evidence", kept, dirs_exist_ok=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--standby", action="store_true", help="with a second daemon, which is killed like the first")
    parser.add_argument("--evidence", default="", metavar="DIR", help="keep the logs there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = run_kills(options.kills, options.seed, options.evidence, standby=options.standby)
    report(evidence.as_figures(figures), as_json=options.json)
    if not figures.is_clean:
        again = f"--kills {options.kills} --seed {options.seed}{' --standby' if options.standby else ''}"
        print(f"again with: python -m bench.kills {again}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
