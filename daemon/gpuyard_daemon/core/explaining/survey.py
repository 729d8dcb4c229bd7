"""What all nodes say to one shape now: one judgement for each kind of node, by the function that places.

Read-only. How much is looked at is counted in units of work (a judgement is one), and bounded by whoever asks.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from gpuyard_daemon.core.explaining.reasons import count_cards, text_of
from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.census import Census, NodeKind
from gpuyard_daemon.core.placing.feasibility import CLOSED, LASTING, Reason, Shape, carve, judge
from gpuyard_daemon.core.placing.gangs import offer_of
from gpuyard_daemon.core.tenants.tenancy import held_by
from gpuyard_protocol.explaining import CardReason
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import JobId, NodeId
from gpuyard_protocol.queries import NodeReason

_EXAMPLES_MAX = 5
#: Groups of nodes, the emptiest first, among which a place is looked for by `where_starts`.
_GROUPS_TRIED_MAX = 100
_ORDER = list(Reason)


class Work:
    """Units of work that are left."""

    __slots__ = ("left",)

    def __init__(self, units: int) -> None:
        self.left = units

    def spend(self, units: int = 1) -> bool:
        """Whether there was so much left."""
        self.left -= units
        return self.left >= 0


class Group(NamedTuple):
    """Nodes that fit alike."""

    #: One that stands for them all.
    space: NodeSpace
    nodes: tuple[NodeId, ...]


class Finding(NamedTuple):
    """What a group of nodes says."""

    group: Group
    #: How much would be left over if one replica went there, or why none can.
    verdict: int | Reason
    #: How many replicas each of the nodes takes.
    room: int


class Survey(NamedTuple):
    """What all nodes say."""

    shape: Shape
    findings: tuple[Finding, ...]
    #: Nodes that were not named by the request, and so not asked.
    not_named: int
    #: Of a gang that must be together: how many replicas the roomiest rack (or what it is) takes; below 0: it need not.
    members_within: int = -1

    @property
    def members(self) -> int:
        """How many replicas would find a place now."""
        if self.members_within >= 0:
            return self.members_within
        return sum(finding.room * len(finding.group.nodes) for finding in self.findings)

    @property
    def starts(self) -> bool:
        """Whether all replicas would find a place now, together or apart."""
        return self.members >= self.shape.replicas

    @property
    def may_ever(self) -> bool:
        """Whether some node, as it is, could ever take a replica."""
        return any(not (isinstance(f.verdict, Reason) and f.verdict in LASTING) for f in self.findings)

    def nearest(self) -> list[Finding]:
        """What could ever take a replica, the nodes nearest to it first."""
        able = [f for f in self.findings if not (isinstance(f.verdict, Reason) and f.verdict in LASTING)]
        return sorted(able, key=lambda f: (-f.room, -_ORDER.index(f.verdict) if isinstance(f.verdict, Reason) else -99,
                                           -f.group.space.idle_cards))  # fmt: skip

    def held(self) -> list[Finding]:
        """Of these, what takes work now: elsewhere it makes no difference who holds what."""
        return [f for f in self.nearest() if not (isinstance(f.verdict, Reason) and f.verdict in CLOSED)]

    def reasons(self) -> tuple[NodeReason, ...]:
        """By nodes: what may pass first, then what lasts; of either, the most frequent first."""
        nodes: dict[Reason, list[tuple[NodeId, ...]]] = {}
        for finding in self.findings:
            if isinstance(finding.verdict, Reason):
                nodes.setdefault(finding.verdict, []).append(finding.group.nodes)
        counts = {reason: sum(len(part) for part in parts) for reason, parts in nodes.items()}
        if self.not_named:
            counts[Reason.NODE_NOT_NAMED] = counts.get(Reason.NODE_NOT_NAMED, 0) + self.not_named
        ranked = sorted(counts, key=lambda reason: (reason in LASTING, -counts[reason], _ORDER.index(reason)))
        return tuple(
            [
                NodeReason(
                    reason=Why(reason.value, text_of(reason, self.shape)),
                    nodes=counts[reason],
                    examples=_examples(nodes.get(reason, [])),
                )
                for reason in ranked
            ]
        )

    def cards(self, owner: JobId) -> tuple[CardReason, ...]:
        """By cards, the most frequent first."""
        if not self.shape.need.wants_gpu:
            return ()
        counts: Counter[Why] = Counter()
        for finding in self.findings:
            count_cards(counts, finding.group.space, self.shape, finding.verdict, len(finding.group.nodes), owner)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0].code, item[0].text))
        return tuple([CardReason(reason=reason, cards=count) for reason, count in ranked if count])


def _examples(parts: list[tuple[NodeId, ...]]) -> tuple[NodeId, ...]:
    first = [node for part in parts for node in part[:_EXAMPLES_MAX]]
    return tuple(first[:_EXAMPLES_MAX])


class Surveyor:
    """Asks the nodes of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._census = Census(pool)
        #: All nodes, as of so many changes of the pool.
        self._all: list[Group] = []
        self._open: list[Group] = []
        self._seen = -1

    def survey(self, shape: Shape, owner: JobId) -> Survey:
        """Ask all nodes."""
        groups = self._groups(shape)
        spanning = shape.replicas > 1
        findings = []
        for group in groups:
            verdict = judge(group.space, shape, spanning=spanning, owner=owner)
            if group.space.claims and isinstance(verdict, Reason):
                verdict = _unless_claimed(group.space, shape, verdict, spanning=spanning)
            room = 0 if isinstance(verdict, Reason) else room_on(group.space, shape, owner, spanning=spanning)
            findings.append(Finding(group, verdict, room))
        if spanning and sum(f.room * len(f.group.nodes) for f in findings) < shape.replicas:
            findings = [self._together(finding, shape, owner) for finding in findings]
        asked = sum(len(group.nodes) for group in groups)
        within = self._within(shape, findings) if shape.need.within and spanning else -1
        return Survey(shape, tuple(findings), len(self._pool.spaces) - asked, within)

    def _within(self, shape: Shape, findings: list[Finding]) -> int:
        domains = self._pool.domains(shape.need.within)
        rooms: dict[int, int] = {0: 0}
        for finding in findings:
            for node in finding.group.nodes if finding.room else ():
                domain = int(domains[self._pool.spaces[node].node.number - 1])
                rooms[domain] = rooms.get(domain, 0) + finding.room
        return max(rooms.values())

    def _together(self, finding: Finding, shape: Shape, owner: JobId) -> Finding:
        """A gang that one node takes whole may share its cards in time, which one over several nodes may not."""
        if shape.need.isolation != "none" or shape.need.gpus:
            return finding
        room = room_on(finding.group.space, shape, owner, spanning=False)
        return finding._replace(verdict=0, room=room) if room == shape.replicas else finding

    def where_starts(self, shape: Shape, owner: JobId, work: Work) -> tuple[Group, int] | None:
        """Some nodes on which all replicas would start now, and what they would count for against a limit."""
        spanning = shape.replicas > 1
        members, first, counts_for = 0, None, 0
        for group in self._groups(shape, may_be_full=not shape.need.wants_gpu)[:_GROUPS_TRIED_MAX]:
            if not work.spend():
                return None
            verdict = judge(group.space, shape, owner=owner)
            if isinstance(verdict, Reason):
                continue
            if not spanning:
                return group, self._counts_for(group.space, shape, owner)
            work.spend(shape.replicas)
            if room_on(group.space, shape, owner, spanning=False) == shape.replicas:
                return group, shape.replicas * self._counts_for(group.space, shape, owner)
            if shape.need.within:
                # Which of them are together is not looked at here: better no change than one that does not help.
                continue
            members += room_on(group.space, shape, owner, spanning=True) * len(group.nodes)
            first, counts_for = first or group, counts_for or self._counts_for(group.space, shape, owner)
            if members >= shape.replicas:
                return first, shape.replicas * counts_for
        return None

    def _counts_for(self, space: NodeSpace, shape: Shape, owner: JobId) -> int:
        return held_by(space, carve(space, shape, owner=owner))

    def _groups(self, shape: Shape, *, may_be_full: bool = True) -> list[Group]:
        """Nodes that differ in nothing that the shape asks about, the emptiest first; those it names one by one.

        `may_be_full`: also those with no card that is not held whole.
        """
        wanted = shape.need.nodes
        if wanted:
            return [
                Group(space, (space.node.id,))
                for space in self._pool.spaces.values()
                if space.node.id in wanted or (space.node.inventory and space.node.inventory.hostname in wanted)
            ]
        if self._seen != self._pool.changes_made:
            self._seen = self._pool.changes_made
            kinds = sorted(self._census.kinds(), key=_emptiness)
            self._all = [Group(kind.space, tuple(kind.nodes)) for kind in kinds]
            self._open = [g for g in self._all if any(card.mode != "whole" for card in g.space.cards)]
        return self._all if may_be_full else self._open


def _unless_claimed(space: NodeSpace, shape: Shape, verdict: Reason, *, spanning: bool) -> Reason:
    """Why a node with claims has no place: because of them, if it had one without."""
    bare = space.copy()
    bare.claims = []
    return verdict if isinstance(judge(bare, shape, spanning=spanning), Reason) else Reason.CLAIMED


def _emptiness(kind: NodeKind) -> tuple[int, int]:
    """Smaller: emptier. By cards that nobody holds, then by what others leave."""
    space = kind.space
    return -space.idle_cards, sum([card.milli for card in space.cards if card.mode != "whole"])


def room_on(space: NodeSpace, shape: Shape, owner: JobId, *, spanning: bool) -> int:
    """How many replicas a node takes, at most all."""
    if shape.replicas == 1:
        return int(not isinstance(judge(space, shape, spanning=spanning, owner=owner), Reason))
    return len(offer_of(space, shape, shape.replicas, spanning=spanning).partitions)
