"""Policy `gpuyard` for pods: the production core with its shipped settings, over hosts of openb's format.

Nothing here decides. A pod becomes a `JobSpec`: whole cards, a share of one card by MPS (its memory in proportion, as
in the trace, which has no memory of GPUs), or CPUs alone; with the models that it names. All pods are one tenant's,
since the trace says nothing of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from gpuyard_daemon.sim.openb import WHOLE, Ask, HostShape
from gpuyard_daemon.sim.pods import PodChange
from gpuyard_daemon.sim.simulated_yard import SimulatedYard, ms_at
from gpuyard_daemon.sim.typical import TypicalTasks
from gpuyard_protocol.jobs import JobSpec, Preemption
from gpuyard_protocol.names import JobId
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import Device, ResourceNeed

TENANT = "pods"
#: Divisible by all thousandths: shares of memory are exact.
_CARD_MIB = 16_000


class CorePods:
    """A core, its hosts, and the pods on them."""

    def __init__(self, hosts: Sequence[HostShape], preemption: Preemption) -> None:
        self.yard = SimulatedYard([_inventory(host) for host in hosts], unhurried=True)
        self.capacity_milli = WHOLE * sum(host.gpus for host in hosts)
        self._preemption = preemption
        self._new: list[tuple[int, Ask]] = []
        self._departed: list[JobId] = []
        #: Pods by job, and jobs by pod.
        self._pods: dict[JobId, int] = {}
        self._of: dict[int, JobId] = {}

    @property
    def held_milli(self) -> int:
        return self.yard.core.cluster.pool.held_milli

    def place_round(self, asks: Sequence[Ask]) -> list[int]:
        """Hand in pods as one turn, one try each: who does not run then is cancelled."""
        yard = self.yard
        yard.at(yard.now_ms + 1)
        jobs = yard.submit([(TENANT, spec_of(ask, self._preemption)) for ask in asks])
        took_ns = yard.decided_ns
        running = {change.job for change in yard.changes() if change.runs}
        dropped = [yard.cancel(TENANT, job) for job in jobs if job not in running]
        if dropped:
            yard.take(dropped)
        return [took_ns // len(asks)] * len(asks)

    def arrive(self, pod: int, ask: Ask) -> None:
        self._new.append((pod, ask))

    def depart(self, pod: int) -> None:
        job = self._of.pop(pod)
        del self._pods[job]
        self._departed.append(job)

    def settle(self, now_s: float) -> list[PodChange]:
        yard = self.yard
        yard.at(ms_at(now_s))
        for job in self._departed:
            yard.end(job)
        arrived, self._new, self._departed = self._new, [], []
        jobs = yard.submit([(TENANT, spec_of(ask, self._preemption)) for _, ask in arrived])
        for job, (pod, _) in zip(jobs, arrived, strict=True):
            self._pods[job], self._of[pod] = pod, job
        return [PodChange(self._pods[change.job], change.runs) for change in yard.changes()]

    def wake_s(self, now_s: float) -> float | None:
        return self.yard.wake_s(now_s)

    def unusable_milli(self, typical: TypicalTasks) -> float:
        unusable = 0.0
        for space in self.yard.core.cluster.pool.spaces.values():
            free = tuple([WHOLE - min(WHOLE, card.milli) for card in space.cards])
            unusable += typical.idle_unusable(space.cards[0].device.model, space.cpu_free_milli, free)
        return unusable


def _inventory(host: HostShape) -> Inventory:
    devices = tuple(
        Device(
            uuid=f"GPU-{host.name}-{index}", index=index, model=host.model, memory_mib=_CARD_MIB,
            modes=("whole", "mps"), mps_clients_max=WHOLE,
        )
        for index in range(host.gpus)
    )  # fmt: skip
    return Inventory(
        hostname=host.name, address="10.0.0.1", cpu_milli=host.cpu_milli, memory_mib=host.memory_mib, devices=devices
    )


@cache
def spec_of(ask: Ask, preemption: Preemption) -> JobSpec:
    """The job that a pod is."""
    whole = ask.gpus if ask.milli == WHOLE else 0
    need = ResourceNeed(
        gpus=whole, share_milli=0 if whole else ask.gpus * ask.milli, models=ask.models, cpu_milli=ask.cpu_milli,
        memory_mib=ask.memory_mib,
    )  # fmt: skip
    return JobSpec(argv=("pod",), need=need, allow_pending=True, preemption=preemption)
