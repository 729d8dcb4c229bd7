"""Limits of tenants on a real yard: what is over quota, what a bad configuration does to a running daemon."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from support.yard import Yard, eventually, running_yard

SETTINGS = "[tenants.main]\ngpus_max = 1.5\njobs_max = 4\n"


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="4xH100-80GB", settings=SETTINGS) as yard:
        yield yard


def release(path: Path) -> list[str]:
    """A job that ends when the file is there."""
    return ["sh", "-c", f"until [ -e {path} ]; do sleep 0.05; done"]


async def _metric(yard: Yard, name: str) -> float:
    url = gpuyard.load_context(yard.context).http + "/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(read)
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def _reload(yard: Yard, text: str) -> None:
    """Change the file, send SIGHUP, wait until the daemon has read it, well or badly."""
    counters = ("gpuyard_config_reload_total", "gpuyard_config_reload_failed_total")
    before = sum([await _metric(yard, name) for name in counters])
    yard.daemon_settings.write_text('[journal]\nbudget = "256Mi"\n' + text)
    [daemon] = yard.processes("gpuyard_daemon", "--yard")
    daemon.send_signal(signal.SIGHUP)

    async def read() -> bool:
        return sum([await _metric(yard, name) for name in counters]) > before

    await eventually(read, "the daemon reads its configuration")


async def test_what_is_over_the_gpu_limit_waits_with_that_reason_and_then_runs(yard: Yard) -> None:
    gate = yard.scratch / "gate"
    async with yard.connect() as client:
        first = await client.submit(command=release(gate), gpus=1)
        second = await client.submit(command=["true"], gpus=1)
        view = await client.job(second.number)
        assert view.state == "pending"
        assert view.reason is not None
        assert view.reason.code == "OverQuota"
        why = await client.why(second.number)
        assert why.limit is not None
        assert "tenant main holds 1 of at most 1.5 GPUs, and this needs 1" in why.summary
        assert why.position == 1
        share = await client.submit(command=["true"], gpu=0.5)
        assert (await share.wait(timeout=30)).state == "succeeded"
        gate.touch()
        assert (await second.wait(timeout=30)).state == "succeeded"
        assert (await first.wait(timeout=30)).state == "succeeded"


async def test_more_than_the_tenant_may_ever_hold_is_rejected_at_once(yard: Yard) -> None:
    async with yard.connect() as client:
        with pytest.raises(gpuyard.Rejected, match=r"at most 1\.5") as refused:
            await client.submit(command=["true"], gpus=2)
        assert refused.value.reason == "OverQuota"


async def test_more_unfinished_jobs_than_allowed_are_rejected_with_what_to_do(yard: Yard) -> None:
    gate = yard.scratch / "jobs-gate"
    async with yard.connect() as client:
        outcomes = await client.submit_many([{"command": release(gate), "submission_id": f"m-{n}"} for n in range(6)])
        refused = [outcome for outcome in outcomes if isinstance(outcome, gpuyard.Rejected)]
        assert len(refused) == 2
        assert refused[0].reason == "OverQuota"
        assert "may have 4" in str(refused[0])
        assert "jobs_max" in str(refused[0])
        gate.touch()
        for outcome in outcomes:
            if not isinstance(outcome, gpuyard.Rejected):
                await outcome.wait(timeout=30)
        again = await client.submit(command=["true"], submission_id="m-5")
        assert (await again.wait(timeout=30)).state == "succeeded"


async def test_usage_tells_what_is_held_and_was_used(yard: Yard) -> None:
    gate = yard.scratch / "usage-gate"
    async with yard.connect() as client:
        job = await client.submit(command=release(gate), gpu=0.5)
        usage = await client.usage()
        assert (usage.tenant, usage.held_milli, usage.gpus_max_milli, usage.jobs_max) == ("main", 500, 1500, 4)
        gate.touch()
        await job.wait(timeout=30)
        after = await client.usage()
        assert after.held_milli == 0
        assert after.used_milli_ms > usage.used_milli_ms
        assert sum(user.used_milli_ms for user in after.users) == after.used_milli_ms
    shown = await asyncio.to_thread(yard.cli, "usage", "--json")
    assert json.loads(shown.stdout)["gpus_max_milli"] == 1500
    everybody = await asyncio.to_thread(yard.cli, "usage", "--all")
    assert "main" in everybody.stdout, everybody.stderr
    assert "1.5" in everybody.stdout


async def test_a_reload_takes_a_new_limit_and_keeps_the_old_one_when_the_file_is_wrong(yard: Yard) -> None:
    gate = yard.scratch / "reload-gate"
    async with yard.connect() as client:
        first = await client.submit(command=release(gate), gpus=1)
        waiting = await client.submit(command=release(gate), gpus=1)
        for wrong, said in (
            ("[tenants.main]\ngpus_maxx = 9\n", "gpus_max"),
            ('[tenants.main]\ngpus_max = "many"\n', "a number of GPUs"),
            ("[tenants.main\n", "not TOML"),
        ):
            failed = await _metric(yard, "gpuyard_config_reload_failed_total")
            await _reload(yard, wrong)
            assert await _metric(yard, "gpuyard_config_reload_failed_total") == failed + 1
            log = (yard.state / "daemon" / "daemon.log").read_text()
            complaints = [json.loads(line) for line in log.splitlines() if "config.refused" in line]
            assert str(yard.daemon_settings) in complaints[-1]["error"]
            assert said in complaints[-1]["error"]
        assert (await client.job(waiting.number)).state == "pending"
        assert (await client.usage()).gpus_max_milli == 1500
        await _reload(yard, "[tenants.main]\ngpus_max = 2\n")

        async def runs() -> bool:
            return (await client.job(waiting.number)).state == "running"

        await eventually(runs, "the job starts under the new limit")
        gate.touch()
        for job in (first, waiting):
            assert (await job.wait(timeout=30)).state == "succeeded"


async def test_limits_and_usage_survive_the_daemon(yard: Yard) -> None:
    async with yard.connect() as client:
        before = await client.usage()
        assert yard.kill("gpuyard_daemon", "--yard") == 1

        async def same() -> bool:
            after = await client.usage()
            return (after.gpus_max_milli, after.used_milli_ms) == (before.gpus_max_milli, before.used_milli_ms)

        await eventually(same, "the daemon is back with the same account")


async def test_who_submits_faster_than_agreed_is_told_when_to_come_again(yard: Yard) -> None:
    await _reload(yard, "[tenants.main]\nsubmissions_per_s = 1\nsubmissions_burst = 2\n")
    async with yard.connect() as client:
        refused: gpuyard.Rejected | None = None
        for _ in range(5):
            try:
                await client.submit(command=["true"])
            except gpuyard.Rejected as error:
                refused = error
                break
        assert refused is not None
        assert refused.reason == "RateLimited"
        assert "1 submissions a second, and 2 at once" in refused.text
        assert 0 < refused.retry_after_ms <= 1000
        await asyncio.sleep(refused.retry_after_ms / 1000 + 0.05)
        await client.submit(command=["true"])
    await _reload(yard, "")
