"""When a waiting job may start, and what that rests on; or that there is nothing to go by.

The yard is played forward on a copy: jobs end when their limits, estimates or histories say, what they leave goes to
those ahead in line as far as it fits them, and then to the job. Where that is too much to play, or leads nowhere, the
rate at which jobs ended lately gives a rough figure. Knows no walls: what arrives later, is preempted or fails moves
every estimate, so each says what it rests on, and the weakest ground of all that it used.
"""

from __future__ import annotations

import heapq
from itertools import islice
from typing import NamedTuple

from gpuyard_daemon.core.explaining.holders import Held, expected_end
from gpuyard_daemon.core.explaining.survey import Survey, Work, room_on
from gpuyard_daemon.core.placing.feasibility import Shape
from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.facts import Placement
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants.holdings import amounts_of
from gpuyard_daemon.core.tenants.quota import Amounts
from gpuyard_daemon.core.tenants.tenancy import least_held
from gpuyard_protocol.explaining import StartBasis, StartEstimate
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import JobId, NodeId, Tenant
from gpuyard_protocol.resources import Partition
from gpuyard_protocol.units import format_ms

#: Judgements of one forecast, and jobs ahead that it plays.
WORK_UNITS = 700
AHEAD_MAX = 48
#: Running jobs among which those of a limited tenant are looked for.
_RUNNING_MAX = 4000
#: What placing one replica in the trial costs, in judgements.
_PLACING_UNITS = 6
#: Ends that a rate rests on, at least and at most, and how long ago they may be.
_RATE_ENDS_MIN = 10
_RATE_ENDS_MAX = 100
_RATE_WINDOW_MS = 3_600_000

#: From the firmest ground to the weakest.
_GROUNDS: tuple[StartBasis, ...] = ("now", "begin", "stopping", "limit", "estimate", "history", "rate", "none")
_GROUND_TEXTS: dict[StartBasis, str] = {
    "stopping": "as soon as what was told to stop has",
    "limit": "at the latest by the time limits of what runs",
    "estimate": "if what runs takes as long as its owners estimate",
    "history": "if what runs takes as long as jobs like it did",
}


class _End(NamedTuple):
    """Jobs end in this order."""

    at_ms: int
    number: JobId
    basis: StartBasis
    job: Job
    #: Where it is in the trial, if it was started there.
    placements: tuple[Placement, ...] | None


class _Waiting:
    """A job that waits in the trial, and how many of its replicas each node takes."""

    __slots__ = ("job", "rooms", "shape")

    def __init__(self, job: Job, shape: Shape) -> None:
        self.job = job
        self.shape = shape
        #: By node, of the members of a gang over several nodes.
        self.rooms: dict[NodeId, int] = {}


