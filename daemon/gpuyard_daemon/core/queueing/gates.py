"""Which pending jobs wait for other jobs: their dependencies, and those alone of their name.

Derived: a dependency is open once its target has ended as asked, and a target that has left the core ended so, because
one that ended otherwise takes its dependents with it in the same turn. A job can only name jobs that exist, so there
are no cycles. The number of an array (its first job's) means the array: all its elements.

Who can never start is listed here as `doomed`; ending them is a decision, made in `dependencies`, so many a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TypeAlias

from gpuyard_daemon.core.state.arrays import Arrays
from gpuyard_daemon.core.state.model import Array, Job
from gpuyard_protocol.jobs import ENDED_AS, DependencyKind, Why
from gpuyard_protocol.names import JobId, Tenant, User

NEVER_SATISFIED = "DependencyNeverSatisfied"
_Group: TypeAlias = tuple[Tenant, User, str]
_VERBS: dict[DependencyKind, str] = {"afterok": "succeed", "afternotok": "not succeed", "afterany": "end"}
_DID: dict[DependencyKind, str] = {"afterok": "succeeded", "afternotok": "did not succeed", "afterany": "ended"}


def target_of(number: JobId, jobs: Mapping[JobId, Job], arrays: Arrays) -> Job | Array | None:
    """What a dependency's number means; None for what has been put away."""
    return arrays.records.get(number) or jobs.get(number)


def outcome(kind: DependencyKind, target: Job | Array) -> bool | None:
    """Whether a dependency is fulfilled; None while it may go either way."""
    if isinstance(target, Job):
        unfinished, well = int(not target.is_final), int(target.state == "succeeded")
        badly = 1 - unfinished - well
    else:
        unfinished, badly = target.unfinished, target.unsuccessful
        well = target.count - unfinished - badly
    if (kind == "afterok" and badly) or (kind == "afternotok" and well):
        return False
    return None if unfinished else True


def never(kind: DependencyKind, target: Job | Array) -> Why:
    """Why a dependency can no longer be fulfilled."""
    if isinstance(target, Job):
        what = f"job {target.id} {_DID[kind]}, but that {ENDED_AS[target.state]}"
    else:
        what = f"every element of array {target.id} {_DID[kind]}, but not all did"
    return Why(NEVER_SATISFIED, f"it was to start once {what}")


class Gates:
    """Who waits for whom."""

    __slots__ = ("_dependents", "_named", "_unmet", "doomed")

    def __init__(self) -> None:
        #: By the number of the job or array: who depends on it, and how.
        self._dependents: dict[JobId, list[tuple[JobId, DependencyKind]]] = {}
        #: Dependencies that are not fulfilled yet, where there are any.
        self._unmet: dict[JobId, int] = {}
        #: Jobs that have not ended, by owner and name, oldest first.
        self._named: dict[_Group, dict[JobId, None]] = {}
        #: Jobs that can never start, and why; they end in this turn or soon after.
        self.doomed: dict[JobId, Why] = {}

    def enter(self, job: Job, jobs: Mapping[JobId, Job], arrays: Arrays) -> None:
        """A job that has not ended, new or restored; targets are known before those who name them."""
        if _is_grouped(job):
            self._named.setdefault(_group(job), {})[job.id] = None
        for kind, number in job.spec.depends_on:
            target = target_of(number, jobs, arrays)
            met = outcome(kind, target) if target is not None else True
            if not met:
                self._unmet[job.id] = self._unmet.get(job.id, 0) + 1
            if met is None:
                self._dependents.setdefault(number, []).append((job.id, kind))
            elif target is not None and not met:
                self.doomed.setdefault(job.id, never(kind, target))

    def called(self, tenant: Tenant, user: User, name: str) -> tuple[JobId, ...]:
        """Jobs of an owner's that have a name and have not ended, oldest first."""
        return tuple(self._named.get((tenant, user, name), ()))

    def is_open(self, job: Job) -> bool:
        """No other job stands in the way."""
        if job.id in self._unmet:
            return False
        if not job.spec.singleton:
            return True
        return next(iter(self._named[_group(job)])) == job.id

    def is_awaited(self, job: Job, jobs: Mapping[JobId, Job]) -> bool:
        """Whether others may be free to start once it has ended."""
        if job.id in self._dependents or job.array in self._dependents:
            return True
        alike = islice(self._named.get(_group(job), ()) if _is_grouped(job) else (), 2)
        return job.id == next(alike, 0) and any(jobs[other].spec.singleton for other in alike)

    def leave(self, job: Job, jobs: Mapping[JobId, Job], arrays: Arrays) -> Iterable[JobId]:
        """A job has ended: who may be free to start now."""
        self._unmet.pop(job.id, None)
        self.doomed.pop(job.id, None)
        freed: list[JobId] = []
        if _is_grouped(job):
            same = self._named[_group(job)]
            del same[job.id]
            if same:
                freed.append(next(iter(same)))
            else:
                del self._named[_group(job)]
        for number in dict.fromkeys((job.id, job.array or job.id)):
            target = target_of(number, jobs, arrays)
            if number in self._dependents and target is not None and _is_news(target):
                freed += self._resolve(number, target, jobs)
        return freed

    def _resolve(self, number: JobId, target: Job | Array, jobs: Mapping[JobId, Job]) -> list[JobId]:
        """Something about a target has been decided: who is free, and who is doomed."""
        freed, left = [], []
        for dependent, kind in self._dependents.pop(number):
            met = outcome(kind, target)
            waiting = jobs.get(dependent)
            if waiting is None or waiting.is_final:
                continue
            if met is None:
                left.append((dependent, kind))
            elif not met:
                self.doomed.setdefault(dependent, never(kind, target))
            elif self._unmet[dependent] > 1:
                self._unmet[dependent] -= 1
            else:
                del self._unmet[dependent]
                freed.append(dependent)
        if left:
            self._dependents[number] = left
        return freed

    def why(self, job: Job, jobs: Mapping[JobId, Job], arrays: Arrays) -> Why | None:
        """What a pending job waits for, or would wait for if it were one; None if nothing of this kind."""
        waits = []
        for kind, number in job.spec.depends_on:
            target = target_of(number, jobs, arrays)
            if target is None or outcome(kind, target) is not None:
                continue
            what = f"job {number} ({target.state})" if isinstance(target, Job) else f"all of array {number}"
            waits.append(f"{what} to {_VERBS[kind]}")
        if job.spec.singleton and (first := next(iter(self._named.get(_group(job), ())), job.id)) != job.id:
            waits.append(f"job {first}, also named {job.spec.name!r}, to end")
        return Why("Dependency", f"waits for {', and '.join(waits)}") if waits else None


def _is_news(target: Job | Array) -> bool:
    """Whether the end of one job may have decided something: of an array the last end does, and the first of a kind."""
    if isinstance(target, Job):
        return True
    well = target.count - target.unfinished - target.unsuccessful
    return not target.unfinished or well == 1 or target.unsuccessful == 1


def _is_grouped(job: Job) -> bool:
    """It has a name; a service's replicas have their service's, which means something else."""
    return bool(job.spec.name) and not job.service


def _group(job: Job) -> _Group:
    return (job.tenant, job.user, job.spec.name)
