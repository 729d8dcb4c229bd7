"""The production core with simulated nodes: inputs in, who runs and who stopped out, time given from outside.

Nodes answer orders at once and without fault: `Start` with `Started`, a gang's with `Prepared` and after `Go` with
`Started`, `Stop` with `Ended`. Answers are a turn of their own at the same moment, so nothing is decided on what a real
node would not have reported; in an unhurried yard word of starts comes with the next turn. What a job needs after its
start (restart cost, progress, end) is for the caller to know.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import CancelRequested, Cursors, Input, JobSubmitted, NodeReported
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.state.turn import AnswerNotice, NodeOrders, Record, Turn
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey, JobId, NodeId, Tenant, User
from gpuyard_protocol.nodes import (
    Ended,
    Go,
    Inventory,
    Joined,
    Prepared,
    Report,
    Resume,
    Resumed,
    Start,
    Started,
    Stop,
    Suspend,
    Suspended,
)
from gpuyard_protocol.resources import Partition

#: Where simulated time begins, Unix milliseconds: a Monday at midnight, UTC.
BEGIN_MS = 1_700_438_400_000
INSTANCE = "simulated"
_BOOT = "simulated"


def ms_at(now_s: float) -> int:
    """The core's time at a moment of simulated time."""
    return BEGIN_MS + round(now_s * 1000)


class Place(NamedTuple):
    """Where one replica runs."""

    node: NodeId
    partition: Partition


class Change(NamedTuple):
    """A job as a whole began to run, or stopped before its end."""

    job: JobId
    runs: bool


class _Running:
    """An attempt of a job on its nodes."""

    __slots__ = ("is_told", "places", "started", "waits")

    def __init__(self, replicas: int) -> None:
        self.places: dict[AssignmentKey, Place] = {}
        #: Replicas that have not been started yet.
        self.waits = replicas
        self.started = False
        #: Its stop was told as a change already.
        self.is_told = False


