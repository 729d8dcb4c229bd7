"""Jobs take each other's places in any order of events: only those who may, only whole plans, and nobody in circles.

After every step the harness checks the invariants (what is kept for a claimant is not given away, gangs are whole, the
twin that only applies records is equal); here every eviction is judged again by the rules, and in the end, when nothing
new comes, every job must come to its end.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gpuyard_daemon.core.placing.feasibility import Shape, judge
from gpuyard_daemon.core.placing.gangs import Offers, plan_gang
from gpuyard_daemon.core.placing.placement import Candidates
from gpuyard_daemon.core.preempting import exchange
from gpuyard_daemon.core.preempting.consolidation import within_budget
from gpuyard_daemon.core.preempting.occupants import restart_of
from gpuyard_daemon.core.queueing.priority import PROBE_MS
from gpuyard_daemon.core.queueing.ranking import TOP_LEVEL, ran_ms
from gpuyard_daemon.core.state.facts import ClaimMade, Eviction
from gpuyard_daemon.core.state.inputs import CancelRequested, NodeLost, NodeSuspected
from gpuyard_daemon.core.state.turn import Turn
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.names import JobId
from support.builders import CoreHarness, job, node
from support.core_world import World
from support.machines import machine_settings

NODES = ("n-1", "n-2", "n-3")


class JudgedHarness(CoreHarness):
    """A harness that judges every eviction of a turn by the rules, from the records alone."""

    def __init__(self) -> None:
        super().__init__()
        #: When a job was evicted for which other, the last time.
        self.evicted: dict[tuple[JobId, JobId], int] = {}

    def turn(self, *inputs: Any, after_ms: int = 0) -> Turn:
        turn = super().turn(*inputs, after_ms=after_ms)
        for claim in self.new_facts(ClaimMade):
            for eviction in claim.evictions:
                self._judge(claim, eviction)
        return turn

    def _judge(self, claim: ClaimMade, eviction: Eviction) -> None:
        cluster, settings = self.core.cluster, self.settings
        victim, claimant = cluster.jobs[eviction.job], cluster.jobs[claim.job]
        assert victim.spec.preemption != "never"
        assert victim.state in ("stopping", "suspended"), "everybody of a plan is told to go at once"
        if eviction.moved:
            assert within_budget(cluster, 0)
            return
        if "kept before it came" in eviction.why.text:
            # A guest was let in on these terms.
            return
        at_ms = self.now_ms - self.now_ms % settings.preempt_every_ms
        before, overhead_ms = victim.preemptions - 1, victim.overhead_ms - eviction.overhead_ms
        start_ms = restart_of(cluster, settings, victim) if eviction.kind == "checkpoint" else 0
        assert at_ms - max(victim.started_ms, victim.runs_since_ms) >= exchange.least_attempt_ms(start_ms)
        if eviction.kind == "checkpoint":
            assert eviction.overhead_ms <= at_ms - victim.started_ms, "at its start it loses the start alone"
        useful_ms = ran_ms(victim, at_ms) - overhead_ms
        assert not before or overhead_ms * exchange.CREDIT_DIVISOR <= useful_ms
        ranking = cluster.ranking
        mine, theirs = ranking.rank_of(claimant, self.now_ms), ranking.rank_of(victim, at_ms)
        assert mine.band == theirs.band
        assert mine < theirs, "a victim's key is larger"
        cost = eviction.lost_milli_ms // 1000
        size, at_top = ranking.size_of(claimant, self.now_ms), mine.level == TOP_LEVEL
        assert exchange.may_take(size, mine.level, theirs.level, cost, at_top=at_top)
        back = self.evicted.get((claimant.id, victim.id))
        assert back is None or self.now_ms - back >= PROBE_MS, "in a circle"
        self.evicted[victim.id, claimant.id] = self.now_ms


specs = st.builds(
    lambda wants, replicas, kind, priority, restart_s: msgspec.structs.replace(
        job(replicas=replicas, priority=priority, **wants), preemption=kind, restart_ms=restart_s * 1000
    ),
    st.sampled_from(({"gpus": 1}, {"gpus": 2}, {"gpus": 4}, {"share_milli": 300}, {"mig": "3g.40gb"}, {})),
    st.sampled_from((1, 1, 1, 2, 3)),
    st.sampled_from(("checkpoint", "suspend", "suspend", "requeue", "never")),
    st.integers(-1, 1),
    st.sampled_from((0, 10, 600)),
)


class PreemptionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.harness = JudgedHarness()
        self.world = World(
            self.harness, [msgspec.structs.replace(node(name, 4), suspend_mib=250_000) for name in NODES]
        )
        for target in self.world.nodes.values():
            self.world.join(target)
        self.requests = 0

    @initialize(wanted=st.lists(specs, min_size=3, max_size=8), softly=st.integers(0, 12), hours=st.integers(0, 20))
    def the_yard_is_full_of_old_jobs(self, wanted: list[JobSpec], softly: int, hours: int) -> None:
        can_be_suspended = msgspec.structs.replace(job(gpus=1), preemption="suspend")
        self.harness.submit_many([*[can_be_suspended] * softly, *wanted], tenant="acme")
        self.nodes_obey(0)
        self.nodes_obey(0)
        self.harness.turn(after_ms=hours * 3_600_000)

    @rule(wanted=st.lists(specs, min_size=1, max_size=3), who=st.sampled_from(("acme", "umbrella")))
    def submit(self, wanted: list[JobSpec], who: str) -> None:
        self.harness.submit_many(wanted, tenant=who)
        self.nodes_obey(0)

    @rule(count=st.integers(1, 8))
    def a_crowd_comes(self, count: int) -> None:
        self.harness.submit_many([job(gpus=1)] * count)

    @rule(minutes=st.sampled_from((1, 3, 11, 61, 600, 6000)))
    def time_passes(self, minutes: int) -> None:
        for _ in range(4):
            self.nodes_obey(0)
            self.harness.settle(most_ms=min(20_000, minutes * 60_000))
        self.harness.turn(after_ms=minutes * 60_000)
        self.check_work_goes_on()

    @rule(which=st.sampled_from((0, 0, 0, 1, 2, 3)))
    def nodes_obey(self, which: int) -> None:
        """All of them, or one."""
        for number, name in enumerate(NODES, 1):
            if which in (0, number):
                self.world.sync(self.world.nodes[name])
                self.world.deliver(self.world.nodes[name])
        self.check_work_goes_on()

    @rule(data=st.data(), well=st.booleans())
    def a_job_ends(self, data: st.DataObject, well: bool) -> None:
        live = [(target, key) for target in self.world.nodes.values() if target.is_up for key in target.live("running")]
        if live:
            target, key = data.draw(st.sampled_from(live))
            self.world.end(target, key, "exited", exit_code=0 if well else 1)
            self.world.deliver(target)
        self.check_work_goes_on()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        cluster = self.harness.core.cluster
        there = [each for each in cluster.jobs.values() if not each.is_final]
        if there:
            chosen = data.draw(st.sampled_from(there))
            self.requests += 1
            name = f"s{self.requests}"
            self.harness.turn(
                CancelRequested(tenant=chosen.tenant, user=chosen.user, submission_id=name, job=chosen.id)
            )
        self.check_work_goes_on()

    @rule(name=st.sampled_from(NODES), heard=st.sampled_from(("hardly", "no more", "again", "again")))
    def a_node_is_heard(self, name: str, heard: str) -> None:
        match heard:
            case "hardly":
                self.harness.turn(NodeSuspected(node=name))
            case "no more":
                self.harness.turn(NodeLost(node=name))
            case _:
                self.world.heard_again(self.world.nodes[name])
        self.check_work_goes_on()

    @rule()
    def the_daemon_restarts(self) -> None:
        self.harness.restart()
        self.harness.turn()

    def check_work_goes_on(self) -> None:
        """Nobody waits who fits beside what is kept for others, found out by trying everything."""
        cluster = self.harness.core.cluster
        for waiting in cluster.waiting.values():
            spec = waiting.spec
            shape = Shape(spec.need, spec.least_replicas, waiting.tenant, waiting.user)
            if spec.least_replicas == 1:
                fits = any(type(judge(space, shape)) is int for space in cluster.pool.spaces.values())
            else:
                together = Offers(Candidates(shape), spanning=False)
                apart = Offers(Candidates(shape, spanning=True), spanning=True)
                fits = plan_gang(cluster.pool, together, apart) is not None
            assert not fits, f"job {waiting.id} waits although it fits"

    def teardown(self) -> None:
        self.world.heal()
        self.world.finish()
        cluster = self.harness.core.cluster
        left = {each.id: each.state for each in cluster.jobs.values() if not each.is_final}
        assert not left, left
        assert len(cluster.claims) == 0
        assert cluster.pool.held_milli == 0


PreemptionMachine.TestCase.settings = machine_settings(30, 25)
TestPreemption = PreemptionMachine.TestCase
