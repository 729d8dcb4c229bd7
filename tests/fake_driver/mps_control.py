"""A stand-in for the daemon of `nvidia-cuda-mps-control`. It is started by `mps_start`; `mps_command` feeds it.

Modelled: files of the pipe directory; one server per user, started with the first client; one user's server at a time
(another user's clients wait until the first one's have gone) unless `-M`; defaults that only reach servers started
later, and server settings that only reach clients that come later; client limit; `terminate_client`; FAULT, which ends
every client of the server and refuses newcomers until all have gone; `quit`, which waits for clients, removes the pid
file and leaves the socket; one command connection at a time, others being refused.

Injected through the driver's state (control.py): `mps:start` (an error: the daemon does not come up), `mps:<command>`
(a delay or hang; an error is printed as the command's result), `mps:client-killed` (an error: a client that goes
without a word wedges its server, as SIGKILL amid work may). Commands of the fake alone: `fake_fault SERVER`,
`fake_wedge SERVER`.
Not modelled: SM partitions, multi-device faults, shared memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

from fake_driver import mps_wire
from fake_driver.control import MIB, DriverRefused, FakeDriver, Flag
from fake_driver.mps_wire import Line, Message

CLIENTS_MAX = 48
#: What a server itself takes on each card.
SERVER_MIB = 30

CUDA_NO_DEVICE = 100
CUDA_CONNECTION_FAILED = 805
CUDA_SERVER_NOT_READY = 807
CUDA_TOO_MANY_CLIENTS = 809


class Client:
    """A fake CUDA program that has connected."""

    def __init__(self, number: int, pid: int, device: str, line: Line) -> None:
        self.number = number
        self.pid = pid
        self.device = device
        self.line = line
        #: It has said that it will go, or was told to: no accident.
        self.leaving = False
        #: It has stopped its work after `terminate_client`.
        self.terminated = False


class Server:
    """One `nvidia-cuda-mps-server`: a process that can be seen and killed, and what is remembered about it here."""

    def __init__(self, uid: int, percentage: float, limits: dict[str, str], priority: int) -> None:
        self.uid = uid
        self.percentage = percentage
        self.limits = limits
        self.priority = priority
        self.status = "ACTIVE"
        self.wedged = False
        self.draining = False
        self.clients: list[Client] = []
        # It ends with the daemon: its standard input closes.
        self.process = subprocess.Popen(
            ["nvidia-cuda-mps-server", "-IS", "-c", "import sys; sys.stdin.buffer.read()"],
            executable=sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        return self.process.pid


class Refused(Exception):
    """A command cannot be carried out; the text is its answer."""


class Daemon:
    """The control daemon. All state under one condition, which every change notifies."""

    def __init__(self, pipe: str, log: str, driver: FakeDriver | None, *, multiuser: bool) -> None:
        self._pipe = pipe
        self._log = log
        self._driver = driver
        self._multiuser = multiuser
        self._changed = threading.Condition()
        self._servers: list[Server] = []
        #: The one command connection that is served, and whether it waits for an answer now.
        self._commander: Line | None = None
        self._is_busy = False
        self._numbers = 0
        self._quitting = False
        self._devices = _visible_devices(driver)
        self._percentage = mps_wire.parse_percentage(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")) or 100.0
        self._limits = mps_wire.parse_limits(os.environ.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"))
        self._priority = 0

    def serve(self, listener: socket.socket) -> NoReturn:
        """Until `quit`, which ends the process."""
        self._note(f"Starting control daemon using socket {self._pipe}/control")
        self._note(f"To connect CUDA applications to this daemon, set env CUDA_MPS_PIPE_DIRECTORY={self._pipe}")
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._talk, args=(Line(connection),), daemon=True).start()

    def stop(self) -> NoReturn:
        """The clean end: servers and pid file go, the socket stays."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._pipe, "nvidia-cuda-mps-control.pid"))
        for server in self._servers:
            server.process.kill()
        self._note("Exit")
        os._exit(0)

    def _talk(self, line: Line) -> None:
        first = line.receive()
        try:
            if first is not None and "client" in first:
                self._serve_client(line, first["client"])
            elif first is not None:
                self._serve_commands(line, first)
        except (BrokenPipeError, ConnectionResetError):
            self._note("User did not send valid credentials")
        finally:
            line.close()

    # Clients

    def _serve_client(self, line: Line, facts: Message) -> None:
        pid, uid = line.peer()
        # Tests that cannot change their user let a program say which one it stands for.
        uid = facts.get("uid", uid)
        with self._changed:
            code, server = self._admit(uid, facts["device"])
            if server is None:
                line.send({"error": code})
                return
            client = Client(self._numbers, pid, facts["device"], line)
            self._numbers += 1
            server.clients.append(client)
            self._changed.notify_all()
        self._note_server(server, f"Client {{PID: {pid}, Context ID: {client.number}}} connected")
        try:
            line.send(self._welcome(server, facts))
            self._follow(server, client)
        finally:
            self._forget(server, client)

    def _admit(self, uid: int, device: str) -> tuple[int, Server | None]:
        """The server that takes a client of this user, started if need be; waits for its turn."""
        if device not in self._devices:
            return CUDA_NO_DEVICE, None
        while True:
            if self._quitting:
                return CUDA_CONNECTION_FAILED, None
            server = next((server for server in self._servers if self._serves(server, uid)), None)
            others = [other for other in self._servers if other is not server and not self._multiuser]
            for other in [other for other in others if not other.clients and not other.wedged]:
                self._drop(other)
                others.remove(other)
            if server is not None and server.status == "FAULT":
                return CUDA_SERVER_NOT_READY, None
            if not others and server is None:
                return self._start(uid)
            if not others and server is not None and not server.wedged and not server.draining:
                full = len(server.clients) >= self._clients_max(device)
                return (CUDA_TOO_MANY_CLIENTS, None) if full else (0, server)
            self._note(f"NEW CLIENT from user {uid}: Server is not ready, push client to pending list")
            self._changed.wait()

    def _clients_max(self, device: str) -> int:
        """Of a MIG device, in proportion to its compute slices."""
        for card in self._driver.describe()["gpus"] if self._driver is not None else ():
            for instance in card["instances"]:
                for compute in instance["compute"]:
                    if compute["uuid"] == device:
                        return max(1, CLIENTS_MAX * int(compute["size"]) // int(card["compute_slices"]))
        return CLIENTS_MAX

    def _serves(self, server: Server, uid: int) -> bool:
        return self._multiuser or server.uid == uid

    def _start(self, uid: int) -> tuple[int, Server | None]:
        server = Server(uid, self._percentage, dict(self._limits), self._priority)
        self._note(f"Starting new server {server.pid} for user {uid}")
        try:
            if self._driver is not None:
                for device in self._devices:
                    self._driver.allocate(server.pid, *self._driver.find(device), SERVER_MIB * MIB, Flag.MPS_SERVER)
        except DriverRefused as refusal:
            server.process.kill()
            server.process.wait()
            self._note(f"Server {server.pid} exited with status 1: {refusal}")
            return CUDA_CONNECTION_FAILED, None
        self._servers.append(server)
        threading.Thread(target=self._watch, args=(server,), daemon=True).start()
        self._note(f"NEW SERVER {server.pid}: Ready")
        self._note_server(server, f"Active Threads Percentage set to {server.percentage:.1f}")
        for device, limit in server.limits.items():
            self._note_server(server, f"Device pinned memory limit for device {device} set to {limit}")
        return 0, server

    def _watch(self, server: Server) -> None:
        """A server that dies takes its clients with it."""
        server.process.wait()
        with self._changed:
            if server in self._servers:
                self._servers.remove(server)
            clients, server.clients = server.clients, []
            self._changed.notify_all()
        self._note(f"Server {server.pid} exited")
        for client in clients:
            client.leaving = True
            _tell(client, {"event": "server-died"})

    def _drop(self, server: Server) -> None:
        self._servers.remove(server)
        server.process.kill()
        self._changed.notify_all()

    def _welcome(self, server: Server, facts: Message) -> Message:
        """A client can only lower what its server allows."""
        asked = mps_wire.parse_percentage(facts.get("percentage"))
        sizes = [self._limit_of(server.limits, facts["device"]), self._limit_of(facts["limits"], facts["device"])]
        limits = [size for size in map(mps_wire.parse_size, filter(None, sizes)) if size is not None]
        return {
            "server": server.pid,
            "percentage": min(server.percentage, asked or 100.0),
            "limit": min(limits, default=None),
        }

    def _limit_of(self, limits: dict[str, str], device: str) -> str | None:
        """Devices are written by UUID or by ordinal as the server counts them; the last one written wins."""
        names = {device, str(self._devices.index(device))}
        return next((limit for name, limit in reversed(limits.items()) if name in names), None)

    def _follow(self, server: Server, client: Client) -> None:
        for message in client.line.messages():
            with self._changed:
                client.leaving = client.leaving or bool(message.get("bye"))
                client.terminated = client.terminated or bool(message.get("terminated"))
                if message.get("fault"):
                    self._fault(server)
                self._changed.notify_all()

    def _fault(self, server: Server) -> None:
        """Call with the lock held. One client's fault ends them all."""
        server.status = "FAULT"
        self._note_server(server, "Server has hit a fatal exception")
        for client in server.clients:
            client.leaving = True
            _tell(client, {"event": "fault"})

    def _forget(self, server: Server, client: Client) -> None:
        killed = 0
        if not client.leaving and not client.terminated and self._driver is not None:
            killed = self._driver.take_fault("mps:client-killed")
        with self._changed:
            if client in server.clients:
                server.clients.remove(client)
            server.wedged = server.wedged or killed != 0
            if server.status == "FAULT" and not server.clients:
                server.status = "ACTIVE"
            if server.draining and not server.clients and server in self._servers:
                self._drop(server)
            self._changed.notify_all()
        self._note_server(server, f"Client {{PID: {client.pid}}} exit")

    # Commands

    def _serve_commands(self, line: Line, first: Message) -> None:
        with self._changed:
            # One that has hung up is no longer in the way, unless the daemon still sits over its command.
            is_free = self._commander is None or (self._commander.has_hung_up() and not self._is_busy)
            if is_free:
                self._commander, self._is_busy = line, True
        if not is_free:
            line.send({"refused": True})
            return
        try:
            _, uid = line.peer()
            message: Message | None = first
            while message is not None:
                self._is_busy = True
                answer = self._answer(message["command"], uid)
                self._is_busy = False
                line.send({"answer": answer})
                message = line.receive()
        finally:
            with self._changed:
                if self._commander is line:
                    self._commander, self._is_busy = None, False

    def _answer(self, text: str, uid: int) -> str:
        words = text.split()
        if not words:
            return ""
        command = getattr(self, f"_command_{words[0]}", None)
        if command is None:
            return f"Unrecognized command: {words[0]}\n"
        if uid not in (0, os.getuid()):
            return "Permission denied\n"
        self._note(f"Cmd:{text}")
        code = self._driver.take_fault(f"mps:{words[0]}") if self._driver is not None else 0
        if code:
            return f"{code}\n"
        try:
            answer: str = command(*words[1:])
        except Refused as refusal:
            return f"{refusal}\n"
        except TypeError:
            return "Invalid number of arguments\n"
        return answer

    def _server(self, pid: str) -> Server:
        """Waits while the server is wedged: it is the server that answers."""
        with self._changed:
            while True:
                server = next((server for server in self._servers if str(server.pid) == pid), None)
                if server is None:
                    raise Refused(f"Server {pid} not found")
                if not server.wedged:
                    return server
                self._changed.wait()

    def _command_help(self) -> str:
        names = sorted(name.removeprefix("_command_") for name in dir(self) if name.startswith("_command_"))
        return "\n".join(names) + "\n"

    def _command_get_server_list(self) -> str:
        with self._changed:
            return "".join(f"{server.pid}\n" for server in self._servers)

    def _command_get_server_status(self, pid: str) -> str:
        return f"{self._server(pid).status}\n"

    def _command_start_server(self, flag: str, uid: str) -> str:
        if flag != "-uid" or not uid.isdecimal():
            raise Refused("Invalid arguments")
        with self._changed:
            if not any(server.uid == int(uid) for server in self._servers):
                code, server = self._start(int(uid))
                if server is None:
                    raise Refused(f"Failed to start server: {code}")
        return ""

    def _command_shutdown_server(self, pid: str, *flags: str) -> str:
        server = self._server(pid)
        with self._changed:
            if server.clients and "-f" not in flags:
                server.draining = True
            elif server in self._servers:
                self._drop(server)
        return ""

    def _command_get_client_list(self, pid: str) -> str:
        return "".join(f"{client.pid}\n" for client in self._server(pid).clients)

    def _command_get_device_client_list(self, pid: str | None = None) -> str:
        lines = []
        with self._changed:
            for device in self._devices:
                lines.append(f"Device {device}")
                servers = [server for server in self._servers if pid in (None, str(server.pid))]
                lines += [str(client.pid) for server in servers for client in server.clients if client.device == device]
        return "\n".join(lines) + "\n"

    def _command_ps(self, flag: str = "", pid: str | None = None) -> str:
        lines = ["PID       ID    SERVER    DEVICE             NAMESPACE    COMMAND"]
        with self._changed:
            for server in self._servers:
                for client in server.clients:
                    if flag == "-p" and pid != str(client.pid):
                        continue
                    lines.append(
                        f"{client.pid:<9} {client.number:<5} {server.pid:<9} {client.device[:22]:<18} "
                        f"{_namespace(client.pid):<12} {_command_line(client.pid)}"
                    )
        return "\n".join(lines) + "\n"

    def _command_get_default_active_thread_percentage(self) -> str:
        return f"{self._percentage:.1f}\n"

    def _command_set_default_active_thread_percentage(self, text: str) -> str:
        self._percentage = _percentage(text)
        return f"{self._percentage:.1f}\n"

    def _command_get_active_thread_percentage(self, pid: str) -> str:
        return f"{self._server(pid).percentage:.1f}\n"

    def _command_set_active_thread_percentage(self, pid: str, text: str) -> str:
        server = self._server(pid)
        server.percentage = _percentage(text)
        return f"{server.percentage:.1f}\n"

    def _command_get_default_device_pinned_mem_limit(self, device: str) -> str:
        return f"{self._limit_of(self._limits, self._device(device)) or ''}\n"

    def _command_set_default_device_pinned_mem_limit(self, device: str, size: str) -> str:
        self._limits.pop(device, None)
        self._limits[device] = size
        return f"{size}\n"

    def _command_get_device_pinned_mem_limit(self, pid: str, device: str) -> str:
        return f"{self._limit_of(self._server(pid).limits, self._device(device)) or ''}\n"

    def _command_set_device_pinned_mem_limit(self, pid: str, device: str, size: str) -> str:
        server = self._server(pid)
        server.limits.pop(device, None)
        server.limits[device] = size
        return f"{size}\n"

    def _command_get_default_client_priority(self) -> str:
        return f"{self._priority}\n"

    def _command_set_default_client_priority(self, text: str) -> str:
        if text not in ("0", "1"):
            raise Refused("Invalid priority")
        self._priority = int(text)
        return f"{text}\n"

    def _command_device_query(self, *arguments: str) -> str:
        header = "Device Ordinal,UUID" if "--csv" in arguments else "Device Ordinal  UUID"
        between = "," if "--csv" in arguments else " " * 15
        return "\n".join([header, *(f"{n}{between}{device}" for n, device in enumerate(self._devices))]) + "\n"

    def _command_terminate_client(self, server_pid: str, client_pid: str) -> str:
        """Answers when the client's work has ended, which the real one does not bound either."""
        server = self._server(server_pid)
        with self._changed:
            clients = [client for client in server.clients if str(client.pid) == client_pid]
            if not clients:
                raise Refused(f"Invalid process {client_pid}!")
            for client in clients:
                _tell(client, {"event": "terminate"})
            self._changed.wait_for(lambda: all(c.terminated or c not in server.clients for c in clients))
        return "0\n"

    def _command_fake_fault(self, pid: str) -> str:
        server = self._server(pid)
        with self._changed:
            self._fault(server)
        return ""

    def _command_fake_wedge(self, pid: str) -> str:
        self._server(pid).wedged = True
        return ""

    def _command_quit(self) -> NoReturn:
        with self._changed:
            self._quitting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(server.clients for server in self._servers))
            self.stop()

    def _device(self, name: str) -> str:
        if name.isdecimal() and int(name) < len(self._devices):
            return self._devices[int(name)]
        if name not in self._devices:
            raise Refused(f"Invalid device {name}")
        return name

    # Logs

    def _note(self, text: str) -> None:
        self._write("control.log", "Control", os.getpid(), text)

    def _note_server(self, server: Server, text: str) -> None:
        self._write("server.log", "Server", server.pid, text)

    def _write(self, name: str, who: str, pid: int, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S") + f".{time.time_ns() // 1_000_000 % 1000:03d}"
        with open(os.path.join(self._log, name), "a", encoding="utf-8") as file:
            file.write(f"[{stamp} {who} {pid:5d}] {text}\n")


def _tell(client: Client, message: Message) -> None:
    # A client that has just gone needs no telling; its own thread cleans up.
    with contextlib.suppress(OSError):
        client.line.send(message)


def _percentage(text: str) -> float:
    value = mps_wire.parse_percentage(text)
    if value is None:
        raise Refused("Invalid percentage")
    return value


def _visible_devices(driver: FakeDriver | None) -> list[str]:
    """UUIDs in the order in which the server counts them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [gpu["uuid"] for gpu in driver.describe()["gpus"]] if driver is not None else []
    if told is None:
        return every
    names = [name.strip() for name in told.split(",") if name.strip()]
    return [every[int(name)] if name.isdecimal() and int(name) < len(every) else name for name in names]


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid").strip("pid:[]")
    except OSError:
        return "0"


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().replace("\0", " ").strip()
    except OSError:
        return "?"
