"""What a dry run says comes about: where everything happens, each job is asked about before it is submitted.

Said and compared: refused and why; started at once, where, and on what is kept for another or not; places freed for it
at once by others who have to leave; or none of these.
"""

from __future__ import annotations

from collections import Counter

from gpuyard_daemon.core.state.facts import ClaimMade, JobPlaced
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness
from support.mixed_yard import TENANTS, MixedYard, spec_of, story

STEPS = 70


def foretell(h: CoreHarness, spec: JobSpec, tenant: str) -> str:
    """Ask, submit, compare; in a word, what was foretold."""
    before = h.core.digest()
    told = h.core.plan(tenant, "alice", spec, h.now_ms)
    assert h.core.digest() == before
    number = h.submit(spec, tenant=tenant)
    if told.verdict == "rejected":
        assert told.refusal is not None
        assert told.refusal.reason == h.refused()
        return "rejected"
    placed = [fact for fact in h.new_facts(JobPlaced) if fact.job == number]
    freed = [fact for fact in h.new_facts(ClaimMade) if fact.job == number]
    if told.verdict == "waits":
        assert not placed, told.summary
        assert bool(freed) == ("would be freed for it at once" in told.summary), told.summary
        if freed:
            assert ("have to leave" in told.summary) == bool(freed[0].evictions)
        return "freed" if freed else "waits"
    assert placed, told.summary
    assert bool(placed[0].guest_of) == ("kept for another" in told.summary)
    views = h.view(number).placed[: len(placed[0].placements)]
    assert [(each.node, each.devices) for each in told.placed] == [(each.node, each.devices) for each in views]
    return "guest" if placed[0].guest_of else "starts"


def told_of(seeds: range) -> Counter[str]:
    said: Counter[str] = Counter()
    for seed in seeds:
        yard = MixedYard(CoreHarness())
        for name, a, b in story(seed, STEPS):
            if name == "submit":
                said[foretell(yard.harness, spec_of(a), TENANTS[b % 3])] += 1
                while yard.harness.last.unfinished:
                    yard.harness.turn()
            else:
                yard.play(name, a, b)
    return said


def test_what_is_foretold_comes_about_and_every_kind_of_answer_is_given() -> None:
    assert {"rejected", "waits", "starts", "freed", "guest"} <= told_of(range(23, 33)).keys()
