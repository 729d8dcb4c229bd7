"""Modelled cards: what they offer, what they refuse, and that a restarted agent finds the same ones."""

from __future__ import annotations

import itertools
import os

import pytest

from gpuyard_agent.devices.base import DeviceFault, DeviceRecovered, DeviceTrouble, PartitionRefused
from gpuyard_agent.devices.simulated import SimulatedBackend, parse_cards, simulated_host
from gpuyard_agent.devices.simulated_models import CARD_MODELS
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import Device, MigInstance, MpsShare, TimeSliceShare, WholeCards
from support.devices import News


def cards(text: str = "2xH100-80GB", node: str = "node-1") -> SimulatedBackend:
    return SimulatedBackend(parse_cards(text), node)


def key(job: int) -> AssignmentKey:
    return AssignmentKey(job, 1, 0)


async def first_card(backend: SimulatedBackend) -> Device:
    return (await backend.inventory())[0]


# --- what people write ---


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("8xH100-80GB", ["NVIDIA H100 80GB HBM3"] * 8),
        ("4xA100-40GB", ["NVIDIA A100-SXM4-40GB"] * 4),
        ("2xA30", ["NVIDIA A30"] * 2),
        ("8xH200-141GB", ["NVIDIA H200"] * 8),
        ("2xb200", ["NVIDIA B200"] * 2),
        ("T4", ["Tesla T4"]),
        ("1xH100-80GB, 2xA100-80GB", ["NVIDIA H100 80GB HBM3"] + ["NVIDIA A100-SXM4-80GB"] * 2),
    ],
)
async def test_cards_are_written_as_people_write_them(text: str, models: list[str]) -> None:
    assert [device.model for device in await cards(text).inventory()] == models


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH900", r"'H900' is no card model that can be simulated; expected one of A100-40GB, A100-80GB, H100-80GB"),
        ("8xH100", r"'H100' comes in several sizes; expected one of H100-80GB, H100-94GB"),
        ("", r"found ''; expected cards such as"),
        ("0xA30", r"expected at least one card"),
        ("99xA30", r"found 99 cards in '99xA30'; expected at most 64"),
        ("8 H100-80GB", r"found '8 H100-80GB'; expected cards such as '8xH100-80GB'"),
    ],
)
def test_a_wrong_text_is_refused_with_what_is_allowed(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_cards(text)


def test_a_host_comes_with_its_cards() -> None:
    host = simulated_host(parse_cards("8xH100-80GB"))
    assert (host.cpu_milli, host.memory_mib) == (128_000, 1024 * 1024)


# --- what they are ---


async def test_a_restarted_agent_finds_the_same_cards_and_another_node_has_others() -> None:
    uuids = [device.uuid for device in await cards().inventory()]
    assert [device.uuid for device in await cards().inventory()] == uuids
    others = [device.uuid for device in await cards(node="node-2").inventory()]
    assert set(others).isdisjoint(uuids)


async def test_cards_of_one_model_are_linked_all_to_all() -> None:
    devices = await cards("3xH100-80GB,2xA30").inventory()
    assert [len(device.nvlinks) for device in devices] == [2, 2, 2, 0, 0]
    assert devices[0].nvlinks == ((devices[1].uuid, 18), (devices[2].uuid, 18))


@pytest.mark.parametrize("model", CARD_MODELS)
async def test_geometry_is_possible_on_the_card(model: str) -> None:
    """Every profile lies inside the card, and as many as it says fit side by side."""
    device = await first_card(cards(f"1x{model}"))
    for facts in device.mig_profiles:
        assert all(start + facts.size <= device.mig_slices for start in facts.starts)
        disjoint = [
            starts
            for starts in itertools.combinations(facts.starts, facts.count_max)
            if all(later - earlier >= facts.size for earlier, later in itertools.pairwise(starts))
        ]
        assert disjoint, f"{facts.count_max} of {facts.name} do not fit"
        assert facts.memory_mib * facts.count_max <= device.memory_mib


async def test_the_classic_layouts_of_an_eight_slice_card_can_be_made() -> None:
    layouts: list[list[tuple[str, int]]] = [
        [("7g.80gb", 0)],
        [("4g.40gb", 0), ("3g.40gb", 4)],
        [("4g.40gb", 0), ("2g.20gb", 4), ("1g.10gb", 6)],
        [("3g.40gb", 0), ("3g.40gb", 4)],
        [("3g.40gb", 4), *(("1g.10gb", start) for start in range(4))],
        [("2g.20gb", 0), ("2g.20gb", 2), ("2g.20gb", 4), ("1g.10gb", 6)],
        [("1g.10gb+me", 0), *(("1g.10gb", start) for start in range(1, 7))],
        [("1g.20gb", start) for start in (0, 2, 4, 6)],
    ]
    for layout in layouts:
        backend = cards("1xH100-80GB")
        device = await first_card(backend)
        for profile, start in layout:
            await backend.create_mig(device.uuid, profile, start)
        found = [(one.profile, one.start) for one in await backend.mig_instances(device.uuid)]
        assert found == sorted(layout, key=lambda placed: placed[1])


# --- what they refuse ---


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        ([], ("1g.10gb", 7), "may start at 0, 1, 2, 3, 4, 5, 6, not at 7"),
        ([], ("4g.40gb", 4), "may start at 0, not at 4"),
        ([], ("5g.60gb", 0), "has no MIG profile '5g.60gb'"),
        ([("3g.40gb", 0)], ("1g.10gb", 3), "1g.10gb at 3 overlaps 3g.40gb at 0"),
        ([("7g.80gb", 0)], ("1g.10gb", 6), "overlaps"),
        ([("1g.10gb+me", 0)], ("1g.10gb+me", 1), "has 1 of 1g.10gb\\+me already"),
    ],
)
async def test_an_instance_that_cannot_be_is_refused(
    present: list[tuple[str, int]], wanted: tuple[str, int], expected: str
) -> None:
    backend = cards()
    device = await first_card(backend)
    for profile, start in present:
        await backend.create_mig(device.uuid, profile, start)
    with pytest.raises(PartitionRefused, match=expected):
        await backend.create_mig(device.uuid, *wanted)
    assert len(await backend.mig_instances(device.uuid)) == len(present)


