"""How one card is cut: which mode answers which wish, where MIG instances go, what never fits together."""

from __future__ import annotations

import msgspec
import pytest

from gpuyard_daemon.core.placing.capacity import ANY_MODE
from gpuyard_daemon.core.placing.partitions import Card, cut, fit
from gpuyard_daemon.core.state.states import InvariantViolated
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import (
    MigInstance,
    Mode,
    MpsShare,
    Partition,
    ResourceNeed,
    TimeSliceShare,
    WholeCards,
)
from support.builders import gpu, need

MOST = 4000


def take(
    card: Card, wanted: ResourceNeed, tenant: str = "acme", modes: tuple[Mode, ...] = ANY_MODE
) -> Partition | None:
    """Cut the card for a need, if it fits."""
    if fit(card, wanted, tenant, modes, MOST) < 0:
        return None
    partition = cut(card, wanted, modes)
    newest = max((key.job for key in card.held), default=0)
    card.take(AssignmentKey(newest + 1, 1, 0), partition, tenant)
    return partition


def starts(card: Card, *profiles: str) -> list[int | None]:
    found = [take(card, need(mig=profile)) for profile in profiles]
    return [instance.start if isinstance(instance, MigInstance) else None for instance in found]


@pytest.mark.parametrize(
    ("isolation", "modes", "kind"),
    [
        ("hard", ("whole", "mig", "mps", "timeslice"), MigInstance),
        ("hard", ("whole", "mps", "timeslice"), WholeCards),
        ("soft", ("whole", "mig", "mps", "timeslice"), MpsShare),
        ("soft", ("whole", "mig"), MigInstance),
        ("none", ("whole", "mig", "mps", "timeslice"), TimeSliceShare),
        ("none", ("whole", "mps"), MpsShare),
    ],
)
def test_isolation_decides_the_mode(isolation: str, modes: tuple[Mode, ...], kind: type[Partition]) -> None:
    card = Card(gpu(modes=modes), 0)
    assert isinstance(take(card, need(share_milli=250, isolation=isolation)), kind)


@pytest.mark.parametrize(("isolation", "modes"), [("soft", ("whole", "timeslice")), ("none", ("whole", "mig"))])
def test_a_share_is_refused_where_no_mode_gives_its_isolation(isolation: str, modes: tuple[Mode, ...]) -> None:
    assert take(Card(gpu(modes=modes), 0), need(share_milli=250, isolation=isolation)) is None


@pytest.mark.parametrize(
    ("wanted", "profile"),
    [
        (need(share_milli=140, isolation="hard"), "1g.10gb"),
        (need(share_milli=143, isolation="hard"), "2g.20gb"),
        (need(share_milli=250, isolation="hard"), "2g.20gb"),
        (need(share_milli=300, isolation="hard"), "3g.40gb"),
        (need(share_memory_mib=15_000, isolation="hard"), "1g.20gb"),
        (need(share_memory_mib=15_000, share_milli=200, isolation="hard"), "2g.20gb"),
        (need(share_memory_mib=60_000, isolation="hard"), "7g.80gb"),
    ],
)
def test_a_hard_share_gets_the_smallest_profile_that_covers_what_was_asked(wanted: ResourceNeed, profile: str) -> None:
    instance = take(Card(gpu(), 0), wanted)
    assert isinstance(instance, MigInstance)
    assert instance.profile == profile


def test_a_full_mig_card_is_not_given_away_whole_to_a_hard_share() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "7g.80gb") == [0]
    assert take(card, need(share_milli=100, isolation="hard")) is None


def test_small_instances_go_to_the_high_end_and_keep_the_low_half_whole() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "1g.10gb", "1g.10gb", "1g.10gb") == [6, 5, 4]
    assert starts(card, "3g.40gb") == [0]


def test_a_3g_goes_to_4_first_so_that_a_4g_finds_0() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "3g.40gb", "4g.40gb", "1g.10gb") == [4, 0, None]


