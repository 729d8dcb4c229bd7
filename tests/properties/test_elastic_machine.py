"""Elastic jobs among others, in any order: between their least and their most, and their sizes change seldom and for
good reason.

Every change of size is judged from the records alone: who may grow and when, that nobody waits who has a use for what
is taken, who shrinks for whom. In the end everything heals and every job ends.
"""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.state import facts as f
from gpuyard_daemon.core.state.inputs import CancelRequested, Input, NodeLost, ScaleRequested
from gpuyard_daemon.core.state.turn import Turn
from gpuyard_protocol.jobs import JobSpec
from support.builders import CoreHarness, job, node
from support.core_world import World
from support.machines import machine_settings

NODES = ("n-1", "n-2")
_RESTART_MS = 20_000


class JudgedHarness(CoreHarness):
    """Judges every change of size by the state before the turn that it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.resizes: Counter[int] = Counter()

    def turn(self, *inputs: Input, after_ms: int = 0) -> Turn:
        turn = super().turn(*inputs, after_ms=after_ms)
        for fact in turn.record.facts if turn.record is not None else ():
            if isinstance(fact, f.JobResizing):
                self.judge_resizing(fact)
            if isinstance(fact, f.ClaimMade):
                for eviction in fact.evictions:
                    self.judge_eviction(eviction)
        self.check_sizes()
        return turn

    def judge_resizing(self, fact: f.JobResizing) -> None:
        cluster = self.core.cluster
        changed = cluster.jobs[fact.job]
        before = [f.Placement(each.node, each.partition) for each in changed.assignments]
        if len(fact.placements) < len(before):
            assert list(fact.placements) == before[: len(fact.placements)]
            if "waits for the limit" in fact.why.text:
                assert len(fact.placements) == changed.spec.least_replicas
                assert changed.spec.preemption != "never"
                assert self.now_ms - changed.started_ms >= exchange.least_run_ms(_RESTART_MS, changed.resizes - 1)
            return
        assert list(fact.placements[: len(before)]) == before
        assert len(fact.placements) <= changed.most_replicas
        nodes = {place.node for place in fact.placements[len(before) :]}
        for waiting in cluster.waiting.values():
            if waiting.id in cluster.claims and cluster.claims.records[waiting.id].kind == "resize":
                continue
            if not cluster.tenancy.has_room(
                waiting.tenant, 1000 * waiting.spec.least_replicas * waiting.spec.need.gpus
            ):
                continue
            shape = Shape(waiting.spec.need, 1, waiting.tenant, waiting.user)
            wanted = [name for name in nodes if shape.eligible(cluster.pool.spaces[name])[0] is None]
            assert not wanted, f"job {waiting.id} waits for {wanted}"
        if not changed.scaled_ms:
            assert changed.spec.preemption == "checkpoint"
            ran_ms = self.now_ms - changed.started_ms
            more = len(fact.placements) - len(before)
            assert ran_ms * more >= exchange.COST_WEIGHT * _RESTART_MS * len(fact.placements) // 1 - more
            assert ran_ms >= exchange.least_run_ms(_RESTART_MS, changed.resizes - 1)

    def judge_eviction(self, eviction: f.Eviction) -> None:
        victim = self.core.cluster.jobs[eviction.job]
        if eviction.kind != "shrink":
            assert eviction.keeps == ()
            return
        assert victim.spec.preemption != "never"
        assert len(eviction.keeps) == victim.spec.least_replicas < len(victim.assignments)
        assert {*eviction.keeps} <= {f.Placement(each.node, each.partition) for each in victim.assignments}
        at_ms = self.now_ms - self.now_ms % self.settings.preempt_every_ms
        assert at_ms - victim.started_ms >= exchange.least_run_ms(_RESTART_MS, victim.resizes - 1)

    def check_sizes(self) -> None:
        for each in self.core.cluster.jobs.values():
            if each.live and each.is_elastic and each.state in ("starting", "running"):
                assert each.spec.least_replicas <= len(each.assignments) <= max(each.spec.replicas, each.scaled_to)
                assert len({one.key.attempt for one in each.assignments}) == 1


specs = st.builds(
    lambda wants, least, more, kind: msgspec.structs.replace(
        job(replicas=least + more, **wants),
        min_replicas=least if more else 0,
        preemption=kind,
        restart_ms=_RESTART_MS,
    ),
    st.sampled_from(({"gpus": 1}, {"gpus": 1}, {"gpus": 2}, {"share_milli": 300}, {})),
    st.sampled_from((1, 1, 2, 3)),
    st.sampled_from((0, 1, 3, 7)),
    st.sampled_from(("checkpoint", "checkpoint", "requeue", "never", "suspend")),
)


class ElasticMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.harness = JudgedHarness()
        self.world = World(self.harness, [node(name, 4) for name in NODES])
        for target in self.world.nodes.values():
            self.world.join(target)
        self.requests = 0

    @initialize(wanted=st.lists(specs, min_size=1, max_size=3))
    def some_run(self, wanted: list[JobSpec]) -> None:
        self.submit(wanted)

    @rule(wanted=st.lists(specs, min_size=1, max_size=2), who=st.sampled_from(("acme", "acme", "umbrella")))
    def submit(self, wanted: list[JobSpec], who: str = "acme") -> None:
        self.harness.submit_many(wanted, tenant=who)
        self.nodes_obey()

    @rule(gpus=st.sampled_from((0, 3, 6)))
    def the_operator_limits_a_tenant(self, gpus: int) -> None:
        self.harness.limit("acme", gpus_milli=gpus * 1000)

    @rule()
    def nodes_obey(self) -> None:
        for target in self.world.nodes.values():
            self.world.sync(target)
            self.world.deliver(target)

    @rule(name=st.sampled_from(NODES), most=st.integers(1, 2))
    def one_node_obeys_a_little(self, name: str, most: int) -> None:
        self.world.sync(self.world.nodes[name])
        self.world.deliver(self.world.nodes[name], most)

    @rule(after_ms=st.sampled_from((1_000, 130_000, 700_000, 3_600_000)))
    def time_passes(self, after_ms: int) -> None:
        self.harness.settle(most_ms=after_ms)

    @rule(data=st.data(), well=st.booleans())
    def a_job_ends(self, data: st.DataObject, well: bool) -> None:
        for target in self.world.nodes.values():
            running = target.live("running")
            if running:
                key = data.draw(st.sampled_from(running))
                self.world.end(target, key, "exited", exit_code=0 if well else 1)
                self.world.deliver(target)

    @rule(number=st.integers(1, 12), replicas=st.integers(1, 9))
    def an_owner_scales(self, number: int, replicas: int) -> None:
        self.requests += 1
        name = f"q{self.requests}"
        self.harness.turn(
            ScaleRequested(tenant="acme", user="alice", submission_id=name, job=number, replicas=replicas)
        )

    @rule(number=st.integers(1, 12))
    def an_owner_cancels(self, number: int) -> None:
        self.requests += 1
        name = f"q{self.requests}"
        self.harness.turn(CancelRequested(tenant="acme", user="alice", submission_id=name, job=number))

    @rule(name=st.sampled_from(NODES), comes_back=st.booleans())
    def a_node_is_lost(self, name: str, comes_back: bool) -> None:
        self.harness.turn(NodeLost(node=name))
        if comes_back:
            self.world.join(self.world.nodes[name])

    @rule()
    def the_daemon_restarts(self) -> None:
        self.harness.restart()
        self.harness.turn()

    def teardown(self) -> None:
        self.harness.limit("acme")
        self.world.heal()
        self.world.finish()
        cluster = self.harness.core.cluster
        left = {each.id: each.state for each in cluster.jobs.values() if not each.is_final}
        assert not left, left
        assert len(cluster.claims) == 0
        assert cluster.pool.held_milli == 0
        assert not cluster.growing
        assert not cluster.wide


ElasticMachine.TestCase.settings = machine_settings(60, 25)
TestElastic = ElasticMachine.TestCase
