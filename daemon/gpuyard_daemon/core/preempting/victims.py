"""Which running jobs would have to leave so that a waiting one finds its places, at the least cost.

Planned on a trial of the pool, and nothing is left of a plan that does not work out: either every replica has its place
once the victims are gone, or nobody is told to go. What is on its way out anyway counts as gone, for nothing.

On one node: victims by band, level and cost, largest first, until the replica fits; then those are let be that turn out
not to be needed, the dearest first. Of nodes that cost the same, that whose victims are larger: taking whoever stands
on the first node instead sent short jobs away again and again. Over several nodes: member by member on the node where
the next is cheapest, given who has to go already; a gang that has to go frees all its nodes for its cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.partitions import Card
from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.preempting.occupants import Occupant
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import LEAVING, Assignment, Job
from gpuyard_protocol.names import AssignmentKey, JobId, NodeId
from gpuyard_protocol.resources import NoGpu, WholeCards, devices_of


class Plan(NamedTuple):
    """Who goes, and where the claimant's replicas go then."""

    victims: tuple[Occupant, ...]
    placements: tuple[Placement, ...]


class Search:
    """One claimant's search. `leaving`: jobs that are stopping already. `looks` bounds the work: nodes tried."""

    def __init__(
        self, pool: Pool, shape: Shape, job: Job, allowed: Iterable[Occupant], leaving: Iterable[Job], looks: int
    ) -> None:
        self._trial = PoolTrial(pool)
        self._shape = shape
        self._job = job
        self._spanning = shape.replicas > 1
        self._by_node: dict[NodeId, list[Occupant]] = {}
        for occupant in sorted(allowed, key=_giving_order):
            for node in _offered_on(occupant):
                self._by_node.setdefault(node, []).append(occupant)
        for other in leaving:
            for assignment in other.assignments:
                if assignment.is_live:
                    self._by_node.setdefault(assignment.node, [])
        #: What `_remove` last took off the trial of each victim: some of a gang may have been cleared before.
        self._taken_off: dict[JobId, list[Assignment]] = {}
        self.looks = looks

    def single(self) -> Plan | None:
        """The cheapest node for a job of one replica."""
        best: tuple[int, int, int, int, NodeId, list[Occupant]] | None = None
        for node in sorted(self._by_node, key=self._number):
            if self.looks <= 0:
                break
            chosen = self._free_for_one(node)
            if chosen is not None:
                cost, number = sum([o.lost_milli_ms for o in chosen]), self._number(node)
                found = (cost, len(chosen), -_least_level(chosen), number, node, chosen)
                best = min(best, found, key=lambda plan: plan[:4]) if best else found
        if best is None:
            return None
        return self._settle(best[5], [best[4]])

    def gang(self, roomy: Iterable[NodeId]) -> Plan | None:
        """Places for all replicas. `roomy`: nodes that take some of them as they are."""
        nodes = dict.fromkeys([*roomy, *sorted(self._by_node, key=self._number)])
        if not self._shape.need.within:
            return self._gang(nodes)
        domains = self._trial.pool.domains(self._shape.need.within)
        apart: dict[int, dict[NodeId, None]] = {}
        for node in nodes:
            apart.setdefault(int(domains[self._number(node) - 1]), {})[node] = None
        best: tuple[int, Plan] | None = None
        by_node = self._by_node
        for among in apart.values():
            self._by_node = {node: list(there) for node, there in by_node.items()}
            self._trial.undo()
            plan = self._gang(among)
            if plan is not None:
                cost = sum([each.lost_milli_ms for each in plan.victims])
                best = (cost, plan) if best is None or cost < best[0] else best
        return best[1] if best else None

    def _gang(self, nodes: dict[NodeId, None]) -> Plan | None:
        """The same on these nodes alone."""
        victims: dict[JobId, Occupant] = {}
        members = dict.fromkeys(nodes, 0)
        #: (cost of the next member, has none yet, level of its victims, number, node, state of the node's offer): the
        #: cheapest first.
        offers: list[tuple[int, bool, int, int, NodeId, int]] = []
        states = dict.fromkeys(nodes, 0)
        for node in nodes:
            self._offer(node, members, states, offers)
        placed = 0
        while placed < self._shape.replicas:
            if not offers or self.looks <= 0:
                return None
            *_, node, state = heapq.heappop(offers)
            if state != states[node]:
                continue
            chosen = self._free(node)
            if chosen is None:
                return None
            self._trial.put(node, self._shape, self._job.id, placed, spanning=True)
            placed += 1
            members[node] += 1
            changed = {node}
            for occupant in chosen:
                victims[occupant.job.id] = occupant
                changed.update(self._forget(occupant))
            for each in sorted(changed & nodes.keys(), key=self._number):
                states[each] += 1
                self._offer(each, members, states, offers)
        used = [node for node in nodes if members[node]]
        return self._settle(list(victims.values()), used)

    def _offer(
        self,
        node: NodeId,
        members: Mapping[NodeId, int],
        states: Mapping[NodeId, int],
        offers: list[tuple[int, bool, int, int, NodeId, int]],
    ) -> None:
        mark = self._trial.mark()
        chosen = self._free(node)
        self._trial.undo(mark)
        if chosen is not None:
            cost = sum([occupant.lost_milli_ms for occupant in chosen])
            is_new, level = not members[node], -_least_level(chosen)
            heapq.heappush(offers, (cost, is_new, level, self._number(node), node, states[node]))

    # --- one node ----------------------------------------------------------------------------------------------------

    def _free_for_one(self, node: NodeId) -> list[Occupant] | None:
        """As `_free`, on a trial as it was in the beginning, and nothing is left of it."""
        counted = self._counted(node)
        if counted is not None:
            self.looks -= 1
            return counted.chosen(self._by_node[node])
        mark = self._trial.mark()
        chosen = self._free(node)
        self._trial.undo(mark)
        return chosen

    def _counted(self, node: NodeId) -> _Counted | None:
        """What a node has and would have, where numbers say it all: cards are wanted whole, whoever could leave holds
        them whole, and nothing is claimed. None: it must be tried."""
        space, need = self._trial.pool.spaces[node], self._shape.need
        candidates = self._by_node[node]
        if not need.gpus or space.claims or any(each.goes or each.kind == "suspend" for each in candidates):
            return None
        reason, positions = self._shape.eligible(space)
        is_open = reason is None and "whole" in space.modes
        if not is_open or space.node.state != "ready" or space.node.cordoned_by or space.is_imagined:
            return None
        usable = {space.cards[position].device.uuid for position in positions if _would_be_idle(space.cards[position])}
        leaving = [a for a in space.assignments.values() if a.state in LEAVING]
        gains = {each.job.id: _gain(space, each.job.assignments, usable) for each in candidates}
        gone = _gain(space, leaving, usable)
        if gone is None or None in gains.values():
            return None
        idle = sum([1 for p in positions if space.cards[p].mode == "idle" and space.cards[p].takes_work])
        least = (need.cpu_milli, need.memory_mib, need.gpus)
        has = (space.cpu_free_milli + gone[0], space.memory_free_mib + gone[1], idle + gone[2])
        return _Counted(least, has, {number: gain for number, gain in gains.items() if gain is not None})

    def _free(self, node: NodeId) -> list[Occupant] | None:
        """Take victims off the trial until one more replica fits a node; None, and some taken, if it never does."""
        self.looks -= 1
        self._clear(node)
        chosen: list[Occupant] = []
        candidates = iter(self._by_node.get(node, ()))
        while not self._fits(node):
            occupant = next(candidates, None)
            if occupant is None:
                return None
            for other in [each for each in chosen if each.job is occupant.job]:
                # What it lent is not enough: all of it goes.
                self._put_back(other)
                chosen.remove(other)
            self._remove(occupant)
            chosen.append(occupant)
        if len(chosen) > 1:
            self._prune(node, chosen)
        return chosen

    def _fits(self, node: NodeId) -> bool:
        """Whether one more replica fits a node of the trial as it is now."""
        return type(self._trial.judge(node, self._shape, spanning=self._spanning, owner=self._job.id)) is int

    def _place(self, nodes: list[NodeId]) -> tuple[Placement, ...] | None:
        """All replicas on these nodes, held there in the trial."""
        return self._trial.place(self._shape, self._job.id, nodes)

    def _prune(self, node: NodeId, chosen: list[Occupant]) -> None:
        """Put back whoever is not needed for one more replica on this node, the dearest first."""
        for occupant in sorted(chosen, key=_dear_first):
            mark = self._trial.mark()
            self._put_back(occupant)
            if self._fits(node):
                chosen.remove(occupant)
            else:
                self._trial.undo(mark)

    def _clear(self, node: NodeId) -> None:
        """What leaves the node anyway is gone. Undone with everything else, so it is looked for each time."""
        space = self._trial.space(node)
        leaving = [a for key, a in sorted(space.assignments.items()) if a.state in LEAVING and key in space.amounts]
        if leaving:
            self._trial.without(leaving)

    def _remove(self, occupant: Occupant) -> None:
        """Off its place; of a suspended one its memory stays, and its image beside it."""
        held = self._taken_off[occupant.job.id] = self._held(occupant)
        self._trial.without(held)
        if occupant.kind == "suspend":
            hold, memory_mib = self._image(occupant)
            self._trial.restore(hold, occupant.job.domain, 0, memory_mib)

    def _image(self, occupant: Occupant) -> tuple[Assignment, int]:
        """What a suspended victim holds of its node, and how much memory that is."""
        held = occupant.job.assignments[0]
        memory_mib = occupant.job.spec.need.memory_mib + self._trial.pool.image_bound(held)
        return Assignment(held.key, held.node, NoGpu(), "running"), memory_mib

    def _held(self, occupant: Occupant) -> list[Assignment]:
        """What an occupant holds in the trial."""
        return [
            a
            for a in occupant.goes or occupant.job.assignments
            if a.is_live and a.key in self._trial.space(a.node).amounts
        ]

    def _put_back(self, occupant: Occupant) -> None:
        """Only after `_remove`, with nothing in its places since: what that took off and nothing else."""
        job = occupant.job
        if occupant.kind == "suspend":
            self._trial.without([self._image(occupant)[0]])
        for assignment in self._taken_off[job.id]:
            self._trial.restore(assignment, job.domain, job.spec.need.cpu_milli, job.spec.need.memory_mib)

    def _forget(self, occupant: Occupant) -> set[NodeId]:
        """A victim that is chosen is no candidate any more; the nodes that it leaves."""
        nodes = {assignment.node for assignment in occupant.job.assignments if assignment.is_live}
        for node in nodes:
            # With all of a job goes what it lent; with what it lent on one node goes that on the others.
            self._by_node[node] = [
                other
                for other in self._by_node[node]
                if other.job is not occupant.job or (occupant.goes and not other.goes)
            ]
        return nodes

    def _number(self, node: NodeId) -> int:
        return self._trial.pool.spaces[node].node.number

    # --- the whole plan ----------------------------------------------------------------------------------------------

    def _settle(self, victims: list[Occupant], nodes: list[NodeId]) -> Plan | None:
        """Place all replicas with the victims gone, and let those stay who hold nothing that is needed after all."""
        trial = self._trial
        trial.undo()
        for occupant in victims:
            self._remove(occupant)
        for node in nodes:
            self._clear(node)
        placements = self._place(nodes)
        if placements is None:
            return None
        kept = set()
        for occupant in sorted(victims, key=_dear_first):
            if self._could_stay(occupant):
                self._put_back(occupant)
                kept.add(occupant.job.id)
        leaving = [occupant for occupant in victims if occupant.job.id not in kept]
        return Plan(tuple(sorted(leaving, key=lambda o: o.job.id)), placements)

    def _could_stay(self, occupant: Occupant) -> bool:
        job = occupant.job
        mark = self._trial.mark()
        if occupant.kind == "suspend":
            self._trial.without([self._image(occupant)[0]])
        for assignment in self._taken_off[job.id]:
            space = self._trial.space(assignment.node)
            need = job.spec.need
            fits = (
                space.cpu_free_milli >= need.cpu_milli
                and space.memory_free_mib >= need.memory_mib
                and all(
                    space.by_uuid[uuid].could_take(assignment.partition, job.domain)
                    for uuid in devices_of(assignment.partition)
                )
            )
            if not fits:
                self._trial.undo(mark)
                return False
            self._trial.restore(assignment, job.domain, need.cpu_milli, need.memory_mib)
        nodes = {assignment.node for assignment in self._taken_off[job.id]}
        # It must not stay at the price of what others were promised, CPUs and memory included.
        stays = all(_firm_claims_fit(self._trial.space(node), self._job.id) for node in nodes)
        self._trial.undo(mark)
        return stays


