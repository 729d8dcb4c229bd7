"""Policy `gpuyard` for job traces: the production core with its shipped settings, over nodes of equal GPUs.

Nothing here decides. A job of the trace becomes a `JobSpec`: whole cards on one node, or a gang of replicas as large as
divides both the job and a node. It may be preempted with its progress kept, as in every preempting baseline; what a
stop costs it is the engine's restart cost. Where its duration is told, that is its `estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpuyard_daemon.sim.jobs_run import JobsRun, RunJob
from gpuyard_daemon.sim.simulated_yard import SimulatedYard, ms_at
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId, NodeId
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device, ResourceNeed, WholeCards

_CARD_MIB = 32_768
#: Per card: never what binds.
_CPU_MILLI = 4000
_MEMORY_MIB = 16_384


class CoreJobs:
    """The core's decisions, in the shape in which the engine asks for any policy's."""

    name = "gpuyard"

    def __init__(self, nodes: int, per_node: int) -> None:
        self._per_node = per_node
        self._numbers: dict[NodeId, int] = {f"node-{at + 1}": at for at in range(nodes)}
        self.yard = SimulatedYard([node_of(name, per_node) for name in self._numbers])
        self._new: list[RunJob] = []
        #: Numbers of the trace by the core's.
        self._jobs: dict[JobId, int] = {}
        self._of: dict[int, JobId] = {}

    def arrived(self, run: JobsRun, job: RunJob) -> None:
        self._new.append(job)

    def ended(self, run: JobsRun, job: RunJob) -> None:
        self.yard.at(ms_at(run.now_s))
        number = self._of.pop(job.number)
        del self._jobs[number]
        self.yard.end(number)

    def decide(self, run: JobsRun) -> None:
        yard = self.yard
        yard.at(ms_at(run.now_s))
        arrived, self._new = self._new, []
        expected = yard.core.cluster.last_job
        for at, job in enumerate(arrived, start=1):
            # Known before the turn: the first change may concern it.
            self._jobs[expected + at] = job.number
            self._of[job.number] = expected + at
        yard.submit([(job.tenant or "trace", spec_of(job, self._per_node)) for job in arrived])
        for change in yard.changes():
            job = run.jobs[self._jobs[change.job]]
            if change.runs:
                job.places = self._places(change.job)
                run.start(job)
            else:
                run.stop(job)

    def wake_s(self, run: JobsRun) -> float | None:
        return self.yard.wake_s(run.now_s)

    def free_levels(self, run: JobsRun) -> Sequence[int]:
        levels = [0] * (self._per_node + 1)
        for space in self.yard.core.cluster.pool.spaces.values():
            levels[space.idle_cards] += 1
        return levels

    def _places(self, job: JobId) -> tuple[tuple[int, int], ...]:
        found: dict[int, int] = {}
        for place in self.yard.places(job):
            cards = len(place.partition.devices) if isinstance(place.partition, WholeCards) else 0
            number = self._numbers[place.node]
            found[number] = found.get(number, 0) + cards
        return tuple(sorted(found.items()))


def node_of(name: str, gpus: int) -> Inventory:
    """A node with nothing but equal whole cards."""
    devices = tuple(
        Device(uuid=f"GPU-{name}-{index}", index=index, model="V100", memory_mib=_CARD_MIB, modes=("whole",))
        for index in range(gpus)
    )
    return Inventory(
        hostname=name, address="10.0.0.1", cpu_milli=_CPU_MILLI * gpus, memory_mib=_MEMORY_MIB * gpus, devices=devices
    )


def spec_of(job: RunJob, per_node: int) -> JobSpec:
    """The job as its owner would have submitted it."""
    each = job.gpus if job.gpus <= per_node else math.gcd(job.gpus, per_node)
    need = ResourceNeed(gpus=each, cpu_milli=_CPU_MILLI * each, memory_mib=_MEMORY_MIB * each)
    return JobSpec(
        argv=("train",), replicas=job.gpus // each, need=need, allow_pending=True, preemption="checkpoint",
        restart_ms=int(job.restart_cost_s * 1000),
        estimate_ms=max(1, int(job.estimate_s * 1000)) if job.estimate_s is not None else 0,
    )  # fmt: skip
