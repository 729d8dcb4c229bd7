"""Why a job waits: reasons, holders, remedies, estimates, and dry runs. Whole answers stand in `why/`, as pictures."""

from __future__ import annotations

import random
from copy import copy, deepcopy
from typing import Any

import pytest
from msgspec.structs import replace

from gpuyard_daemon.core.explaining.reasons import text_of
from gpuyard_daemon.core.placing.census import Census
from gpuyard_daemon.core.placing.feasibility import Reason, Shape, judge
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import NodeSuspected, RequeueAll
from gpuyard_protocol.jobs import JobSpec, parse_array
from gpuyard_protocol.nodes import Suspended
from gpuyard_protocol.queries import DryRun, WhyAnswer
from gpuyard_protocol.units import Cpus, Memory, Share
from support.builders import CoreHarness, gpu, job, need, node
from support.core_scenario import NEEDS, play


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", 4), node("n-2", 2))
    return h


def why(h: CoreHarness, number: int) -> WhyAnswer:
    answer = h.core.why(number, h.now_ms)
    assert answer is not None
    return answer


def reasons(answer: WhyAnswer) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(reason.reason.code, reason.nodes, reason.examples) for reason in answer.reasons]


def test_why_gives_every_reason_by_node_from_the_code_that_places() -> None:
    h = CoreHarness()
    a30 = [gpu(0, node="n-3", model="NVIDIA A30", memory_mib=24_000)]
    h.join(node("n-1", 2), node("n-2", 2), node("n-3", devices=a30), node("n-4", 0), node("n-5", 2, cpu_milli=2000))
    fillers = [job(gpus=2, nodes=("n-1",)), job(gpus=2, nodes=("n-2",)), job(gpus=1, cpu_milli=1500, nodes=("n-5",))]
    h.submit_many(fillers)
    number = h.submit(job(gpus=1, models=("H100",)))
    answer = why(h, number)
    assert reasons(answer) == [
        ("CardsBusy", 2, ("n-1", "n-2")),
        ("CpusBusy", 1, ("n-5",)),
        ("NoGpu", 1, ("n-4",)),
        ("ModelMissing", 1, ("n-3",)),
    ]
    assert answer.summary == "no such card free (on 2 of 5 nodes)"
    assert h.core.why(99) is None


def test_why_counts_who_is_ahead(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=4), job(gpus=2)])
    numbers = yard.submit_many([job(gpus=1, priority=priority) for priority in (0, 0, 2, -1)])
    assert [(why(yard, n).position, why(yard, n).ahead) for n in numbers] == [(2, 1), (3, 2), (1, 0), (4, 3)]


def test_why_of_a_gang_says_how_many_would_fit(yard: CoreHarness) -> None:
    yard.submit(job(gpus=2))
    answer = why(yard, yard.submit(job(replicas=5, gpus=1)))
    assert answer.summary == "5 replicas start together or not at all: there is room for 4 now"


def test_why_of_the_impossible_says_so(yard: CoreHarness) -> None:
    answer = why(yard, yard.submit(job(gpus=5, allow_pending=True)))
    assert answer.summary == "no node of today could ever run it: fewer than 5 such cards"


def test_why_tells_the_story(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1, retries=1))
    yard.now_ms += 1500
    yard.started(number)
    assert why(yard, number).summary == "running on n-2"
    yard.now_ms += 60_000
    yard.ended(number, exit_code=3)
    answer = why(yard, number)
    assert answer.summary == "waits 1s before a new start after: replica 0 on n-2 exited with code 3"
    assert answer.story == (
        "+0s accepted",
        "+0s attempt 1 placed on n-2",
        "+1s500ms running",
        "+1m1s500ms waits again: replica 0 on n-2 exited with code 3",
    )
    yard.settle(most_ms=1000)
    yard.cancel(number)
    assert why(yard, number).summary == "stopping (cancelled by alice): waits for n-2 to report the end"
    yard.stopped(number)
    assert why(yard, number).summary == "cancelled: cancelled by alice"


def test_every_reason_has_words(yard: CoreHarness) -> None:
    shape = Shape(need(gpus=1, models=("H100",)), 1, "acme", "alice")
    texts = [text_of(reason, shape) for reason in Reason]
    assert all(texts)
    assert len(set(texts)) == len(texts)