@pytest.mark.parametrize(
    "layout",
    [
        ["7g.80gb"],
        ["4g.40gb", "3g.40gb"],
        ["4g.40gb", "2g.20gb", "1g.10gb"],
        ["4g.40gb", *["1g.10gb"] * 3],
        ["3g.40gb", "3g.40gb"],
        ["3g.40gb", "2g.20gb", "2g.20gb"],
        ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"],
        ["3g.40gb", *["1g.10gb"] * 4],
        [*["2g.20gb"] * 3, "1g.10gb"],
        ["2g.20gb", "2g.20gb", *["1g.10gb"] * 3],
        ["2g.20gb", *["1g.10gb"] * 5],
        ["1g.10gb"] * 7,
        ["1g.20gb"] * 4,
    ],
)
def test_every_maximal_layout_is_reached_largest_first(layout: list[str]) -> None:
    """The layouts an eight-slice card can have; asked for from the largest down, each finds room for all."""
    card = Card(gpu(), 0)
    assert None not in starts(card, *layout)


def test_a_card_never_gets_more_than_its_slices() -> None:
    card = Card(gpu(), 0)
    assert starts(card, *["1g.10gb"] * 8) == [6, 5, 4, 3, 2, 1, 0, None]
    assert card.mask == 0b1111111


def test_media_engines_exist_once() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "1g.10gb+me", "1g.10gb+me", "1g.10gb") == [6, None, 5]


def test_slices_come_back() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "3g.40gb", "3g.40gb", "3g.40gb") == [4, 0, None]
    card.give(AssignmentKey(1, 1, 0))
    assert starts(card, "3g.40gb") == [4]
    card.give(AssignmentKey(2, 1, 0))
    assert card.mode == "mig"


def test_a_card_without_holders_is_idle_again_and_takes_any_mode() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "1g.10gb") == [6]
    assert take(card, need(share_milli=300, isolation="none")) is None
    card.give(AssignmentKey(1, 1, 0))
    assert (card.mode, card.mask, card.milli, card.memory_mib) == ("idle", 0, 0, 0)
    assert take(card, need(share_milli=300, isolation="none")) is not None


def test_mps_shares_stop_at_the_whole_of_the_compute() -> None:
    card = Card(gpu(), 0)
    assert [take(card, need(share_milli=400)) is not None for _ in range(3)] == [True, True, False]
    assert card.milli == 800


def test_compute_alone_stops_mps_shares_that_ask_for_little_memory() -> None:
    card = Card(gpu(), 0)
    wanted = need(share_milli=400, share_memory_mib=1000)
    assert [take(card, wanted) is not None for _ in range(3)] == [True, True, False]


def test_mps_shares_stop_at_the_whole_of_the_memory() -> None:
    """Memory asked for on its own brings its part of the compute: both dimensions fill up."""
    card = Card(gpu(memory_mib=80_000), 0)
    wanted = need(share_memory_mib=30_000, share_milli=100)
    assert [take(card, wanted) is not None for _ in range(3)] == [True, True, False]


def test_mps_processes_stop_at_what_the_card_serves() -> None:
    card = Card(gpu(), 0)
    wanted = need(share_milli=10, gpu_processes=20)
    assert [take(card, wanted) is not None for _ in range(3)] == [True, True, False]


