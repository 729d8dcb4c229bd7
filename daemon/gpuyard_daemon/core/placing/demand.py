"""What the yard is asked for: the live mix of work that placement keeps room for.

Every arrival counts with the weight of one, halved each day that passes; what waits counts twice. The mix that
placement goes by is made from these counts at epochs: after so many arrivals, more the more were seen, and taken over
only if it differs noticeably from the one in use, since a changed mix means that every node is scored anew.

Taken over node by node: each arrival brings some nodes more under the new mix, in the order in which nodes became
known; the others are scored by the mix before. In a yard of thousands of nodes no turn then pays for all of them. A mix
that would change again meanwhile waits for the next epoch.

Durable, and changed by facts alone: counts, epochs, the mix in use and how far it was taken over are part of the state,
so a restart goes on with the very mix that an uninterrupted run would have. A yard that has counted nothing yet goes by
one whole card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from gpuyard_daemon.core.placing.fragmentation import ONE, Demand, DemandMix
from gpuyard_protocol.resources import ResourceNeed

_DAY_MS = 86_400_000
#: Counts are faded when they have grown so old.
_FADE_MS = 3_600_000
#: What one arrival counts; room for halving.
_ARRIVAL = 1 << 20
#: Arrivals of the first epoch, and of the longest.
_EPOCH_MIN, _EPOCH_MAX = 16, 4096
#: An epoch ends after this part of all arrivals seen.
_EPOCH_PART = 4
#: Kinds of demand that are counted; beyond it the rarest are forgotten at an epoch.
_KINDS_MAX = 512
#: A new mix is taken over if it differs from the one in use by more than this, in thousandths.
_DIFFERENCE_MILLI = 50
#: Nodes that each arrival brings under a new mix: a turn scores them anew for every kind of request that is about, so
#: this bounds the longest turns; ten thousand nodes have it after six hundred arrivals. With 8 a fill of 1,200 nodes
#: held a twentieth of a point less than with all at once, with 32 about as much; but with 32 one decision in a hundred
#: of a yard of 10,000 nodes took a fifth longer than with 16.
_NODES_PER_ARRIVAL = 16
#: Taken over by all nodes that there ever are.
ALL_NODES = 1 << 62
#: What a yard goes by that has seen nothing yet.
_NOTHING_KNOWN = (Demand(ResourceNeed(gpus=1), 1),)


class DemandRecord(msgspec.Struct, array_like=True, gc=False):
    """The durable part: what was counted, and the mix in use."""

    #: (need, weight), in the order in which they were first seen.
    counts: list[tuple[ResourceNeed, int]] = []
    #: Arrivals ever, and since the last epoch.
    seen: int = 0
    since: int = 0
    #: The counts are faded up to then.
    faded_ms: int = 0
    #: The mix in use, most frequent first: weights in thousandths of all.
    in_use: list[tuple[ResourceNeed, int]] = []
    #: The one before, which nodes with numbers above `adopted` still go by; empty: all go by the one in use.
    before: list[tuple[ResourceNeed, int]] = []
    adopted: int = 0


class LiveDemand:
    """Counts of arrivals, and the mix made from them."""

    __slots__ = (
        "_counts", "_kinds", "_mix", "_mix_before", "_record", "_speeds", "_waiting", "adopted", "version",
        "version_before",
    )  # fmt: skip

    def __init__(self, record: DemandRecord | None = None) -> None:
        self._record = record or DemandRecord()
        self._counts: dict[ResourceNeed, int] = dict(self._record.counts)
        #: What of a need counts, by need. A memo.
        self._kinds: dict[ResourceNeed, ResourceNeed] = {}
        #: Derived: replicas that wait, by kind.
        self._waiting: dict[ResourceNeed, int] = {}
        self._mix: DemandMix | None = None
        self._mix_before: DemandMix | None = None
        #: By model, in thousandths of the fastest's: the operator's, and no part of what is counted.
        self._speeds: tuple[tuple[str, int], ...] = ()
        #: Grows when the mix in use changes. Not part of the state.
        self.version = 0
        #: The version that the mix before had; -1: nobody scored by it under that number.
        self.version_before = -1
        #: Nodes with numbers up to this go by the mix in use.
        self.adopted = self._record.adopted if self._record.before else ALL_NODES

    @property
    def record(self) -> DemandRecord:
        self._record.counts = list(self._counts.items())
        return self._record

    @property
    def mix(self) -> DemandMix:
        """The mix in use."""
        if self._mix is None:
            self._mix = self._made(self._record.in_use)
        return self._mix

    def mix_at(self, number: int) -> DemandMix:
        """The mix that a node goes by, by its number."""
        if number <= self.adopted:
            return self.mix
        if self._mix_before is None:
            self._mix_before = self._made(self._record.before)
        return self._mix_before

    def _made(self, weights: list[tuple[ResourceNeed, int]]) -> DemandMix:
        return DemandMix([Demand(need, weight) for need, weight in weights] or _NOTHING_KNOWN, self._speeds)

    def set_speeds(self, speeds: tuple[tuple[str, int], ...]) -> None:
        """Models of cards are so fast from now on."""
        if speeds != self._speeds:
            self._speeds = speeds
            self._mix = self._mix_before = None
            self.version += 1
            self.version_before = -1

    def arrived(self, need: ResourceNeed, replicas: int, now_ms: int, nodes: int = 0) -> None:
        """So many replicas were asked for, of a yard of so many nodes."""
        kind = self._kinds.get(need) or self._kind_of(need)
        record = self._record
        if now_ms - record.faded_ms >= _FADE_MS:
            self._fade(now_ms)
        counts = self._counts
        counts[kind] = counts.get(kind, 0) + replicas * _ARRIVAL
        seen = record.seen = record.seen + replicas
        since = record.since = record.since + replicas
        if since >= _EPOCH_MIN and (since >= _EPOCH_MAX or since >= seen // _EPOCH_PART):
            self._begin_epoch()
        if self.adopted < ALL_NODES:
            self._adopt_further(nodes)

    def waits(self, need: ResourceNeed, replicas: int) -> None:
        """So many replicas more (or fewer) wait."""
        kind = self._kinds.get(need) or self._kind_of(need)
        left = self._waiting.get(kind, 0) + replicas
        if left:
            self._waiting[kind] = left
        else:
            del self._waiting[kind]

    def count_all(self, needs: Iterable[tuple[ResourceNeed, int]], now_ms: int) -> None:
        """Begin with what is there: for a state written before demand was counted."""
        for need, replicas in needs:
            self.arrived(need, replicas, now_ms)

    def _adopt_further(self, nodes: int) -> None:
        record = self._record
        self.adopted = record.adopted = record.adopted + _NODES_PER_ARRIVAL
        if record.adopted >= nodes:
            record.before, record.adopted = [], 0
            self._mix_before, self.adopted = None, ALL_NODES

    def _kind_of(self, need: ResourceNeed) -> ResourceNeed:
        kind = self._kinds.get(need)
        if kind is None:
            if len(self._kinds) >= 4 * _KINDS_MAX:
                self._kinds.clear()
            kind = self._kinds[need] = ResourceNeed(
                gpus=need.gpus,
                share_milli=need.share_milli,
                share_memory_mib=need.share_memory_mib,
                mig=need.mig,
                isolation=need.isolation,
                models=need.models,
                card_memory_mib=need.card_memory_mib,
                cpu_milli=need.cpu_milli,
                memory_mib=need.memory_mib,
            )
        return kind

    def _fade(self, now_ms: int) -> None:
        """Let all counts be of their age now, and forget what has faded away."""
        passed = now_ms - self._record.faded_ms
        self._record.faded_ms = now_ms
        counts = [(kind, faded(weight, passed)) for kind, weight in self._counts.items()]
        self._counts = {kind: weight for kind, weight in counts if weight}

    def _begin_epoch(self) -> None:
        record = self._record
        record.since = 0
        if record.before:
            return
        if len(self._counts) > _KINDS_MAX:
            items = list(self._counts.items())
            kept = sorted(range(len(items)), key=lambda place: -items[place][1])[:_KINDS_MAX]
            self._counts = dict([items[place] for place in sorted(kept)])
        weights = dict(self._counts)
        for kind, waiting in sorted(self._waiting.items(), key=_by_kind):
            weights[kind] = weights.get(kind, 0) + 2 * waiting * _ARRIVAL
        total = sum(weights.values())
        mix = [(kind, weight * ONE // total) for kind, weight in sorted(weights.items(), key=_by_weight)]
        if _difference(dict(record.in_use), dict(mix)) * 1000 > _DIFFERENCE_MILLI * 2 * ONE:
            record.before, record.in_use = record.in_use, [(kind, weight) for kind, weight in mix if weight]
            self._mix, self._mix_before = None, self._mix
            self.version_before = self.version
            self.version += 1
            self.adopted = 0 if record.before else ALL_NODES


def _by_weight(item: tuple[ResourceNeed, int]) -> tuple[int, bytes]:
    return -item[1], _ENCODER.encode(item[0])


def _by_kind(item: tuple[ResourceNeed, int]) -> bytes:
    return _ENCODER.encode(item[0])


_ENCODER = msgspec.msgpack.Encoder()


def _difference(one: Mapping[ResourceNeed, int], other: Mapping[ResourceNeed, int]) -> int:
    """Sum of what the weights of two mixes differ by: 0 to 2 × `ONE`."""
    return sum([abs(weight - other.get(kind, 0)) for kind, weight in one.items()]) + sum(
        [weight for kind, weight in other.items() if kind not in one]
    )


def faded(weight: int, passed_ms: int) -> int:
    """A weight after so long: halved each day, and in between along straight lines."""
    days, rest = divmod(passed_ms, _DAY_MS)
    if days >= 62:
        return 0
    return (weight >> days) * (2 * _DAY_MS - rest) // (2 * _DAY_MS)
