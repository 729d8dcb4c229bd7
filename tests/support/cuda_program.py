"""A CUDA program without any framework: holds memory on a real card and works on it, by NVIDIA's own bindings alone.

    python cuda_program.py MIB

One line of JSON for each round: how many it has done. Out of memory: exit code 2, with CUDA's word for it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from cuda.bindings import driver

MIB = 2**20
ROUND_S = 0.05


def checked(answer: tuple[Any, ...]) -> Any:
    """What the call gave besides its error."""
    error, *rest = answer
    if int(error):
        print(json.dumps({"error": error.name}), flush=True)
        sys.exit(2)
    return rest[0] if rest else None


def main() -> None:
    checked(driver.cuInit(0))
    context = checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(0))))
    checked(driver.cuCtxSetCurrent(context))
    size = int(sys.argv[1]) * MIB
    memory = checked(driver.cuMemAlloc(size))
    rounds = 0
    while True:
        until_s = time.monotonic() + ROUND_S
        while time.monotonic() < until_s:
            checked(driver.cuMemsetD32(memory, rounds, size // 4))
            checked(driver.cuCtxSynchronize())
        rounds += 1
        print(json.dumps({"rounds": rounds}), flush=True)


if __name__ == "__main__":
    main()
