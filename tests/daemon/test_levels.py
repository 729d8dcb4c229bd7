"""Streams that fill are noticed before they refuse anything."""

from __future__ import annotations

from gpuyard_daemon.levels import StreamLevels
from gpuyard_protocol.bus.memory import MemoryBroker, MemoryBus
from gpuyard_protocol.subjects import JOURNAL_ENTRY, streams


async def test_a_journal_that_fills_is_said_and_asks_for_a_snapshot() -> None:
    bus = MemoryBus(MemoryBroker())
    names = streams("main", 10_000)
    for spec in names:
        await bus.ensure_stream(spec)
    calls: list[str] = []
    levels = StreamLevels(bus, names, lambda: calls.append("snapshot"))
    await levels.look()
    assert (levels.used_part["JRN_main"], calls) == (0.0, [])
    await bus.stream_publish(JOURNAL_ENTRY, b"x" * 5_500)
    await levels.look()
    assert levels.used_part["JRN_main"] > 0.8
    assert levels.messages["JRN_main"] == 1
    assert calls == ["snapshot"]
    await bus.close()
    await levels.look()
    assert levels.used_part["JRN_main"] > 0.8