# --- what nodes say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_one_of_each_kind_of_node_speaks_for_all(seed: int) -> None:
    rng = random.Random(seed)
    h = CoreHarness()
    for number in range(1, 9):
        cards = [gpu(index, node=f"n-{number}", memory_mib=rng.choice((40_000, 81_152))) for index in range(4)]
        h.join(
            node(f"n-{number}", devices=cards, cpu_milli=rng.choice((8_000, 64_000)), labels={"zone": "ab"[seed % 2]})
        )
    census = Census(h.core.cluster.pool)
    for _ in range(12):
        numbers = h.submit_many([job(**rng.choice(NEEDS)) for _ in range(4)], tenant=rng.choice(("acme", "umbrella")))
        for number in numbers:
            if number and rng.random() < 0.4 and h.state(number) == "starting":
                h.ended(number)
        if rng.random() < 0.2:
            h.turn(NodeSuspected(node=f"n-{rng.randint(1, 8)}"))
        _compare(h, census)


def _compare(h: CoreHarness, census: Census) -> None:
    """Every node is in one kind, and the kind's specimen says what the node says."""
    spaces = h.core.cluster.pool.spaces
    counted = {name: kind.space for kind in census.kinds() for name in kind.nodes}
    assert counted.keys() == spaces.keys()
    for fields in NEEDS:
        for tenant in ("acme", "umbrella"):
            shape, alone = (Shape(need(**fields), 1, tenant, "alice") for _ in range(2))
            said = {name: judge(space, shape) for name, space in counted.items()}
            assert said == {name: judge(space, alone) for name, space in spaces.items()}


def test_a_kind_is_forgotten_with_its_last_node(yard: CoreHarness) -> None:
    census = Census(yard.core.cluster.pool)
    assert len(census.kinds()) == 2
    number = yard.submit(job(gpus=1))
    assert [sorted(kind.nodes) for kind in census.kinds()] == [["n-1"], ["n-2"]]
    yard.join(node("n-3", 4))
    assert sorted(sorted(kind.nodes) for kind in census.kinds()) == [["n-1", "n-3"], ["n-2"]]
    yard.ended(number)
    assert len(census.kinds()) == 2


def test_every_card_is_counted_once(yard: CoreHarness) -> None:
    yard.submit_many([job(share_milli=300), job(gpus=1), job(mig="1g.10gb"), job(gpus=1)])
    yard.submit(job(share_milli=400), tenant="umbrella")
    for fields in ({"gpus": 4}, {"share_milli": 900}, {"mig": "7g.80gb"}, {"gpus": 2, "models": ("A100",)}):
        answer = why(yard, yard.submit(job(**fields, allow_pending=True)))
        if answer.state == "pending":
            assert sum(count.cards for count in answer.cards) == 6


def test_work_without_gpus_says_nothing_of_cards() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2, cpu_milli=4000))
    h.submit(job(cpu_milli=4000))
    answer = why(h, h.submit(job(cpu_milli=2000)))
    assert (answer.cards, answer.summary) == ((), "fewer than 2 CPU cores free (on 1 of 1 nodes)")
    assert [(held.job, held.held_milli) for held in answer.holders] == [(1, 0)]


# --- who holds it ----------------------------------------------------------------------------------------------------


def test_a_tenant_learns_of_others_only_how_much_they_hold(yard: CoreHarness) -> None:
    yard.submit(job(gpus=4, name="secret", time_limit_ms=3_600_000), tenant="umbrella", user="dana")
    yard.submit(job(gpus=2, name="mine"))
    number = yard.submit(job(gpus=2))
    told = yard.core.why(number, yard.now_ms, viewer="acme")
    assert told is not None
    assert [(held.job, held.tenant, held.held_milli) for held in told.holders] == [(2, "acme", 2000), (0, "", 4000)]
    words = repr((told.holders, told.remedies, told.estimate, told.summary, told.cards))
    assert all(secret not in words for secret in ("umbrella", "dana", "secret", "job 1"))
    known = yard.core.why(number, yard.now_ms)
    assert known is not None
    assert [(held.job, held.tenant, held.name) for held in known.holders] == [
        (1, "umbrella", "secret"),
        (2, "acme", "mine"),
    ]


def test_many_holders_are_summed_up() -> None:
    h = CoreHarness()
    h.join(node("n-1", 16))
    numbers = h.submit_many([job(gpus=1, time_limit_ms=(20 - n) * 60_000) for n in range(16)])
    for number in numbers:
        h.started(number)
    answer = why(h, h.submit(job(gpus=2)))
    *single, rest = answer.holders
    assert [held.job for held in single] == numbers[:8]
    assert (rest.job, rest.jobs, rest.held_milli, rest.until_ms) == (0, 8, 8000, h.now_ms + 5 * 60_000)


