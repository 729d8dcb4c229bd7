"""The agent's settings: a TOML file into a typed struct, with flags on top.

An agent with a wrong setting does not start: `BadConfig` says which file, which key, what stood there and what is
allowed, and names the nearest key where one was misspelt. Every field has a default that is meant to be kept, but for
the address of the server and the key, and, when the agent runs as root, the account that jobs run as.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from gpuyard_agent.devices.simulated import parse_cards
from gpuyard_agent.launch.accounts import AccountPolicy
from gpuyard_agent.launch.choose import LauncherChoice
from gpuyard_agent.launch.containers import EngineChoice
from gpuyard_agent.partitions.timeslice import Slice
from gpuyard_protocol.names import NAME_EXPECTED, is_name
from gpuyard_protocol.service.http_guard import OPEN, GuardRefused, HttpGuard, address_of, guard_for
from gpuyard_protocol.service.settings_file import BadConfig, bad, load_settings
from gpuyard_protocol.units import Duration, Memory

#: What `sysexits.h` calls a configuration error; systemd is told not to restart on it.
EXIT_BAD_CONFIG = 78
#: Shorter turns would be spent on taking them.
QUANTUM_MIN_MS = 100
LOG_LEVELS = ("debug", "info", "warning", "error")


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    #: The agent's own directory: identity, ledger, supervisor, output of jobs. Unset: `agent` in /var/lib/gpuyard for
    #: root, else in gpuyard in $XDG_STATE_HOME.
    state: str = ""
    #: One address or several with commas.
    nats: str = "nats://127.0.0.1:4222"
    #: Name of this node; "": what the state directory says, or one minted on the first start.
    node: str = ""
    #: Path of the seed of this node's key; "": connect without, to a server without accounts, which protects nobody.
    key: str = ""
    #: For `tls://` addresses: files in PEM form.
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    #: Modelled cards instead of real ones, such as "8xH100-80GB"; "": the cards that are there.
    simulate: str = ""
    #: The Unix account that jobs run as, or rules by "tenant/user" (`gpuyard_agent.launch.accounts`); "": the agent's
    #: own, or, where that is root, the account that called sudo, or else `nobody`.
    run_as: str | dict[str, str] = ""
    #: The same for shares under MPS, which serves one account at a time on a card; "": as above.
    run_shares_as: str | dict[str, str] = ""
    #: HOST:PORT of metrics and health; port 0: any free one; "": none.
    http: str = ""
    #: Beyond loopback: file with the token that readers must show (unset: `http.token` in `state`, made on first use),
    #: and certificate and key in PEM form (`gpuyard node certificate` on the head makes them). Set, they hold on
    #: loopback too.
    http_token: str = ""
    http_cert: str = ""
    http_key: str = ""
    #: Where other nodes reach this one; "": the address of the route to the NATS server.
    address: str = ""
    #: A directory that all nodes share under this path, for the checkpoints of jobs; "": each node keeps its own.
    checkpoints: str = ""
    #: Secrets of tenants, as `<tenant>/<NAME>` or `<tenant>/<user>/<NAME>`, which the agent alone may read; "": in
    #: `secrets` of `state`.
    secrets: str = ""
    #: What jobs may ask nodes for.
    labels: dict[str, str] = {}
    #: How long a job may hold cards that compute nothing before a warning, before the daemon is told that it might be
    #: suspended, and before it is ended with `IdleGpu`; "0s": never. For jobs that bring no rule of their queue's.
    idle_gpu_warn: Duration = Duration(0)
    idle_gpu_suspend: Duration = Duration(0)
    idle_gpu_release: Duration = Duration(0)
    log_level: str = "info"
    #: What starts jobs: `systemd`, `supervisor`, or `auto`: systemd where it is PID 1 and the agent is root.
    launcher: LauncherChoice = "auto"
    #: What runs container images: `podman`, `docker`, `none`, or `auto`: the first of them that is installed.
    containers: EngineChoice = "auto"
    #: How cards are time-sliced: `turns` (by weight, all but one halted), or `driver`, whose slices are then as long as
    #: `driver_slice` says.
    time_slice: Literal["turns", "driver"] = "turns"
    driver_slice: Slice = "default"
    #: Mean length of a turn.
    quantum: Duration = Duration(5_000)
    #: Host memory for jobs that are suspended, all together; "0Mi": nothing is suspended here; unset: half of what the
    #: node has.
    suspend_memory: Memory | None = None
    #: Cards may change between MIG and other uses; false keeps each as it was found (older cards are reset to change).
    mig_switching: bool = True
    #: While MPS serves a card, the driver admits nobody beside it, so that a job that drops MPS fails instead of going
    #: past its limits; false leaves the compute mode of cards alone. Needs root.
    mps_exclusive: bool = True

    @property
    def state_directory(self) -> Path:
        return Path(self.state) if self.state else default_state_directory(os.environ, os.geteuid())

    def http_address(self) -> tuple[str, int] | None:
        return address_of(self.http)

    def http_guard(self) -> HttpGuard:
        """What readers of metrics must show; `BadConfig` if the address must not be opened so."""
        address = self.http_address()
        if address is None:
            return OPEN
        token = Path(self.http_token) if self.http_token else self.state_directory / "http.token"
        cert, key = Path(self.http_cert or "http.pem"), Path(self.http_key or "http.key")
        try:
            return guard_for(
                address[0], token, cert, key, wants_token=bool(self.http_token), wants_tls=bool(self.http_cert)
            )
        except GuardRefused as error:
            raise BadConfig(f"http: {error}") from None

    def validate(self) -> None:
        """`BadConfig` with one sentence for the first thing wrong."""
        if self.node and not is_name(self.node):
            raise bad("node", self.node, NAME_EXPECTED)
        for part in self.nats.split(","):
            if urlsplit(part.strip()).scheme not in ("nats", "tls") or not urlsplit(part.strip()).hostname:
                raise bad("nats", self.nats, "nats://HOST:PORT or tls://HOST:PORT, several with commas")
        host, colon, port = self.http.rpartition(":")
        if self.http and not (host and colon and port.isdigit() and int(port) < 65536):
            raise bad("http", self.http, "HOST:PORT, such as '127.0.0.1:7791', or '' for none")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise bad("tls_key", self.tls_key, "'tls_cert' and 'tls_key' together")
        if bool(self.http_cert) != bool(self.http_key):
            raise bad("http_key", self.http_key, "'http_cert' and 'http_key' together")
        if self.key and not Path(self.key).is_file():
            raise bad("key", self.key, "a file that holds the seed of this node's key")
        if self.quantum < QUANTUM_MIN_MS:
            raise bad("quantum", str(self.quantum), "100ms at least")
        if self.log_level not in LOG_LEVELS:
            raise bad("log_level", self.log_level, f"one of {', '.join(LOG_LEVELS)}")
        try:
            AccountPolicy(self.run_as, self.run_shares_as)
        except ValueError as error:
            raise BadConfig(str(error)) from None
        earlier = max(self.idle_gpu_warn, self.idle_gpu_suspend)
        if 0 < self.idle_gpu_release < earlier:
            raise bad("idle_gpu_release", str(self.idle_gpu_release), f"'0s', or {earlier} at least")
        if self.checkpoints and not (Path(self.checkpoints).is_absolute() and Path(self.checkpoints).is_dir()):
            raise bad("checkpoints", self.checkpoints, "the absolute path of a directory that is there")
        for name in self.labels:
            if not name or not name.isprintable() or "=" in name:
                raise bad("labels", name, "names without '='")
        if self.simulate:
            try:
                parse_cards(self.simulate)
            except ValueError as error:
                raise BadConfig(f"simulate: {error}") from None


def default_state_directory(environment: Mapping[str, str], uid: int) -> Path:
    if uid == 0:
        return Path("/var/lib/gpuyard/agent")
    base = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/")) / ".local" / "state")
    return Path(base) / "gpuyard" / "agent"


def load(file: Path | None, overrides: Mapping[str, Any]) -> AgentConfig:
    """The settings of `file` with `overrides` (from flags) on top; `BadConfig` for anything wrong."""
    return load_settings(AgentConfig, file, overrides)


def parse_arguments(arguments: Sequence[str]) -> AgentConfig:
    """Flags and the file they name. Exits with argparse's own message for unknown flags."""
    parser = argparse.ArgumentParser(prog="gpuyard-agent", description="The agent of one node of a yard.")
    parser.add_argument("--config", type=Path, help="TOML file with the settings; flags override it")
    parser.add_argument("--state", help="the agent's own directory: identity, ledger, output of jobs")
    parser.add_argument("--nats", help="address of the NATS server, such as nats://127.0.0.1:4222")
    parser.add_argument("--node", help="name of this node; kept in the state directory from the first start on")
    parser.add_argument("--key", metavar="SEEDFILE", help="seed of this node's key")
    parser.add_argument("--tls-ca", metavar="FILE", help="whom to trust for tls:// addresses")
    parser.add_argument("--simulate", metavar="CARDS", help="modelled cards, such as 8xH100-80GB")
    parser.add_argument("--run-as", metavar="USER", help="the Unix account that jobs run as")
    parser.add_argument("--http", metavar="HOST:PORT", help="address of metrics and health; '' for none")
    parser.add_argument("--address", help="where other nodes reach this one")
    parser.add_argument("--label", metavar="NAME=VALUE", action="append", default=[], help="may be given repeatedly")
    parser.add_argument("--log-level", choices=LOG_LEVELS)
    parser.add_argument("--launcher", choices=("auto", "systemd", "supervisor"), help="what starts jobs")
    given = parser.parse_args(arguments)
    names = ("state", "nats", "node", "key", "tls_ca", "simulate", "run_as", "http", "address", "log_level", "launcher")
    overrides: dict[str, Any] = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.label:
        overrides["labels"] = _parse_labels(given.label)
    return load(given.config, overrides)


def _parse_labels(texts: Sequence[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadConfig(f"flags: label: found {text!r}; expected NAME=VALUE")
        labels[name] = value
    return labels