class _Counted(NamedTuple):
    """CPU, memory and whole cards of a node: what one replica takes, what is free, what each leaves by going."""

    least: tuple[int, int, int]
    has: tuple[int, int, int]
    gains: dict[JobId, tuple[int, int, int]]

    def chosen(self, candidates: Iterable[Occupant]) -> list[Occupant] | None:
        """As `Search._free` chooses: in this order until the replica fits, without those who then need not go."""
        has, left = self.has, iter(candidates)
        chosen: list[Occupant] = []
        while not self._is_enough(has):
            occupant = next(left, None)
            if occupant is None:
                return None
            gain = self.gains[occupant.job.id]
            has = (has[0] + gain[0], has[1] + gain[1], has[2] + gain[2])
            chosen.append(occupant)
        for occupant in sorted(chosen, key=_dear_first) if len(chosen) > 1 else ():
            gain = self.gains[occupant.job.id]
            without = (has[0] - gain[0], has[1] - gain[1], has[2] - gain[2])
            if self._is_enough(without):
                has = without
                chosen.remove(occupant)
        return chosen

    def _is_enough(self, has: tuple[int, int, int]) -> bool:
        least = self.least
        return has[0] >= least[0] and has[1] >= least[1] and has[2] >= least[2]


def _would_be_idle(card: Card) -> bool:
    """A card that is held whole: whether it could be given away whole again as soon as it is left."""
    return card.takes_work and not card.foreign and not (card.keeps_mode and card.in_mig)


