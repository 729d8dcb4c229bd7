"""`gpuyard doctor`: what is found is said, what is missing comes with how to get it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gpuyard_agent.config import AgentConfig
from gpuyard_agent.devices.base import NoDriver
from gpuyard_agent.devices.simulated import SimulatedBackend
from gpuyard_agent.doctor import checks
from gpuyard_agent.doctor.commands import register
from gpuyard_agent.launch.base import Account
from gpuyard_agent.launch.containers import Engine
from gpuyard_agent.launch.limits import Enforceable

LIMITLESS = Enforceable(
    launcher="supervisor",
    freeze="signal",
    kill="search",
    cpu=False,
    memory=False,
    tasks=False,
    devices=False,
    accounts=False,
    lacking=(),
)


class NoCards(SimulatedBackend):
    async def open(self) -> None:
        raise NoDriver("there is no NVIDIA driver on this node")


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


async def test_a_host_without_a_driver_is_told_so_and_how_to_get_one() -> None:
    (finding,) = await checks.cards(NoCards((), "n"))
    assert (finding.name, finding.state) == ("driver", "no")
    assert "no NVIDIA driver" in finding.detail
    assert finding.remedy.startswith("install NVIDIA's driver")


def test_a_limit_that_does_not_hold_is_missing_with_a_remedy_and_one_that_holds_has_none() -> None:
    poor = {finding.name: finding for finding in checks.processes(LIMITLESS)}
    assert {name for name, finding in poor.items() if finding.state != "yes"} == poor.keys() - {"launcher"}
    assert all(finding.remedy for finding in poor.values() if finding.state != "yes")
    rich = checks.processes(
        Enforceable(
            launcher="systemd",
            freeze="cgroup-v2",
            kill="cgroup",
            cpu=True,
            memory=True,
            tasks=True,
            devices=True,
            accounts=True,
            lacking=(),
        )
    )
    assert {(finding.state, finding.remedy) for finding in rich} == {("yes", "")}


async def test_a_server_that_does_not_answer_is_missing() -> None:
    config = AgentConfig(nats="nats://127.0.0.1:1", address="203.0.113.9", simulate="1xH100-80GB")
    found = {finding.name: finding for finding in await checks.reach(config)}
    assert found["nats"].state == "no"
    assert "127.0.0.1:1" in found["nats"].detail
    assert found["address"].state == "partly"


def test_the_disk_of_a_directory_to_be_made_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in checks.disk(tmp_path / "not" / "yet")}
    assert found["ledger"].state in ("yes", "partly")
    assert list(tmp_path.iterdir()) == []


def test_it_speaks_json_and_tables(tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(f'simulate = "2xH100-80GB"\nnats = "nats://127.0.0.1:1"\nstate = "{tmp_path}"\n')
    code, text = run("--config", str(settings), "--json")
    assert code == 0
    findings = json.loads(text)
    assert {finding["area"] for finding in findings} == {"cards", "processes", "accounts", "network", "disk"}
    assert all(finding["state"] in ("yes", "partly", "no") and finding["detail"] for finding in findings)
    code, text = run("--config", str(settings))
    assert code == 0
    assert "2 modelled cards" in text
    assert "to get it: start the yard" in text


@pytest.mark.parametrize("text", ["simulat = 'x'", "= 1"])
def test_wrong_settings_are_named(tmp_path: Path, text: str) -> None:
    settings = tmp_path / "agent.toml"
    settings.write_text(text)
    code, output = run("--config", str(settings))
    assert code == 1
    assert "agent.toml" in output


@pytest.mark.parametrize(("says", "state"), [("exit 0", "yes"), ("echo no subuid ranges; exit 125", "no")])
async def test_an_engine_is_tried_for_the_accounts_that_jobs_run_as(tmp_path: Path, says: str, state: str) -> None:
    podman = tmp_path / "podman"
    podman.write_text(f"#!/bin/sh\n{says}\n")
    podman.chmod(0o755)
    us = Account(name="us", uid=os.geteuid(), gid=os.getegid(), home=str(tmp_path))
    found = await checks.containers(Engine(name="podman", path=str(podman)), [us])
    assert (found.state, "newuidmap" in found.remedy) == (state, state == "no")
    nothing = await checks.containers(Engine(problem="podman is not installed"), [us])
    assert (nothing.state, "podman is not installed" in nothing.detail) == ("no", True)
