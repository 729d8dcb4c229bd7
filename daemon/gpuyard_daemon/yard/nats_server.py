"""The yard's own NATS server: found, configured, started, kept alive, stopped.

The server runs in a session of its own: a crash of whoever started it, or Ctrl-C in its terminal, must not take the
bus away from agents and daemon. It is started again when it dies or stores nothing (`store_watch`); clients come back
by themselves. Only `stop` ends it for good. A server that an earlier, killed `gpuyard up` left behind is ended before a
new one starts on the same store.

Its port stays the same over restarts of the yard, because agents and clients have the address in their configuration:
it is kept in `server.json`, with the size of the store, which must not shrink under streams that were made for it.

What the server allows whom is `gpuyard_daemon.yard.accounts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from gpuyard_daemon.yard.ballast import Ballast
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.reload import reaches_daemon
from gpuyard_daemon.yard.server_config import ServerSettings, TlsFiles
from gpuyard_daemon.yard.server_files import ConfigurationError, KeptByUp, Server, find_server, write_server_config
from gpuyard_daemon.yard.store_watch import StoreWatch, takes_messages
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.names import Tenant, User

DEFAULT_PORT = 4222
START_TIMEOUT_S = 15.0
RELOAD_TIMEOUT_S = 5.0
#: A server needs this long at most to end orderly; then it is killed (safe: what it acknowledged is on the disk).
STOP_TIMEOUT_S = 5.0
#: A server that lived longer than this is started again at once; others after a growing pause.
STEADY_S = 10.0
RESTART_PAUSE_MAX_S = 5.0
#: Of the disk's free space, what the streams may take, and never more than the second.
STORE_SHARE_PERCENT = 80
STORE_MAX_BYTES = 20 * 1024**3
STORE_MIN_BYTES = 256 * 1024**2
#: New accounts answer only after a second reload (seen with 2.15.1); more are for a loaded machine.
RELOAD_ATTEMPTS = 5


def store_budget(directory: Path) -> int:
    """Bytes that all streams may take so that the disk never fills; `ConfigurationError` if that is too few."""
    budget = _room(directory)
    if budget < STORE_MIN_BYTES:
        raise ConfigurationError(
            f"{directory} has room for {budget // 1024**2} MiB of streams; at least {STORE_MIN_BYTES // 1024**2} MiB "
            "are needed: free some space or use another --state directory"
        )
    return budget


def _room(directory: Path) -> int:
    """A share of what is free or in use by the streams already."""
    store = directory / "store"
    used = sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) if store.exists() else 0
    return min((shutil.disk_usage(directory).free + used) * STORE_SHARE_PERCENT // 100, STORE_MAX_BYTES)


class NatsServer:
    """One supervised server. `on_event` hears, in a sentence, of everything that is not normal."""

    def __init__(
        self,
        directory: Path,
        keys: YardKeys,
        *,
        yard: str,
        host: str = "127.0.0.1",
        tls: TlsFiles | None = None,
        port: int | None = None,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`port` None: the one used before, or 4222, or any free one; a number: that one or an error; 0: any free."""
        self._directory = directory.absolute()
        self._keys = keys
        self._yard = yard
        self._host = host
        self._tls = tls
        self._wanted_port = port
        self._on_event = on_event
        self._binary = find_server()
        self._kept = KeptByUp(port=0, store_bytes=0)
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._is_stopping = False
        #: Starts after the first.
        self.restarts = 0

    @property
    def url(self) -> str:
        """How this machine reaches it."""
        return Server(self._settings(), "").local_url

    @property
    def tls_ca(self) -> str | None:
        return str(self._tls.ca) if self._tls is not None else None

    @property
    def port(self) -> int:
        return self._kept.port

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def store_bytes(self) -> int:
        """What all streams together may take."""
        return self._kept.store_bytes

    @property
    def log_file(self) -> Path:
        return self._directory / "nats.log"

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Return when clients can connect."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._end_leftover()
        self._settle()
        await self._write_config()
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="nats-server")
        self._watcher = asyncio.create_task(self._watch().run(), name="nats-server store")

    async def stores(self, within_s: float) -> bool:
        """Whether it takes a message and says so, in this time."""
        return await takes_messages(self.url, self._keys, self._yard, tls_ca=self.tls_ca, within_s=within_s)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the server and wait for it, SIGKILL after the timeout; safe to call at any time, also twice."""
        self._is_stopping = True
        for task in (self._watcher, self._supervisor):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._watcher = self._supervisor = None
        await self._end_process(timeout_s)
        (self._directory / "nats.pid").unlink(missing_ok=True)

    async def reload(self, *, new_users: list[tuple[Tenant, User]] | None = None) -> None:
        """Let the keys as they are now in and no others; connected clients stay connected.

        Returns when the new users (tenant, user) reach the daemon's account: a new account answers only after a second
        reload, so this reloads until a probe comes through.
        """
        await self._write_config()
        await self._reload_once()
        await self._reload_once()
        for tenant, user in new_users or []:
            if not self._keys.user(tenant, user).exists():
                continue  # made its key elsewhere: nobody here can ask in its name
            for _ in range(RELOAD_ATTEMPTS):
                if await reaches_daemon(self.url, self.tls_ca, self._keys, tenant, user):
                    break
                await self._reload_once()
            else:
                raise BusError(f"the NATS server does not let {user} of {tenant} reach the yard; see {self.log_file}")

    def _watch(self) -> StoreWatch:
        ballast = Ballast(self._directory, self._kept.store_bytes)
        ballast.restore()
        return StoreWatch(
            self.url,
            self._keys,
            self._yard,
            ballast,
            tls_ca=self.tls_ca,
            restart=self._end_process,
            say=self._on_event,
        )

    # -- settings ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Decide on port and store size, and remember them."""
        path = self._directory / "server.json"
        try:
            self._kept = msgspec.json.decode(path.read_bytes(), type=KeptByUp)
            self._warn_of_a_full_disk()
        except FileNotFoundError:
            self._kept = KeptByUp(port=0, store_bytes=store_budget(self._directory))
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{path} is damaged ({error}); remove it to choose a new port") from None
        self._kept.port = self._choose_port(self._kept.port)
        self._kept.listen = self._host
        temporary = path.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(self._kept))
        temporary.replace(path)

    def _warn_of_a_full_disk(self) -> None:
        """The store keeps the size it was made with: streams above a smaller limit would not come back."""
        room = _room(self._directory)
        if room < self._kept.store_bytes:
            self._on_event(
                f"the disk has room for {room // 1024**2} MiB of streams and the yard was set up for "
                f"{self._kept.store_bytes // 1024**2} MiB: free some space in {self._directory}"
            )

    def _choose_port(self, kept: int) -> int:
        if self._wanted_port:
            if not _is_free(self._host, self._wanted_port):
                raise ConfigurationError(
                    f"port {self._wanted_port} on {self._host} is taken by another program: end it, "
                    "or leave the port to gpuyard"
                )
            return self._wanted_port
        candidates = [kept] if self._wanted_port == 0 else [kept, DEFAULT_PORT]
        for candidate in candidates:
            if candidate and _is_free(self._host, candidate):
                return candidate
        with socket.socket() as probe:
            probe.bind((self._host, 0))
            port: int = probe.getsockname()[1]
        if kept:
            self._on_event(f"port {kept} is taken by another program: the NATS server moves to {port}")
        return port

    async def _write_config(self) -> None:
        """Put a checked configuration in place; one that the server would refuse never gets there."""
        await asyncio.to_thread(write_server_config, self._settings(), self._keys)

    def _settings(self) -> ServerSettings:
        kept = self._kept
        return ServerSettings(self._yard, self._directory, kept.store_bytes, self._host, kept.port, self._tls)

    # -- the process ------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            self._binary,
            "-c",
            self._directory / "nats.conf",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        (self._directory / "nats.pid").write_text(f"{self._process.pid}\n")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._greets():
                    if self._process.returncode is not None:
                        raise BusError(f"nats-server ended at its start; its log says:\n{self._log_tail()}")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            await self._end_process()
            raise BusError(
                f"nats-server is not ready after {START_TIMEOUT_S:g} s; its log says:\n{self._log_tail()}"
            ) from None

    async def _greets(self) -> bool:
        """Whether it accepts clients; it does so only when its streams are recovered."""
        try:
            host = urlsplit(self.url).hostname
            reader, writer = await asyncio.open_connection(host, self._kept.port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(1.0):
                return (await reader.readline()).startswith(b"INFO ")
        except (OSError, TimeoutError, ValueError):
            return False
        finally:
            writer.transport.abort()

    async def _supervise(self) -> None:
        pause_s = 0.1
        while not self._is_stopping:
            started = time.monotonic()
            if self._process is not None:
                status = await self._process.wait()
                self._on_event(f"nats-server ended ({_describe_status(status)}); starting it again")
            pause_s = 0.1 if time.monotonic() - started > STEADY_S else min(pause_s * 2, RESTART_PAUSE_MAX_S)
            if pause_s > 0.2:
                await asyncio.sleep(pause_s)
            self.restarts += 1
            try:
                await self._launch()
            except (BusError, OSError) as error:
                self._on_event(str(error))
                await asyncio.sleep(pause_s)

    async def _end_process(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _end_leftover(self) -> None:
        """End the server that an earlier run left on this store; never another program that has its number now."""
        pid = server_running_with(self._directory / "nats.conf", self._directory / "nats.pid")
        if pid is None:
            return
        self._on_event(f"ending the NATS server that an earlier run left behind (process {pid})")
        for number, wait_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            end = time.monotonic() + wait_s
            while time.monotonic() < end:
                if not _is_alive(pid):
                    return
                await asyncio.sleep(0.01)
        raise BusError(f"the NATS server with process number {pid} does not end")

    # -- reloading --------------------------------------------------------------------------------------------

    async def _reload_once(self) -> None:
        """SIGHUP, and the server's word in its log that it took the file."""
        process = self._process
        if process is None or process.returncode is not None:
            return  # the supervisor starts it with the new configuration
        size_before = _size(self.log_file)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOAD_TIMEOUT_S):
                while True:
                    news = _read_from(self.log_file, size_before)
                    if "Reloaded server configuration" in news:
                        return
                    if "Failed to reload server configuration" in news:
                        raise BusError(f"nats-server refuses its new configuration: {news.strip()[-1000:]}")
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise BusError(f"nats-server did not reload within {RELOAD_TIMEOUT_S:g} s; see {self.log_file}") from None

    def _log_tail(self) -> str:
        """What the last lines complain of, or the last lines if they complain of nothing."""
        last = _read_from(self.log_file, 0).splitlines()[-20:]
        complaints = [line for line in last if "[FTL]" in line or "[ERR]" in line]
        return "\n".join(complaints or last)


def server_running_with(config: Path, pid_file: Path) -> int | None:
    """The process that the file names, if it still is a server with that configuration."""
    try:
        pid = int(pid_file.read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(config) in arguments else None


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        # A zombie has ended: whoever started it has only not asked yet.
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _describe_status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _size(path: Path) -> int:
    """Bytes of the file, 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, offset: int) -> str:
    """The file from `offset`; from its beginning if it was rotated meanwhile."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = 0
            file.seek(offset)
            return file.read().decode(errors="replace")
    except OSError:
        return ""
