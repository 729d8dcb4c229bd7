"""What would start a waiting job now: changes to what it asks for, tried one by one on the present state.

Each change is a shape of its own, judged by the same function that places, so what is promised here would happen. The
smallest comes first: what takes nothing away from the job (a constraint, another model, another cut), then what takes
the least. After what its owner can do stands what others would have to: end a job, raise a limit.

The search is bounded in units of work. What is found is true of the present state; what is not found may exist. What
becomes free by somebody's end goes to those ahead in line first, so where many are ahead, no end is promised to help;
nor is that of one by whose end others come into line, or back to their cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import msgspec

from gpuyard_daemon.core.explaining.holders import Held
from gpuyard_daemon.core.explaining.survey import Group, Survey, Surveyor, Work, room_on
from gpuyard_daemon.core.placing.feasibility import Reason, Shape
from gpuyard_daemon.core.placing.trial import PoolTrial
from gpuyard_daemon.core.preempting.keeping import is_free
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.model import Job
from gpuyard_daemon.core.tenants import limits
from gpuyard_daemon.core.tenants.quota import Obstacle
from gpuyard_daemon.core.tenants.tenancy import held_by, least_held
from gpuyard_protocol.explaining import Remedy
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.names import NodeId, Tenant
from gpuyard_protocol.resources import Isolation, ResourceNeed, devices_of
from gpuyard_protocol.units import MILLI, format_mib, format_milli

_Fields: TypeAlias = dict[str, str | int | None]

#: Judgements of the whole search, and remedies that are shown.
WORK_UNITS = 400
SHOWN_MAX = 6
#: What placing one replica in a trial costs, in judgements.
_PLACING_UNITS = 6
#: Nodes and jobs that are tried for "if this job ended".
_END_NODES_MAX = 12
_END_JOBS_MAX = 16
_SHARES = (750, 500, 250, 125)


class Change(NamedTuple):
    """A request that asks for a little less or for something else."""

    kind: str
    #: What it takes away from the job, in thousandths; constraints cost a little, so that fewer are dropped first.
    loss: int
    #: "with 6 GPUs instead of 8": a sentence goes on from here.
    text: str
    fields: _Fields
    need: ResourceNeed
    replicas: int


class Remedies:
    """The search for one job."""

    def __init__(self, cluster: Cluster, surveyor: Surveyor, job: Job, survey: Survey, viewer: Tenant | None) -> None:
        self._cluster = cluster
        self._surveyor = surveyor
        self._job = job
        self._survey = survey
        self._viewer = viewer
        self._shape = survey.shape
        self._work = Work(WORK_UNITS)

    def find(self, held: list[Held], ahead: list[Job] | None, limit: Why | None) -> tuple[Remedy, ...]:
        """`held`: who holds what it could use, on the nodes nearest to taking it. `ahead`: those before it in line;
        None: too many to look at. `limit`: what its tenant's limit or its queue says against it, with room or without.
        """
        found: list[Remedy] = []
        if limit is not None and self._survey.starts:
            found += self._within_limit(held, ahead)
        ladders: dict[str, list[Change]] = {}
        for change in self._changes():
            ladders.setdefault(change.kind, []).append(change)
        helpful = [helped for ladder in ladders.values() if (helped := self._least(ladder)) is not None]
        found += [self._remedy(change, where) for change, where in sorted(helpful, key=lambda pair: pair[0].loss)]
        if not self._survey.starts and limit is None and ahead is not None:
            found += self._ends(held, ahead)
        owners_first = sorted(found, key=lambda remedy: ("owner", "others", "operator").index(remedy.by))
        return tuple(owners_first[:SHOWN_MAX])

    def _least(self, ladder: list[Change]) -> tuple[Change, Group] | None:
        """The smallest of some changes of one kind after which it would start; None if the largest does not help."""
        *smaller, largest = sorted(ladder, key=lambda change: change.loss)
        where = self._starts(largest)
        if where is None:
            return None
        for change in smaller:
            if (better := self._starts(change)) is not None:
                return change, better
        return largest, where

    def _starts(self, change: Change) -> Group | None:
        """Nodes where the job so changed would start, if it would and may."""
        cluster, need = self._cluster, change.need
        if cluster.quota.has_quotas:
            spec = msgspec.structs.replace(self._job.spec, need=need, replicas=change.replicas, min_replicas=0)
            within = limits.within_quota(cluster, msgspec.structs.replace(self._job, spec=spec))
            if isinstance(within, Obstacle):
                return None
            need = msgspec.structs.replace(need, models=within) if within else need
        # Whoever asks for something else is somebody else: what is kept for the job as it is, is not for that.
        found = self._surveyor.where_starts(self._shaped(need, change.replicas), 0, self._work)
        if found is None or cluster.tenancy.blocks(self._job.tenant, found[1]) is not None:
            return None
        return found[0]

    def _shaped(self, need: ResourceNeed, replicas: int) -> Shape:
        shape = self._shape
        return Shape(need, replicas, shape.tenant, shape.user, shape.timeslice_milli_max)

    def _remedy(self, change: Change, where: Group) -> Remedy:
        text = change.text
        fields = change.fields
        if change.kind == "OtherModel":
            models = sorted({card.device.short_model for card in where.space.cards if card.present})
            asked = "|".join(self._shape.need.models) or "so much memory"
            text = f"on {' or '.join(models)}, without asking for {asked}"
            fields = {"gpu_model": models[0] if len(models) == 1 else None}
            if change.replicas > 1 and not self._starts_on(change, models):
                text, fields = f"on whatever cards there are, without asking for {asked}", {"gpu_model": None}
        if self._job.spec.total_gpus and not fields.keys().isdisjoint(("gpus", "replicas")):
            # How they are parted is for the yard to say, or for its owner.
            fields = {"total_gpus": None, "replicas": change.replicas, "gpus": change.need.gpus}
        return Remedy(kind=change.kind, text=text, fields=fields, nodes=where.nodes[:1])

    def _starts_on(self, change: Change, models: list[str]) -> bool:
        """Whether all its replicas find places on one of these models alone."""
        need = msgspec.structs.replace(change.need, models=tuple(models))
        return len(models) == 1 and self._starts(change._replace(need=need)) is not None

    # --- what may be changed -----------------------------------------------------------------------------------------

    def _changes(self) -> Iterator[Change]:
        yield from self._constraints()
        yield from self._modes()
        if self._shape.need.gpus:
            yield from self._cards()
        yield from self._host()
        yield from self._shares()
        if self._shape.replicas > 1 and self._survey.members:
            for replicas in dict.fromkeys((min(self._survey.members, self._shape.replicas - 1), 1)):
                is_elastic = self._job.is_elastic
                yield self._change(
                    "FewerReplicas",
                    MILLI * (self._shape.replicas - replicas) // self._shape.replicas,
                    f"with {_count(replicas, 'replica')}{' or more' if is_elastic else ''} "
                    f"instead of {self._shape.replicas}",
                    {"min_replicas" if is_elastic else "replicas": replicas},
                    replicas=replicas,
                )

    def _change(
        self, kind: str, loss: int, text: str, fields: _Fields, need: ResourceNeed | None = None, replicas: int = 0
    ) -> Change:
        return Change(kind, loss, text, fields, need or self._shape.need, replicas or self._shape.replicas)

    def _with(self, **fields: object) -> ResourceNeed:
        return msgspec.structs.replace(self._shape.need, **fields)

    def _constraints(self) -> Iterator[Change]:
        need = self._shape.need
        if need.nodes:
            text = f"on another node than {', '.join(need.nodes)}"
            yield self._change("DropNodes", 10, text, {"nodes": None}, self._with(nodes=()))
        if need.node_labels:
            labels = ", ".join(f"{name}={value}" for name, value in need.node_labels)
            text = f"without asking for {labels}"
            yield self._change("DropLabels", 20, text, {"node_labels": None}, self._with(node_labels=()))
        if need.models or need.card_memory_mib:
            text = "on cards of another model"
            yield self._change("OtherModel", 30, text, {"gpu_model": None}, self._with(models=(), card_memory_mib=0))

    def _modes(self) -> Iterator[Change]:
        need = self._shape.need
        weaker: dict[Isolation, tuple[Isolation, ...]] = {"hard": ("soft", "none"), "soft": ("none",), "none": ()}
        if need.is_share:
            for place, isolation in enumerate(weaker[need.isolation]):
                text = f"with isolation {isolation} instead of {need.isolation}"
                fields: _Fields = {"isolation": isolation}
                yield self._change("WeakerIsolation", 100 + 50 * place, text, fields, self._with(isolation=isolation))

    def _cards(self) -> Iterator[Change]:
        need, replicas = self._shape.need, self._shape.replicas
        for parts in (2, 4, 8, 16):
            if need.gpus % parts == 0 and need.gpus > parts - 1:
                gpus, more = need.gpus // parts, replicas * parts
                text = f"as {more} replicas of {_count(gpus, 'GPU')} instead of {replicas} of {need.gpus}"
                fields: _Fields = {"replicas": more, "gpus": gpus}
                if self._job.is_elastic:
                    fields = {"min_replicas": more, "replicas": self._job.spec.replicas * parts, "gpus": gpus}
                yield self._change("OtherSplit", 40 + parts, text, fields, self._with(gpus=gpus), more)
        best = max([self._idle(f.group) for f in self._survey.nearest()], default=0)
        for gpus in dict.fromkeys((min(best, need.gpus - 1), need.gpus // 2, need.gpus // 4, 1)):
            if 0 < gpus < need.gpus:
                text = f"with {_count(gpus, 'GPU')} instead of {need.gpus}"
                loss = MILLI * (need.gpus - gpus) // need.gpus
                yield self._change("FewerGpus", loss, text, {"gpus": gpus}, self._with(gpus=gpus))
        if need.gpus == 1:
            for milli in (500, 250):
                share = format_milli(milli)
                text = f"with a share of {share} of a card instead of a whole one"
                asked = self._with(gpus=0, share_milli=milli, isolation="soft")
                yield self._change("ShareInstead", MILLI - milli, text, {"gpus": None, "gpu": share}, asked)

    def _idle(self, group: Group) -> int:
        _, positions = self._shape.eligible(group.space)
        cards = group.space.beside_claims(self._job.id).cards
        return sum(1 for position in positions if cards[position].mode == "idle" and cards[position].takes_work)

    def _host(self) -> Iterator[Change]:
        """Less of the node's CPU or memory, where a node lacks nothing but that."""
        need = self._shape.need
        reasons = {finding.verdict for finding in self._survey.findings}
        if Reason.CPUS_BUSY in reasons or Reason.TOO_FEW_CPUS in reasons:
            for milli in dict.fromkeys((need.cpu_milli * 3 // 4, need.cpu_milli // 2, need.cpu_milli // 4)):
                if milli >= 100:
                    text = f"with {format_milli(milli)} CPU cores instead of {format_milli(need.cpu_milli)}"
                    loss = 300 * (need.cpu_milli - milli) // need.cpu_milli
                    fields: _Fields = {"cpus": format_milli(milli)}
                    yield self._change("LessCpu", loss, text, fields, self._with(cpu_milli=milli))
        if Reason.MEMORY_BUSY in reasons or Reason.TOO_LITTLE_MEMORY in reasons:
            for mib in dict.fromkeys((need.memory_mib * 3 // 4, need.memory_mib // 2, need.memory_mib // 4)):
                if mib >= 256:
                    text = f"with {format_mib(mib)} of memory instead of {format_mib(need.memory_mib)}"
                    loss = 300 * (need.memory_mib - mib) // need.memory_mib
                    yield self._change(
                        "LessMemory", loss, text, {"memory": format_mib(mib)}, self._with(memory_mib=mib)
                    )

    def _shares(self) -> Iterator[Change]:
        need = self._shape.need
        for part in _SHARES:
            milli, mib = need.share_milli * part // MILLI, need.share_memory_mib * part // MILLI
            if milli:
                share = format_milli(milli)
                text = f"with a share of {share} instead of {format_milli(need.share_milli)}"
                yield self._change("SmallerShare", MILLI - part, text, {"gpu": share}, self._with(share_milli=milli))
            if mib >= 64:
                text = f"with {format_mib(mib)} of GPU memory instead of {format_mib(need.share_memory_mib)}"
                fields: _Fields = {"gpu_memory": format_mib(mib)}
                yield self._change("LessGpuMemory", MILLI - part, text, fields, self._with(share_memory_mib=mib))
        if need.mig:
            yield from self._profiles()

    def _profiles(self) -> Iterator[Change]:
        need = self._shape.need
        profiles = {
            name: profile
            for finding in self._survey.findings
            for card in finding.group.space.cards
            for name, profile in card.geometry.profiles.items()
        }
        wanted = profiles.get(need.mig)
        if wanted is None:
            return
        for name, profile in sorted(profiles.items()):
            smaller = (profile.size, profile.compute_slices) < (wanted.size, wanted.compute_slices)
            if smaller and not set(name) & {"+", "-"}:
                loss = MILLI - (profile.size + profile.compute_slices) * MILLI // (wanted.size + wanted.compute_slices)
                text = f"with {name} instead of {need.mig}"
                yield self._change("SmallerProfile", loss, text, {"mig": name}, self._with(mig=name))

    # --- what others would have to do --------------------------------------------------------------------------------

    def _within_limit(self, held: list[Held], ahead: list[Job] | None) -> Iterator[Remedy]:
        """There is room, and the tenant or queue may not have it: it holds less, or may hold more."""
        tenancy, tenant, shape = self._cluster.tenancy, self._job.tenant, self._shape
        found = self._surveyor.where_starts(shape, self._job.id, self._work)
        milli = found[1] if found else least_held(shape.need, shape.replicas)
        if tenancy.blocks(tenant, milli) is None:
            text = "if the yard's operator raised the quota of its queue"
            yield Remedy(kind="RaiseQuota", text=text, by="operator")
            return
        holds, most = tenancy.held_milli.get(tenant, 0), tenancy.limits(tenant).gpus_max_milli
        own = [
            each
            for each in held
            if each.job.tenant == tenant
            and holds - _held(self._cluster, each.job) + milli <= most
            and not self._lets_others_in(each.job)
        ]
        before = [each for each in ahead or () if each.tenant == tenant]
        if own and ahead is not None and not before:
            first = min(own, key=lambda each: (each.until_ms or 2**62, each.job.id))
            yield self._end_of([first.job], "")
        milli += sum([least_held(each.spec.need, each.spec.least_replicas) for each in before])
        text = f"if the yard's operator raised tenant {tenant}'s gpus_max from {format_milli(most)} to "
        yield Remedy(kind="RaiseQuota", text=text + format_milli(holds + milli), by="operator")

    def _ends(self, held: list[Held], ahead: list[Job]) -> list[Remedy]:
        """One job after whose end this one would start: the asker's own first, then those that end soonest."""
        mine = self._job.tenant
        ranked = sorted(held, key=lambda h: (h.job.tenant != mine, h.until_ms or 2**62, -h.milli, h.job.id))
        claim = self._cluster.claims.of(self._job.id)
        for candidate in ranked[:_END_JOBS_MAX]:
            if self._lets_others_in(candidate.job):
                continue
            if claim is not None and is_free(self._cluster, self._job, claim, without=[candidate.job]):
                return [self._end_of([candidate.job], claim.placements[0].node)]
            trial = PoolTrial(self._cluster.pool).without(candidate.job.assignments)
            if (node := self._starts_in(trial, ahead)) is not None:
                return [self._end_of([candidate.job], node)]
        return self._fewest_ends(ahead) if self._shape.replicas == 1 else []

    def _starts_in(self, trial: PoolTrial, ahead: list[Job]) -> NodeId | None:
        """A node where the job starts once those ahead have taken what they can of what was left."""
        left = trial.touched
        for job in ahead:
            if not self._work.spend(_PLACING_UNITS * len(left) * job.spec.least_replicas):
                return None
            other = Shape(job.spec.need, job.spec.least_replicas, job.tenant, job.user, self._shape.timeslice_milli_max)
            is_open = other.replicas > 1 and trial.place(other, job.id, left) is None
            if (is_open or job.service) and any(room_on(trial.space(n), other, job.id, spanning=True) for n in left):
                # Part of a gang fits there, and maybe the rest of it where there was room before; and replicas of a
                # service go apart from each other.
                return None
            if other.replicas == 1:
                trial.place(other, job.id, left)
        members, first = self._survey.members if self._job.id not in self._cluster.claims else 0, ""
        for node in left:
            if not self._work.spend(_PLACING_UNITS * self._shape.replicas):
                return None
            space = trial.space(node)
            # What is kept for it counts as a whole or not at all.
            if room_on(space, self._shape, 0, spanning=False) == self._shape.replicas:
                return node
            if self._shape.replicas > 1:
                before = self._cluster.pool.spaces[node]
                members += room_on(space, self._shape, 0, spanning=True)
                members -= room_on(before, self._shape, 0, spanning=True)
                first = first or node
        return first if first and members >= self._shape.replicas else None

    def _fewest_ends(self, ahead: list[Job]) -> list[Remedy]:
        """The node where the fewest jobs would have to end."""
        best: tuple[int, NodeId, list[Job]] | None = None
        nodes = [node for finding in self._survey.nearest() for node in finding.group.nodes[:4]]
        for node in nodes[:_END_NODES_MAX]:
            gone = self._clear(node, ahead)
            if gone is not None and (best is None or len(gone) < best[0]):
                best = (len(gone), node, gone)
        return [self._end_of(best[2], best[1])] if best else []

    def _clear(self, node: NodeId, ahead: list[Job]) -> list[Job] | None:
        """Jobs whose end would let the job start on a node: the largest go first."""
        gone: list[Job] = []
        space = self._cluster.pool.spaces[node]
        assignments = sorted(space.assignments.values(), key=lambda a: (-held_by(space, a.partition), a.key))
        for assignment in assignments:
            if not self._work.spend(_PLACING_UNITS):
                return None
            job = self._cluster.jobs[assignment.key.job]
            if job in gone:
                continue
            if self._lets_others_in(job):
                return None
            gone.append(job)
            trial = PoolTrial(self._cluster.pool)
            trial.without([each for other in gone for each in other.assignments if each.node == node])
            if not isinstance(trial.judge(node, self._shape), Reason):
                return gone if self._starts_in(trial, ahead) == node else None
        return None

    def _lets_others_in(self, job: Job) -> bool:
        """Whether by its end others come into line, or back to their cards: they may well go first."""
        cluster = self._cluster
        left = {uuid for each in job.assignments if each.is_live for uuid in devices_of(each.partition)}
        homes = [each.assignments[0].home for each in cluster.suspended.values()]
        throttle = cluster.arrays.throttle(job)
        return (
            any(home is not None and not left.isdisjoint(devices_of(home)) for home in homes)
            or (throttle is not None and throttle.keeps_back)
            or cluster.gates.is_awaited(job, cluster.jobs)
        )

    def _end_of(self, gone: list[Job], node: NodeId) -> Remedy:
        own = [job for job in gone if self._viewer is None or job.tenant == self._viewer]
        names = [f"job {job.id}" + (f" ({job.spec.name})" if job.spec.name else "") for job in own]
        others = len(gone) - len(own)
        if others:
            names.append("a job of another tenant" if others == 1 else f"{others} jobs of other tenants")
        return Remedy(
            kind="EndOf",
            text=f"once {' and '.join(names)}{node and f' on {node}'} {'has' if len(gone) == 1 else 'have'} ended",
            nodes=(node,) if node else (),
            by="others",
            jobs=tuple([job.id for job in own]),
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _held(cluster: Cluster, job: Job) -> int:
    """Compute that a job counts for now."""
    return sum(held_by(cluster.pool.spaces[each.node], each.partition) for each in job.assignments if each.is_live)