async def test_memory_is_never_over_committed() -> None:
    backend = cards()
    device = await first_card(backend)
    backend.hold(key(1), TimeSliceShare(device.uuid, 1000, 60_000))
    with pytest.raises(PartitionRefused, match="has 21152 MiB left, not 30000"):
        backend.hold(key(2), TimeSliceShare(device.uuid, 1000, 30_000))
    backend.hold(key(2), TimeSliceShare(device.uuid, 1000, 21_152))


async def test_shares_under_mps_are_at_most_the_card() -> None:
    backend = cards()
    device = await first_card(backend)
    backend.hold(key(1), MpsShare(device.uuid, 700, 1000))
    with pytest.raises(PartitionRefused, match="more than the whole card"):
        backend.hold(key(2), MpsShare(device.uuid, 301, 1000))
    with pytest.raises(PartitionRefused, match="at most 48 processes"):
        backend.hold(key(2), MpsShare(device.uuid, 300, 1000, processes=48))


async def test_a_card_is_in_one_mode_at_a_time() -> None:
    backend = cards()
    one, two = [device.uuid for device in await backend.inventory()]
    backend.hold(key(1), MpsShare(one, 100, 1000))
    for partition in (WholeCards((two, one)), TimeSliceShare(one, 100, 1000)):
        with pytest.raises(PartitionRefused, match="is in mode mps already"):
            backend.hold(key(2), partition)
    with pytest.raises(PartitionRefused, match="MIG needs it empty"):
        await backend.create_mig(one, "1g.10gb", 0)
    backend.hold(key(2), WholeCards((two,)))  # refusing took nothing of the other card
    with pytest.raises(PartitionRefused, match="is in mode whole already"):
        backend.hold(key(3), WholeCards((two,)))


