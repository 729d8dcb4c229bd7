"""Equal specifications as one object: a thousand jobs of one kind hold one, and that two are equal is seen at a glance.

What a job asks for is compared and looked up many times; where it is the very same object, both cost next to nothing.
Derived: whether two jobs share theirs matters to nothing but time and memory.
"""

from __future__ import annotations

from msgspec.structs import force_setattr

from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.resources import ResourceNeed

#: Kinds of jobs that are known at a time. A specification may be as large as a request, so not many; those that a
#: tenant submits in turn are few.
_SPECS_MAX = 256
_NEEDS_MAX = 1024


class Alike:
    """The specifications seen lately."""

    __slots__ = ("_last", "_needs", "_specs")

    def __init__(self) -> None:
        self._last = JobSpec()
        self._specs: dict[JobSpec, JobSpec] = {}
        self._needs: dict[ResourceNeed, ResourceNeed] = {}

    def of(self, spec: JobSpec) -> JobSpec:
        """The one that stands for all that equal it."""
        # Equal ones come one after the other more often than not.
        if spec is self._last or spec == self._last:
            return self._last
        known = self._specs.get(spec)
        if known is None:
            known = self._specs[spec] = spec
            # Equal for equal, so the specification stays what it was.
            force_setattr(spec, "need", self._need(spec.need))
            if len(self._specs) > _SPECS_MAX:
                del self._specs[next(iter(self._specs))]
        self._last = known
        return known

    def _need(self, need: ResourceNeed) -> ResourceNeed:
        known = self._needs.get(need)
        if known is None:
            known = self._needs[need] = need
            if len(self._needs) > _NEEDS_MAX:
                del self._needs[next(iter(self._needs))]
        return known
