"""Everything at once, in any order: the whole core under every kind of work and trouble, judged decision by decision.

After each step: the invariants recounted from scratch, a twin that only applies records (`support.judge`, which judges
each start, claim and eviction by the rules just before it comes true), and nobody waits who could start. In the end all
heals, and every job comes to its end.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from support.judge import JudgedHarness
from support.machines import machine_settings
from support.mixed_yard import NUMBERS, MixedYard

numbers = st.integers(0, NUMBERS)
small = st.integers(0, 30)


class MixedMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.yard = MixedYard(JudgedHarness())

    @initialize(
        policy=st.integers(0, 3),
        wanted=st.lists(st.tuples(numbers, small), max_size=8),
        softly=st.integers(0, 10),
        day=st.integers(0, 2),
    )
    def the_yard_is_full_of_old_jobs(self, policy: int, wanted: list[tuple[int, int]], softly: int, day: int) -> None:
        self.yard.play("policy", policy, 0)
        if softly:
            self.yard.play("crowd", softly - 1, 0)
        for a, b in wanted:
            self.yard.play("submit", a, b)
        self.yard.play("obey", 0, 0)
        self.yard.play("obey", 0, 0)
        self.yard.play("days", day, 0)

    @rule(name=st.sampled_from(("submit", "submit", "crowd", "array", "dependent")), a=numbers, b=small)
    def tenants_submit(self, name: str, a: int, b: int) -> None:
        self.yard.play(name, a, b)

    @rule(name=st.sampled_from(("direct", "direct", "scale", "service", "load", "policy")), a=small, b=small)
    def somebody_directs(self, name: str, a: int, b: int) -> None:
        self.yard.play(name, a, b)

    @rule(name=st.sampled_from(("obey", "one obeys", "end", "end", "idle", "late")), a=small, b=small)
    def nodes_work(self, name: str, a: int, b: int) -> None:
        self.yard.play(name, a, b)

    @rule(name=st.sampled_from(("heard", "agent", "cordon", "card")), a=small, b=small)
    def something_happens_to_a_node(self, name: str, a: int, b: int) -> None:
        self.yard.play(name, a, b)

    @rule(name=st.sampled_from(("seconds", "minutes", "minutes", "days", "restart")), a=small)
    def time_passes(self, name: str, a: int) -> None:
        self.yard.play(name, a, 0)

    def teardown(self) -> None:
        self.yard.heal()


MixedMachine.TestCase.settings = machine_settings(25, 30)
TestMixed = MixedMachine.TestCase
