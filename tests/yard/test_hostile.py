"""What a role does within its rights and far too much of: it harms itself, and nobody else waits for it.

Each time another tenant's requests and events are watched meanwhile. Floods up to a quota are in
`tests/contracts/test_bus.py` (streams at their bounds), poison in `tests/faults/test_fuzz.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.nats import NatsBus
from support.role_yard import Heard, Roles, RoleYard

SUBSCRIPTIONS = 10_000
#: More than the server keeps for one reader (64 MiB) and the kernel takes beside it.
SENT_MIB = 96
#: An acknowledgement and an event of somebody else, while it happens: milliseconds on a quiet machine.
PATIENCE_S = 2.0
#: The server gives a reader 5 s to take what is sent to it.
PUT_OUT_S = 20.0

#: Reads what is said to its tenant, until it is suspended.
READER = """
import asyncio, sys
from gpuyard_protocol.bus.nats import connect

async def main():
    url, inbox, seed, subject = sys.argv[1:]
    bus = await connect(url, name="slow", inbox_prefix=inbox, seed=seed)
    await bus.subscribe(subject, lambda message: None)
    await bus.flush()
    print("reads", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def others_are_served(roles: Roles) -> AsyncIterator[list[float]]:
    """Tenant globex submits and hears its events all the while; each round's seconds are noted."""
    daemon, gus = await roles.get("daemon"), await roles.get("globex gus")
    rounds: list[float] = []
    stopped = asyncio.Event()

    async def live() -> None:
        while not stopped.is_set():
            began, heard = time.monotonic(), Heard()
            subscription = await gus.subscribe(f"evt.globex.{len(rounds)}", heard)
            await gus.flush()
            await gus.stream_publish("sub.globex.gus.submit", b"{}", timeout=PATIENCE_S)
            await daemon.publish(f"evt.globex.{len(rounds)}", b"{}")
            await asyncio.wait_for(heard.one(), PATIENCE_S)
            await subscription.unsubscribe()
            rounds.append(time.monotonic() - began)

    living = asyncio.create_task(live())
    try:
        yield rounds
    finally:
        stopped.set()
        await living
    assert rounds
    assert max(rounds) < PATIENCE_S


async def test_ten_thousand_subscriptions_slow_nobody_down(roles: Roles) -> None:
    alice = await roles.get("acme alice")
    async with others_are_served(roles) as rounds:
        for number in range(SUBSCRIPTIONS):
            await alice.subscribe(f"evt.acme.{number}", lambda _: None)
        await alice.flush(30.0)
        held = len(rounds)
        while len(rounds) < held + 20:
            await asyncio.sleep(0.01)
    # And its own events still reach it.
    heard, daemon = Heard(), await roles.get("daemon")
    await alice.subscribe("evt.acme.last", heard)
    await alice.flush()
    await daemon.publish("evt.acme.last", b"{}")
    assert (await heard.one()).subject == "evt.acme.last"


async def test_who_does_not_read_is_put_out_and_nobody_waits_for_it(roles: Roles, yard: RoleYard) -> None:
    inbox, seed = yard.role("acme bob")
    command = [sys.executable, "-c", READER, yard.server.url, inbox, str(seed), "evt.acme.>"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    seen = len(yard.server.log)
    reader = await asyncio.to_thread(
        subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert reader.stdout is not None
        assert await asyncio.to_thread(reader.stdout.readline) == b"reads\n"
        reader.send_signal(signal.SIGSTOP)
        daemon = await roles.get("daemon")
        async with others_are_served(roles), asyncio.timeout(PUT_OUT_S):
            await _send(daemon, SENT_MIB)
            while "Slow Consumer" not in yard.server.log[seen:]:
                await asyncio.sleep(0.05)
    finally:
        reader.kill()
        await asyncio.to_thread(reader.wait)
        if reader.stdout is not None:
            reader.stdout.close()


#: Headers by which JetStream lets a publisher order something of the stream.
ORDERS_TO_A_STREAM = (
    {"Nats-Rollup": "all"},
    {"Nats-Rollup": "sub"},
    {"Nats-TTL": "1"},
    {"Nats-Expected-Last-Sequence": "0"},
    {"Nats-Expected-Last-Subject-Sequence": "0", "Nats-Expected-Last-Subject-Sequence-Subject": "jrn.leader"},
    {"Nats-Expected-Stream": "JRN_lab"},
    {"Nats-Expected-Last-Msg-Id": "x"},
    {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
    {"Nats-Incr": "+1"},
    {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": "sub.globex.gus.submit"},
    {"Nats-Stream-Source": "JRN_lab 1 > >"},
    {"Nats-Sequence": "1", "Nats-Stream": "JRN_lab"},
)


@pytest.mark.parametrize(
    ("attacker", "subject", "victim", "its_subject"),
    [
        ("acme alice", "sub.acme.alice.submit", "globex gus", "sub.globex.gus.submit"),
        ("node n1", "rep.n1.report", "node n2", "rep.n2.report"),
    ],
)
async def test_headers_order_nothing_of_what_is_others(
    roles: Roles, attacker: str, subject: str, victim: str, its_subject: str
) -> None:
    one, other, daemon = await roles.get(attacker), await roles.get(victim), await roles.get("daemon")
    before = await other.stream_publish(its_subject, b"{}", timeout=PATIENCE_S)
    for headers in ORDERS_TO_A_STREAM:
        with contextlib.suppress(BusError):
            await one.stream_publish(subject, b"{}", headers=headers, timeout=PATIENCE_S)
    kept = await daemon.get_message(before.stream, before.sequence)
    assert kept is not None
    assert kept.subject == its_subject
    after = await other.stream_publish(its_subject, b"{}", timeout=PATIENCE_S)
    state = await daemon.stream_state(before.stream)
    stored = [await daemon.get_message(before.stream, number) for number in range(before.sequence, after.sequence + 1)]
    assert state.last_sequence == after.sequence
    assert not after.duplicate
    # Nothing of the attacker's came anywhere but to its own subject.
    assert {message.subject for message in stored[1:-1] if message is not None} <= {subject}


async def _send(daemon: NatsBus, mib: int) -> None:
    for _ in range(mib):
        with contextlib.suppress(BusError):
            await daemon.publish("evt.acme.17", b"x" * 2**20)
            await daemon.flush(10.0)
