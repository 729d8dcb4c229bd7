"""A stand-in for `nvidia-smi compute-policy`, the one thing that has no NVML call. Nothing else of nvidia-smi is here.

Exit codes are nvidia-smi's: 2 a bad argument, 3 not available on this card, 4 no permission, 6 no such card, 9 no
driver.
"""

from __future__ import annotations

from typing import Any

from fake_driver.control import FakeDriver

_NAMES = ("DEFAULT", "SHORT", "MEDIUM", "LONG")


def _fail(code: int, text: str) -> int:
    print(text)
    return code


def _chosen(driver: FakeDriver, wanted: str | None) -> list[dict[str, Any]] | None:
    """Cards by index, UUID or PCI bus id; all of them if none is named; None if one does not exist."""
    cards: list[dict[str, Any]] = [card for card in driver.describe()["gpus"] if not card["removed"]]
    if wanted is None:
        return cards
    chosen = []
    for name in wanted.split(","):
        found = [card for card in cards if name in (str(card["index"]), card["uuid"], card["pci_bus_id"])]
        if not found:
            return None
        chosen += found
    return chosen


def _set_timeslice(driver: FakeDriver, cards: list[dict[str, Any]], text: str) -> int:
    if not text.isdecimal() or int(text) >= len(_NAMES):
        return _fail(2, f"Invalid timeslice value {text!r}: expected 0=DEFAULT, 1=SHORT, 2=MEDIUM, 3=LONG")
    if not driver.get_knob("privileged"):
        return _fail(4, "Insufficient permissions")
    for card in cards:
        gpu = driver.gpu(card["index"])
        if not gpu.get("timeslice_supported") or card["mig"][0] or card["compute_mode"]:
            return _fail(3, f"Failed to set timeslice for GPU {card['pci_bus_id']}: Not Supported")
        gpu.set(timeslice=int(text))
        print(f"Successfully set timeslice to {_NAMES[int(text)]} for GPU {card['pci_bus_id']}.")
    return 0


def main(arguments: list[str]) -> int:
    """The program."""
    if not arguments or arguments[0] != "compute-policy":
        return _fail(2, "this stand-in knows `nvidia-smi compute-policy` alone")
    driver = FakeDriver.here()
    if driver is None:
        return _fail(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    code = driver.take_fault("nvidia-smi")
    if code:
        return _fail(code, "Failed")
    words = [part for word in arguments[1:] for part in word.split("=", 1)]
    given: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word in ("-i", "--id", "--set-timeslice") and words:
            given["--id" if word == "-i" else word] = words.pop(0)
        elif word in ("-l", "--list"):
            given["--list"] = ""
        else:
            return _fail(2, f"Invalid combination of input arguments: {word}")
    cards = _chosen(driver, given.get("--id"))
    if cards is None:
        return _fail(6, "No devices were found")
    if "--set-timeslice" in given:
        return _set_timeslice(driver, cards, given["--set-timeslice"])
    for card in cards:
        print(f"GPU {card['pci_bus_id']}: Timeslice {_NAMES[card['timeslice']]}")
    return 0
