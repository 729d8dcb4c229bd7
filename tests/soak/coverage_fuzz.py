"""Every decoder against bytes that a fuzzer breeds by what code they reach (atheris, LLVM's libFuzzer).

What `tests/faults/test_fuzz.py` asks of noise that somebody thought of, this asks of noise that nobody did: each
decoder answers with the thing itself or with its one named error, and the process stays small. The first two bytes of
an input choose the decoder. A crash ends the run with the input in a file of the temporary directory.

PYTHONPATH=tests python -m soak.coverage_fuzz --seconds 300 [--seed N] [INPUT-FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["gpuyard", "gpuyard_protocol", "gpuyard_daemon", "gpuyard_agent", "yaml"]):
    import gpuyard
    from faults.test_fuzz import KINDS
    from gpuyard.requests import job_request, read_items, service_request
    from gpuyard_agent import config as agent_config
    from gpuyard_agent.launch.messages import BadFrame, FrameBuffer, decode_answer, decode_request
    from gpuyard_daemon import config as daemon_config
    from gpuyard_daemon.core.scheduler import Scheduler
    from gpuyard_daemon.ingress import decode_report, decode_submission
    from gpuyard_protocol.bus.base import StoredMessage
    from gpuyard_protocol.codec import Malformed, decode, encode
    from gpuyard_protocol.service.settings_file import BadConfig
    from gpuyard_protocol.subjects import SUBMIT_VERBS

#: The whole process; the decoders' own share is far below.
RSS_MIB_MAX = 1024
#: Larger than any bound on nesting or digits that a decoder keeps.
INPUT_BYTES_MAX = 8192

Decoder = Callable[[bytes], object]


def _message(kind: Any) -> Decoder:
    def read(data: bytes) -> None:
        try:
            message = decode(kind, data)
        except Malformed as error:
            _check_complaint(error)
        else:
            assert decode(kind, encode(message)) == message

    return read


def _submission(verb: str) -> Decoder:
    return lambda data: list(decode_submission(StoredMessage(f"sub.acme.alice.{verb}", data, 7), Counter()))


def _report(data: bytes) -> None:
    decode_report(StoredMessage("rep.n-1.report", data, 7), Counter())


def _snapshot(data: bytes) -> None:
    whole = Scheduler().snapshot()
    at = int.from_bytes(data[:2], "big") % len(whole)
    for text in (data, whole[:at] + data[2:] + whole[at + len(data[2:]) :]):
        _allow(lambda text=text: Scheduler.restore(text), ValueError)


def _frames(data: bytes) -> None:
    buffer = FrameBuffer()

    def feed() -> None:
        for body in buffer.feed(data):
            for read in (decode_request, decode_answer):
                _allow(lambda read=read, body=body: read(body), BadFrame)

    _allow(feed, BadFrame)


def _file(suffix: str, read: Callable[[Path], object], *errors: type[Exception]) -> Decoder:
    path = Path(tempfile.mkdtemp(prefix="gpuyard-fuzz-")) / f"file{suffix}"

    def write_and_read(data: bytes) -> None:
        path.write_bytes(data)
        _allow(lambda: read(path), *errors)

    return write_and_read


def _jobs(path: Path) -> None:
    for item in read_items(path, "jobs"):
        job_request(item, {}).specify()
    for item in read_items(path, "services"):
        service_request(item, {}).specify()


def _allow(read: Callable[[], object], *errors: type[Exception]) -> None:
    """Any other error is a crash."""
    try:
        read()
    except errors as error:
        _check_complaint(error)


def _check_complaint(error: Exception) -> None:
    if not 0 < len(str(error)) < 4000:
        raise AssertionError(f"{len(str(error))} characters to say what is wrong")


def _decoders() -> list[Decoder]:
    return [
        *[_message(kind) for kind in KINDS],
        *[_submission(verb) for verb in SUBMIT_VERBS],
        _report,
        _snapshot,
        _frames,
        _file(".yaml", _jobs, gpuyard.GpuyardError, Malformed),
        _file(".toml", _jobs, gpuyard.GpuyardError, Malformed),
        _file(".toml", gpuyard.load_context, gpuyard.GpuyardError),
        _file(".toml", lambda path: daemon_config.load(path, {}), BadConfig),
        _file(".toml", lambda path: agent_config.load(path, {}), BadConfig),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz every decoder, led by coverage.")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("input", nargs="?", help="repeat this input instead")
    options = parser.parse_args()
    decoders = _decoders()

    def one(data: bytes) -> None:
        if len(data) >= 2:
            decoders[int.from_bytes(data[:2], "big") % len(decoders)](data[2:])

    prefix = f"-artifact_prefix={tempfile.gettempdir()}/gpuyard-fuzz-"
    flags = [
        prefix,
        f"-max_len={INPUT_BYTES_MAX}",
        f"-rss_limit_mb={RSS_MIB_MAX}",
        "-timeout=20",
        "-print_final_stats=1",
    ]
    again = [options.input] if options.input else [f"-max_total_time={options.seconds}", f"-seed={options.seed}"]
    atheris.Setup([sys.argv[0], *flags, *again], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