def _gain(space: NodeSpace, assignments: Iterable[Assignment], usable: set[str]) -> tuple[int, int, int] | None:
    """CPU, memory and usable cards that these leave on a node; None where one of them holds a part of a card."""
    cpu_milli = memory_mib = cards = 0
    for assignment in assignments:
        held = space.amounts.get(assignment.key)
        if held is None or not assignment.is_live:
            continue
        cpu_milli, memory_mib = cpu_milli + held[0], memory_mib + held[1]
        match assignment.partition:
            case WholeCards(devices=devices):
                cards += sum([1 for uuid in devices if uuid in usable])
            case NoGpu():
                pass
            case _:
                return None
    return cpu_milli, memory_mib, cards


def _firm_claims_fit(space: NodeSpace, owner: JobId) -> bool:
    """Whether all places that were freed there for others are to be had, one beside the other."""
    claims = [claim for claim in space.claims if claim.is_firm and claim.job != owner]
    if not claims:
        return True
    twin = space.copy(with_holders=True)
    for key, assignment in space.assignments.items():
        if assignment.state in LEAVING and key in twin.amounts:
            twin.give(key, assignment.partition)
    for number, claim in enumerate(claims):
        cards = [twin.by_uuid.get(uuid) for uuid in devices_of(claim.partition)]
        short = twin.cpu_free_milli < claim.cpu_milli or twin.memory_free_mib < claim.memory_mib
        if short or not all(card is not None and card.could_take(claim.partition, claim.tenant) for card in cards):
            return False
        key = AssignmentKey(-claim.job, 0, number)
        twin.take(key, claim.partition, claim.tenant, claim.cpu_milli, claim.memory_mib)
    return True


def _offered_on(occupant: Occupant) -> tuple[NodeId, ...]:
    """Nodes that a victim makes room on; of one that shrinks, that of the first that goes: it is offered for each."""
    going = occupant.goes[:1] or occupant.job.assignments
    return tuple(dict.fromkeys([assignment.node for assignment in going if assignment.is_live]))


def _giving_order(occupant: Occupant) -> tuple[int, int, int, int]:
    return (-occupant.band, -occupant.level, occupant.lost_milli_ms, -occupant.job.id)


def _dear_first(occupant: Occupant) -> tuple[int, int, int]:
    """Of equally dear ones the smallest: who is as dear and larger goes rather."""
    return (-occupant.lost_milli_ms, occupant.level, occupant.job.id)


def _least_level(chosen: Iterable[Occupant]) -> int:
    return min([occupant.level for occupant in chosen], default=0)
