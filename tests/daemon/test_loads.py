"""Load reports: the first change at once, then at most one a second; silent sources stop counting."""

from __future__ import annotations

import json

from gpuyard_daemon.core.state.inputs import LoadReported
from gpuyard_daemon.loads import SOURCE_EXPIRES_S, TICK_S, Loads
from gpuyard_protocol.bus.base import Message
from gpuyard_protocol.queries import ServicesPage, ServicesQuery
from gpuyard_protocol.services import ServiceView


class World:
    def __init__(self, concurrency: int = 0) -> None:
        self.now = 1000.0
        self.told: list[int] = []
        self._before = concurrency
        self.loads = Loads(self, self._add, monotonic=lambda: self.now)

    def has_service(self, tenant: str, name: str) -> bool:
        return (tenant, name) == ("acme", "chat")

    def services_page(self, tenant: str | None, query: ServicesQuery) -> ServicesPage:
        view = ServiceView(
            service="chat", tenant="acme", user="alice", model="", version="", wanted=0, running=0, starting=0,
            pending=0, min_replicas=0, max_replicas=9, target_concurrency=1, concurrency=self._before, queue_depth=0,
        )  # fmt: skip
        return ServicesPage(services=(view,))

    def _add(self, fact: LoadReported) -> None:
        self.told.append(fact.concurrency)

    def report(self, concurrency: int, source: str = "gateway", subject: str = "load.acme.chat") -> None:
        payload = json.dumps({"concurrency": concurrency, "source": source}).encode()
        self.loads.on_message(Message(subject, payload))

    def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            self.loads.tick()


def test_the_first_change_passes_at_once_and_further_ones_once_a_second() -> None:
    world = World()
    for load in (5, 6, 7, 8):
        world.report(load)
    assert world.told == [5]
    world.pass_s(0.75)
    assert world.told == [5]
    world.pass_s(0.5)
    assert world.told == [5, 8]


def test_an_unchanged_load_is_no_news() -> None:
    world = World()
    for _ in range(5):
        world.report(5)
        world.pass_s(2)
    assert world.told == [5]


def test_sources_add_up_and_the_newest_of_each_counts() -> None:
    world = World()
    world.report(5, "east")
    world.pass_s(2)
    world.report(3, "west")
    world.pass_s(2)
    world.report(1, "east")
    assert world.told == [5, 8, 4]


def test_a_source_that_falls_silent_stops_counting() -> None:
    world = World()
    world.report(5, "east")
    world.pass_s(20)
    world.report(3, "west")
    world.pass_s(SOURCE_EXPIRES_S - 15)
    assert world.told == [5, 8, 3]


def test_after_a_restart_a_load_stands_until_its_sources_had_time_to_speak() -> None:
    world = World(concurrency=9)
    world.pass_s(SOURCE_EXPIRES_S - 1)
    assert world.told == []
    world.pass_s(2)
    assert world.told == [0]


def test_a_load_that_is_what_it_was_before_the_restart_is_no_news() -> None:
    world = World(concurrency=9)
    world.report(9)
    world.pass_s(SOURCE_EXPIRES_S - 1)
    assert world.told == []


def test_what_is_unreadable_or_for_nobody_is_counted() -> None:
    world = World()
    world.loads.on_message(Message("load.acme.chat", b"\xff"))
    world.loads.on_message(Message("load.acme", b'{"concurrency": 1}'))
    world.report(-1)
    world.report(10**12)
    world.report(1, source="x" * 1000)
    world.report(1, subject="load.acme.other")
    assert (world.told, world.loads.malformed, world.loads.unknown) == ([], 5, 1)
