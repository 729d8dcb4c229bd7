"""Hold, begin, requeue, dependencies and arrays on a real yard, counted from what the jobs themselves wrote."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB") as yard:
        yield yard


async def test_a_held_job_starts_when_it_is_released(yard: Yard) -> None:
    async with yard.connect() as client:
        held = await client.submit(command=["true"], gpus=1, hold=True)
        later = await client.submit(command=["true"], gpus=1)
        assert (await later.wait(timeout=30)).state == "succeeded"
        assert (await held.why()).summary == f"held by {client.context.user} until it is released"
        shown = await asyncio.to_thread(yard.cli, "release", str(held.number))
        assert shown.returncode == 0, shown.stderr
        assert (await held.wait(timeout=30)).state == "succeeded"
    again = await asyncio.to_thread(yard.cli, "release", str(held.number))
    assert again.returncode == 1
    assert "has succeeded already" in again.stderr


async def test_a_job_does_not_begin_before_its_time(yard: Yard) -> None:
    async with yard.connect() as client:
        job = await client.submit(command=["true"], begin="+1s")
        assert (await job.view()).state == "pending"
        view = await job.wait(timeout=30)
        assert view.state == "succeeded"
        assert view.first_started_ms - view.submitted_ms >= 1000


async def test_a_requeued_job_runs_again_and_keeps_its_retries(yard: Yard) -> None:
    gate, starts = yard.scratch / "requeue-gate", yard.scratch / "requeue-starts"
    script = f"echo $GPUYARD_ATTEMPT >> {starts}; until [ -e {gate} ]; do sleep 0.05; done"
    async with yard.connect() as client:
        job = await client.submit(command=script, gpus=1, retries=2)

        async def started(times: int) -> bool:
            return starts.exists() and len(starts.read_text().split()) == times

        await eventually(lambda: started(1), "the first attempt writes")
        await client.requeue(job.number)
        await eventually(lambda: started(2), "the second attempt writes")
        gate.touch()
        view = await job.wait(timeout=30)
        assert (view.state, view.attempt, view.retries_left) == ("succeeded", 2, 2)
    assert starts.read_text().split() == ["1", "2"]


async def test_dependencies_order_jobs_and_end_those_that_can_never_start(yard: Yard) -> None:
    trail = yard.scratch / "trail"
    async with yard.connect() as client:
        first = await client.submit(command=f"sleep 0.3; echo first >> {trail}")
        second = await client.submit(command=f"echo second >> {trail}", depends_on=[f"afterok:{first.number}"])
        never = await client.submit(command=f"echo never >> {trail}", depends_on=[f"afternotok:{first.number}"])
        last = await client.submit(command=f"echo last >> {trail}", depends_on=[f"afterany:{second.number}"])
        assert (await last.wait(timeout=30)).state == "succeeded"
        view = await never.wait(timeout=30)
        assert view.state == "cancelled"
        assert view.reason is not None
        assert view.reason.code == "DependencyNeverSatisfied"
        with pytest.raises(gpuyard.Rejected, match="999999") as refused:
            await client.submit(command=["true"], depends_on=["afterok:999999"])
        assert refused.value.reason == "UnknownJob"
    assert trail.read_text().split() == ["first", "second", "last"]


async def test_an_array_is_one_message_and_each_element_runs_once_with_its_index(yard: Yard) -> None:
    out = yard.scratch / "array"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    line = f"echo $GPUYARD_ARRAY_JOB $SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID >> {out}/$GPUYARD_ARRAY_INDEX"
    async with yard.connect() as client:
        array = await client.submit(command=line, gpu=0.5, array="0-38:2%4")
        assert array.elements == 20
        after = await client.submit(command=["true"], depends_on=[f"afterok:{array.number}"])
        assert (await after.wait(timeout=60)).state == "succeeded"
    written = Counter(path.name for path in out.iterdir() for _ in path.read_text().splitlines())
    assert written == Counter({str(index): 1 for index in range(0, 40, 2)})
    assert (out / "38").read_text().split() == [str(array.number), str(array.number), "38"]


async def test_a_waiting_array_is_one_row_and_goes_with_one_command(yard: Yard) -> None:
    submitted = await asyncio.to_thread(yard.cli, "submit", "--hold", "--array", "0-499", "--cwd", "", "--", "true")
    assert submitted.returncode == 0, submitted.stderr
    number = int(submitted.stdout.split()[2])
    assert f"array {number} of 500 jobs" in submitted.stdout
    listed = await asyncio.to_thread(yard.cli, "jobs")
    assert len(listed.stdout.splitlines()) == 2
    assert f"{number}[500 left]" in listed.stdout
    cancelled = await asyncio.to_thread(yard.cli, "cancel", "--array", str(number))
    assert cancelled.returncode == 0, cancelled.stderr
    async with yard.connect() as client:
        assert [view async for view in client.jobs()] == []
        assert (await client.job(number + 499)).state == "cancelled"
