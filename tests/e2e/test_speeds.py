"""Cards of two models on a real yard: a job that gains nothing from the fast one leaves it to those who do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.yard import Yard, eventually, running_yard

SETTINGS = "[gpu_speeds]\nA30 = 0.5\n"


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="1xH100-80GB,1xA30", settings=SETTINGS) as yard:
        yield yard


async def _read(yard: Yard, *arguments: str) -> Any:
    shown = await asyncio.to_thread(yard.cli, *arguments, "--json")
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


async def _model_of(yard: Yard, number: int) -> str:
    nodes = await _read(yard, "nodes")
    cards = [card for node in nodes for card in node["cards"]]
    (card,) = [card for card in cards if number in card.get("jobs", ())]
    return "A30" if "A30" in card["model"] else "H100"


async def test_jobs_go_where_they_are_effective(yard: Yard) -> None:
    async with yard.connect() as client:
        told = await asyncio.to_thread(yard.cli, "submit", "-g", "1", "--throughput", "A30=1.0", "sleep", "60")
        indifferent = client.handle(int(told.stdout.removeprefix("Submitted job ")))
        usual = await client.submit(command=["sleep", "60"], gpus=1)

        async def both_run() -> bool:
            return all([(await job.view()).state == "running" for job in (indifferent, usual)])

        await eventually(both_run, "both jobs run")
        assert await _model_of(yard, indifferent.number) == "A30"
        assert await _model_of(yard, usual.number) == "H100"
        report = await _read(yard, "usage", "--models")
        speeds = {each["model"]: each.get("speed_milli", 1000) for each in report["models"]}
        assert speeds == {"A30": 500, "H100": 1000}
        for job in (indifferent, usual):
            await job.cancel()
