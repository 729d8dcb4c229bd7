"""Anything may happen, in any order: the core keeps its books, gives nothing away twice, and ends what it began.

After every step the harness checks the invariants, a twin that only applies records, and here that the yard works on:
nothing waits that would fit. In the end everything heals, and every job must reach a final state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gpuyard_daemon.core.placing.feasibility import Shape, judge
from gpuyard_daemon.core.placing.gangs import Offers, plan_gang
from gpuyard_daemon.core.placing.placement import Candidates
from gpuyard_daemon.core.queueing.order import ShapeQueue
from gpuyard_daemon.core.queueing.round import counts_for, places
from gpuyard_daemon.core.state.inputs import (
    CancelRequested,
    HoldRequested,
    LoadReported,
    NodeDeclaredDead,
    NodeLost,
    NodeRemoved,
    NodeReported,
    NodeSuspected,
    PolicyChanged,
    ReleaseRequested,
    RequeueAll,
    RequeueRequested,
    ScaleRequested,
    ServiceApplied,
    ServiceDeleted,
    YardStarted,
)
from gpuyard_daemon.core.tenants.policy import Policy, TenantLimits
from gpuyard_protocol.jobs import DependencyKind, JobSpec, parse_array
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Ended, Inventory, Prepared, Started
from gpuyard_protocol.resources import Isolation
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, gpu, job, need, node
from support.core_world import World, WorldNode
from support.machines import machine_settings

TENANTS = ("acme", "umbrella")
USERS = ("alice", "bob")
NODES = ("n-1", "n-2", "n-3")
SERVICES = ("chat", "embed")


def inventories() -> list[Inventory]:
    small = [gpu(index, node="n-3", model="NVIDIA A30", memory_mib=24_000, modes=("whole", "mps")) for index in (0, 1)]
    return [
        node("n-1", 4, cpu_milli=16_000, keeps_leases=True),
        node("n-2", 4, keeps_leases=True),
        node("n-3", devices=small, labels={"zone": "b"}),
    ]


isolations: st.SearchStrategy[Isolation] = st.sampled_from(("hard", "soft", "none"))
needs = st.one_of(
    st.builds(lambda n, cpu: {"gpus": n, "cpu_milli": cpu}, st.integers(0, 5), st.sampled_from((1000, 8000))),
    st.builds(
        lambda milli, kind: {"share_milli": milli, "isolation": kind},
        st.sampled_from((143, 300, 500, 1000)),
        isolations,
    ),
    st.builds(
        lambda mib, kind: {"share_memory_mib": mib, "isolation": kind}, st.sampled_from((4_000, 30_000)), isolations
    ),
    st.builds(lambda name: {"mig": name}, st.sampled_from(("1g.10gb", "2g.20gb", "3g.40gb", "1g.10gb+me", "9g.9gb"))),
    st.just({"gpus": 1, "models": ("A30",)}),
    st.just({"share_milli": 300, "share_domain": "team"}),
    st.just({"gpus": 1, "within": "node"}),
    st.just({"node_labels": (("zone", "b"),)}),
)
specs = st.builds(
    lambda wants, replicas, least, kind, priority, retries, allow, lease_ms: msgspec.structs.replace(
        job(replicas=replicas, priority=priority, retries=retries, allow_pending=allow, **wants),
        min_replicas=least if least < replicas else 0,
        preemption=kind,
        on_node_lost="restart" if lease_ms else "",
        lease_ms=lease_ms,
    ),
    needs,
    st.sampled_from((1, 1, 1, 2, 3, 9)),
    st.sampled_from((9, 9, 1, 2)),
    st.sampled_from(("requeue", "requeue", "checkpoint")),
    st.integers(-2, 2),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from((0, 0, 10_000)),
)
ends = st.sampled_from(
    (
        ("exited", 0, 0, ""),
        ("exited", 0, 0, ""),
        ("exited", 3, 0, ""),
        ("signalled", 0, 9, ""),
        ("signalled", 0, 15, "TimeLimit"),
        ("refused", 0, 0, "PartitionUnavailable"),
        ("refused", 0, 0, "WorkingDirectoryMissing"),
        ("lost", 0, 0, "NodeRestarted"),
        ("stopped", 0, 0, "HoldExpired"),
    )
)


class CoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.harness = CoreHarness()
        self.world = World(self.harness, inventories())
        #: Batches that were delivered once, to be delivered again.
        self.past: list[NodeReported] = []
        self.requests = 0

    @initialize(count=st.sampled_from((0, 1, 2, 3, 3, 3)))
    def some_nodes_join(self, count: int) -> None:
        for name in NODES[:count]:
            self.world.join(self.world.nodes[name])
        self.check_work_goes_on()

    # --- tenants ---

    @rule(wanted=st.lists(specs, min_size=1, max_size=4), who=st.sampled_from(TENANTS), user=st.sampled_from(USERS))
    def submit(self, wanted: list[JobSpec], who: str, user: str) -> None:
        self.harness.submit_many(wanted, tenant=who, user=user)
        self.check_work_goes_on()

    @rule(
        spec=specs,
        who=st.sampled_from(TENANTS),
        kinds=st.lists(st.sampled_from(("afterok", "afternotok", "afterany")), max_size=2),
        array=st.sampled_from((None, None, "0-3", "0-5%2")),
        name=st.sampled_from(("", "x", "y")),
        extras=st.fixed_dictionaries({"hold": st.booleans(), "begin_after_ms": st.sampled_from((0, 0, 5000))}),
        data=st.data(),
    )
    def submit_to_wait_for_others(
        self,
        spec: JobSpec,
        who: str,
        kinds: list[DependencyKind],
        array: str | None,
        name: str,
        extras: dict[str, Any],
        data: st.DataObject,
    ) -> None:
        newest = self.harness.core.cluster.last_job
        targets = tuple((kind, data.draw(st.integers(max(1, newest - 5), newest + 1))) for kind in kinds)
        wanted = msgspec.structs.replace(
            spec,
            depends_on=targets,
            name=name,
            singleton=bool(name),
            array=parse_array(array) if array else None,
            **extras,
        )
        self.harness.submit(wanted, tenant=who)
        self.check_work_goes_on()

    @rule(
        kind=st.sampled_from((CancelRequested, HoldRequested, ReleaseRequested, RequeueRequested)),
        number=st.integers(0, 40),
        user=st.sampled_from(USERS),
        who=st.sampled_from(TENANTS),
        whole=st.booleans(),
    )
    def an_owner_directs(self, kind: type[Any], number: int, user: str, who: str, whole: bool) -> None:
        self.requests += 1
        more = {"hold": whole} if kind is RequeueRequested else {"array": whole}
        self.harness.turn(kind(tenant=who, user=user, submission_id=f"s{self.requests}", job=number, **more))
        self.check_work_goes_on()

    @rule(number=st.integers(1, 40), replicas=st.integers(1, 9), after_ms=st.sampled_from((0, 0, 200_000)))
    def an_owner_scales(self, number: int, replicas: int, after_ms: int) -> None:
        self.requests += 1
        tenant, user = self.harness.core.job_owner(number) or ("acme", "alice")
        request = ScaleRequested(
            tenant=tenant, user=user, submission_id=f"s{self.requests}", job=number, replicas=replicas
        )
        self.harness.turn(request, after_ms=after_ms)
        self.check_work_goes_on()

    @rule(spec=specs, name=st.sampled_from(("first", "second")), who=st.sampled_from(TENANTS))
    def submit_under_a_chosen_name(self, spec: JobSpec, name: str, who: str) -> None:
        before = self.harness.core.submission(who, name)
        self.harness.submit(spec, tenant=who, submission_id=name)
        answer = self.harness.core.submission(who, name)
        assert answer is not None
        assert before in (None, answer)

    @rule(number=st.integers(0, 30), user=st.sampled_from(USERS), who=st.sampled_from(TENANTS))
    def cancel(self, number: int, user: str, who: str) -> None:
        self.requests += 1
        cancelled = CancelRequested(tenant=who, user=user, submission_id=f"s{self.requests}", job=number)
        owner = self.harness.core.job_owner(number)
        self.harness.turn(cancelled)
        if self.harness.answers[-1].accepted:
            assert owner == (who, user)
        self.check_work_goes_on()

    # --- services ---

    @rule(
        name=st.sampled_from(SERVICES),
        wants=needs,
        low=st.integers(0, 2),
        more=st.integers(0, 3),
        version=st.sampled_from(("1", "2")),
    )
    def apply_service(self, name: str, wants: dict[str, Any], low: int, more: int, version: str) -> None:
        self.requests += 1
        spec = ServiceSpec(
            name=name,
            argv=("/bin/serve",),
            need=need(**wants),
            version=version,
            min_replicas=low,
            max_replicas=max(1, low + more),
            target_concurrency=4,
        )
        self.harness.turn(ServiceApplied(tenant="acme", user="alice", submission_id=f"s{self.requests}", spec=spec))
        self.check_work_goes_on()

    @rule(name=st.sampled_from(SERVICES))
    def delete_service(self, name: str) -> None:
        self.requests += 1
        self.harness.turn(ServiceDeleted(tenant="acme", user="alice", submission_id=f"s{self.requests}", service=name))
        self.check_work_goes_on()

    @rule(name=st.sampled_from(SERVICES), concurrency=st.integers(0, 30))
    def load(self, name: str, concurrency: int) -> None:
        self.harness.turn(LoadReported(tenant="acme", service=name, concurrency=concurrency))
        self.check_work_goes_on()

    # --- nodes ---

    def on_node(self, name: str, act: Callable[[WorldNode], None]) -> None:
        act(self.world.nodes[name])
        self.check_work_goes_on()

    @rule(name=st.sampled_from(NODES))
    def agent_starts(self, name: str) -> None:
        self.on_node(name, self.world.join)

    @rule(name=st.sampled_from(NODES), deliver=st.booleans())
    def agent_takes_orders(self, name: str, deliver: bool) -> None:
        self.on_node(name, self.world.sync)
        if deliver:
            self.on_node(name, self.world.deliver)

    @rule(name=st.sampled_from(NODES), most=st.integers(1, 5))
    def reports_arrive(self, name: str, most: int) -> None:
        target = self.world.nodes[name]
        first, reports = target.delivered + 1, target.outbox[target.delivered : target.delivered + most]
        if target.is_up and reports:
            self.past.append(self.world.batch(target, first, reports))
            self.world.deliver(target, most)
        self.check_work_goes_on()

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def a_batch_comes_again(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(self.past))
        before = self.harness.core.cluster.nodes[again.node].reports_seen
        self.harness.turn(again)
        assert self.harness.core.cluster.nodes[again.node].reports_seen == before

    @rule()
    def all_nodes_work(self) -> None:
        for name in NODES:
            self.on_node(name, self.world.sync)
            self.on_node(name, self.world.deliver)

    @rule(end=ends, soon=st.booleans(), data=st.data())
    def a_replica_ends(self, end: tuple[str, int, int, str], soon: bool, data: st.DataObject) -> None:
        """On a node that has taken its orders; its report arrives now or later."""
        self.all_nodes_work()
        live = [(target, key) for target in self.world.nodes.values() if target.is_up for key in target.live()]
        if live:
            target, key = data.draw(st.sampled_from(live))
            outcome, exit_code, signal, code = end
            self.world.end(target, key, outcome, exit_code=exit_code, signal=signal, code=code)
            if soon:
                self.world.deliver(target)
        self.check_work_goes_on()

    @rule(ended=st.lists(ends, min_size=1, max_size=3), data=st.data())
    def replicas_end_one_after_the_other(self, ended: list[tuple[str, int, int, str]], data: st.DataObject) -> None:
        for end in ended:
            self.a_replica_ends(end, True, data)

    @rule(name=st.sampled_from(NODES), kind=st.sampled_from((Prepared, Started)), data=st.data())
    def a_node_reports_out_of_turn(self, name: str, kind: type[Prepared] | type[Started], data: st.DataObject) -> None:
        """Something about one of its assignments that the protocol does not have at this point."""
        target = self.world.nodes[name]
        if target.is_up and target.live():
            key = data.draw(st.sampled_from(target.live()))
            report = Prepared(key=key, port=1) if kind is Prepared else Started(key=key, at_ms=0)
            target.outbox.append(report)
            self.world.deliver(target)
        self.check_work_goes_on()

    @rule(name=st.sampled_from(NODES), number=st.integers(0, 20), attempt=st.integers(0, 3), replica=st.integers(-1, 3))
    def a_node_reports_what_it_does_not_have(self, name: str, number: int, attempt: int, replica: int) -> None:
        target = self.world.nodes[name]
        key = AssignmentKey(number, attempt, replica)
        if target.is_up and key not in target.live() and not self._is_ordered(name, key):
            target.outbox.append(Ended(key=key, outcome="exited", at_ms=0))
            self.world.deliver(target)
        self.check_work_goes_on()

    def _is_ordered(self, name: str, key: AssignmentKey) -> bool:
        space = self.harness.core.cluster.pool.spaces.get(name)
        return space is not None and key in space.assignments

    @rule(name=st.sampled_from(NODES), heard=st.sampled_from(("hardly", "no more", "again", "dead", "out")))
    def a_node_is_heard(self, name: str, heard: str) -> None:
        match heard:
            case "hardly":
                self.harness.turn(NodeSuspected(node=name))
            case "no more":
                self.harness.turn(NodeLost(node=name))
            case "dead":
                self.harness.turn(NodeDeclaredDead(node=name, by="root"))
            case "out":
                self.harness.turn(NodeRemoved(node=name, by="root"))
            case _:
                self.world.heard_again(self.world.nodes[name])
        self.check_work_goes_on()

    @rule(name=st.sampled_from(NODES), kept=st.integers(1, 4), sick=st.booleans())
    def a_card_goes(self, name: str, kept: int, sick: bool) -> None:
        target = self.world.nodes[name]
        whole = next(inventory for inventory in inventories() if inventory.hostname == f"host-{name}")
        devices = whole.devices[:kept]
        if sick:
            devices = (msgspec.structs.replace(devices[0], healthy=False), *devices[1:])
        self.world.change_inventory(target, msgspec.structs.replace(whole, devices=devices))
        self.check_work_goes_on()

    # --- the yard ---

    @rule(gpus=st.sampled_from((0, 0, 500, 1500, 3000)), who=st.sampled_from(TENANTS), jobs=st.sampled_from((0, 0, 4)))
    def the_policy_changes(self, gpus: int, who: str, jobs: int) -> None:
        policy = Policy(tenants=((who, TenantLimits(gpus, jobs)),))
        held = self.harness.core.cluster.tenancy.held_milli.get(who, 0)
        self.harness.turn(PolicyChanged(policy=policy))
        now = self.harness.core.cluster.tenancy.held_milli.get(who, 0)
        assert not gpus or now <= max(held, gpus), "started beyond the limit"
        self.check_work_goes_on()

    @rule(up=st.booleans())
    def the_yard_stops_or_starts(self, up: bool) -> None:
        self.harness.turn(YardStarted(epoch=1) if up else RequeueAll())
        self.check_work_goes_on()

    @rule(seconds=st.sampled_from((1, 10, 31, 90, 4000)))
    def time_passes(self, seconds: int) -> None:
        self.harness.settle(most_ms=seconds * 1000)
        self.check_work_goes_on()

    @rule()
    def the_daemon_restarts(self) -> None:
        self.harness.restart()
        self.harness.turn()

    # --- what must hold ---

    def check_work_goes_on(self) -> None:
        """Nothing waits that would fit now, found out by trying everything."""
        cluster = self.harness.core.cluster
        if cluster.draining:
            return
        for waiting in cluster.waiting.values():
            spec = waiting.spec
            shape = Shape(spec.need, spec.least_replicas, waiting.tenant, waiting.user)
            if spec.least_replicas == 1:
                fits = any(type(judge(space, shape)) is int for space in cluster.pool.spaces.values())
            else:
                together = Offers(Candidates(shape), spanning=False)
                apart = Offers(Candidates(shape, spanning=True), spanning=True)
                fits = plan_gang(cluster.pool, together, apart) is not None
            if fits and cluster.tenancy.is_limited(waiting.tenant):
                queue = ShapeQueue((spec.need, spec.least_replicas, waiting.tenant, waiting.user), 0, 4000)
                found = places(cluster.pool, queue)
                assert found is not None
                fits = cluster.tenancy.has_room(waiting.tenant, counts_for(cluster.pool, found))
            assert not fits, f"job {waiting.id} waits although it fits"
        for key, service in cluster.services.items():
            replicas = [r for r in cluster.service_jobs.get(key, {}).values() if r.generation == service.generation]
            count = sum(1 for replica in replicas if replica.verdict is None or replica.verdict.kind == "requeue")
            is_held_back = service.not_before_ms > self.harness.now_ms
            assert count == service.wanted or (count < service.wanted and is_held_back), f"{key}: {count} replicas"

    def teardown(self) -> None:
        """Heal everything: whatever could ever run must come to an end, and nothing is held."""
        for name in SERVICES:
            self.delete_service(name)
        self.harness.turn(YardStarted(epoch=2), PolicyChanged(policy=Policy()))
        for target, inventory in zip(self.world.nodes.values(), inventories(), strict=True):
            target.inventory = inventory
        self.world.heal()
        cluster = self.harness.core.cluster
        for held in [left for left in cluster.jobs.values() if left.held_by]:
            release = ReleaseRequested(tenant=held.tenant, user=held.user, submission_id="s0", job=held.id)
            self.harness.turn(release)
        self.world.finish()
        cluster = self.harness.core.cluster
        for left in cluster.jobs.values():
            impossible = self.harness.core._possibilities.missing(
                cluster.pool, left.spec.need, left.spec.least_replicas, left.tenant, left.user
            )
            assert left.is_final or impossible, f"job {left.id} is {left.state} for ever: {left.story}"
        assert cluster.pool.held_milli == 0
        started = [start.key for _, start in self.harness.starts()]
        assert len(started) == len(set(started)), "an assignment was ordered twice"


CoreMachine.TestCase.settings = machine_settings(40, 30)
TestCore = CoreMachine.TestCase