# --- what would start it ---------------------------------------------------------------------------------------------


def remedies(answer: WhyAnswer) -> list[tuple[str, dict[str, Any]]]:
    return [(remedy.kind, remedy.fields) for remedy in answer.remedies]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_said_to_help_helps(seed: int) -> None:
    """Whoever resubmits with the change starts in that turn; whoever ends the jobs named lets the other one start."""
    rng = random.Random(seed)
    h = CoreHarness()
    h.join(node("n-1", 4, labels={"zone": "b"}), node("n-2", 2), node("n-3", 4, cpu_milli=20_000))
    h.submit_many([job(**rng.choice(NEEDS)) for _ in range(10)], tenant=rng.choice(("acme", "umbrella")))
    for number in list(h.core.cluster.jobs):
        if h.state(number) == "starting":
            h.run(number)
    for _ in range(4):
        number = h.submit(job(replicas=rng.choice((1, 1, 4)), **rng.choice(NEEDS), allow_pending=True))
        answer = h.core.why(number, h.now_ms, viewer=None)
        assert answer is not None
        for remedy in answer.remedies:
            if remedy.kind == "EndOf":
                assert _starts_after(h, number, remedy.jobs), remedy
            else:
                spec = changed(h.core.cluster.jobs[number].spec, remedy.fields)
                assert h.core.plan("acme", "alice", spec, h.now_ms).verdict == "starts", remedy


def _starts_after(h: CoreHarness, number: int, ends: tuple[int, ...]) -> bool:
    """Whether a job no longer waits in a twin of the yard where these jobs ended."""
    twin = copy(h)
    twin.core, twin.twin = (Scheduler.restore(h.core.snapshot(), h.settings) for _ in range(2))
    twin.records, twin.orders, twin._reported = [], deepcopy(h.orders), dict(h._reported)
    for ended in ends:
        twin.ended(ended)
    return bool(ends) and twin.state(number) != "pending"


def changed(spec: JobSpec, fields: dict[str, Any]) -> JobSpec:
    """The specification with a remedy's fields, as somebody would resubmit it."""
    own = {name: fields[name] for name in ("replicas", "min_replicas") if name in fields}
    of_need: dict[str, Any] = {}
    for name, value in fields.items():
        match name:
            case "nodes" | "node_labels":
                of_need[name] = ()
            case "gpu_model":
                of_need |= {"models": (value,) if value else (), "card_memory_mib": 0}
            case "gpus":
                of_need["gpus"] = value or 0
            case "gpu":
                of_need |= {"share_milli": int(Share.parse(value)), "isolation": "soft"}
            case "gpu_memory":
                of_need["share_memory_mib"] = int(Memory.parse(value))
            case "cpus":
                of_need["cpu_milli"] = int(Cpus.parse(value))
            case "memory":
                of_need["memory_mib"] = int(Memory.parse(value))
            case "isolation" | "mig":
                of_need[name] = value
    if "gpu" in fields and spec.need.share_milli:
        of_need["isolation"] = spec.need.isolation
    return replace(spec, need=replace(spec.need, **of_need), **own)


def test_an_end_that_helps_somebody_ahead_is_not_promised() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2))
    running = h.submit(job(gpus=2))
    h.run(running)
    ahead, behind = h.submit_many([job(gpus=2), job(gpus=2)])
    assert [kind for kind, _ in remedies(why(h, ahead))] == ["EndOf"]
    assert remedies(why(h, behind)) == []


def test_what_is_beyond_the_tenants_limit_is_no_remedy(yard: CoreHarness) -> None:
    yard.limit(gpus_milli=3000)
    yard.submit(job(gpus=2))
    answer = why(yard, yard.submit(job(gpus=2)))
    assert answer.limit is not None
    assert remedies(answer) == [("FewerGpus", {"gpus": 1}), ("EndOf", {}), ("RaiseQuota", {})]
    yard.limit(gpus_milli=2000)
    answer = why(yard, yard.submit(job(gpus=2)))
    # Who ends leaves room for the one before it, and a limit must be raised for both.
    assert [kind for kind, _ in remedies(answer)] == ["RaiseQuota"]
    assert "from 2 to 6" in answer.remedies[0].text


# --- when ------------------------------------------------------------------------------------------------------------


