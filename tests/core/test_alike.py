"""Equal specifications are one object, whoever asked for them and whenever; and nothing else is."""

from __future__ import annotations

import msgspec

from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state import alike
from gpuyard_daemon.core.state.alike import Alike
from gpuyard_protocol.codec import decode, encode
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness, job, node


def copy_of(spec: JobSpec) -> JobSpec:
    """As another message would bring it."""
    return decode(JobSpec, encode(spec))


def test_jobs_of_one_kind_share_what_they_ask_for() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2))
    small, large = job(gpus=1), job(gpus=2)
    numbers = [h.submit(copy_of(spec)) for spec in (small, large, small)]
    first, second, third = (h.core.cluster.jobs[number].spec for number in numbers)
    assert first is third
    assert (first, second) == (small, large)
    restored = Scheduler.restore(h.core.snapshot(), h.settings)
    assert restored.cluster.jobs[numbers[0]].spec is restored.cluster.jobs[numbers[2]].spec
    assert restored.digest() == h.core.digest()


def test_kinds_of_equal_needs_share_those() -> None:
    known = Alike()
    one = known.of(copy_of(job(gpus=1, name="one")))
    other = known.of(copy_of(job(gpus=1, name="other")))
    assert one is not other
    assert one.need is other.need


def test_kinds_not_seen_for_long_are_forgotten() -> None:
    known = Alike()
    first = known.of(job(gpus=1, name="first"))
    for number in range(alike._SPECS_MAX):
        known.of(msgspec.structs.replace(first, name=f"other-{number}"))
    again = known.of(copy_of(first))
    assert again == first
    assert again is not first
