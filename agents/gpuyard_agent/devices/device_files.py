"""Device files of a card, and of one MIG instance: what a process must be able to open, and nothing of its neighbours'.

A card's file is numbered by its minor number, which is not its index. An instance is opened through two capability
files, one for each of its halves; the driver tells their numbers in a file of its own. Files may not exist until
somebody needs them (`nvidia-modprobe` makes them): whoever closes the others must see to that.
"""

from __future__ import annotations

from pathlib import Path

#: Lines such as `gpu0/gi9/ci0/access 31`: number of the capability file.
MIG_MINORS = Path("/proc/driver/nvidia-caps/mig-minors")
#: Of the driver as a whole; every CUDA program opens them.
_COMMON = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


def files_of(minor: int, instance: tuple[int, int] | None = None) -> tuple[str, ...]:
    """`instance`: ids of its GPU instance and its compute instance."""
    card = (f"/dev/nvidia{minor}", *_COMMON)
    if instance is None:
        return card
    gpu, compute = instance
    numbers = _capabilities()
    wanted = (f"gpu{minor}/gi{gpu}/access", f"gpu{minor}/gi{gpu}/ci{compute}/access")
    return (*card, *(f"/dev/nvidia-caps/nvidia-cap{numbers[name]}" for name in wanted if name in numbers))


def _capabilities() -> dict[str, int]:
    try:
        lines = MIG_MINORS.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
