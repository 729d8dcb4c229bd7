"""Who sees everything: what really ran, on which cards, and what the journal really says.

The witness believes nobody's books. Hosts tell it each process and each partition at the moment it exists; the broker
shows it each journal entry at the moment it is stored. `SafetyViolated` ends the simulation where it happened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.turn import Record
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.codec import decode
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
    def __init__(self) -> None:
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
        #: Digest of the twin after each of the newest turns.
        self.digests: dict[int, str] = {}

    # --- hosts ---

    def process_starts(self, node: str, key: AssignmentKey, launch: Launch) -> None:
        if key in self.runs:
            raise SafetyViolated(f"{key} runs a second time: on {node}, after {self.runs[key]}")
        for other, run in self.runs.items():
            if other.job == key.job and other.attempt != key.attempt and run.is_running:
                raise SafetyViolated(f"{key} starts on {node} while {other} still runs on {run.node}")
        for replica in range(launch.replicas):
            if AssignmentKey(key.job, key.attempt, replica) not in self.prepared:
                raise SafetyViolated(f"{key} starts before replica {replica} of its gang was prepared")
        self.runs[key] = Run(node)

    def process_ends(self, key: AssignmentKey, exit_code: int, signal: int, *, vanished: bool = False) -> None:
        run = self.runs[key]
        run.exit_code, run.signal, run.vanished = exit_code, signal, vanished

    def partition_made(
        self, node: str, key: AssignmentKey, devices: Iterable[Device], made: Iterable[Partition]
    ) -> None:
        self.prepared.add(key)
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
        if record.turn % 8 == 0:
            self.digests[record.turn] = self.twin.digest()

    def _check_fact(self, fact: f.Fact) -> None:
        match fact:
            case f.JobAccepted():
                name = (fact.tenant, fact.submission_id)
                if name in self.accepted:
                    raise SafetyViolated(f"submission {name} became job {self.accepted[name]} and job {fact.job}")
                self.accepted[name] = fact.job
            case f.JobEnded():
                if fact.job in self.ended:
                    raise SafetyViolated(f"job {fact.job} ended {self.ended[fact.job]}, and then {fact.state}")
                self.ended[fact.job] = fact.state
            case f.JobPlaced() if fact.job in self.ended:
                raise SafetyViolated(f"job {fact.job} was placed after it {self.ended[fact.job]}")
            case _:
                pass

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
