"""A stand-in for `nvidia-cuda-mps-control -d` and `-f`: makes the pipe directory's files and starts the daemon."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import sys
from typing import NoReturn

from fake_driver import mps_wire
from fake_driver.control import FakeDriver
from fake_driver.mps_control import Daemon


def _listen(pipe: str) -> socket.socket:
    """The files of the pipe directory. Raises `OSError` if a daemon runs there already."""
    path = os.path.join(pipe, "control")
    if len(os.fsencode(path)) > mps_wire.SOCKET_PATH_MAX:
        raise OSError(f"{path}: path of the control socket is too long")
    os.makedirs(pipe, exist_ok=True)
    lock = os.open(os.path.join(pipe, "control_lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("An instance of this daemon is already running") from None
    fifo = os.path.join(pipe, "log")
    if not os.path.exists(fifo):
        os.mkfifo(fifo)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for name, mode in (("control_privileged", 0o600), ("control", 0o666)):
        place = os.path.join(pipe, name)
        if os.path.exists(place) and stat.S_ISSOCK(os.stat(place).st_mode):
            os.unlink(place)
        server = listener if name == "control" else socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(place)
        os.chmod(place, mode)
    listener.listen(128)
    with open(os.path.join(pipe, "nvidia-cuda-mps-control.pid"), "w", encoding="ascii") as file:
        file.write(str(os.getpid()))
    return listener


def _run_daemon(*, multiuser: bool, ready: int | None) -> NoReturn:
    pipe = mps_wire.pipe_directory()
    log = os.environ.get("CUDA_MPS_LOG_DIRECTORY") or "/var/log/nvidia-mps"
    driver = FakeDriver.here()
    if driver is not None and driver.take_fault("mps:start"):
        sys.exit("Failed to start MPS control daemon")
    try:
        os.makedirs(log, exist_ok=True)
        listener = _listen(pipe)
    except OSError as problem:
        sys.exit(str(problem))
    daemon = Daemon(pipe, log, driver, multiuser=multiuser)
    signal.signal(signal.SIGTERM, lambda *_: daemon.stop())
    if ready is not None:
        os.write(ready, b"1")
        os.close(ready)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
    daemon.serve(listener)


def _run_in_background(*, multiuser: bool) -> NoReturn:
    """The caller returns when the daemon listens, or has said why not."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        os.close(reader)
        _run_daemon(multiuser=multiuser, ready=writer)
    os.close(writer)
    os.wait()
    sys.exit(0 if os.read(reader, 1) else 1)


def main(arguments: list[str]) -> int:
    """The daemon's half of the program."""
    if "-v" in arguments:
        print("CUDA MPS control daemon, binary version 13000")
        return 0
    background = bool({"-d", "--daemon"} & set(arguments))
    known = {"-d", "--daemon", "-f", "--foreground", "-M", "--multiuser-server"}
    if unknown := [argument for argument in arguments if argument not in known]:
        # Static partitioning came with a newer binary: one probes for it and is refused.
        print(f"nvidia-cuda-mps-control: unrecognized option '{unknown[0]}'", file=sys.stderr)
        return 1
    multiuser = bool({"-M", "--multiuser-server"} & set(arguments))
    if background:
        _run_in_background(multiuser=multiuser)
    _run_daemon(multiuser=multiuser, ready=None)