async def test_an_instance_has_one_holder_and_is_not_destroyed_under_it() -> None:
    backend = cards()
    device = await first_card(backend)
    made = await backend.create_mig(device.uuid, "2g.20gb", 2)
    instance = MigInstance(device.uuid, "2g.20gb", 2, 2, 20_096, 2)
    backend.hold(key(1), instance)
    backend.running(key(1), os.getpid())
    with pytest.raises(PartitionRefused, match="the instance at 2 is taken"):
        backend.hold(key(2), instance)
    with pytest.raises(PartitionRefused, match=r"no instance 1g\.10gb at 6"):
        backend.hold(key(2), MigInstance(device.uuid, "1g.10gb", 6, 1, 9984, 1))
    with pytest.raises(DeviceTrouble, match=r"in use by assignment 1\.1\.0"):
        await backend.destroy_mig(device.uuid, made.mig_uuid)
    backend.running(key(1), 0)
    await backend.destroy_mig(device.uuid, made.mig_uuid)
    assert await backend.mig_instances(device.uuid) == ()


async def test_cards_without_a_mode_refuse_it() -> None:
    backend = cards("1xP100-16GB")
    device = await first_card(backend)
    with pytest.raises(PartitionRefused, match="cannot be used in mode mps"):
        backend.hold(key(1), MpsShare(device.uuid, 100, 1000))


# --- what they show ---


async def test_use_follows_live_processes_alone() -> None:
    backend = cards()
    one, two = await backend.inventory()
    backend.hold(key(1), MpsShare(one.uuid, 300, 10_000))
    backend.hold(key(2), WholeCards((two.uuid,)))
    assert [sample.utilization_pct for sample in await backend.samples()] == [0, 0]
    backend.running(key(1), os.getpid())
    backend.running(key(2), 2**22 + 1)  # above every pid: nothing lives there
    first, second = await backend.samples()
    assert (first.utilization_pct, first.memory_used_mib) == (29, 8500)
    assert (second.utilization_pct, second.memory_used_mib) == (0, 0)
    assert [process.pid for process in await backend.processes(one.uuid)] == [os.getpid()]
    backend.drop(key(1))
    assert (await backend.samples())[0].utilization_pct == 0


async def test_a_broken_card_says_so_and_can_be_mended() -> None:
    backend = cards()
    news = News(backend)
    device = await first_card(backend)
    backend.set_fault(device.uuid, "fell off the bus", "lost")
    broken = await first_card(backend)
    assert (broken.healthy, broken.fault) == (False, "fell off the bus")
    assert (await backend.samples())[0].utilization_pct is None
    with pytest.raises(DeviceTrouble, match="fell off the bus"):
        await backend.processes(device.uuid)
    backend.set_fault(device.uuid, "fell off the bus")
    backend.set_fault(device.uuid, "")
    backend.set_fault(device.uuid, "")
    assert await first_card(backend) == device
    assert news.heard == [
        DeviceFault(device=device.uuid, kind="lost", detail="fell off the bus"),
        DeviceRecovered(device=device.uuid),
    ]


async def test_mig_mode_is_left_only_without_instances() -> None:
    backend = cards()
    device = await first_card(backend)
    made = await backend.create_mig(device.uuid, "1g.10gb", 3)
    with pytest.raises(PartitionRefused, match=r"it has 1g\.10gb at 3"):
        await backend.leave_mig(device.uuid)
    await backend.destroy_mig(device.uuid, made.mig_uuid)
    await backend.leave_mig(device.uuid)
    answers = [await backend.set_exclusive(device.uuid, on) for on in (True, True, False)]
    assert answers == ["done", "already", "done"]
