"""What is said to help helps: in a yard in which everything happens, whatever `why` proposes is tried.

What the owner could change is asked for again in place of the job as it is; what others would have to do is done in a
core of the same state.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from core.test_why import changed
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.model import Job
from gpuyard_protocol.explaining import Remedy
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.nodes import Ended, Report
from support.builders import CoreHarness
from support.mixed_yard import MixedYard, story

_CURSORS = i.Cursors(10**6, 10**6)


class Elsewhere:
    """A core of the same state."""

    def __init__(self, h: CoreHarness) -> None:
        self.core = Scheduler.restore(h.core.snapshot(), h.settings)
        self._now_ms = h.now_ms

    def turn(self, *inputs: i.Input) -> None:
        turn = self.core.handle(inputs, self._now_ms, _CURSORS)
        while turn.unfinished:
            turn = self.core.handle((), self._now_ms, _CURSORS)

    def end(self, jobs: tuple[int, ...]) -> None:
        reports: dict[str, list[Report]] = {}
        for number in jobs:
            for each in self.core.cluster.jobs[number].assignments:
                if each.is_live:
                    reports.setdefault(each.node, []).append(Ended(key=each.key, outcome="exited", at_ms=0))
        nodes = self.core.cluster.nodes
        self.turn(
            *[
                i.NodeReported(
                    node=name,
                    instance=nodes[name].instance,
                    boot_id=nodes[name].boot_id,
                    first=nodes[name].reports_seen + 1,
                    reports=tuple(said),
                )
                for name, said in reports.items()
            ]
        )

    def ask_anew(self, job: Job, spec: JobSpec) -> Job:
        """The same owner takes the job back and hands in another."""
        who = {"tenant": job.tenant, "user": job.user}
        self.turn(
            i.CancelRequested(**who, submission_id="back", job=job.id),
            i.JobSubmitted(**who, submission_id="anew", spec=spec),
        )
        return self.core.cluster.jobs[self.core.cluster.last_job]


def try_out(h: CoreHarness, job: Job, remedy: Remedy) -> None:
    elsewhere = Elsewhere(h)
    if remedy.kind == "EndOf":
        elsewhere.end(remedy.jobs)
        assert elsewhere.core.cluster.jobs[job.id].state != "pending", (job.id, remedy)
    elif remedy.by == "owner":
        now = {"hold": False, "begin_ms": 0, "begin_after_ms": 0, "singleton": False, "depends_on": (), "array": None}
        anew = elsewhere.ask_anew(job, replace(changed(job.spec, remedy.fields), **now))
        assert anew.id != job.id, (job.id, remedy)
        assert anew.state != "pending", (job.id, remedy)


@pytest.mark.parametrize("first", [1, 44, 60])
def test_what_is_said_to_help_helps(first: int) -> None:
    tried: Counter[str] = Counter()
    for seed in range(first, first + 6):
        yard, rng = MixedYard(CoreHarness()), random.Random(seed)
        for step, (name, a, b) in enumerate(story(seed, 70)):
            yard.play(name, a, b)
            h, waiting = yard.harness, list(yard.harness.core.cluster.waiting.values())
            if not waiting or step % 3:
                continue
            job = rng.choice(waiting)
            answer = h.core.why(job.id, h.now_ms)
            assert answer is not None
            for remedy in answer.remedies:
                try_out(h, job, remedy)
                tried[remedy.kind] += 1
    assert {"EndOf", "FewerGpus"} <= tried.keys()
