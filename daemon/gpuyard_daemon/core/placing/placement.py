"""Where one replica goes: the best-scored of all nodes, found without looking at all nodes.

For each kind of request that waits, a `Table` holds one number per node: its score there, or that it does not fit. When
a node changes, only that node is scored again, and only for the tables that are asked; nodes in equal condition share
one score. The choice is the minimum over all nodes whichever way it was found (of equals the node known longest), so it
depends on the state alone and not on what happened to be looked at.

Who asks makes little difference: a table serves every tenant and user that the nodes have accounts for. Only cards that
are shared inside one share domain are the domain's own; what can join them has a small table per domain beside it, over
the nodes where that domain shares a card.

Cost: one lookup per changed node and table asked, a scoring per new condition, and a search for the least of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Final, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np

from gpuyard_daemon.core.placing.affinity import NONE, Wishes
from gpuyard_daemon.core.placing.capacity import NodeSpace, Pool
from gpuyard_daemon.core.placing.demand import LiveDemand
from gpuyard_daemon.core.placing.feasibility import Reason, Shape, carve_from, judge
from gpuyard_daemon.core.placing.fragmentation import DemandMix
from gpuyard_daemon.core.placing.scoring import UNFIT, about_as_good, choose, is_way_on
from gpuyard_daemon.core.state.model import account_of
from gpuyard_protocol.names import Tenant, User
from gpuyard_protocol.resources import Partition, ResourceNeed

T = TypeVar("T")
Scores: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

#: Scores by the number of a node's condition, for a domain's own cards with the numbers of what those look like.
Memo: TypeAlias = dict[tuple[int, tuple[int, ...]] | int, int]
MemoKey: TypeAlias = tuple[ResourceNeed, bool, int, Tenant, User]

#: Tables kept, with what they learnt; beyond it those that were not asked for longest go.
_TABLES_MAX: Final = 512
#: Conditions whose score a table remembers, for each node of the yard.
_CONDITIONS_PER_NODE: Final = 8
_CONDITIONS_MIN: Final = 65_536


class TableKey(NamedTuple):
    """Requests with equal keys fit the same nodes, equally well."""

    need: ResourceNeed
    spanning: bool
    timeslice_milli_max: int
    #: Whose shared cards count; None: nobody's, over all nodes.
    domain: Tenant | None
    #: Who asks, where some node is not open to everybody.
    who: tuple[Tenant, User] | None


class Finder:
    """The tables of all shapes, and the demand mix they are scored by."""

    __slots__ = (
        "_demand",
        "_memos",
        "_memos_before",
        "_memos_version",
        "_others",
        "_shape_of",
        "_tables",
        "_who_version",
        "_whole_yard_open",
    )

    def __init__(self, demand: LiveDemand | None = None) -> None:
        self._demand = demand or LiveDemand()
        #: The one asked last stands last.
        self._tables: dict[TableKey, Table] = {}
        self._memos: dict[MemoKey, Memo] = {}
        self._memos_before: dict[MemoKey, Memo] = {}
        self._memos_version = -1
        self._others: dict[Hashable, object] = {}
        #: One shape of each need and owner, that the others learn with.
        self._shape_of: dict[tuple[ResourceNeed, tuple[Tenant, User] | None], Shape] = {}
        self._who_version = -1
        self._whole_yard_open = True

    @property
    def demand(self) -> LiveDemand:
        return self._demand

    def who(self, pool: Pool, shape: Shape) -> tuple[Tenant, User] | None:
        """Who asks, if that matters to any node."""
        if self._who_version != pool.inventory_version:
            self._who_version = pool.inventory_version
            self._whole_yard_open = all("*/*" in accounts for accounts in pool.accounts)
        if self._whole_yard_open and not (
            pool.shut_nodes and account_of(shape.need, shape.tenant, shape.user) in pool.shut_nodes
        ):
            return None
        return shape.tenant, shape.user

    def memos(self, key: MemoKey) -> tuple[Memo, Memo]:
        """Scores by condition, under the mix in use and under the one before."""
        demand = self._demand
        if self._memos_version != demand.version:
            known = self._memos if self._memos_version == demand.version_before else {}
            self._memos, self._memos_before = {}, known
            self._memos_version = demand.version
        for memos in (self._memos, self._memos_before):
            if len(memos) > 2 * _TABLES_MAX:
                memos.clear()
        return self._memos.setdefault(key, {}), self._memos_before.setdefault(key, {})

    def adopt(self, pool: Pool) -> None:
        """Let all tables go by the mix in use as far as it was taken over by now, before one turn must do it all."""
        for table in self._tables.values():
            table.adopt(pool, self._demand)

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """Something kept for every shape of one key, made when first asked for."""
        known = self._others.pop(key, None)
        if known is None:
            if len(self._others) >= _TABLES_MAX:
                del self._others[next(iter(self._others))]
            known = make()
        self._others[key] = known
        return cast("T", known)

    def table(self, key: TableKey) -> Table:
        table = self._tables.pop(key, None)
        if table is None:
            if len(self._tables) >= _TABLES_MAX:
                del self._tables[next(iter(self._tables))]
            if len(self._shape_of) >= _TABLES_MAX:
                self._shape_of.clear()
            table = Table(self, self._shape(key, key.domain or ""), spanning=key.spanning, of_domain=key.domain)
        self._tables[key] = table
        return table

    def taught(self, shape: Shape, key: TableKey) -> Shape:
        """The same for its share domain, with what is known of inventories for requests with such a key."""
        return self._shape(key, shape.domain)

    def _shape(self, key: TableKey, domain: Tenant) -> Shape:
        tenant, user = key.who or ("", "")
        most = key.timeslice_milli_max
        shape = Shape(key.need, 1, tenant, user, most, domain=domain, open_to_all=not key.who)
        # Whose shared cards count makes no difference to what inventories say.
        shape.learn_with(self._shape_of.setdefault((key.need, key.who), shape))
        return shape


class Table:
    """The score of every node for one kind of request."""

    __slots__ = (
        "_adopted", "_best", "_by_condition", "_by_condition_before", "_domain", "_memo_key", "_mix_version",
        "_read_to", "_scores", "_shape", "_spanning", "_wants_part", "finder",
    )  # fmt: skip

    def __init__(self, finder: Finder, shape: Shape, *, spanning: bool, of_domain: Tenant | None) -> None:
        self.finder = finder
        self._shape = shape
        #: Of a card: a share or a MIG instance.
        self._wants_part = shape.need.is_share or bool(shape.need.mig)
        self._spanning = spanning
        self._domain = of_domain
        #: By node number, from 1.
        self._scores: Scores = np.full(0, UNFIT, dtype=np.int64)
        #: How far of the pool's changes is in the scores; -1: nothing yet.
        self._read_to = -1
        self._mix_version = -1
        #: Nodes with numbers up to this are scored by the mix in use, the others by the one before.
        self._adopted = 0
        #: Tables of one need share what they learnt, whatever the domain.
        self._memo_key = (shape.need, spanning, shape.timeslice_milli_max, shape.tenant, shape.user)
        self._by_condition, self._by_condition_before = finder.memos(self._memo_key)
        #: (score, node number) of the best; None: to be found.
        self._best: tuple[int, int] | None = None

    def best(self, pool: Pool) -> tuple[int, int]:
        """(score, node number) of the best node; the score is `UNFIT` if there is none."""
        self._catch_up(pool)
        best = self._best
        if best is None:
            if not len(self._scores):
                return UNFIT, 0
            place = int(self._scores.argmin())
            best = self._best = (int(self._scores[place]), place + 1)
        return best

    def scores(self, pool: Pool) -> Scores:
        """Of all nodes, by number less one. To read only."""
        self._catch_up(pool)
        return self._scores

    def _catch_up(self, pool: Pool) -> None:
        demand = self.finder.demand
        if self._mix_version != demand.version or self._adopted != demand.adopted:
            self.finder.adopt(pool)
            self.adopt(pool, demand)
        log = pool.changes if self._domain is None else pool.changes_of(self._domain)
        made = log.made
        if self._read_to == made and len(self._scores) >= len(pool.by_number):
            return
        changed = log.since(self._read_to)
        if changed is None or len(self._scores) < len(pool.by_number):
            if changed is None:
                self._scores = np.full(len(pool.by_number), UNFIT, dtype=np.int64)
                changed = pool.by_number if self._domain is None else pool.shared_by(self._domain)
            else:
                more = len(pool.by_number) - len(self._scores)
                self._scores = np.concatenate((self._scores, np.full(more, UNFIT, dtype=np.int64)))
            self._best = None
        self._enter(pool, changed)
        self._read_to = made

    def _enter(self, pool: Pool, spaces: Iterable[NodeSpace]) -> None:
        """Score these nodes anew."""
        scores, need = self._scores, self._shape.need
        cpu_milli, memory_mib, cards = need.cpu_milli, need.memory_mib, need.gpus
        # No node has the number 0, and no score is below 0: nothing is known of the best.
        least, best = self._best or (-1, 0)
        for space in spaces:
            number = space.number
            if cpu_milli > space.cpu_free_milli or memory_mib > space.memory_free_mib or cards > space.idle_cards:
                # Most nodes of a full yard, and found out at once. What is claimed only makes it less.
                score = UNFIT
            else:
                score = self._score(pool, space)
            scores[number - 1] = score
            if score < least or (score == least and number < best):
                least, best = score, number
            elif number == best and score > least:
                # Another may be the best now.
                least, best = -1, 0
        self._best = (least, best) if best else None

    def adopt(self, pool: Pool, demand: LiveDemand) -> None:
        """Go by the mix in use as far as it was taken over by now."""
        if self._mix_version != demand.version:
            if self._mix_version != demand.version_before or self._adopted < len(pool.by_number):
                self._read_to = -1
            self._mix_version, self._adopted = demand.version, 0
            self._by_condition, self._by_condition_before = self.finder.memos(self._memo_key)
        begin, self._adopted = self._adopted, demand.adopted
        if self._read_to < 0 or begin == self._adopted:
            return
        domain, spaces = self._domain, pool.by_number[begin : min(self._adopted, len(self._scores))]
        self._enter(pool, spaces if domain is None else [space for space in spaces if domain in space.domains])

    def _score(self, pool: Pool, space: NodeSpace) -> int:
        domain, shape = self._domain, self._shape
        if domain is not None and domain not in space.domains:
            # Nodes without a card of the domain's are the common table's, and their changes are not told here.
            return UNFIT
        if shape.need.nodes:
            return self._judge(space)
        if self._wants_part and not is_way_on(space.beside_claims(), shape, spanning=self._spanning):
            # Sooner told than looked up.
            return UNFIT
        number = pool.condition_number(space)
        condition: tuple[int, tuple[int, ...]] | int = number
        if domain is not None:
            # Scores do not depend on who the domain is, but on which of the cards are its own.
            own = [look for look, owner, _, _ in space.beside_claims().faces if owner == domain]
            condition = (number, tuple(sorted(own)))
        memo = self._by_condition if space.number <= self._adopted else self._by_condition_before
        known = memo.get(condition)
        if known is None:
            if len(memo) > _CONDITIONS_MIN + _CONDITIONS_PER_NODE * len(pool.by_number):
                memo.clear()
            known = memo[condition] = self._judge(space)
        return known

    def _judge(self, space: NodeSpace) -> int:
        mix = self.finder.demand.mix_at(space.number)
        choice = choose(mix, space, self._shape, spanning=self._spanning)
        return UNFIT if choice is None else choice.score


class Candidates:
    """The nodes that one shape fits now, best first."""

    __slots__ = ("_carver", "_common", "_keys_version", "_own", "finder", "shape", "spanning")

    def __init__(self, shape: Shape, finder: Finder | None = None, *, spanning: bool = False) -> None:
        self.shape = shape
        self.spanning = spanning
        self.finder = finder or Finder()
        self._keys_version = -1
        self._common: TableKey | None = None
        #: Of the share domain's own cards, for shares that may join others.
        self._own: TableKey | None = None
        #: The same shape, that knows what the tables found out about inventories; for these keys.
        self._carver: Shape | None = None

    def group(self, pool: Pool) -> tuple[TableKey, TableKey | None]:
        """Equal for shapes that fit the same nodes now and later, until an inventory changes."""
        if self._common is None or self._keys_version != pool.inventory_version:
            self._keys_version = pool.inventory_version
            shape = self.shape
            who = self.finder.who(pool, shape)
            self._common = TableKey(shape.need, self.spanning, shape.timeslice_milli_max, None, who)
            joins = shape.need.is_share and shape.need.isolation != "hard"
            self._own = self._common._replace(domain=shape.domain) if joins else None
            self._carver = None
        return self._common, self._own

    def best(self, pool: Pool, wishes: Wishes = NONE) -> NodeSpace | None:
        """The best-scored node; of equals the one known longest. None: it fits nowhere now."""
        if wishes.apart_from or wishes.warm:
            return self._best_wished(pool, wishes)
        common, own = self.group(pool)
        score, number = self.finder.table(common).best(pool)
        if own is not None:
            score, number = min((score, number), self.finder.table(own).best(pool))
        return pool.by_number[number - 1] if score != UNFIT else None

    def _best_wished(self, pool: Pool, wishes: Wishes) -> NodeSpace | None:
        scores = self.scores(pool)
        if wishes.apart_from and len(scores):
            scores = _apart(pool, scores, [number - 1 for number in wishes.apart_from])
        if not len(scores) or scores.min() == UNFIT:
            return None
        place = int(scores.argmin())
        warm = [number - 1 for number in wishes.warm if scores[number - 1] != UNFIT]
        if warm:
            nearest = min(warm, key=lambda number: (int(scores[number]), number))
            if about_as_good(int(scores[nearest]), int(scores[place])):
                place = nearest
        return pool.by_number[place]

    def in_order(self, pool: Pool) -> list[NodeSpace]:
        """All nodes it fits, best first."""
        scores = self.scores(pool)
        order = np.argsort(scores, kind="stable")[: int((scores != UNFIT).sum())]
        return [pool.by_number[place] for place in order]

    def carve(self, space: NodeSpace) -> Partition:
        """The partition on a node that `best` named."""
        mix = self.finder.demand.mix_at(space.number)
        if self._carver is None:
            shape = self.shape
            if self._common is None:
                return carve_best(mix, space, shape, spanning=self.spanning)
            self._carver = self.finder.taught(shape, self._common)
        return carve_best(mix, space, self._carver, spanning=self.spanning)

    def scores(self, pool: Pool) -> Scores:
        """The score of every node, by number less one."""
        common, own = self.group(pool)
        scores = self.finder.table(common).scores(pool)
        return scores if own is None else np.minimum(scores, self.finder.table(own).scores(pool))


def _apart(pool: Pool, scores: Scores, taken: list[int]) -> Scores:
    """Scores of the nodes that are not taken if any of them fits; and of those only in the racks that hold least.

    `taken`: places of nodes. Nodes first, since they are lost more often than racks.
    """
    others = scores.copy()
    others[taken] = UNFIT
    if others.min() == UNFIT:
        others = scores.copy()
    if pool.racks() is not None and others.min() != UNFIT:
        racks = pool.domains("rack")
        held = np.bincount(racks[taken], minlength=int(racks.max()) + 1)[racks]
        others[held > held[others != UNFIT].min()] = UNFIT
    return others


def carve_best(mix: DemandMix, space: NodeSpace, shape: Shape, *, spanning: bool = False, owner: int = 0) -> Partition:
    """The partition that scores best on a node that a replica fits."""
    choice = choose(mix, space, shape, spanning=spanning, owner=owner)
    if choice is None:
        reason = judge(space, shape, spanning=spanning, owner=owner)
        said = reason.value if isinstance(reason, Reason) else "it fits"
        raise ValueError(f"node {space.node.id} has no place for {shape.need.describe()}: {said}")
    if space.claims:
        space = space.beside_claims(owner)
    return carve_from(space, shape, choice.cards, spanning=spanning)
