"""So many submissions a second for each tenant; the others are told when to come again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gpuyard_daemon.config import load
from gpuyard_daemon.core.state.inputs import CancelRequested, Cursors, Input, JobSubmitted, RequestRefused
from gpuyard_daemon.inbox import Inbox
from gpuyard_daemon.ingress import Ingress
from gpuyard_daemon.rates import Rate, Rates
from gpuyard_protocol.bus.base import StoredMessage
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.codec import encode
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.service.settings_file import BadConfig
from support.builders import CoreHarness, node

START_MS = 1_700_000_000_000


def test_a_bucket_lets_a_burst_pass_and_then_so_many_a_second() -> None:
    rates = Rates(Rate(2, 3))
    assert [rates.take("acme", START_MS) for _ in range(4)] == [0, 0, 0, 500]
    assert rates.take("acme", START_MS + 499) == 1
    assert rates.take("acme", START_MS + 500) == 0
    assert rates.take("acme", START_MS + 500) == 500
    assert [rates.take("acme", START_MS + 60_000) for _ in range(4)] == [0, 0, 0, 500]
    assert rates.refused == 4


def test_tenants_have_buckets_of_their_own_and_no_limit_is_none() -> None:
    rates = Rates(Rate(), {"acme": Rate(1, 1)})
    assert [rates.take("acme", START_MS) for _ in range(2)] == [0, 1000]
    assert [rates.take("globex", START_MS) for _ in range(1000)] == [0] * 1000


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    rates = Rates(Rate(1, 1))
    assert rates.take("acme", START_MS) == 0
    assert rates.take("acme", START_MS - 3_600_000) == 1000
    assert rates.take("acme", START_MS + 999) == 1


class Door:
    """An ingress that is handed messages as the stream would hand them."""

    def __init__(self, rates: Rates) -> None:
        self.inbox = Inbox(Cursors(), lambda: None)
        self.ingress = Ingress(MemoryBus(MemoryBroker()), "main", self.inbox, rates)
        self._sequence = 0

    def say(self, verb: str, payload: object, at_ms: int = START_MS) -> list[Input]:
        self._sequence += 1
        message = StoredMessage(f"sub.acme.alice.{verb}", encode(payload), self._sequence, stored_ms=at_ms)
        self.ingress._take_submissions([message])
        return list(self.inbox.take().inputs)


async def test_what_is_beyond_the_rate_is_answered_and_when_it_was_stored_decides() -> None:
    """Not when it is read: a daemon that was away for long reads everything at once."""
    door = Door(Rates(Rate(1, 2)))
    job = {"command": ["true"]}
    kinds = [type(door.say("submit", job, START_MS + 100 * step)[0]) for step in range(4)]
    assert kinds == [JobSubmitted, JobSubmitted, RequestRefused, RequestRefused]
    (later,) = door.say("submit", job, START_MS + 5_000)
    assert isinstance(later, JobSubmitted)
    assert door.ingress.counts == Counter(rate_limited=2)


async def test_of_many_in_one_message_those_within_the_rate_pass() -> None:
    door = Door(Rates(Rate(1, 2)))
    found = door.say("submit-many", {"jobs": [{"command": ["true"]}] * 4})
    assert [type(one) for one in found] == [JobSubmitted, JobSubmitted, RequestRefused, RequestRefused]
    (cancel,) = door.say("cancel", {"job": 1})
    assert isinstance(cancel, CancelRequested)


def test_a_refusal_says_when_to_come_again_and_is_not_remembered() -> None:
    yard = CoreHarness()
    yard.join(node("n-1", 2))
    refused = RequestRefused(
        tenant="acme", user="alice", submission_id="mine", reason=Why("RateLimited", "too many"), retry_after_ms=700
    )
    yard.turn(refused)
    answer = yard.answers[-1]
    assert (answer.accepted, answer.reason, answer.retry_after_ms) == (False, Why("RateLimited", "too many"), 700)
    number = yard.submit(submission_id="mine")
    assert number == 1
    # Once it is accepted, that is the answer for ever.
    yard.turn(refused)
    assert (yard.answers[-1].accepted, yard.answers[-1].job) == (True, 1)


def test_rates_are_read_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text(
        "[tenants.default]\nsubmissions_per_s = 10\n[tenants.acme]\nsubmissions_burst = 3\n"
        "[tenants.globex]\nsubmissions_per_s = 0\n[tenants.initech]\ngpus_max = 4\n"
    )
    default, named = load(file, {}).rates()
    assert default == Rate(10, 100)
    assert named == {"acme": Rate(10, 3), "globex": Rate(0, 0), "initech": Rate(10, 100)}
    file.write_text("[tenants.acme]\nsubmissions_per_s = -1\n")
    with pytest.raises(BadConfig, match=r"tenants\.acme\.submissions_per_s"):
        load(file, {})
