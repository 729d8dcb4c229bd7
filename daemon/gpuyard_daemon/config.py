"""The daemon's settings: a TOML file into a typed struct, with flags on top.

A daemon with a wrong setting does not start: `BadConfig` says which file, which key, what stood there and what is
allowed, and names the nearest key where one was misspelt. What is not set here has the default of its field; every
default is meant to be kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_daemon.core.tenants.policy import DEFAULT_QUEUE, Policy, TenantLimits
from gpuyard_daemon.queue_config import WEIGHT_MAX, QueueConfig, problem_of, queue_policies
from gpuyard_daemon.rates import BURST_S, NO_LIMIT, Rate
from gpuyard_protocol.bus.credentials import CREDENTIALS_SUFFIX
from gpuyard_protocol.codec import Malformed, from_plain
from gpuyard_protocol.names import NAME_EXPECTED, is_name
from gpuyard_protocol.service.http_guard import OPEN, GuardRefused, HttpGuard, address_of, guard_for
from gpuyard_protocol.service.settings_file import BadConfig, bad, load_settings
from gpuyard_protocol.units import MILLI, Duration, GpuAmount, Memory

#: What `sysexits.h` calls a configuration error; systemd is told not to restart on it.
EXIT_BAD_CONFIG = 78
LOG_LEVELS = ("debug", "info", "warning", "error")
#: Least room for the four streams: below it the journal would fill within minutes of load.
BUDGET_MIN_MIB = 64


#: The table of those tenants that have none of their own.
DEFAULT_TENANT = "default"
#: Of a tenant that no table speaks of.
_BUILT_IN_LIMITS = TenantLimits(gpus_max_milli=0, jobs_max=100_000, bytes_max=512 * 2**20)
#: The policy goes into one record of the journal, as a whole.
TENANTS_MAX = 10_000


class JournalConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Room and upkeep of the streams."""

    #: For the four streams together; unset: 80 % of what is free beside the state directory, at most 12Gi.
    budget: Memory | None = None
    #: A snapshot is made after this many records, this much journal, or this long after the last one, if anything came.
    snapshot_records: int = 20_000
    snapshot_size: Memory = Memory(64)
    snapshot_after: Duration = Duration(600_000)
    #: Pruned journal segments stay in the archive for so long.
    archive_days: int = 30
    archive_max: Memory = Memory(16 * 1024)


class NodesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When silence means something."""

    #: Nothing new is placed on a node that has been silent for so long …
    suspected_after: Duration = Duration(3_000)
    #: … and after this long it counts as lost (its jobs wait for it, services heal elsewhere).
    lost_after: Duration = Duration(15_000)


class TenantConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant may have: `[tenants.<name>]`. What is not said is as in `[tenants.default]`."""

    #: GPU compute held at once, fractions allowed; 0: no limit. Jobs beyond it wait.
    gpus_max: GpuAmount | None = None
    #: Jobs that have not ended; submissions beyond it are rejected.
    jobs_max: int | None = None
    #: Commands, environments and scripts of jobs that have not ended and of services (there for each replica).
    backlog_max: Memory | None = None
    #: Submissions a second, and how many at once after a pause (unless told: of ten seconds); 0: no limit. What is
    #: beyond it is rejected, and told when it may come again.
    submissions_per_s: int | None = None
    submissions_burst: int | None = None
    #: The queue of jobs that name none.
    queue: str | None = None
    #: Its part of the yard beside other tenants', 1 to 1000.
    weight: int | None = None


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    #: Name of the yard; part of the streams' names.
    yard: str = "main"
    #: Directory of keys, snapshots, history; unset: /var/lib/gpuyard for root, else gpuyard in $XDG_STATE_HOME.
    state: str = ""
    #: Directory of the daemon's own files (snapshots, history); unset: `daemon` in `state`. Each daemon needs its own.
    daemon_dir: str = ""
    #: One address or several with commas.
    nats: str = "nats://127.0.0.1:4222"
    #: Servers of the cluster that keep a copy of each stream: 1, 3 or 5.
    replicas: int = 1
    #: For `tls://` addresses: files in PEM form.
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    #: False: connect without keys. Only a server without accounts lets that pass, and such a server protects nobody.
    authenticate: bool = True
    #: HOST:PORT of metrics, health and the status page; port 0: any free one; "": none.
    http: str = "127.0.0.1:7790"
    #: Beyond loopback: file with the token that readers must show (unset: `keys/http.token` in `state`, made on first
    #: use), and certificate and key in PEM form (unset: those of the yard's NATS server, `tls/server.pem` in `state`).
    #: Set, they hold on loopback too.
    http_token: str = ""
    http_cert: str = ""
    http_key: str = ""
    log_level: str = "info"
    #: Finished jobs stay in the history database for so long, and while it is no larger than this.
    history_days: int = 400
    history_max: Memory = Memory(8 * 1024)
    journal: JournalConfig = JournalConfig()
    nodes: NodesConfig = NodesConfig()
    scheduler: CoreSettings = CoreSettings()
    #: By tenant's name; `default` holds for every tenant that has no table of its own, and for what a table leaves out.
    tenants: dict[str, TenantConfig] = {}
    #: By name. Without any, everybody shares one queue without quota.
    queues: dict[str, QueueConfig] = {}
    #: By model of card: how fast it is beside the fastest, as in `T4 = 0.2`. A model not named is as fast as that.
    gpu_speeds: dict[str, float] = {}

    def policy(self) -> Policy:
        """What tenants are granted, as the core takes it."""
        base = _limits(self.tenants.get(DEFAULT_TENANT, TenantConfig()), _BUILT_IN_LIMITS)
        named = sorted((name, table) for name, table in self.tenants.items() if name != DEFAULT_TENANT)
        tenants = tuple((name, _limits(table, base)) for name, table in named)
        speeds = tuple((model, round(speed * MILLI)) for model, speed in sorted(self.gpu_speeds.items()))
        return Policy(default=base, tenants=tenants, queues=queue_policies(self.queues), speeds=speeds)

    def rates(self) -> tuple[Rate, dict[str, Rate]]:
        """How fast tenants may submit: each that is not named, and those that are."""
        base = _rate(self.tenants.get(DEFAULT_TENANT, TenantConfig()), NO_LIMIT)
        return base, {name: _rate(table, base) for name, table in self.tenants.items() if name != DEFAULT_TENANT}

    @property
    def state_directory(self) -> Path:
        return Path(self.state) if self.state else default_state_directory(os.environ, os.geteuid())

    @property
    def directory(self) -> Path:
        """Where the daemon's own files are."""
        return Path(self.daemon_dir) if self.daemon_dir else self.state_directory / "daemon"

    def seed(self, role: str) -> Path | None:
        """The key file of a connection; None to connect without."""
        if not self.authenticate:
            return None
        seed = self.state_directory / "keys" / f"{role}.seed"
        by_token = seed.with_suffix(CREDENTIALS_SUFFIX)
        return by_token if by_token.exists() else seed

    def http_address(self) -> tuple[str, int] | None:
        return address_of(self.http)

    def http_guard(self) -> HttpGuard:
        """What readers of the pages must show; `BadConfig` if the address must not be opened so."""
        address = self.http_address()
        if address is None:
            return OPEN
        token = Path(self.http_token) if self.http_token else self.state_directory / "keys" / "http.token"
        cert = Path(self.http_cert) if self.http_cert else self.state_directory / "tls" / "server.pem"
        key = Path(self.http_key) if self.http_key else self.state_directory / "tls" / "server.key"
        try:
            return guard_for(
                address[0], token, cert, key, wants_token=bool(self.http_token), wants_tls=bool(self.http_cert)
            )
        except GuardRefused as error:
            raise BadConfig(f"http: {error}") from None

    def validate(self) -> None:
        """`BadConfig` with one sentence for the first thing wrong."""
        if not is_name(self.yard):
            raise bad("yard", self.yard, NAME_EXPECTED)
        if self.log_level not in LOG_LEVELS:
            raise bad("log_level", self.log_level, f"one of {', '.join(LOG_LEVELS)}")
        host, colon, port = self.http.rpartition(":")
        if self.http and not (host and colon and port.isdigit() and int(port) < 65536):
            raise bad("http", self.http, "HOST:PORT, such as '127.0.0.1:7790', or '' for none")
        for address in self.nats.split(","):
            parts = urlsplit(address.strip() if "://" in address else f"nats://{address.strip()}")
            if parts.scheme not in ("nats", "tls") or not parts.hostname:
                raise bad("nats", self.nats, "nats://HOST:PORT or tls://HOST:PORT, several with commas")
        if self.replicas not in (1, 3, 5):
            raise bad("replicas", str(self.replicas), "1, 3 or 5")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise bad("tls_key", self.tls_key, "'tls_cert' and 'tls_key' together")
        if bool(self.http_cert) != bool(self.http_key):
            raise bad("http_key", self.http_key, "'http_cert' and 'http_key' together")
        if self.journal.budget is not None and self.journal.budget < BUDGET_MIN_MIB:
            raise bad("journal.budget", str(self.journal.budget), f"at least {Memory(BUDGET_MIN_MIB)}")
        for name, value in (
            ("journal.snapshot_records", self.journal.snapshot_records),
            ("journal.snapshot_size", self.journal.snapshot_size),
            ("journal.snapshot_after", self.journal.snapshot_after),
            ("journal.archive_days", self.journal.archive_days),
            ("nodes.suspected_after", self.nodes.suspected_after),
            ("journal.archive_max", self.journal.archive_max),
            ("history_days", self.history_days),
            ("history_max", self.history_max),
        ):
            if value <= 0:
                raise bad(name, str(value), "more than 0")
        self._validate_tenants()
        for model, speed in self.gpu_speeds.items():
            if not 0.001 <= speed <= 1:
                raise bad(f"gpu_speeds.{model}", str(speed), "a number from 0.001 to 1, the fastest model's")
        if problem := problem_of(self.queues):
            raise bad(*problem)
        if self.nodes.lost_after <= self.nodes.suspected_after:
            raise bad("nodes.lost_after", str(self.nodes.lost_after), "more than 'nodes.suspected_after'")
        try:
            self.scheduler.validate()
        except ValueError as error:
            raise BadConfig(str(error)) from None

    def _validate_tenants(self) -> None:
        if len(self.tenants) > TENANTS_MAX:
            raise bad("tenants", f"{len(self.tenants)} tables", f"at most {TENANTS_MAX}")
        for name, table in self.tenants.items():
            if not is_name(name):
                raise bad(f"tenants.{name}", name, NAME_EXPECTED)
            if table.jobs_max is not None and table.jobs_max <= 0:
                raise bad(f"tenants.{name}.jobs_max", str(table.jobs_max), "a number above 0")
            if table.backlog_max is not None and table.backlog_max < 1:
                raise bad(f"tenants.{name}.backlog_max", str(table.backlog_max), "at least 1Mi")
            if table.weight is not None and not 1 <= table.weight <= WEIGHT_MAX:
                raise bad(f"tenants.{name}.weight", str(table.weight), f"a number between 1 and {WEIGHT_MAX}")
            if table.queue and table.queue not in (known := {*self.queues, DEFAULT_QUEUE}):
                raise bad(f"tenants.{name}.queue", table.queue, f"one of {', '.join(sorted(known))}")
            for key, least in (("submissions_per_s", 0), ("submissions_burst", 1)):
                value = getattr(table, key)
                if value is not None and value < least:
                    raise bad(f"tenants.{name}.{key}", str(value), f"a number not below {least}")


