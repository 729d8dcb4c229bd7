"""A stand-in for a CUDA program: takes memory on the card it is given, keeps it busy, and fails the way CUDA fails.

It finds its card through CUDA_VISIBLE_DEVICES, connects to MPS where CUDA_MPS_PIPE_DIRECTORY leads to a daemon and
keeps its limits, burns CPU time in small steps, stops while it is checkpointed, and ends when MPS ends it. One JSON
object per line goes to standard output: `ready`, `progress` (steps done: equal amounts of CPU time, so shares can be
compared), `error`, `done`. Its errors are exit codes of their own, because CUDA's numbers do not fit into one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from fake_driver import mps_wire
from fake_driver.control import MIB, NO_INSTANCE, DriverRefused, Error, FakeDriver, Flag, Request
from fake_driver.mps_wire import Line

EXIT_OUT_OF_MEMORY = 70
EXIT_NO_DEVICE = 71
EXIT_DEVICE_BUSY = 72
EXIT_MPS_REFUSED = 73
EXIT_MPS_TERMINATED = 75
EXIT_FAULT = 76

#: How long a reported load lasts without being reported again: a frozen program is soon seen as idle.
LOAD_LASTS_S = 1.0


def say(event: str, **facts: Any) -> None:
    """One line of output."""
    print(json.dumps({"event": event, **facts}), flush=True)


def fail(code: int, cuda: int, text: str) -> NoReturn:
    """As a program that checks its CUDA calls; from any thread."""
    say("error", cuda=cuda, text=text)
    sys.stdout.flush()
    os._exit(code)


class Place:
    """A card, or a MIG device, that CUDA would count."""

    def __init__(self, driver: FakeDriver, uuid: str) -> None:
        self.uuid = uuid
        self.gpu, self.gi, self.ci = driver.find(uuid)


def visible_places(driver: FakeDriver) -> list[Place]:
    """What CUDA enumerates, in the order given; the list ends at the first name that means nothing.

    A card in MIG mode stands for its first MIG device, and is nothing without one.
    """
    cards = driver.describe()["gpus"]
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [card["uuid"] for card in cards] if told is None else [name.strip() for name in told.split(",")]
    places: list[Place] = []
    for name in names:
        if name.isdecimal() and int(name) < len(cards):
            name = cards[int(name)]["uuid"]
        try:
            place = Place(driver, name)
        except DriverRefused:
            break
        card = cards[place.gpu]
        if place.gi == NO_INSTANCE and card["mig"][0]:
            devices = [device["uuid"] for instance in card["instances"] for device in instance["compute"]]
            if not devices:
                continue
            place = Place(driver, devices[0])
        else:
            place.uuid = card["uuid"] if place.gi == NO_INSTANCE else name
        places.append(place)
    return places


class Mps:
    """The connection to an MPS server, for as long as the program runs."""

    def __init__(self, line: Line, welcome: dict[str, Any]) -> None:
        self._line = line
        self.server: int = welcome["server"]
        self.percentage: float = welcome["percentage"]
        #: Bytes, None without a limit.
        self.limit: int | None = welcome["limit"]
        threading.Thread(target=self._listen, daemon=True).start()

    @classmethod
    def connect(cls, device: str, uid: int | None) -> Mps | None:
        """None: no daemon there, so the program runs without MPS, as CUDA does."""
        directory = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
        if not directory:
            return None
        try:
            line = Line.connect(directory)
        except OSError:
            return None
        facts: dict[str, Any] = {
            "device": device,
            "percentage": os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"),
            "limits": mps_wire.parse_limits(os.environ.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")),
        }
        if uid is not None:
            facts["uid"] = uid
        line.send({"client": facts})
        welcome = line.receive()
        if welcome is None:
            fail(EXIT_MPS_REFUSED, 805, "MPS connection failed")
        if "error" in welcome:
            code = EXIT_NO_DEVICE if welcome["error"] == 100 else EXIT_MPS_REFUSED
            fail(code, welcome["error"], "MPS server refused the client")
        return cls(line, welcome)

    def _listen(self) -> None:
        for message in self._line.messages():
            if message.get("event") == "terminate":
                self._line.send({"terminated": True})
                fail(EXIT_MPS_TERMINATED, 810, "MPS client terminated")
            if message.get("event") == "fault":
                fail(EXIT_FAULT, 719, "unspecified launch failure")
            fail(EXIT_MPS_REFUSED, 806, "MPS server died")
        fail(EXIT_MPS_REFUSED, 806, "MPS control daemon died")

    def fault(self) -> None:
        """This program's kernel does something fatal."""
        self._line.send({"fault": True})

    def leave(self) -> None:
        """At a normal exit."""
        self._line.send({"bye": True})


