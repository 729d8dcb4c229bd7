"""The units, as systemd itself reads them; the configuration they install, as the programs read it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from gpuyard_agent import config as agent_config
from gpuyard_daemon import config as daemon_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
#: systemd's measure of exposure, in tenths: 100 is a plain root service. The agent's work is done as root on devices.
EXPOSURE_MAX = {
    "gpuyard-nats.service": 15,
    "gpuyard-nats-watch.service": 16,
    "gpuyard-daemon.service": 15,
    "gpuyard-agent.service": 90,
}
PREFIX = "/opt/gpuyard"


def settings(unit: Path) -> dict[str, list[str]]:
    """Every assignment of a unit file, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units with programs that exist: what is under /opt/gpuyard on a host lies in a temporary place here."""
    place = tmp_path_factory.mktemp("units")
    programs = place / "bin"
    programs.mkdir()
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        for name in re.findall(rf"{PREFIX}/bin/([\w-]+)", text):
            program = programs / name
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
        (place / unit.name).write_text(text.replace(f"{PREFIX}/bin", str(programs)))
    return place


def run(*command: str, at: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)


def test_there_is_a_unit_for_each_process() -> None:
    names = {unit.name for unit in UNITS}
    assert names == {f"gpuyard-{name}.service" for name in ("nats", "nats-watch", "daemon", "agent", "supervisor")}


def test_systemd_finds_nothing_wrong_with_the_units(installed: Path) -> None:
    """Unknown keys only warn, so any word at all is a failure."""
    paths = [f"./{unit.name}" for unit in UNITS]
    verdict = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", *paths, at=installed)
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")


def test_a_misspelt_key_would_be_found(installed: Path, tmp_path: Path) -> None:
    """The check above is worth something."""
    text = (installed / "gpuyard-daemon.service").read_text(encoding="utf-8")
    (tmp_path / "gpuyard-wrong.service").write_text(text.replace("WatchdogSec=", "WatchdogSecs="))
    command = ("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", "./gpuyard-wrong.service")
    verdict = run(*command, at=tmp_path)
    assert "WatchdogSecs" in verdict.stdout + verdict.stderr


@pytest.mark.parametrize(("name", "tenths"), EXPOSURE_MAX.items())
def test_a_service_is_open_to_no_more_than_it_needs(installed: Path, name: str, tenths: int) -> None:
    command = ("systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={tenths}", f"./{name}")
    verdict = run(*command, at=installed)
    assert verdict.returncode == 0, verdict.stdout[-2000:]


@pytest.mark.parametrize("name", ["daemon", "agent"])
def test_daemon_and_agent_say_when_they_are_ready_and_are_watched(name: str) -> None:
    unit = settings(FOLDER / f"gpuyard-{name}.service")
    assert unit["Type"] == ["notify"]
    assert unit["WatchdogSec"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["RestartPreventExitStatus"] == [str(daemon_config.EXIT_BAD_CONFIG)]
    assert daemon_config.EXIT_BAD_CONFIG == agent_config.EXIT_BAD_CONFIG


def test_nothing_that_restricts_the_supervisor_restricts_jobs() -> None:
    """Jobs are its children and inherit its sandbox."""
    unit = settings(FOLDER / "gpuyard-supervisor.service")
    restricting = (
        "Protect",
        "Private",
        "Restrict",
        "SystemCall",
        "Capability",
        "NoNewPrivileges",
        "MemoryDeny",
        "Device",
    )
    assert [name for name in unit if name.startswith(restricting)] == []
    assert unit["KillMode"] == ["process"]
    assert unit["OOMPolicy"] == ["continue"]


def test_nothing_closes_devices_to_the_agent() -> None:
    """Each of these, ProtectClock with systemd of before 253, makes a list of the devices that may be opened."""
    unit = settings(FOLDER / "gpuyard-agent.service")
    assert not {"DeviceAllow", "DevicePolicy", "PrivateDevices", "ProtectClock", "RootImage"} & unit.keys()


def test_the_agent_and_what_it_starts_end_apart() -> None:
    unit = settings(FOLDER / "gpuyard-agent.service")
    assert unit["KillMode"] == ["process"]
    assert "gpuyard-supervisor.service" not in unit["Wants"][0], "systemd starts jobs unless told otherwise"
    assert "gpuyard-supervisor.service" in unit["After"][0]


def test_units_and_configuration_mean_the_same_places() -> None:
    supervisor = settings(FOLDER / "gpuyard-supervisor.service")["ExecStart"][0]
    agent = agent_config.AgentConfig(state=_plain("agent.toml")["state"])
    assert f"--state {agent.state_directory} " in f"{supervisor} "
    assert f"--socket {agent.state_directory}/supervisor.sock" in supervisor
    daemon = daemon_config.load(FOLDER / "daemon.toml", {})
    nats = settings(FOLDER / "gpuyard-nats.service")["ExecStart"][0]
    assert nats.endswith(f"{daemon.state_directory}/nats/nats.conf")


def _plain(name: str) -> dict[str, str]:
    plain: dict[str, str] = tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))
    return plain


def test_the_installed_configuration_is_one_that_the_programs_take(tmp_path: Path) -> None:
    assert daemon_config.load(FOLDER / "daemon.toml", {}).yard == "main"
    seed = tmp_path / "node.seed"
    seed.write_text("SU")
    assert agent_config.load(FOLDER / "agent.toml", {"key": str(seed)}).node == "node-1"


@pytest.mark.parametrize("name", ["daemon.toml", "agent.toml"])
def test_what_the_configuration_shows_as_default_is_the_default(name: str, tmp_path: Path) -> None:
    """Every commented line, taken in, changes nothing (but for those that only show the form)."""
    shown_only = ("budget", "run_as", "run_shares_as", "simulate", "suspend_memory", "zone")
    text = (FOLDER / name).read_text(encoding="utf-8")
    lines = [
        line[1:] if re.match(r"#[a-z_]+ = ", line) and not line[1:].startswith(shown_only) else line
        for line in text.splitlines()
    ]
    opened = tmp_path / name
    opened.write_text("\n".join(lines))
    seed = tmp_path / "node.seed"
    seed.write_text("SU")
    if name == "daemon.toml":
        assert daemon_config.load(opened, {}) == daemon_config.load(FOLDER / name, {})
    else:
        overrides = {"key": str(seed)}
        assert agent_config.load(opened, overrides) == agent_config.load(FOLDER / name, overrides)


def test_the_account_of_the_units_is_made_by_sysusers() -> None:
    made = re.findall(r"^u\s+(\S+)", (FOLDER / "sysusers.d" / "gpuyard.conf").read_text(encoding="utf-8"), re.MULTILINE)
    asked = {user for unit in UNITS for user in settings(unit).get("User", [])}
    assert set(made) == asked == {"gpuyard"}


def test_systemd_takes_the_account_and_the_directories(tmp_path: Path) -> None:
    """systemd-sysusers and systemd-tmpfiles carry them out below a root of their own."""
    for folder in ("etc", "usr/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc" / "group").write_text("root:x:0:\n")
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    users = run("systemd-sysusers", f"--root={tmp_path}", str(FOLDER / "sysusers.d" / "gpuyard.conf"), at=tmp_path)
    assert users.returncode == 0, users.stderr
    assert "gpuyard:" in (tmp_path / "etc" / "passwd").read_text()
    dry = run("systemd-tmpfiles", "--cat-config", str(FOLDER / "tmpfiles.d" / "gpuyard.conf"), at=tmp_path)
    assert dry.returncode == 0, dry.stderr
