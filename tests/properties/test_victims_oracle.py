"""Who must leave, against trying every set of them: on yards small enough for that.

A plan is found wherever some set of those who may be told to go makes room; nobody of it could stay; and where all are
alike but in what they lose, no cheaper set exists.
"""

from __future__ import annotations

from itertools import combinations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Shape, carve, judge
from gpuyard_daemon.core.preempting.occupants import Occupant
from gpuyard_daemon.core.preempting.victims import Plan, Search
from gpuyard_daemon.core.state.model import Assignment, Job, Node
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import ResourceNeed
from support.builders import job, need, node

WIDTHS = ({"gpus": 1}, {"gpus": 2}, {"share_milli": 300}, {"mig": "3g.40gb"}, {"cpu_milli": 3000}, {"gpus": 1})
WANTS = (*WIDTHS, {"gpus": 3}, {"mig": "1g.10gb"}, {"share_milli": 700})


class Yard:
    """Two or three small nodes, and jobs on them."""

    def __init__(self, cards: list[int], holders: list[tuple[int, int, int]], *, alike: bool) -> None:
        self.pool = Pool()
        for number, count in enumerate(cards, 1):
            made = Node(f"n-{number}", number, state="ready", inventory=node(f"n-{number}", count, cpu_milli=8000))
            self.pool.refit(self.pool.add(made), 0, 0)
        self.occupants: list[Occupant] = []
        for which, cost, level in holders:
            wants = need(**(WIDTHS[0] if alike else WIDTHS[which % len(WIDTHS)]))
            self._place(wants, cost, 0 if alike else level)

    def _place(self, wants: ResourceNeed, cost: int, level: int) -> None:
        shape = Shape(wants, 1, "acme", "alice")
        space = next((space for space in self.pool.by_number if type(judge(space, shape)) is int), None)
        if space is None:
            return
        number = len(self.occupants) + 1
        spec = msgspec.structs.replace(job(), need=wants, preemption="checkpoint")
        assignment = Assignment(AssignmentKey(number, 1, 0), space.node.id, carve(space, shape), "running")
        held = Job(number, "acme", "alice", "", spec, 0, state="running", attempt=1, assignments=[assignment], live=1)
        self.pool.take(space, assignment, "acme", wants.cpu_milli, wants.memory_mib)
        occupant = Occupant(held, 1, 1, level, "checkpoint", 0, cost, exchangeable=True, preemptible=True, next_ms=0)
        self.occupants.append(occupant)

    def search(self, wants: ResourceNeed) -> Plan | None:
        claimant = Job(99, "acme", "alice", "", msgspec.structs.replace(job(), need=wants), 0)
        shape = Shape(wants, 1, "acme", "alice")
        return Search(self.pool, shape, claimant, self.occupants, (), 100).single()

    def fits_without(self, wants: ResourceNeed, gone: tuple[Occupant, ...], where: str = "") -> bool:
        """Whether some node (or just that one) takes it once these have left."""
        shape = Shape(wants, 1, "acme", "alice")
        spaces = [space for space in self.pool.by_number if where in ("", space.node.id)]
        return any(type(judge(_without(space, gone), shape, owner=99)) is int for space in spaces)


def _without(space: NodeSpace, gone: tuple[Occupant, ...]) -> NodeSpace:
    twin = space.copy(with_holders=True)
    for occupant in gone:
        (assignment,) = occupant.job.assignments
        if assignment.node == space.node.id:
            twin.give(assignment.key, assignment.partition)
    return twin


yards = st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=3)
holders = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(yards, holders, st.integers(0, 8))
def test_a_plan_is_found_wherever_there_is_one_and_nobody_goes_in_vain(
    cards: list[int], held: list[tuple[int, int, int]], which: int
) -> None:
    yard, wants = Yard(cards, held, alike=False), need(**WANTS[which])
    there = tuple(yard.occupants)
    if yard.fits_without(wants, ()) or not there:
        return
    plan = yard.search(wants)
    assert (plan is not None) == yard.fits_without(wants, there)
    if plan is not None:
        where = plan.placements[0].node
        assert yard.fits_without(wants, plan.victims, where)
        for victim in plan.victims:
            rest = tuple(each for each in plan.victims if each is not victim)
            assert not yard.fits_without(wants, rest, where), f"job {victim.job.id} could have stayed"


@settings(max_examples=150, deadline=None)
@given(yards, holders, st.sampled_from((1, 2, 3)))
def test_no_cheaper_set_exists_where_all_are_alike_but_in_what_they_lose(
    cards: list[int], held: list[tuple[int, int, int]], wanted: int
) -> None:
    yard, wants = Yard(cards, held, alike=True), need(gpus=wanted)
    if yard.fits_without(wants, ()):
        return
    plan = yard.search(wants)
    costs = [
        sum([each.lost_milli_ms for each in chosen])
        for size in range(1, len(yard.occupants) + 1)
        for chosen in combinations(yard.occupants, size)
        if yard.fits_without(wants, chosen)
    ]
    assert (plan is None) == (not costs)
    if plan is not None:
        assert sum([each.lost_milli_ms for each in plan.victims]) == min(costs)


class Tried(Search):
    """One that counts nothing, and tries everything on copies."""

    def _counted(self, node: str) -> None:
        return None


@settings(max_examples=200, deadline=None)
@given(yards, holders, st.sampled_from((1, 2, 3)), st.sets(st.integers(0, 6), max_size=2), st.booleans())
def test_counting_finds_those_whom_trying_finds(
    cards: list[int], held: list[tuple[int, int, int]], wanted: int, leaving: set[int], alike: bool
) -> None:
    yard, wants = Yard(cards, held, alike=alike), need(gpus=wanted, cpu_milli=2000)
    going = [each.job for number, each in enumerate(yard.occupants) if number in leaving]
    for other in going:
        other.state = other.assignments[0].state = "stopping"
    allowed = [each for each in yard.occupants if each.job not in going]
    claimant = Job(99, "acme", "alice", "", msgspec.structs.replace(job(), need=wants), 0)
    shape = Shape(wants, 1, "acme", "alice")
    counted, tried = [kind(yard.pool, shape, claimant, allowed, going, 100) for kind in (Search, Tried)]
    assert counted.single() == tried.single()
    assert counted.looks == tried.looks
