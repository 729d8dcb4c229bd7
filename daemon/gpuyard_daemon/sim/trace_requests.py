"""Readers of inference traces: Azure LLM (CSV) and Mooncake (JSON lines). All become `InferenceRequest`s."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gpuyard_daemon.sim.trace_files import TraceError, open_text, rows


class InferenceRequest(msgspec.Struct, frozen=True):
    """One request to a model."""

    #: Since the trace's first request.
    at_s: float
    context_tokens: int
    generated_tokens: int


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int


def read_azure_llm(path: Path) -> tuple[InferenceRequest, ...]:
    found = []
    for row in rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        # Ten-millionths of a second: one digit more than the parser takes.
        stamp, _, fraction = row.text("TIMESTAMP").partition(".")
        try:
            at_s = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
            at_s += float(f"0.{fraction or 0}")
        except ValueError:
            raise row.wrong("TIMESTAMP", "YYYY-MM-DD hh:mm:ss.fffffff") from None
        found.append(InferenceRequest(at_s, row.whole("ContextTokens"), row.whole("GeneratedTokens")))
    return _from_zero(path, found)


def read_mooncake(path: Path) -> tuple[InferenceRequest, ...]:
    found = []
    decoder = msgspec.json.Decoder(_MooncakeLine)
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                request = decoder.decode(line)
            except msgspec.DecodeError as problem:
                raise TraceError(f"{path}, line {number}: {problem}") from None
            found.append(InferenceRequest(request.timestamp / 1000, request.input_length, request.output_length))
    return _from_zero(path, found)


def _from_zero(path: Path, found: list[InferenceRequest]) -> tuple[InferenceRequest, ...]:
    if not found:
        raise TraceError(f"{path}: no requests")
    found.sort(key=lambda request: request.at_s)
    begin_s = found[0].at_s
    return tuple(msgspec.structs.replace(request, at_s=request.at_s - begin_s) for request in found)