class Forecast:
    """One play."""

    def __init__(self, cluster: Cluster, job: Job, survey: Survey, now_ms: int) -> None:
        self._cluster = cluster
        self._job = job
        self._survey = survey
        self._now_ms = now_ms
        self._trial = PoolTrial(cluster.pool)
        self._work = Work(WORK_UNITS)
        #: Compute held by tenants, and left by the jobs of queues, as it would change.
        self._held_milli: dict[Tenant, int] = {}
        self._given_back: dict[str, Amounts] = {}
        #: Jobs that have ended so far in the play, by node.
        self._gone: dict[NodeId, list[JobId]] = {}

    def estimate(self, held: list[Held], ahead: list[Job] | None, ahead_count: int, limit: Why | None) -> StartEstimate:
        """`ahead`: those before it in line, in order; None: too many to play. `limit`: what its tenant's limit or its
        queue's quota says against it now.
        """
        if not self._survey.may_ever:
            return StartEstimate(basis="none", text="no estimate: no node of today could ever run it")
        if ahead is not None and (played := self._play(held, ahead)) is not None:
            return played
        if limit is not None:
            return StartEstimate(basis="none", text=f"no basis for an estimate: {limit.text}")
        if (rate := self._by_rate(ahead_count)) is not None:
            return rate
        return self._nothing(held, ahead_count)

    # --- playing -----------------------------------------------------------------------------------------------------

    def _play(self, held: list[Held], ahead: list[Job]) -> StartEstimate | None:
        ends = [_End(h.until_ms, h.job.id, h.basis, h.job, None) for h in held if h.until_ms and h.basis]
        ends += self._own_ends({end.number for end in ends})
        heapq.heapify(ends)
        waiting = [_Waiting(job, self._shape_of(job)) for job in ahead]
        waiting.append(self._me())
        ground: StartBasis = "now"
        while ends:
            end = heapq.heappop(ends)
            freed = self._free(end)
            ground = max(ground, end.basis, key=_GROUNDS.index)
            for place in list(waiting):
                placements = self._place(place, freed)
                if self._work.left < 0:
                    return None
                if placements is None:
                    continue
                if place.job is self._job:
                    return self._told(end.at_ms, ground, placements, len(ahead) + 1 - len(waiting))
                waiting.remove(place)
                if (later := self._end_of(place.job, end.at_ms, placements)) is not None:
                    heapq.heappush(ends, later)
        return None

    def _me(self) -> _Waiting:
        me = _Waiting(self._job, self._survey.shape)
        if me.shape.replicas > 1:
            for finding in self._survey.findings:
                if finding.room:
                    me.rooms.update(dict.fromkeys(finding.group.nodes, finding.room))
        return me

    def _shape_of(self, job: Job) -> Shape:
        most = self._survey.shape.timeslice_milli_max
        return Shape(job.spec.need, job.spec.least_replicas, job.tenant, job.user, most)

    def _own_ends(self, known: set[JobId]) -> list[_End]:
        """Where the tenant is limited, its own jobs matter wherever they are."""
        if not self._is_limited(self._job):
            return []
        ends = []
        for job in islice(self._cluster.running.everybody(), _RUNNING_MAX):
            if job.tenant == self._job.tenant and job.id not in known:
                at_ms, basis = expected_end(self._cluster, job, self._now_ms)
                if basis:
                    ends.append(_End(at_ms, job.id, basis, job, None))
        return ends

    def _free(self, end: _End) -> list[NodeId]:
        """Take a job off its nodes in the trial."""
        job = end.job
        if end.placements is None:
            places = [(a.node, a.partition) for a in job.assignments if a.is_live]
            self._trial.without(job.assignments)
        else:
            places = [(placement.node, placement.partition) for placement in end.placements]
            self._trial.leave(job.id, end.placements)
        nodes = list(dict.fromkeys([node for node, _ in places]))
        self._count(job, places, -1)
        for node in nodes:
            self._gone.setdefault(node, []).append(job.id)
        return nodes

    def _place(self, place: _Waiting, freed: list[NodeId]) -> tuple[Placement, ...] | None:
        """Let a job take what it can: only nodes that somebody left can have become good for it."""
        shape, job = place.shape, place.job
        if not self._may_hold(job, shape):
            return None
        if shape.replicas == 1:
            nodes: list[NodeId] = list(self._gone) if self._is_limited(job) else freed
            if job is self._job and self._survey.starts:
                nodes = [finding.group.nodes[0] for finding in self._survey.findings if finding.room]
        else:
            for node in freed:
                self._work.spend(_PLACING_UNITS * shape.replicas)
                place.rooms[node] = room_on(self._trial.space(node), shape, job.id, spanning=True)
            nodes = [node for node, room in place.rooms.items() if room] if self._could(place) else []
            nodes = nodes or [node for node in freed if self._takes_all(node, shape, job.id)]
        self._work.spend(_PLACING_UNITS * len(nodes) * shape.replicas)
        if not nodes or self._work.left < 0:
            return None
        placements = self._trial.place(shape, job.id, nodes)
        if placements is not None:
            self._count(job, [(each.node, each.partition) for each in placements], 1)
        return placements

    def _could(self, place: _Waiting) -> bool:
        return sum(place.rooms.values()) >= place.shape.replicas

    def _takes_all(self, node: NodeId, shape: Shape, owner: JobId) -> bool:
        self._work.spend(shape.replicas)
        return room_on(self._trial.space(node), shape, owner, spanning=False) == shape.replicas

    def _is_limited(self, job: Job) -> bool:
        """Something but room may stand in its way."""
        return self._cluster.quota.has_quotas or self._cluster.tenancy.is_limited(job.tenant)

    def _count(self, job: Job, places: list[tuple[NodeId, Partition]], sign: int) -> None:
        """Enter in the play's books that a job took or left places."""
        if not self._is_limited(job):
            return
        queue = self._cluster.quota.queue_of(job)
        given_back = self._given_back.setdefault(queue, {})
        for node, partition in places:
            for kind, milli in amounts_of(self._trial.space(node), partition).items():
                given_back[kind] = given_back.get(kind, 0) - sign * milli
                self._held_milli[job.tenant] = self._held_milli.get(job.tenant, 0) + sign * milli

    def _may_hold(self, job: Job, shape: Shape) -> bool:
        """Its tenant's limit and its queue's quota, as the play has left them."""
        tenancy, quota = self._cluster.tenancy, self._cluster.quota
        most = tenancy.limits(job.tenant).gpus_max_milli
        held = tenancy.held_milli.get(job.tenant, 0) + self._held_milli.get(job.tenant, 0)
        if most and held + least_held(shape.need, shape.replicas) > most:
            return False
        if not quota.has_quotas:
            return True
        wanted, queue = self._cluster.ranking.wanted(job), quota.queue_of(job)
        return any(quota.obstacle(queue, amounts, self._given_back) is None for amounts in wanted) or not wanted

    def _end_of(self, job: Job, start_ms: int, placements: tuple[Placement, ...]) -> _End | None:
        """When a job that was started in the play ends there; None: nobody knows."""
        expected = self._cluster.ranking.expected_ms(job, self._now_ms)
        limit_ms = job.spec.time_limit_ms
        if expected is not None and (not limit_ms or expected[0] < limit_ms):
            basis: StartBasis = "estimate" if expected[1] == "estimate" else "history"
            return _End(start_ms + expected[0], job.id, basis, job, placements)
        return _End(start_ms + limit_ms, job.id, "limit", job, placements) if limit_ms else None

    # --- telling -----------------------------------------------------------------------------------------------------

    def _told(
        self, at_ms: int, ground: StartBasis, placements: tuple[Placement, ...], went_first: int
    ) -> StartEstimate:
        nodes = list(dict.fromkeys([placement.node for placement in placements]))
        where = ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more nodes" if len(nodes) > 3 else "")
        own = dict.fromkeys(
            number
            for node in nodes
            for number in self._gone.get(node, ())
            if self._cluster.jobs[number].tenant == self._job.tenant and self._cluster.jobs[number].live
        )
        after = f", after job{'s' if len(own) > 1 else ''} {', '.join(map(str, list(own)[:3]))}" if own else ""
        if went_first:
            after += f", and {went_first} of those ahead {'go' if went_first > 1 else 'goes'} first"
        wait = _rough(max(0, at_ms - self._now_ms))
        return StartEstimate(basis=ground, text=f"in {wait} on {where}{after}: {_GROUND_TEXTS[ground]}", at_ms=at_ms)

    def _by_rate(self, ahead_count: int) -> StartEstimate | None:
        """From the jobs that ended lately: one starts for each that ends."""
        cluster, now_ms = self._cluster, self._now_ms
        if self._survey.starts:
            return None
        wants_gpu = self._survey.shape.need.wants_gpu
        ended: list[int] = []
        for number in islice(reversed(cluster.finished), 4 * _RATE_ENDS_MAX):
            job = cluster.jobs[number]
            if now_ms - job.ended_ms > _RATE_WINDOW_MS or len(ended) == _RATE_ENDS_MAX:
                break
            if job.first_started_ms and job.spec.need.wants_gpu == wants_gpu:
                ended.append(job.ended_ms)
        if len(ended) < _RATE_ENDS_MIN:
            return None
        window_ms = max(1000, now_ms - ended[-1])
        wait_ms = (ahead_count + 1) * window_ms // len(ended)
        text = (
            f"in about {_rough(wait_ms)}: {_jobs_are(ahead_count)} ahead of it, and {len(ended)} ended "
            f"in the last {_rough(window_ms)}"
        )
        return StartEstimate(basis="rate", text=text, at_ms=now_ms + wait_ms)

    def _nothing(self, held: list[Held], ahead_count: int) -> StartEstimate:
        unknown = sum(1 for each in held if not each.until_ms)
        if held and unknown:
            which = f"{unknown} of the {len(held)} jobs that hold" if len(held) > 1 else "the job that holds"
            what = f"{which} what it could use {'have' if unknown > 1 else 'has'} no time limit and no estimate"
        elif not held:
            what = "what it waits for is held by no job that could end"
        else:
            what = "what ends by itself does not make enough room for it"
        ahead = f", {_jobs_are(ahead_count)} ahead of it" if ahead_count else ""
        return StartEstimate(basis="none", text=f"no basis for an estimate: {what}{ahead}, and too few ended lately")


def _jobs_are(count: int) -> str:
    return "1 job is" if count == 1 else f"{count} jobs are"


def _rough(length_ms: int) -> str:
    """Without what nobody can know: minutes of days, seconds of hours."""
    for unit_ms, step_ms in ((86_400_000, 3_600_000), (3_600_000, 60_000)):
        if length_ms >= unit_ms:
            return format_ms(length_ms // step_ms * step_ms)
    return format_ms(max(1000, length_ms // 1000 * 1000))
