"""Policy `gpuyard` for job traces: the core's priority and exchange test over simulated gangs.

Jobs stay where they are: a move costs a restart like any other. Waiting jobs of equal size and level are equal, so only
the first of each is tried; a lift by waiting is a timer, never a scan.
"""

from __future__ import annotations

import heapq

from gpuyard_daemon.core.exchange import Plan, Victim, cheapest, has_credit, may_take
from gpuyard_daemon.core.prediction import SizeHistory
from gpuyard_daemon.core.priority import (
    LEVEL_TOP,
    PROBE_MS,
    Terms,
    lift_wait_ms,
    may_probe,
    natural_level,
    next_border_ms,
    size_of,
)
from gpuyard_daemon.sim.gang_nodes import GangNodes
from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob


class Dynamic:
    """The core's order in simulated time."""

    name = "gpuyard"

    def __init__(self, nodes: int, per_node: int) -> None:
        self._nodes = GangNodes(nodes, per_node)
        self._on_node: list[set[int]] = [set() for _ in range(nodes)]
        self._pool_gpus = nodes * per_node
        self._history = SizeHistory()
        #: Octave of use that each unfinished job has reached.
        self._reached: dict[int, int] = {}
        #: Running jobs as a claimant sees them; levels move only at borders.
        self._victims: dict[int, Victim] = {}
        #: Waiting jobs by GPUs: heaps of (level, sequence); an entry counts if it is the job's last.
        self._queues: dict[int, list[tuple[int, int]]] = {}
        #: Level under which each waiting job stands.
        self._level: dict[int, int] = {}
        #: Levels lifted by waiting; kept while running until the job outgrew what lifted it.
        self._lifted: dict[int, int] = {}
        #: (when, job, level then): lifts to come.
        self._lifts: list[tuple[float, int, int]] = []
        #: (when, job, generation): running jobs that change their level.
        self._borders: list[tuple[float, int, int]] = []

    # --- what the engine tells ---------------------------------------------------------------------------------------

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        self._lifted[job.number] = 0
        self._reached[job.number] = 0
        self._history.enter(0)
        self._wait(run, job)

    def ended(self, run: JobsRun, job: RunJob) -> None:
        self._note_use(run, job)
        self._history.end(self._reached.pop(job.number))
        self._leave(job)

    def wake_s(self, run: JobsRun) -> float | None:
        while self._lifts and self._level.get(self._lifts[0][1]) != self._lifts[0][2]:
            heapq.heappop(self._lifts)
        while self._borders and run.jobs[self._borders[0][1]].generation != self._borders[0][2]:
            heapq.heappop(self._borders)
        moments = [timers[0][0] for timers in (self._lifts, self._borders) if timers]
        return min(moments, default=None)

    def decide(self, run: JobsRun) -> None:
        self._lift_due(run)
        self._cross_due(run)
        blocked: set[int] = set()
        while (head := self._head(blocked)) is not None:
            job = run.jobs[head]
            places = self._nodes.find(job.gpus)
            if places is None:
                places = self._exchange(run, job)
            if places is None:
                blocked.add(job.gpus)
            else:
                self._start(run, job, places)

    # --- levels ------------------------------------------------------------------------------------------------------

    def _size(self, job: RunJob, now_s: float) -> int:
        """The size that decides: told, else 0 while probing, else what history expects of one that had so much."""
        attained_ms, estimate_ms = self._known(job, now_s)
        probes = may_probe(job.gpus, self._pool_gpus)
        size = size_of(job.gpus, attained_ms, estimate_ms, probes=probes)
        if estimate_ms is not None or (probes and attained_ms < PROBE_MS):
            return size
        return self._history.rank(natural_level(size))

    def _note_use(self, run: JobsRun, job: RunJob) -> None:
        octave = natural_level(job.gpus * self._known(job, run.now_s)[0])
        while self._reached[job.number] < octave:
            self._reached[job.number] += 1
            self._history.enter(self._reached[job.number])

    def _known(self, job: RunJob, now_s: float) -> tuple[int, int | None]:
        """Attained and estimated milliseconds."""
        estimate = None if job.estimate_s is None else int(job.estimate_s * 1000)
        return int(job.attained_at(now_s) * 1000 + 0.5), estimate

    def _terms(self, job: RunJob, now_s: float) -> Terms:
        return Terms(band=1, natural=natural_level(self._size(job, now_s)), lifted=self._lifted[job.number])

    def _wait(self, run: JobsRun, job: RunJob) -> None:
        level = self._terms(job, run.now_s).level
        self._level[job.number] = level
        heapq.heappush(self._queues.setdefault(job.gpus, []), (level, job.number))
        if level > LEVEL_TOP:
            when_s = run.now_s + lift_wait_ms(level, job.gpus) / 1000
            heapq.heappush(self._lifts, (when_s, job.number, level))

    def _lift_due(self, run: JobsRun) -> None:
        while self._lifts and self._lifts[0][0] <= run.now_s:
            _, number, level = heapq.heappop(self._lifts)
            if self._level.get(number) == level:
                self._lifted[number] += 1
                self._wait(run, run.jobs[number])

    def _cross_due(self, run: JobsRun) -> None:
        """A running job that outgrew its level is larger from now on, and its lifts are used up."""
        while self._borders and self._borders[0][0] <= run.now_s:
            _, number, generation = heapq.heappop(self._borders)
            job = run.jobs[number]
            if job.generation == generation:
                self._lifted[number] = 0
                self._note_use(run, job)
                self._watch(run, job)

    def _watch(self, run: JobsRun, job: RunJob) -> None:
        attained_ms, estimate_ms = self._known(job, run.now_s)
        probes = may_probe(job.gpus, self._pool_gpus)
        border_ms = next_border_ms(job.gpus, attained_ms, estimate_ms, probes=probes)
        when_s = job.since_s + job.overhead_s + border_ms / 1000 - job.attained_s
        cost = int(job.gpus * job.restart_cost_s * 1000)
        self._victims[job.number] = Victim(job.number, self._terms(job, run.now_s).level, job.gpus, cost)
        heapq.heappush(self._borders, (max(when_s, run.now_s + 0.001), job.number, job.generation))

    # --- places ------------------------------------------------------------------------------------------------------

    def _head(self, blocked: set[int]) -> int | None:
        best: tuple[int, int] | None = None
        for gpus, queue in self._queues.items():
            while queue and self._level.get(queue[0][1]) != queue[0][0]:
                heapq.heappop(queue)
            if queue and gpus not in blocked and (best is None or queue[0] < best):
                best = queue[0]
        return best[1] if best else None

    def _start(self, run: JobsRun, job: RunJob, places: tuple[tuple[int, int], ...]) -> None:
        del self._level[job.number]
        job.places = places
        self._nodes.take(places)
        for node, _ in places:
            self._on_node[node].add(job.number)
        run.start(job)
        self._watch(run, job)

    def _leave(self, job: RunJob) -> None:
        del self._victims[job.number]
        self._nodes.give(job.places)
        for node, _ in job.places:
            self._on_node[node].discard(job.number)

    def _exchange(self, run: JobsRun, job: RunJob) -> tuple[tuple[int, int], ...] | None:
        """Stop whom the exchange test gives up, if that makes room for the whole gang; then its places."""
        plan = self._plan(run, job)
        if plan is None:
            return None
        for number in plan.victims:
            victim = run.jobs[number]
            run.stop(victim)
            self._leave(victim)
            self._wait(run, victim)
        return self._nodes.find(job.gpus)

    def _plan(self, run: JobsRun, job: RunJob) -> Plan | None:
        per_node = self._nodes.per_node
        size, level = self._size(job, run.now_s), self._level[job.number]
        takeable = {
            number: victim
            for number, victim in self._victims.items()
            if victim.level > level
            and may_take(size, level, victim)
            and has_credit(
                int((running := run.jobs[number]).attained_at(run.now_s) * 1000),
                int(running.restart_cost_s * 1000),
                running.starts - 1,
            )
        }
        if not takeable:
            return None
        if job.gpus <= per_node:
            plans = [plan for node in range(run.nodes) if (plan := self._on(run, node, job.gpus, takeable, ()))]
            return min(plans, key=lambda plan: (plan.cost, plan.victims), default=None)
        return self._plan_spanning(run, job.gpus, takeable)

    def _on(
        self, run: JobsRun, node: int, gpus: int, takeable: dict[int, Victim], gone: tuple[int, ...]
    ) -> Plan | None:
        """How to free so many GPUs on one node, given who is gone already."""
        free = self._nodes.free[node]
        candidates = []
        for number in self._on_node[node]:
            here = sum(count for at, count in run.jobs[number].places if at == node)
            if number in gone:
                free += here
            elif number in takeable:
                candidates.append(takeable[number]._replace(gpus=here))
        missing = gpus - free
        return Plan((), 0) if missing <= 0 else cheapest(candidates, missing)

    def _plan_spanning(self, run: JobsRun, gpus: int, takeable: dict[int, Victim]) -> Plan | None:
        """Whole nodes and a rest, the cheapest node first; a gang once chosen frees its other nodes for nothing."""
        whole, rest = divmod(gpus, self._nodes.per_node)
        wanted = [self._nodes.per_node] * whole + ([rest] if rest else [])
        left = set(range(run.nodes))
        gone: tuple[int, ...] = ()
        cost = 0
        for count in wanted:
            options = [
                (plan.cost, node, plan) for node in sorted(left) if (plan := self._on(run, node, count, takeable, gone))
            ]
            if not options:
                return None
            added, node, plan = min(options)
            left.discard(node)
            gone += plan.victims
            cost += added
        return Plan(gone, cost)
