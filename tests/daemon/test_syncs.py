"""Desired sets of any size reach their node, in one message or in several."""

from __future__ import annotations

import pytest

from gpuyard_daemon.syncs import SYNC_BYTES_MAX, sync_messages
from gpuyard_protocol.codec import decode
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import Command, Desired, Launch, Start, Sync, SyncPart
from gpuyard_protocol.resources import NoGpu

SERVER_BYTES_MAX = 8 * 1024 * 1024


def wanted(count: int, script_bytes: int) -> list[Desired]:
    launch = Launch(tenant="acme", user="alice", script="#!/bin/sh\n" + "#" * script_bytes)
    return [
        Desired(start=Start(key=AssignmentKey(number, 1, 0), partition=NoGpu(), launch=launch))
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_what_fits_goes_in_one_message(count: int) -> None:
    (data,) = sync_messages("n-1", "i", 7, 9, wanted(count, 100), 1234)
    sync = decode(Command, data, max_bytes=SERVER_BYTES_MAX)
    assert isinstance(sync, Sync)
    assert (sync.n, sync.epoch, sync.clock_ms, len(sync.desired)) == (9, 7, 1234, count)


def test_what_does_not_fit_goes_in_pieces_that_are_the_whole_together() -> None:
    desired = wanted(100, 250_000)
    messages = sync_messages("n-1", "i", 7, 9, desired)
    assert len(messages) == 7
    parts: list[SyncPart] = []
    for data in messages:
        assert len(data) < SYNC_BYTES_MAX + 4096
        part = decode(Command, data, max_bytes=SERVER_BYTES_MAX)
        assert isinstance(part, SyncPart)
        parts.append(part)
    assert [(part.part, part.parts, part.n) for part in parts] == [(number, 7, 9) for number in range(1, 8)]
    assert [entry for part in parts for entry in part.desired] == desired


def test_one_assignment_larger_than_the_bound_goes_alone() -> None:
    messages = sync_messages("n-1", "i", 7, 9, wanted(3, SYNC_BYTES_MAX))
    assert len(messages) == 3
    assert max(map(len, messages)) < SERVER_BYTES_MAX
