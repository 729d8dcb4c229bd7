"""Queues with quotas: what starts, what borrows, what is kept, who may take back, and what is said about it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard_daemon.core.preempting.reclaim import Reclaim
from gpuyard_daemon.core.queueing.ranking import BORROWING, NOMINAL, SCAVENGING
from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Kind, Policy, QueuePolicy, TenantLimits
from gpuyard_daemon.core.tenants.quota import ROOT, Allotment, Amounts, QuotaTree
from gpuyard_protocol.jobs import JobSpec
from gpuyard_protocol.nodes import IdleGpu
from support.builders import CoreHarness, gpu, job, node


def queue(name: str, nominal: int = -1, *, parent: str = "", **fields: Any) -> QueuePolicy:
    """`nominal`: whole cards of any model; -1: no grant."""
    limits = {name: fields.pop(name) for name in ("borrow_milli", "lend_milli") if name in fields}
    grants = (Grant(nominal_milli=nominal * 1000, **limits),) if nominal >= 0 else ()
    return QueuePolicy(name=name, parent=parent, grants=grants, **fields)


def policy(*queues: QueuePolicy, **of_tenant: str) -> Policy:
    tenants = tuple(sorted((tenant, TenantLimits(queue=name)) for tenant, name in of_tenant.items()))
    return Policy(tenants=tenants, queues=tuple(sorted(queues, key=lambda each: each.name)))


def yard(*queues: QueuePolicy, gpus: int = 8, **of_tenant: str) -> CoreHarness:
    h = CoreHarness(restart_every=2)
    h.join(node("n-1", gpus))
    h.turn(PolicyChanged(policy=policy(*queues, **of_tenant)))
    return h


def firm(**fields: Any) -> JobSpec:
    """A job that nobody may stop."""
    return msgspec.structs.replace(job(**{"gpus": 1} | fields), preemption="never")


def band(h: CoreHarness, number: int) -> int:
    return h.core.cluster.ranking.band_of(h.core.cluster.jobs[number])


def test_without_queues_there_is_no_quota() -> None:
    h = CoreHarness()
    h.join(node("n-1", 2))
    numbers = h.submit_many([job(gpus=1)] * 2)
    assert h.states(*numbers) == ["starting"] * 2
    assert band(h, numbers[0]) == NOMINAL


def test_a_queue_borrows_what_is_idle_up_to_its_limit() -> None:
    h = yard(queue("a", 2, borrow_milli=1000), queue("b", 4), acme="a", umbrella="b")
    numbers = h.submit_many([firm()] * 5)
    assert h.states(*numbers) == ["starting"] * 3 + ["pending"] * 2
    assert [band(h, number) for number in numbers[3:]] == [BORROWING] * 2
    h.run(numbers[0])
    h.ended(numbers[0])
    assert h.states(*numbers[3:]) == ["starting", "pending"]


def test_who_is_within_quota_goes_before_who_borrows() -> None:
    h = yard(queue("a", 2), queue("b", 6), acme="a", umbrella="b", gpus=8)
    held = h.submit_many([firm()] * 8)
    borrowed = h.submit(firm(), tenant="acme")
    own = h.submit(firm(), tenant="umbrella")
    assert h.states(borrowed, own) == ["pending", "pending"]
    h.run(held[0])
    h.ended(held[0])
    assert h.states(borrowed, own) == ["pending", "starting"]


def test_what_is_not_lent_stays_free() -> None:
    h = yard(queue("a", 4), queue("b", 4, lend_milli=1000), acme="a", umbrella="b")
    numbers = h.submit_many([firm()] * 8)
    assert h.states(*numbers).count("starting") == 5
    why = h.core.why(numbers[-1])
    assert why is not None
    assert "keeps 3" in why.summary
    mine = [h.submit(firm(), tenant="umbrella") for _ in range(3)]
    assert h.states(*mine) == ["starting"] * 3


def test_every_queue_above_counts() -> None:
    tree = (queue("lab", 3, borrow_milli=0), queue("a", 2, parent="lab"), queue("b", 2, parent="lab"))
    h = yard(*tree, acme="a", umbrella="b")
    first = h.submit_many([firm()] * 2)
    second = [h.submit(firm(), tenant="umbrella") for _ in range(2)]
    assert h.states(*first, *second) == ["starting"] * 3 + ["pending"]
    why = h.core.why(second[1])
    assert why is not None
    assert "queue lab holds 3 of at most 3 GPUs, and this needs 1" in why.summary


def test_a_grant_may_be_for_one_model_and_one_kind() -> None:
    grants = (
        Grant(model="H100", kind="shared", nominal_milli=500, borrow_milli=0),
        Grant(model="A30", nominal_milli=0, borrow_milli=0),
    )
    h = CoreHarness(restart_every=2)
    h.join(node("n-1", 2))
    h.join(node("n-2", devices=[gpu(0, node="n-2", model="NVIDIA A30", memory_mib=24_000, modes=("whole",))]))
    h.turn(PolicyChanged(policy=policy(QueuePolicy("a", grants=grants), acme="a")))
    shares = h.submit_many([firm(gpus=0, share_milli=300)] * 2)
    assert h.states(*shares) == ["starting", "pending"]
    on_a30 = h.submit(firm(models=("A30",)))
    assert on_a30 == 0
    refusal = h.answers[-1].reason
    assert refusal is not None
    assert "queue a holds 0 of at most 0 A30" in refusal.text
    anywhere = h.submit(firm())
    assert h.nodes_of(anywhere) == ["n-1"]


def test_where_a_quota_leaves_one_model_the_job_goes_there() -> None:
    h = CoreHarness(restart_every=2)
    h.join(node("n-1", 1))
    h.join(node("n-2", devices=[gpu(0, node="n-2", model="NVIDIA A30", memory_mib=24_000, modes=("whole",))]))
    grants = (Grant(model="H100", nominal_milli=0, borrow_milli=0), Grant(model="A30", nominal_milli=1000))
    h.turn(PolicyChanged(policy=policy(QueuePolicy("a", grants=grants), acme="a")))
    first, second = h.submit(firm()), h.submit(firm())
    assert h.nodes_of(first) == ["n-2"]
    assert h.state(second) == "pending"


def test_a_job_carries_the_idle_rule_of_its_queue_or_of_the_nearest_above() -> None:
    h = CoreHarness(restart_every=2)
    h.join(node("n-1", 8))
    rule, own = IdleGpu(warn_ms=1_000), IdleGpu(release_ms=9_000)
    tree = (
        QueuePolicy("lab", idle=rule),
        QueuePolicy("night", parent="lab"),
        QueuePolicy("strict", parent="lab", idle=own),
    )
    h.turn(PolicyChanged(policy=policy(*tree, acme="lab")))

    def rule_of(job: int) -> IdleGpu | None:
        _, wanted = h.core.desired("n-1")
        return next(each.start.launch.idle for each in wanted if each.start.key.job == job)

    for name, expected in (("", rule), ("night", rule), ("strict", own)):
        assert rule_of(h.submit(msgspec.structs.replace(firm(), queue=name))) == expected
    h.turn(PolicyChanged(policy=Policy()))
    assert rule_of(h.submit(firm())) is None


def test_a_job_asks_for_a_queue_of_its_tenant() -> None:
    h = yard(queue("lab", 4), queue("night", parent="lab", scavenger=True), queue("other", 4), acme="lab")
    asked = [h.submit(msgspec.structs.replace(firm(), queue=name)) for name in ("night", "nihgt", "other")]
    assert [bool(number) for number in asked] == [True, False, False]
    reasons = [answer.reason for answer in h.answers[-2:]]
    assert [reason.code for reason in reasons if reason] == ["UnknownQueue", "NotYours"]
    assert h.answers[-2].nearest == "night"
    assert band(h, asked[0]) == SCAVENGING


def test_what_could_never_be_within_quota_is_refused_and_may_come_again() -> None:
    h = yard(queue("a", 2, borrow_milli=0), acme="a")
    assert h.submit(firm(gpus=3), submission_id="big") == 0
    h.turn(PolicyChanged(policy=policy(queue("a", 4), acme="a")))
    assert h.submit(firm(gpus=3), submission_id="big") > 0


def test_a_changed_policy_counts_what_is_held_anew() -> None:
    h = yard(queue("a", 2, borrow_milli=0), acme="a")
    numbers = h.submit_many([firm()] * 4)
    h.turn(PolicyChanged(policy=policy(queue("b", 3, borrow_milli=0), acme="b")))
    assert h.states(*numbers) == ["starting"] * 3 + ["pending"]
    assert h.core.cluster.quota.queues["b"].allotments[0].used_milli == 3000
    h.turn(PolicyChanged(policy=Policy()))
    assert h.state(numbers[3]) == "starting"


# --- reclaim ---------------------------------------------------------------------------------------------------------

CARD: tuple[str, Kind] = ("H100", "whole")


def tree_of(*queues: QueuePolicy, **used: int) -> QuotaTree:
    tree = QuotaTree()
    tree.set_policy(Policy(queues=queues), {"H100": 100_000})
    for name, cards in used.items():
        tree.take(name, {CARD: cards * 1000})
    return tree


def cards(count: int) -> Amounts:
    return {CARD: count * 1000}


def test_within_nominal_takes_from_who_borrows_until_that_is_even() -> None:
    reclaim = Reclaim(tree_of(queue("a", 4), queue("b", 4), b=6), "a", cards(2))
    assert reclaim.may_take("b", cards(1))
    for _ in range(2):
        reclaim.take("b", cards(1))
    assert not reclaim.may_take("b", cards(1))


def test_nobody_takes_within_a_queue_or_from_who_is_within_nominal() -> None:
    tree = tree_of(queue("a", 4), queue("b", 4), a=2, b=4)
    assert not Reclaim(tree, "a", cards(1)).may_take("b", cards(1))
    assert not Reclaim(tree, "a", cards(1)).may_take("a", cards(1))


def test_scavengers_give_to_all_and_take_from_none() -> None:
    tree = tree_of(queue("a", 4), QueuePolicy("z", scavenger=True), a=6, z=2)
    assert Reclaim(tree, "a", cards(1)).may_take("z", cards(1))
    assert not Reclaim(tree, "z", cards(1)).may_take("a", cards(1))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_two_that_borrow_never_take_from_each_other_in_turns(
    a_used: int, b_used: int, size: int, a_weight: int, b_weight: int
) -> None:
    queues = (queue("a", 2, weight=a_weight), queue("b", 2, weight=b_weight))
    a_used, b_used = a_used + 2, b_used + 2 + size
    before = tree_of(*queues, a=a_used, b=b_used)
    if Reclaim(before, "a", cards(size)).may_take("b", cards(size)):
        after = tree_of(*queues, a=a_used + size, b=b_used - size)
        claimant = Reclaim(after, "b", cards(size))
        if not after.within_nominal("b", cards(size)):
            assert not claimant.may_take("a", cards(size))


# --- counting --------------------------------------------------------------------------------------------------------

_NAMES = ("lab", "a", "b", "c")
limits = st.one_of(st.just(-1), st.integers(0, 4))


@st.composite
def trees(draw: st.DrawFn) -> tuple[QueuePolicy, ...]:
    parents = {"lab": "", "a": "lab", "b": "lab", "c": ""}
    found = []
    for name in _NAMES:
        nominal = draw(st.integers(0, 6))
        lend, borrow = draw(limits), draw(limits)
        grant = Grant(nominal_milli=nominal, borrow_milli=borrow, lend_milli=min(lend, nominal))
        found.append(QueuePolicy(name=name, parent=parents[name], grants=(grant,) if draw(st.booleans()) else ()))
    return tuple(found)


@settings(max_examples=150)
@given(trees(), st.lists(st.tuples(st.sampled_from(_NAMES), st.integers(1, 3), st.booleans()), max_size=25))
def test_usage_stays_within_nominal_and_borrow_of_every_queue_above(
    queues: tuple[QueuePolicy, ...], moves: list[tuple[str, int, bool]]
) -> None:
    """Against a count from scratch, and what is not lent is always there for whom it is kept."""
    tree = QuotaTree()
    tree.set_policy(Policy(queues=queues), {"H100": 12})
    held: list[tuple[str, int]] = []
    for name, milli, comes in moves:
        if comes and tree.obstacle(name, {CARD: milli}) is None:
            tree.take(name, {CARD: milli})
            held.append((name, milli))
        elif not comes and held:
            gone, amount = held.pop(len(held) // 2)
            tree.give(gone, {CARD: amount})
        for each in tree.queues.values():
            for allotment in each.allotments:
                below = [n for n, q in tree.queues.items() if any(up is each for up in q.upwards())]
                assert allotment.used_milli == sum(m for n, m in held if n in below)
                most = allotment.most_milli()
                assert most is None or allotment.used_milli <= most
                assert allotment.unlent_milli == _unlent(tree, each.name)


def _unlent(tree: QuotaTree, name: str) -> int:
    children = [each for each in tree.queues.values() if each.parent is not None and each.parent.name == name != ROOT]
    return sum(allotment.idle_reserve_milli for each in children for allotment in each.allotments)


@pytest.mark.parametrize(
    ("model", "kind", "counts"), [("", "", True), ("H100", "", True), ("A30", "", False), ("", "shared", False)]
)
def test_grants_count_what_they_are_for(model: str, kind: Kind, *, counts: bool) -> None:
    allotment = Allotment(Grant(model=model, kind=kind))
    assert bool(allotment.part_of({("H100", "whole"): 1000})) is counts


@settings(max_examples=150)
@given(
    trees(),
    st.lists(st.tuples(st.sampled_from(_NAMES), st.integers(1, 3), st.booleans()), max_size=15),
    st.sampled_from(_NAMES),
    st.integers(1, 5),
)
def test_a_way_up_answers_as_the_tree_does(
    queues: tuple[QueuePolicy, ...], moves: list[tuple[str, int, bool]], name: str, milli: int
) -> None:
    tree = QuotaTree()
    tree.set_policy(Policy(queues=queues), {"H100": 12})
    wanted: Amounts = {CARD: milli}
    way = tree.way(name, wanted)
    for queue_name, amount, comes in moves:
        if comes or tree.obstacle(queue_name, {CARD: amount}) is None:
            tree.take(queue_name, {CARD: amount})
        # Giving nothing back changes nothing, and is worked out from scratch.
        assert way.obstacle() == tree.obstacle(name, wanted, {name: {}})


def test_an_eased_limit_lets_on_as_many_as_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tenants under one limit: what one of them leaves costs one start, and not a question for each."""
    names = [f"t{number:02d}" for number in range(12)]
    queues = [queue("all", 4, borrow_milli=0), *[queue(f"q-{name}", 4, parent="all") for name in names]]
    h = CoreHarness()
    h.join(node("n-1", 8))
    h.turn(PolicyChanged(policy=policy(*queues, **{name: f"q-{name}" for name in names})))
    held = h.submit_many([firm()] * 4, tenant=names[0])
    waiting = [h.submit(firm(), tenant=name) for name in names]
    line = h.core._line
    hold_back, held_back = line.hold_back, []

    def counted(*given: Any, **named: Any) -> None:
        held_back.append(given)
        hold_back(*given, **named)

    monkeypatch.setattr(line, "hold_back", counted)
    for number, follower in zip(held, waiting, strict=False):
        h.run(number)
        h.ended(number)
        assert h.states(follower) == ["starting"]
    assert len(held_back) <= 2 * len(held)


def test_who_came_in_front_while_its_queue_borrowed_is_in_front_when_it_does_not() -> None:
    h = CoreHarness()
    h.join(node("n-1", 5))
    part = QueuePolicy(name="a", grants=(Grant(nominal_milli=1500),))
    h.turn(PolicyChanged(policy=policy(part, queue("b", 3), queue("c", 1), acme="a", umbrella="b", initech="c")))
    held = h.submit_many([firm()] * 4, tenant="umbrella")
    h.submit(firm(gpus=0, share_milli=300))
    behind = h.submit(firm())
    between = h.submit(firm(priority=1), tenant="initech")
    more = h.submit(firm(gpus=0, share_milli=500))
    in_front = h.submit(firm(priority=2))
    assert band(h, in_front) == BORROWING
    h.run(more)
    h.ended(more)
    assert band(h, in_front) == NOMINAL
    h.run(held[0])
    h.ended(held[0])
    assert h.states(in_front, between, behind) == ["starting", "pending", "pending"]