class Work:
    """The loop, and the thread that stops it at a checkpoint."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self._changed = threading.Condition()
        self._stop_asked = False
        self._resting = False

    def serve_checkpoints(self) -> None:
        """For the life of the program, in its own thread."""
        while True:
            request = self._driver.next_request(timeout_s=3600)
            if request is None:
                continue
            if request is Request.LOCK:
                self._rest()
            wanted = self._driver.answer_request()
            if request is Request.UNLOCK or (request is Request.LOCK and not wanted):
                self._resume()

    def _rest(self) -> None:
        with self._changed:
            self._stop_asked = True
            self._changed.wait_for(lambda: self._resting)

    def _resume(self) -> None:
        with self._changed:
            self._stop_asked = False
            self._changed.notify_all()

    def pause_point(self) -> None:
        """Between steps: CUDA calls block while the process is locked."""
        with self._changed:
            self._resting = self._stop_asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._stop_asked)
            self._resting = False


def burn(cpu_s: float) -> None:
    """So much CPU time of this thread: on a busy machine a step takes longer, not less."""
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        for _ in range(2000):
            pass


class Program:
    """One run."""

    def __init__(self, options: argparse.Namespace, driver: FakeDriver, place: Place, mps: Mps | None) -> None:
        self._options = options
        self._driver = driver
        self._place = place
        self._mps = mps
        self._held = 0
        self._flags = Flag.MPS_CLIENT if mps is not None else Flag(0)
        if options.unsuspendable:
            self._flags |= Flag.UNSUSPENDABLE
        self._work = Work(driver)

    def take(self, mib: int) -> None:
        """Device memory; the limit of MPS also counts what CUDA itself takes."""
        limit = self._mps.limit if self._mps is not None else None
        if limit is not None and self._held + mib * MIB > limit:
            fail(EXIT_OUT_OF_MEMORY, 2, f"out of memory: {self._held // MIB} MiB held, limit {limit // MIB} MiB")
        place = self._place
        try:
            self._driver.allocate(os.getpid(), place.gpu, place.gi, place.ci, mib * MIB, int(self._flags))
        except DriverRefused as refusal:
            if refusal.code == Error.MEMORY:
                fail(EXIT_OUT_OF_MEMORY, 2, "out of memory")
            if refusal.code in (Error.IN_USE, Error.NO_PERMISSION):
                fail(EXIT_DEVICE_BUSY, 46, "all CUDA-capable devices are busy or unavailable")
            fail(EXIT_NO_DEVICE, 100, str(refusal))
        self._held += mib * MIB

    def run(self) -> int:
        """Until the steps or the time are used up."""
        options = self._options
        # The context comes first; a context alone can be too much for a limit.
        self.take(options.context)
        self.take(options.memory)
        if not options.unsuspendable and self._mps is None and self._place.gi == NO_INSTANCE:
            # The first look makes the driver wait for this program's answers from here on.
            self._driver.next_request(timeout_s=0)
            threading.Thread(target=self._work.serve_checkpoints, daemon=True).start()
        say(
            "ready",
            pid=os.getpid(),
            device=self._place.uuid,
            mib=self._held // MIB,
            mps_server=self._mps.server if self._mps is not None else None,
            percentage=self._mps.percentage if self._mps is not None else None,
            limit_mib=self._mps.limit // MIB if self._mps is not None and self._mps.limit is not None else None,
        )
        steps = self._loop()
        if self._mps is not None:
            self._mps.leave()
        self._driver.release(os.getpid())
        say("done", steps=steps)
        return int(options.exit)

    def _loop(self) -> int:
        options = self._options
        began = time.monotonic()
        next_report = began + options.report
        load_until = 0.0
        steps = 0
        load = options.load * (self._mps.percentage / 100 if self._mps is not None else 1)
        while not (options.steps and steps >= options.steps):
            now = time.monotonic()
            if options.seconds and now - began >= options.seconds:
                break
            if options.fault_after is not None and now - began >= options.fault_after:
                self._fault()
            self._work.pause_point()
            if load and now >= load_until - LOAD_LASTS_S / 2:
                self._driver.load(os.getpid(), round(load), round(load / 2), lasting_s=LOAD_LASTS_S)
                load_until = now + LOAD_LASTS_S
            if options.sleep:
                time.sleep(options.step_ms / 1000)
            else:
                burn(options.step_ms / 1000)
            steps += 1
            if options.grow:
                self.take(options.grow)
            if time.monotonic() >= next_report:
                say("progress", steps=steps, mib=self._held // MIB)
                next_report += options.report
        return steps

    def _fault(self) -> NoReturn:
        """An illegal address: reported by the driver as Xid 31, and fatal for all who share the server."""
        place = self._place
        gi, ci = place.gi, place.ci
        self._driver.post_event(place.gpu, 0x8, 31, gi=gi, ci=ci)
        if self._mps is not None:
            self._mps.fault()
        fail(EXIT_FAULT, 700, "an illegal memory access was encountered")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fake-cuda", description=__doc__)
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="what the program allocates")
    parser.add_argument("--context", type=int, default=300, metavar="MIB", help="what CUDA itself takes")
    parser.add_argument("--grow", type=int, default=0, metavar="MIB", help="allocate so much more after each step")
    parser.add_argument("--seconds", type=float, default=0, help="run so long (0: no limit)")
    parser.add_argument("--steps", type=int, default=0, help="do so many steps (0: no limit)")
    parser.add_argument("--step-ms", type=float, default=20, help="CPU time of one step")
    parser.add_argument("--sleep", action="store_true", help="steps sleep instead of burning CPU time")
    parser.add_argument("--load", type=float, default=100, metavar="PCT", help="how busy the card is reported")
    parser.add_argument("--report", type=float, default=0.5, metavar="S", help="time between progress lines")
    parser.add_argument("--fault-after", type=float, default=None, metavar="S", help="then read an illegal address")
    parser.add_argument("--unsuspendable", action="store_true", help="holds what cannot be checkpointed")
    parser.add_argument("--ignore-sigterm", action="store_true", help="only SIGKILL ends it")
    parser.add_argument("--ordinal", type=int, default=0, help="which of the visible devices")
    parser.add_argument("--uid", type=int, default=None, help="user that MPS is told")
    parser.add_argument("--exit", type=int, default=0, metavar="CODE", help="exit code at the end")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """The program."""
    options = _options(arguments)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    driver = FakeDriver.here()
    places = visible_places(driver) if driver is not None else []
    if driver is None or options.ordinal >= len(places):
        fail(EXIT_NO_DEVICE, 100, "no CUDA-capable device is detected")
    place = places[options.ordinal]
    return Program(options, driver, place, Mps.connect(place.uuid, options.uid)).run()
