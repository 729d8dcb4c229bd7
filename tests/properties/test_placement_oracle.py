"""Placement against brute force on small clusters: the chosen node is the minimum, whatever was looked at before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.placing.capacity import ClaimedPlace, NodeSpace, Pool
from gpuyard_daemon.core.placing.demand import LiveDemand
from gpuyard_daemon.core.placing.feasibility import Shape, judge
from gpuyard_daemon.core.placing.gangs import Offers, fits, offer_of, plan_gang
from gpuyard_daemon.core.placing.placement import Candidates, Finder
from gpuyard_daemon.core.placing.scoring import choose
from gpuyard_daemon.core.state.model import Assignment, Node
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import ResourceNeed, devices_of
from support.builders import gpu, need, node

TENANTS = ("acme", "umbrella")
NEEDS: tuple[ResourceNeed, ...] = (
    need(gpus=1),
    need(gpus=2, cpu_milli=4000),
    need(share_milli=300),
    need(share_milli=250, share_memory_mib=40_000),
    need(share_milli=600, isolation="none"),
    need(mig="1g.10gb", isolation="hard"),
    need(mig="3g.40gb"),
    need(share_milli=400, isolation="hard"),
    need(cpu_milli=6000),
    need(gpus=1, nodes=("n-2",)),
    need(gpus=1, node_labels=(("zone", "b"),)),
)
GANGS = ((need(gpus=1), 3), (need(share_milli=300), 5), (need(mig="1g.10gb"), 9), (need(gpus=2), 2))


def yard() -> Pool:
    pool = Pool()
    old = [gpu(index, node="n-4", model="NVIDIA V100", memory_mib=16_000, modes=("whole", "mps")) for index in (0, 1)]
    linked = [gpu(index, node="n-3") for index in range(2)]
    for inventory in (
        node("n-1", 2, cpu_milli=16_000, labels={"rack": "a"}),
        node("n-2", 2, cpu_milli=8000, labels={"rack": "a", "zone": "b"}),
        node("n-3", devices=linked, cpu_milli=16_000, labels={"rack": "b"}, accounts=("acme/*",)),
        node("n-4", devices=old, cpu_milli=16_000),
    ):
        name = inventory.hostname.removeprefix("host-")
        made = Node(name, len(pool.spaces) + 1, state="ready", inventory=inventory)
        pool.refit(pool.add(made), 0, 0)
    return pool


class Player:
    """Random moves on a pool, and the questions after each."""

    def __init__(self) -> None:
        self.pool = yard()
        self.demand = LiveDemand()
        self.finder = Finder(self.demand)
        self.jobs = 0
        self.live: list[tuple[NodeSpace, Assignment]] = []
        self.shapes = [Shape(each, 1, tenant, "alice") for each in NEEDS for tenant in TENANTS]
        self.candidates = [Candidates(shape, self.finder) for shape in self.shapes]
        self.gangs = []
        for each, replicas in GANGS:
            shape = Shape(each, replicas, "acme", "alice")
            together = Offers(Candidates(shape, self.finder), spanning=False)
            self.gangs.append((shape, together, Offers(Candidates(shape, self.finder, spanning=True), spanning=True)))

    def place(self, which: int) -> None:
        shape, candidates = self.shapes[which], self.candidates[which]
        self.demand.arrived(shape.need, 1, 1_700_000_000_000)
        space = candidates.best(self.pool)
        if space is None:
            return
        self.jobs += 1
        assignment = Assignment(AssignmentKey(self.jobs, 1, 0), space.node.id, candidates.carve(space))
        self.pool.take(space, assignment, shape.tenant, shape.need.cpu_milli, shape.need.memory_mib)
        self.live.append((space, assignment))

    def end(self, which: int) -> None:
        if self.live:
            space, assignment = self.live.pop(which % len(self.live))
            self.pool.give(space, assignment)

    def claim(self, which: int) -> None:
        """Keep the place of somebody who runs for somebody else."""
        if self.live:
            space, assignment = self.live[which % len(self.live)]
            assignment.state = "stopping"
            cpu_milli, memory_mib = space.amounts[assignment.key]
            place = ClaimedPlace(999, "acme", assignment.partition, cpu_milli, memory_mib)
            self.pool.claim(space, place)

    def drop_claims(self) -> None:
        for space in self.pool.by_number:
            if space.claims:
                self.pool.unclaim(space, 999)

    def check(self) -> None:
        for shape, candidates in zip(self.shapes, self.candidates, strict=True):
            best: tuple[int, int, NodeSpace] | None = None
            for space in self.pool.by_number:
                choice = choose(self.demand.mix, space, shape)
                assert (choice is None) == (not isinstance(judge(space, shape), int))
                if choice is not None:
                    found = (choice.score, space.node.number, space)
                    best = found if best is None or found[:2] < best[:2] else best
            assert candidates.best(self.pool) is (best[2] if best else None), shape.need.describe()
        for shape, together, apart in self.gangs:
            counts = [
                [len(offer_of(s, shape, shape.replicas, spanning=spanning).partitions) for s in self.pool.by_number]
                for spanning in (False, True)
            ]
            assert together.counts(self.pool).tolist() == counts[0]
            assert apart.counts(self.pool).tolist() == counts[1]
            placements = plan_gang(self.pool, together, apart)
            assert (placements is not None) == fits(self.pool, together, apart)
            assert (placements is not None) == (max(counts[0]) == shape.replicas or sum(counts[1]) >= shape.replicas)
            if placements is not None:
                taken = [(p.node, uuid) for p in placements for uuid in devices_of(p.partition)]
                assert shape.need.is_share or shape.need.mig or len(set(taken)) == len(taken)


MOVES = st.lists(
    st.tuples(st.sampled_from(["place", "place", "place", "end", "claim", "drop"]), st.integers(0, 40)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(MOVES)
def test_the_chosen_node_is_the_best_of_all_nodes(moves: list[tuple[str, int]]) -> None:
    player = Player()
    for what, which in moves:
        match what:
            case "place":
                player.place(which % len(player.shapes))
            case "end":
                player.end(which)
            case "claim":
                player.claim(which)
            case _:
                player.drop_claims()
        player.check()