def test_an_estimate_tells_what_it_rests_on(yard: CoreHarness) -> None:
    first, second = yard.submit_many([job(gpus=4, time_limit_ms=7_200_000), job(gpus=2, time_limit_ms=3_600_000)])
    yard.started(first)
    yard.started(second)
    large = why(yard, yard.submit(job(gpus=4))).estimate
    small = why(yard, yard.submit(job(gpus=2))).estimate
    assert large is not None
    assert small is not None
    assert (large.basis, large.at_ms - yard.now_ms) == ("limit", 7_200_000)
    assert (small.basis, small.at_ms - yard.now_ms) == ("limit", 3_600_000)


def test_gangs_are_played_forward_as_a_whole(yard: CoreHarness) -> None:
    numbers = yard.submit_many([job(gpus=1, time_limit_ms=(n + 1) * 3_600_000) for n in range(6)])
    for number in numbers:
        yard.started(number)
    estimate = why(yard, yard.submit(job(gpus=1, replicas=4))).estimate
    assert estimate is not None
    assert (estimate.basis, estimate.at_ms - yard.now_ms) == ("limit", 4 * 3_600_000)


def test_many_ahead_are_counted_against_how_fast_jobs_ended() -> None:
    h = CoreHarness()
    h.join(node("n-1", 1))
    for _ in range(20):
        number = h.submit(job(gpus=1))
        h.started(number)
        h.now_ms += 60_000
        h.ended(number)
    h.run(h.submit(job(gpus=1)))
    numbers = h.submit_many([job(gpus=1)] * 100)
    answer = why(h, numbers[-1])
    assert (answer.ahead, answer.position) == (99, 100)
    assert answer.estimate is not None
    assert answer.estimate.basis == "rate"
    assert 80 * 60_000 < answer.estimate.at_ms - h.now_ms < 120 * 60_000


def test_what_is_waited_for_is_all_of_an_array_and_known_once_it_runs(yard: CoreHarness) -> None:
    array = yard.submit(replace(job(gpus=4, time_limit_ms=3_600_000), array=parse_array("0-1%1")))
    last = yard.submit(job(gpus=1, depends_on=[("afterok", array)]))
    alone = [yard.submit(job(gpus=1, name="night", singleton=True, time_limit_ms=600_000)) for _ in range(2)]
    for number in (array, alone[0]):
        yard.run(number)
    # Of the array's elements only one runs: nobody knows when the other will begin.
    assert [estimate_of(yard, number) for number in (last, alone[1])] == [("none", 0), ("limit", 600_000)]
    yard.ended(array)
    yard.run(array + 1)
    assert estimate_of(yard, last) == ("limit", 3_600_000)


def estimate_of(h: CoreHarness, number: int) -> tuple[str, int]:
    estimate = why(h, number).estimate
    assert estimate is not None
    return estimate.basis, estimate.at_ms - h.now_ms if estimate.at_ms else 0


def test_without_limits_or_history_there_is_no_estimate(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=4), job(gpus=2)])
    estimate = why(yard, yard.submit(job(gpus=1))).estimate
    assert estimate is not None
    assert (estimate.basis, estimate.at_ms) == ("none", 0)
    assert "no time limit and no estimate" in estimate.text


def test_brief_answers_leave_out_what_costs(yard: CoreHarness) -> None:
    yard.submit_many([job(gpus=4), job(gpus=2)])
    number = yard.submit(job(gpus=1))
    brief, full = yard.core.why(number, yard.now_ms, brief=True), why(yard, number)
    assert brief is not None
    assert (brief.summary, brief.position, brief.reasons) == (full.summary, full.position, full.reasons)
    assert (brief.cards, brief.holders, brief.remedies, brief.estimate) == ((), (), (), None)


# --- dry runs --------------------------------------------------------------------------------------------------------


def plan(h: CoreHarness, **fields: Any) -> DryRun:
    before = h.core.digest()
    answer = h.core.plan("acme", "alice", job(**fields), h.now_ms)
    assert h.core.digest() == before
    return answer


@pytest.mark.parametrize("seed", range(6))
def test_a_dry_run_foretells_what_happens(seed: int) -> None:
    rng = random.Random(seed)
    h = CoreHarness()
    h.join(node("n-1", 4, labels={"zone": "b", "rack": "r1"}), node("n-2", 2), node("n-3", 3, cpu_milli=4000))
    h.limit(gpus_milli=6000, jobs=30)
    for _ in range(40):
        fields = {"replicas": rng.choice((1, 1, 3)), "allow_pending": rng.random() < 0.5, **rng.choice(NEEDS)}
        foretold = plan(h, **fields)
        number = h.submit(job(**fields))
        if foretold.verdict == "rejected":
            assert number == 0
            assert foretold.refusal is not None
            assert foretold.refusal.reason == h.answers[-1].reason
        elif foretold.verdict == "waits":
            assert h.state(number) == "pending"
        else:
            assert [(each.node, each.devices) for each in foretold.placed] == [
                (each.node, each.devices) for each in h.view(number).placed
            ]


