"""Hours of a large yard: hundreds of nodes, things going wrong all the time, and nothing that grows with time.

Where the seeds of `simulate` try every order of events in yards of a few nodes, this tries duration: the same parts,
the same witness, and each hour a look at what they keep. What must not grow: the process, the daemon's state, its
journal, the agents' ledgers. The load is the same at every hour, so that growth is a leak.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import psutil

from faults.network import Weather
from faults.scale import large
from faults.witness import SafetyViolated
from faults.world import World

HOUR_S = 3600.0
#: An acknowledged submission is decided within this time, whatever goes wrong.
DECIDED_S = 2 * HOUR_S
#: Lines that are bad at one time, of a hundred.
BAD_LINES = 5
#: How much more may be kept in the last quarter than in the second, in thousandths: the allocator's noise.
GROWTH_PERMILLE = 100


class Sample(NamedTuple):
    """What is kept at the end of an hour."""

    hour: int
    rss_mib: float
    #: The daemon's state, as its snapshot has it.
    state_kib: int
    jobs: int
    journal_kib: int
    #: Assignments, and keys of ended ones, in all ledgers.
    ledger_rows: int
    timers: int
    #: Since the beginning.
    jobs_ended: int
    records: int
    heads: int
    agents: int


class LargeYard(World):
    """`suffer_hours` in place of `suffer`."""

    def __init__(self, seed: int, nodes: int) -> None:
        super().__init__(seed, large(nodes))
        self.samples: list[Sample] = []
        self.on_sample: Callable[[Sample], None] = lambda sample: None
        self._starts = {"head": 0, "agent": 0}

    def note(self, what: str) -> None:
        super().note(what)
        if what.endswith(" starts"):
            self._starts[what.split()[0]] += 1

    async def suffer_hours(self, hours: int) -> None:
        things: dict[str, tuple[Callable[[], None], int]] = {
            "submit": (self._submit, 600),
            "cancel": (self._cancel, 20),
            "apply_service": (self.tenants.apply_service, 4),
            "load": (self._load, 20),
            "head_dies": (self._head_dies, 6),
            "second_head": (self._second_head, 2),
            "agent_dies": (self._agent_dies, 60),
            "reboot": (self._reboot, 10),
            "bad_weather": (self._bad_weather, 60),
            "server_dies": (self._server_dies, 2),
            "line_breaks": (self._line_breaks, 20),
            "host_vanishes": (self._host_vanishes, 20),
            "clock_steps": (self._clock_steps, 10),
            "trouble_changes": (self._trouble_changes, 6),
        }
        names, weights = list(things), [weight for _, weight in things.values()]
        for hour in range(1, hours + 1):
            while self._loop.time() < hour * HOUR_S:
                name = self.rng.choices(names, weights)[0]
                self.note(name)
                things[name][0]()
                await asyncio.sleep(self.rng.uniform(0.0, 4.0))
                self.raise_failure()
                if self.rng.random() < 0.005:
                    self._settle_accounts()
            self._sample(hour)

    def unfinished(self) -> str:
        # Before the yard forgets what it answered to those who brought no id of their own.
        self._settle_accounts()
        return super().unfinished()

    def _bad_weather(self) -> None:
        lines = [*self.weather.values(), self.head.weather]
        for weather in self.rng.sample(lines, max(1, len(lines) * BAD_LINES // 100)):
            _spoil(weather, self.rng)
            self._later(self.rng.uniform(5.0, 300.0), lambda weather=weather: self._clear_up(weather))  # type: ignore[misc]  # bound at once

    def _clear_up(self, weather: Weather) -> None:
        weather.loss = weather.duplicate = weather.straggle = 0.0
        weather.reorder = weather.mute = weather.deaf = False
        weather.delay_max_s = 0.002
        self._hear_again()

    def _settle_accounts(self) -> None:
        """What was promised and kept is crossed off; what was promised and not kept in time ends the simulation."""
        now_s, kept = self._loop.time(), []
        for sent in self.tenants.submissions:
            answer = self.witness.twin.submission(sent.tenant, sent.submission_id) if sent.is_acknowledged else None
            if answer is not None:
                became = self.witness.accepted.get((sent.tenant, sent.submission_id), 0)
                if answer.job and became not in (0, answer.job):
                    raise SafetyViolated(f"{sent} was told {answer}, and became job {became}")
            elif sent.is_acknowledged and now_s - sent.sent_s > DECIDED_S:
                raise SafetyViolated(f"{sent} was acknowledged {DECIDED_S:.0f} s ago and has no answer")
            elif sent.is_acknowledged or now_s - sent.sent_s < DECIDED_S:
                kept.append(sent)
        self.tenants.submissions[:] = kept

    def _sample(self, hour: int) -> None:
        gc.collect()
        twin = self.witness.twin
        journal = self.broker.streams.get("JRN_sim")
        sample = Sample(
            hour=hour,
            rss_mib=round(psutil.Process().memory_info().rss / 2**20, 1),
            state_kib=len(twin.snapshot()) // 1024,
            jobs=len(twin.cluster.jobs),
            journal_kib=journal.state(self.broker.clock_ms()).bytes // 1024 if journal is not None else 0,
            ledger_rows=sum(len(host.ledger.rows) + len(host.ledger.ended) for host in self.hosts),
            timers=len(self._loop._scheduled),  # type: ignore[attr-defined]  # what waits in the loop has no public count
            jobs_ended=self.witness.jobs_ended,
            records=self.witness.records,
            heads=self._starts["head"],
            agents=self._starts["agent"],
        )
        self.samples.append(sample)
        self.on_sample(sample)


def _spoil(weather: Weather, rng: random.Random) -> None:
    weather.loss = rng.choice((0.0, 0.02, 0.2))
    weather.duplicate = rng.choice((0.0, 0.1, 0.3))
    weather.reorder = rng.random() < 0.5
    weather.straggle = rng.choice((0.0, 0.05, 0.2))
    weather.delay_max_s = rng.choice((0.002, 0.05, 1.5))
    weather.mute = rng.random() < 0.15
    weather.deaf = rng.random() < 0.15


def growth(samples: list[Sample]) -> list[str]:
    """What grew from the second quarter to the last, in words; nothing if the load was too short to tell."""
    quarter = len(samples) // 4
    if not quarter:
        return []
    found = []
    for name in ("rss_mib", "state_kib", "jobs", "journal_kib", "ledger_rows", "timers"):
        before = statistics.median([getattr(each, name) for each in samples[quarter : 2 * quarter]])
        after = statistics.median([getattr(each, name) for each in samples[-quarter:]])
        if name in ("rss_mib", "state_kib") and after * 1000 > before * (1000 + GROWTH_PERMILLE):
            found.append(f"{name} grew from {before} to {after}")
    return found
