"""A job on modelled cards gives way to another: halted in the host's memory, then back with the same process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.night_yard import night_yard
from support.yard import Yard, eventually


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with night_yard() as yard:
        yield yard


class Ticks:
    """What the night's job writes: its process's number, over and over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    async def go_on(self) -> None:
        before = len(self.all())

        async def more() -> bool:
            return len(self.all()) > before + 5

        await eventually(more, "the night job works")


async def test_a_large_job_gives_way_and_goes_on_where_it_was(yard: Yard) -> None:
    ticks = Ticks(yard.scratch / "ticks")
    script = f"while :; do echo $$ >> {ticks.path}; sleep 0.02; done"
    async with yard.connect() as client:
        firm = await client.submit(command=["sleep", "1000"], gpus=1, preemption="never")
        night = await client.submit(command=script, gpus=1, preemption="suspend", queue="night")
        await ticks.go_on()
        seen = yard.scratch / "seen"
        day = await client.submit(
            command=f"wc -l < {ticks.path} > {seen}; sleep 2; wc -l < {ticks.path} >> {seen}", gpus=1
        )

        async def runs() -> bool:
            return (await day.view()).state == "running"

        await eventually(runs, "the day job has the card", timeout=60)
        assert (await night.view()).state == "suspended"
        assert (await day.wait()).state == "succeeded"
        first, last = seen.read_text().split()
        assert first == last, "the night job writes nothing while the day job has its card"
        await ticks.go_on()
        view = await night.view()
        assert (view.state, view.attempt) == ("running", 1)
        assert len(set(ticks.all())) == 1, "one process from the beginning to the end"
        for job in (night, firm):
            await job.cancel()