def test_a_dry_run_of_an_array_is_about_its_first_job(yard: CoreHarness) -> None:
    spec = replace(job(gpus=1), array=parse_array("0-9%2"))
    answer = yard.core.plan("acme", "alice", spec, yard.now_ms)
    assert (answer.verdict, answer.elements, len(answer.placed)) == ("starts", 10, 1)


def test_a_singleton_waits_for_its_namesake(yard: CoreHarness) -> None:
    yard.submit(job(name="nightly"))
    answer = plan(yard, name="nightly", singleton=True)
    assert (answer.verdict, answer.summary) == ("waits", "waits for job 1, also named 'nightly', to end")


def test_a_yard_that_stops_starts_nothing(yard: CoreHarness) -> None:
    yard.turn(RequeueAll())
    answer = plan(yard, gpus=1)
    assert (answer.verdict, answer.summary) == (
        "waits",
        "the yard is stopping: nothing starts until it is started again",
    )


# --- at any moment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_moment_of_a_day_can_be_explained(seed: int) -> None:
    """Also by a core that only follows another's records, and without changing anything."""
    core = Scheduler()
    asked = 0
    for place, record in enumerate(play(seed, steps=40)):
        core.apply(record)
        if place % 4:
            continue
        before = core.digest()
        for number in [each.id for each in core.cluster.jobs.values() if not each.is_final][:12]:
            for viewer in ("acme", None):
                answer = core.why(number, core.now_ms, viewer=viewer)
                assert answer is not None
                assert answer.summary
                assert answer.state != "pending" or answer.estimate or core.is_draining or not core.known_nodes()
                asked += 1
        core.plan("acme", "alice", job(gpus=1), core.now_ms)
        assert core.digest() == before
    assert asked > 50


@pytest.mark.parametrize("seed", range(4))
def test_nobody_who_waits_is_said_to_start(seed: int) -> None:
    """After a turn everybody who could start has: what the yard says and what it does agree."""
    rng = random.Random(seed)
    h = CoreHarness()
    h.join(node("n-1", 4, labels={"zone": "b", "rack": "r1"}), node("n-2", 2), node("n-3", 4, cpu_milli=6000))
    h.limit("umbrella", gpus_milli=2500)
    for _ in range(25):
        tenant = rng.choice(("acme", "umbrella"))
        h.submit_many([job(replicas=rng.choice((1, 1, 1, 3)), **rng.choice(NEEDS)) for _ in range(3)], tenant=tenant)
        for number in [each.id for each in h.core.cluster.jobs.values() if each.state == "starting"]:
            h.run(number)
        if rng.random() < 0.5 and (running := [j.id for j in h.core.cluster.jobs.values() if j.state == "running"]):
            h.ended(rng.choice(running))
        for number in list(h.core.cluster.waiting):
            answer = h.core.why(number, h.now_ms)
            assert answer is not None
            assert answer.estimate is not None
            assert answer.estimate.basis != "now", answer


def test_a_suspended_job_says_who_has_its_card() -> None:
    h = CoreHarness()
    h.join(replace(node("n-1", 1), suspend_mib=512 * 1024))
    large = h.submit(replace(job(gpus=1), preemption="suspend"))
    h.run(large)
    h.settle(most_ms=20 * 3_600_000)
    small = h.submit(job(gpus=1, time_limit_ms=1_800_000))
    leaving = why(h, large)
    assert leaving.summary.startswith("leaving its card on n-1 (")
    waits = why(h, small).estimate
    assert waits is not None
    assert (waits.basis, waits.at_ms - h.now_ms) == ("stopping", 20_000)
    h.report("n-1", Suspended(key=h.core.cluster.jobs[large].assignments[0].key, step=1, at_ms=0, image_mib=30_000))
    h.run(small)
    answer = why(h, large)
    assert answer.summary.startswith("suspended on n-1 (")
    assert answer.summary.endswith("it goes back to its card when that is free")
    assert [held.job for held in answer.holders] == [small]
    assert answer.estimate is not None
    assert (answer.estimate.basis, answer.estimate.at_ms - h.now_ms) == ("limit", 1_800_000)
    assert answer.terms
