"""Lines out of pieces of output: whole, with where they stand."""

from __future__ import annotations

from gpuyard.cli.logs import LineCutter
from gpuyard_protocol.nodes import LogChunk


def chunk(data: bytes, offset: int, attempt: int = 1) -> LogChunk:
    return LogChunk(job=17, attempt=attempt, replica=2, stream="err", offset=offset, data=data)


def test_a_line_in_two_pieces_is_one_line_at_its_beginning() -> None:
    cutter = LineCutter()
    assert cutter.take(chunk(b"one\ntw", 0)) == [
        {"job": 17, "attempt": 1, "replica": 2, "stream": "err", "offset": 0, "line": "one"}
    ]
    found = cutter.take(chunk(b"o\n\nthree", 6))
    assert [(each["offset"], each["line"]) for each in found] == [(4, "two"), (8, "")]
    assert [(each["offset"], each["line"]) for each in cutter.rest()] == [(9, "three")]
    assert cutter.rest() == []


def test_the_last_line_of_an_attempt_comes_before_the_next_attempts_first() -> None:
    cutter = LineCutter()
    assert cutter.take(chunk(b"cut o", 0)) == []
    found = cutter.take(chunk(b"again\n", 0, attempt=2))
    assert [(each["attempt"], each["offset"], each["line"]) for each in found] == [(1, 0, "cut o"), (2, 0, "again")]


def test_what_is_no_text_is_replaced() -> None:
    assert LineCutter().take(chunk(b"\xff\x00ok\n", 5))[0]["line"] == "\ufffd\x00ok"
