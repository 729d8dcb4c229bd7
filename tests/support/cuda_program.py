"""A CUDA program without any framework: holds memory on a real card and works on it, by NVIDIA's own bindings alone.

    python cuda_program.py MIB            one JSON line a round: `rounds`; the first with `sms`, the multiprocessors
    python cuda_program.py MIB FILE       as much work queued as the driver takes; the card counts it in FILE

FILE, of 4096 bytes or more, is mapped, and its first word written by the card itself after each piece of work: whoever
maps it too sees what the card still does while this process is halted. Out of memory, as any refusal of CUDA's: exit
code 2, with CUDA's word for it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from cuda.bindings import driver

MIB = 2**20
ROUND_S = 0.05
#: Pieces of work between two lines of output.
QUEUED_A_LINE = 64


def checked(answer: tuple[Any, ...]) -> Any:
    """What the call gave besides its error."""
    error, *rest = answer
    if int(error):
        print(json.dumps({"error": error.name}), flush=True)
        sys.exit(2)
    return rest[0] if rest else None


def work(memory: Any, size: int, sms: int) -> NoReturn:
    rounds = 0
    while True:
        until_s = time.monotonic() + ROUND_S
        while time.monotonic() < until_s:
            checked(driver.cuMemsetD32(memory, rounds, size // 4))
            checked(driver.cuCtxSynchronize())
        rounds += 1
        print(json.dumps({"rounds": rounds, "sms": sms} if rounds == 1 else {"rounds": rounds}), flush=True)


def work_ahead(memory: Any, size: int, file: Path) -> NoReturn:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), mmap.PAGESIZE) as shared:
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        checked(driver.cuMemHostRegister(address, mmap.PAGESIZE, driver.CU_MEMHOSTREGISTER_DEVICEMAP))
        counter = checked(driver.cuMemHostGetDevicePointer(address, 0))
        stream = checked(driver.cuStreamCreate(0))
        queued = 0
        while True:
            # Blocks once the driver's queue is full: the card is always behind.
            checked(driver.cuMemsetD32Async(memory, queued, size // 4, stream))
            queued += 1
            checked(driver.cuMemsetD32Async(counter, queued, 1, stream))
            if queued % QUEUED_A_LINE == 0:
                print(json.dumps({"queued": queued}), flush=True)


def main() -> NoReturn:
    checked(driver.cuInit(0))
    device = checked(driver.cuDeviceGet(0))
    checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(device))))
    sms = checked(
        driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
    )
    size = int(sys.argv[1]) * MIB
    memory = checked(driver.cuMemAlloc(size))
    if len(sys.argv) > 2:
        work_ahead(memory, size, Path(sys.argv[2]))
    work(memory, size, int(sms))


if __name__ == "__main__":
    main()
