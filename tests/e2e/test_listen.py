"""`gpuyard up --listen`: a yard on this machine that others can join, over TLS and with a token."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.nats import connect
from support.yard import Yard, eventually, running_yard


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="1xH100-80GB", flags=("--listen", "0.0.0.0")) as running:
        yield running


async def test_a_job_runs_and_everybody_speaks_tls(yard: Yard) -> None:
    context = gpuyard.load_context(yard.context)
    assert context.url.startswith("tls://")
    async with yard.connect() as client:
        assert (await (await client.submit(command=["true"], gpus=1)).wait()).state == "succeeded"
    with pytest.raises((BusError, TimeoutError)):
        async with asyncio.timeout(10):
            await connect(
                context.url.replace("tls://", "nats://"),
                name="test",
                inbox_prefix=f"_INBOX.{context.user}",
                seed=str(context.key),
                connect_timeout_s=3.0,
            )


async def test_another_host_joins_with_a_token(yard: Yard, tmp_path: Path) -> None:
    token = yard.cli("node", "token", "node-9", "--state", str(yard.state))
    assert token.returncode == 0, token.stderr
    url = gpuyard.load_context(yard.context).url
    config = tmp_path / "agent.toml"
    arguments = ("--state", str(tmp_path / "agent"), "--config", str(config), "--url", url)
    joined = yard.cli("node", "join", "--token", token.stdout.strip(), *arguments)
    assert joined.returncode == 0, joined.stderr
    command = [sys.executable, "-m", "gpuyard_agent", "--config", str(config), "--simulate", "1xA100-80GB"]
    with (tmp_path / "agent.log").open("wb") as log:
        agent = subprocess.Popen([*command, "--run-as", "nobody"], stdout=log, stderr=log)
    try:

        async def is_there() -> bool:
            async with yard.connect() as client:
                return any(view.node == "node-9" and view.state == "ready" for view in await client.nodes())

        await eventually(is_there, "node-9 is ready")
    finally:
        agent.terminate()
        agent.wait(20)
