"""The driver's own time slices, set through nvidia-smi's stand-in; and the place that a share of time is otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fake_driver.control import FakeDriver
from gpuyard_agent.devices.base import DeviceTrouble
from gpuyard_agent.partitions.base import PartitionRefused
from gpuyard_agent.partitions.timeslice import DriverSlices, TimeSliceMaker
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.resources import NoGpu, TimeSliceShare
from support.devices import fake_cards
from support.launch import job_account, key


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[FakeDriver]:
    async with fake_cards(tmp_path, count=2) as made:
        yield made[0]


def share(driver: FakeDriver, card: int = 0) -> TimeSliceShare:
    return TimeSliceShare(device=driver.gpu(card).uuid, share_milli=300, memory_mib=1024)


class Book:
    """Remembers who has a place."""

    def __init__(self) -> None:
        self.places: dict[AssignmentKey, tuple[str, int]] = {}

    def admit(self, key: AssignmentKey, card: str, weight: int) -> None:
        self.places[key] = (card, weight)

    def dismiss(self, key: AssignmentKey) -> None:
        self.places.pop(key, None)


async def test_slices_of_a_card_are_set_once_and_other_cards_are_left_alone(driver: FakeDriver) -> None:
    maker = TimeSliceMaker(slices=DriverSlices("long", f"{driver.bin}/nvidia-smi"))
    grant = await maker.make(key(1), share(driver), job_account())
    assert grant.mode == "timeslice"
    assert grant.env["CUDA_VISIBLE_DEVICES"] == driver.gpu(0).uuid
    assert (driver.gpu(0).get("timeslice"), driver.gpu(1).get("timeslice")) == (3, 0)
    driver.gpu(0).set(timeslice=1)
    await maker.make(key(2), share(driver), job_account())
    assert driver.gpu(0).get("timeslice") == 1


async def test_a_card_that_cannot_is_trouble_with_the_drivers_words(driver: FakeDriver) -> None:
    driver.gpu(0).set(timeslice_supported=0)
    maker = TimeSliceMaker(slices=DriverSlices("short", f"{driver.bin}/nvidia-smi"))
    with pytest.raises(DeviceTrouble, match="Not Supported"):
        await maker.make(key(1), share(driver), job_account())
    missing = TimeSliceMaker(slices=DriverSlices("short", "/no/such/nvidia-smi"))
    with pytest.raises(DeviceTrouble, match="No such file"):
        await missing.make(key(1), share(driver), job_account())


async def test_whoever_gives_turns_is_told_of_each_place(driver: FakeDriver) -> None:
    book = Book()
    maker = TimeSliceMaker(book)
    one = share(driver)
    await maker.make(key(1), one, job_account())
    assert book.places == {key(1): (one.device, 300)}
    await maker.unmake(key(1), one, 0)
    await maker.unmake(key(1), one, 0)
    assert book.places == {}
    with pytest.raises(PartitionRefused):
        await maker.make(key(2), NoGpu(), job_account())
