"""Instances, shares and whole cards want the same cards in any order: cards do not flap, none is kept free too long or
too often, every geometry is legal, and who fits an empty card starts in the end.

After every step the harness checks the invariants and the twin that only applies records; here every fact about cards
is judged again from what was seen from outside.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gpuyard_daemon.core.placing.feasibility import Shape, judge
from gpuyard_daemon.core.placing.switching import KEEPS_FACTOR
from gpuyard_daemon.core.preempting.draining import PATIENCE_MS, REST_MS
from gpuyard_daemon.core.state.facts import CardSwitched, ClaimMade, JobPlaced
from gpuyard_daemon.core.state.inputs import CancelRequested
from gpuyard_daemon.core.state.turn import Turn
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import MigInstance, Partition, WholeCards, devices_of
from support.builders import H100_PROFILES, CoreHarness, gpu, job, node
from support.core_world import World
from support.machines import machine_settings

#: A card that is reset, one that is not, and a modelled one.
SWITCH_MS = (10_000, 2_000, 0)
NODES = ("n-1", "n-2")
STARTS = {profile.name: profile.starts for profile in H100_PROFILES}


def inventory(name: str) -> Inventory:
    devices = [
        msgspec.structs.replace(gpu(index, node=name), mig_switch_ms=SWITCH_MS[index])
        for index in range(len(SWITCH_MS))
    ]
    return node(name, devices=devices)


def let_pass(harness: CoreHarness, ms: int) -> None:
    """Like `settle`, and as the daemon does: a turn that says so is followed by the next at once."""
    end_ms = harness.now_ms + ms
    while True:
        while harness.last.unfinished:
            harness.turn()
        due_ms = harness.core.next_deadline_ms()
        if due_ms is None or due_ms > end_ms:
            break
        harness.turn(after_ms=max(0, due_ms - harness.now_ms))
    harness.now_ms = end_ms


def story(seed: int, restart_every: int) -> list[bytes]:
    """What a core wrote down about a yard in pieces; `restart_every`: it was restored after so many turns."""
    dice = random.Random(seed)
    harness = CoreHarness(restart_every=restart_every)
    world = World(harness, [inventory(name) for name in NODES])
    for target in world.nodes.values():
        world.join(target)
    for _ in range(40):
        wanted = [
            msgspec.structs.replace(
                job(**dice.choice(WANTS)), preemption="never", estimate_ms=dice.choice((0, 1, 9)) * 60_000
            )
            for _ in range(dice.randrange(5))
        ]
        if wanted:
            harness.submit_many(wanted)
        for target in world.nodes.values():
            world.sync(target)
            world.deliver(target)
            live = target.live("running")
            for key in dice.sample(live, dice.randrange(len(live) + 1) // 3):
                world.end(target, key, "exited")
            world.deliver(target)
        let_pass(harness, dice.choice((1, 10, 30, 70, 400)) * 1000)
    return [msgspec.json.encode(record) for record in harness.records]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_core_that_is_restored_after_every_turn_decides_the_same(seed: int) -> None:
    assert story(seed, 0) == story(seed, 1)


class JudgedHarness(CoreHarness):
    """A harness that judges every switch and every card kept free."""

    def __init__(self) -> None:
        super().__init__()
        #: By card: how it was used last (in MIG mode or not), when it switched, and when it was last kept free.
        self.in_mig: dict[str, bool] = {}
        self.switched: dict[str, int] = {}
        self.drained: dict[str, int] = {}

    def turn(self, *inputs: Any, after_ms: int = 0) -> Turn:
        turn = super().turn(*inputs, after_ms=after_ms)
        seen: set[str] = set()
        for placed in self.new_facts(JobPlaced):
            for placement in placed.placements:
                seen |= self._judge_place(placement.node, placement.partition)
        assert seen == {fact.card for fact in self.new_facts(CardSwitched)}
        for claim in self.new_facts(ClaimMade):
            if claim.kind == "drain":
                self._judge_drain(claim)
        kept = [claim for claim in self.core.cluster.claims if claim.kind == "drain"]
        assert len(kept) <= 1, "one card in a hundred, and at least one"
        return turn

    def _judge_place(self, name: str, partition: Partition) -> set[str]:
        """The cards that switch for it."""
        seen = set()
        cards = self.core.cluster.pool.spaces[name].by_uuid
        for uuid in devices_of(partition):
            wants = isinstance(partition, MigInstance)
            switch_ms = cards[uuid].device.mig_switch_ms
            if switch_ms and wants != self.in_mig.get(uuid, False):
                last_ms = self.switched.get(uuid)
                assert last_ms is None or self.now_ms - last_ms >= KEEPS_FACTOR * switch_ms, "flaps"
                self.in_mig[uuid], self.switched[uuid] = wants, self.now_ms
                seen.add(uuid)
        if isinstance(partition, MigInstance):
            assert partition.start in STARTS[partition.profile], "illegal geometry"
        return seen

    def _judge_drain(self, claim: ClaimMade) -> None:
        cluster = self.core.cluster
        assert cluster.jobs[claim.job].waits_since_ms + PATIENCE_MS <= self.now_ms
        (placement,) = claim.placements
        assert isinstance(placement.partition, MigInstance | WholeCards)
        for uuid in devices_of(placement.partition):
            card = cluster.pool.spaces[placement.node].by_uuid[uuid]
            if card.held:
                last_ms = self.drained.get(uuid)
                assert last_ms is None or self.now_ms - last_ms >= REST_MS - self.settings.preempt_every_ms
            self.drained[uuid] = self.now_ms


WANTS: tuple[dict[str, Any], ...] = (
    {"gpus": 1}, {"gpus": 2}, {"share_milli": 300}, {"share_milli": 500, "isolation": "hard"}, {"mig": "1g.10gb+me"},
    {"mig": "1g.10gb"}, {"mig": "1g.10gb"}, {"mig": "2g.20gb"}, {"mig": "3g.40gb"}, {"mig": "4g.40gb"},
    {"mig": "7g.80gb"},
)  # fmt: skip


def some(*wants: dict[str, Any], minutes: tuple[int, ...] = (0, 0, 1, 5, 60)) -> st.SearchStrategy[JobSpec]:
    return st.builds(
        lambda want, kind, estimate: msgspec.structs.replace(
            job(**want), preemption=kind, estimate_ms=estimate * 60_000, restart_ms=600_000
        ),
        st.sampled_from(wants),
        st.sampled_from(("never", "never", "requeue", "checkpoint")),
        st.sampled_from(minutes),
    )


specs = some(*WANTS)
pieces = some(*[want for want in WANTS if want.get("mig") in ("1g.10gb", "2g.20gb", "3g.40gb")], minutes=(5, 60))
large = some({"gpus": 1}, {"mig": "4g.40gb"}, {"mig": "7g.80gb"}, minutes=(60, 600))


class MigMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.harness = JudgedHarness()
        self.world = World(self.harness, [inventory(name) for name in NODES])
        for target in self.world.nodes.values():
            self.world.join(target)
        self.requests = 0

    @initialize(
        small=st.lists(pieces, min_size=12, max_size=30), kept=st.sets(st.integers(0, 29), max_size=8), data=st.data()
    )
    def the_yard_is_in_pieces(self, small: list[JobSpec], kept: set[int], data: st.DataObject) -> None:
        """Many small instances came, and most of them have ended."""
        numbers = self.harness.submit_many(small)
        self.nodes_obey()
        for at, number in enumerate(numbers):
            if at not in kept:
                self.end(number)
        self.submit(data.draw(st.lists(large, min_size=1, max_size=4)))
        self.time_passes(data.draw(st.sampled_from((60, 120))))

    def end(self, number: int) -> None:
        for target in self.world.nodes.values():
            for key in target.live("running"):
                if key.job == number:
                    self.world.end(target, key, "exited")
                    self.world.deliver(target)

    @rule(wanted=st.lists(specs, min_size=1, max_size=8))
    def submit(self, wanted: list[JobSpec]) -> None:
        self.harness.submit_many(wanted)
        self.nodes_obey()

    @rule(seconds=st.sampled_from((1, 5, 20, 60, 100, 601)))
    def time_passes(self, seconds: int) -> None:
        for _ in range(3):
            self.nodes_obey()
            self.harness.settle(most_ms=seconds * 333)
        self.check_work_goes_on()

    @rule()
    def nodes_obey(self) -> None:
        for target in self.world.nodes.values():
            self.world.sync(target)
            self.world.deliver(target)
        self.check_work_goes_on()

    @rule(data=st.data(), count=st.integers(1, 4))
    def jobs_end(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            live = [(target, key) for target in self.world.nodes.values() for key in target.live("running")]
            if live:
                target, key = data.draw(st.sampled_from(live))
                self.world.end(target, key, "exited")
                self.world.deliver(target)
        self.check_work_goes_on()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        there = [each for each in self.harness.core.cluster.jobs.values() if not each.is_final]
        if there:
            chosen = data.draw(st.sampled_from(there))
            self.requests += 1
            name = f"s{self.requests}"
            self.harness.turn(
                CancelRequested(tenant=chosen.tenant, user=chosen.user, submission_id=name, job=chosen.id)
            )

    @rule()
    def a_node_tells_its_cards_again(self) -> None:
        target = self.world.nodes["n-1"]
        self.world.change_inventory(
            target, msgspec.structs.replace(target.inventory, cpu_milli=target.inventory.cpu_milli + 1)
        )

    @rule()
    def the_daemon_restarts(self) -> None:
        self.harness.restart()
        self.harness.turn()

    def check_work_goes_on(self) -> None:
        """Nobody waits who fits beside what is kept for others, found out by trying everything."""
        cluster = self.harness.core.cluster
        for waiting in cluster.waiting.values():
            shape = Shape(waiting.spec.need, 1, waiting.tenant, waiting.user)
            fits = any(type(judge(space, shape)) is int for space in cluster.pool.spaces.values())
            assert not fits, f"job {waiting.id} waits although it fits"

    def teardown(self) -> None:
        """Everything fits an empty card, so once what runs ends everything has run."""
        self.world.finish()
        cluster = self.harness.core.cluster
        left = {each.id: (each.state, each.spec.need.describe()) for each in cluster.jobs.values() if not each.is_final}
        assert not left, left
        assert len(cluster.claims) == 0
        assert cluster.pool.held_milli == 0


MigMachine.TestCase.settings = machine_settings(60, 25)
TestMig = MigMachine.TestCase
