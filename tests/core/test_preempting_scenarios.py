"""Pictures of a yard in which jobs give way to each other: one file each in `preempting/`.

A file tells a story line by line; below `----` each line comes back with what it led to, and the yard as it is then,
wherever that changed. A card shows `.` for nobody, `1` for job 1, `1+2` for both, `1>3` for job 1 that is leaving for
job 3, `1>` for one that leaves by itself, `1|3` for one whose place is kept for job 3 once it has ended, `.|3` for a
card that is kept for job 3 and free. Behind the cards, `~1` is job 1 off its card, in the host's memory; `1` holds no
card.

    node NAME CARDS [suspend=GIB] [cpus=N]     CARDS: 4×H100, 2×A30; suspend: memory for images (default: plenty)
    queue NAME NOMINAL BORROW [scavenger]      a queue of the tenant of that name; BORROW `any`: what others leave
    past N                                     so many jobs have come and gone
    run TENANT/USER field=value ...            a job as in a job file; it runs at once
    ask TENANT/USER field=value ...            the same, and nodes have yet to do what they are told
    obey                                       nodes do what they are told: who is to leave leaves, who is placed runs
    refuse NUMBER                              its node cannot take it off its card
    end NUMBER | cancel NUMBER | suspend NUMBER | resume NUMBER
    wait TIME                                  time passes; nodes obey nothing meanwhile
    work TIME                                  time passes; nodes obey every ten seconds

The stories are told anew with REWRITE_SCENARIOS=1: read what changed before believing it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from gpuyard_daemon.core.placing.capacity import NodeSpace
from gpuyard_daemon.core.placing.partitions import Card
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.inputs import PolicyChanged, ResumeRequested, SuspendRequested
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.names import JobId
from gpuyard_protocol.nodes import Ended, Prepared, Report, Resumed, Started, Suspended, SuspendFailed
from gpuyard_protocol.resources import devices_of
from gpuyard_protocol.units import Duration, GpuAmount
from support.builders import job, node
from support.judge import JudgedHarness
from support.pictures import check_picture, devices_drawn, spec_written

FOLDER = Path(__file__).parent / "preempting"


class Scenario:
    """A yard that does what a file says, under the judge's eyes."""

    def __init__(self) -> None:
        self.harness = JudgedHarness()
        self.queues: dict[str, QueuePolicy] = {}
        self.output: list[str] = []
        self._seen = 0
        self._gone = 0
        self._picture: list[str] = []
        self._verbs: dict[str, Callable[..., None]] = {
            "node": self._node, "queue": self._queue, "past": self._past, "run": self._run, "ask": self._ask,
            "obey": self._obey, "refuse": self._refuse, "end": self._end, "cancel": self._cancel, "wait": self._wait,
            "work": self._work, "suspend": self._suspend, "resume": self._resume,
        }  # fmt: skip

    def play(self, text: str) -> str:
        lines = [line for line in text.splitlines() if shlex.split(line, comments=True)]
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            verb, *words = shlex.split(line, comments=True)
            self._verbs[verb](*words)
            if verb not in ("node", "queue", "past"):
                # One picture for all who run from the beginning.
                self._tell(line.strip(), is_drawn=verb != "run" or not following.startswith("run"))
        return "\n".join(self.output) + "\n"

    # --- what there is ---

    def _node(self, name: str, cards: str, *fields: str) -> None:
        said = dict(each.split("=") for each in fields)
        inventory = node(name, devices=list(devices_drawn(name, cards)), cpu_milli=int(said.get("cpus", 128)) * 1000)
        self.harness.join(msgspec.structs.replace(inventory, suspend_mib=int(said.get("suspend", 512)) * 1024))

    def _queue(self, name: str, nominal: str, borrow: str, kind: str = "") -> None:
        grants = ()
        if kind != "scavenger":
            most = -1 if borrow == "any" else int(GpuAmount.parse(borrow))
            grants = (Grant(nominal_milli=int(GpuAmount.parse(nominal)), borrow_milli=most),)
        self.queues[name] = QueuePolicy(name, grants=grants, scavenger=kind == "scavenger")
        queues = tuple(self.queues[known] for known in sorted(self.queues))
        tenants = tuple((known, TenantLimits(queue=known)) for known in sorted(self.queues))
        self.harness.turn(PolicyChanged(policy=Policy(tenants=tenants, queues=queues)))

    def _past(self, count: str) -> None:
        for number in self.harness.submit_many([job(cpu_milli=1)] * int(count)):
            self.harness.run(number)
            self.harness.ended(number)
        self._gone, self._seen = self.harness.core.cluster.last_job, len(self.harness.records)

    # --- what happens ---

    def _number(self, text: str) -> JobId:
        """Jobs are told from 1, after those that have come and gone."""
        return int(text) + self._gone

    def _ask(self, owner: str, *fields: str) -> None:
        tenant, user = owner.split("/")
        self.harness.now_ms += 1000
        assert self.harness.submit(spec_written(fields), tenant=tenant, user=user), self.harness.refused()

    def _run(self, owner: str, *fields: str) -> None:
        self._ask(owner, *fields)
        self.harness.run(self.harness.core.cluster.last_job)

    def _obey(self) -> None:
        jobs = self.harness.core.cluster.jobs
        for _ in range(3):
            reports = [(a.node, report) for each in list(jobs.values()) for a, report in _due(each)]
            for name, report in reports:
                self.harness.report(name, report)

    def _refuse(self, number: str) -> None:
        (assignment,) = self.harness.core.cluster.jobs[self._number(number)].assignments
        report = SuspendFailed(key=assignment.key, step=assignment.step, at_ms=0, code="NotSuspendable")
        self.harness.report(assignment.node, report)

    def _end(self, number: str) -> None:
        self.harness.ended(self._number(number))

    def _cancel(self, number: str) -> None:
        owned = self.harness.core.cluster.jobs[self._number(number)]
        self.harness.cancel(owned.id, tenant=owned.tenant, user=owned.user)

    def _suspend(self, number: str) -> None:
        self._direct(SuspendRequested, number)

    def _resume(self, number: str) -> None:
        self._direct(ResumeRequested, number)

    def _direct(self, verb: type[SuspendRequested | ResumeRequested], number: str) -> None:
        owned = self.harness.core.cluster.jobs[self._number(number)]
        name = f"v{len(self.harness.answers)}"
        self.harness.turn(verb(tenant=owned.tenant, user=owned.user, submission_id=name, job=owned.id))
        assert self.harness.answers[-1].accepted, self.harness.refused()

    def _wait(self, time: str) -> None:
        self.harness.settle(most_ms=int(Duration.parse(time)))

    def _work(self, time: str) -> None:
        for _ in range(int(Duration.parse(time)) // 10_000):
            self.harness.settle(most_ms=10_000)
            self._obey()

    # --- telling ---

    def _tell(self, line: str, *, is_drawn: bool) -> None:
        self.output.append(line)
        news = [text for record in self.harness.records[self._seen :] for text in self._news(record.facts)]
        self._seen = len(self.harness.records)
        self.output += [f"    {text}" for text in news]
        picture = [self._draw(name, space) for name, space in self.harness.core.cluster.pool.spaces.items()]
        if is_drawn and picture != self._picture:
            self._picture = picture
            self.output += ["", *picture, ""]

    def _news(self, facts: tuple[f.Fact, ...]) -> Iterator[str]:
        for fact in facts:
            match fact:
                case f.JobAccepted():
                    yield f"this is job {self._told(fact.job)}"
                case f.JobPlaced():
                    as_guest = f", a guest of job {self._told(fact.guest_of)}" if fact.guest_of else ""
                    yield f"job {self._told(fact.job)} gets {self._places(fact.placements)}{as_guest}"
                case f.ClaimMade():
                    verb = "is freed" if fact.evictions else "is kept"
                    yield f"{self._places(fact.placements)} {verb} for job {self._told(fact.job)}"
                    for each in fact.evictions:
                        what = {"suspend": "suspends", "checkpoint": "saves and stops", "requeue": "stops"}[each.kind]
                        yield f"  job {self._told(each.job)} {what}: {self._words(each.why.text)}"
                case f.ClaimDropped():
                    yield f"nothing is kept for job {self._told(fact.job)} any more: {self._words(fact.why.text)}"
                case f.ReplicaSuspended():
                    yield f"job {self._told(fact.key.job)} is off its card"
                case f.SuspensionFailed():
                    yield f"job {self._told(fact.key.job)} could not be suspended and runs on"
                case f.JobSuspending():
                    yield f"job {self._told(fact.job)} suspends: {fact.why.text}"
                case f.JobResuming():
                    yield f"job {self._told(fact.job)} goes back to its card"
                case f.JobRequeued():
                    yield f"job {self._told(fact.job)} waits again"
                case f.JobEnded():
                    yield f"job {self._told(fact.job)} has {fact.state}"
                case _:
                    pass

    def _told(self, number: JobId) -> int:
        return number - self._gone

    def _words(self, text: str) -> str:
        words = text.split()
        for at, word in enumerate(words[:-1]):
            number = words[at + 1].strip(",;:")
            if word == "job" and number.isdigit():
                words[at + 1] = words[at + 1].replace(number, str(self._told(int(number))))
        return " ".join(words)

    def _places(self, placements: tuple[f.Placement, ...]) -> str:
        cards = {name: space.by_uuid for name, space in self.harness.core.cluster.pool.spaces.items()}
        return ", ".join(
            f"{each.node}[{' '.join(str(cards[each.node][uuid].position) for uuid in devices_of(each.partition))}]"
            for each in placements
        )

    def _draw(self, name: str, space: NodeSpace) -> str:
        off = [f"~{self._told(key.job)}" for key, a in sorted(space.assignments.items()) if a.home is not None]
        return " ".join([f"{name}  [{' '.join(self._card(space, card) for card in space.cards)}]", *off])

    def _card(self, space: NodeSpace, card: Card) -> str:
        claims = [claim for claim in space.claims if card.device.uuid in devices_of(claim.partition)]
        kept = self._told(claims[0].job) if claims else 0
        holders = []
        for key in sorted(card.held):
            leaves = space.assignments[key].state in ("stopping", "suspending")
            goes_for = f">{kept or ''}" if leaves else ""
            holders.append(f"{self._told(key.job)}{goes_for}")
        text = "+".join(holders) or "."
        return f"{text}|{kept}" if kept and ">" not in text else text


def _due(each: Job) -> Iterator[tuple[f.Placement, Report]]:
    """What nodes would report about a job if they did now what they were told."""
    for assignment in list(each.assignments):
        key = assignment.key
        place = f.Placement(assignment.node, assignment.partition)
        match assignment.state:
            case "ordered" if each.spec.replicas > 1:
                yield place, Prepared(key=key, port=29_500)
            case "ordered" | "released":
                yield place, Started(key=key, at_ms=0)
            case "stopping":
                yield place, Ended(key=key, outcome="stopped", at_ms=0)
            case "suspending":
                yield place, Suspended(key=key, step=assignment.step, at_ms=0, image_mib=20_000)
            case "resuming":
                yield place, Resumed(key=key, step=assignment.step, at_ms=0)
            case _:
                pass


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_story_goes_as_told(path: Path) -> None:
    check_picture(path, Scenario().play)


def test_there_are_stories() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 12
