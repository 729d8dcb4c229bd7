"""A recorded yard lived again: the same things come in, and a core decides anew about them.

Nodes are simulated and never at fault. Jobs run as long as they did, and end as they did. What is compared is what the
recording can tell: waits, completion, allocation. After the recording's end time goes on until every job has ended
whose run time is known, so that a job that came off worse is not left out of the waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_daemon.sim.experiments import job_policy
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.measures import Measures, percentile
from gpuyard_daemon.sim.recorded_events import (
    KEEPS_PROGRESS,
    Event,
    JobAsked,
    NodeSeen,
    Recorded,
    RecordedJob,
    Submitted,
    understand,
)
from gpuyard_daemon.sim.recording import recording_of
from gpuyard_daemon.sim.simulated_yard import INSTANCE, SimulatedYard
from gpuyard_daemon.sim.trace_files import TraceError
from gpuyard_daemon.sim.trace_jobs import TraceJob
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId, NodeId
from gpuyard_protocol.units import MILLI

#: How long after the recording's end a replay goes on for jobs that have not ended.
_AFTERMATH_MS = 30 * 86_400_000
#: Nothing has run for so long, and nothing comes in any more: what still waits will wait for ever.
_STILL_MS = 2 * 3_600_000


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay does differently from the recorded yard."""

    settings: CoreSettings = CoreSettings()
    #: None: as recorded.
    policy: Policy | None = None
    #: Nodes that were never there, and more of the same kind: by node, how many.
    without: frozenset[NodeId] = frozenset()
    more: Mapping[NodeId, int] = {}


class LivedJob:
    """A job in a replay."""

    __slots__ = ("attempts_over", "ended_ms", "first_started_ms", "generation", "job", "left_ms", "runs", "since_ms",
                 "speed_milli", "starts")  # fmt: skip

    def __init__(self, job: RecordedJob) -> None:
        self.job = job
        self.attempts_over = 0
        #: Run time that is left of the present attempt; None: unknown.
        self.left_ms = job.attempts[0].run_ms if job.attempts else None
        self.runs = False
        self.since_ms = 0
        #: How fast the cards are that it is on, in thousandths.
        self.speed_milli = MILLI
        self.starts = 0
        #: An end noted under an older one does not count.
        self.generation = 0
        self.first_started_ms = 0
        self.ended_ms = 0


class Lived(msgspec.Struct, frozen=True):
    """The outcome of one replay, or of the recorded yard itself."""

    name: str
    #: (submitted, first started, ended) of each job with a known run time; 0: never.
    jobs: tuple[tuple[int, int, int], ...]
    end_ms: int
    held_milli_ms: int
    capacity_milli_ms: int
    preemptions: int
    refused: int = 0


def as_recorded(recorded: Recorded) -> Lived:
    known = [job for job in recorded.jobs.values() if job.has_run_time]
    return Lived(
        "recorded",
        tuple([(job.submitted_ms, job.first_started_ms, job.ended_ms) for job in known]),
        recorded.end_ms,
        recorded.held_milli_ms,
        recorded.capacity_milli_ms,
        sum(job.preemptions for job in recorded.jobs.values()),
    )