def test_compute_in_turns_may_be_promised_four_times_but_memory_once() -> None:
    card = Card(gpu(memory_mib=80_000), 0)
    wanted = need(share_milli=1000, share_memory_mib=10_000, isolation="none")
    assert [take(card, wanted) is not None for _ in range(5)] == [True, True, True, True, False]
    roomy = Card(gpu(memory_mib=80_000), 0)
    wanted = need(share_milli=100, share_memory_mib=30_000, isolation="none")
    assert [take(roomy, wanted) is not None for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("isolation", ["soft", "none"])
def test_a_shared_card_belongs_to_one_tenant(isolation: str) -> None:
    card = Card(gpu(modes=("whole", "mps", "timeslice")), 0)
    wanted = need(share_milli=100, isolation=isolation)
    assert take(card, wanted, "acme") is not None
    assert take(card, wanted, "umbrella") is None
    assert take(card, wanted, "acme") is not None


def test_mig_instances_of_different_tenants_share_a_card() -> None:
    card = Card(gpu(), 0)
    assert take(card, need(mig="1g.10gb"), "acme") is not None
    assert take(card, need(mig="1g.10gb"), "umbrella") is not None


def test_a_soft_share_may_use_a_card_that_is_cut_for_mig_already() -> None:
    card = Card(gpu(), 0)
    assert starts(card, "3g.40gb") == [4]
    assert isinstance(take(card, need(share_milli=250)), MigInstance)


def test_a_sick_or_vanished_card_takes_nothing() -> None:
    assert take(Card(gpu(healthy=False), 0), need(share_milli=100)) is None
    assert take(Card(gpu(), 0, present=False), need(share_milli=100)) is None


@pytest.mark.parametrize(
    "second",
    [
        WholeCards(("GPU-n-1-0",)),
        MpsShare("GPU-n-1-0", 100, 1000),
        TimeSliceShare("GPU-n-1-0", 100, 1000),
        MigInstance("GPU-n-1-0", "1g.10gb", 4, 1, 9_984, 1),
    ],
)
def test_a_card_refuses_what_it_cannot_hold_and_stays_as_it_was(second: Partition) -> None:
    card = Card(gpu(), 0)
    card.take(AssignmentKey(1, 1, 0), MigInstance("GPU-n-1-0", "3g.40gb", 4, 4, 40_448, 3), "acme")
    with pytest.raises(InvariantViolated, match="GPU-n-1-0"):
        card.take(AssignmentKey(2, 1, 0), second, "acme")
    assert (card.mask, card.milli, list(card.held)) == (0b11110000, 428, [AssignmentKey(1, 1, 0)])


def test_slices_that_somebody_outside_the_yard_holds_are_left_alone() -> None:
    card = Card(msgspec.structs.replace(gpu(0), mig_taken=((0, 4),)), 0)
    assert card.mode == "mig"
    assert fit(card, need(gpus=0, share_milli=500, isolation="none"), "acme", ("timeslice", "mps"), 4000) < 0
    partition = cut(card, need(mig="3g.40gb"), ("mig",))
    assert isinstance(partition, MigInstance)
    assert partition.start == 4
    card.take(AssignmentKey(1, 1, 0), partition, "acme")
    assert fit(card, need(mig="1g.10gb"), "acme", ("mig",), 4000) < 0
    card.give(AssignmentKey(1, 1, 0))
    assert (card.mode, card.mask) == ("mig", 0b1111)


def test_a_mig_instance_is_put_under_mps_where_its_job_asks_for_it() -> None:
    card = Card(gpu(), 0)
    instance = take(card, need(mig="2g.20gb", mps=True, gpu_processes=3))
    assert isinstance(instance, MigInstance)
    assert (instance.profile, instance.processes) == ("2g.20gb", 3)
    plain = take(card, need(mig="2g.20gb"))
    assert isinstance(plain, MigInstance)
    assert plain.processes == 0


@pytest.mark.parametrize(("clients_max", "processes"), [(48, 14), (0, 1)])
def test_an_instance_serves_its_part_of_the_processes_that_the_card_serves(clients_max: int, processes: int) -> None:
    card = Card(msgspec.structs.replace(gpu(), mps_clients_max=clients_max), 0)
    assert take(card, need(mig="2g.20gb", mps=True, gpu_processes=processes)) is None
    assert take(card, need(mig="2g.20gb")) is not None


def test_a_kept_place_waits_for_media_engines_that_somebody_else_has() -> None:
    """They exist once on a card, wherever the instances with them stand."""
    card = Card(gpu(), 0)
    first = MigInstance("GPU-n-1-0", "1g.10gb+me", 6, 1, 9_984, 1)
    second = MigInstance("GPU-n-1-0", "1g.10gb+me", 0, 1, 9_984, 1)
    card.take(AssignmentKey(1, 1, 0), first, "acme")
    assert not card.could_take(second, "acme")
    card.give(AssignmentKey(1, 1, 0))
    assert card.could_take(second, "acme")
