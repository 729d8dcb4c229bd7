"""A stand-in for `nvidia-cuda-mps-control` without options: takes commands from standard input to the daemon.

Apart from the daemon because it is run for every question, and starts in half the time without the daemon's imports.
Like the real one it waits for an answer without any limit.
"""

from __future__ import annotations

import sys

from fake_driver.mps_wire import Line, pipe_directory


def main() -> int:
    """One answer per line of input; 1 if the daemon cannot be reached."""
    line = None
    for text in sys.stdin:
        words = text.split()
        if not words:
            continue
        try:
            line = line or Line.connect(pipe_directory())
            line.send({"command": text.strip()})
        except OSError:
            print("Cannot find MPS control daemon process")
            return 1
        answer = line.receive()
        if words[0] == "quit":
            return 0
        if answer is None or "refused" in answer:
            print("Cannot send command to MPS control daemon process")
            return 1
        print(answer["answer"], end="", flush=True)
    return 0
