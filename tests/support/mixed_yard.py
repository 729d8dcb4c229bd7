"""A small yard in which everything happens at once: what there is to do, as moves of a name and two numbers.

Jobs of every kind and ladder, gangs, elastic jobs, arrays, dependencies, deadlines, services with floors, quotas that
are borrowed and taken back, reservations, cards that are kept free for a larger instance or that switch modes, cordons,
nodes that fall silent and cards that fail. A move is total (whatever the numbers, it does something sensible or
nothing), so that hypothesis can draw and shrink moves, and a seed can make thousands.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from gpuyard_daemon.core.placing.feasibility import Shape, judge
from gpuyard_daemon.core.placing.gangs import Offers, plan_gang
from gpuyard_daemon.core.placing.placement import Candidates
from gpuyard_daemon.core.queueing.order import ShapeQueue
from gpuyard_daemon.core.queueing.round import places
from gpuyard_daemon.core.state import inputs as i
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.limits import may_hold, within_quota
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_daemon.core.tenants.quota import Obstacle
from gpuyard_protocol.jobs import DependencyKind, JobSpec, Preemption, parse_array
from gpuyard_protocol.nodes import Idle, Inventory
from gpuyard_protocol.resources import devices_of
from gpuyard_protocol.services import ServiceSpec
from support.builders import CoreHarness, gpu, job, linked_in_pairs, need, node
from support.core_world import World, WorldNode

T = TypeVar("T")
SECOND: Final = 1000
MINUTE: Final = 60_000
NODES: Final = ("n-1", "n-2", "n-3")
TENANTS: Final = ("acme", "umbrella", "zed")

NEEDS: Final[tuple[dict[str, Any], ...]] = (
    {"gpus": 1}, {"gpus": 2}, {"gpus": 4}, {"gpus": 1, "cpu_milli": 5000}, {"share_milli": 300},
    {"share_milli": 500, "isolation": "none"}, {"mig": "3g.40gb"}, {"mig": "1g.10gb"}, {"gpus": 1, "models": ("A30",)},
    {},
)  # fmt: skip
KINDS: Final[tuple[Preemption, ...]] = ("suspend", "checkpoint", "requeue", "suspend", "never", "checkpoint")
REPLICAS: Final = (1, 1, 1, 2, 3)
#: Above those: the most that an elastic job has.
LENT: Final = (0, 0, 0, 1, 4)
#: Larger than any number that `spec_of` reads to its end.
NUMBERS: Final = 10**10
ENDS: Final = (
    ("exited", 0, 0, ""), ("exited", 3, 0, ""), ("signalled", 0, 9, ""), ("refused", 0, 0, "PartitionUnavailable"),
    ("lost", 0, 0, "SuspendBroken"), ("exited", 0, 0, ""),
)  # fmt: skip
POLICIES: Final = (
    Policy(),
    Policy(
        tenants=(("acme", TenantLimits(queue="a")), ("umbrella", TenantLimits(queue="b")),
                 ("zed", TenantLimits(queue="night"))),
        queues=(
            QueuePolicy("a", parent="lab", grants=(Grant(nominal_milli=4000),)),
            QueuePolicy("b", parent="lab", weight=2, grants=(Grant(nominal_milli=4000, borrow_milli=4000),)),
            QueuePolicy("lab", grants=(Grant(nominal_milli=8000),)),
            QueuePolicy("night", scavenger=True),
        ),
    ),
    Policy(
        tenants=(("acme", TenantLimits(queue="a", gpus_max_milli=6000)), ("umbrella", TenantLimits(queue="b"))),
        queues=(
            QueuePolicy("a", grants=(Grant(nominal_milli=2000, lend_milli=1000),)),
            QueuePolicy("b", grants=(Grant(nominal_milli=6000),)),
        ),
    ),
    Policy(tenants=(("acme", TenantLimits(gpus_max_milli=5000)), ("zed", TenantLimits(jobs_max=6)))),
)  # fmt: skip


def inventories() -> list[Inventory]:
    """Two nodes of four cards, one linked in pairs and with memory for two images; a small one that cannot suspend."""
    small = [gpu(index, node="n-3", model="NVIDIA A30", memory_mib=24_000, modes=("whole", "mps")) for index in (0, 1)]
    slow = [msgspec.structs.replace(gpu(index, node="n-2"), mig_switch_ms=6 * SECOND) for index in range(4)]
    return [
        msgspec.structs.replace(
            node("n-1", devices=linked_in_pairs("n-1", 4), cpu_milli=16_000, keeps_leases=True), suspend_mib=170_000
        ),
        msgspec.structs.replace(node("n-2", devices=slow, labels={"rack": "a"}), suspend_mib=500_000),
        node("n-3", devices=small),
    ]


class Digits:
    """One number as many small choices."""

    def __init__(self, number: int) -> None:
        self._left = number

    def one_of(self, choices: Sequence[T]) -> T:
        self._left, at = divmod(self._left, len(choices))
        return choices[at]


def spec_of(number: int) -> JobSpec:
    """A job of any kind; the smaller the number the simpler."""
    digits = Digits(number)
    wants, kind = digits.one_of(NEEDS), digits.one_of(KINDS)
    least = digits.one_of(REPLICAS)
    priority, retries = digits.one_of((0, 0, 1, -1)), digits.one_of((0, 1))
    restart_ms = digits.one_of((0, 10 * SECOND, 600 * SECOND))
    lent = digits.one_of(LENT)
    name = digits.one_of(("", "", "", "alone"))
    estimate_ms = digits.one_of((0, 0, 5 * MINUTE, 600 * MINUTE))
    return msgspec.structs.replace(
        job(replicas=least + lent, priority=priority, retries=retries, name=name, **wants),
        min_replicas=least if lent else 0,
        preemption=kind,
        restart_ms=restart_ms,
        estimate_ms=estimate_ms,
        time_limit_ms=digits.one_of((0, 0, 0, 30 * MINUTE)),
        lease_ms=digits.one_of((0, 0, 10 * SECOND)),
        deadline_after_ms=digits.one_of((0, 0, 20 * MINUTE, 24 * 60 * MINUTE)) if estimate_ms else 0,
        begin_after_ms=digits.one_of((0, 0, 0, 5 * MINUTE)),
        hold=digits.one_of((False,) * 9 + (True,)),
        singleton=bool(name) and digits.one_of((True, False)),
        on_node_lost="restart" if number % 7 == 6 else "",
    )


class MixedYard:
    """The harness, its nodes, and the moves."""

    def __init__(self, harness: CoreHarness) -> None:
        self.harness = harness
        self.world = World(harness, inventories())
        for target in self.world.nodes.values():
            self.world.join(target)
        self._past: list[i.NodeReported] = []
        self._requests = 0
        self.moves: dict[str, Callable[[int, int], None]] = {
            "submit": self._submit, "crowd": self._crowd, "array": self._array, "dependent": self._dependent,
            "cut": self._cut, "direct": self._direct, "scale": self._scale, "service": self._service,
            "load": self._load, "obey": self._obey, "one obeys": self._one_obeys, "idle": self._idle,
            "end": self._end, "heard": self._heard, "late": self._late, "agent": self._agent, "cordon": self._cordon,
            "card": self._card, "policy": self._policy, "seconds": self._seconds, "minutes": self._minutes,
            "lull": self._lull, "days": self._days, "restart": self._restart,
        }  # fmt: skip

    def play(self, name: str, a: int, b: int) -> None:
        """One move, and what must hold after every move."""
        self.moves[name](a, b)
        while self.harness.last.unfinished:
            self.harness.turn()
        self.check()

    @property
    def _jobs(self) -> dict[int, Job]:
        return self.harness.core.cluster.jobs

    def _target(self, number: int) -> WorldNode:
        return self.world.nodes[NODES[number % len(NODES)]]

    def _ask(self, request: type[Any], **fields: Any) -> None:
        self._requests += 1
        self.harness.turn(request(submission_id=f"m{self._requests}", **fields))

    # --- tenants ---

    def _submit(self, a: int, b: int) -> None:
        self.harness.submit(spec_of(a), tenant=TENANTS[b % 3])

    def _crowd(self, a: int, b: int) -> None:
        self.harness.submit_many([spec_of(b)] * (a % 8 + 1), tenant=TENANTS[a % 3])

    def _array(self, a: int, b: int) -> None:
        spec = msgspec.structs.replace(spec_of(a), array=parse_array(("0-3", "0-4%2")[b % 2]))
        self.harness.submit(spec, tenant=TENANTS[b % 3])

    def _cut(self, a: int, b: int) -> None:
        """Cards in small pieces, for times that are known, and somebody who needs a larger one."""
        small = job(mig="1g.10gb", estimate_ms=(a % 4 + 2) * MINUTE)
        self.harness.submit_many([small] * (b % 9 + 2), tenant=TENANTS[a % 3])
        wants: tuple[dict[str, Any], ...] = ({"mig": "3g.40gb"}, {"mig": "7g.80gb"}, {"gpus": 1}, {"gpus": 2})
        self.harness.submit(job(estimate_ms=600 * MINUTE, **wants[a % 4]), tenant=TENANTS[b % 3])

    def _dependent(self, a: int, b: int) -> None:
        kinds: tuple[DependencyKind, ...] = ("afterok", "afterany", "afternotok")
        targets = ((kinds[a % 3], max(1, self.harness.core.cluster.last_job - b % 4)),)
        self.harness.submit(msgspec.structs.replace(spec_of(a), depends_on=targets), tenant=TENANTS[b % 3])

    def _direct(self, a: int, b: int) -> None:
        there = [each for each in self._jobs.values() if not each.is_final]
        if there:
            chosen = there[a % len(there)]
            verbs = (
                i.HoldRequested, i.ReleaseRequested, i.RequeueRequested, i.SuspendRequested, i.ResumeRequested,
                i.CancelRequested,
            )  # fmt: skip
            whole_array = b // len(verbs) % 2 == 1
            self._ask(verbs[b % len(verbs)], tenant=chosen.tenant, user=chosen.user, job=chosen.id, array=whole_array)

    def _scale(self, a: int, b: int) -> None:
        elastic = [each for each in self._jobs.values() if each.is_elastic and not each.is_final]
        if elastic and b % 4:
            chosen = elastic[a % len(elastic)]
            self._ask(i.ScaleRequested, tenant=chosen.tenant, user=chosen.user, job=chosen.id, replicas=b % 8)
        elif b % 8:
            name, low = ("chat", "embed")[a % 2], b % 3
            self._ask(
                i.ServiceScaleAsked, tenant="acme", user="alice", service=name, min_replicas=low, max_replicas=low + 1
            )
        else:
            self._ask(i.RolloutAsked, tenant="acme", user="alice", service=("chat", "embed")[a % 2], undo=a % 4 < 2)

    def _service(self, a: int, b: int) -> None:
        name = ("chat", "embed")[a % 2]
        if b % 5 == 4:
            self._ask(i.ServiceDeleted, tenant="acme", user="alice", service=name)
            return
        spec = ServiceSpec(
            name=name,
            argv=("/bin/serve",),
            need=need(**({"gpus": 1}, {"share_milli": 300}, {"mig": "1g.10gb"})[a % 3]),
            version=("1", "2")[b % 2],
            min_replicas=b % 3,
            max_replicas=b % 3 + 2,
            target_concurrency=4,
        )
        self._ask(i.ServiceApplied, tenant="acme", user="alice", spec=spec)

    def _load(self, a: int, b: int) -> None:
        self.harness.turn(i.LoadReported(tenant="acme", service=("chat", "embed")[a % 2], concurrency=b % 24))

    # --- nodes ---

    def _obey(self, a: int, b: int) -> None:
        for name in NODES:
            self._takes_orders(self.world.nodes[name])

    def _one_obeys(self, a: int, b: int) -> None:
        target = self._target(a)
        self.world.sync(target)
        first = target.delivered + 1
        some = target.outbox[target.delivered : target.delivered + b % 4 + 1]
        if target.is_up and some:
            self._past.append(self.world.batch(target, first, some))
            self.world.deliver(target, len(some))

    def _idle(self, a: int, b: int) -> None:
        """A node says of one that runs there that its card computes nothing."""
        live = [(target, key) for target in self.world.nodes.values() if target.is_up for key in target.live("running")]
        if live:
            target, key = live[a % len(live)]
            release_ms = (0, 30 * MINUTE)[b % 3 % 2]
            report = Idle(key=key, at_ms=0, idle_ms=MINUTE, stage="suspend" if b % 2 else "warn", release_ms=release_ms)
            target.outbox.append(report)
            self.world.deliver(target)

    def _takes_orders(self, target: WorldNode) -> None:
        self.world.sync(target)
        self.world.deliver(target)

    def _end(self, a: int, b: int) -> None:
        live = [(target, key) for target in self.world.nodes.values() if target.is_up for key in target.live("running")]
        if live:
            target, key = live[a % len(live)]
            outcome, exit_code, signal, code = ENDS[b % len(ENDS)]
            self.world.end(target, key, outcome, exit_code=exit_code, signal=signal, code=code)
            if b % 2 == 0:
                self.world.deliver(target)

    def _heard(self, a: int, b: int) -> None:
        target = self._target(a)
        match b % 5:
            case 0:
                self.harness.turn(i.NodeSuspected(node=target.name))
            case 1:
                self.harness.turn(i.NodeLost(node=target.name))
            case 2 if a % 2:
                self.harness.turn(i.NodeDeclaredDead(node=target.name, by="root"))
            case _:
                self.world.heard_again(target)

    def _late(self, a: int, b: int) -> None:
        if self._past:
            again = self._past[a % len(self._past)]
            before = self.harness.core.cluster.nodes[again.node].reports_seen
            self.harness.turn(again)
            assert self.harness.core.cluster.nodes[again.node].reports_seen == before

    def _agent(self, a: int, b: int) -> None:
        self.world.join(self._target(a))

    def _cordon(self, a: int, b: int) -> None:
        name = self._target(a).name
        if b % 3:
            self.harness.turn(i.NodeUncordonAsked(node=name, by="root"))
        else:
            self.harness.turn(i.NodeCordonAsked(node=name, by="root", requeue=b % 2 == 0))

    def _card(self, a: int, b: int) -> None:
        target = self._target(a)
        whole = next(each for each in inventories() if each.hostname == f"host-{target.name}")
        devices = list(whole.devices)
        if b % 3 == 0:
            devices[0] = msgspec.structs.replace(devices[0], healthy=False)
        elif b % 3 == 1:
            del devices[-1]
        self.world.change_inventory(target, msgspec.structs.replace(whole, devices=tuple(devices)))

    # --- the yard ---

    def _policy(self, a: int, b: int) -> None:
        self.harness.turn(i.PolicyChanged(policy=POLICIES[a % len(POLICIES)]))

    def _seconds(self, a: int, b: int) -> None:
        self.harness.settle(most_ms=(a % 40) * SECOND)

    def _minutes(self, a: int, b: int) -> None:
        """Rounds go on while nodes do what they are told."""
        for _ in range(3):
            self._obey(0, 0)
            self.harness.settle(most_ms=11 * SECOND)
        self.harness.turn(after_ms=(1, 3, 11, 61)[a % 4] * MINUTE)

    def _lull(self, a: int, b: int) -> None:
        """Whoever runs ends, but for the elastic; they have the yard for themselves for a while."""
        for _ in range(3):
            self._obey(0, 0)
            for target in self.world.nodes.values():
                for key in target.live("running") if target.is_up else ():
                    if not self._jobs[key.job].is_elastic:
                        self.world.end(target, key, "exited")
                self.world.deliver(target)
        self.harness.settle(most_ms=(2, 20, 90)[a % 3] * MINUTE)

    def _days(self, a: int, b: int) -> None:
        self._obey(0, 0)
        self.harness.turn(after_ms=(6, 24, 90)[a % 3] * 60 * MINUTE)
        self._minutes(0, 0)

    def _restart(self, a: int, b: int) -> None:
        self.harness.restart()
        self.harness.turn()

    # --- what must hold ---

    def check(self) -> None:
        """Nobody waits who could start: found out by trying every node."""
        cluster = self.harness.core.cluster
        if cluster.draining:
            return
        for waiting in cluster.waiting.values():
            assert not self._could_start(waiting), f"job {waiting.id} waits although it fits: {waiting.spec.need}"
        for suspended in cluster.suspended.values():
            assert not self._could_resume(suspended), f"job {suspended.id} stays suspended although its card is free"

    def _could_start(self, waiting: Job) -> bool:
        cluster, spec = self.harness.core.cluster, waiting.spec
        shape = Shape(spec.need, spec.least_replicas, waiting.tenant, waiting.user)
        if shape.replicas == 1:
            fits = any(type(judge(space, shape)) is int for space in cluster.pool.spaces.values())
        else:
            together = Offers(Candidates(shape), spanning=False)
            fits = (
                plan_gang(cluster.pool, together, Offers(Candidates(shape, spanning=True), spanning=True)) is not None
            )
        if not fits:
            return False
        queue = ShapeQueue((spec.need, spec.least_replicas, waiting.tenant, waiting.user), 0, 4000)
        if not cluster.tenancy.has_room(waiting.tenant, queue.least_milli(cluster.pool)):
            return False
        if cluster.quota.has_quotas:
            within = within_quota(cluster, waiting)
            if isinstance(within, Obstacle):
                return False
            queue = queue if within is None else queue.limited_to(within)
        found = places(cluster.pool, queue)
        return found is not None and may_hold(cluster, waiting, found)

    def _could_resume(self, suspended: Job) -> bool:
        """Its card is free, kept for nobody, on a node that is there, and neither time nor owner nor quota say no."""
        cluster = self.harness.core.cluster
        (assignment,) = suspended.assignments
        space, home = cluster.pool.spaces[assignment.node], assignment.home
        if home is None or suspended.held_by or suspended.resume_after_ms > self.harness.now_ms:
            return False
        if space.node.state != "ready" or any(uuid not in space.by_uuid for uuid in devices_of(home)):
            return False
        beside = space.beside_claims(suspended.id)
        is_free = all(
            beside.by_uuid[uuid].takes_work and beside.by_uuid[uuid].could_take(home, suspended.tenant)
            for uuid in devices_of(home)
        )
        if not is_free or beside.cpu_free_milli < suspended.spec.need.cpu_milli:
            return False
        return may_hold(cluster, suspended, (Placement(assignment.node, home),))

    # --- in the end ---

    def heal(self) -> None:
        """All is well again, nothing is limited or held: whatever can ever run must come to its end."""
        for name in ("chat", "embed"):
            self._ask(i.ServiceDeleted, tenant="acme", user="alice", service=name)
        self.harness.turn(i.PolicyChanged(policy=Policy()))
        for target, inventory in zip(self.world.nodes.values(), inventories(), strict=True):
            target.inventory = inventory
            self.harness.turn(i.NodeUncordonAsked(node=target.name, by="root"))
        self.world.heal()
        for held in [each for each in self._jobs.values() if each.held_by]:
            self._ask(i.ReleaseRequested, tenant=held.tenant, user=held.user, job=held.id)
        self.world.finish()
        cluster = self.harness.core.cluster
        left = {each.id: (each.state, each.story[-3:]) for each in cluster.jobs.values() if not each.is_final}
        assert not left, left
        assert len(cluster.claims) == 0
        assert not cluster.suspended
        assert not cluster.leaving
        assert not cluster.growing
        assert not cluster.wide
        assert not cluster.promised
        assert cluster.pool.held_milli == 0


#: How often each move comes in a story made from a seed.
WEIGHTS: Final = {
    "submit": 20, "crowd": 4, "array": 3, "dependent": 2, "cut": 3, "direct": 6, "scale": 3, "service": 2, "load": 3,
    "obey": 14, "one obeys": 8, "idle": 2, "end": 12, "heard": 4, "late": 2, "agent": 2, "cordon": 2, "card": 2,
    "policy": 2, "seconds": 8, "minutes": 10, "lull": 3, "days": 3, "restart": 2,
}  # fmt: skip


def story(seed: int, steps: int) -> list[tuple[str, int, int]]:
    """Moves made from a seed."""
    rng = random.Random(seed)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [(rng.choices(names, weights)[0], rng.randrange(NUMBERS), rng.randrange(30)) for _ in range(steps)]


def fingerprint(harness: CoreHarness) -> str:
    """Equal for equal records and equal states, to the byte."""
    found = hashlib.sha256(harness.core.digest().encode())
    for record in harness.records:
        found.update(msgspec.json.encode(record))
    return found.hexdigest()


def main(seed: int, steps: int) -> None:
    yard = MixedYard(CoreHarness())
    for move in story(seed, steps):
        yard.play(*move)
    print(fingerprint(yard.harness))


if __name__ == "__main__":
    import sys

    main(int(sys.argv[1]), int(sys.argv[2]))
