"""Who sees everything: what really ran, on which cards, and what the journal really says.

The witness believes nobody's books. Hosts tell it each process and each partition at the moment it exists; the broker
shows it each journal entry at the moment it is stored. `SafetyViolated` ends the simulation where it happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from faults.scale import SMALL, Scale
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.turn import Record
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.codec import decode
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import AssignmentKey, JobId
from gpuyard_protocol.nodes import Launch
from gpuyard_protocol.resources import Device, MigInstance, MpsShare, Partition, TimeSliceShare, WholeCards, devices_of
from gpuyard_protocol.subjects import JOURNAL_ENTRY
from gpuyard_protocol.units import MILLI


class SafetyViolated(Exception):
    """Something happened that must never happen, whatever fails."""


@dataclass(slots=True)
class Run:
    """One process, from its start to its end."""

    node: str
    #: None while it runs.
    exit_code: int | None = None
    signal: int = 0
    vanished: bool = False

    @property
    def is_running(self) -> bool:
        return self.exit_code is None


class Witness:
    def __init__(self, scale: Scale = SMALL) -> None:
        self._scale = scale
        self.runs: dict[AssignmentKey, Run] = {}
        #: Keys whose partition was made at some time.
        self.prepared: set[AssignmentKey] = set()
        #: A core that only applies what the journal holds.
        self.twin = Scheduler()
        self.records = 0
        #: (tenant, submission) -> the job it became.
        self.accepted: dict[tuple[str, str], JobId] = {}
        #: Final states by job.
        self.ended: dict[JobId, str] = {}
        #: How often something came about that not every seed brings.
        self.seen: Counter[str] = Counter()
        #: Digest of the twin after each of the newest turns.
        self.digests: dict[int, str] = {}
        #: What keeps jobs back while others go: their specifications, where they say anything of the kind.
        self._tied: dict[JobId, JobSpec] = {}
        #: By tenant and name, what jobs are called so, oldest first; and how each is called. Elements of arrays by the
        #: first.
        self._alike: dict[tuple[str, str], list[JobId]] = {}
        self._called: dict[JobId, tuple[str, str]] = {}
        self._elements: dict[JobId, range] = {}
        #: How many replicas an attempt has.
        self._sizes: dict[tuple[JobId, int], int] = {}
        #: The most replicas that elastic jobs were ever to have.
        self._most: dict[JobId, int] = {}
        #: Keys by job: what of `runs` and `prepared` is forgotten with it.
        self._keys: dict[JobId, set[AssignmentKey]] = {}
        self._names: dict[JobId, tuple[str, str]] = {}
        #: 1 for each job that has left the core and of which nothing else is known here any more.
        self._forgotten = bytearray()
        #: Processes that ever started.
        self.processes = 0
        #: Jobs that have come to their end.
        self.jobs_ended = 0

    # --- hosts ---

    def process_starts(self, node: str, key: AssignmentKey, launch: Launch) -> None:
        if self._is_forgotten(key.job):
            raise SafetyViolated(f"{key} starts on {node} long after its job has ended")
        if key in self.runs:
            raise SafetyViolated(f"{key} runs a second time: on {node}, after {self.runs[key]}")
        for other in self._keys.get(key.job, ()):
            run = self.runs.get(other)
            if run is not None and other.attempt != key.attempt and run.is_running:
                raise SafetyViolated(f"{key} starts on {node} while {other} still runs on {run.node}")
        for replica in range(launch.replicas):
            if AssignmentKey(key.job, key.attempt, replica) not in self.prepared:
                raise SafetyViolated(f"{key} starts before replica {replica} of its gang was prepared")
        self._check_size(key, launch)
        self._check_throttle(key, launch)
        self.runs[key] = Run(node)
        self.processes += 1
        self._keys.setdefault(key.job, set()).add(key)

    def _check_size(self, key: AssignmentKey, launch: Launch) -> None:
        """An attempt has one size, and an elastic job's is between its ends; another size is another attempt."""
        size = self._sizes.setdefault((key.job, key.attempt), launch.replicas)
        if launch.replicas != size or not key.replica < size:
            raise SafetyViolated(f"{key} starts as one of {launch.replicas}, and its attempt has {size} replicas")
        if launch.replicas_min and not launch.replicas_min <= size <= self._most[key.job]:
            raise SafetyViolated(f"{key} is one of {size}, not {launch.replicas_min} to {self._most[key.job]}")

    def _check_throttle(self, key: AssignmentKey, launch: Launch) -> None:
        """Of an array with a throttle so many elements run at once, and no more."""
        others, spec = self._elements.get(launch.array_job), self._tied.get(launch.array_job)
        if others is None or spec is None or spec.array is None or not spec.array.at_once:
            return
        running = {
            each.job
            for job in others
            for each in self._keys.get(job, ())
            if each in self.runs and self.runs[each].is_running
        }
        if len(running | {key.job}) > spec.array.at_once:
            raise SafetyViolated(f"{key} starts beside {sorted(running)}: {spec.array.at_once} may go at once")

    def process_ends(self, key: AssignmentKey, exit_code: int, signal: int, *, vanished: bool = False) -> None:
        run = self.runs[key]
        run.exit_code, run.signal, run.vanished = exit_code, signal, vanished

    def partition_made(
        self, node: str, key: AssignmentKey, devices: Iterable[Device], made: Iterable[Partition]
    ) -> None:
        self.prepared.add(key)
        self._keys.setdefault(key.job, set()).add(key)
        partitions = list(made)
        for device in devices:
            held = [partition for partition in partitions if device.uuid in devices_of(partition)]
            if problem := _over_committed(device, held):
                raise SafetyViolated(f"{node}, with {key}: card {device.uuid} {problem}")

    # --- the journal ---

    def stored(self, message: StoredMessage) -> None:
        if message.subject != JOURNAL_ENTRY:
            return
        record = decode(Record, message.data, max_bytes=8 * 1024 * 1024)
        if record.turn != self.records + 1:
            raise SafetyViolated(f"journal entry {message.sequence} is turn {record.turn} after turn {self.records}")
        self.records = record.turn
        for fact in record.facts:
            self._check_fact(fact)
        self.twin.apply(record)
        for fact in record.facts:
            if isinstance(fact, f.ArrayCancelled):
                self._end_array(fact.array)
        for fact in record.facts:
            # One turn may end an array, by one fact for all of its elements, and place who waited for that.
            if isinstance(fact, f.JobPlaced):
                self._check_turn(fact.job)
        if record.turn % self._scale.digest_every == 0:
            self.digests[record.turn] = self.twin.digest()
            if self._scale.forgets and len(self.digests) > 100:
                del self.digests[next(iter(self.digests))]

    def _check_fact(self, fact: f.Fact) -> None:
        match fact:
            case f.JobAccepted():
                name = (fact.tenant, fact.submission_id)
                if name in self.accepted:
                    raise SafetyViolated(f"submission {name} became job {self.accepted[name]} and job {fact.job}")
                self._accept(name, fact.job, fact.spec)
            case f.ArrayAccepted():
                name = (fact.tenant, fact.submission_id)
                if name in self.accepted:
                    raise SafetyViolated(f"submission {name} became job {self.accepted[name]} and array {fact.first}")
                assert fact.spec.array is not None
                elements = range(fact.first, fact.first + fact.spec.array.count)
                for job in elements:
                    self._accept(name, job, fact.spec, elements)
                self.accepted[name] = fact.first
                self.seen["arrays"] += 1
            case f.JobEnded():
                if fact.job in self.ended:
                    raise SafetyViolated(f"job {fact.job} ended {self.ended[fact.job]}, and then {fact.state}")
                self.ended[fact.job] = fact.state
                self.jobs_ended += 1
            case f.JobRetired() if self._scale.forgets:
                self._forget(fact.job)
            case f.JobPlaced() if fact.job in self.ended:
                raise SafetyViolated(f"job {fact.job} was placed after it {self.ended[fact.job]}")
            case f.ClaimMade(evictions=evictions):
                self.seen.update([f"preempted by {eviction.kind}" for eviction in evictions])
                self.seen[f"claims to {fact.kind}"] += 1
            case f.JobScaled():
                self._most[fact.job] = max(self._most[fact.job], fact.replicas)
            case f.JobWidened():
                self.seen["begun wider"] += 1
            case f.JobResizing():
                self.seen["resized"] += 1
            case f.CardSwitched():
                self.seen["cards switched"] += 1
            case f.JobSuspending():
                self.seen["suspended by its owner"] += 1
            case f.ReplicaSuspended():
                self.seen["suspended"] += 1
            case f.ReplicaResumed():
                self.seen["resumed"] += 1
            case _:
                pass

    def _accept(self, name: tuple[str, str], job: JobId, spec: JobSpec, elements: range | None = None) -> None:
        self.accepted[name] = job
        self._names[job] = name
        if spec.min_replicas:
            self._most[job] = spec.replicas
        if spec.depends_on or spec.singleton or elements:
            self._tied[job] = spec
        if spec.name:
            self._called[job] = (name[0], spec.name)
            self._alike.setdefault((name[0], spec.name), []).append(job)
        if elements:
            self._elements[elements[0]] = elements

    def _end_array(self, array: JobId) -> None:
        """Those of its elements that waited are over by one fact."""
        jobs = self.twin.cluster.jobs
        for number in self._elements.get(array, ()):
            if number in jobs and jobs[number].is_final and number not in self.ended:
                self.ended[number] = jobs[number].state
                self.jobs_ended += 1

    def _check_turn(self, job: JobId) -> None:
        """It is placed after those that it was to wait for, and if they ended as it was to be."""
        spec = self._tied.get(job)
        if spec is None:
            return
        self.seen["placed after others"] += 1
        for kind, number in spec.depends_on:
            for target in self._elements.get(number, (number,)):
                ended = self.ended.get(target)
                if ended is None and not self._is_forgotten(target):
                    raise SafetyViolated(f"job {job} was placed before job {target} has ended")
                if (kind == "afterok" and ended not in (None, "succeeded")) or (
                    kind == "afternotok" and ended == "succeeded"
                ):
                    raise SafetyViolated(f"job {job} was placed although job {target} {ended}: {kind}")
        for other in self._alike[self._called[job]] if spec.singleton else ():
            if other < job and other not in self.ended:
                raise SafetyViolated(f"job {job} was placed beside job {other}, which has its name")

    def _is_forgotten(self, job: JobId) -> bool:
        return job < len(self._forgotten) and bool(self._forgotten[job])

    def _forget(self, job: JobId) -> None:
        """A job has left the core: from here on, all that is known of it is that it must never be seen again."""
        for key in self._keys.pop(job, ()):
            run = self.runs.pop(key, None)
            if run is not None and run.is_running:
                raise SafetyViolated(f"{key} still runs on {run.node}, and its job has left the yard's memory")
            self.prepared.discard(key)
            self._sizes.pop((job, key.attempt), None)
        self.ended.pop(job, None)
        self.accepted.pop(self._names.pop(job, ("", "")), None)
        self._most.pop(job, None)
        self._elements.pop(job, None)
        self._tied.pop(job, None)
        if (called := self._called.pop(job, None)) is not None:
            self._alike[called].remove(job)
        self._forgotten.extend(bytes(max(0, job + 1 - len(self._forgotten))))
        self._forgotten[job] = 1

    def check_leader(self, core: Scheduler) -> None:
        """A leader's state is what the journal says, and nothing else."""
        expected = self.digests.get(core.turn)
        if expected is not None and expected != core.digest():
            raise SafetyViolated(f"after turn {core.turn} the leader's state is not what its journal says")


def _over_committed(device: Device, held: list[Partition]) -> str:
    """What is wrong with these partitions together on one card; "" if nothing."""
    if len({type(partition) for partition in held}) > 1:
        return f"is in two modes at once: {held}"
    if len(held) > 1 and isinstance(held[0], WholeCards):
        return f"is given whole to {len(held)}"
    shares = [partition for partition in held if isinstance(partition, MpsShare | TimeSliceShare)]
    if sum(share.memory_mib for share in shares) > device.memory_mib:
        return f"has more memory promised than it has: {shares}"
    if shares and isinstance(shares[0], MpsShare) and sum(share.share_milli for share in shares) > MILLI:
        return f"has more compute promised than it has: {shares}"
    slices: set[int] = set()
    for instance in held:
        if isinstance(instance, MigInstance):
            mine = set(range(instance.start, instance.start + instance.size))
            if slices & mine:
                return f"has overlapping MIG instances: {held}"
            slices |= mine
    return ""