class SimulatedYard:
    """One core and its nodes."""

    def __init__(
        self,
        inventories: Sequence[Inventory],
        settings: CoreSettings | None = None,
        begin_ms: int = BEGIN_MS,
        *,
        keep_records: bool = False,
        unhurried: bool = False,
    ) -> None:
        self.core = Scheduler(settings)
        self.now_ms = begin_ms
        #: Time spent in the core, nanoseconds: in all, and in the last call's first turn, which decided.
        self.spent_ns = 0
        self.decided_ns = 0
        self.turns = 0
        #: Whether word of starts waits for the next turn, as in a busy yard, and causes none of its own.
        self._unhurried = unhurried
        #: Answers that do not wait.
        self._urgent = 0
        self._cursor = 0
        self._reported: dict[NodeId, int] = {}
        self._answers: dict[NodeId, list[Report]] = {}
        self._running: dict[JobId, _Running] = {}
        self._changes: list[Change] = []
        #: What the journal would hold; None: not kept.
        self.records: list[Record] | None = [] if keep_records else None
        #: Jobs of the requests of this call, in order, and requests that were refused.
        self._accepted: list[JobId] = []
        self._refused: list[str] = []
        for inventory in inventories:
            self.join(inventory.hostname, inventory)
        self.take([])

    # --- time --------------------------------------------------------------------------------------------------------

    def at(self, now_ms: int) -> None:
        """Time passes; what the core wanted to do meanwhile is done by the next `take`."""
        self.now_ms = max(self.now_ms, now_ms)

    def wake_s(self, now_s: float) -> float | None:
        """When, in seconds since the beginning, the core wants a turn though nothing happens."""
        deadline_ms = self.core.next_deadline_ms()
        if deadline_ms is None:
            return None
        # What was due already had its turn at this moment; the core wants the next one.
        return max(deadline_ms - BEGIN_MS, ms_at(now_s) + 1 - BEGIN_MS) / 1000

    # --- what happens ------------------------------------------------------------------------------------------------

    def join(self, node: NodeId, inventory: Inventory) -> None:
        """A node joins, for the first time or again; the core hears of it with the next `take`."""
        self._answer(node, Joined(inventory=inventory, held=self._held_by(node)))

    def _held_by(self, node: NodeId) -> tuple[AssignmentKey, ...]:
        held = [key for run in self._running.values() for key, place in run.places.items() if place.node == node]
        return tuple(sorted(held))

    def submit(self, specs: Sequence[tuple[Tenant, JobSpec]]) -> list[JobId]:
        """Hand in jobs in one turn; their numbers. Whether they run now, `changes` tells."""
        jobs = self.request([(tenant, tenant, spec) for tenant, spec in specs])
        if self._refused:
            raise RuntimeError(f"the core refused {len(self._refused)} jobs, the first because: {self._refused[0]}")
        return jobs

    def request(self, specs: Sequence[tuple[Tenant, User, JobSpec]], also: Sequence[Input] = ()) -> list[JobId]:
        """The same with users, after `also` in the same turn; an array has its first job's number, 0: refused."""
        self._accepted, self._refused = [], []
        first = self._cursor + 1
        requests = [
            JobSubmitted(tenant=tenant, user=user, submission_id=f"s{first + at}", spec=spec)
            for at, (tenant, user, spec) in enumerate(specs)
        ]
        self.take([*also, *requests])
        return self._accepted

    def cancel(self, tenant: Tenant, job: JobId) -> CancelRequested:
        """The input that cancels a job."""
        return CancelRequested(tenant=tenant, user=tenant, submission_id=f"c{job}", job=job)

    def end(self, job: JobId, exit_code: int = 0, code: str = "") -> None:
        """All replicas of a job end by themselves; the core hears of it with the next `take`."""
        for key, place in self._running.pop(job).places.items():
            ended = Ended(key=key, outcome="exited", at_ms=self.now_ms, exit_code=exit_code, code=code)
            self._answer(place.node, ended)

    def take(self, inputs: Sequence[Input]) -> None:
        """Let the core decide about inputs and all that nodes have to say, until nobody has anything more to say."""
        given = list(inputs)
        self.decided_ns = 0
        while True:
            turn = self._handle(given + self._reports())
            for batch in turn.orders:
                self._obey(batch)
            given = []
            if not turn.unfinished and not (self._urgent if self._unhurried else self._answers):
                return

    def changes(self) -> list[Change]:
        """Who began to run and who was stopped since this was last asked, in that order of time."""
        told, self._changes = self._changes, []
        return told

    def places(self, job: JobId) -> list[Place]:
        """Where a running job is, by replica."""
        return list(self._running[job].places.values())

    # --- the core ----------------------------------------------------------------------------------------------------

    def _handle(self, inputs: Sequence[Input]) -> Turn:
        self._cursor += max(1, len(inputs))
        began = time.perf_counter_ns()
        turn = self.core.handle(inputs, self.now_ms, Cursors(self._cursor, self._cursor))
        spent_ns = time.perf_counter_ns() - began
        self.spent_ns += spent_ns
        self.decided_ns = self.decided_ns or spent_ns
        self.turns += 1
        if self.records is not None and turn.record is not None:
            self.records.append(turn.record)
        for notice in turn.notices:
            if isinstance(notice, AnswerNotice) and notice.answer.submission_id.startswith("s"):
                answer = notice.answer
                self._accepted.append(answer.job if answer.accepted else 0)
                if answer.reason is not None and not answer.accepted:
                    self._refused.append(answer.reason.text)
        return turn

    # --- the nodes ---------------------------------------------------------------------------------------------------

    def _answer(self, node: NodeId, report: Report) -> None:
        self._answers.setdefault(node, []).append(report)
        self._urgent += not isinstance(report, Started)

    def _reports(self) -> list[Input]:
        told: list[Input] = []
        for node, reports in self._answers.items():
            first = self._reported.get(node, 0) + 1
            self._reported[node] = first + len(reports) - 1
            told.append(NodeReported(node=node, instance=INSTANCE, boot_id=_BOOT, first=first, reports=tuple(reports)))
        self._answers = {}
        self._urgent = 0
        return told

    def _obey(self, batch: NodeOrders) -> None:
        for order in batch.orders:
            match order:
                case Start(key=key, partition=partition, launch=launch, hold=hold):
                    attempt = self._running.get(key.job)
                    if attempt is None:
                        attempt = self._running[key.job] = _Running(launch.replicas)
                    attempt.places[key] = Place(batch.node, partition)
                    if hold:
                        self._answer(batch.node, Prepared(key=key, port=29_500))
                    else:
                        self._start(batch.node, key, attempt)
                case Go(key=key):
                    self._start(batch.node, key, self._running[key.job])
                case Stop(key=key):
                    self._stop(batch.node, key)
                case Suspend(key=key, step=step):
                    self._answer(batch.node, Suspended(key=key, step=step, at_ms=self.now_ms, image_mib=0, took_ms=0))
                    self._changes.append(Change(key.job, runs=False))
                case Resume(key=key, step=step):
                    self._answer(batch.node, Resumed(key=key, step=step, at_ms=self.now_ms, took_ms=0))
                    self._changes.append(Change(key.job, runs=True))

    def _start(self, node: NodeId, key: AssignmentKey, attempt: _Running) -> None:
        self._answer(node, Started(key=key, at_ms=self.now_ms))
        attempt.waits -= 1
        if not attempt.waits:
            attempt.started = True
            self._changes.append(Change(key.job, runs=True))

    def _stop(self, node: NodeId, key: AssignmentKey) -> None:
        attempt = self._running.get(key.job)
        if attempt is None or key not in attempt.places:
            return
        del attempt.places[key]
        self._answer(node, Ended(key=key, outcome="stopped", at_ms=self.now_ms))
        if attempt.started and not attempt.is_told:
            attempt.is_told = True
            self._changes.append(Change(key.job, runs=False))
        if not attempt.places:
            del self._running[key.job]