class Replay:
    """One replay, from begin to end."""

    def __init__(self, recorded: Recorded, changed: Changed) -> None:
        self._recorded = recorded
        self._changed = changed
        self.yard = SimulatedYard([], changed.settings, recorded.begin_ms)
        #: By number in the replay, and the numbers by those in the recording.
        self._jobs: dict[JobId, LivedJob] = {}
        self._numbers: dict[JobId, JobId] = {}
        self._ends: list[tuple[int, JobId, int]] = []
        self._nodes_there: set[NodeId] = set()
        self._requests = 0
        self._last_change_ms = recorded.begin_ms
        self.refused = 0
        #: GPU compute held and there at the recording's end, summed.
        self._sums = (0, 0)

    def go(self) -> Lived:
        events = self._recorded.events
        if self._changed.policy is not None:
            self.yard.take([i.PolicyChanged(policy=self._changed.policy)])
        at = 0
        while (now_ms := self._next_moment(at)) is not None:
            if now_ms > self._recorded.end_ms and self._sums == (0, 0):
                self._sums = self._sums_at(self._recorded.end_ms)
            self.yard.at(now_ms)
            self._end_due(now_ms)
            first = at
            while at < len(events) and events[at][0] <= now_ms:
                at += 1
            self._bring([event for _, event in events[first:at]])
            self._follow()
        if self._sums == (0, 0):
            self._sums = self._sums_at(self._recorded.end_ms)
        known = [lived for lived in self._jobs.values() if lived.job.has_run_time]
        return Lived(
            "gpuyard",
            tuple([(lived.job.submitted_ms, lived.first_started_ms, lived.ended_ms) for lived in known]),
            self._recorded.end_ms,
            *self._sums,
            sum(max(0, lived.starts - 1 - lived.attempts_over) for lived in self._jobs.values()),
            self.refused,
        )

    def _next_moment(self, at: int) -> int | None:
        events, yard = self._recorded.events, self.yard
        while self._ends and self._ends[0][2] != self._jobs[self._ends[0][1]].generation:
            heapq.heappop(self._ends)
        moments = [self._ends[0][0]] if self._ends else []
        if at < len(events):
            moments.append(events[at][0])
        elif not self._is_waited_for() or self._is_over():
            return None
        deadline_ms = yard.core.next_deadline_ms()
        if deadline_ms is not None:
            moments.append(max(deadline_ms, yard.now_ms + 1))
        return max(min(moments), yard.now_ms) if moments else None

    def _is_over(self) -> bool:
        """Nothing comes in any more: whether what still waits waits for ever, or for too long."""
        is_still = not self._ends and self.yard.now_ms > self._last_change_ms + _STILL_MS
        return is_still or self.yard.now_ms > self._recorded.end_ms + _AFTERMATH_MS

    def _is_waited_for(self) -> bool:
        return any(lived.job.has_run_time and not lived.ended_ms for lived in self._jobs.values())

    def _sums_at(self, now_ms: int) -> tuple[int, int]:
        totals, pool = self.yard.core.cluster.totals, self.yard.core.cluster.pool
        passed = max(0, now_ms - totals.summed_to_ms) if totals.summed_to_ms else 0
        held = totals.held_milli_ms + passed * pool.held_milli
        return held, totals.capacity_milli_ms + passed * pool.capacity_milli

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _bring(self, events: list[Event]) -> None:
        """One turn for everything of one moment, but jobs after those that they may depend on."""
        inputs: list[i.Input] = []
        submitted: list[Submitted] = []
        for event in events:
            if isinstance(event, Submitted):
                if event.spec.depends_on and submitted:
                    self._submit(submitted, inputs)
                    submitted, inputs = [], []
                submitted.append(event)
                continue
            if submitted:
                self._submit(submitted, inputs)
                submitted, inputs = [], []
            inputs += self._inputs_of(event)
        self._submit(submitted, inputs)

    def _submit(self, submitted: list[Submitted], inputs: list[i.Input]) -> None:
        specs = [(event.tenant, event.user, self._spec(event.spec)) for event in submitted]
        # What starts at once is told with the same turn: the numbers must be known before.
        numbers = self.yard.request(specs, inputs)
        for event, number in zip(submitted, numbers, strict=True):
            count = event.spec.array.count if event.spec.array else 1
            self.refused += not number
            for element in range(count if number else 0):
                self._numbers[event.job + element] = number + element
                self._jobs[number + element] = LivedJob(self._recorded.jobs[event.job + element])

    def _spec(self, spec: JobSpec) -> JobSpec:
        """With the numbers of this yard; jobs that ended before the recording are waited for no more."""
        depends = tuple([(kind, self._numbers[job]) for kind, job in spec.depends_on if job in self._numbers])
        return msgspec.structs.replace(spec, depends_on=depends, allow_pending=True)

    def _inputs_of(self, event: Event) -> list[i.Input]:
        match event:
            case NodeSeen(node=node, inventory=inventory):
                for name in self._names_of(node):
                    label = inventory.hostname if name == node else name
                    self.yard.join(
                        name, msgspec.structs.replace(inventory, hostname=label) if name != node else inventory
                    )
                    self._nodes_there.add(name)
                return []
            case JobAsked(job=job, make=make):
                number = self._numbers.get(job)
                if number is None:
                    return []
                self._requests += 1
                recorded = self._recorded.jobs[job]
                return [make(recorded.tenant, recorded.user, f"r{self._requests}", number)]
            case i.PolicyChanged():
                return [event] if self._changed.policy is None else []
            case i.NodeSuspected(node=node) | i.NodeLost(node=node) | i.NodeReturned(node=node):
                return [_of_node(event, name) for name in self._names_of(node) if name in self._nodes_there]
            case Submitted():
                return []
            case _:
                return [event]

    def _names_of(self, node: NodeId) -> list[NodeId]:
        if node in self._changed.without:
            return []
        return [node, *[f"{node}-more-{copy}" for copy in range(1, self._changed.more.get(node, 0) + 1)]]

    # --- what runs ---------------------------------------------------------------------------------------------------

    def _end_due(self, now_ms: int) -> None:
        while self._ends and self._ends[0][0] <= now_ms:
            _, number, generation = heapq.heappop(self._ends)
            lived = self._jobs[number]
            if lived.generation != generation:
                continue
            attempts = lived.job.attempts
            attempt = attempts[min(lived.attempts_over, len(attempts) - 1)]
            self.yard.end(number, attempt.exit_code, attempt.code)
            lived.runs = False
            lived.generation += 1
            lived.attempts_over += 1
            lived.left_ms = attempts[min(lived.attempts_over, len(attempts) - 1)].run_ms
            lived.ended_ms = now_ms

    def _follow(self) -> None:
        """Keep account of what the core's decisions led to on the nodes."""
        yard = self.yard
        for change in yard.changes():
            lived = self._jobs.get(change.job)
            if lived is None:
                continue
            lived.generation += 1
            self._last_change_ms = yard.now_ms
            if not change.runs:
                if lived.left_ms is not None and lived.job.spec.preemption in KEEPS_PROGRESS:
                    passed_ms = (yard.now_ms - lived.since_ms) * lived.speed_milli // MILLI
                    lived.left_ms = max(1, lived.left_ms - passed_ms)
                lived.runs = False
                continue
            lived.runs = True
            lived.since_ms = yard.now_ms
            if self._recorded.knows_speeds:
                lived.speed_milli = yard.core.cluster.jobs[change.job].speed_milli
            lived.starts += 1
            lived.ended_ms = 0
            lived.first_started_ms = lived.first_started_ms or yard.now_ms
            if lived.left_ms is not None:
                takes_ms = -(-lived.left_ms * MILLI // lived.speed_milli)
                heapq.heappush(self._ends, (yard.now_ms + takes_ms, change.job, lived.generation))


def _of_node(event: i.NodeSuspected | i.NodeLost | i.NodeReturned, node: NodeId) -> i.Input:
    if isinstance(event, i.NodeReturned):
        return i.NodeReturned(node=node, instance=INSTANCE)
    return msgspec.structs.replace(event, node=node)


def lived_measures(lived: Lived) -> Measures:
    """Figures of one run; times in seconds."""
    waits = sorted([(started - submitted) / 1000 for submitted, started, _ in lived.jobs if started])
    times = sorted([(ended - submitted) / 1000 for submitted, _, ended in lived.jobs if ended])
    return {
        "run": lived.name,
        "jobs": len(lived.jobs),
        "avg_wait_s": round(sum(waits) / max(1, len(waits)), 1),
        "p50_wait_s": _part(waits, 0.5),
        "p99_wait_s": _part(waits, 0.99),
        "avg_jct_s": round(sum(times) / max(1, len(times)), 1),
        "p99_jct_s": _part(times, 0.99),
        "allocation_pct": round(100 * lived.held_milli_ms / max(1, lived.capacity_milli_ms), 2),
        "preemptions": lived.preemptions,
        "ended_in_time": sum(1 for _, _, ended in lived.jobs if 0 < ended <= lived.end_ms),
        "never_ended": sum(1 for _, _, ended in lived.jobs if not ended),
        "refused": lived.refused,
    }


def _part(ordered: list[float], at: float) -> float:
    return round(percentile(ordered, at), 1) if ordered else 0.0


def run_replay(sources: Sequence[Path], changed: Changed, policies: Sequence[str]) -> list[Measures]:
    """What was recorded, the same lived again, and the jobs of whole cards under other policies."""
    recorded = understand(recording_of(sources))
    unknown = sorted((changed.without | set(changed.more)) - nodes_of(recorded))
    if unknown:
        raise TraceError(f"there is no node {', '.join(unknown)} in the recording")
    lived = [as_recorded(recorded), Replay(recorded, changed).go()]
    return [lived_measures(one) for one in lived + [ordered(recorded, name) for name in policies]]


def nodes_of(recorded: Recorded) -> set[NodeId]:
    return {event.node for _, event in recorded.events if isinstance(event, NodeSeen)}


def ordered(recorded: Recorded, name: str) -> Lived:
    """The recorded jobs of whole cards under a policy of `simulate`, on as many equal nodes as there were cards for.

    Such policies know neither shares nor instances, nor nodes that come and go: what asks for less than a card is left
    out, and every node that was ever seen is there all the time.
    """
    seen = {event.node: len(event.inventory.devices) for _, event in recorded.events if isinstance(event, NodeSeen)}
    per_node = max(seen.values(), default=0)
    jobs = [job for job in recorded.jobs.values() if job.has_run_time and job.spec.need.gpus]
    if not per_node or not jobs:
        raise TraceError(f"policy {name}: no job of the recording that ended asked for whole cards")
    nodes = sum(seen.values()) // per_node
    made = [
        RunJob(
            TraceJob(
                number, (job.submitted_ms - recorded.begin_ms) / 1000, job.spec.replicas * job.spec.need.gpus,
                sum(attempt.run_ms for attempt in job.attempts) / 1000, tenant=job.tenant,
            ),
            0.0,
            job.spec.estimate_ms / 1000 if job.spec.estimate_ms else None,
        )
        for number, job in enumerate(sorted(jobs, key=lambda job: (job.submitted_ms, job.number)))
    ]  # fmt: skip
    largest = max(job.gpus for job in made)
    if largest > nodes * per_node:
        raise TraceError(f"policy {name}: a job asks for {largest} cards, equal nodes have {nodes * per_node}")
    run = JobsRun(made, nodes, per_node, job_policy(name, made, nodes, per_node))
    run.go()
    end_s = (recorded.end_ms - recorded.begin_ms) / 1000
    held = 0.0
    for (at_s, _, busy), (until_s, _, _) in zip(run.timeline, [*run.timeline[1:], (end_s, 0, 0)], strict=True):
        held += busy * max(0.0, min(until_s, end_s) - at_s)
    return Lived(
        name,
        tuple([
            (int(job.submit_s * 1000) + 1, int(job.first_start_s * 1000) + 1, int(job.finish_s * 1000) + 1)
            for job in made
        ]),
        int(end_s * 1000) + 1,
        int(held * 1_000_000),
        int(nodes * per_node * end_s * 1_000_000),
        sum(job.starts - 1 for job in made),
    )  # fmt: skip