def _rate(table: TenantConfig, base: Rate) -> Rate:
    per_second = base.per_second if table.submissions_per_s is None else table.submissions_per_s
    if table.submissions_burst is not None:
        return Rate(per_second, table.submissions_burst)
    return base if table.submissions_per_s is None else Rate(per_second, per_second * BURST_S)


def _limits(table: TenantConfig, base: TenantLimits) -> TenantLimits:
    return TenantLimits(
        gpus_max_milli=base.gpus_max_milli if table.gpus_max is None else int(table.gpus_max),
        jobs_max=base.jobs_max if table.jobs_max is None else table.jobs_max,
        queue=base.queue if table.queue is None else table.queue,
        weight=base.weight if table.weight is None else table.weight,
        bytes_max=base.bytes_max if table.backlog_max is None else int(table.backlog_max) * 2**20,
    )


def default_state_directory(environment: Mapping[str, str], uid: int) -> Path:
    if uid == 0:
        return Path("/var/lib/gpuyard")
    base = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/")) / ".local" / "state")
    return Path(base) / "gpuyard"


def load(file: Path | None, overrides: Mapping[str, Any]) -> DaemonConfig:
    """The settings of `file` with `overrides` (top-level keys, from flags) on top; `BadConfig` for anything wrong."""
    return load_settings(DaemonConfig, file, overrides, lambda plain: _check_tenants(plain.get("tenants")))


def _check_tenants(tables: object) -> None:
    """Each table alone, so that a complaint names the tenant: of a table among many the decoder says only `[...]`."""
    for name, table in tables.items() if isinstance(tables, dict) else ():
        try:
            from_plain(TenantConfig, table)
        except Malformed as error:
            path = f"$.tenants.{name}{error.path.removeprefix('$')}"
            raise Malformed(path, error.found, error.expected, error.nearest) from None


def parse_arguments(arguments: Sequence[str]) -> DaemonConfig:
    """Flags and the file they name. Exits with argparse's own message for unknown flags."""
    parser = argparse.ArgumentParser(prog="gpuyard-daemon", description="The scheduler daemon of a yard.")
    parser.add_argument("--config", type=Path, help="TOML file with the settings; flags override it")
    parser.add_argument("--state", help="directory of keys, snapshots and history")
    parser.add_argument("--daemon-dir", help="directory of snapshots and history; default: `daemon` in the state")
    parser.add_argument("--nats", help="address of the NATS server, such as nats://127.0.0.1:4222")
    parser.add_argument("--replicas", type=int, help="servers of a cluster that keep each stream: 1, 3 or 5")
    parser.add_argument("--yard", help="name of the yard")
    parser.add_argument("--tls-ca", metavar="FILE", help="whom to trust for tls:// addresses")
    parser.add_argument("--http", help="HOST:PORT of metrics, health and the status page; '' for none")
    parser.add_argument("--log-level", choices=LOG_LEVELS)
    parser.add_argument(
        "--no-authentication", action="store_true", help="connect without keys, to a server without accounts"
    )
    given = parser.parse_args(arguments)
    overrides: dict[str, Any] = {
        key: value
        for key in ("state", "daemon_dir", "nats", "replicas", "yard", "http", "log_level", "tls_ca")
        if (value := getattr(given, key)) is not None
    }
    if given.no_authentication:
        overrides["authenticate"] = False
    return load(given.config, overrides)
