"""What must hold after every turn, found out from scratch.

`check` trusts no index: it recounts everything from the records and compares. It is run by tests after every step, and
by the daemon after a restore; its cost is linear in the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuyard_daemon.core.placing.capacity import ClaimedPlace, NodeSpace, Pool
from gpuyard_daemon.core.placing.partitions import Card, amounts_on, slices_at
from gpuyard_daemon.core.state.arrays import LIVE_STATES
from gpuyard_daemon.core.state.backlog import Backlog
from gpuyard_daemon.core.state.cluster import Cluster
from gpuyard_daemon.core.state.fact_words import PATIENT_CLAIMS
from gpuyard_daemon.core.state.listing import JOB_STATES
from gpuyard_daemon.core.state.model import LEAVING, Assignment, Job
from gpuyard_daemon.core.state.states import InvariantViolated, story_of
from gpuyard_daemon.core.tenants.holdings import amounts_of, charged_milli
from gpuyard_daemon.core.tenants.quota import QuotaTree
from gpuyard_daemon.core.tenants.tenancy import held_by
from gpuyard_protocol.jobs import PRIORITY_MIN
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import MigInstance, MpsShare, Partition, devices_of, mode_of
from gpuyard_protocol.units import MILLI


def check(cluster: Cluster) -> None:
    """Raise `InvariantViolated` with everything that is wrong, first the worst."""
    problems = [
        *_cards_held(cluster),
        *_jobs(cluster),
        *_indexes(cluster),
        *_services(cluster),
        *_tenants(cluster),
        *_arrays(cluster),
        *_claims(cluster),
        *_leases(cluster),
    ]
    if problems:
        raise InvariantViolated("\n".join(problems[:20]))


# --- cards and nodes -------------------------------------------------------------------------------------------------


def _cards_held(cluster: Cluster) -> Iterator[str]:
    """No card is given to two, in whatever dimension."""
    held: dict[str, dict[AssignmentKey, Assignment]] = {node: {} for node in cluster.nodes}
    for job in cluster.jobs.values():
        for assignment in job.assignments:
            if assignment.is_live:
                held[assignment.node][assignment.key] = assignment
    if list(held) != list(cluster.pool.spaces):
        yield f"spaces {list(cluster.pool.spaces)} for nodes {list(held)}"
    held_milli = 0
    for node, space in cluster.pool.spaces.items():
        if held[node] != space.assignments:
            yield f"node {node}: holds {sorted(space.assignments)}; by the jobs {sorted(held[node])}"
        on_cards: dict[str, dict[AssignmentKey, Partition]] = {card.device.uuid: {} for card in space.cards}
        for key, assignment in held[node].items():
            for uuid in devices_of(assignment.partition):
                if uuid not in on_cards:
                    yield f"node {node}: {key} is on card {uuid}, which the node does not have"
                else:
                    on_cards[uuid][key] = assignment.partition
        for card in space.cards:
            yield from _card(cluster, card, on_cards[card.device.uuid])
            held_milli += min(MILLI, card.milli)
        yield from _totals(cluster, space, held[node])
    if held_milli != cluster.pool.held_milli:
        yield f"the yard holds {held_milli} milli-GPU, not {cluster.pool.held_milli}"


def _card(cluster: Cluster, card: Card, held: dict[AssignmentKey, Partition]) -> Iterator[str]:
    device = card.device
    name = f"card {device.uuid}"
    if held != card.held:
        yield f"{name}: holds {sorted(card.held)}; by the jobs {sorted(held)}"
    modes = {mode_of(partition) for partition in held.values()}
    unused = "mig" if card.foreign or (card.keeps_mode and card.in_mig) else "idle"
    if len(modes) > 1 or card.mode != next(iter(modes), unused):
        yield f"{name}: mode {card.mode}, partitions {sorted(modes)}"
    domains = {cluster.jobs[key.job].domain for key in held}
    if card.mode in ("mps", "timeslice") and (len(domains) > 1 or {card.domain} != domains):
        yield f"{name}: shared by {sorted(domains)}, said to belong to {card.domain!r}"
    amounts = [amounts_on(device, partition) for partition in held.values()]
    milli, memory = sum(a[0] for a in amounts), sum(a[1] for a in amounts)
    if (milli, memory) != (card.milli, card.memory_mib):
        yield f"{name}: {milli} milli and {memory} MiB held, not {card.milli} and {card.memory_mib}"
    if card.mode == "whole" and len(held) > 1:
        yield f"{name}: given whole to {sorted(held)}"
    if card.mode != "timeslice" and milli > MILLI:
        yield f"{name}: {milli} milli of compute promised"
    if card.mode != "mig" and card.present and memory > device.memory_mib:
        yield f"{name}: {memory} MiB promised of {device.memory_mib}"
    if held and device.mig_switch_ms and card.in_mig != (card.mode == "mig"):
        yield f"{name}: in mode {card.mode}, taken for one that is{'' if card.in_mig else ' not'} in MIG mode"
    clients = sum(partition.processes for partition in held.values() if isinstance(partition, MpsShare))
    if clients != card.clients or (card.present and clients > device.mps_clients_max):
        yield f"{name}: {clients} MPS clients, counted {card.clients}, at most {device.mps_clients_max}"
    yield from _instances(card, [p for p in held.values() if isinstance(p, MigInstance)])


def _instances(card: Card, instances: list[MigInstance]) -> Iterator[str]:
    """MIG instances stand at legal starts, on slices of their own, and no more of a kind than there may be."""
    taken = 0
    counts: dict[str, int] = {}
    for instance in instances:
        mask = slices_at(instance.start, instance.size)
        profile = card.geometry.profiles.get(instance.profile)
        if profile is not None and (instance.start not in profile.starts or instance.size != profile.size):
            yield f"card {card.device.uuid}: {instance} at an illegal place"
        if taken & mask:
            yield f"card {card.device.uuid}: {instance} overlaps another"
        taken |= mask
        counts[instance.profile] = counts.get(instance.profile, 0) + 1
        if profile is not None and counts[instance.profile] > profile.count_max:
            yield f"card {card.device.uuid}: more than {profile.count_max} of {instance.profile}"
    if taken != card.mask or counts != {name: n for name, n in card.profile_counts.items() if n}:
        counted = f"{card.mask:b} and {card.profile_counts}"
        yield f"card {card.device.uuid}: slices {taken:b} and {counts} held, not {counted}"


def _totals(cluster: Cluster, space: NodeSpace, held: dict[AssignmentKey, Assignment]) -> Iterator[str]:
    inventory = space.node.inventory
    amounts = [assignment.held(cluster.jobs[key.job].spec.need) for key, assignment in held.items()]
    cpu = (inventory.cpu_milli if inventory else 0) - sum(amount[0] for amount in amounts)
    memory = (inventory.memory_mib if inventory else 0) - sum(amount[1] for amount in amounts)
    if (cpu, memory) != (space.cpu_free_milli, space.memory_free_mib):
        counted = f"{space.cpu_free_milli} and {space.memory_free_mib}"
        yield f"node {space.node.id}: {cpu} CPU milli and {memory} MiB free, not {counted}"
    idle = sum(1 for card in space.cards if card.mode == "idle" and card.takes_work)
    if idle != space.idle_cards:
        yield f"node {space.node.id}: {idle} idle cards, not {space.idle_cards}"
    if any(not card.present and not card.held for card in space.cards):
        yield f"node {space.node.id}: keeps a card that is gone and free"


def _leases(cluster: Cluster) -> Iterator[str]:
    leased: dict[str, dict[AssignmentKey, int]] = {}
    for job in cluster.jobs.values():
        for assignment in job.assignments:
            if assignment.is_live and assignment.lease_ms:
                leased.setdefault(assignment.node, {})[assignment.key] = assignment.lease_ms
    if leased != cluster.leased:
        yield f"leases {cluster.leased}; by the jobs {leased}"
    for node in cluster.nodes.values():
        if bool(node.lost_ms) != (node.state == "lost"):
            yield f"node {node.id}: {node.state}, lost since {node.lost_ms}"
        space = cluster.pool.spaces[node.id]
        for entry in node.given_up:
            if entry.key in space.assignments:
                yield f"node {node.id}: {entry.key} was given up and is held"
        if node.is_removed and space.assignments:
            yield f"node {node.id}: was taken out and holds {sorted(space.assignments)}"


# --- jobs ------------------------------------------------------------------------------------------------------------


def _jobs(cluster: Cluster) -> Iterator[str]:
    for number, job in cluster.jobs.items():
        for problem in _job(job):
            yield f"job {job.id}: {problem}; its story: {story_of(job)}"
        if number != job.id or job.id > cluster.last_job:
            yield f"job {job.id} stands under {number}; the newest is {cluster.last_job}"


def _job(job: Job) -> Iterator[str]:
    states = [assignment.state for assignment in job.assignments]
    live = sum(1 for assignment in job.assignments if assignment.is_live)
    if live != job.live:
        yield f"{live} live replicas, not {job.live}"
    fits = job.spec.least_replicas <= len(states) <= job.spec.replicas or (job.is_elastic and job.scaled_to)
    if (states and not fits) or (not states) != (job.attempt == 0):
        yield f"{len(states)} assignments in attempt {job.attempt} of {job.spec.replicas} replicas"
    for replica, assignment in enumerate(job.assignments):
        if assignment.key != (job.id, job.attempt, replica):
            yield f"assignment {assignment.key} stands at {replica} of attempt {job.attempt}"
    if job.state == "pending" or job.is_final:
        if live:
            yield f"{job.state} with {live} live replicas"
        if job.verdict is not None:
            yield f"{job.state} with a verdict {job.verdict.kind}"
    elif not live:
        yield f"{job.state} without a live replica"
    if (job.state == "stopping") != (job.verdict is not None):
        yield f"{job.state} with verdict {job.verdict}"
    if job.state == "stopping" and any(state not in ("stopping", "ended") for state in states):
        yield f"stopping with replicas {states}"
    if job.state == "running" and any(state in ("ordered", "prepared", "released") for state in states):
        yield f"running with replicas {states}"
    # A gang goes as one: never are some released while others are still being prepared.
    if "ordered" in states or "prepared" in states:
        loose = [state for state in states if state in ("released", "running")]
        if loose and job.is_gang:
            yield f"a gang in part: {states}"
    if bool(job.ended_ms) != job.is_final:
        yield f"{job.state}, ended at {job.ended_ms}"
    if not 0 <= job.retries_left <= job.spec.retries:
        yield f"{job.retries_left} retries left of {job.spec.retries}"


# --- indexes ---------------------------------------------------------------------------------------------------------


def _indexes(cluster: Cluster) -> Iterator[str]:
    waiting = {job.id for job in cluster.jobs.values() if _may_start(cluster, job)}
    waiting -= _throttled(cluster, waiting)
    if waiting != set(cluster.waiting):
        yield f"waiting: {sorted(cluster.waiting)[:20]}; by the jobs {sorted(waiting)[:20]}"
    off = {job.id for job in cluster.jobs.values() if any(each.state == "suspended" for each in job.assignments)}
    off -= {number for number in off if cluster.jobs[number].held_by}
    if off != set(cluster.suspended):
        yield f"suspended: {sorted(cluster.suspended)[:20]}; by the jobs {sorted(off)[:20]}"
    waiters = cluster.waiting.keys() | cluster.suspended.keys()
    strangers = [job.id for job in cluster.jobs.values() if bool(job.waits_since_ms) != (job.id in waiters)]
    if strangers:
        yield f"jobs {strangers[:20]} do not know whether they stand in line"
    finished = {job.id for job in cluster.jobs.values() if job.is_final}
    if finished != set(cluster.finished):
        yield f"finished: {len(cluster.finished)}; by the jobs {len(finished)}"
    for owner, jobs in cluster.lists.items():
        mine = [job for job in cluster.jobs.values() if owner in ("", job.tenant)]
        if sorted((job.id for job in mine), reverse=True) != list(jobs.newest_first()):
            yield f"list of {owner or 'all'!r} is not its jobs"
        counts = {state: sum(1 for job in mine if job.state == state) for state in JOB_STATES}
        if counts != jobs.counts:
            yield f"counts of {owner or 'all'!r}: {jobs.counts}; by the jobs {counts}"
    if (counted := _counted_anew(cluster)) != _counts(cluster.backlog):
        yield f"backlog: {_counts(cluster.backlog)}; by jobs and services {counted}"
    if _capacity(cluster.pool) != cluster.pool.capacity_milli:
        yield f"capacity {cluster.pool.capacity_milli}; by the cards {_capacity(cluster.pool)}"


def _counts(backlog: Backlog) -> tuple[dict[str, int], int, dict[str, int]]:
    held, replicas = ({name: sum_ for name, sum_ in sums.items() if sum_} for sums in (backlog.bytes, backlog.replicas))
    return held, backlog.ended_bytes, replicas


def _counted_anew(cluster: Cluster) -> tuple[dict[str, int], int, dict[str, int]]:
    fresh = Backlog(cluster.arrays)
    for job in cluster.jobs.values():
        fresh.enter(job)
    for service in cluster.services.values():
        fresh.set_service(service.tenant, None, service.spec)
    return _counts(fresh)


def _throttled(cluster: Cluster, waiting: set[int]) -> set[int]:
    """Elements of arrays that could start but for the number of others that go at once."""
    throttled: set[int] = set()
    for array in cluster.arrays.records.values():
        mine = [job for job in cluster.jobs.values() if job.array == array.id]
        at_once = array.spec.array.at_once if array.spec.array else 0
        room = at_once - sum(1 for job in mine if job.state in LIVE_STATES)
        if at_once:
            throttled.update(sorted(job.id for job in mine if job.id in waiting)[max(0, room) :])
    return throttled


def _arrays(cluster: Cluster) -> Iterator[str]:
    for array in cluster.arrays.records.values():
        mine = [job for job in cluster.jobs.values() if job.array == array.id]
        unfinished = sum(1 for job in mine if not job.is_final)
        if (len(mine), unfinished) != (array.left, array.unfinished):
            counted = f"{array.left} and {array.unfinished}"
            yield f"array {array.id}: {len(mine)} elements, {unfinished} unfinished, not {counted}"
        if any(job.spec is not array.spec for job in mine):
            yield f"array {array.id}: an element with a specification of its own"


def _may_start(cluster: Cluster, job: Job) -> bool:
    if job.state != "pending" or job.not_before_ms or job.held_by or job.id in cluster.gates.doomed:
        return False
    for _, number in job.spec.depends_on:
        array = cluster.arrays.records.get(number)
        targets = range(number, number + (array.count if array else 1))
        if any(target in cluster.jobs and not cluster.jobs[target].is_final for target in targets):
            return False
    owner = (job.tenant, job.user, job.spec.name)
    return not job.spec.singleton or not any(
        other.id < job.id and not other.is_final and (other.tenant, other.user, other.spec.name) == owner
        for other in cluster.jobs.values()
        if not other.service
    )


def _capacity(pool: Pool) -> int:
    return MILLI * sum(1 for space in pool.spaces.values() for card in space.cards if card.present)


def _services(cluster: Cluster) -> Iterator[str]:
    by_service: dict[tuple[str, str], set[int]] = {}
    for job in cluster.jobs.values():
        if job.service and not job.is_final:
            by_service.setdefault((job.tenant, job.service), set()).add(job.id)
    indexed = {key: set(jobs) for key, jobs in cluster.service_jobs.items() if jobs}
    if by_service != indexed:
        yield f"replicas of services: {indexed}; by the jobs {by_service}"
    for key, service in cluster.services.items():
        spec = service.spec
        if not spec.min_replicas <= service.wanted <= spec.max_replicas:
            yield f"service {key}: {service.wanted} wanted, not between {spec.min_replicas} and {spec.max_replicas}"


# --- tenants ---------------------------------------------------------------------------------------------------------


def _tenants(cluster: Cluster) -> Iterator[str]:
    """What tenants and users are said to hold is what their jobs hold."""
    by_user: dict[tuple[str, str], int] = {}
    for job in cluster.jobs.values():
        for assignment in job.assignments:
            if assignment.is_live:
                key = (job.tenant, job.user)
                space = cluster.pool.spaces[assignment.node]
                by_user[key] = by_user.get(key, 0) + held_by(space, assignment.partition)
    by_tenant: dict[str, int] = {}
    for (tenant, _), milli in by_user.items():
        by_tenant[tenant] = by_tenant.get(tenant, 0) + milli
    tenancy = cluster.tenancy
    for name, said, found in (
        ("users", tenancy.user_held_milli, by_user),
        ("tenants", tenancy.held_milli, by_tenant),
    ):
        said, found = _nonzero(said), _nonzero(found)
        if said != found:
            yield f"{name} hold {said}; by the jobs {found}"

    yield from _quotas(cluster)


def _quotas(cluster: Cluster) -> Iterator[str]:
    """What queues are said to use, and to keep from lending, is what their jobs hold and do not."""
    tenancy, quota = cluster.tenancy, cluster.quota
    counted = QuotaTree()
    counted.set_policy(tenancy.policy, {})
    by_model: dict[tuple[str, str, str], tuple[int, int]] = {}
    rates: dict[str, int] = {}
    for job in cluster.jobs.values():
        for assignment in job.assignments:
            if not assignment.is_live:
                continue
            amounts = amounts_of(cluster.pool.spaces[assignment.node], assignment.partition)
            counted.take(quota.queue_of(job), amounts)
            charged = charged_milli(cluster, amounts) << (job.spec.priority - PRIORITY_MIN)
            rates[job.tenant] = rates.get(job.tenant, 0) + charged
            for (model, _), milli in amounts.items():
                held, ran = by_model.get((job.tenant, job.user, model), (0, 0))
                by_model[job.tenant, job.user, model] = (held + milli, ran + (milli if assignment.started_ms else 0))
    for name, queue in quota.queues.items():
        for said, found in zip(queue.allotments, counted.queues[name].allotments, strict=True):
            if (said.used_milli, said.unlent_milli) != (found.used_milli, found.unlent_milli):
                counts = f"{said.used_milli} and {said.unlent_milli}, not {found.used_milli} and {found.unlent_milli}"
                yield f"queue {name}: {counts} of {said.model!r}"
    if cluster.fairness.rates() != {tenant: rate for tenant, rate in rates.items() if rate}:
        yield f"tenants are charged {cluster.fairness.rates()}; by the jobs {rates}"
    said_by_model = tenancy.held_by_model()
    if said_by_model != {key: amounts for key, amounts in by_model.items() if any(amounts)}:
        yield f"users hold {said_by_model} by model; by the jobs {by_model}"


def _nonzero(amounts: dict[Any, int]) -> dict[Any, int]:
    return {name: amount for name, amount in amounts.items() if amount}


# --- claims ----------------------------------------------------------------------------------------------------------


def _claims(cluster: Cluster) -> Iterator[str]:
    """Claims are for jobs in line, whole, and what is kept on a node is there once those who leave have left."""
    kept: dict[str, list[ClaimedPlace]] = {}
    for number, claim in cluster.claims.records.items():
        job = cluster.waiting.get(number) or cluster.suspended.get(number)
        if job is None and claim.kind == "resize" and (leaving := cluster.leaving.get(number)) is not None:
            job = leaving if leaving.verdict is not None and leaving.verdict.kind == "requeue" else None
        if number != claim.job or job is None:
            yield f"job {number} has a claim and is not in line"
            continue
        if len(claim.placements) != job.spec.least_replicas and claim.kind != "resize":
            yield f"job {number} claims {len(claim.placements)} places for {job.spec.replicas} replicas"
        need = job.spec.need
        for placement in claim.placements:
            # Suspended, it has its memory there already.
            memory_mib = 0 if number in cluster.suspended else need.memory_mib
            is_firm = claim.kind not in PATIENT_CLAIMS
            place = ClaimedPlace(number, job.domain, placement.partition, need.cpu_milli, memory_mib, is_firm)
            kept.setdefault(placement.node, []).append(place)
    for name, space in cluster.pool.spaces.items():
        if kept.get(name, []) != space.claims:
            yield f"node {name} keeps {space.claims}; by the claims {kept.get(name, [])}"
        preempting = [place for place in space.claims if cluster.claims.records[place.job].kind not in PATIENT_CLAIMS]
        if preempting and space.node.state == "ready":
            yield from _kept(space, preempting)


def _kept(space: NodeSpace, places: list[ClaimedPlace]) -> Iterator[str]:
    trial = space.copy(with_holders=True)
    for key, assignment in space.assignments.items():
        if assignment.state in LEAVING:
            trial.give(key, assignment.partition)
    for number, place in enumerate(places):
        cards = [trial.by_uuid.get(uuid) for uuid in devices_of(place.partition)]
        short = trial.cpu_free_milli < place.cpu_milli or trial.memory_free_mib < place.memory_mib
        if short or any(card is None or not card.could_take(place.partition, place.tenant) for card in cards):
            yield f"node {space.node.id}: what is kept for job {place.job} was given away: {place.partition}"
            return
        key = AssignmentKey(place.job, 0, number)
        trial.take(key, place.partition, place.tenant, place.cpu_milli, place.memory_mib)
